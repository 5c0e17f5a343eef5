#include "progress.hpp"

#include <sched.h>
#include <sys/prctl.h>
#include <time.h>

#include <algorithm>
#include <chrono>
#include <utility>

#include "mpi_error.hpp"

namespace pipedream {

namespace {

using std::chrono::microseconds;

// Polls before a waiting main thread begins to sleep. A poll takes a tenth of a microsecond, with a yield
// about 1 µs on an idle core: with a core of its own a rank looks out for some 20 ms, crowded ones for a
// moment only.
constexpr int spins_if_not = 2000;
constexpr int yields_if_not = 20000;
constexpr int yields_if_crowded = 50;

// How long a receive that cannot be cancelled is waited for.
constexpr double longest_goodbye_s = 1.0;

// Between two polls of the progress thread. A poll that took longer than any empty one has moved bytes, and more are
// likely to follow: whether MPI copies a message at once or in a thousand pieces, this finds out. (An empty one takes
// half a microsecond, but now and then MPI looks at its sockets too, and that takes up to 15. What is copied in less
// can wait until there is more.) Otherwise it rests for twice as long each time; something of ours to push, or a
// compute phase that is short against a moment's delay, allows for less.
constexpr microseconds while_copying(20), while_moving(50), while_pushing(200), while_idle(500);
constexpr microseconds longest_empty_poll(15), short_phase(1000);
// With a core of its own a poll costs nobody anything. Of a core that computes it takes some 50 µs with waking up,
// going to sleep and what compute finds of its caches: so often that a message that needs three polls hides behind a
// phase.
constexpr int pauses_per_phase = 12, pauses_per_phase_if_shared = 4;
constexpr microseconds longest_pause(4000), longest_pause_if_shared(20000);
// While the main thread polls, to wake up is only to find that out, at 10 µs of the core that polls.
constexpr microseconds while_waiting(1000);

// Messages of so few bytes every MPI copies and is done with, on shared memory and on any network.
constexpr std::size_t surely_ahead = 2048;

using Clock = Progress::Clock;

double seconds_since(Clock::time_point began) { return std::chrono::duration<double>(Clock::now() - began).count(); }

// Of this thread: to be off its core while others compute there moves no bytes.
microseconds worked() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return std::chrono::duration_cast<microseconds>(std::chrono::seconds(now.tv_sec) +
                                                  std::chrono::nanoseconds(now.tv_nsec));
}

// How long a thread rests between two polls that found nothing.
class Patience {
 public:
  Patience(int yields, microseconds first, microseconds longest)
      : yields_left_(yields), pause_(first), longest_(longest) {}

  void rest() {
    if (yields_left_ > 0) {
      --yields_left_;
      sched_yield();
      return;
    }
    std::this_thread::sleep_for(pause_);
    pause_ = std::min(2 * pause_, longest_);
  }

  void relax(microseconds longest) { longest_ = longest; }

 private:
  int yields_left_;
  microseconds pause_;
  microseconds longest_;
};

void run_on(const std::vector<int>& cores) {
  cpu_set_t set;
  CPU_ZERO(&set);
  for (const int core : cores) CPU_SET(core, &set);
  // Where the kernel says no, it runs where it was: slower perhaps, but right.
  if (!cores.empty()) sched_setaffinity(0, sizeof set, &set);
}

}  // namespace

Progress::Progress(MPI_Comm parent, bool crowded, int device, std::vector<int> cores, bool spare)
    : crowded_(crowded), device_(device), cores_(std::move(cores)), spare_(spare) {
  // Here, where somebody hears of it if there is no such device.
  if (device_ >= 0) cuda::use_device(device_);
  check(MPI_Comm_dup(parent, &comm_), "MPI_Comm_dup", -1, "the communicator of the pipeline");
  MPI_Comm_set_errhandler(comm_, MPI_ERRORS_RETURN);
  MPI_Comm_rank(comm_, &rank_);
  thread_ = std::thread([this] { run(); });
}

Progress::~Progress() { close(); }

void Progress::close() {
  {
    const std::lock_guard asleep(sleeping_);
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
    // MPI may read or write this memory for as long as it runs: it is never freed.
    static auto* const left_behind = new std::vector<std::shared_ptr<void>>;
    const Pending& pending = pending_[index];
    left_behind->push_back(pending.endpoint ? pending.endpoint->memory(pending.slot) : pending.memory);
    if (pending.kind == Kind::send) MPI_Request_free(&requests_[index]);
  }
  requests_.clear();
  pending_.clear();
  for (Endpoint* endpoint : attended_) endpoint->close();
  attended_.clear();
  // The next communicator gets this one's number, and with it whatever is still on its way here.
  if (quiet && !unread_) MPI_Comm_free(&comm_);
}

