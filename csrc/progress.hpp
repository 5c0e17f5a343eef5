// Progress: the one place where this core calls MPI.
//
// No MPI moves a large message by itself: somebody has to call it. While the main thread computes,
// that is the progress thread; while the main thread waits for a message it has nothing better to
// do than call MPI itself, which saves handing over between threads, and the progress thread rests:
//
//   main       | forward 3 ........ | wait: poll poll poll | backward 1 ......... |
//   progress   | poll   poll   poll |                      | poll   poll   poll   |    time ->
//
// A poll is one MPI_Testsome over all requests, behind one mutex, and a look at the events of copies
// between host and device. Between polls the progress thread sleeps, so that it never takes a core from
// compute; the main thread has its core to itself while it waits and polls on, unless ranks are crowded
// and another rank's compute could use the core. The progress thread never waits for the mutex: whoever
// has it is calling MPI just now.
#pragma once

#include <mpi.h>

#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "memory.hpp"
#include "streams.hpp"

namespace pipedream {

// Something that has requests under way: one end of a channel.
class Endpoint {
 public:
  virtual ~Endpoint() = default;
  // What MPI reads or writes for a request of `slot`. It outlives the endpoint while MPI is at it.
  virtual std::shared_ptr<void> memory(std::size_t slot) const = 0;
  // One request of `slot` is complete. Called with the lock held, maybe on the progress thread.
  virtual void completed(std::size_t slot) = 0;
  // The event that `slot` was watched for has happened. Called likewise.
  virtual void happened(std::size_t) {}
  // What the request was for, in an error's text.
  virtual std::string describe(std::size_t slot) const = 0;
  // MPI is about to end: give back what only MPI can free.
  virtual void close() {}
};

// How long to wait, and what to do meanwhile.
struct Waiting {
  double stall_limit_s;
  std::function<void()> interrupted;  // runs now and then, without the lock, and may throw
};

struct ProgressStatistics {
  std::uint64_t polls_waiting = 0;    // by the main thread
  std::uint64_t polls_computing = 0;  // by the progress thread
  std::uint64_t completions = 0;
};

class Progress {
 public:
  using Clock = std::chrono::steady_clock;

  // Collective over `parent`, which is duplicated: no message of anybody else's can be mistaken for
  // one of ours. `crowded`: whether the ranks of this node want more cores than there are. `device`: the
  // index of the one that this process uses, or -1. `cores`: that the progress thread runs on; if there are
  // none, those that this thread runs on. `spare`: whether nobody computes on them.
  Progress(MPI_Comm parent, bool crowded, int device = -1, std::vector<int> cores = {}, bool spare = false);
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  // Cancels what is still posted and frees the communicator, unless messages are under way on it as far
  // as this rank knows. Harmless when called twice, or after MPI_Finalize. Whoever posts or waits after
  // it gets a CoreError.
  void close();

  int rank() const { return rank_; }
  ProgressStatistics statistics();

  using Lock = std::unique_lock<std::mutex>;
  Lock lock() { return Lock(mutex_); }

  // With the lock held: post a request for `endpoint`. A send may be complete at once, then this returns
  // true and completed() is not called.
  bool send(Endpoint* endpoint, std::size_t slot, const void* data, std::size_t bytes, int peer, int tag);
  // Likewise: one message of several runs of bytes, which stay where they are.
  bool send(Endpoint* endpoint, std::size_t slot, const std::vector<View>& runs, int peer, int tag);
  void receive(Endpoint* endpoint, std::size_t slot, void* data, std::size_t bytes, int peer, int tag);

  // Likewise: throws what broke this, if anything did, or CoreError once it is closed.
  void check_usable() const;

  // Likewise: a collective call's request, started by the endpoint.
  void collective(Endpoint* endpoint, std::size_t slot, MPI_Request request);

  // Likewise: watch for an event in the memory of `slot`; it is recorded already.
  void watch(Endpoint* endpoint, std::size_t slot, const cuda::Event* event);

