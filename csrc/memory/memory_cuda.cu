#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "memory/copy_part.hpp"
#include "memory/memory.hpp"
#include "memory/streams.hpp"

namespace pipedream::cuda {

namespace {

void check(cudaError_t code, const char* call) {
  if (code == cudaSuccess) return;
  throw std::runtime_error(std::string(call) + " failed: " + cudaGetErrorString(code));
}

// The number of copies that fit into a kernel's arguments, so that the kernel needs no list in device memory.
constexpr std::size_t most_copies = 64;
struct Copies {
  Copy copy[most_copies];
};

// The blocks with blockIdx.y = i perform copy i.
__global__ void copy_all(const Copies copies) {
  const Copy& copy = copies.copy[blockIdx.y];
  copy_part(copy.target, copy.source, copy.bytes, std::size_t{blockIdx.x} * blockDim.x + threadIdx.x,
            std::size_t{gridDim.x} * blockDim.x);
}

}  // namespace

bool compiled() { return true; }

int device_count() {
  int count = 0;
  // Without a driver the call fails: there are no devices.
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

std::byte* allocate(std::size_t bytes, MemoryKind kind) {
  void* data = nullptr;
  const std::size_t at_least_one = bytes == 0 ? 1 : bytes;
  if (kind == MemoryKind::pinned) {
    check(cudaMallocHost(&data, at_least_one), "cudaMallocHost");
  } else {
    // cudaMalloc, not a memory pool: CUDA-aware MPI shares memory within a node by CUDA IPC, which works
    // only with memory from cudaMalloc.
    check(cudaMalloc(&data, at_least_one), "cudaMalloc");
  }
  check(cudaMemsetAsync(data, 0, at_least_one, cudaStreamPerThread), "cudaMemsetAsync");
  check(cudaStreamSynchronize(cudaStreamPerThread), "cudaStreamSynchronize");
  return static_cast<std::byte*>(data);
}

void free_pinned(std::byte* data) { cudaFreeHost(data); }
void free_device(std::byte* data) { cudaFree(data); }

void copy(std::byte* target, const std::byte* source, std::size_t bytes) {
  // On the calling thread's own stream, so that it does not wait for the work of other threads.
  check(cudaMemcpyAsync(target, source, bytes, cudaMemcpyDefault, cudaStreamPerThread), "cudaMemcpyAsync");
  check(cudaStreamSynchronize(cudaStreamPerThread), "cudaStreamSynchronize");
}

Stream::Stream() {
  // Highest priority: copies take few resources from compute, and the next stage waits for them.
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

void Event::block(Handle stream) const {
  check(cudaStreamWaitEvent(static_cast<cudaStream_t>(stream), static_cast<cudaEvent_t>(handle_), 0),
        "cudaStreamWaitEvent");
}

bool Event::query() const {
  const cudaError_t code = cudaEventQuery(static_cast<cudaEvent_t>(handle_));
  if (code == cudaErrorNotReady) {
    cudaGetLastError();  // clear "not ready", so that torch does not report it as an error
    return false;
  }
  check(code, "cudaEventQuery");
  return true;
}

void copy_on(Handle stream, std::byte* target, const std::byte* source, std::size_t bytes) {
  check(cudaMemcpyAsync(target, source, bytes, cudaMemcpyDefault, static_cast<cudaStream_t>(stream)),
        "cudaMemcpyAsync");
}

void copy_all_on(Handle stream, const std::vector<Copy>& copies) {
  constexpr unsigned threads = 256;
  constexpr std::size_t bytes_per_block = threads * sizeof(Quad) * 4, most_blocks = 128;
  for (std::size_t first = 0; first < copies.size(); first += most_copies) {
    const std::size_t count = std::min(most_copies, copies.size() - first);
    Copies some;
    std::size_t largest = 0;
    for (std::size_t index = 0; index < count; ++index) {
      some.copy[index] = copies[first + index];
      largest = std::max(largest, copies[first + index].bytes);
    }
    const std::size_t blocks =
        std::clamp<std::size_t>((largest + bytes_per_block - 1) / bytes_per_block, 1, most_blocks);
    const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(count));
    copy_all<<<grid, threads, 0, static_cast<cudaStream_t>(stream)>>>(some);
    check(cudaGetLastError(), "launching the kernel that packs tensors");
  }
}

void use_device(int index) { check(cudaSetDevice(index), "cudaSetDevice"); }

}  // namespace pipedream::cuda
