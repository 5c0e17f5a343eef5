#include "memory/memory.hpp"

#include <sys/mman.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <stdexcept>

namespace pipedream {

namespace {

constexpr std::size_t page = 4096;
constexpr std::size_t huge_page = std::size_t{2} << 20;
std::atomic<std::size_t> allocated{0};

std::byte* allocate_host(std::size_t bytes) {
  if (bytes > std::numeric_limits<std::size_t>::max() - page) throw std::bad_alloc();
  const std::size_t rounded = (bytes + page - 1) / page * page;
  // Optimizers and copies stream over large buffers: huge pages need fewer TLB entries.
  const bool large = rounded >= 2 * huge_page;
  void* data = std::aligned_alloc(large ? huge_page : page, rounded == 0 ? page : rounded);
  if (data == nullptr) throw std::bad_alloc();
  if (large) madvise(data, rounded, MADV_HUGEPAGE);  // a hint: the kernel may ignore it
  // First touch by the thread that will use the memory: no page faults during the first microbatch.
  std::memset(data, 0, rounded);
  return static_cast<std::byte*>(data);
}

void free_host(std::byte* data) { std::free(data); }

}  // namespace

const char* name_of(MemoryKind kind) {
  switch (kind) {
    case MemoryKind::host:
      return "host";
    case MemoryKind::pinned:
      return "pinned";
    case MemoryKind::device:
      return "device";
  }
  return "?";
}

MemoryKind memory_kind_from(const std::string& name) {
  for (MemoryKind kind : {MemoryKind::host, MemoryKind::pinned, MemoryKind::device})
    if (name == name_of(kind)) return kind;
  throw std::invalid_argument("memory is 'host', 'pinned' or 'device', not '" + name + "'");
}

Buffer::Buffer(std::size_t bytes, MemoryKind kind)
    : data_(kind == MemoryKind::host ? allocate_host(bytes) : cuda::allocate(bytes, kind),
            kind == MemoryKind::host     ? free_host
            : kind == MemoryKind::pinned ? cuda::free_pinned
                                         : cuda::free_device),
      bytes_(bytes),
      kind_(kind) {
  ++allocated;
}

std::size_t allocations() { return allocated; }

void copy(View target, View source, std::size_t bytes) {
  if (bytes > target.bytes || bytes > source.bytes) {
    throw std::out_of_range("copy of " + std::to_string(bytes) + " bytes from " + std::to_string(source.bytes) +
                            " to " + std::to_string(target.bytes));
  }
  if (target.kind == MemoryKind::device || source.kind == MemoryKind::device) {
    cuda::copy(target.data, source.data, bytes);
  } else {
    std::memcpy(target.data, source.data, bytes);
  }
}

}  // namespace pipedream