  // Close this endpoint when everything is closed, until it is forgotten.
  void attend(Endpoint* endpoint);

  // Polls until `done()`, called with the lock held, is true. `stalled(seconds)` makes the exception to
  // throw after the limit. Once an MPI call has failed, on whichever thread, this and every later call
  // throws that MpiError. With or without the lock, which is given back now and then.
  template <typename Done, typename Stalled>
  void wait(Lock& held, const Done& done, const Waiting& waiting, const Stalled& stalled) {
    computed_until_now();
    // In a busy pipeline it is here already: nothing is allocated for that.
    if (!polled(done)) wait_on(held, done, waiting, stalled);
  }
  template <typename Done, typename Stalled>
  void wait(const Done& done, const Waiting& waiting, const Stalled& stalled) {
    Lock held = lock();
    wait(held, done, waiting, stalled);
  }

  // One poll, for a question that does not wait.
  void poll_once();

  // Forget the requests of an endpoint that goes away. Receives are cancelled; sends, and what cannot
  // be cancelled, go on without it.
  void forget(Endpoint* endpoint);

 private:
  enum class Kind { send, receive, collective };
  struct Pending {
    Endpoint* endpoint;  // null once it has gone
    std::size_t slot;
    Kind kind;
    std::size_t bytes;
    std::shared_ptr<void> memory = nullptr;  // of an endpoint that has gone
    bool pushes() const;                     // moves only when MPI is called here
  };

  struct Watched {
    Endpoint* endpoint;
    std::size_t slot;
    const cuda::Event* event;
  };

  template <typename Done>
  bool polled(const Done& done) {
    check_usable();
    poll();
    ++statistics_.polls_waiting;
    return done();
  }
  void wait_on(Lock& held, const std::function<bool()>& done, const Waiting& waiting,
               const std::function<std::exception_ptr(double)>& stalled);
  bool poll();  // with the lock held; whether anything was completed
  bool poll_requests();
  bool poll_events();
  void post(const Pending& pending, MPI_Request request);
  bool sent(const Pending& pending, MPI_Request request);  // whether it is complete at once
  void computed_until_now();                               // the main thread comes to wait
  void settle(const Watched& watched);                     // waits for its event
  bool settle(std::size_t index);                          // cancels a receive; whether MPI is done with the request
  // Of the progress thread until its next poll, by what it did last and how long it worked for the poll.
  std::chrono::microseconds pause(std::chrono::microseconds last, std::chrono::microseconds polled) const;
  void run();  // the progress thread

  std::mutex mutex_;
  std::mutex sleeping_;  // of the progress thread only, and before the other one where both are held
  std::condition_variable wake_;
  std::vector<MPI_Request> requests_;
  std::vector<Pending> pending_;  // parallel to requests_
  std::vector<int> finished_;     // indices, scratch of poll_requests, like the next two
  std::vector<MPI_Status> statuses_;
  std::vector<Pending> complete_;
  std::vector<Watched> watched_;
  std::size_t pushing_ = 0;  // of requests_: those that move only when MPI is called here
  Clock::time_point computing_since_ = Clock::now();
  std::array<std::chrono::microseconds, 8> phases_{};  // that the main thread last computed between two waits
  std::size_t waits_ = 0;
  std::vector<Endpoint*> attended_;
  std::exception_ptr failure_;
  ProgressStatistics statistics_;
  std::atomic<int> waiting_{0};  // threads in wait(), which poll
  bool closing_ = false;         // guarded by sleeping_
  bool closed_ = false;
  bool unread_ = false;  // a message came for an endpoint that had gone

  MPI_Comm comm_ = MPI_COMM_NULL;
  int rank_ = -1;
  const bool crowded_;
  const int device_;
  const std::vector<int> cores_;
  const bool spare_;
  std::thread thread_;
};

}  // namespace pipedream
