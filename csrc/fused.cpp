#include "fused.hpp"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>

#include "threads.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#define PIPEDREAM_WIDE __attribute__((target("avx2,fma")))
#define PIPEDREAM_WIDEST __attribute__((target("avx512f,avx512bw,avx512vl,avx2,fma,prefer-vector-width=512")))
#endif

// Whatever such a function calls is compiled into it, for its instructions.
#define PIPEDREAM_WHOLE __attribute__((flatten))

#if defined(__clang__)
#define PIPEDREAM_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#define PIPEDREAM_UNROLLED_LATER
#else
#define PIPEDREAM_INDEPENDENT _Pragma("GCC ivdep")
#define PIPEDREAM_UNROLLED_LATER _Pragma("GCC unroll 1")
#endif

namespace pipedream {

namespace {

// Numbers a thread takes at a time: long runs, since each begins anew with fetching ahead, but enough of them that
// all threads end together.
constexpr std::size_t least_chunk = 32768, most_chunk = 524288, chunks_per_thread = 16;
constexpr std::size_t block = 128;  // numbers converted at a time, within the nearest cache
constexpr std::size_t line = 64;    // bytes
constexpr std::size_t line_numbers = line / sizeof(float);
// Bytes of a step that caches may still hold when the next forward reads the weights. Not the size the
// system tells: that may be all of a socket's, and ranks share it.
constexpr std::size_t cached = std::size_t{32} << 20;

// How a line of 64 bytes goes around the caches, to an address and from one that are both multiples of a line.
// One store of a whole line is best: of several, those of other lines get between, and the line is
// written in parts.
struct Nowhere {  // not at all
  static constexpr bool streams = false;
  static void put(void*, const void*) {}
};
#if defined(__x86_64__)
struct Quarters {
  static constexpr bool streams = true;
  static void put(void* to, const void* from) {
    for (int i = 0; i < 4; ++i) _mm_stream_si128(static_cast<__m128i*>(to) + i, static_cast<const __m128i*>(from)[i]);
  }
};
struct Halves {
  static constexpr bool streams = true;
  PIPEDREAM_WIDE static void put(void* to, const void* from) {
    for (int i = 0; i < 2; ++i) {
      _mm256_stream_si256(static_cast<__m256i*>(to) + i, static_cast<const __m256i*>(from)[i]);
    }
  }
};
struct Whole {
  static constexpr bool streams = true;
  PIPEDREAM_WIDEST static void put(void* to, const void* from) {
    _mm512_stream_si512(static_cast<__m512i*>(to), *static_cast<const __m512i*>(from));
  }
};
#else
using Quarters = Nowhere;
#endif

// A part of an operand, all float32. `written` may be `weights`.
struct Range {
  const float* weights;
  float* written;
  const float* gradient;
  float* first;
  float* second;
  std::size_t count;
};

std::size_t to_a_line(const void* address) { return (line - reinterpret_cast<std::uintptr_t>(address) % line) % line; }

// Writes number(i) for every i of a range.
template <typename Line, typename Number>
void write(const Range& range, const Number& number) {
  std::size_t at = 0;
  if (Line::streams) {
    for (const std::size_t head = std::min(range.count, to_a_line(range.written) / sizeof(float)); at < head; ++at) {
      range.written[at] = number(at);
    }
    for (; at + line_numbers <= range.count; at += line_numbers) {
      alignas(line) float numbers[line_numbers];
      PIPEDREAM_UNROLLED_LATER
      PIPEDREAM_INDEPENDENT
      for (std::size_t i = 0; i < line_numbers; ++i) numbers[i] = number(at + i);
      Line::put(range.written + at, numbers);
    }
  }
  PIPEDREAM_INDEPENDENT
  for (std::size_t i = at; i < range.count; ++i) range.written[i] = number(i);
}

template <typename Line, bool contracted, bool decays, Momentum momentum, bool nesterov>
void write_sgd(const Sgd& rule, const Range& range) {
  write<Line>(range, [&](std::size_t i) {
    return sgd<contracted, decays, momentum, nesterov>(rule, range.weights[i], range.gradient[i],
                                                       momentum == Momentum::none ? nullptr : range.first + i);
  });
}

template <typename Line, bool contracted, bool decays>
void write_sgd(const Sgd& rule, const Range& range) {
  switch (rule.buffer) {
    case Momentum::none:
      return write_sgd<Line, contracted, decays, Momentum::none, false>(rule, range);
    case Momentum::first:
      return rule.nesterov ? write_sgd<Line, contracted, decays, Momentum::first, true>(rule, range)
                           : write_sgd<Line, contracted, decays, Momentum::first, false>(rule, range);
    case Momentum::kept:
      return rule.nesterov ? write_sgd<Line, contracted, decays, Momentum::kept, true>(rule, range)
                           : write_sgd<Line, contracted, decays, Momentum::kept, false>(rule, range);
  }
}

template <typename Line, bool contracted>
void write_new(const Sgd& rule, const Range& range) {
  rule.decays ? write_sgd<Line, contracted, true>(rule, range) : write_sgd<Line, contracted, false>(rule, range);
}

template <typename Line, bool contracted, Decay decay>
void write_adam(const Adam& rule, const Range& range) {
  write<Line>(range, [&](std::size_t i) {
    return adam<contracted, decay>(rule, range.weights[i], range.gradient[i], range.first + i, range.second + i);
  });
}

template <typename Line, bool contracted>
void write_new(const Adam& rule, const Range& range) {
  switch (rule.decay) {
    case Decay::none:
      return write_adam<Line, contracted, Decay::none>(rule, range);
    case Decay::coupled:
      return write_adam<Line, contracted, Decay::coupled>(rule, range);
    case Decay::decoupled:
      return write_adam<Line, contracted, Decay::decoupled>(rule, range);
  }
}

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

// As many bytes as make whole lines of the target are streamed, if the source is aligned like it.
template <typename Line>
void copy(void* target, const void* source, std::size_t bytes) {
  std::byte* const to = static_cast<std::byte*>(target);
  const std::byte* const from = static_cast<const std::byte*>(source);
  std::size_t at = 0;
  if (Line::streams && to_a_line(to) == 0) {
    for (; at + line <= bytes; at += line) Line::put(to + at, from + at);
  }
  std::memcpy(to + at, from + at, bytes - at);
}

// Numbers [begin, end) of an operand.
template <typename Line, bool contracted, typename Rule>
void step_part(const Rule& rule, const Operand& operand, Format format, std::size_t begin, std::size_t end) {
  alignas(line) float gradients[block];
  alignas(line) std::uint16_t halves[block];
  const std::size_t stride = format.halves || format.half_gradients ? block : end - begin;
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
      write_new<Nowhere, contracted>(rule, range);
      narrow(halves, range.written, range.count);
      copy<Line>(static_cast<std::uint16_t*>(operand.target) + at, halves, range.count * sizeof(std::uint16_t));
    } else {
      range.written = static_cast<float*>(operand.target) + at;
      write_new<Line, contracted>(rule, range);
    }
  }
}

