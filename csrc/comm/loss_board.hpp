// LossBoard: losses of microbatches, readable from all ranks.
//
// The rank that computes a loss publishes it, and any rank asks that rank for it. The thread that polls Progress on
// the owner answers, so the owner's program does nothing for it, even while it computes or waits in a channel:
//
//   asker           ask(7) ─┐                        ┌─► returns    ask(6) ─┐      ┌─► returns
//   owner   poll            └─► park                 │                      └──────┘
//           main    forward 7 ......... publish(7) ──┘ backward 7 .............................     time ->
//
// A request for a loss that is not yet published is parked and answered by publish(). The board keeps the last
// `capacity` losses of its rank, and refuses requests for older ones.
//
// A board costs one posted receive per rank and a few nanoseconds per publish(); messages are sent only by ask().
// Requests and answers are messages of the same fixed size, on the two largest tags of the communicator.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "comm/progress.hpp"

namespace pipedream {

struct Loss {
  double value;   // the mean
  double weight;  // what it is a mean over: samples, or what the loss function counted
  bool counted;   // whether the loss function counted it
};

class LossBoard final : public Endpoint {
 public:
  // A Progress has at most one board at a time. Throws std::invalid_argument unless capacity is positive.
  LossBoard(std::shared_ptr<Progress> progress, std::size_t capacity);
  ~LossBoard() override;
  LossBoard(const LossBoard&) = delete;
  LossBoard& operator=(const LossBoard&) = delete;

  // Stores the loss of a microbatch of this rank, and answers the requests that are parked for it. Takes the lock of
  // Progress only if a request is parked.
  void publish(std::int64_t microbatch, const Loss& loss);

  // Returns a loss that `owner_rank` has published or will publish; waits for it. Throws CoreError if the owner no
  // longer keeps it, MpiError, StallError.
  Loss ask(int owner_rank, std::int64_t microbatch, const WaitOptions& options);

  std::shared_ptr<void> memory(std::size_t slot) const override { return slots_[slot]; }
  void completed(std::size_t slot) override;
  std::string describe(std::size_t slot) const override;

 private:
  enum class Status : std::uint32_t { requested, published, overwritten };

  // A request or an answer.
  struct Message {
    static constexpr std::uint32_t expected_magic = 0x31424c50;  // "PLB1"
    std::uint32_t magic = expected_magic;
    Status status = Status::requested;
    std::int64_t ticket = 0;  // identifies a call of ask() on the asking rank
    std::int64_t microbatch = -1;
    double value = 0;
    double weight = 0;          // if overwritten, the owner's capacity
    std::int32_t rank = -1;     // the sender
    std::uint32_t counted = 0;  // 32 bits: without padding, because MPI sends all bytes
  };
  static_assert(sizeof(Message) == 48, "a message is 48 bytes on every rank");

  // The memory of one MPI request.
  struct Slot {
    enum class Use { free, listen, request, await_answer, answer } use = Use::free;
    int peer_rank = -1;
    Message message;
  };

  struct Entry {
    std::int64_t microbatch = -1;
    Loss loss{};
  };

  // Called with the lock of Progress held.
  std::size_t take_slot(Slot::Use use, int peer_rank);
  void free_slot(std::size_t index);
  void listen(std::size_t index);
  void receive(std::size_t index, int peer_rank, int tag);
  void send(Slot::Use use, int peer_rank, const Message& message);
  void reply(Message message);  // or parks it

  int request_tag() const { return progress_->largest_tag() - 1; }
  int answer_tag() const { return progress_->largest_tag(); }

  // Called with losses_mutex_ held. Turns a request into its answer; returns false if the loss is not yet published.
  bool look_up(Message& message) const;

  const std::shared_ptr<Progress> progress_;

  // Guarded by the lock of Progress.
  std::vector<std::shared_ptr<Slot>> slots_;
  std::vector<std::size_t> free_;
  std::unordered_map<std::int64_t, Message*> tickets_;  // where unanswered calls of ask() want the answer, or null

  // Guarded by losses_mutex_, which is locked after the lock of Progress. So publish() does not wait for a poll.
  std::mutex losses_mutex_;
  std::vector<Entry> ring_;
  std::size_t published_ = 0;              // the next entry is ring_[published_ % ring_.size()]
  std::int64_t largest_overwritten_ = -1;  // microbatch
  std::vector<Message> parked_;            // requests
};

}  // namespace pipedream
