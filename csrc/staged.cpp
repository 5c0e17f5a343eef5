// Channels whose tensors live in device memory.
//
// With a CUDA-aware MPI a message is packed into a device buffer of the channel's own and sent from there;
// MPI waits for nothing, since the send is posted when the event behind the packing has happened:
//
//   compute stream   kernel ●
//   copy stream             └─► pack ●              large tensors one by one, small ones by one kernel
//   progress                         └─► MPI_Isend ├───────────►                              time ->
//
// Where MPI cannot reach device memory, chunks take turns in two pinned buffers, so that one is copied
// while the other is under way; at the far end likewise:
//
//   sender     pinned 0   copy 0 ├─ send 0 ─┤          copy 2 ├─ send 2 ─┤
//              pinned 1          copy 1 ├─ send 1 ─┤          copy 3 ├─ send 3 ─┤
//   receiver   pinned 0          ├─ recv 0 ─┤ copy 0          ├─ recv 2 ─┤ copy 2
//              pinned 1                 ├─ recv 1 ─┤ copy 1          ├─ recv 3 ─┤ copy 3      time ->
//
// How many chunks there are is in the headers, which are received ahead; chunks are received after them.
#include <algorithm>

#include "channel.hpp"
#include "mpi_error.hpp"

namespace pipedream {

namespace {

// Queues copies of the bytes [begin, end) of a message, whose tensors lie one behind the other, to `target`.
void gather(cuda::Handle stream, const std::vector<View>& runs, std::size_t begin, std::size_t end, std::byte* target) {
  std::size_t at = 0;
  for (const View& run : runs) {
    const std::size_t from = std::max(begin, at), to = std::min(end, at + run.bytes);
    // What lies between tensors is nobody's, and stays what it is.
    if (from < to && run.where == Where::device) {
      cuda::copy_on(stream, target + (from - begin), run.data + (from - at), to - from);
    }
    at += run.bytes;
  }
}

class PackedSender final : public SendChannel {
 public:
  PackedSender(std::shared_ptr<Progress> progress, const Line& line) : SendChannel(std::move(progress), line) {
    for (std::shared_ptr<Turn>& turn : turns_) turn = std::make_shared<Turn>(line_);
  }
  ~PackedSender() override { progress_->forget(this); }

  std::shared_ptr<void> memory(std::size_t turn) const override { return turns_[turn]; }
  void completed(std::size_t turn) override { --turns_[turn]->requests; }
  void happened(std::size_t index) override {
    Turn& turn = *turns_[index];
    --turn.requests;
    turn.requests += !progress_->send(this, index, turn.packed.data(), turn.bytes, line_.peer, line_.payload_tag());
  }

 private:
  struct Turn {
    explicit Turn(const Line& line) : headers(line.parts.size()), packed(line.capacity(), Where::device) {}
    std::vector<Header> headers;
    Buffer packed;
    cuda::Event written, done;
    std::size_t bytes = 0;
    int requests = 0;  // under way, the packing among them
  };

  void launch(std::size_t index, cuda::Handle compute) override {
    Turn& turn = *turns_[index];
    turn.headers = messages_[index].headers;
    turn.bytes = messages_[index].bytes;
    turn.written.record(compute);
    turn.written.before(copies_.handle());
    pack(messages_[index].runs, turn.packed.data());
    turn.done.record(copies_.handle());
    turn.requests = 1;
    progress_->watch(this, index, &turn.done);
    turn.requests +=
        !progress_->send(this, index, turn.headers.data(), line_.header_bytes(), line_.peer, line_.header_tag());
  }

  // Queues copies of a message's tensors to `target`, one behind the other.
  void pack(const std::vector<View>& runs, std::byte* target) {
    small_.clear();
    std::size_t at = 0;
    for (const View& run : runs) {
      if (run.where == Where::device && run.bytes > 0) {
        const cuda::Copy copy{target + at, run.data, run.bytes};
        run.bytes <= largest_small ? small_.push_back(copy) : copy_alone(copy);
      }
      at += run.bytes;
    }
    if (small_.size() >= worth_a_kernel) return cuda::copy_all_on(copies_.handle(), small_);
    for (const cuda::Copy& copy : small_) copy_alone(copy);
  }

  void copy_alone(const cuda::Copy& copy) { cuda::copy_on(copies_.handle(), copy.target, copy.source, copy.bytes); }

  bool busy(std::size_t turn) const override { return turns_[turn]->requests > 0; }

  // A launch takes the host and the device some microseconds, whatever it launches: the time in which 1 MiB is copied.
  static constexpr std::size_t worth_a_kernel = 3, largest_small = std::size_t{1} << 20;

  cuda::Stream copies_;
  std::vector<cuda::Copy> small_;
  std::array<std::shared_ptr<Turn>, 2> turns_;
};

// One of two pinned buffers, and the chunk that it holds.
struct Pinned {
  explicit Pinned(std::size_t bytes) : memory(bytes, Where::pinned) {}
  Buffer memory;
  cuda::Event copied;
  bool busy = false;
  std::size_t owner = 0;   // turn or slot
  std::size_t offset = 0;  // of the chunk within the message
  std::size_t bytes = 0;
};

class StagedSender final : public SendChannel {
 public:
  StagedSender(std::shared_ptr<Progress> progress, const Line& line)
      : SendChannel(std::move(progress), line), memory_(std::make_shared<Memory>(line_)) {}
  ~StagedSender() override { progress_->forget(this); }

  std::shared_ptr<void> memory(std::size_t) const override { return memory_; }
  void completed(std::size_t token) override { token < first_buffer ? void(--turn(token).requests) : sent(token); }
  void happened(std::size_t token) override {
    const Pinned& buffer = memory_->buffers[token - first_buffer];
    if (progress_->send(this, token, buffer.memory.data(), buffer.bytes, line_.peer, line_.payload_tag())) sent(token);
  }

