// Compares a channel with plain C MPI on the same two ranks. benchmarks/channel.py builds it, runs it and reads the
// result.
//
//   bench_channel latency TURNS SIZE ...        ping-pong:  {"size": …, "way": "core", "seconds": […]}
//   bench_channel overlap TURNS SIZE SECONDS    a transfer in each direction, overlapped with compute
//
// The two ways take turns. The core's progress thread exists only during its own turns, so that it neither helps nor
// slows plain MPI.
#include "comm/channel.hpp"

#include <mpi.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "comm/progress.hpp"

using namespace pipedream;

namespace {

int rank = 0;
bool oversubscribed = false;  // the benchmark needs a core per rank

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

WaitOptions soon() {
  return {60.0, [] {}};
}

double largest(double value) {
  double all = 0;
  MPI_Allreduce(&value, &all, 1, MPI_DOUBLE, MPI_MAX, MPI_COMM_WORLD);
  return all;
}

void print(const char* measured, const char* way, std::size_t size, const std::vector<double>& seconds) {
  if (rank != 0) return;
  std::printf("{\"measured\": \"%s\", \"way\": \"%s\", \"size\": %zu, \"seconds\": [", measured, way, size);
  for (std::size_t i = 0; i < seconds.size(); ++i) std::printf("%s%.9f", i ? ", " : "", seconds[i]);
  std::printf("]}\n");
  std::fflush(stdout);
}

// Aligned to a cache line, as torch's tensors are, and touched, since a stage sends what it has just written. (With
// malloc's alignment of 16 bytes, copies between processes take 1.3 times as long.)
struct Free {
  void operator()(char* data) const { std::free(data); }
};
using Memory = std::unique_ptr<char, Free>;
Memory memory(std::size_t size) {
  Memory made(static_cast<char*>(std::aligned_alloc(64, (size + 63) / 64 * 64)));
  std::memset(made.get(), 1, size);
  return made;
}

// A channel in each direction, as between two stages of a pipeline.
struct Pair {
  std::shared_ptr<Progress> progress = std::make_shared<Progress>(MPI_COMM_WORLD, oversubscribed);
  TensorSpec tensor;
  std::unique_ptr<SendChannel> out;
  std::unique_ptr<RecvChannel> in;

  explicit Pair(std::size_t size)
      : tensor{"the payload", "uint8", 1, {static_cast<std::int64_t>(size)}},
        out(SendChannel::make(progress, {1 - rank, rank, {tensor}})),
        in(RecvChannel::make(progress, {1 - rank, 1 - rank, {tensor}}, 2)) {}
  void send(std::int64_t microbatch, const Memory& data) {
    out->send(microbatch, {{data.get(), tensor.shape}}, soon());
  }
  std::size_t receive(std::int64_t microbatch) { return in->receive(microbatch, soon()).slot; }
  ~Pair() {
    out->drain(soon());
    MPI_Barrier(MPI_COMM_WORLD);
    progress->close();
  }
};

using Samples = std::vector<double>;

// Samples the time of one way: half of a round trip.
void ping_pong(const std::function<void()>& send, const std::function<void()>& receive, int repeats, Samples& samples) {
  for (int i = -repeats / 10 - 2; i < repeats; ++i) {
    const double began = now();
    if (rank == 0) send();
    receive();
    if (rank == 1) send();
    if (i >= 0) samples.push_back((now() - began) / 2);
  }
}

void latency(std::size_t size, int turns) {
  // Plain MPI alternates between two receive buffers, like a channel with two slots, so that both use the caches alike.
  const Memory data = memory(size), landings[2] = {memory(size), memory(size)};
  const int repeats = static_cast<int>(std::clamp<std::size_t>((std::size_t{48} << 20) / size, 4, 1000));
  Samples core, plain;
  for (int turn = 0; turn < turns; ++turn) {
    const auto by_core = [&] {
      Pair pair(size);
      std::int64_t sent = 0, received = 0;
      std::optional<std::size_t> held;
      // Release a slot after the answer is sent, as a stage does after the backward.
      const auto send = [&] {
        pair.send(sent++, data);
        if (held) pair.in->release(*held);
        held.reset();
      };
      ping_pong(send, [&] { held = pair.receive(received++); }, repeats, core);
    };
    const auto by_plain = [&] {
      MPI_Barrier(MPI_COMM_WORLD);
      int received = 0;
      ping_pong([&] { MPI_Send(data.get(), static_cast<int>(size), MPI_BYTE, 1 - rank, 0, MPI_COMM_WORLD); },
                [&] {
                  MPI_Recv(landings[received++ % 2].get(), static_cast<int>(size), MPI_BYTE, 1 - rank, 0,
                           MPI_COMM_WORLD, MPI_STATUS_IGNORE);
                },
                repeats, plain);
    };
    turn % 2 ? by_core() : by_plain();
    turn % 2 ? by_plain() : by_core();
  }
  print("latency", "core", size, core);
  print("latency", "plain", size, plain);
}

// Multiplies matrices that fit the cache; a_ depends on the result, so that the compiler keeps all rounds.
class Compute {
 public:
  void for_seconds(double seconds) {
    for (const double until = now() + seconds; now() < until;) round();
  }
  void rounds(long count) {
    for (long i = 0; i < count; ++i) round();
  }
  long rounds_in(double seconds) {
    long count = 0;
    for (const double until = now() + seconds; now() < until; ++count) round();
    return count;
  }

