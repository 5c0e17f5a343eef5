// Memory of a rank: host memory, pinned host memory and device memory behind one type.
#pragma once

#include <cstddef>
#include <memory>
#include <string>

namespace pipedream {

enum class MemoryKind { host, pinned, device };

const char* name_of(MemoryKind kind);
MemoryKind memory_kind_from(const std::string& name);  // throws std::invalid_argument

// Contiguous bytes that another object owns.
struct View {
  std::byte* data = nullptr;
  std::size_t bytes = 0;
  MemoryKind kind = MemoryKind::host;
};

// Owns `bytes` zeroed bytes. Host memory is page-aligned, so that no two buffers share a page.
// Throws std::bad_alloc, or std::runtime_error if the build or the machine has no CUDA.
class Buffer {
 public:
  Buffer(std::size_t bytes, MemoryKind kind);

  std::byte* data() const { return data_.get(); }
  std::size_t bytes() const { return bytes_; }
  MemoryKind kind() const { return kind_; }
  View view(std::size_t offset = 0) const { return {data() + offset, bytes_ - offset, kind_}; }

 private:
  using Free = void (*)(std::byte*);
  std::unique_ptr<std::byte, Free> data_;
  std::size_t bytes_;
  MemoryKind kind_;
};

// Number of buffers that this module has allocated since it was loaded. Constant after warm-up.
std::size_t allocations();

// Copies between any two kinds of memory and waits for the copy.
void copy(View target, View source, std::size_t bytes);

// The part that needs CUDA: memory_cuda.cu, or memory_stub.cpp in a build without nvcc.
namespace cuda {
bool compiled();
int device_count();  // 0 without a driver
std::byte* allocate(std::size_t bytes, MemoryKind kind);
void free_pinned(std::byte* data);
void free_device(std::byte* data);
void copy(std::byte* target, const std::byte* source, std::size_t bytes);
}  // namespace cuda

}  // namespace pipedream
