// One direction of one link between two ranks: persistent slots on the receiving end, at most two sends
// under way on the sending end.
//
//   sender                                                receiver: 3 slots
//   send 4  ├──────────►                                  slot 0  minibatch 2, in use until its backward
//   send 5     ├──────────►                               slot 1  minibatch 3, in use
//   send 6        (waits for 4)  ├──────────►             slot 2  receive posted, lands here
//                                             time ->
//
// Receives are posted ahead into every free slot, in ring order. MPI matches messages of one sender
// and tag in the order both were posted, so the n-th message always lands in the n-th posted slot.
//
// Three ways for the bytes, which callers cannot tell apart:
//
//   host memory               sent from where it is, received into the slot
//   device memory, direct     packed into a device buffer of the channel's own, which MPI sends from; so MPI
//                             sees no memory but what cudaMalloc gave this core
//   device memory, staged     chunk by chunk through two pinned buffers at each end; see staged.cpp
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "line.hpp"
#include "memory.hpp"
#include "message.hpp"
#include "progress.hpp"
#include "streams.hpp"

namespace pipedream {

struct Traffic {
  std::uint64_t messages = 0;
  std::uint64_t payload_bytes = 0;
};

class SendChannel : public Endpoint {
 public:
  static std::unique_ptr<SendChannel> make(std::shared_ptr<Progress> progress, const Line& line);

  // Sends the caller's own memory, one tensor for each part of the line. Waits while two sends are under
  // way: when send number k returns, send number k - 2 is complete, so the caller keeps the last two alive.
  // Device memory is read once everything put on `compute` so far is done; nobody waits for that here.
  // Throws MessageError when a tensor is larger than its part, MpiError, StallError.
  void send(std::int64_t minibatch, const std::vector<Piece>& pieces, const Waiting& waiting,
            cuda::Handle compute = nullptr);

  // Waits until everything sent is complete.
  void drain(const Waiting& waiting);

  std::size_t in_flight();
  Traffic traffic() const { return traffic_; }

  // The planned shape of a tensor. Throws std::out_of_range.
  const Shape& planned(std::size_t part) const { return line_.parts.at(part).shape; }

  std::string describe(std::size_t slot) const override;

 protected:
  SendChannel(std::shared_ptr<Progress> progress, const Line& line);

  // A message that leaves, in one of the two turns.
  struct Message {
    std::vector<Header> headers;
    std::vector<View> runs;  // the tensors, and what lies between them
    std::size_t bytes;       // of the payload
  };
  // With the lock held: the turn is free, and `runs` and `bytes` are those of this message.
  virtual void launch(std::size_t turn, cuda::Handle compute) = 0;
  virtual bool busy(std::size_t turn) const = 0;

  const std::shared_ptr<Progress> progress_;
  const Line line_;
  std::array<Message, 2> messages_;

 private:
  void prepare(Message& message, std::int64_t minibatch, const std::vector<Piece>& pieces);
  void check(std::int64_t minibatch, const std::vector<Piece>& pieces) const;
  template <typename Done, typename What>
  void wait_for(Progress::Lock& held, const Done& done, const What& what, const Waiting& waiting);

  std::uint64_t sent_ = 0;
  Traffic traffic_;
};

// What has arrived: a slot, and where in it the tensors stand.
struct Arrived {
  std::size_t slot;
  bool whole;  // every tensor is as large as planned, and stands where Line::places says
  std::vector<Shape> shapes;
  std::vector<Place> places;
};

class ReceiveChannel : public Endpoint {
 public:
  static std::unique_ptr<ReceiveChannel> make(std::shared_ptr<Progress> progress, const Line& line, std::size_t slots);

  // Whether receive() would return at once.
  bool ready();

  // Waits for the next message, which must be that of `minibatch`. Device memory may be read at once, by
  // any stream. Shapes and places are filled in only where the message is not whole.
  // Throws MessageError, MpiError, StallError.
  Arrived receive(std::int64_t minibatch, const Waiting& waiting);

  // Memory of a slot's payload.
  virtual View slot(std::size_t index) const = 0;
  std::size_t slots() const { return in_use_.size(); }

  // Gives a slot back; the next receive into it is posted at once, or on a device as soon as everything
  // put on `compute` so far is done.
  void release(std::size_t index, cuda::Handle compute = nullptr);

  Traffic traffic() const { return traffic_; }

  std::string describe(std::size_t slot) const override;

 protected:
  ReceiveChannel(std::shared_ptr<Progress> progress, const Line& line, std::size_t slots);

  // With the lock held: receives the next message into this slot, when `compute` has done with it.
  virtual void post(std::size_t index, cuda::Handle compute) = 0;
  virtual bool arrived(std::size_t index) const = 0;
  virtual const Header* headers(std::size_t index) const = 0;
  std::string from() const;

  const std::shared_ptr<Progress> progress_;
  const Line line_;

 private:
  bool read_headers(const Header* headers, std::int64_t minibatch) const;

  const std::vector<Place> places_;
  std::vector<bool> in_use_;        // whether a slot is in use
  std::deque<std::size_t> posted_;  // in posting order, which is arrival order
  std::int64_t last_minibatch_ = -1;
  Traffic traffic_;
};

// The ways through device memory; see staged.cpp.
std::unique_ptr<SendChannel> make_device_sender(std::shared_ptr<Progress> progress, const Line& line);
std::unique_ptr<ReceiveChannel> make_staged_receiver(std::shared_ptr<Progress> progress, const Line& line,
                                                     std::size_t slots);

}  // namespace pipedream
