// Stub for memory_cuda.cu in a build without nvcc: every call that needs CUDA throws.
#include <stdexcept>
#include <string>

#include "memory/memory.hpp"
#include "memory/streams.hpp"

namespace pipedream::cuda {

namespace {

[[noreturn]] void missing() {
  throw std::runtime_error(
      "pinned and device memory need CUDA, but this build of pipedream_hpc has no CUDA support: "
      "install it again where nvcc is on PATH");
}

}  // namespace

bool compiled() { return false; }
int device_count() { return 0; }
std::byte* allocate(std::size_t, MemoryKind) { missing(); }
void free_pinned(std::byte*) {}
void free_device(std::byte*) {}
void copy(std::byte*, const std::byte*, std::size_t) { missing(); }

Stream::Stream() { missing(); }
Stream::~Stream() = default;
Event::Event() { missing(); }
Event::~Event() = default;
void Event::record(Handle) { missing(); }
void Event::block(Handle) const { missing(); }
bool Event::query() const { missing(); }
void copy_on(Handle, std::byte*, const std::byte*, std::size_t) { missing(); }
void copy_all_on(Handle, const std::vector<Copy>&) { missing(); }
void use_device(int) { missing(); }

}  // namespace pipedream::cuda
