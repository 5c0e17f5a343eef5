#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "fused.hpp"

// Kernels for many tensors in one launch: a launch carries as many pieces as fit its parameters, and
// thread blocks take equal chunks of them. Compiled with --fmad=false: multiply_add alone contracts.
namespace pipedream::cuda {

namespace {

constexpr int threads = 256;
constexpr std::size_t chunk = 8192;    // numbers to a thread block
constexpr int pieces_per_launch = 64;  // 64 x 56 bytes: within the 4 KiB that a launch may carry

struct Batch {
  Piece pieces[pieces_per_launch];
  unsigned first_block[pieces_per_launch];  // of a piece's thread blocks
  int count;
};

__device__ float load(const void* numbers, std::size_t index, bool halves) {
  if (!halves) return static_cast<const float*>(numbers)[index];
  return __uint_as_float(static_cast<unsigned>(static_cast<const std::uint16_t*>(numbers)[index]) << 16);
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

// The branches are the same for all threads of a launch.
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

template <typename Rule>
__global__ void __launch_bounds__(threads)
    step_kernel(const __grid_constant__ Rule rule, const __grid_constant__ Batch batch,
                const __grid_constant__ Format format) {
  int index = batch.count - 1;
  while (batch.first_block[index] > blockIdx.x) --index;
  const Piece& piece = batch.pieces[index];
  const std::size_t begin = (blockIdx.x - batch.first_block[index]) * chunk;
  const std::size_t end = begin + chunk < piece.count ? begin + chunk : piece.count;
  for (std::size_t i = begin + threadIdx.x; i < end; i += threads) {
    const float gradient = load(piece.gradient, i, format.half_gradients);
    const float weight = apply(rule, piece.weights[i], gradient, piece.first + i, piece.second + i);
    if (format.halves) {
      piece.weights[i] = weight;
      static_cast<std::uint16_t*>(piece.target)[i] = bfloat16_from(__float_as_uint(weight));
    } else {
      static_cast<float*>(piece.target)[i] = weight;
    }
  }
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
void step(const Rule& rule, const std::vector<Piece>& pieces, Format format, std::uintptr_t stream_address) {
  const cudaStream_t stream = reinterpret_cast<cudaStream_t>(stream_address);
  Batch batch{};
  unsigned blocks = 0;
  for (const Piece& piece : pieces) {
    if (piece.count == 0) continue;
    if (batch.count == pieces_per_launch) {
      launch(rule, batch, blocks, format, stream);
      batch.count = 0;
      blocks = 0;
    }
    batch.pieces[batch.count] = piece;
    batch.first_block[batch.count] = blocks;
    ++batch.count;
    blocks += static_cast<unsigned>((piece.count + chunk - 1) / chunk);
  }
  launch(rule, batch, blocks, format, stream);
}

}  // namespace

void fused_step(const Sgd& rule, const std::vector<Piece>& pieces, Format format, std::uintptr_t stream) {
  step(rule, pieces, format, stream);
}

void fused_step(const Adam& rule, const std::vector<Piece>& pieces, Format format, std::uintptr_t stream) {
  step(rule, pieces, format, stream);
}

}  // namespace pipedream::cuda
