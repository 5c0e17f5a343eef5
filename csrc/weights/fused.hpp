// Fused optimizer steps: they read the old weight version and write the new one, without a copy first.
//
//   copy, then step          slab 0 ──copy──► slab 1      slab 1 ──step──► slab 1
//   copy-on-write            slab 0 ──────────step──────► slab 1
//
// Weights are float32, or bfloat16 rounded from float32 master weights, which are updated in place:
//
//   float32     source (newest slab) ──step──► target (free slab)
//   bfloat16    master ──step──► master ──round──► target (free slab)
//
// The tensors of a call are cut into chunks of equal size, which threads take one after the other. So one large
// tensor occupies all threads, many small tensors cost no more than one large one, and a thread that loses its
// core delays only its own chunk.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "weights/fused_formula.hpp"

namespace pipedream {

// One tensor of a step: `count` numbers at each address. State that the optimizer does not have is null.
struct Operand {
  std::size_t count;
  float* weights;  // old weights; for bfloat16 the master weights, which are updated in place
  void* target;    // new weights; may be the old ones
  const void* gradient;
  float* first;   // momentum buffer, or average of gradients
  float* second;  // average of squared gradients
};

// How the numbers of all operands of a call are stored.
struct Format {
  bool bfloat16_weights;    // the target is bfloat16, and Operand::weights are its master weights
  bool bfloat16_gradients;  // gradients are bfloat16
};

// Streaming stores bypass the caches: otherwise every cache line of the target is read before it is overwritten.
enum class Stores { automatic, cached, streaming };

// Vector instructions: those of any CPU of the architecture; 256 bits (AVX2, FMA); 512 bits (AVX-512), a cache line.
enum class Vectors { any, wide, widest };

struct StepOptions {
  int threads;
  bool fma;       // multiply_add rounds once; the CPU must support it (cpu_has_fma)
  Stores stores;  // automatic: streaming if the step moves more than 32 MiB, more than a cache keeps
  Vectors at_most = Vectors::widest;  // limits the vectors that this CPU has
};

// The longest vectors of this CPU.
Vectors fused_vectors();

// Whether this CPU has fused multiply-add instructions, which multiply and add with one rounding.
bool cpu_has_fma();

// Steps all operands. Throws std::invalid_argument if `options` need what the CPU does not have.
void fused_step(const Sgd& rule, const std::vector<Operand>& operands, Format format, StepOptions options);
void fused_step(const Adam& rule, const std::vector<Operand>& operands, Format format, StepOptions options);

// Steps operands in device memory: starts the step on a stream (a cudaStream_t) and does not wait for it. Defined in
// fused_cuda.cu or, without nvcc, in fused_stub.cpp, which throws std::runtime_error.
namespace cuda {
void fused_step(const Sgd& rule, const std::vector<Operand>& operands, Format format, std::uintptr_t stream);
void fused_step(const Adam& rule, const std::vector<Operand>& operands, Format format, std::uintptr_t stream);
}  // namespace cuda

// Rounds to bfloat16: to nearest, ties to even, as torch does.
PIPEDREAM_FORMULA std::uint16_t bfloat16_from(std::uint32_t bits) {
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<std::uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);  // NaN stays NaN
}

}  // namespace pipedream
