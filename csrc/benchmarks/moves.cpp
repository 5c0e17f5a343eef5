// Moves the bytes of an optimizer step with almost no arithmetic, to measure the time of the memory alone. A library
// that benchmarks/optimizer.py builds and calls.
//
//   in place         weights, gradient, state ──► weights, state
//   copy-on-write    weights, gradient, state ──► target, state      the target by streaming stores
#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cstddef>

#include "weights/threads.hpp"

namespace {

#if defined(__AVX512F__)
using Numbers = __m512;  // a cache line
void stream(float* to, Numbers numbers) { _mm512_stream_ps(to, numbers); }
#else
using Numbers = __m128;
void stream(float* to, Numbers numbers) { _mm_stream_ps(to, numbers); }
#endif

constexpr std::size_t width = sizeof(Numbers) / sizeof(float);
constexpr std::size_t chunk = 524288;  // numbers that a thread takes at a time, as in fused.cpp

Numbers& at(float* address) { return *reinterpret_cast<Numbers*>(address); }

// Computes means, so that the numbers keep their magnitude in repeated runs.
template <bool second, bool streams>
void move(float* weights, float* target, float* gradient, float* first_state, float* second_state, std::size_t count) {
  for (std::size_t i = 0; i < count; i += width) {
    const Numbers step = at(gradient + i), kept = (at(first_state + i) + step) * 0.5f;
    at(first_state + i) = kept;
    if (second) at(second_state + i) = (at(second_state + i) + step * step) * 0.5f;
    const Numbers moved = (at(weights + i) + kept) * 0.5f;
    if (streams) {
      stream(target + i, moved);
    } else {
      at(target + i) = moved;
    }
  }
}

}  // namespace

// Moves `tensors` tensors of `count` numbers each; all are aligned to cache lines and consist of whole lines. Streams
// unless the target is the weights. `second` is null if there is only one state.
extern "C" __attribute__((visibility("default"))) void move_bytes(float* const* weights, float* const* target,
                                                                  float* const* gradient, float* const* first,
                                                                  float* const* second, std::size_t tensors,
                                                                  std::size_t count, int threads) {
  const std::size_t chunks = (count + chunk - 1) / chunk;
  const bool streams = weights[0] != target[0];
  const auto part = second == nullptr ? (streams ? move<false, true> : move<false, false>)
                                      : (streams ? move<true, true> : move<true, false>);
  std::atomic<std::size_t> next{0};
  auto work = [&] {
    for (std::size_t index = next++; index < tensors * chunks; index = next++) {
      const std::size_t tensor = index / chunks, begin = index % chunks * chunk;
      part(weights[tensor] + begin, target[tensor] + begin, gradient[tensor] + begin, first[tensor] + begin,
           second == nullptr ? nullptr : second[tensor] + begin, std::min(chunk, count - begin));
    }
    _mm_sfence();
  };
  pipedream::on_threads(threads, work);
}
