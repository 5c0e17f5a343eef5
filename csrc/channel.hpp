// One direction of one boundary between two ranks: persistent slots on the receiving end, at most
// two sends under way on the sending end.
//
//   sender                                                receiver: 3 slots
//   send 4  ├──────────►                                  slot 0  minibatch 2, in use until its backward
//   send 5     ├──────────►                               slot 1  minibatch 3, in use
//   send 6        (waits for 4)  ├──────────►             slot 2  receive posted, lands here
//                                             time ->
//
// Receives are posted ahead into every free slot, in ring order. MPI matches messages of one sender
// and tag in the order both were posted, so the n-th message always lands in the n-th posted slot.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "memory.hpp"
#include "message.hpp"
#include "progress.hpp"

namespace pipedream {

// The far end of a channel and what it carries; both ends are made with the same values.
struct Line {
  int peer;
  int tag;               // MPI tags 2·tag and 2·tag + 1 are used
  std::size_t capacity;  // bytes of the largest payload
  Where where;           // memory of the payload
  std::string label;     // such as "activation of layer 'conv3' (stage 1)"

  bool small() const { return capacity <= largest_small_payload && where == Where::host; }
  int header_tag() const { return 2 * tag; }
  int payload_tag() const { return 2 * tag + 1; }
};

// How long to wait, and what to do meanwhile.
struct Waiting {
  double stall_limit_s;
  std::function<void()> interrupted;
};

struct Traffic {
  std::uint64_t messages = 0;
  std::uint64_t payload_bytes = 0;
};

class SendChannel final : public Endpoint {
 public:
  SendChannel(std::shared_ptr<Progress> progress, Line line);
  // Drain first: a large payload still under way is read from the caller's memory after this.
  ~SendChannel() override;

  // Sends the caller's own memory. Waits while two sends are under way: when send number k returns,
  // send number k - 2 is complete, so the caller keeps the last two tensors alive.
  // Throws MessageError when the payload exceeds the capacity, MpiError, StallError.
  void send(std::int64_t minibatch, const void* payload, std::size_t bytes, const std::string& dtype,
            const Shape& shape, const Waiting& waiting);

  // Waits until everything sent is complete.
  void drain(const Waiting& waiting);

  std::size_t in_flight();
  Traffic traffic() const { return traffic_; }

  std::shared_ptr<void> memory(std::size_t slot) const override { return outgoing_[slot]; }
  void completed(std::size_t slot) override;
  std::string describe(std::size_t slot) const override;

 private:
  struct Outgoing {
    Header header;     // large messages
    Buffer staging;    // small messages: header and payload
    int requests = 0;  // under way
  };
  void wait_for(const std::function<bool()>& done, const std::string& what, const Waiting& waiting);

  std::shared_ptr<Progress> progress_;
  const Line line_;
  std::array<std::shared_ptr<Outgoing>, 2> outgoing_;
  std::uint64_t sent_ = 0;
  Traffic traffic_;
};

class ReceiveChannel final : public Endpoint {
 public:
  // `dtype` and `shape` are the plan's: a message may be smaller in any dimension.
  ReceiveChannel(std::shared_ptr<Progress> progress, Line line, std::size_t slots, std::string dtype, Shape shape);
  ~ReceiveChannel() override;

  // Whether receive() would return at once.
  bool ready();

  // Waits for the next message, which must be that of `minibatch`; returns its slot and shape.
  // Throws MessageError, MpiError, StallError.
  std::pair<std::size_t, Shape> receive(std::int64_t minibatch, const Waiting& waiting);

  // Memory of a slot's payload.
  View slot(std::size_t index) const;
  std::size_t slots() const { return slots_.size(); }

  // Gives a slot back; the next receive into it is posted at once.
  void release(std::size_t index);

  Traffic traffic() const { return traffic_; }

  std::shared_ptr<void> memory(std::size_t slot) const override { return slots_[slot]; }
  void completed(std::size_t slot) override;
  std::string describe(std::size_t slot) const override;

 private:
  struct Slot {
    Buffer memory;     // small: header and payload; large: payload
    Header header;     // large messages land theirs here
    int requests = 0;  // posted and not complete
    bool in_use = false;
  };
  void post(std::size_t index);
  void check_header(const Header& header, std::int64_t minibatch) const;
  std::string from() const;

  std::shared_ptr<Progress> progress_;
  const Line line_;
  const std::string dtype_;
  const Shape shape_;
  std::vector<std::shared_ptr<Slot>> slots_;
  std::deque<std::size_t> posted_;  // in posting order, which is arrival order
  std::int64_t last_minibatch_ = -1;
  Traffic traffic_;
};

}  // namespace pipedream
