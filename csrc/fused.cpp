#include "fused.hpp"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>

#include "threads.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#define PIPEDREAM_WIDE __attribute__((target("avx2,fma")))
#endif

#if defined(__clang__)
#define PIPEDREAM_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define PIPEDREAM_INDEPENDENT _Pragma("GCC ivdep")
#endif

#define PIPEDREAM_INLINE inline __attribute__((always_inline))

namespace pipedream {

namespace {

constexpr std::size_t chunk = 32768;  // numbers a thread takes at a time
constexpr std::size_t block = 128;    // numbers stored at a time; in longer runs reads and stores take turns
constexpr std::size_t line = 64;      // bytes
// Bytes of a step that caches may still hold when the next forward reads the weights. Not the size the
// system tells: that may be all of a socket's, and ranks share it.
constexpr std::size_t cached = std::size_t{32} << 20;

// A part of an operand, all float32. `written` may be `weights`.
struct Range {
  const float* weights;
  float* written;
  const float* gradient;
  float* first;
  float* second;
  std::size_t count;
};

template <bool contracted, bool decays, Momentum momentum, bool nesterov>
PIPEDREAM_INLINE void sgd_loop(const Sgd& rule, const Range& range) {
  PIPEDREAM_INDEPENDENT
  for (std::size_t i = 0; i < range.count; ++i) {
    range.written[i] = sgd<contracted, decays, momentum, nesterov>(
        rule, range.weights[i], range.gradient[i], momentum == Momentum::none ? nullptr : range.first + i);
  }
}

template <bool contracted, bool decays>
PIPEDREAM_INLINE void sgd_loops(const Sgd& rule, const Range& range) {
  switch (rule.buffer) {
    case Momentum::none:
      return sgd_loop<contracted, decays, Momentum::none, false>(rule, range);
    case Momentum::first:
      return rule.nesterov ? sgd_loop<contracted, decays, Momentum::first, true>(rule, range)
                           : sgd_loop<contracted, decays, Momentum::first, false>(rule, range);
    case Momentum::kept:
      return rule.nesterov ? sgd_loop<contracted, decays, Momentum::kept, true>(rule, range)
                           : sgd_loop<contracted, decays, Momentum::kept, false>(rule, range);
  }
}

template <bool contracted>
PIPEDREAM_INLINE void loops(const Sgd& rule, const Range& range) {
  rule.decays ? sgd_loops<contracted, true>(rule, range) : sgd_loops<contracted, false>(rule, range);
}

template <bool contracted, Decay decay>
PIPEDREAM_INLINE void adam_loop(const Adam& rule, const Range& range) {
  PIPEDREAM_INDEPENDENT
  for (std::size_t i = 0; i < range.count; ++i) {
    range.written[i] =
        adam<contracted, decay>(rule, range.weights[i], range.gradient[i], range.first + i, range.second + i);
  }
}

template <bool contracted>
PIPEDREAM_INLINE void loops(const Adam& rule, const Range& range) {
  switch (rule.decay) {
    case Decay::none:
      return adam_loop<contracted, Decay::none>(rule, range);
    case Decay::coupled:
      return adam_loop<contracted, Decay::coupled>(rule, range);
    case Decay::decoupled:
      return adam_loop<contracted, Decay::decoupled>(rule, range);
  }
}

// The loops once for any CPU of the architecture, and once for what nearly all have.
#if defined(PIPEDREAM_WIDE)
template <typename Rule>
void plain(const Rule& rule, const Range& range) {
  loops<false>(rule, range);
}
template <typename Rule>
PIPEDREAM_WIDE void contracted(const Rule& rule, const Range& range) {
  loops<true>(rule, range);
}
#else
template <typename Rule>
void plain(const Rule& rule, const Range& range) {
  loops<false>(rule, range);
}
template <typename Rule>
void contracted(const Rule& rule, const Range& range) {
  loops<true>(rule, range);
}
#endif

void widen(float* target, const std::uint16_t* halves, std::size_t count) {
  std::uint32_t* const bits = reinterpret_cast<std::uint32_t*>(target);
  for (std::size_t i = 0; i < count; ++i) bits[i] = static_cast<std::uint32_t>(halves[i]) << 16;
}

void narrow(std::uint16_t* halves, const float* source, std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) {
    std::uint32_t bits;
    std::memcpy(&bits, source + i, sizeof bits);
    halves[i] = bfloat16_from(bits);
  }
}

// Copies around the caches where the CPU can.
void stream(void* target, const void* source, std::size_t bytes) {
#if defined(__x86_64__)
  std::byte* to = static_cast<std::byte*>(target);
  const std::byte* from = static_cast<const std::byte*>(source);
  const std::size_t unaligned = (line - reinterpret_cast<std::uintptr_t>(to) % line) % line;
  const std::size_t head = std::min(bytes, unaligned);
  std::memcpy(to, from, head);
  std::size_t at = head;
  for (; at + line <= bytes; at += line) {
    for (std::size_t part = at; part < at + line; part += sizeof(__m128i)) {
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + part),
                       _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + part)));
    }
  }
  std::memcpy(to + at, from + at, bytes - at);
