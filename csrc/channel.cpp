#include "channel.hpp"

#include <climits>
#include <cstdio>
#include <cstring>

#include "mpi_error.hpp"

namespace pipedream {

namespace {

std::string with_one_decimal(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.1f", value);
  return text;
}

const Line& checked(const Line& line) {
  if (line.capacity > static_cast<std::size_t>(INT_MAX)) {
    throw MessageError(line.label + ": " + std::to_string(line.capacity) +
                       " bytes are more than one MPI message takes (2 GiB): use smaller minibatches");
  }
  return line;
}

}  // namespace

SendChannel::SendChannel(std::shared_ptr<Progress> progress, Line line)
    : progress_(std::move(progress)), line_(checked(line)) {
  for (std::shared_ptr<Outgoing>& out : outgoing_) {
    out.reset(new Outgoing{{}, Buffer(line_.small() ? sizeof(Header) + line_.capacity : 0, Where::host)});
  }
}

SendChannel::~SendChannel() { progress_->forget(this); }

void SendChannel::send(std::int64_t minibatch, const void* payload, std::size_t bytes, const std::string& dtype,
                       const Shape& shape, const Waiting& waiting) {
  if (bytes > line_.capacity || shape.size() > Header::most_dims || dtype.size() > sizeof(Header::dtype)) {
    throw MessageError("rank " + std::to_string(progress_->rank()) + ": " + line_.label + " of minibatch " +
                       std::to_string(minibatch) + " is " + text_of(dtype, shape) + ", " + std::to_string(bytes) +
                       " bytes, but the channel was planned for " + std::to_string(line_.capacity));
  }
  const std::size_t slot = sent_ % outgoing_.size();
  Outgoing& out = *outgoing_[slot];
  wait_for([&] { return out.requests == 0; }, "to send minibatch " + std::to_string(minibatch), waiting);

  Header header;
  header.minibatch = minibatch;
  header.payload_bytes = bytes;
  header.dims = static_cast<std::uint32_t>(shape.size());
  std::copy(shape.begin(), shape.end(), header.shape);
  std::memcpy(header.dtype, dtype.data(), dtype.size());
  if (line_.small()) {
    std::memcpy(out.staging.data(), &header, sizeof header);
    // A tensor of no elements may have no address either, and memcpy wants one.
    if (bytes > 0) std::memcpy(out.staging.data() + sizeof header, payload, bytes);
  } else {
    out.header = header;
  }

  Progress::Lock held = progress_->lock();
  ++sent_;
  if (line_.small()) {
    progress_->send(this, slot, out.staging.data(), sizeof header + bytes, line_.peer, line_.header_tag());
    out.requests = 1;
  } else {
    progress_->send(this, slot, &out.header, sizeof header, line_.peer, line_.header_tag());
    progress_->send(this, slot, payload, bytes, line_.peer, line_.payload_tag());
    out.requests = 2;
  }
  ++traffic_.messages;
  traffic_.payload_bytes += bytes;
}

void SendChannel::drain(const Waiting& waiting) {
  wait_for([this] { return outgoing_[0]->requests + outgoing_[1]->requests == 0; }, "for its last sends", waiting);
}

std::size_t SendChannel::in_flight() {
  progress_->poll_once();
  Progress::Lock held = progress_->lock();
  return (outgoing_[0]->requests > 0) + (outgoing_[1]->requests > 0);
}

void SendChannel::wait_for(const std::function<bool()>& done, const std::string& what, const Waiting& waiting) {
  progress_->wait(
      done, waiting.stall_limit_s,
      [&](double waited) {
        return std::make_exception_ptr(
            StallError("rank " + std::to_string(progress_->rank()) + " has waited " + with_one_decimal(waited) + " s " +
                       what + ": " + line_.label + " to rank " + std::to_string(line_.peer) + "; " +
                       std::to_string(traffic_.messages) + " messages sent so far, of which rank " +
                       std::to_string(line_.peer) + " has not taken the last; see what that rank is doing"));
      },
      waiting.interrupted);
}

void SendChannel::completed(std::size_t slot) { --outgoing_[slot]->requests; }

std::string SendChannel::describe(std::size_t slot) const {
  const Outgoing& out = *outgoing_[slot];
  Header header = out.header;
  if (line_.small()) std::memcpy(&header, out.staging.data(), sizeof header);
  return line_.label + ", minibatch " + std::to_string(header.minibatch) + ", to rank " + std::to_string(line_.peer);
}

ReceiveChannel::ReceiveChannel(std::shared_ptr<Progress> progress, Line line, std::size_t slots, std::string dtype,
                               Shape shape)
    : progress_(std::move(progress)), line_(checked(line)), dtype_(std::move(dtype)), shape_(std::move(shape)) {
  if (slots == 0) throw std::invalid_argument(line_.label + ": a channel needs at least one slot");
  slots_.reserve(slots);
  for (std::size_t index = 0; index < slots; ++index) {
    slots_.emplace_back(new Slot{Buffer((line_.small() ? sizeof(Header) : 0) + line_.capacity, line_.where), {}});
  }
  Progress::Lock held = progress_->lock();
  for (std::size_t index = 0; index < slots; ++index) post(index);
}

ReceiveChannel::~ReceiveChannel() { progress_->forget(this); }

void ReceiveChannel::post(std::size_t index) {
  Slot& slot = *slots_[index];
  if (line_.small()) {
    progress_->receive(this, index, slot.memory.data(), slot.memory.bytes(), line_.peer, line_.header_tag());
    slot.requests = 1;
  } else {
    progress_->receive(this, index, &slot.header, sizeof slot.header, line_.peer, line_.header_tag());
    progress_->receive(this, index, slot.memory.data(), slot.memory.bytes(), line_.peer, line_.payload_tag());
    slot.requests = 2;
  }
  posted_.push_back(index);
}

bool ReceiveChannel::ready() {
  progress_->poll_once();
  Progress::Lock held = progress_->lock();
  return !posted_.empty() && slots_[posted_.front()]->requests == 0;
}

std::pair<std::size_t, Shape> ReceiveChannel::receive(std::int64_t minibatch, const Waiting& waiting) {
  if (posted_.empty()) {
    throw MessageError("rank " + std::to_string(progress_->rank()) + ": all " + std::to_string(slots_.size()) +
                       " slots are in use, so minibatch " + std::to_string(minibatch) + " has none: " + from());
  }
  const std::size_t index = posted_.front();
  Slot& slot = *slots_[index];
  progress_->wait(
      [&] { return slot.requests == 0; }, waiting.stall_limit_s,
      [&](double waited) {
        const std::string last =
            traffic_.messages == 0
                ? "none"
                : std::to_string(traffic_.messages) + ", the last was minibatch " + std::to_string(last_minibatch_);
        return std::make_exception_ptr(StallError(
            "rank " + std::to_string(progress_->rank()) + " has waited " + with_one_decimal(waited) +
            " s for minibatch " + std::to_string(minibatch) + ": " + from() + "; messages received so far: " + last));
      },
      waiting.interrupted);
  if (line_.small()) std::memcpy(&slot.header, slot.memory.data(), sizeof slot.header);
  check_header(slot.header, minibatch);
  posted_.pop_front();
  slot.in_use = true;
  const Progress::Lock held = progress_->lock();  // describe() reads these, maybe on the progress thread
  last_minibatch_ = minibatch;
  ++traffic_.messages;
  traffic_.payload_bytes += slot.header.payload_bytes;
  return {index, slot.header.shape_vector()};
}

void ReceiveChannel::check_header(const Header& header, std::int64_t minibatch) const {
  const std::string here = "rank " + std::to_string(progress_->rank());
  if (header.magic != Header::expected_magic) {
    throw MessageError(here + ": a message that is none of ours came on the channel for " + from());
  }
  if (header.minibatch != minibatch) {
    throw MessageError(here + " expected minibatch " + std::to_string(minibatch) + " but got minibatch " +
                       std::to_string(header.minibatch) + ": " + from());
  }
  const Shape got = header.shape_vector();
  bool fits = header.dtype_name() == dtype_ && got.size() == shape_.size();
  for (std::size_t i = 0; fits && i < got.size(); ++i) fits = got[i] <= shape_[i];
  if (!fits || header.payload_bytes > line_.capacity) {
    throw MessageError(here + " expected " + text_of(dtype_, shape_) + " (or smaller) but got " +
                       text_of(header.dtype_name(), got) + " for minibatch " + std::to_string(minibatch) + ": " +
                       from());
  }
}

View ReceiveChannel::slot(std::size_t index) const {
  return slots_.at(index)->memory.view(line_.small() ? sizeof(Header) : 0);
}

void ReceiveChannel::release(std::size_t index) {
  Slot& slot = *slots_.at(index);
  if (!slot.in_use) throw std::logic_error("slot " + std::to_string(index) + " is not in use: " + from());
  slot.in_use = false;
  Progress::Lock held = progress_->lock();
  post(index);
}

void ReceiveChannel::completed(std::size_t slot) { --slots_[slot]->requests; }

std::string ReceiveChannel::describe(std::size_t) const {
  return from() + ", after " + std::to_string(traffic_.messages) + " messages";
}

std::string ReceiveChannel::from() const { return line_.label + " from rank " + std::to_string(line_.peer); }

}  // namespace pipedream
