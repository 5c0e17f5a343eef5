#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "memory.hpp"
#include "streams.hpp"

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
  check(cudaMemsetAsync(data, 0, at_least_one, cudaStreamPerThread), "cudaMemsetAsync");
  check(cudaStreamSynchronize(cudaStreamPerThread), "cudaStreamSynchronize");
  return static_cast<std::byte*>(data);
}

void free_pinned(std::byte* data) { cudaFreeHost(data); }
void free_device(std::byte* data) { cudaFree(data); }

void copy(std::byte* target, const std::byte* source, std::size_t bytes) {
  // On a stream of the calling thread, so that it waits for no other thread's work.
  check(cudaMemcpyAsync(target, source, bytes, cudaMemcpyDefault, cudaStreamPerThread), "cudaMemcpyAsync");
  check(cudaStreamSynchronize(cudaStreamPerThread), "cudaStreamSynchronize");
}

Stream::Stream() {
  // Of the highest priority: a copy takes next to nothing from compute, and the next stage waits for it.
  int least = 0, greatest = 0;
  check(cudaDeviceGetStreamPriorityRange(&least, &greatest), "cudaDeviceGetStreamPriorityRange");
  cudaStream_t stream;
  check(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, greatest), "cudaStreamCreateWithPriority");
  handle_ = stream;
}
Stream::~Stream() { cudaStreamDestroy(static_cast<cudaStream_t>(handle_)); }

Event::Event() {
  cudaEvent_t event;
  check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreateWithFlags");
  handle_ = event;
}
Event::~Event() { cudaEventDestroy(static_cast<cudaEvent_t>(handle_)); }

void Event::record(Handle stream) {
  check(cudaEventRecord(static_cast<cudaEvent_t>(handle_), static_cast<cudaStream_t>(stream)), "cudaEventRecord");
}

void Event::before(Handle stream) const {
  check(cudaStreamWaitEvent(static_cast<cudaStream_t>(stream), static_cast<cudaEvent_t>(handle_), 0),
        "cudaStreamWaitEvent");
}

bool Event::happened() const {
  const cudaError_t code = cudaEventQuery(static_cast<cudaEvent_t>(handle_));
  if (code == cudaErrorNotReady) {
    cudaGetLastError();  // "not ready" is an answer: torch must not find it as an error of its own
    return false;
  }
  check(code, "cudaEventQuery");
  return true;
}

void copy_on(Handle stream, std::byte* target, const std::byte* source, std::size_t bytes) {
  check(cudaMemcpyAsync(target, source, bytes, cudaMemcpyDefault, static_cast<cudaStream_t>(stream)),
        "cudaMemcpyAsync");
}

void use_device(int index) { check(cudaSetDevice(index), "cudaSetDevice"); }

}  // namespace pipedream::cuda