#else
  std::memcpy(target, source, bytes);
#endif
}

void streamed() {
#if defined(__x86_64__)
  _mm_sfence();  // before anybody is told that the weights are there
#endif
}

// Numbers [begin, end) of an operand.
template <typename Rule>
void step_part(const Rule& rule, const Operand& operand, Format format, bool streaming,
               void (*loop)(const Rule&, const Range&), std::size_t begin, std::size_t end) {
  alignas(line) float gradients[block];
  alignas(line) float weights[block];
  alignas(line) std::uint16_t halves[block];
  const bool whole = !streaming && !format.halves && !format.half_gradients;
  const std::size_t stride = whole ? end - begin : block;
  for (std::size_t at = begin; at < end; at += stride) {
    Range range;
    range.count = std::min(stride, end - at);
    range.weights = operand.weights + at;
    range.first = operand.first == nullptr ? nullptr : operand.first + at;
    range.second = operand.second == nullptr ? nullptr : operand.second + at;
    if (format.half_gradients) {
      widen(gradients, static_cast<const std::uint16_t*>(operand.gradient) + at, range.count);
      range.gradient = gradients;
    } else {
      range.gradient = static_cast<const float*>(operand.gradient) + at;
    }
    if (format.halves) {
      range.written = operand.weights + at;
      loop(rule, range);
      std::uint16_t* const target = static_cast<std::uint16_t*>(operand.target) + at;
      narrow(streaming ? halves : target, range.written, range.count);
      if (streaming) stream(target, halves, range.count * sizeof(std::uint16_t));
    } else {
      float* const target = static_cast<float*>(operand.target) + at;
      range.written = streaming ? weights : target;
      loop(rule, range);
      if (streaming) stream(target, weights, range.count * sizeof(float));
    }
  }
}

// Bytes of one number of an operand, wherever they are.
std::size_t number_bytes(const Operand& operand, Format format) {
  const std::size_t state = (operand.first != nullptr ? 1 : 0) + (operand.second != nullptr ? 1 : 0);
  return (1 + state) * sizeof(float) + (format.halves ? 2 : 4) + (format.half_gradients ? 2 : 4);
}

template <typename Rule>
void step(const Rule& rule, const std::vector<Operand>& operands, Format format, Run run) {
  if (run.contracted && !fused_contracts()) {
    throw std::invalid_argument("this CPU cannot multiply and add with one rounding");
  }
  // Each operand begins on a multiple of a line's numbers, so that chunks end on lines.
  std::vector<std::size_t> starts;
  std::size_t total = 0, bytes = 0;
  for (const Operand& operand : operands) {
    starts.push_back(total);
    bytes += operand.count * number_bytes(operand, format);
    total += (operand.count + line - 1) / line * line;
  }
  const bool streaming = run.stores == Stores::streaming || (run.stores == Stores::chosen && bytes > cached);
  const auto loop = run.contracted ? contracted<Rule> : plain<Rule>;
  std::atomic<std::size_t> next{0};
  auto work = [&] {
    for (std::size_t begin = next.fetch_add(chunk); begin < total; begin = next.fetch_add(chunk)) {
      const std::size_t end = std::min(begin + chunk, total);
      std::size_t index =
          static_cast<std::size_t>(std::upper_bound(starts.begin(), starts.end(), begin) - starts.begin()) - 1;
      for (; index < operands.size() && starts[index] < end; ++index) {
        const Operand& operand = operands[index];
        const std::size_t from = begin > starts[index] ? begin - starts[index] : 0;
        const std::size_t to = std::min(end - starts[index], operand.count);
        const bool apart =
            static_cast<const void*>(operand.weights) != operand.target;  // in place it is cached already
        if (from < to) step_part(rule, operand, format, streaming && apart, loop, from, to);
      }
    }
    if (streaming) streamed();
  };
  const std::size_t chunks = (total + chunk - 1) / chunk;
  on_threads(static_cast<int>(std::min<std::size_t>(static_cast<std::size_t>(std::max(run.threads, 1)), chunks)), work);
}

}  // namespace

bool fused_contracts() {
#if defined(PIPEDREAM_WIDE)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#elif defined(__FP_FAST_FMAF)
  return true;
#else
  return false;
#endif
}

void fused_step(const Sgd& rule, const std::vector<Operand>& operands, Format format, Run run) {
  step(rule, operands, format, run);
}

void fused_step(const Adam& rule, const std::vector<Operand>& operands, Format format, Run run) {
  step(rule, operands, format, run);
}

}  // namespace pipedream
