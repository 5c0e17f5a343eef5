#include "comm/progress.hpp"

#include <sched.h>
#include <sys/prctl.h>
#include <time.h>

#include <algorithm>
#include <chrono>
#include <utility>

#include "comm/mpi_error.hpp"

namespace pipedream {

namespace {

using std::chrono::microseconds;

// Polls before a waiting main thread begins to sleep. A poll takes about 0.1 µs, or 1 µs with a yield on an idle
// core: a rank with its own core polls for about 20 ms, an oversubscribed rank for about 50 µs.
constexpr int spins = 2000;
constexpr int yields = 20000;
constexpr int yields_if_oversubscribed = 50;

// How long to wait for a receive that cannot be cancelled.
constexpr double settle_limit_s = 1.0;

// Sleeps of the progress thread between two polls. A poll that takes longer than an empty poll has moved bytes, and
// more are likely to follow: the next poll comes soon, whether MPI copies a message at once or in a thousand fragments.
// (An empty poll takes 0.5 µs, or up to 15 µs when MPI also checks its sockets.) Otherwise the sleep doubles each
// time. Its limit is smaller while there are requests to push, and if compute phases are short.
constexpr microseconds while_copying(20), while_moving(50), while_pushing(200), while_idle(500);
constexpr microseconds longest_empty_poll(15), short_phase(1000);
// On a spare core a poll is free. On a core that computes it costs about 50 µs: wake-up, sleep and lost cache lines.
// Four polls per compute phase are enough to hide an incoming message that needs three. An outgoing one may be what
// another rank waits for: what a pause delays and what polls cost is least at some twenty of them.
constexpr int pauses_per_phase = 12, pauses_per_phase_if_shared = 4, pauses_per_phase_while_pushing = 24;
constexpr microseconds longest_pause(4000), longest_pause_if_shared(20000);
// While the main thread polls, a wake-up is useless and costs 10 µs of the core that polls.
constexpr microseconds while_waiting(1000);

// Messages up to this size are eager in every MPI, on shared memory and on any network: the send completes at once.
constexpr std::size_t surely_eager = 2048;

// Above this size a message takes longer than waking a thread, which costs microseconds.
constexpr std::size_t worth_waking = 64 * 1024;

using Clock = Progress::Clock;

double seconds_since(Clock::time_point began) { return std::chrono::duration<double>(Clock::now() - began).count(); }

// CPU time of this thread, which excludes the time in which other threads run on its core.
microseconds cpu_time() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return std::chrono::duration_cast<microseconds>(std::chrono::seconds(now.tv_sec) +
                                                  std::chrono::nanoseconds(now.tv_nsec));
}

// The pause of a waiting thread after a poll that completed nothing: first yields, then sleeps.
class Backoff {
 public:
  Backoff(int yield_count, microseconds first, microseconds longest)
      : yields_left_(yield_count), pause_(first), longest_(longest) {}

  void pause() {
    if (yields_left_ > 0) {
      --yields_left_;
      sched_yield();
      return;
    }
    std::this_thread::sleep_for(pause_);
    pause_ = std::min(2 * pause_, longest_);
  }

  void set_longest(microseconds longest) { longest_ = longest; }

 private:
  int yields_left_;
  microseconds pause_;
  microseconds longest_;
};

void run_on(const std::vector<int>& cores) {
  cpu_set_t set;
  CPU_ZERO(&set);
  for (const int core : cores) CPU_SET(core, &set);
  // If the kernel refuses, the thread stays on its cores: the result is the same, perhaps slower.
  if (!cores.empty()) sched_setaffinity(0, sizeof set, &set);
}

}  // namespace

Progress::Progress(MPI_Comm parent, bool oversubscribed, int device, std::vector<int> cores, bool spare)
    : oversubscribed_(oversubscribed), device_(device), cores_(std::move(cores)), spare_(spare) {
  // On this thread too, where an exception reaches the caller if there is no such device.
  if (device_ >= 0) cuda::use_device(device_);
  check(MPI_Comm_dup(parent, &comm_), "MPI_Comm_dup", -1, "the communicator of the pipeline");
  MPI_Comm_set_errhandler(comm_, MPI_ERRORS_RETURN);
  MPI_Comm_rank(comm_, &rank_);
  void* tag_ub = nullptr;
  int found = 0;
  MPI_Comm_get_attr(MPI_COMM_WORLD, MPI_TAG_UB, &tag_ub, &found);
  largest_tag_ = found ? *static_cast<int*>(tag_ub) : 32767;  // the least that MPI guarantees
  thread_ = std::thread([this] { run(); });
}

