// Memory a rank owns: ordinary host memory, pinned host memory or device memory behind one type.
#pragma once

#include <cstddef>
#include <memory>
#include <string>

namespace pipedream {

enum class Where { host, pinned, device };

const char* name_of(Where where);
Where where_from(const std::string& name);  // throws std::invalid_argument

// A run of bytes that somebody else owns.
struct View {
  std::byte* data = nullptr;
  std::size_t bytes = 0;
  Where where = Where::host;
};

// Owns `bytes` zeroed bytes. Host memory begins on a page, so that no two buffers share one.
// Throws std::bad_alloc, or std::runtime_error when the build or the machine has no CUDA.
class Buffer {
 public:
  Buffer(std::size_t bytes, Where where);

  std::byte* data() const { return data_.get(); }
  std::size_t bytes() const { return bytes_; }
  Where where() const { return where_; }
  View view(std::size_t offset = 0) const { return {data() + offset, bytes_ - offset, where_}; }

 private:
  using Free = void (*)(std::byte*);
  std::unique_ptr<std::byte, Free> data_;
  std::size_t bytes_;
  Where where_;
};

// Buffers allocated by this module since it was loaded. Constant after warm-up.
std::size_t allocations();

// Copies between any two kinds of memory and waits until the copy is done.
void copy(View target, View source, std::size_t bytes);

// The part that needs CUDA; memory_cuda.cu or, without nvcc, memory_host.cpp.
namespace cuda {
bool compiled();
int device_count();  // 0 without a driver
std::byte* allocate(std::size_t bytes, Where where);
void free_pinned(std::byte* data);
void free_device(std::byte* data);
void copy(std::byte* target, const std::byte* source, std::size_t bytes);
}  // namespace cuda

}  // namespace pipedream