template <typename Rule>
using Part = void (*)(const Rule&, const Operand&, Format, std::size_t begin, std::size_t end);

// step_part for each kind of vector, with stores to the caches and around them.
template <typename Line, typename Rule>
PIPEDREAM_WHOLE void plain(const Rule& rule, const Operand& operand, Format format, std::size_t begin,
                           std::size_t end) {
  step_part<Line, false>(rule, operand, format, begin, end);
}
#if defined(PIPEDREAM_WIDE)
template <typename Line, typename Rule>
PIPEDREAM_WHOLE PIPEDREAM_WIDE void wide(const Rule& rule, const Operand& operand, Format format, std::size_t begin,
                                         std::size_t end) {
  step_part<Line, true>(rule, operand, format, begin, end);
}
template <typename Line, typename Rule>
PIPEDREAM_WHOLE PIPEDREAM_WIDEST void widest(const Rule& rule, const Operand& operand, Format format, std::size_t begin,
                                             std::size_t end) {
  step_part<Line, true>(rule, operand, format, begin, end);
}
template <typename Rule>
Part<Rule> part_for(bool contracted, bool streaming, Vectors vectors) {
  if (!contracted) return streaming ? plain<Quarters, Rule> : plain<Nowhere, Rule>;
  if (vectors == Vectors::widest) return streaming ? widest<Whole, Rule> : widest<Nowhere, Rule>;
  return streaming ? wide<Halves, Rule> : wide<Nowhere, Rule>;
}
#else
template <typename Line, typename Rule>
PIPEDREAM_WHOLE void contracted(const Rule& rule, const Operand& operand, Format format, std::size_t begin,
                                std::size_t end) {
  step_part<Line, true>(rule, operand, format, begin, end);
}
template <typename Rule>
Part<Rule> part_for(bool contracts, bool, Vectors) {
  return contracts ? contracted<Nowhere, Rule> : plain<Nowhere, Rule>;
}
#endif

void streamed() {
#if defined(__x86_64__)
  _mm_sfence();  // before anybody is told that the weights are there
#endif
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
  const Vectors vectors = std::min(run.at_most, fused_vectors());
  const Part<Rule> to_caches = part_for<Rule>(run.contracted, false, vectors);
  const Part<Rule> around_caches = part_for<Rule>(run.contracted, streaming, vectors);
  const int threads = std::max(run.threads, 1);
  const std::size_t share = total / (static_cast<std::size_t>(threads) * chunks_per_thread) / line * line;
  const std::size_t chunk = std::min(std::max(share, least_chunk), most_chunk);
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
        const bool in_place = static_cast<const void*>(operand.weights) == operand.target;  // cached already
        if (from < to) (in_place ? to_caches : around_caches)(rule, operand, format, from, to);
      }
    }
    if (streaming) streamed();
  };
  const std::size_t chunks = (total + chunk - 1) / chunk;
  on_threads(static_cast<int>(std::min<std::size_t>(static_cast<std::size_t>(threads), chunks)), work);
}

}  // namespace

Vectors fused_vectors() {
#if defined(PIPEDREAM_WIDE)
  if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) return Vectors::widest;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Vectors::wide;
#endif
  return Vectors::any;
}

bool fused_contracts() {
#if defined(PIPEDREAM_WIDE)
  return fused_vectors() != Vectors::any;
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