Progress::~Progress() { close(); }

void Progress::close() {
  {
    const std::lock_guard thread_sleeps(sleeping_);
    Lock held = lock();
    if (closed_) return;
    closed_ = closing_ = true;
  }
  wake_.notify_all();
  thread_.join();
  for (const Watched& each : watched_) settle(each);
  watched_.clear();
  int finalized = 0;
  MPI_Finalized(&finalized);
  if (finalized) return;
  bool quiet = !failure_;
  for (std::size_t index = 0; index < requests_.size(); ++index) {
    if (settle(index)) continue;
    quiet = false;
    // MPI may access this memory until it ends, so it is never freed.
    static auto* const left_behind = new std::vector<std::shared_ptr<void>>;
    const Pending& pending = pending_[index];
    left_behind->push_back(pending.endpoint ? pending.endpoint->memory(pending.slot) : pending.memory);
    if (pending.kind == Kind::send) MPI_Request_free(&requests_[index]);
  }
  requests_.clear();
  pending_.clear();
  for (Endpoint* endpoint : closing_endpoints_) endpoint->close();
  closing_endpoints_.clear();
  // A freed communicator's context id is reused: a later communicator would receive messages still in flight here.
  if (quiet && !unread_) MPI_Comm_free(&comm_);
}

ProgressStatistics Progress::statistics() {
  Lock held = lock();
  return statistics_;
}

void Progress::set_position(RunPosition position) {
  Lock held = lock();
  position_ = std::move(position);
}

bool Progress::send(Endpoint* endpoint, std::size_t slot, const void* data, std::size_t bytes, int peer_rank, int tag) {
  check_usable();
  MPI_Request request;
  // MPI_BYTE for every dtype: MPI has no bfloat16, and both ends have the same architecture.
  check(MPI_Isend(data, static_cast<int>(bytes), MPI_BYTE, peer_rank, tag, comm_, &request), "MPI_Isend", rank_,
        [&] { return endpoint->describe(slot); });
  return sent({endpoint, slot, Kind::send, bytes}, request);
}

bool Progress::sent(const Pending& pending, MPI_Request request) {
  // An eager send is complete, and the next poll has one request less to test. A larger one is not tested: MPI might
  // copy incoming messages during the test, which delays compute.
  if (pending.bytes <= surely_eager) {
    int done = 0;
    check(MPI_Test(&request, &done, MPI_STATUS_IGNORE), "MPI_Isend", rank_,
          [&] { return pending.endpoint->describe(pending.slot); });
    if (done) {
      ++statistics_.completions;
      return true;
    }
  }
  post(pending, request);
  // The other rank may already wait for this message, which takes further calls of this one. (Without sleeping_ locked,
  // the thread may miss the wake-up; then it polls after its pause.)
  if (pending.bytes > worth_waking && !pushed_.exchange(true)) wake_.notify_one();
  return false;
}

void Progress::receive(Endpoint* endpoint, std::size_t slot, void* data, std::size_t bytes, int peer_rank, int tag) {
  check_usable();
  MPI_Request request;
  check(MPI_Irecv(data, static_cast<int>(bytes), MPI_BYTE, peer_rank, tag, comm_, &request), "MPI_Irecv", rank_,
        [&] { return endpoint->describe(slot); });
  post({endpoint, slot, Kind::receive, bytes}, request);
}

void Progress::collective(Endpoint* endpoint, std::size_t slot, MPI_Request request) {
  post({endpoint, slot, Kind::collective, 0}, request);
}

void Progress::watch(Endpoint* endpoint, std::size_t slot, const cuda::Event* event) {
  watched_.push_back({endpoint, slot, event});
}

void Progress::register_for_close(Endpoint* endpoint) {
  Lock held = lock();
  closing_endpoints_.push_back(endpoint);
}

void Progress::post(const Pending& pending, MPI_Request request) {
  pushing_ += pending.pushes();
  requests_.push_back(request);
  pending_.push_back(pending);
  finished_.resize(requests_.size());
  statuses_.resize(requests_.size());
}

bool Progress::Pending::pushes() const { return kind != Kind::receive; }

