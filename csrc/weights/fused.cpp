#include "weights/fused.hpp"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>

#include "weights/threads.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#define PIPEDREAM_AVX2 __attribute__((target("avx2,fma")))
#define PIPEDREAM_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx2,fma,prefer-vector-width=512")))
#endif

// Inlines all calls of a function into it, so that they are compiled for its instruction set.
#define PIPEDREAM_FLATTEN __attribute__((flatten))

#if defined(__clang__)
#define PIPEDREAM_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#define PIPEDREAM_NO_UNROLL
#else
#define PIPEDREAM_INDEPENDENT _Pragma("GCC ivdep")
#define PIPEDREAM_NO_UNROLL _Pragma("GCC unroll 1")
#endif

namespace pipedream {

namespace {

// Numbers that a thread takes at a time. Chunks are long, since the hardware prefetcher restarts at each, but there are
// enough of them that all threads end at about the same time.
constexpr std::size_t least_chunk = 32768, most_chunk = 524288, chunks_per_thread = 16;
constexpr std::size_t block = 128;  // numbers converted at a time; they fit the L1 cache
constexpr std::size_t line = 64;    // bytes of a cache line
constexpr std::size_t line_numbers = line / sizeof(float);
// Bytes of a step that caches may still hold when the next forward reads the weights. A constant, because the size
// that the system reports may be the whole socket's, which ranks share.
constexpr std::size_t cached = std::size_t{32} << 20;

// Streaming stores of a cache line; both addresses are aligned to a line. One store of a whole line is best: stores of
// other lines may come between several smaller ones, and the line is then written in parts.
struct NoStream {
  static constexpr bool streams = false;
  static void put(void*, const void*) {}
};
#if defined(__x86_64__)
struct Stream128 {
  static constexpr bool streams = true;
  static void put(void* to, const void* from) {
    for (int i = 0; i < 4; ++i) _mm_stream_si128(static_cast<__m128i*>(to) + i, static_cast<const __m128i*>(from)[i]);
  }
};
struct Stream256 {
  static constexpr bool streams = true;
  PIPEDREAM_AVX2 static void put(void* to, const void* from) {
    for (int i = 0; i < 2; ++i) {
      _mm256_stream_si256(static_cast<__m256i*>(to) + i, static_cast<const __m256i*>(from)[i]);
    }
  }
};
struct Stream512 {
  static constexpr bool streams = true;
  PIPEDREAM_AVX512 static void put(void* to, const void* from) {
    _mm512_stream_si512(static_cast<__m512i*>(to), *static_cast<const __m512i*>(from));
  }
};
#else
using Stream128 = NoStream;
#endif

// A range of an operand, all float32. `written` may be `weights`.
struct Range {
  const float* weights;
  float* written;
  const float* gradient;
  float* first;
  float* second;
  std::size_t count;
};

std::size_t bytes_to_line(const void* address) {
  return (line - reinterpret_cast<std::uintptr_t>(address) % line) % line;
}

// Writes number(i) for every i of a range.
template <typename Streaming, typename Number>
void write(const Range& range, const Number& number) {
  std::size_t at = 0;
  if (Streaming::streams) {
    for (const std::size_t head = std::min(range.count, bytes_to_line(range.written) / sizeof(float)); at < head;
         ++at) {
      range.written[at] = number(at);
    }
    for (; at + line_numbers <= range.count; at += line_numbers) {
      alignas(line) float numbers[line_numbers];
      PIPEDREAM_NO_UNROLL
      PIPEDREAM_INDEPENDENT
      for (std::size_t i = 0; i < line_numbers; ++i) numbers[i] = number(at + i);
      Streaming::put(range.written + at, numbers);
    }
  }
  PIPEDREAM_INDEPENDENT
  for (std::size_t i = at; i < range.count; ++i) range.written[i] = number(i);
}

template <typename Streaming, bool fma, bool decays, Momentum momentum, bool nesterov>
void write_sgd(const Sgd& rule, const Range& range) {
  write<Streaming>(range, [&](std::size_t i) {
    return sgd<fma, decays, momentum, nesterov>(rule, range.weights[i], range.gradient[i],
                                                momentum == Momentum::none ? nullptr : range.first + i);
  });
}

template <typename Streaming, bool fma, bool decays>
void write_sgd(const Sgd& rule, const Range& range) {
  switch (rule.buffer) {
    case Momentum::none:
      return write_sgd<Streaming, fma, decays, Momentum::none, false>(rule, range);
    case Momentum::first:
      return rule.nesterov ? write_sgd<Streaming, fma, decays, Momentum::first, true>(rule, range)
                           : write_sgd<Streaming, fma, decays, Momentum::first, false>(rule, range);
    case Momentum::kept:
      return rule.nesterov ? write_sgd<Streaming, fma, decays, Momentum::kept, true>(rule, range)
                           : write_sgd<Streaming, fma, decays, Momentum::kept, false>(rule, range);
  }
}

template <typename Streaming, bool fma>
void write_new(const Sgd& rule, const Range& range) {
  rule.decays ? write_sgd<Streaming, fma, true>(rule, range) : write_sgd<Streaming, fma, false>(rule, range);
}

template <typename Streaming, bool fma, Decay decay>
void write_adam(const Adam& rule, const Range& range) {
  write<Streaming>(range, [&](std::size_t i) {
    return adam<fma, decay>(rule, range.weights[i], range.gradient[i], range.first + i, range.second + i);
  });
}

template <typename Streaming, bool fma>
void write_new(const Adam& rule, const Range& range) {
  switch (rule.decay) {
    case Decay::none:
      return write_adam<Streaming, fma, Decay::none>(rule, range);
    case Decay::coupled:
      return write_adam<Streaming, fma, Decay::coupled>(rule, range);
    case Decay::decoupled:
      return write_adam<Streaming, fma, Decay::decoupled>(rule, range);
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

// Streams the whole cache lines if the target is aligned to one, and copies the rest.
template <typename Streaming>
void copy(void* target, const void* source, std::size_t bytes) {
  std::byte* const to = static_cast<std::byte*>(target);
  const std::byte* const from = static_cast<const std::byte*>(source);
  std::size_t at = 0;
  if (Streaming::streams && bytes_to_line(to) == 0) {
    for (; at + line <= bytes; at += line) Streaming::put(to + at, from + at);
  }
  std::memcpy(to + at, from + at, bytes - at);
}

// Steps the numbers [begin, end) of an operand.
template <typename Streaming, bool fma, typename Rule>
void step_part(const Rule& rule, const Operand& operand, Format format, std::size_t begin, std::size_t end) {
  alignas(line) float gradients[block];
  alignas(line) std::uint16_t halves[block];
  const std::size_t stride = format.bfloat16_weights || format.bfloat16_gradients ? block : end - begin;
  for (std::size_t at = begin; at < end; at += stride) {
    Range range;
    range.count = std::min(stride, end - at);
    range.weights = operand.weights + at;
    range.first = operand.first == nullptr ? nullptr : operand.first + at;
    range.second = operand.second == nullptr ? nullptr : operand.second + at;
    if (format.bfloat16_gradients) {
      widen(gradients, static_cast<const std::uint16_t*>(operand.gradient) + at, range.count);
      range.gradient = gradients;
    } else {
      range.gradient = static_cast<const float*>(operand.gradient) + at;
    }
    if (format.bfloat16_weights) {
      range.written = operand.weights + at;
      write_new<NoStream, fma>(rule, range);
      narrow(halves, range.written, range.count);
      copy<Streaming>(static_cast<std::uint16_t*>(operand.target) + at, halves, range.count * sizeof(std::uint16_t));
    } else {
      range.written = static_cast<float*>(operand.target) + at;
      write_new<Streaming, fma>(rule, range);
    }
  }
}

template <typename Rule>
using StepFunction = void (*)(const Rule&, const Operand&, Format, std::size_t begin, std::size_t end);

// step_part compiled for each kind of vectors, with cached and with streaming stores.
template <typename Streaming, typename Rule>
PIPEDREAM_FLATTEN void plain(const Rule& rule, const Operand& operand, Format format, std::size_t begin,
                             std::size_t end) {
  step_part<Streaming, false>(rule, operand, format, begin, end);
}
#if defined(PIPEDREAM_AVX2)
template <typename Streaming, typename Rule>
PIPEDREAM_FLATTEN PIPEDREAM_AVX2 void wide(const Rule& rule, const Operand& operand, Format format, std::size_t begin,
                                           std::size_t end) {
  step_part<Streaming, true>(rule, operand, format, begin, end);
}
template <typename Streaming, typename Rule>
PIPEDREAM_FLATTEN PIPEDREAM_AVX512 void widest(const Rule& rule, const Operand& operand, Format format,
                                               std::size_t begin, std::size_t end) {
  step_part<Streaming, true>(rule, operand, format, begin, end);
}
template <typename Rule>
StepFunction<Rule> step_function(bool fma, bool streaming, Vectors vectors) {
  if (!fma) return streaming ? plain<Stream128, Rule> : plain<NoStream, Rule>;
  if (vectors == Vectors::widest) return streaming ? widest<Stream512, Rule> : widest<NoStream, Rule>;
  return streaming ? wide<Stream256, Rule> : wide<NoStream, Rule>;
}
#else
template <typename Streaming, typename Rule>
PIPEDREAM_FLATTEN void with_fma(const Rule& rule, const Operand& operand, Format format, std::size_t begin,
                                std::size_t end) {
  step_part<Streaming, true>(rule, operand, format, begin, end);
}
template <typename Rule>
StepFunction<Rule> step_function(bool fma, bool, Vectors) {
  return fma ? with_fma<NoStream, Rule> : plain<NoStream, Rule>;
}
#endif

void fence_streaming_stores() {
#if defined(__x86_64__)
  _mm_sfence();  // orders the streaming stores before the end of the step
#endif
}

// Bytes that the step moves per number of an operand.
std::size_t number_bytes(const Operand& operand, Format format) {
  const std::size_t state = (operand.first != nullptr ? 1 : 0) + (operand.second != nullptr ? 1 : 0);
  return (1 + state) * sizeof(float) + (format.bfloat16_weights ? 2 : 4) + (format.bfloat16_gradients ? 2 : 4);
}

template <typename Rule>
void step(const Rule& rule, const std::vector<Operand>& operands, Format format, StepOptions options) {
  if (options.fma && !cpu_has_fma()) {
    throw std::invalid_argument("this CPU cannot multiply and add with one rounding");
  }
  // Round each operand up to whole cache lines, so that chunks end at lines.
  std::vector<std::size_t> starts;
  std::size_t total = 0, bytes = 0;
  for (const Operand& operand : operands) {
    starts.push_back(total);
    bytes += operand.count * number_bytes(operand, format);
    total += (operand.count + line - 1) / line * line;
  }
  const bool streaming = options.stores == Stores::streaming || (options.stores == Stores::automatic && bytes > cached);
  const Vectors vectors = std::min(options.at_most, fused_vectors());
  const StepFunction<Rule> cached_step = step_function<Rule>(options.fma, false, vectors);
  const StepFunction<Rule> streaming_step = step_function<Rule>(options.fma, streaming, vectors);
  const int threads = std::max(options.threads, 1);
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
        if (from < to) (in_place ? cached_step : streaming_step)(rule, operand, format, from, to);
      }
    }
    if (streaming) fence_streaming_stores();
  };
  const std::size_t chunks = (total + chunk - 1) / chunk;
  on_threads(static_cast<int>(std::min<std::size_t>(static_cast<std::size_t>(threads), chunks)), work);
}

}  // namespace

Vectors fused_vectors() {
#if defined(PIPEDREAM_AVX2)
  if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) return Vectors::widest;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Vectors::wide;
#endif
  return Vectors::any;
}

bool cpu_has_fma() {
#if defined(PIPEDREAM_AVX2)
  return fused_vectors() != Vectors::any;
#elif defined(__FP_FAST_FMAF)
  return true;
#else
  return false;
#endif
}

void fused_step(const Sgd& rule, const std::vector<Operand>& operands, Format format, StepOptions options) {
  step(rule, operands, format, options);
}

void fused_step(const Adam& rule, const std::vector<Operand>& operands, Format format, StepOptions options) {
  step(rule, operands, format, options);
}

}  // namespace pipedream
