#include "comm/channel.hpp"

#include <climits>
#include <cstring>

#include "comm/mpi_error.hpp"

namespace pipedream {

namespace {

// The bytes sent in the alignment gap between two tensors.
std::byte padding[tensor_alignment] = {};

// Sends from host memory. Each send slot has a staging buffer for headers and small messages, which outlives the
// channel while MPI reads it. Large tensors are sent in place; the caller keeps those of the last two sends alive.
class HostSender final : public SendChannel {
 public:
  HostSender(std::shared_ptr<Progress> progress, const ChannelSpec& spec) : SendChannel(std::move(progress), spec) {
    const std::size_t bytes = spec_.header_bytes() + (spec_.small() ? spec_.capacity() : 0);
    for (std::shared_ptr<SendSlot>& send_slot : send_slots_) send_slot = std::make_shared<SendSlot>(bytes);
  }
  ~HostSender() override { progress_->forget(this); }

  std::shared_ptr<void> memory(std::size_t send_slot) const override { return send_slots_[send_slot]; }
  void completed(std::size_t send_slot) override { --send_slots_[send_slot]->requests; }

 private:
  struct SendSlot {
    explicit SendSlot(std::size_t bytes) : staging(bytes, MemoryKind::host) {}
    Buffer staging;    // headers; in small messages the tensors too
    int requests = 0;  // incomplete
  };

  void launch(std::size_t index, cuda::Handle) override {
    const Message& message = messages_[index];
    SendSlot& send_slot = *send_slots_[index];
    std::byte* to = send_slot.staging.data();
    std::memcpy(to, message.headers.data(), spec_.header_bytes());
    to += spec_.header_bytes();
    if (spec_.small()) {
      for (const View& run : message.runs) {
        // A tensor without elements may have a null address, which memcpy does not accept.
        if (run.bytes > 0) std::memcpy(to, run.data, run.bytes);
        to += run.bytes;
      }
    }
    const std::size_t ahead = static_cast<std::size_t>(to - send_slot.staging.data());
    // Tensors first: the headers are sent while the tensors are in flight.
    if (spec_.in_place()) {
      for (const View& run : message.runs) {
        send_slot.requests += !progress_->send(this, index, run.data, run.bytes, spec_.peer_rank, spec_.payload_tag());
      }
    }
    send_slot.requests +=
        !progress_->send(this, index, send_slot.staging.data(), ahead, spec_.peer_rank, spec_.header_tag());
  }

  bool busy(std::size_t send_slot) const override { return send_slots_[send_slot]->requests > 0; }

  std::array<std::shared_ptr<SendSlot>, 2> send_slots_;
};

// Receives into slots that MPI can write: host memory, or device memory with a CUDA-aware MPI.
class DirectReceiver final : public RecvChannel {
 public:
  DirectReceiver(std::shared_ptr<Progress> progress, const ChannelSpec& spec, std::size_t slots)
      : RecvChannel(std::move(progress), spec, slots),
        messages_(spec_.in_place() ? layout_ : std::vector<ByteRange>{{0, spec_.capacity()}}) {
    slots_.reserve(slots);
    for (std::size_t index = 0; index < slots; ++index) slots_.push_back(std::make_shared<Slot>(spec_));
    const Progress::Lock held = progress_->lock();
    for (std::size_t index = 0; index < slots; ++index) receive(index);
  }
  ~DirectReceiver() override { progress_->forget(this); }

  View slot(std::size_t index) const override {
    return slots_.at(index)->memory.view(spec_.small() ? spec_.header_bytes() : 0);
  }
  std::shared_ptr<void> memory(std::size_t index) const override { return slots_[index]; }
  void completed(std::size_t index) override { --slots_[index]->requests; }
  void event_done(std::size_t index) override { receive(index); }

 private:
  struct Slot {
    explicit Slot(const ChannelSpec& spec)
        : memory((spec.small() ? spec.header_bytes() : 0) + spec.capacity(), spec.kind), headers(spec.tensors.size()) {
      if (spec.kind == MemoryKind::device) done = std::make_unique<cuda::Event>();
    }
    Buffer memory;                      // the payload; in small messages the headers too
    std::vector<Header> headers;        // copied out of `memory` for small messages
    std::unique_ptr<cuda::Event> done;  // compute has read the slot
    int requests = 0;                   // posted and not complete
  };