microseconds Progress::pause(microseconds last, microseconds polled) const {
  // The next copy or message waits for the event; chunks are tens of microseconds apart.
  if (!watched_.empty()) return while_copying;
  if (polled > longest_empty_poll) return while_moving;
  const microseconds shortest = pushing_ > 0 ? while_pushing : while_idle;
  // Use the longest of the last few phases: there is hardly any compute between two consecutive calls.
  const auto current = std::chrono::duration_cast<microseconds>(Clock::now() - computing_since_);
  const microseconds phase = std::max(current, *std::max_element(phases_.begin(), phases_.end()));
  const microseconds longest = spare_ ? longest_pause : longest_pause_if_shared;
  // With short phases the main thread polls often enough.
  if (phase < short_phase) return longest_pause;
  const int pauses = pushing_ > 0 ? pauses_per_phase_while_pushing
                     : spare_     ? pauses_per_phase
                                  : pauses_per_phase_if_shared;
  return std::min(2 * last, std::clamp(phase / pauses, shortest, longest));
}

void Progress::computed_until_now() {
  const Clock::time_point now = Clock::now();
  phases_[waits_++ % phases_.size()] = std::chrono::duration_cast<microseconds>(now - computing_since_);
  computing_since_ = now;
}

void Progress::wait_on(Lock& held, const std::function<bool()>& done, const WaitOptions& options,
                       const std::function<std::exception_ptr(double)>& stalled) {
  struct Scope {
    Progress& progress;
    Lock& held;
    Scope(Progress& of, Lock& lock) : progress(of), held(lock) { ++progress.waiting_; }
    ~Scope() {
      if (!held.owns_lock()) held.lock();
      --progress.waiting_;
      progress.computing_since_ = Clock::now();
    }
  } scope{*this, held};

  // In a busy pipeline the message comes soon: first spin, then yield the core, then sleep for times that are short
  // compared with a forward.
  for (int spin = 0; spin < (oversubscribed_ ? 0 : spins); ++spin) {
    if (polled(done)) return;
  }
  Backoff backoff(oversubscribed_ ? yields_if_oversubscribed : yields, microseconds(10), microseconds(100));
  const Clock::time_point began = computing_since_;
  Clock::time_point asked = began;
  while (!polled(done)) {
    held.unlock();
    backoff.pause();
    const Clock::time_point now = Clock::now();
    if (now - asked > std::chrono::milliseconds(50)) {
      asked = now;
      options.check_interrupts();
      // After 50 ms a delay of a millisecond does not matter, and other ranks get the core.
      backoff.set_longest(microseconds(1000));
      if (const double waited = seconds_since(began); waited > options.stall_limit_s) {
        held.lock();
        std::rethrow_exception(stalled(waited));
      }
    }
    held.lock();
  }
}

void Progress::poll_once() {
  Lock held = lock();
  check_usable();
  poll();
}

void Progress::forget(Endpoint* endpoint) {
  Lock held = lock();
  closing_endpoints_.erase(std::remove(closing_endpoints_.begin(), closing_endpoints_.end(), endpoint),
                           closing_endpoints_.end());
  for (std::size_t index = watched_.size(); index-- > 0;) {
    if (watched_[index].endpoint != endpoint) continue;
    settle(watched_[index]);
    watched_.erase(watched_.begin() + static_cast<std::ptrdiff_t>(index));
  }
  if (closed_) return;
  for (std::size_t index = requests_.size(); index-- > 0;) {
    Pending& pending = pending_[index];
    if (pending.endpoint != endpoint) continue;
    if (settle(index)) {
      pushing_ -= pending.pushes();
      requests_.erase(requests_.begin() + static_cast<std::ptrdiff_t>(index));
      pending_.erase(pending_.begin() + static_cast<std::ptrdiff_t>(index));
    } else {
      pending.memory = endpoint->memory(pending.slot);
      pending.endpoint = nullptr;
    }
  }
}

void Progress::settle(const Watched& watched) {
  // The copy ends soon by itself; its memory may be freed only after that.
  const Clock::time_point began = Clock::now();
  while (!watched.event->query() && seconds_since(began) < settle_limit_s) {
    std::this_thread::sleep_for(microseconds(50));
  }
}

bool Progress::settle(std::size_t index) {
  MPI_Request& request = requests_[index];
  if (request == MPI_REQUEST_NULL) return true;  // completed by a poll that failed
  int done = 0, cancelled = 0;
  MPI_Status status;
  MPI_Test(&request, &done, &status);
  if (pending_[index].kind != Kind::receive) return done;
  if (!done) MPI_Cancel(&request);
  // A receive that has matched a message is not cancelled; it completes unless the sender is gone.
  const Clock::time_point began = Clock::now();
  while (!done && seconds_since(began) < settle_limit_s) {
    MPI_Test(&request, &done, &status);
    if (!done) std::this_thread::sleep_for(microseconds(50));
  }
  if (done) MPI_Test_cancelled(&status, &cancelled);
  unread_ |= !cancelled;
  return done;
}

