// Channels for tensors in device memory.
//
// With a CUDA-aware MPI a message is packed into a device buffer of the channel and sent from there. The send
// is posted once the event behind the packing is complete, so that MPI does not wait for the device:
//
//   compute stream   kernel ●
//   copy stream             └─► pack ●              large tensors one by one, small ones by one kernel
//   progress                         └─► MPI_Isend ├───────────►                              time ->
//
// If MPI cannot access device memory, chunks alternate between two pinned buffers: while one chunk is sent,
// the next is copied. The receiver does the same in reverse:
//
//   sender     pinned 0   copy 0 ├─ send 0 ─┤          copy 2 ├─ send 2 ─┤
//              pinned 1          copy 1 ├─ send 1 ─┤          copy 3 ├─ send 3 ─┤
//   receiver   pinned 0          ├─ recv 0 ─┤ copy 0          ├─ recv 2 ─┤ copy 2
//              pinned 1                 ├─ recv 1 ─┤ copy 1          ├─ recv 3 ─┤ copy 3      time ->
//
// The headers say how many chunks there are: they are received first, and the receives of chunks follow.
#include <algorithm>

#include "comm/channel.hpp"
#include "comm/mpi_error.hpp"

namespace pipedream {

namespace {

// Queues copies of the bytes [begin, end) of a message to `target`. The tensors of a message are consecutive.
void gather(cuda::Handle stream, const std::vector<View>& runs, std::size_t begin, std::size_t end, std::byte* target) {
  std::size_t at = 0;
  for (const View& run : runs) {
    const std::size_t from = std::max(begin, at), to = std::min(end, at + run.bytes);
    // Alignment gaps are not copied.
    if (from < to && run.kind == MemoryKind::device) {
      cuda::copy_on(stream, target + (from - begin), run.data + (from - at), to - from);
    }
    at += run.bytes;
  }
}

class PackedSender final : public SendChannel {
 public:
  PackedSender(std::shared_ptr<Progress> progress, const ChannelSpec& spec) : SendChannel(std::move(progress), spec) {
    for (std::shared_ptr<SendSlot>& send_slot : send_slots_) send_slot = std::make_shared<SendSlot>(spec_);
  }
  ~PackedSender() override { progress_->forget(this); }

  std::shared_ptr<void> memory(std::size_t send_slot) const override { return send_slots_[send_slot]; }
  void completed(std::size_t send_slot) override { --send_slots_[send_slot]->requests; }
  void event_done(std::size_t index) override {
    SendSlot& send_slot = *send_slots_[index];
    --send_slot.requests;
    send_slot.requests +=
        !progress_->send(this, index, send_slot.packed.data(), send_slot.bytes, spec_.peer_rank, spec_.payload_tag());
  }

 private:
  struct SendSlot {
    explicit SendSlot(const ChannelSpec& spec)
        : headers(spec.tensors.size()), packed(spec.capacity(), MemoryKind::device) {}
    std::vector<Header> headers;
    Buffer packed;
    cuda::Event written, done;
    std::size_t bytes = 0;
    int requests = 0;  // incomplete, the packing included
  };

  void launch(std::size_t index, cuda::Handle compute) override {
    SendSlot& send_slot = *send_slots_[index];
    send_slot.headers = messages_[index].headers;
    send_slot.bytes = messages_[index].bytes;
    send_slot.written.record(compute);
    send_slot.written.block(copy_stream_.handle());
    pack(messages_[index].runs, send_slot.packed.data());
    send_slot.done.record(copy_stream_.handle());
    send_slot.requests = 1;
    progress_->watch(this, index, &send_slot.done);
    send_slot.requests += !progress_->send(this, index, send_slot.headers.data(), spec_.header_bytes(), spec_.peer_rank,
                                           spec_.header_tag());
  }

  // Queues copies of a message's tensors to consecutive bytes of `target`.
  void pack(const std::vector<View>& runs, std::byte* target) {
    small_.clear();
    std::size_t at = 0;
    for (const View& run : runs) {
      if (run.kind == MemoryKind::device && run.bytes > 0) {
        const cuda::Copy copy{target + at, run.data, run.bytes};
        run.bytes <= largest_small ? small_.push_back(copy) : copy_one(copy);
      }
      at += run.bytes;
    }
    if (small_.size() >= least_per_kernel) return cuda::copy_all_on(copy_stream_.handle(), small_);
    for (const cuda::Copy& copy : small_) copy_one(copy);
  }

  void copy_one(const cuda::Copy& copy) { cuda::copy_on(copy_stream_.handle(), copy.target, copy.source, copy.bytes); }

  bool busy(std::size_t send_slot) const override { return send_slots_[send_slot]->requests > 0; }