  void post(std::size_t index, cuda::Handle compute) override {
    Slot& slot = *slots_[index];
    if (!slot.done) return receive(index);
    slot.requests = 1;  // so that arrived() is false until the receive is posted
    slot.done->record(compute);
    progress_->watch(this, index, slot.done.get());
  }

  void receive(std::size_t index) {
    Slot& slot = *slots_[index];
    if (spec_.small()) {
      slot.requests = 1;
      progress_->receive(this, index, slot.memory.data(), slot.memory.bytes(), spec_.peer_rank, spec_.header_tag());
      return;
    }
    slot.requests = 1 + static_cast<int>(messages_.size());
    progress_->receive(this, index, slot.headers.data(), spec_.header_bytes(), spec_.peer_rank, spec_.header_tag());
    for (const ByteRange& range : messages_) {
      progress_->receive(this, index, slot.memory.data() + range.offset, range.bytes, spec_.peer_rank,
                         spec_.payload_tag());
    }
  }

  bool arrived(std::size_t index) const override { return slots_[index]->requests == 0; }

  const Header* headers(std::size_t index) const override {
    Slot& slot = *slots_[index];
    if (spec_.small()) std::memcpy(slot.headers.data(), slot.memory.data(), spec_.header_bytes());
    return slot.headers.data();
  }

  const std::vector<ByteRange> messages_;  // which bytes of a slot each message after the headers is received into
  std::vector<std::shared_ptr<Slot>> slots_;
};

}  // namespace

const ChannelSpec& checked(const ChannelSpec& spec) {
  if (spec.tensors.empty()) throw std::invalid_argument("a channel carries at least one tensor");
  for (const TensorSpec& planned : spec.tensors) {
    if (planned.shape.size() <= Header::max_dims && planned.dtype.size() <= sizeof(Header::dtype)) continue;
    throw MessageError(planned.label + ": " + text_of(planned.dtype, planned.shape) + " has more than " +
                       std::to_string(Header::max_dims) + " dimensions, or a dtype of more than " +
                       std::to_string(sizeof(Header::dtype)) + " characters: reshape it before it leaves the stage");
  }
  if (spec.capacity() > static_cast<std::size_t>(INT_MAX)) {
    throw MessageError(spec.label() + ": " + std::to_string(spec.capacity()) +
                       " bytes exceed the limit of one MPI message (2 GiB): use smaller microbatches");
  }
  return spec;
}

std::unique_ptr<SendChannel> SendChannel::make(std::shared_ptr<Progress> progress, const ChannelSpec& spec) {
  if (spec.kind == MemoryKind::device) return make_device_sender(std::move(progress), spec);
  return std::make_unique<HostSender>(std::move(progress), spec);
}

SendChannel::SendChannel(std::shared_ptr<Progress> progress, const ChannelSpec& spec)
    : progress_(std::move(progress)), spec_(checked(spec)) {
  for (Message& message : messages_) {
    message.bytes = 0;
    for (const TensorSpec& planned : spec_.tensors) {
      Header header;
      std::memcpy(header.dtype, planned.dtype.data(), planned.dtype.size());
      message.headers.push_back(header);
    }
  }
}

void SendChannel::send(std::int64_t microbatch, const std::vector<TensorRef>& tensors, const WaitOptions& options,
                       cuda::Handle compute) {
  Progress::Lock held = progress_->lock();
  check(microbatch, tensors);
  const std::size_t send_slot = sent_ % messages_.size();
  progress_->check_usable();
  if (busy(send_slot)) {
    wait_for(
        held, [&] { return !busy(send_slot); }, [&] { return "to send " + progress_->microbatch_name(microbatch); },
        options);
  }
  prepare(messages_[send_slot], microbatch, tensors);
  ++sent_;
  launch(send_slot, compute);
  ++traffic_.messages;
  for (const Header& header : messages_[send_slot].headers) traffic_.payload_bytes += header.payload_bytes;
}

void SendChannel::check(std::int64_t microbatch, const std::vector<TensorRef>& tensors) const {
  const std::string* label = &spec_.tensors[0].label;
  if (tensors.size() != spec_.tensors.size()) {
    throw MessageError(*label + " of " + progress_->microbatch_name(microbatch) + ": " +
                       std::to_string(tensors.size()) + " tensors, but the channel was planned for " +
                       std::to_string(spec_.tensors.size()));
  }
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const TensorSpec& planned = spec_.tensors[i];
    const Shape& shape = tensors[i].shape;
    if (shape == planned.shape) continue;
    const std::size_t bytes = elements(shape) * planned.item_bytes;
    if (bytes <= planned.bytes() && shape.size() <= Header::max_dims) continue;
    throw MessageError("rank " + std::to_string(progress_->rank()) + ": " + planned.label + " of " +
                       progress_->microbatch_name(microbatch) + " is " + text_of(planned.dtype, shape) + ", " +
                       std::to_string(bytes) + " bytes, but the channel was planned for " +
                       std::to_string(planned.bytes()));
  }
}