 private:
  // What requests and events are named by: a turn's headers, or a buffer.
  static constexpr std::size_t first_buffer = 2;

  struct Turn {
    std::vector<Header> headers;
    cuda::Event written;
    std::size_t requests = 0;  // the headers, and chunks that have not gone
  };
  struct Memory {
    explicit Memory(const Line& line) : buffers{Pinned(line.chunk), Pinned(line.chunk)} {}
    std::array<Turn, 2> turns;
    std::array<Pinned, 2> buffers;
  };
  Turn& turn(std::size_t index) const { return memory_->turns[index]; }

  void launch(std::size_t index, cuda::Handle compute) override {
    Turn& turn = memory_->turns[index];
    turn.headers = messages_[index].headers;
    turn.written.record(compute);
    turn.requests = (messages_[index].bytes + line_.chunk - 1) / line_.chunk;
    turn.requests +=
        !progress_->send(this, index, turn.headers.data(), line_.header_bytes(), line_.peer, line_.header_tag());
    if (messages_[index].bytes > 0) waiting_.push_back(index);
    copy();
  }

  bool busy(std::size_t index) const override { return turn(index).requests > 0; }

  // Queues copies of the next chunks, as far as there are free buffers.
  void copy() {
    while (!waiting_.empty() && !memory_->buffers[next_].busy) {
      const std::size_t index = waiting_.front();
      const Message& message = messages_[index];
      Pinned& buffer = memory_->buffers[next_];
      if (offset_ == 0) turn(index).written.before(copies_.handle());
      const std::size_t end = std::min(message.bytes, offset_ + line_.chunk);
      gather(copies_.handle(), message.runs, offset_, end, buffer.memory.data());
      buffer.copied.record(copies_.handle());
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
    --turn(buffer.owner).requests;
    copy();
  }

  cuda::Stream copies_;
  const std::shared_ptr<Memory> memory_;
  std::deque<std::size_t> waiting_;  // turns with chunks that are not copied yet
  std::size_t offset_ = 0;           // of the first one's next chunk
  std::size_t next_ = 0;             // buffer
};

class StagedReceiver final : public ReceiveChannel {
 public:
  StagedReceiver(std::shared_ptr<Progress> progress, const Line& line, std::size_t slots)
      : ReceiveChannel(std::move(progress), line, slots), memory_(std::make_shared<Memory>(line_, slots)) {
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
      cuda::copy_on(copies_.handle(), target, buffer.memory.data(), buffer.bytes);
      buffer.copied.record(copies_.handle());
      progress_->watch(this, token, &buffer.copied);
    }
    receive_chunks();
  }

  void happened(std::size_t token) override {
    Pinned& buffer = memory_->buffers[token - slots()];
    memory_->slots[buffer.owner].copied += buffer.bytes;
    buffer.busy = false;
    receive_chunks();
  }

 private:
  // What requests and events are named by: a slot's headers, or behind the slots a buffer.
  struct Slot {
    explicit Slot(const Line& line) : memory(line.capacity(), Where::device), headers(line.parts.size()) {}
    Buffer memory;
    std::vector<Header> headers;
    cuda::Event read;  // compute has done with what was here
    bool opened = false;
    std::size_t bytes = 0, received = 0, copied = 0;
  };
  struct Memory {
    Memory(const Line& line, std::size_t count) : buffers{Pinned(line.chunk), Pinned(line.chunk)} {
      for (std::size_t index = 0; index < count; ++index) slots.emplace_back(line);
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
    progress_->receive(this, index, slot.headers.data(), line_.header_bytes(), line_.peer, line_.header_tag());
  }

  // The headers are here: how much is to come.
  void open(Slot& slot) {
    std::vector<Place> places;
    for (const Header& header : slot.headers) places.push_back({aligned(extent(places)), header.payload_bytes});
    // What does not fit is never received: receive() says what came instead of what was planned.
    slot.bytes = extent(places) <= line_.capacity() ? extent(places) : 0;
    slot.opened = true;
  }

  bool arrived(std::size_t index) const override {
    const Slot& slot = memory_->slots[index];
    return slot.opened && slot.copied == slot.bytes;
  }
  const Header* headers(std::size_t index) const override { return memory_->slots[index].headers.data(); }

  // Posts receives of the next chunks, in the order of messages, as far as there are free buffers.
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
      if (slot.received == 0) slot.read.before(copies_.handle());
      buffer.busy = true;
      buffer.owner = index;
      buffer.offset = slot.received;
      buffer.bytes = std::min(line_.chunk, slot.bytes - slot.received);
      slot.received += buffer.bytes;
      progress_->receive(this, slots() + next_, buffer.memory.data(), buffer.bytes, line_.peer, line_.payload_tag());
      next_ = 1 - next_;
    }
  }

  cuda::Stream copies_;
  const std::shared_ptr<Memory> memory_;
  std::deque<std::size_t> waiting_;  // slots whose chunks are not all posted, in the order of messages
  std::size_t next_ = 0;             // buffer
};

}  // namespace

std::unique_ptr<SendChannel> make_device_sender(std::shared_ptr<Progress> progress, const Line& line) {
  if (line.route == Route::staged) return std::make_unique<StagedSender>(std::move(progress), line);
  return std::make_unique<PackedSender>(std::move(progress), line);
}

std::unique_ptr<ReceiveChannel> make_staged_receiver(std::shared_ptr<Progress> progress, const Line& line,
                                                     std::size_t slots) {
  return std::make_unique<StagedReceiver>(std::move(progress), line, slots);
}

}  // namespace pipedream
