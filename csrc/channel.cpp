#include "channel.hpp"

#include <climits>
#include <cstring>

#include "mpi_error.hpp"

namespace pipedream {

namespace {

// What lies between two tensors of one message.
std::byte padding[tensor_alignment] = {};

// Host memory. Headers and small messages are kept in a block per turn, which outlives the channel while MPI reads
// it; large tensors are the caller's, who keeps the last two.
class HostSender final : public SendChannel {
 public:
  HostSender(std::shared_ptr<Progress> progress, const Line& line) : SendChannel(std::move(progress), line) {
    const std::size_t bytes = line_.header_bytes() + (line_.small() ? line_.capacity() : 0);
    for (std::shared_ptr<Turn>& turn : turns_) turn = std::make_shared<Turn>(bytes);
  }
  ~HostSender() override { progress_->forget(this); }

  std::shared_ptr<void> memory(std::size_t turn) const override { return turns_[turn]; }
  void completed(std::size_t turn) override { --turns_[turn]->requests; }

 private:
  struct Turn {
    explicit Turn(std::size_t bytes) : staging(bytes, Where::host) {}
    Buffer staging;    // headers; of small messages the tensors too
    int requests = 0;  // under way
  };

  void launch(std::size_t index, cuda::Handle) override {
    const Message& message = messages_[index];
    Turn& turn = *turns_[index];
    std::byte* to = turn.staging.data();
    std::memcpy(to, message.headers.data(), line_.header_bytes());
    to += line_.header_bytes();
    if (line_.small()) {
      for (const View& run : message.runs) {
        // A tensor of no elements may have no address either, and memcpy wants one.
        if (run.bytes > 0) std::memcpy(to, run.data, run.bytes);
        to += run.bytes;
      }
    }
    const std::size_t ahead = static_cast<std::size_t>(to - turn.staging.data());
    // The tensors first: the headers then come while these are on their way.
    if (!line_.small() && message.runs.size() == 1) {
      const View& run = message.runs[0];
      turn.requests += !progress_->send(this, index, run.data, run.bytes, line_.peer, line_.payload_tag());
    } else if (!line_.small()) {
      turn.requests += !progress_->send(this, index, message.runs, line_.peer, line_.payload_tag());
    }
    turn.requests += !progress_->send(this, index, turn.staging.data(), ahead, line_.peer, line_.header_tag());
  }

  bool busy(std::size_t turn) const override { return turns_[turn]->requests > 0; }

  std::array<std::shared_ptr<Turn>, 2> turns_;
};

// Into slots that MPI reaches: host memory, or device memory with a CUDA-aware MPI.
class DirectReceiver final : public ReceiveChannel {
 public:
  DirectReceiver(std::shared_ptr<Progress> progress, const Line& line, std::size_t slots)
      : ReceiveChannel(std::move(progress), line, slots) {
    slots_.reserve(slots);
    for (std::size_t index = 0; index < slots; ++index) slots_.push_back(std::make_shared<Slot>(line_));
    const Progress::Lock held = progress_->lock();
    for (std::size_t index = 0; index < slots; ++index) receive(index);
  }
  ~DirectReceiver() override { progress_->forget(this); }

  View slot(std::size_t index) const override {
    return slots_.at(index)->memory.view(line_.small() ? line_.header_bytes() : 0);
  }
  std::shared_ptr<void> memory(std::size_t index) const override { return slots_[index]; }
  void completed(std::size_t index) override { --slots_[index]->requests; }
  void happened(std::size_t index) override { receive(index); }

 private:
  struct Slot {
    explicit Slot(const Line& line)
        : memory((line.small() ? line.header_bytes() : 0) + line.capacity(), line.where), headers(line.parts.size()) {
      if (line.where == Where::device) done = std::make_unique<cuda::Event>();
    }
    Buffer memory;                      // of small messages the headers too
    std::vector<Header> headers;        // of large messages
    std::unique_ptr<cuda::Event> done;  // compute has read it
    int requests = 0;                   // posted and not complete
  };

