// Optimizer steps that write a new weight version while they read the old one: no copy first.
//
//   copy, then step          slab 0 ──copy──► slab 1      slab 1 ──step──► slab 1
//   copy-on-write            slab 0 ──────────step──────► slab 1
//
// Weights are float32; or bfloat16 rounded from a float32 master, which is updated in place:
//
//   float32     source (newest slab) ──step──► target (free slab)
//   bfloat16    master ──step──► master ──round──► target (free slab)
//
// All tensors of a call are cut into chunks of equal size that threads take in turn, so that one large
// tensor keeps all of them busy, many small ones cost no more than one, and a thread that loses its
// core to somebody else holds up nobody.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "fused_formula.hpp"

namespace pipedream {

// One tensor of a step; `count` numbers from each address. State an optimizer does not have is null.
struct Operand {
  std::size_t count;
  float* weights;  // old weights; the master, which is updated in place, where weights are bfloat16
  void* target;    // new weights; may be the old ones
  const void* gradient;
  float* first;   // momentum buffer, average of gradients
  float* second;  // average of their squares
};

// How the numbers of all operands of a call are stored.
struct Format {
  bool halves;          // the target is bfloat16, and `weights` are its masters
  bool half_gradients;  // gradients are bfloat16
};

enum class Stores { chosen, cached, streaming };

// What nearly any CPU of the architecture has; 256 bits (AVX2, FMA); 512 bits (AVX-512), a line of the caches.
enum class Vectors { any, wide, widest };

// How to run. `streaming` stores write the new weights around the caches: without them every line of
// the target is read before it is written over. Chosen: where the step moves more than 32 MiB, which no cache keeps.
struct Run {
  int threads;
  bool contracted;  // multiply_add rounds once; the CPU must have it (fused_contracts)
  Stores stores;
  Vectors at_most = Vectors::widest;  // of those that this CPU has
};

// The longest vectors that this CPU has.
Vectors fused_vectors();

// Whether this CPU can multiply and add with one rounding.
bool fused_contracts();

// One step of all operands. Throws std::invalid_argument if `run` wants what the CPU has not.
void fused_step(const Sgd& rule, const std::vector<Operand>& operands, Format format, Run run);
void fused_step(const Adam& rule, const std::vector<Operand>& operands, Format format, Run run);

// The same for device memory, started on a stream (a cudaStream_t) and not waited for. fused_cuda.cu or, without
// nvcc, fused_host.cpp, which throws std::runtime_error.
namespace cuda {
void fused_step(const Sgd& rule, const std::vector<Operand>& operands, Format format, std::uintptr_t stream);
void fused_step(const Adam& rule, const std::vector<Operand>& operands, Format format, std::uintptr_t stream);
}  // namespace cuda

// Rounds to bfloat16, to nearest, ties to even, as torch does.
PIPEDREAM_FORMULA std::uint16_t bfloat16_from(std::uint32_t bits) {
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<std::uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);  // not a number stays so
}

}  // namespace pipedream
