// What the tests on ranks share. They run on any number of ranks, on a ring:
//
//   rank 0 ──► rank 1 ──► rank 2 ──► rank 0        one rank alone sends to itself
#pragma once

#include <mpi.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "channel.hpp"
#include "mpi_error.hpp"
#include "progress.hpp"

namespace pipedream {

inline int rank() {
  int number = 0;
  MPI_Comm_rank(MPI_COMM_WORLD, &number);
  return number;
}

inline int ranks() {
  int number = 0;
  MPI_Comm_size(MPI_COMM_WORLD, &number);
  return number;
}

inline int next() { return (rank() + 1) % ranks(); }
inline int previous() { return (rank() + ranks() - 1) % ranks(); }
inline std::string name_of_next() { return "rank " + std::to_string(next()); }
inline std::string name_of_previous() { return "rank " + std::to_string(previous()); }
inline std::string name_of_this() { return "rank " + std::to_string(rank()); }

// Ranks and threads together are more than the cores.
inline std::shared_ptr<Progress> make_progress() { return std::make_shared<Progress>(MPI_COMM_WORLD, true); }

inline Waiting up_to(double seconds) {
  return {seconds, [] {}};
}
inline Waiting soon() { return up_to(60); }

// All ranks have come here; channels go on meanwhile. Like all calls of MPI it goes through Progress: what
// MPI itself synchronises, ThreadSanitizer does not see.
inline void meet(Progress& progress) {
  struct Meeting final : Endpoint {
    std::shared_ptr<void> memory(std::size_t) const override { return nullptr; }
    void completed(std::size_t) override { done = true; }
    std::string describe(std::size_t) const override { return "all ranks of a test"; }
    bool done = false;
  } meeting;
  {
    const Progress::Lock held = progress.lock();
    MPI_Request request;
    MPI_Ibarrier(MPI_COMM_WORLD, &request);
    progress.collective(&meeting, 0, request);
  }
  const auto stalled = [](double) { return std::make_exception_ptr(StallError("not all ranks came")); };
  progress.wait([&] { return meeting.done; }, soon(), stalled);
}

// Likewise when there is no Progress, or none that works.
inline void meet() { MPI_Barrier(MPI_COMM_WORLD); }

// Bytes that tell one minibatch from another, the same on all ranks.
inline std::vector<std::byte> pattern(std::int64_t minibatch, std::size_t size) {
  std::vector<std::byte> bytes(size);
  std::uint32_t state = static_cast<std::uint32_t>(minibatch) * 2654435761u + 1;
  for (std::size_t i = 0; i < size; i += sizeof state) {
    state = state * 1664525u + 1013904223u;
    const std::uint32_t mixed = state ^ (state >> 15);
    std::memcpy(bytes.data() + i, &mixed, std::min(sizeof mixed, size - i));
  }
  return bytes;
}

inline bool all(const std::byte* begin, const std::byte* end, std::byte value) {
  return std::all_of(begin, end, [value](std::byte each) { return each == value; });
}

constexpr std::byte guard{0xa5};
constexpr std::size_t guards = 64;

// A payload between guard bytes, as the sender holds it.
class Guarded {
 public:
  explicit Guarded(const std::vector<std::byte>& payload) : bytes_(payload.size() + 2 * guards, guard) {
    std::copy(payload.begin(), payload.end(), bytes_.begin() + guards);
  }
  const std::byte* data() const { return bytes_.data() + guards; }
  std::size_t size() const { return bytes_.size() - 2 * guards; }
  bool untouched(const std::vector<std::byte>& payload) const {
    const std::byte* const end = bytes_.data() + bytes_.size();
    return all(bytes_.data(), data(), guard) && std::equal(payload.begin(), payload.end(), data()) &&
           all(data() + size(), end, guard);
  }

 private:
  std::vector<std::byte> bytes_;
};

// Buffers are made of whole pages, and zeros: nobody writes between their end and the page's.
inline bool page_untouched(const View& view) {
  const std::uintptr_t end = reinterpret_cast<std::uintptr_t>(view.data) + view.bytes;
  const std::size_t rest = (4096 - end % 4096) % 4096;
  return all(view.data + view.bytes, view.data + view.bytes + rest, std::byte{0});
}

inline Part part(std::size_t capacity) {
  return {"the test's bytes", "uint8", 1, {static_cast<std::int64_t>(capacity)}};
}
inline Line line(int peer, int tag, std::size_t capacity) { return {peer, tag, {part(capacity)}}; }

// The two ends a rank has on a ring: to the next rank, and from the one before.
class Ring {
 private:
  std::unique_ptr<SendChannel> out_;
  std::unique_ptr<ReceiveChannel> in_;

 public:
  SendChannel& out;
  ReceiveChannel& in;

  Ring(const std::shared_ptr<Progress>& progress, std::size_t capacity, std::size_t slots = 2)
      : Ring(progress, Line{0, 0, {part(capacity)}}, slots) {}
  Ring(const std::shared_ptr<Progress>& progress, const Line& both, std::size_t slots)
      : Ring(progress, both, both, slots) {}
  // The ends do not agree.
  Ring(const std::shared_ptr<Progress>& progress, Line sends, Line receives, std::size_t slots)
      : out_(SendChannel::make(progress, to(sends, next(), next_tag()))),
        in_(ReceiveChannel::make(progress, to(receives, previous(), tag()), slots)),
        out(*out_),
        in(*in_) {}

  void send(std::int64_t minibatch, const std::byte* data, std::size_t size, const Waiting& waiting) {
    out.send(minibatch, {{data, {static_cast<std::int64_t>(size)}}}, waiting);
  }
  void send(std::int64_t minibatch, const std::vector<std::byte>& payload) {
    send(minibatch, payload.data(), payload.size(), soon());
  }

 private:
  static Line to(Line line, int peer, int tag) {
    line.peer = peer;
    line.tag = tag;
    return line;
  }
  static int& tag() {
    static int tag = 100;
    return tag;
  }
  static int next_tag() { return ++tag(); }
};

// The shape of the only tensor that arrived on a channel with `planned`.
inline Shape shape_of(const Arrived& arrived, const Shape& planned) {
  return arrived.whole ? planned : arrived.shapes.at(0);
}

}  // namespace pipedream