  void post(std::size_t index, cuda::Handle compute) override {
    Slot& slot = *slots_[index];
    if (!slot.done) return receive(index);
    slot.requests = 1;  // until it is posted, it has not arrived
    slot.done->record(compute);
    progress_->watch(this, index, slot.done.get());
  }

  void receive(std::size_t index) {
    Slot& slot = *slots_[index];
    if (line_.small()) {
      slot.requests = 1;
      progress_->receive(this, index, slot.memory.data(), slot.memory.bytes(), line_.peer, line_.header_tag());
      return;
    }
    slot.requests = 2;
    progress_->receive(this, index, slot.headers.data(), line_.header_bytes(), line_.peer, line_.header_tag());
    progress_->receive(this, index, slot.memory.data(), slot.memory.bytes(), line_.peer, line_.payload_tag());
  }

  bool arrived(std::size_t index) const override { return slots_[index]->requests == 0; }

  const Header* headers(std::size_t index) const override {
    Slot& slot = *slots_[index];
    if (line_.small()) std::memcpy(slot.headers.data(), slot.memory.data(), line_.header_bytes());
    return slot.headers.data();
  }

  std::vector<std::shared_ptr<Slot>> slots_;
};

}  // namespace

const Line& checked(const Line& line) {
  if (line.parts.empty()) throw std::invalid_argument("a channel carries at least one tensor");
  for (const Part& part : line.parts) {
    if (part.shape.size() <= Header::most_dims && part.dtype.size() <= sizeof(Header::dtype)) continue;
    throw MessageError(part.label + ": " + text_of(part.dtype, part.shape) + " has more than " +
                       std::to_string(Header::most_dims) + " dimensions, or a dtype of more than " +
                       std::to_string(sizeof(Header::dtype)) + " letters: reshape it before it leaves the stage");
  }
  if (line.capacity() > static_cast<std::size_t>(INT_MAX)) {
    throw MessageError(line.label() + ": " + std::to_string(line.capacity()) +
                       " bytes are more than one MPI message takes (2 GiB): use smaller minibatches");
  }
  return line;
}

std::unique_ptr<SendChannel> SendChannel::make(std::shared_ptr<Progress> progress, const Line& line) {
  if (line.where == Where::device) return make_device_sender(std::move(progress), line);
  return std::make_unique<HostSender>(std::move(progress), line);
}

SendChannel::SendChannel(std::shared_ptr<Progress> progress, const Line& line)
    : progress_(std::move(progress)), line_(checked(line)) {
  for (Message& message : messages_) {
    message.bytes = 0;
    for (const Part& part : line_.parts) {
      Header header;
      std::memcpy(header.dtype, part.dtype.data(), part.dtype.size());
      message.headers.push_back(header);
    }
  }
}

void SendChannel::send(std::int64_t minibatch, const std::vector<Piece>& pieces, const Waiting& waiting,
                       cuda::Handle compute) {
  check(minibatch, pieces);
  const std::size_t turn = sent_ % messages_.size();
  Progress::Lock held = progress_->lock();
  progress_->check_usable();
  if (busy(turn)) {
    wait_for(
        held, [&] { return !busy(turn); }, [&] { return "to send minibatch " + std::to_string(minibatch); }, waiting);
  }
  prepare(messages_[turn], minibatch, pieces);
  ++sent_;
  launch(turn, compute);
  ++traffic_.messages;
  for (const Header& header : messages_[turn].headers) traffic_.payload_bytes += header.payload_bytes;
}

void SendChannel::check(std::int64_t minibatch, const std::vector<Piece>& pieces) const {
  const std::string* label = &line_.parts[0].label;
  if (pieces.size() != line_.parts.size()) {
    throw MessageError(*label + " of minibatch " + std::to_string(minibatch) + ": " + std::to_string(pieces.size()) +
                       " tensors, but the channel was planned for " + std::to_string(line_.parts.size()));
  }
  for (std::size_t i = 0; i < pieces.size(); ++i) {
    const Part& part = line_.parts[i];
    const Shape& shape = pieces[i].shape;
    if (shape == part.shape) continue;
    const std::size_t bytes = elements(shape) * part.item;
    if (bytes <= part.bytes() && shape.size() <= Header::most_dims) continue;
    throw MessageError("rank " + std::to_string(progress_->rank()) + ": " + part.label + " of minibatch " +
                       std::to_string(minibatch) + " is " + text_of(part.dtype, shape) + ", " + std::to_string(bytes) +
                       " bytes, but the channel was planned for " + std::to_string(part.bytes()));
  }
}

void SendChannel::prepare(Message& message, std::int64_t minibatch, const std::vector<Piece>& pieces) {
  message.runs.clear();
  message.bytes = 0;
  for (std::size_t i = 0; i < pieces.size(); ++i) {
    const Shape& shape = pieces[i].shape;
    const std::size_t bytes = elements(shape) * line_.parts[i].item;
    Header& header = message.headers[i];
    header.minibatch = minibatch;
    header.payload_bytes = bytes;
    header.dims = static_cast<std::uint32_t>(shape.size());
    std::copy(shape.begin(), shape.end(), header.shape);
    if (const std::size_t gap = aligned(message.bytes) - message.bytes; gap > 0) {
      message.runs.push_back({padding, gap, Where::host});
      message.bytes += gap;
    }
    auto* const data = const_cast<std::byte*>(static_cast<const std::byte*>(pieces[i].data));  // only read
    message.runs.push_back({data, bytes, line_.where});
    message.bytes += bytes;
  }
}

void SendChannel::drain(const Waiting& waiting) {
  Progress::Lock held = progress_->lock();
  wait_for(held, [this] { return !busy(0) && !busy(1); }, [] { return std::string("for its last sends"); }, waiting);
}

std::size_t SendChannel::in_flight() {
  progress_->poll_once();
  const Progress::Lock held = progress_->lock();
  return static_cast<std::size_t>(busy(0)) + static_cast<std::size_t>(busy(1));
}

template <typename Done, typename What>
void SendChannel::wait_for(Progress::Lock& held, const Done& done, const What& what, const Waiting& waiting) {
  progress_->wait(held, done, waiting, [&](double waited) {
    return std::make_exception_ptr(
        StallError("rank " + std::to_string(progress_->rank()) + " has waited " + with_one_decimal(waited) + " s " +
                   what() + ": " + line_.label() + " to rank " + std::to_string(line_.peer) + "; " +
                   std::to_string(traffic_.messages) + " messages sent so far, of which rank " +
                   std::to_string(line_.peer) + " has not taken the last; see what that rank is doing"));
  });
}

std::string SendChannel::describe(std::size_t turn) const {
  return line_.label() + ", minibatch " + std::to_string(messages_[turn].headers[0].minibatch) + ", to rank " +
         std::to_string(line_.peer);
}

std::unique_ptr<ReceiveChannel> ReceiveChannel::make(std::shared_ptr<Progress> progress, const Line& line,
                                                     std::size_t slots) {
  if (line.where == Where::device && line.route == Route::staged) {
    return make_staged_receiver(std::move(progress), line, slots);
  }
  return std::make_unique<DirectReceiver>(std::move(progress), line, slots);
}

ReceiveChannel::ReceiveChannel(std::shared_ptr<Progress> progress, const Line& line, std::size_t slots)
    : progress_(std::move(progress)), line_(checked(line)), places_(line.places()), in_use_(slots, false) {
  if (slots == 0) throw std::invalid_argument(line_.label() + ": a channel needs at least one slot");
  for (std::size_t index = 0; index < slots; ++index) posted_.push_back(index);
}

bool ReceiveChannel::ready() {
  progress_->poll_once();
  const Progress::Lock held = progress_->lock();
  return !posted_.empty() && arrived(posted_.front());
}

Arrived ReceiveChannel::receive(std::int64_t minibatch, const Waiting& waiting) {
  Progress::Lock held = progress_->lock();  // describe() reads what changes here, maybe on the progress thread
  if (posted_.empty()) {
    throw MessageError("rank " + std::to_string(progress_->rank()) + ": all " + std::to_string(slots()) +
                       " slots are in use, so minibatch " + std::to_string(minibatch) + " has none: " + from());
  }
  const std::size_t index = posted_.front();
  progress_->wait(
      held, [&] { return arrived(index); }, waiting,
      [&](double waited) {
        const std::string last =
            traffic_.messages == 0
                ? "none"
                : std::to_string(traffic_.messages) + ", the last was minibatch " + std::to_string(last_minibatch_);
        return std::make_exception_ptr(StallError(
            "rank " + std::to_string(progress_->rank()) + " has waited " + with_one_decimal(waited) +
            " s for minibatch " + std::to_string(minibatch) + ": " + from() + "; messages received so far: " + last));
      });
  const Header* const read = headers(index);
  Arrived arrived{index, read_headers(read, minibatch), {}, {}};
  std::size_t bytes = 0;
  for (std::size_t i = 0; i < line_.parts.size(); ++i) bytes += read[i].payload_bytes;
  if (!arrived.whole) {
    for (std::size_t i = 0; i < line_.parts.size(); ++i) {
      arrived.shapes.push_back(read[i].shape_vector());
      arrived.places.push_back({aligned(extent(arrived.places)), read[i].payload_bytes});
    }
  }
  posted_.pop_front();
  in_use_[index] = true;
  last_minibatch_ = minibatch;
  ++traffic_.messages;
  traffic_.payload_bytes += bytes;
  return arrived;
}

bool ReceiveChannel::read_headers(const Header* headers, std::int64_t minibatch) const {
  bool whole = true;
  for (std::size_t i = 0; i < line_.parts.size(); ++i) {
    const Header& header = headers[i];
    const Part& part = line_.parts[i];
    const auto here = [this] { return "rank " + std::to_string(progress_->rank()); };
    const auto source = [&] { return part.label + " from rank " + std::to_string(line_.peer); };
    if (header.magic != Header::expected_magic) {
      throw MessageError(here() + ": a message that is none of ours came on the channel for " + source());
    }
    if (header.minibatch != minibatch) {
      throw MessageError(here() + " expected minibatch " + std::to_string(minibatch) + " but got minibatch " +
                         std::to_string(header.minibatch) + ": " + source());
    }
    bool fits = header.dims == part.shape.size() && header.payload_bytes <= part.bytes() &&
                part.dtype.size() == strnlen(header.dtype, sizeof header.dtype) &&
                std::memcmp(header.dtype, part.dtype.data(), part.dtype.size()) == 0;
    for (std::size_t dim = 0; fits && dim < part.shape.size(); ++dim) {
      fits = header.shape[dim] <= part.shape[dim];
      whole &= header.shape[dim] == part.shape[dim];
    }
    if (!fits) {
      throw MessageError(here() + " expected " + text_of(part.dtype, part.shape) + " (or smaller) but got " +
                         text_of(header.dtype_name(), header.shape_vector()) + " for minibatch " +
                         std::to_string(minibatch) + ": " + source());
    }
  }
  return whole;
}

void ReceiveChannel::release(std::size_t index, cuda::Handle compute) {
  const Progress::Lock held = progress_->lock();
  if (!in_use_.at(index)) throw std::logic_error("slot " + std::to_string(index) + " is not in use: " + from());
  in_use_[index] = false;
  posted_.push_back(index);
  post(index, compute);
}

std::string ReceiveChannel::from() const { return line_.label() + " from rank " + std::to_string(line_.peer); }

std::string ReceiveChannel::describe(std::size_t) const {
  return from() + ", after " + std::to_string(traffic_.messages) + " messages";
}

}  // namespace pipedream