 private:
  static constexpr int n_ = 48;
  void round() {
    for (int i = 0; i < n_; ++i)
      for (int k = 0; k < n_; ++k)
        for (int j = 0; j < n_; ++j) c_[i][j] += a_[i][k] * a_[k][j];
    a_[0][0] += c_[0][0] == 12345.0f;
  }
  float a_[n_][n_] = {{1.0f}}, c_[n_][n_] = {};
};

void overlap(std::size_t size, int turns, double seconds) {
  const Memory data = memory(size), landing = memory(size);
  Compute compute;
  MPI_Barrier(MPI_COMM_WORLD);
  const long work = compute.rounds_in(seconds);
  using Work = std::function<void()>;
  const Work nothing = [] {}, for_seconds = [&] { compute.for_seconds(seconds); },
             fixed = [&] { compute.rounds(work); };

  const auto raw = [&](const Work& meanwhile) {
    MPI_Barrier(MPI_COMM_WORLD);
    const double began = now();
    MPI_Request requests[2];
    MPI_Irecv(landing.get(), static_cast<int>(size), MPI_BYTE, 1 - rank, 0, MPI_COMM_WORLD, &requests[0]);
    MPI_Isend(data.get(), static_cast<int>(size), MPI_BYTE, 1 - rank, 0, MPI_COMM_WORLD, &requests[1]);
    meanwhile();
    MPI_Waitall(2, requests, MPI_STATUSES_IGNORE);
    return largest(now() - began);
  };
  const auto by_core = [&](Pair& pair, std::int64_t microbatch, const Work& meanwhile) {
    MPI_Barrier(MPI_COMM_WORLD);
    const double began = now();
    pair.send(microbatch, data);
    meanwhile();
    const std::size_t slot = pair.receive(microbatch);
    pair.out->drain(soon());
    const double took = now() - began;
    pair.in->release(slot);
    return largest(took);
  };

  Samples alone, own_alone, hidden_raw, hidden_core, work_alone, work_raw, work_core;
  raw(nothing);
  for (int turn = 0; turn < turns; ++turn) {
    alone.push_back(raw(nothing));
    hidden_raw.push_back(raw(for_seconds));
    work_raw.push_back(raw(fixed));
    MPI_Barrier(MPI_COMM_WORLD);
    const double began = now();
    fixed();
    work_alone.push_back(largest(now() - began));
    Pair pair(size);
    by_core(pair, 0, nothing);  // first use of the slots
    by_core(pair, 1, nothing);
    own_alone.push_back(by_core(pair, 2, nothing));
    hidden_core.push_back(by_core(pair, 3, for_seconds));
    work_core.push_back(by_core(pair, 4, fixed));
  }
  print("transfer alone", "plain", size, alone);
  print("transfer alone", "core", size, own_alone);
  print("behind a span of compute", "plain", size, hidden_raw);
  print("behind a span of compute", "core", size, hidden_core);
  print("work alone", "neither", size, work_alone);
  print("beside an amount of work", "plain", size, work_raw);
  print("beside an amount of work", "core", size, work_core);
}

}  // namespace

int main(int argc, char** argv) {
  int provided = 0, size = 0;
  MPI_Init_thread(&argc, &argv, MPI_THREAD_MULTIPLE, &provided);
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  if (size != 2 || argc < 4) {
    std::fprintf(stderr, "bench_channel runs on 2 ranks; see benchmarks/channel.py\n");
    MPI_Abort(MPI_COMM_WORLD, 1);
  }
  const int turns = std::atoi(argv[2]);
  if (std::string(argv[1]) == "latency") {
    for (int i = 3; i < argc; ++i) latency(std::strtoull(argv[i], nullptr, 10), turns);
  } else {
    overlap(std::strtoull(argv[3], nullptr, 10), turns, std::atof(argv[4]));
  }
  MPI_Finalize();
}
