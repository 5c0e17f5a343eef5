// Progress: the progress engine, through which this core makes its MPI calls.
//
// MPI transfers a large message only while some thread is inside an MPI call. While the main thread computes,
// the progress thread makes these calls. While the main thread waits for a message, it polls MPI itself, which
// avoids a hand-over between threads, and the progress thread sleeps:
//
//   main       | forward 3 ........ | wait: poll poll poll | backward 1 ......... |
//   progress   | poll   poll   poll |                      | poll   poll   poll   |    time ->
//
// A poll is one MPI_Testsome over all requests, under one mutex, and a query of the events of copies between
// host and device. The progress thread sleeps between polls, so that it takes no core from compute; a large send wakes
// it, because another rank may already wait for that message. A waiting main thread polls without a pause, unless the
// node is oversubscribed and another rank can use its core. The progress thread never waits for the mutex: the thread
// that holds it is already calling MPI.
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

#include "comm/run_position.hpp"
#include "memory/memory.hpp"
#include "memory/streams.hpp"

namespace pipedream {

// An object with active requests, such as one end of a channel. `slot` is the endpoint's own number for a request.
class Endpoint {
 public:
  virtual ~Endpoint() = default;
  // The memory that MPI reads or writes for a request of `slot`. Progress keeps it alive until the request is
  // complete, even if the endpoint is destroyed before.
  virtual std::shared_ptr<void> memory(std::size_t slot) const = 0;
  // Called when one request of `slot` is complete: with the lock held, on the main or the progress thread.
  virtual void completed(std::size_t slot) = 0;
  // Called when the event watched for `slot` is complete: with the lock held, on the main or the progress thread.
  virtual void event_done(std::size_t) {}
  // The purpose of the request, for error texts. Called with the lock held.
  virtual std::string describe(std::size_t slot) const = 0;
  // Called before MPI ends: free communicators and other MPI objects.
  virtual void close() {}
};

// How long to wait, and how to notice an interrupt.
struct WaitOptions {
  double stall_limit_s;
  std::function<void()> check_interrupts;  // called about every 50 ms, without the lock; may throw
};

struct ProgressStatistics {
  std::uint64_t polls_waiting = 0;    // by the main thread
  std::uint64_t polls_computing = 0;  // by the progress thread
  std::uint64_t completions = 0;
};

class Progress {
 public:
  using Clock = std::chrono::steady_clock;

  // Collective over `parent`, which is duplicated, so that no message of another library matches a receive of
  // this core.
  //   oversubscribed   whether the ranks of this node need more cores than it has
  //   device           index of the GPU of this process, or -1
  //   cores            cores of the progress thread; if empty, those of the calling thread
  //   spare            whether no thread computes on `cores`
  Progress(MPI_Comm parent, bool oversubscribed, int device = -1, std::vector<int> cores = {}, bool spare = false);
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  // Cancels posted receives and frees the communicator, unless this rank knows of messages in flight on it. May
  // be called twice, and after MPI_Finalize. Later calls that post or wait throw CoreError.
  void close();

  int rank() const { return rank_; }
  int largest_tag() const { return largest_tag_; }  // MPI_TAG_UB
  ProgressStatistics statistics();

  using Lock = std::unique_lock<std::mutex>;
  Lock lock() { return Lock(mutex_); }

  // Sets what error texts call a microbatch; see RunPosition. Call it at the start of every epoch.
  void set_position(RunPosition position);
  std::string microbatch_name(std::int64_t microbatch) const { return position_.name_of(microbatch); }  // lock held

  // The functions from here to watch() are called with the lock held.

  // Posts a request for `endpoint`. Returns true if a send completes at once; completed() is then not called.
  bool send(Endpoint* endpoint, std::size_t slot, const void* data, std::size_t bytes, int peer_rank, int tag);
  void receive(Endpoint* endpoint, std::size_t slot, void* data, std::size_t bytes, int peer_rank, int tag);

  // Throws the error of the first MPI call that failed, if any, or CoreError after close().
  void check_usable() const;

  // Adds the request of a non-blocking collective that the endpoint has started.
  void collective(Endpoint* endpoint, std::size_t slot, MPI_Request request);

