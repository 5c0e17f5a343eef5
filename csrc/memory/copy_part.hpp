// The share of a parallel copy that one thread performs: on a GPU, and on the host in tests.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#define PIPEDREAM_EVERYWHERE __host__ __device__
#else
#define PIPEDREAM_EVERYWHERE
#endif

namespace pipedream {

// The 16 bytes that a thread reads at once. May alias any type.
struct __attribute__((aligned(16), may_alias)) Quad {
  std::uint64_t low, high;
};

// Copies the share of thread `thread` of `threads` in a copy of `bytes` bytes. Neighbouring threads copy neighbouring
// bytes, sixteen at a time if source and target have the same alignment.
PIPEDREAM_EVERYWHERE inline void copy_part(std::byte* target, const std::byte* source, std::size_t bytes,
                                           std::size_t thread, std::size_t threads) {
  const auto to = reinterpret_cast<std::uintptr_t>(target), from = reinterpret_cast<std::uintptr_t>(source);
  std::size_t head = bytes, quads = 0;  // bytes before the first quad, number of quads
  if ((to - from) % sizeof(Quad) == 0) {
    const std::size_t before = (sizeof(Quad) - to % sizeof(Quad)) % sizeof(Quad);
    head = before < bytes ? before : bytes;
    quads = (bytes - head) / sizeof(Quad);
  }
  auto* const wide_target = reinterpret_cast<Quad*>(target + head);
  const auto* const wide_source = reinterpret_cast<const Quad*>(source + head);
  for (std::size_t index = thread; index < quads; index += threads) wide_target[index] = wide_source[index];
  for (std::size_t index = thread; index < head; index += threads) target[index] = source[index];
  for (std::size_t index = head + quads * sizeof(Quad) + thread; index < bytes; index += threads) {
    target[index] = source[index];
  }
}

}  // namespace pipedream
