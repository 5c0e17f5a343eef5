#include "comm/loss_board.hpp"

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <utility>

#include "comm/channel_spec.hpp"
#include "comm/mpi_error.hpp"

namespace pipedream {

namespace {

// Unique in the process, so that no board takes an answer to an earlier one.
std::atomic<std::int64_t> next_ticket{0};

}  // namespace

LossBoard::LossBoard(std::shared_ptr<Progress> progress, std::size_t capacity)
    : progress_(std::move(progress)), ring_(capacity) {
  if (capacity == 0) throw std::invalid_argument("a loss board needs a capacity of at least 1");
  const Progress::Lock held = progress_->lock();
  listen(take_slot(Slot::Use::listen, -1));
}

LossBoard::~LossBoard() { progress_->forget(this); }

void LossBoard::publish(std::int64_t microbatch, const Loss& loss) {
  std::vector<Message> answers;  // allocates only if there are any
  {
    const std::lock_guard losses(losses_mutex_);
    Entry& entry = ring_[published_++ % ring_.size()];
    largest_overwritten_ = std::max(largest_overwritten_, entry.microbatch);
    entry = {microbatch, loss};
    if (parked_.empty()) return;
    const auto others = [&](const Message& request) { return request.microbatch != microbatch; };
    const auto asked = std::stable_partition(parked_.begin(), parked_.end(), others);
    answers.assign(asked, parked_.end());
    parked_.erase(asked, parked_.end());
    for (Message& answer : answers) look_up(answer);
  }
  if (answers.empty()) return;
  const Progress::Lock held = progress_->lock();
  for (const Message& answer : answers) send(Slot::Use::answer, answer.rank, answer);
}

Loss LossBoard::ask(int owner_rank, std::int64_t microbatch, const WaitOptions& options) {
  Message message;
  message.microbatch = microbatch;
  const auto stalled = [&](double waited) {
    return std::make_exception_ptr(
        StallError("rank " + std::to_string(progress_->rank()) + " has waited " + with_one_decimal(waited) +
                   " s for the loss of " + progress_->microbatch_name(microbatch) + " from rank " +
                   std::to_string(owner_rank) + ", which has not published it; see what that rank is doing"));
  };
  Progress::Lock held = progress_->lock();
  if (owner_rank == progress_->rank()) {
    const auto published = [&] {
      const std::lock_guard losses(losses_mutex_);
      return look_up(message);
    };
    progress_->wait(held, published, options, stalled);
  } else {
    // If this call ends without the answer, the ticket stays, without a target, and the late answer is dropped.
    struct Ticket {
      std::unordered_map<std::int64_t, Message*>& tickets;
      const std::int64_t number;
      ~Ticket() {
        if (const auto found = tickets.find(number); found != tickets.end()) found->second = nullptr;
      }
    } ticket{tickets_, next_ticket++};
    message.ticket = ticket.number;
    tickets_.emplace(ticket.number, &message);
    const std::size_t slot = take_slot(Slot::Use::await_answer, owner_rank);
    slots_[slot]->message = message;
    receive(slot, owner_rank, answer_tag());
    send(Slot::Use::request, owner_rank, message);
    progress_->wait(held, [&] { return message.status != Status::requested; }, options, stalled);
  }
  if (message.status == Status::overwritten) {
    throw CoreError("rank " + std::to_string(progress_->rank()) + ": the loss of " +
                    progress_->microbatch_name(microbatch) + " is no longer kept: read step.loss before rank " +
                    std::to_string(owner_rank) + " runs " + std::to_string(ring_.size()) + " more microbatches");
  }
  return {message.value, message.weight, message.counted != 0};
}

bool LossBoard::look_up(Message& message) const {
  for (std::size_t back = 1; back <= std::min(published_, ring_.size()); ++back) {
    const Entry& entry = ring_[(published_ - back) % ring_.size()];
    if (entry.microbatch != message.microbatch) continue;
    message.status = Status::published;
    message.value = entry.loss.value;
    message.weight = entry.loss.weight;
    message.counted = entry.loss.counted;
    return true;
  }
  if (message.microbatch > largest_overwritten_) return false;
  message.status = Status::overwritten;
  message.weight = static_cast<double>(ring_.size());
  return true;
}

void LossBoard::completed(std::size_t index) {
  Slot& slot = *slots_[index];
  const Message message = slot.message;
  if (slot.use == Slot::Use::listen || slot.use == Slot::Use::await_answer) {
    if (message.magic != Message::expected_magic) {
      throw MessageError("rank " + std::to_string(progress_->rank()) +
                         ": a message of another program arrived on the loss board");
    }
  }
  if (slot.use == Slot::Use::listen) {
    listen(index);
    reply(message);
    return;
  }
  if (slot.use == Slot::Use::await_answer) {
    const auto found = tickets_.find(message.ticket);
    // The answer to a request of an earlier board of this rank took the receive of a later request.
    if (found == tickets_.end()) return receive(index, slot.peer_rank, answer_tag());
    if (found->second != nullptr) *found->second = message;
    tickets_.erase(found);
  }
  free_slot(index);
}

void LossBoard::reply(Message message) {
  {
    const std::lock_guard losses(losses_mutex_);
    if (!look_up(message)) {
      parked_.push_back(message);
      return;
    }
  }
  send(Slot::Use::answer, message.rank, message);
}

std::size_t LossBoard::take_slot(Slot::Use use, int peer_rank) {
  if (free_.empty()) {
    free_.push_back(slots_.size());
    slots_.push_back(std::make_shared<Slot>());
  }
  const std::size_t index = free_.back();
  free_.pop_back();
  slots_[index]->use = use;
  slots_[index]->peer_rank = peer_rank;
  return index;
}

void LossBoard::free_slot(std::size_t index) {
  slots_[index]->use = Slot::Use::free;
  free_.push_back(index);
}

void LossBoard::listen(std::size_t index) { receive(index, MPI_ANY_SOURCE, request_tag()); }

void LossBoard::receive(std::size_t index, int peer_rank, int tag) {
  progress_->receive(this, index, &slots_[index]->message, sizeof(Message), peer_rank, tag);
}

void LossBoard::send(Slot::Use use, int peer_rank, const Message& message) {
  const std::size_t index = take_slot(use, peer_rank);
  Message& copy = slots_[index]->message;
  copy = message;
  copy.rank = progress_->rank();
  const int tag = use == Slot::Use::request ? request_tag() : answer_tag();
  if (progress_->send(this, index, &copy, sizeof copy, peer_rank, tag)) free_slot(index);
}

std::string LossBoard::describe(std::size_t index) const {
  const Slot& slot = *slots_[index];
  const std::string loss = "the loss of " + progress_->microbatch_name(slot.message.microbatch);
  const std::string peer = "rank " + std::to_string(slot.peer_rank);
  switch (slot.use) {
    case Slot::Use::request:
      return "the request for " + loss + " to " + peer;
    case Slot::Use::await_answer:
      return loss + " from " + peer;
    case Slot::Use::answer:
      return loss + " to " + peer;
    default:
      return "requests for losses";
  }
}

}  // namespace pipedream
