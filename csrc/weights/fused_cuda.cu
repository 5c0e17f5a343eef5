#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "weights/fused.hpp"

// One launch steps many tensors: its parameters hold up to 64 operands, and thread blocks take equal chunks of
// them. Compiled with --fmad=false, so that only multiply_add uses FMA instructions.
namespace pipedream::cuda {

namespace {

constexpr int threads = 256;
constexpr std::size_t chunk = 8192;      // numbers per thread block
constexpr int operands_per_launch = 64;  // 64 x 52 bytes: within the 4 KiB limit of kernel parameters

struct Batch {
  Operand operands[operands_per_launch];
  unsigned first_block[operands_per_launch];  // first thread block of each operand
  int count;
};

// Numbers that a thread moves at once: 16 bytes of float32, 8 of bfloat16.
constexpr int wide = 4;

__device__ float single(std::uint16_t half) { return __uint_as_float(static_cast<unsigned>(half) << 16); }

template <int width>
__device__ void load(const float* from, float (&to)[width]) {
  if constexpr (width == wide) {
    const float4 four = *reinterpret_cast<const float4*>(from);
    to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
  } else {
    to[0] = *from;
  }
}

template <int width>
__device__ void load(const std::uint16_t* from, float (&to)[width]) {
  if constexpr (width == wide) {
    const ushort4 four = *reinterpret_cast<const ushort4*>(from);
    to[0] = single(four.x), to[1] = single(four.y), to[2] = single(four.z), to[3] = single(four.w);
  } else {
    to[0] = single(*from);
  }
}

template <int width>
__device__ void store(const float (&from)[width], float* to) {
  if constexpr (width == wide) {
    *reinterpret_cast<float4*>(to) = make_float4(from[0], from[1], from[2], from[3]);
  } else {
    *to = from[0];
  }
}

__device__ std::uint16_t half(float number) { return bfloat16_from(__float_as_uint(number)); }

template <int width>
__device__ void store(const float (&from)[width], std::uint16_t* to) {
  if constexpr (width == wide) {
    *reinterpret_cast<ushort4*>(to) = make_ushort4(half(from[0]), half(from[1]), half(from[2]), half(from[3]));
  } else {
    *to = half(from[0]);
  }
}

template <bool decays, Momentum momentum>
__device__ float sgd_of(const Sgd& rule, float weight, float gradient, float* buffer) {
  return rule.nesterov ? sgd<true, decays, momentum, true>(rule, weight, gradient, buffer)
                       : sgd<true, decays, momentum, false>(rule, weight, gradient, buffer);
}

template <bool decays>
__device__ float sgd_with(const Sgd& rule, float weight, float gradient, float* buffer) {
  switch (rule.buffer) {
    case Momentum::first:
      return sgd_of<decays, Momentum::first>(rule, weight, gradient, buffer);
    case Momentum::kept:
      return sgd_of<decays, Momentum::kept>(rule, weight, gradient, buffer);
    default:
      return sgd<true, decays, Momentum::none, false>(rule, weight, gradient, nullptr);
  }
}

// All threads of a launch take the same branches.
__device__ float apply(const Sgd& rule, float weight, float gradient, float* first, float*) {
  return rule.decays ? sgd_with<true>(rule, weight, gradient, first) : sgd_with<false>(rule, weight, gradient, first);
}

__device__ float apply(const Adam& rule, float weight, float gradient, float* first, float* second) {
  switch (rule.decay) {
    case Decay::coupled:
      return adam<true, Decay::coupled>(rule, weight, gradient, first, second);
    case Decay::decoupled:
      return adam<true, Decay::decoupled>(rule, weight, gradient, first, second);
    default:
      return adam<true, Decay::none>(rule, weight, gradient, first, second);
  }
}

// Whether a rule reads its state. It writes all state that it has.
__device__ bool reads(const Sgd& rule) { return rule.buffer == Momentum::kept; }
__device__ bool reads(const Adam&) { return true; }

// Steps the numbers [i, i + width) of an operand.
template <int width, typename Rule>
__device__ void step_at(const Rule& rule, const Operand& operand, Format format, std::size_t i) {
  float weights[width], gradients[width], first[width] = {}, second[width] = {};
  load(operand.weights + i, weights);
  if (format.bfloat16_gradients) {
    load(static_cast<const std::uint16_t*>(operand.gradient) + i, gradients);
  } else {
    load(static_cast<const float*>(operand.gradient) + i, gradients);
  }
  if (operand.first && reads(rule)) load(operand.first + i, first);
  if (operand.second && reads(rule)) load(operand.second + i, second);
#pragma unroll
  for (int k = 0; k < width; ++k) weights[k] = apply(rule, weights[k], gradients[k], &first[k], &second[k]);
  if (operand.first) store(first, operand.first + i);
  if (operand.second) store(second, operand.second + i);
  if (format.bfloat16_weights) {
    store(weights, operand.weights + i);
    store(weights, static_cast<std::uint16_t*>(operand.target) + i);
  } else {
    store(weights, static_cast<float*>(operand.target) + i);
  }
}

__device__ bool aligned(const void* address) { return reinterpret_cast<std::uintptr_t>(address) % 16 == 0; }

template <typename Rule>
__global__ void __launch_bounds__(threads)
    step_kernel(const __grid_constant__ Rule rule, const __grid_constant__ Batch batch,
                const __grid_constant__ Format format) {
  int index = batch.count - 1;
  while (batch.first_block[index] > blockIdx.x) --index;
  const Operand& operand = batch.operands[index];
  std::size_t begin = (blockIdx.x - batch.first_block[index]) * chunk;
  const std::size_t end = begin + chunk < operand.count ? begin + chunk : operand.count;
  if (aligned(operand.weights) && aligned(operand.target) && aligned(operand.gradient) && aligned(operand.first) &&
      aligned(operand.second)) {
    const std::size_t fours = begin + (end - begin) / wide * wide;
    for (std::size_t i = begin + threadIdx.x * wide; i < fours; i += threads * wide) {
      step_at<wide>(rule, operand, format, i);
    }
    begin = fours;
  }
  for (std::size_t i = begin + threadIdx.x; i < end; i += threads) step_at<1>(rule, operand, format, i);
}

template <typename Rule>
void launch(const Rule& rule, const Batch& batch, unsigned blocks, Format format, cudaStream_t stream) {
  if (blocks == 0) return;
  step_kernel<Rule><<<blocks, threads, 0, stream>>>(rule, batch, format);
  const cudaError_t code = cudaGetLastError();
  if (code != cudaSuccess) {
    throw std::runtime_error(std::string("a fused optimizer step failed to start: ") + cudaGetErrorString(code));
  }
}

template <typename Rule>
void step(const Rule& rule, const std::vector<Operand>& operands, Format format, std::uintptr_t stream_address) {
  const cudaStream_t stream = reinterpret_cast<cudaStream_t>(stream_address);
  Batch batch{};
  unsigned blocks = 0;
  for (const Operand& operand : operands) {
    if (operand.count == 0) continue;
    if (batch.count == operands_per_launch) {
      launch(rule, batch, blocks, format, stream);
      batch.count = 0;
      blocks = 0;
    }
    batch.operands[batch.count] = operand;
    batch.first_block[batch.count] = blocks;
    ++batch.count;
    blocks += static_cast<unsigned>((operand.count + chunk - 1) / chunk);
  }
  launch(rule, batch, blocks, format, stream);
}

}  // namespace

void fused_step(const Sgd& rule, const std::vector<Operand>& operands, Format format, std::uintptr_t stream) {
  step(rule, operands, format, stream);
}

void fused_step(const Adam& rule, const std::vector<Operand>& operands, Format format, std::uintptr_t stream) {
  step(rule, operands, format, stream);
}

}  // namespace pipedream::cuda