bool Progress::poll() {
  try {
    const bool some = !requests_.empty() && poll_requests();
    return (!watched_.empty() && poll_events()) || some;
  } catch (...) {
    // Other completions of this poll are lost, so every wait must fail.
    failure_ = std::current_exception();
    throw;
  }
}

bool Progress::poll_requests() {
  int count = 0;
  const int code =
      MPI_Testsome(static_cast<int>(requests_.size()), requests_.data(), &count, finished_.data(), statuses_.data());
  if (code != MPI_SUCCESS && code != MPI_ERR_IN_STATUS) check(code, "MPI_Testsome", rank_, "all channels");
  if (count == MPI_UNDEFINED || count == 0) return false;
  statistics_.completions += static_cast<std::uint64_t>(count);

  // Remove the finished requests first: completed() may post new ones.
  complete_.clear();
  for (int i = 0; i < count; ++i) {
    const Pending& pending = pending_[static_cast<std::size_t>(finished_[static_cast<std::size_t>(i)])];
    if (code == MPI_ERR_IN_STATUS) {
      const char* call = pending.kind == Kind::send      ? "MPI_Isend"
                         : pending.kind == Kind::receive ? "MPI_Irecv"
                                                         : "a collective call";
      check(statuses_[static_cast<std::size_t>(i)].MPI_ERROR, call, rank_,
            pending.endpoint ? pending.endpoint->describe(pending.slot) : "a channel that was destroyed");
    }
    complete_.push_back(pending);
  }
  std::size_t kept = 0;
  for (std::size_t index = 0; index < requests_.size(); ++index) {
    if (requests_[index] == MPI_REQUEST_NULL) continue;
    requests_[kept] = requests_[index];
    if (kept != index) pending_[kept] = std::move(pending_[index]);
    ++kept;
  }
  requests_.resize(kept);
  pending_.resize(kept);
  for (const Pending& pending : complete_) pushing_ -= pending.pushes();
  for (const Pending& pending : complete_) {
    if (pending.endpoint) pending.endpoint->completed(pending.slot);
  }
  return true;
}

bool Progress::poll_events() {
  bool some = false;
  for (std::size_t index = 0; index < watched_.size();) {
    const Watched watched = watched_[index];
    // Handle the events of one endpoint in the order in which they were recorded, even if a later one completes
    // during this loop: event_done() posts requests, which MPI matches in order.
    const auto same_endpoint = [&](const Watched& earlier) { return earlier.endpoint == watched.endpoint; };
    const auto here = watched_.begin() + static_cast<std::ptrdiff_t>(index);
    if (std::any_of(watched_.begin(), here, same_endpoint) || !watched.event->query()) {
      ++index;
      continue;
    }
    some = true;
    watched_.erase(watched_.begin() + static_cast<std::ptrdiff_t>(index));
    watched.endpoint->event_done(watched.slot);  // may watch for more, behind these
  }
  return some;
}

void Progress::run() {
  // The default timer slack prolongs every sleep by 50 µs.
  prctl(PR_SET_TIMERSLACK, 1000UL);
  run_on(cores_);
  if (device_ >= 0) cuda::use_device(device_);
  std::unique_lock<std::mutex> awake(sleeping_);
  microseconds sleep = while_idle;
  while (true) {
    const bool woken = wake_.wait_for(awake, sleep, [this] { return closing_ || pushed_; });
    if (closing_) return;
    // The main thread, which has just sent, still holds the mutex.
    if (woken) sleep = while_moving;
    pushed_ = false;
    if (waiting_ > 0) {
      sleep = while_waiting;
      continue;
    }
    const Lock held(mutex_, std::try_to_lock);
    if (!held || failure_) continue;
    microseconds began = cpu_time();
    try {
      statistics_.polls_computing += 2;
      // Time the second poll: the first finds cold caches after compute.
      poll();
      began = cpu_time();
      poll();
    } catch (...) {
      // stored in failure_; the next call of the main thread throws it
    }
    sleep = pause(sleep, cpu_time() - began);
  }
}

void Progress::check_usable() const {
  if (failure_) std::rethrow_exception(failure_);
  if (closed_) throw CoreError("rank " + std::to_string(rank_) + ": the channels are closed");
}

}  // namespace pipedream
