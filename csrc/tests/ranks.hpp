// Helpers of the tests on ranks. The tests run on any number of ranks, in a ring:
//
//   rank 0 ──► rank 1 ──► rank 2 ──► rank 0        a single rank sends to itself
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

#include "comm/channel.hpp"
#include "comm/mpi_error.hpp"
#include "comm/progress.hpp"

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

// Oversubscribed: there are more threads than cores.
inline std::shared_ptr<Progress> make_progress() { return std::make_shared<Progress>(MPI_COMM_WORLD, true); }

inline WaitOptions up_to(double seconds) {
  return {seconds, [] {}};
}
inline WaitOptions soon() { return up_to(60); }

// A barrier during which channels make progress. It goes through Progress, because ThreadSanitizer does not see
// synchronisation inside MPI.
inline void barrier(Progress& progress) {
  struct Barrier final : Endpoint {
    std::shared_ptr<void> memory(std::size_t) const override { return nullptr; }
    void completed(std::size_t) override { done = true; }
    std::string describe(std::size_t) const override { return "a barrier of the test"; }
    bool done = false;
  } barrier_endpoint;
  {
    const Progress::Lock held = progress.lock();
    MPI_Request request;
    MPI_Ibarrier(MPI_COMM_WORLD, &request);
    progress.collective(&barrier_endpoint, 0, request);
  }
  const auto stalled = [](double) { return std::make_exception_ptr(StallError("not all ranks entered the barrier")); };
  progress.wait([&] { return barrier_endpoint.done; }, soon(), stalled);
}

// A barrier without Progress, or after a failure of it.
inline void barrier() { MPI_Barrier(MPI_COMM_WORLD); }

// Bytes that differ between microbatches and are the same on all ranks.
inline std::vector<std::byte> pattern(std::int64_t microbatch, std::size_t size) {
  std::vector<std::byte> bytes(size);
  std::uint32_t state = static_cast<std::uint32_t>(microbatch) * 2654435761u + 1;
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

// The sender's copy of a payload, between guard bytes.
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

// Buffers occupy whole pages of zeros: checks that the bytes between a buffer's end and its page's are still zero.
inline bool page_untouched(const View& view) {
  const std::uintptr_t end = reinterpret_cast<std::uintptr_t>(view.data) + view.bytes;
  const std::size_t rest = (4096 - end % 4096) % 4096;
  return all(view.data + view.bytes, view.data + view.bytes + rest, std::byte{0});
}

inline TensorSpec tensor_spec(std::size_t capacity) {
  return {"the test's bytes", "uint8", 1, {static_cast<std::int64_t>(capacity)}};
}
inline ChannelSpec spec(int peer_rank, int tag, std::size_t capacity) {
  return {peer_rank, tag, {tensor_spec(capacity)}};
}

// The two channel ends of a rank in the ring: to the next rank and from the previous one.
class Ring {
 private:
  std::unique_ptr<SendChannel> out_;
  std::unique_ptr<RecvChannel> in_;

 public:
  SendChannel& out;
  RecvChannel& in;

  Ring(const std::shared_ptr<Progress>& progress, std::size_t capacity, std::size_t slots = 2)
      : Ring(progress, ChannelSpec{0, 0, {tensor_spec(capacity)}}, slots) {}
  Ring(const std::shared_ptr<Progress>& progress, const ChannelSpec& both, std::size_t slots)
      : Ring(progress, both, both, slots) {}
  // Ends with different specs.
  Ring(const std::shared_ptr<Progress>& progress, ChannelSpec sends, ChannelSpec receives, std::size_t slots)
      : out_(SendChannel::make(progress, to(sends, next(), next_tag()))),
        in_(RecvChannel::make(progress, to(receives, previous(), tag()), slots)),
        out(*out_),
        in(*in_) {}

  void send(std::int64_t microbatch, const std::byte* data, std::size_t size, const WaitOptions& options) {
    out.send(microbatch, {{data, {static_cast<std::int64_t>(size)}}}, options);
  }
  void send(std::int64_t microbatch, const std::vector<std::byte>& payload) {
    send(microbatch, payload.data(), payload.size(), soon());
  }

 private:
  static ChannelSpec to(ChannelSpec spec, int peer_rank, int tag) {
    spec.peer_rank = peer_rank;
    spec.tag = tag;
    return spec;
  }
  static int& tag() {
    static int tag = 100;
    return tag;
  }
  static int next_tag() { return ++tag(); }
};

// The shape of the only tensor of a message, on a channel whose planned shape is `planned`.
inline Shape shape_of(const Received& received, const Shape& planned) {
  return received.as_planned ? planned : received.shapes.at(0);
}

}  // namespace pipedream