  // A launch costs the host and the device a few microseconds, the time of a 1 MiB copy.
  static constexpr std::size_t least_per_kernel = 3, largest_small = std::size_t{1} << 20;

  cuda::Stream copy_stream_;
  std::vector<cuda::Copy> small_;
  std::array<std::shared_ptr<SendSlot>, 2> send_slots_;
};

// One of two pinned buffers, and the chunk in it.
struct Pinned {
  explicit Pinned(std::size_t bytes) : memory(bytes, MemoryKind::pinned) {}
  Buffer memory;
  cuda::Event copied;
  bool busy = false;
  std::size_t owner = 0;   // send slot or receive slot
  std::size_t offset = 0;  // of the chunk within the message
  std::size_t bytes = 0;
};

class StagedSender final : public SendChannel {
 public:
  StagedSender(std::shared_ptr<Progress> progress, const ChannelSpec& spec)
      : SendChannel(std::move(progress), spec), memory_(std::make_shared<Memory>(spec_)) {}
  ~StagedSender() override { progress_->forget(this); }

  std::shared_ptr<void> memory(std::size_t) const override { return memory_; }
  void completed(std::size_t token) override { token < first_buffer ? void(--send_slot(token).requests) : sent(token); }
  void event_done(std::size_t token) override {
    const Pinned& buffer = memory_->buffers[token - first_buffer];
    if (progress_->send(this, token, buffer.memory.data(), buffer.bytes, spec_.peer_rank, spec_.payload_tag()))
      sent(token);
  }

 private:
  // Tokens of requests and events: 0 and 1 for a send slot's headers, 2 and 3 for a buffer.
  static constexpr std::size_t first_buffer = 2;

  struct SendSlot {
    std::vector<Header> headers;
    cuda::Event written;
    std::size_t requests = 0;  // the headers, and chunks that are not sent
  };
  struct Memory {
    explicit Memory(const ChannelSpec& spec) : buffers{Pinned(spec.chunk), Pinned(spec.chunk)} {}
    std::array<SendSlot, 2> send_slots;
    std::array<Pinned, 2> buffers;
  };
  SendSlot& send_slot(std::size_t index) const { return memory_->send_slots[index]; }

  void launch(std::size_t index, cuda::Handle compute) override {
    SendSlot& send_slot = memory_->send_slots[index];
    send_slot.headers = messages_[index].headers;
    send_slot.written.record(compute);
    send_slot.requests = (messages_[index].bytes + spec_.chunk - 1) / spec_.chunk;
    send_slot.requests += !progress_->send(this, index, send_slot.headers.data(), spec_.header_bytes(), spec_.peer_rank,
                                           spec_.header_tag());
    if (messages_[index].bytes > 0) waiting_.push_back(index);
    copy();
  }

  bool busy(std::size_t index) const override { return send_slot(index).requests > 0; }

  // Queues copies of the next chunks while there are free buffers.
  void copy() {
    while (!waiting_.empty() && !memory_->buffers[next_].busy) {
      const std::size_t index = waiting_.front();
      const Message& message = messages_[index];
      Pinned& buffer = memory_->buffers[next_];
      if (offset_ == 0) send_slot(index).written.block(copy_stream_.handle());
      const std::size_t end = std::min(message.bytes, offset_ + spec_.chunk);
      gather(copy_stream_.handle(), message.runs, offset_, end, buffer.memory.data());
      buffer.copied.record(copy_stream_.handle());
      buffer.busy = true;
      buffer.owner = index;
      buffer.bytes = end - offset_;
      progress_->watch(this, first_buffer + next_, &buffer.copied);
      offset_ = end;
      next_ = 1 - next_;
      if (end == message.bytes) {
        waiting_.pop_front();
        offset_ = 0;
      }
    }
  }

  void sent(std::size_t token) {
    Pinned& buffer = memory_->buffers[token - first_buffer];
    buffer.busy = false;
    --send_slot(buffer.owner).requests;
    copy();
  }

  cuda::Stream copy_stream_;
  const std::shared_ptr<Memory> memory_;
  std::deque<std::size_t> waiting_;  // send slots with chunks that are not copied yet
  std::size_t offset_ = 0;           // of the next chunk of the first of them
  std::size_t next_ = 0;             // the next buffer
};

class StagedReceiver final : public RecvChannel {
 public:
  StagedReceiver(std::shared_ptr<Progress> progress, const ChannelSpec& spec, std::size_t slots)
      : RecvChannel(std::move(progress), spec, slots), memory_(std::make_shared<Memory>(spec_, slots)) {
    const Progress::Lock held = progress_->lock();
    for (std::size_t index = 0; index < slots; ++index) receive(index);
  }
  ~StagedReceiver() override { progress_->forget(this); }

