// A channel: one direction between two ranks. The receiving end has persistent slots, the sending end at most
// two sends in flight.
//
//   sender                                                receiver: 3 slots
//   send 4  ├──────────►                                  slot 0  microbatch 2, in use until its backward
//   send 5     ├──────────►                               slot 1  microbatch 3, in use
//   send 6        (waits for 4)  ├──────────►             slot 2  receive posted for microbatch 4
//                                             time ->
//
// Receives are posted ahead into every free slot, in ring order. MPI matches the messages of one sender and
// tag in the order in which sends and receives were posted, so the n-th message always lands in the n-th
// posted slot.
//
// There are three implementations behind one interface:
//
//   host memory               sent in place, received into the slot
//   device memory, direct     packed into a device buffer of the channel and sent from there, so that MPI
//                             accesses only memory that this core allocated with cudaMalloc
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

#include "comm/channel_spec.hpp"
#include "comm/message.hpp"
#include "comm/progress.hpp"
#include "memory/memory.hpp"
#include "memory/streams.hpp"

namespace pipedream {

struct Traffic {
  std::uint64_t messages = 0;
  std::uint64_t payload_bytes = 0;
};

class SendChannel : public Endpoint {
 public:
  static std::unique_ptr<SendChannel> make(std::shared_ptr<Progress> progress, const ChannelSpec& spec);

  // Sends one tensor for each TensorSpec, from the caller's memory. Waits while two sends are in flight: when
  // send number k returns, send number k - 2 is complete, so the caller keeps the tensors of the last two alive.
  // Device memory is read once the work queued on `compute` so far is done; this call does not wait for it.
  // Throws MessageError if a tensor is larger than planned, MpiError, StallError.
  void send(std::int64_t microbatch, const std::vector<TensorRef>& tensors, const WaitOptions& options,
            cuda::Handle compute = nullptr);

  // Waits until all sends are complete.
  void drain(const WaitOptions& options);

  std::size_t in_flight();
  Traffic traffic() const { return traffic_; }

  // The planned shape of a tensor. Throws std::out_of_range.
  const Shape& planned(std::size_t tensor) const { return spec_.tensors.at(tensor).shape; }

  std::string describe(std::size_t slot) const override;

 protected:
  SendChannel(std::shared_ptr<Progress> progress, const ChannelSpec& spec);

  // The message in one of the two send slots.
  struct Message {
    std::vector<Header> headers;
    std::vector<View> runs;  // the tensors and, where they are one message, the alignment gaps between them
    std::size_t bytes;       // of the payload
  };
  // Starts to send the message of a free send slot. Called with the lock held.
  virtual void launch(std::size_t send_slot, cuda::Handle compute) = 0;
  virtual bool busy(std::size_t send_slot) const = 0;

  const std::shared_ptr<Progress> progress_;
  const ChannelSpec spec_;
  std::array<Message, 2> messages_;

 private:
  void prepare(Message& message, std::int64_t microbatch, const std::vector<TensorRef>& tensors);
  void check(std::int64_t microbatch, const std::vector<TensorRef>& tensors) const;  // with the lock held
  template <typename Done, typename What>
  void wait_for(Progress::Lock& held, const Done& done, const What& what, const WaitOptions& options);

  std::uint64_t sent_ = 0;
  Traffic traffic_;
};

// A received message: its slot, and the tensors in the slot.
struct Received {
  std::size_t slot;
  bool as_planned;  // all tensors have their planned shapes and the byte ranges of ChannelSpec::layout()
  std::vector<Shape> shapes;
  std::vector<ByteRange> ranges;
};

class RecvChannel : public Endpoint {
 public:
  static std::unique_ptr<RecvChannel> make(std::shared_ptr<Progress> progress, const ChannelSpec& spec,
                                           std::size_t slots);

  // Whether receive() would return at once.
  bool ready();

  // Waits for the next message, which must be that of `microbatch`. Any stream may read device memory at once.
  // Fills in shapes and byte ranges only if they differ from the plan.
  // Throws MessageError, MpiError, StallError.
  Received receive(std::int64_t microbatch, const WaitOptions& options);

  // Memory of a slot's payload.
  virtual View slot(std::size_t index) const = 0;
  std::size_t slots() const { return in_use_.size(); }

  // Frees a slot. The next receive into it is posted at once; for device memory, once the work queued on
  // `compute` so far is done.
  void release(std::size_t index, cuda::Handle compute = nullptr);

  Traffic traffic() const { return traffic_; }

  std::string describe(std::size_t slot) const override;

 protected:
  RecvChannel(std::shared_ptr<Progress> progress, const ChannelSpec& spec, std::size_t slots);

  // Receives the next message into this slot once `compute` has read the slot. Called with the lock held.
  virtual void post(std::size_t index, cuda::Handle compute) = 0;
  virtual bool arrived(std::size_t index) const = 0;
  virtual const Header* headers(std::size_t index) const = 0;
  std::string from() const;

  const std::shared_ptr<Progress> progress_;
  const ChannelSpec spec_;
  const std::vector<ByteRange> layout_;  // of a slot if all tensors have their planned shapes

 private:
  bool read_headers(const Header* headers, std::int64_t microbatch) const;  // returns Received::as_planned

  std::vector<bool> in_use_;        // whether a slot is in use
  std::deque<std::size_t> posted_;  // in posting order, which is arrival order
  std::int64_t last_microbatch_ = -1;
  Traffic traffic_;
};

// The implementations for device memory; see staged.cpp.
std::unique_ptr<SendChannel> make_device_sender(std::shared_ptr<Progress> progress, const ChannelSpec& spec);
std::unique_ptr<RecvChannel> make_staged_receiver(std::shared_ptr<Progress> progress, const ChannelSpec& spec,
                                                  std::size_t slots);

}  // namespace pipedream
