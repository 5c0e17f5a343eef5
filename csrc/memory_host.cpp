// Stands in for memory_cuda.cu in a build without nvcc.
#include <stdexcept>
#include <string>

#include "memory.hpp"

namespace pipedream::cuda {

namespace {

[[noreturn]] void missing() {
  throw std::runtime_error(
      "pinned and device memory need CUDA, which this build of pipedream_hpc is without: "
      "install it again where nvcc is on PATH");
}

}  // namespace

bool compiled() { return false; }
int device_count() { return 0; }
std::byte* allocate(std::size_t, Where) { missing(); }
void free_pinned(std::byte*) {}
void free_device(std::byte*) {}
void copy(std::byte*, const std::byte*, std::size_t) { missing(); }

}  // namespace pipedream::cuda