  View slot(std::size_t index) const override { return memory_->slots.at(index).memory.view(); }
  std::shared_ptr<void> memory(std::size_t) const override { return memory_; }

  void completed(std::size_t token) override {
    if (token < slots()) {
      open(memory_->slots[token]);
    } else {
      Pinned& buffer = memory_->buffers[token - slots()];
      std::byte* const target = memory_->slots[buffer.owner].memory.data() + buffer.offset;
      cuda::copy_on(copy_stream_.handle(), target, buffer.memory.data(), buffer.bytes);
      buffer.copied.record(copy_stream_.handle());
      progress_->watch(this, token, &buffer.copied);
    }
    receive_chunks();
  }

  void event_done(std::size_t token) override {
    Pinned& buffer = memory_->buffers[token - slots()];
    memory_->slots[buffer.owner].copied += buffer.bytes;
    buffer.busy = false;
    receive_chunks();
  }

 private:
  // Tokens of requests and events: the slot's index for its headers, slots() and slots() + 1 for the buffers.
  struct Slot {
    explicit Slot(const ChannelSpec& spec)
        : memory(spec.capacity(), MemoryKind::device), headers(spec.tensors.size()) {}
    Buffer memory;
    std::vector<Header> headers;
    cuda::Event read;  // compute has read the previous message
    bool opened = false;
    std::size_t bytes = 0, received = 0, copied = 0;
  };
  struct Memory {
    Memory(const ChannelSpec& spec, std::size_t count) : buffers{Pinned(spec.chunk), Pinned(spec.chunk)} {
      for (std::size_t index = 0; index < count; ++index) slots.emplace_back(spec);
    }
    std::deque<Slot> slots;
    std::array<Pinned, 2> buffers;
  };

  void post(std::size_t index, cuda::Handle compute) override {
    memory_->slots[index].read.record(compute);
    receive(index);
  }

  void receive(std::size_t index) {
    Slot& slot = memory_->slots[index];
    slot.opened = false;
    slot.bytes = slot.received = slot.copied = 0;
    waiting_.push_back(index);
    progress_->receive(this, index, slot.headers.data(), spec_.header_bytes(), spec_.peer_rank, spec_.header_tag());
  }

  // The headers have arrived: compute how many bytes follow.
  void open(Slot& slot) {
    std::vector<ByteRange> ranges;
    for (const Header& header : slot.headers) ranges.push_back({aligned(total_bytes(ranges)), header.payload_bytes});
    // A message that does not fit is not received: receive() throws a MessageError that names it.
    slot.bytes = total_bytes(ranges) <= spec_.capacity() ? total_bytes(ranges) : 0;
    slot.opened = true;
  }

  bool arrived(std::size_t index) const override {
    const Slot& slot = memory_->slots[index];
    return slot.opened && slot.copied == slot.bytes;
  }
  const Header* headers(std::size_t index) const override { return memory_->slots[index].headers.data(); }

  // Posts receives of the next chunks, in message order, while there are free buffers.
  void receive_chunks() {
    while (!waiting_.empty() && memory_->slots[waiting_.front()].opened) {
      const std::size_t index = waiting_.front();
      Slot& slot = memory_->slots[index];
      if (slot.received == slot.bytes) {
        waiting_.pop_front();
        continue;
      }
      Pinned& buffer = memory_->buffers[next_];
      if (buffer.busy) return;
      if (slot.received == 0) slot.read.block(copy_stream_.handle());
      buffer.busy = true;
      buffer.owner = index;
      buffer.offset = slot.received;
      buffer.bytes = std::min(spec_.chunk, slot.bytes - slot.received);
      slot.received += buffer.bytes;
      progress_->receive(this, slots() + next_, buffer.memory.data(), buffer.bytes, spec_.peer_rank,
                         spec_.payload_tag());
      next_ = 1 - next_;
    }
  }

  cuda::Stream copy_stream_;
  const std::shared_ptr<Memory> memory_;
  std::deque<std::size_t> waiting_;  // slots whose chunks are not all posted, in message order
  std::size_t next_ = 0;             // the next buffer
};

}  // namespace

std::unique_ptr<SendChannel> make_device_sender(std::shared_ptr<Progress> progress, const ChannelSpec& spec) {
  if (spec.route == Route::staged) return std::make_unique<StagedSender>(std::move(progress), spec);
  return std::make_unique<PackedSender>(std::move(progress), spec);
}

std::unique_ptr<RecvChannel> make_staged_receiver(std::shared_ptr<Progress> progress, const ChannelSpec& spec,
                                                  std::size_t slots) {
  return std::make_unique<StagedReceiver>(std::move(progress), spec, slots);
}

}  // namespace pipedream