ProgressStatistics Progress::statistics() {
  Lock held = lock();
  return statistics_;
}

bool Progress::send(Endpoint* endpoint, std::size_t slot, const void* data, std::size_t bytes, int peer, int tag) {
  check_usable();
  MPI_Request request;
  // Bytes, whatever the dtype: MPI knows no bf16, and both ends are of one architecture.
  check(MPI_Isend(data, static_cast<int>(bytes), MPI_BYTE, peer, tag, comm_, &request), "MPI_Isend", rank_,
        [&] { return endpoint->describe(slot); });
  return sent({endpoint, slot, Kind::send, bytes}, request);
}

bool Progress::send(Endpoint* endpoint, std::size_t slot, const std::vector<View>& runs, int peer, int tag) {
  check_usable();
  std::vector<int> lengths;
  std::vector<MPI_Aint> addresses(runs.size());
  std::size_t bytes = 0;
  for (std::size_t i = 0; i < runs.size(); ++i) {
    lengths.push_back(static_cast<int>(runs[i].bytes));
    MPI_Get_address(runs[i].data, &addresses[i]);
    bytes += runs[i].bytes;
  }
  MPI_Datatype scattered;
  MPI_Type_create_hindexed(static_cast<int>(runs.size()), lengths.data(), addresses.data(), MPI_BYTE, &scattered);
  MPI_Type_commit(&scattered);
  MPI_Request request;
  const int code = MPI_Isend(MPI_BOTTOM, 1, scattered, peer, tag, comm_, &request);
  MPI_Type_free(&scattered);  // MPI keeps it for as long as the message needs it
  check(code, "MPI_Isend", rank_, [&] { return endpoint->describe(slot); });
  return sent({endpoint, slot, Kind::send, bytes}, request);
}

bool Progress::sent(const Pending& pending, MPI_Request request) {
  // What MPI copied ahead is complete, and the next poll has one request less to look at. Larger ones are
  // not asked about: MPI might take the occasion to copy what comes in, while compute waits to begin.
  if (pending.bytes <= surely_ahead) {
    int done = 0;
    check(MPI_Test(&request, &done, MPI_STATUS_IGNORE), "MPI_Isend", rank_,
          [&] { return pending.endpoint->describe(pending.slot); });
    if (done) {
      ++statistics_.completions;
      return true;
    }
  }
  post(pending, request);
  return false;
}

void Progress::receive(Endpoint* endpoint, std::size_t slot, void* data, std::size_t bytes, int peer, int tag) {
  check_usable();
  MPI_Request request;
  check(MPI_Irecv(data, static_cast<int>(bytes), MPI_BYTE, peer, tag, comm_, &request), "MPI_Irecv", rank_,
        [&] { return endpoint->describe(slot); });
  post({endpoint, slot, Kind::receive, bytes}, request);
}

void Progress::collective(Endpoint* endpoint, std::size_t slot, MPI_Request request) {
  post({endpoint, slot, Kind::collective, 0}, request);
}

void Progress::watch(Endpoint* endpoint, std::size_t slot, const cuda::Event* event) {
  watched_.push_back({endpoint, slot, event});
}

void Progress::attend(Endpoint* endpoint) {
  Lock held = lock();
  attended_.push_back(endpoint);
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
  // The next copy, or a message, waits for the event; chunks follow each other within tens of microseconds.
  if (!watched_.empty()) return while_copying;
  if (polled > longest_empty_poll) return while_moving;
  const microseconds shortest = pushing_ > 0 ? while_pushing : while_idle;
  // Between two calls at once there is next to no compute: the longest of the last few phases counts.
  const auto current = std::chrono::duration_cast<microseconds>(Clock::now() - computing_since_);
  const microseconds phase = std::max(current, *std::max_element(phases_.begin(), phases_.end()));
  const microseconds longest = spare_ ? longest_pause : longest_pause_if_shared;
  // The main thread polls often enough by itself.
  if (phase < short_phase) return longest_pause;
  const int pauses = spare_ ? pauses_per_phase : pauses_per_phase_if_shared;
  return std::min(2 * last, std::clamp(phase / pauses, shortest, longest));
}

void Progress::computed_until_now() {
  const Clock::time_point now = Clock::now();
  phases_[waits_++ % phases_.size()] = std::chrono::duration_cast<microseconds>(now - computing_since_);
  computing_since_ = now;
}

