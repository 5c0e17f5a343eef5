#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "memory.hpp"

namespace pipedream::cuda {

namespace {

void check(cudaError_t code, const char* call) {
  if (code == cudaSuccess) return;
  throw std::runtime_error(std::string(call) + " failed: " + cudaGetErrorString(code));
}

}  // namespace

bool compiled() { return true; }

int device_count() {
  int count = 0;
  // A machine without a driver answers with an error; it has no devices, and that is all.
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

std::byte* allocate(std::size_t bytes, Where where) {
  void* data = nullptr;
  const std::size_t at_least_one = bytes == 0 ? 1 : bytes;
  if (where == Where::pinned) {
    check(cudaMallocHost(&data, at_least_one), "cudaMallocHost");
  } else {
    // cudaMalloc, not a memory pool: only such memory can be shared between processes by CUDA IPC,
    // which CUDA-aware MPI uses within a node.
    check(cudaMalloc(&data, at_least_one), "cudaMalloc");
  }
  check(cudaMemset(data, 0, at_least_one), "cudaMemset");
  return static_cast<std::byte*>(data);
}

void free_pinned(std::byte* data) { cudaFreeHost(data); }
void free_device(std::byte* data) { cudaFree(data); }

void copy(std::byte* target, const std::byte* source, std::size_t bytes) {
  // On a stream of the calling thread, so that it waits for no other thread's work.
  check(cudaMemcpyAsync(target, source, bytes, cudaMemcpyDefault, cudaStreamPerThread), "cudaMemcpyAsync");
  check(cudaStreamSynchronize(cudaStreamPerThread), "cudaStreamSynchronize");
}

}  // namespace pipedream::cuda
