// What one thread of many does of a copy, on a GPU; on the host for tests of it.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#define PIPEDREAM_EVERYWHERE __host__ __device__
#else
#define PIPEDREAM_EVERYWHERE
#endif

namespace pipedream {

// As much as a thread reads at once. May stand for any bytes.
struct __attribute__((aligned(16), may_alias)) Quad {
  std::uint64_t low, high;
};

// Copies the part of `bytes` bytes that falls to thread `thread` of `threads`. Neighbours copy neighbouring bytes, and
// sixteen at a time where both ends are aligned alike.
PIPEDREAM_EVERYWHERE inline void copy_part(std::byte* target, const std::byte* source, std::size_t bytes,
                                           std::size_t thread, std::size_t threads) {
  const auto to = reinterpret_cast<std::uintptr_t>(target), from = reinterpret_cast<std::uintptr_t>(source);
  std::size_t head = bytes, quads = 0;  // bytes before the first quad, and quads
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