void SendChannel::prepare(Message& message, std::int64_t microbatch, const std::vector<TensorRef>& tensors) {
  message.runs.clear();
  message.bytes = 0;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const Shape& shape = tensors[i].shape;
    const std::size_t bytes = elements(shape) * spec_.tensors[i].item_bytes;
    Header& header = message.headers[i];
    header.microbatch = microbatch;
    header.payload_bytes = bytes;
    header.dims = static_cast<std::uint32_t>(shape.size());
    std::copy(shape.begin(), shape.end(), header.shape);
    if (const std::size_t gap = aligned(message.bytes) - message.bytes; gap > 0 && !spec_.in_place()) {
      message.runs.push_back({padding, gap, MemoryKind::host});
      message.bytes += gap;
    }
    auto* const data = const_cast<std::byte*>(static_cast<const std::byte*>(tensors[i].data));  // only read
    message.runs.push_back({data, bytes, spec_.kind});
    message.bytes += bytes;
  }
}

void SendChannel::drain(const WaitOptions& options) {
  Progress::Lock held = progress_->lock();
  wait_for(held, [this] { return !busy(0) && !busy(1); }, [] { return std::string("for its last sends"); }, options);
}

std::size_t SendChannel::in_flight() {
  progress_->poll_once();
  const Progress::Lock held = progress_->lock();
  return static_cast<std::size_t>(busy(0)) + static_cast<std::size_t>(busy(1));
}

template <typename Done, typename What>
void SendChannel::wait_for(Progress::Lock& held, const Done& done, const What& what, const WaitOptions& options) {
  progress_->wait(held, done, options, [&](double waited) {
    return std::make_exception_ptr(
        StallError("rank " + std::to_string(progress_->rank()) + " has waited " + with_one_decimal(waited) + " s " +
                   what() + ": " + spec_.label() + " to rank " + std::to_string(spec_.peer_rank) + "; " +
                   std::to_string(traffic_.messages) + " messages sent so far, of which rank " +
                   std::to_string(spec_.peer_rank) + " has not taken the last; see what that rank is doing"));
  });
}

std::string SendChannel::describe(std::size_t send_slot) const {
  return spec_.label() + ", " + progress_->microbatch_name(messages_[send_slot].headers[0].microbatch) + ", to rank " +
         std::to_string(spec_.peer_rank);
}

std::unique_ptr<RecvChannel> RecvChannel::make(std::shared_ptr<Progress> progress, const ChannelSpec& spec,
                                               std::size_t slots) {
  if (spec.kind == MemoryKind::device && spec.route == Route::staged) {
    return make_staged_receiver(std::move(progress), spec, slots);
  }
  return std::make_unique<DirectReceiver>(std::move(progress), spec, slots);
}

RecvChannel::RecvChannel(std::shared_ptr<Progress> progress, const ChannelSpec& spec, std::size_t slots)
    : progress_(std::move(progress)), spec_(checked(spec)), layout_(spec_.layout()), in_use_(slots, false) {
  if (slots == 0) throw std::invalid_argument(spec_.label() + ": a channel needs at least one slot");
  for (std::size_t index = 0; index < slots; ++index) posted_.push_back(index);
}