  // Watches a recorded event, which is in the memory of `slot`.
  void watch(Endpoint* endpoint, std::size_t slot, const cuda::Event* event);

  // Registers an endpoint for Endpoint::close(); forget() deregisters it. Takes the lock.
  void register_for_close(Endpoint* endpoint);

  // Polls until `done()` is true; calls it with the lock held. After the stall limit, throws the exception that
  // `stalled(seconds)` returns. Once an MPI call has failed, on any thread, this and every later call throw that
  // MpiError. Releases the lock between polls; the second overload takes it first.
  template <typename Done, typename Stalled>
  void wait(Lock& held, const Done& done, const WaitOptions& options, const Stalled& stalled) {
    computed_until_now();
    // In a busy pipeline the message has already arrived: this path allocates nothing.
    if (!polled(done)) wait_on(held, done, options, stalled);
  }
  template <typename Done, typename Stalled>
  void wait(const Done& done, const WaitOptions& options, const Stalled& stalled) {
    Lock held = lock();
    wait(held, done, options, stalled);
  }

  // Polls once, for calls that do not wait. Takes the lock.
  void poll_once();

  // Deregisters an endpoint that is being destroyed. Cancels its receives; its sends, and receives that cannot be
  // cancelled, continue without it. Takes the lock.
  void forget(Endpoint* endpoint);

 private:
  enum class Kind { send, receive, collective };
  struct Pending {
    Endpoint* endpoint;  // null after forget()
    std::size_t slot;
    Kind kind;
    std::size_t bytes;
    std::shared_ptr<void> memory = nullptr;  // set by forget()
    bool pushes() const;                     // whether it advances only when this rank calls MPI
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
  void wait_on(Lock& held, const std::function<bool()>& done, const WaitOptions& options,
               const std::function<std::exception_ptr(double)>& stalled);
  // All private functions but run() are called with the lock held.
  bool poll();  // returns whether a request or an event was completed
  bool poll_requests();
  bool poll_events();
  void post(const Pending& pending, MPI_Request request);
  bool sent(const Pending& pending, MPI_Request request);  // returns whether it completed at once
  void computed_until_now();                               // ends a compute phase of the main thread
  void settle(const Watched& watched);                     // waits for the event
  bool settle(std::size_t index);                          // cancels a receive; returns whether the request is complete
  // The progress thread's sleep until its next poll, from its last sleep and the CPU time of its last poll.
  std::chrono::microseconds pause(std::chrono::microseconds last, std::chrono::microseconds polled) const;
  void run();  // the progress thread

  std::mutex mutex_;
  std::mutex sleeping_;  // held by the progress thread unless it sleeps; locked before mutex_
  std::condition_variable wake_;
  std::vector<MPI_Request> requests_;
  std::vector<Pending> pending_;  // parallel to requests_
  std::vector<int> finished_;     // scratch of poll_requests: indices
  std::vector<MPI_Status> statuses_;
  std::vector<Pending> complete_;
  std::vector<Watched> watched_;
  std::size_t pushing_ = 0;  // number of requests that advance only when this rank calls MPI
  Clock::time_point computing_since_ = Clock::now();
  std::array<std::chrono::microseconds, 8> phases_{};  // the main thread's last compute phases, between two waits
  std::size_t waits_ = 0;
  std::vector<Endpoint*> closing_endpoints_;
  std::exception_ptr failure_;
  ProgressStatistics statistics_;
  std::atomic<int> waiting_{0};      // threads that poll in wait()
  std::atomic<bool> pushed_{false};  // a large send was posted since the progress thread woke last
  bool closing_ = false;             // guarded by sleeping_
  bool closed_ = false;
  bool unread_ = false;  // a message arrived for an endpoint that was destroyed
  RunPosition position_;

  MPI_Comm comm_ = MPI_COMM_NULL;
  int rank_ = -1;
  int largest_tag_ = 0;
  const bool oversubscribed_;
  const int device_;
  const std::vector<int> cores_;
  const bool spare_;
  std::thread thread_;
};

}  // namespace pipedream