void Progress::wait_on(Lock& held, const std::function<bool()>& done, const Waiting& waiting,
                       const std::function<std::exception_ptr(double)>& stalled) {
  struct Waits {
    Progress& progress;
    Lock& held;
    Waits(Progress& of, Lock& lock) : progress(of), held(lock) { ++progress.waiting_; }
    ~Waits() {
      if (!held.owns_lock()) held.lock();
      --progress.waiting_;
      progress.computing_since_ = Clock::now();
    }
  } waits{*this, held};

  // Messages of a busy pipeline come soon: look out for those first, then leave the core to others, then
  // sleep, in steps that stay short against any forward.
  for (int spin = 0; spin < (crowded_ ? 0 : spins_if_not); ++spin) {
    if (polled(done)) return;
  }
  Patience patience(crowded_ ? yields_if_crowded : yields_if_not, microseconds(10), microseconds(100));
  const Clock::time_point began = computing_since_;
  Clock::time_point asked = began;
  while (!polled(done)) {
    held.unlock();
    patience.rest();
    const Clock::time_point now = Clock::now();
    if (now - asked > std::chrono::milliseconds(50)) {
      asked = now;
      waiting.interrupted();
      // Who has waited this long does not mind a millisecond, and the others get the core.
      patience.relax(microseconds(1000));
      if (const double waited = seconds_since(began); waited > waiting.stall_limit_s) {
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
  attended_.erase(std::remove(attended_.begin(), attended_.end(), endpoint), attended_.end());
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
  // A copy ends by itself, and soon; the memory it is about is freed after that.
  const Clock::time_point began = Clock::now();
  while (!watched.event->happened() && seconds_since(began) < longest_goodbye_s) {
    std::this_thread::sleep_for(microseconds(50));
  }
}

bool Progress::settle(std::size_t index) {
  MPI_Request& request = requests_[index];
  if (request == MPI_REQUEST_NULL) return true;  // completed by the poll that failed
  int done = 0, cancelled = 0;
  MPI_Status status;
  MPI_Test(&request, &done, &status);
  if (pending_[index].kind != Kind::receive) return done;
  if (!done) MPI_Cancel(&request);
  // A message that has begun to arrive is not cancelled but ends, unless its sender is gone.
  const Clock::time_point began = Clock::now();
  while (!done && seconds_since(began) < longest_goodbye_s) {
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
    // What else this poll completed is lost: nothing that waits may go on.
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

  // Take the finished ones out first: completed() may post new requests.
  complete_.clear();
  for (int i = 0; i < count; ++i) {
    const Pending& pending = pending_[static_cast<std::size_t>(finished_[static_cast<std::size_t>(i)])];
    if (code == MPI_ERR_IN_STATUS) {
      const char* call = pending.kind == Kind::send      ? "MPI_Isend"
                         : pending.kind == Kind::receive ? "MPI_Irecv"
                                                         : "a collective call";
      check(statuses_[static_cast<std::size_t>(i)].MPI_ERROR, call, rank_,
            pending.endpoint ? pending.endpoint->describe(pending.slot) : "a channel that is gone");
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
    // Those of one endpoint in the order they were recorded, even if another happens during this round:
    // what is posted then is matched by its order.
    const auto waits = [&](const Watched& earlier) { return earlier.endpoint == watched.endpoint; };
    const auto here = watched_.begin() + static_cast<std::ptrdiff_t>(index);
    if (std::any_of(watched_.begin(), here, waits) || !watched.event->happened()) {
      ++index;
      continue;
    }
    some = true;
    watched_.erase(watched_.begin() + static_cast<std::ptrdiff_t>(index));
    watched.endpoint->happened(watched.slot);  // may watch for more, behind these
  }
  return some;
}

void Progress::run() {
  // Sleeps of microseconds are otherwise rounded up by 50.
  prctl(PR_SET_TIMERSLACK, 1000UL);
  run_on(cores_);
  if (device_ >= 0) cuda::use_device(device_);
  std::unique_lock<std::mutex> asleep(sleeping_);
  microseconds rest = while_idle;
  // Nobody but close() wakes this thread: to be woken at every send would cost the main thread more than
  // the send.
  while (!wake_.wait_for(asleep, rest, [this] { return closing_; })) {
    if (waiting_ > 0) {
      rest = while_waiting;
      continue;
    }
    const Lock held(mutex_, std::try_to_lock);
    if (!held || failure_) continue;
    microseconds began = worked();
    try {
      statistics_.polls_computing += 2;
      // What the first takes says nothing: compute has had the caches meanwhile.
      poll();
      began = worked();
      poll();
    } catch (...) {
      // kept in failure_, for the main thread at its next call
    }
    rest = pause(rest, worked() - began);
  }
}

void Progress::check_usable() const {
  if (failure_) std::rethrow_exception(failure_);
  if (closed_) throw CoreError("rank " + std::to_string(rank_) + ": the channels are closed");
}

}  // namespace pipedream
