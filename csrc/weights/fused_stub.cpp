// Stub for fused_cuda.cu in a build without nvcc: steps on device memory throw.
#include <stdexcept>

#include "weights/fused.hpp"

namespace pipedream::cuda {

namespace {

[[noreturn]] void missing() {
  throw std::runtime_error(
      "weights in device memory need CUDA, but this build of pipedream_hpc has no CUDA support: "
      "install it again where nvcc is on PATH");
}

}  // namespace

void fused_step(const Sgd&, const std::vector<Operand>&, Format, std::uintptr_t) { missing(); }
void fused_step(const Adam&, const std::vector<Operand>&, Format, std::uintptr_t) { missing(); }

}  // namespace pipedream::cuda