bool RecvChannel::ready() {
  progress_->poll_once();
  const Progress::Lock held = progress_->lock();
  return !posted_.empty() && arrived(posted_.front());
}

Received RecvChannel::receive(std::int64_t microbatch, const WaitOptions& options) {
  Progress::Lock held = progress_->lock();  // the progress thread may call describe(), which reads the traffic
  if (posted_.empty()) {
    throw MessageError("rank " + std::to_string(progress_->rank()) + ": all " + std::to_string(slots()) +
                       " slots are in use, so " + progress_->microbatch_name(microbatch) + " has none: " + from());
  }
  const std::size_t index = posted_.front();
  progress_->wait(
      held, [&] { return arrived(index); }, options,
      [&](double waited) {
        const std::string last = traffic_.messages == 0 ? "none"
                                                        : std::to_string(traffic_.messages) + ", the last was " +
                                                              progress_->microbatch_name(last_microbatch_);
        return std::make_exception_ptr(StallError(
            "rank " + std::to_string(progress_->rank()) + " has waited " + with_one_decimal(waited) + " s for " +
            progress_->microbatch_name(microbatch) + ": " + from() + "; messages received so far: " + last));
      });
  const Header* const read = headers(index);
  Received received{index, read_headers(read, microbatch), {}, {}};
  std::size_t bytes = 0;
  for (std::size_t i = 0; i < spec_.tensors.size(); ++i) bytes += read[i].payload_bytes;
  if (!received.as_planned) {
    for (std::size_t i = 0; i < spec_.tensors.size(); ++i) {
      const std::size_t offset = spec_.in_place() ? layout_[i].offset : aligned(total_bytes(received.ranges));
      received.shapes.push_back(read[i].shape_vector());
      received.ranges.push_back({offset, read[i].payload_bytes});
    }
  }
  posted_.pop_front();
  in_use_[index] = true;
  last_microbatch_ = microbatch;
  ++traffic_.messages;
  traffic_.payload_bytes += bytes;
  return received;
}

bool RecvChannel::read_headers(const Header* headers, std::int64_t microbatch) const {
  bool as_planned = true;
  for (std::size_t i = 0; i < spec_.tensors.size(); ++i) {
    const Header& header = headers[i];
    const TensorSpec& planned = spec_.tensors[i];
    const auto here = [this] { return "rank " + std::to_string(progress_->rank()); };
    const auto source = [&] { return planned.label + " from rank " + std::to_string(spec_.peer_rank); };
    if (header.magic != Header::expected_magic) {
      throw MessageError(here() + ": a message of another program arrived on the channel for " + source());
    }
    if (header.microbatch != microbatch) {
      throw MessageError(here() + " expected " + progress_->microbatch_name(microbatch) + " but got " +
                         progress_->microbatch_name(header.microbatch) + ": " + source());
    }
    bool fits = header.dims == planned.shape.size() && header.payload_bytes <= planned.bytes() &&
                planned.dtype.size() == strnlen(header.dtype, sizeof header.dtype) &&
                std::memcmp(header.dtype, planned.dtype.data(), planned.dtype.size()) == 0;
    for (std::size_t dim = 0; fits && dim < planned.shape.size(); ++dim) {
      fits = header.shape[dim] <= planned.shape[dim];
      as_planned &= header.shape[dim] == planned.shape[dim];
    }
    if (!fits) {
      throw MessageError(here() + " expected " + text_of(planned.dtype, planned.shape) + " (or smaller) but got " +
                         text_of(header.dtype_name(), header.shape_vector()) + " for " +
                         progress_->microbatch_name(microbatch) + ": " + source());
    }
  }
  return as_planned;
}

void RecvChannel::release(std::size_t index, cuda::Handle compute) {
  const Progress::Lock held = progress_->lock();
  if (!in_use_.at(index)) throw std::logic_error("slot " + std::to_string(index) + " is not in use: " + from());
  in_use_[index] = false;
  posted_.push_back(index);
  post(index, compute);
}

std::string RecvChannel::from() const { return spec_.label() + " from rank " + std::to_string(spec_.peer_rank); }

std::string RecvChannel::describe(std::size_t) const {
  return from() + ", after " + std::to_string(traffic_.messages) + " messages";
}

}  // namespace pipedream
