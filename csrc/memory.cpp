#include "memory.hpp"

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
  // What spans several huge pages is passed over line by line, by optimizers and copies: fewer entries to look up.
  const bool large = rounded >= 2 * huge_page;
  void* data = std::aligned_alloc(large ? huge_page : page, rounded == 0 ? page : rounded);
  if (data == nullptr) throw std::bad_alloc();
  if (large) madvise(data, rounded, MADV_HUGEPAGE);  // a wish, which the kernel may not grant
  // Touched now, by the thread that will use it: no page fault is left for the first minibatch.
  std::memset(data, 0, rounded);
  return static_cast<std::byte*>(data);
}

void free_host(std::byte* data) { std::free(data); }

}  // namespace

const char* name_of(Where where) {
  switch (where) {
    case Where::host:
      return "host";
    case Where::pinned:
      return "pinned";
    case Where::device:
      return "device";
  }
  return "?";
}

Where where_from(const std::string& name) {
  for (Where where : {Where::host, Where::pinned, Where::device})
    if (name == name_of(where)) return where;
  throw std::invalid_argument("memory is 'host', 'pinned' or 'device', not '" + name + "'");
}

Buffer::Buffer(std::size_t bytes, Where where)
    : data_(where == Where::host ? allocate_host(bytes) : cuda::allocate(bytes, where), where == Where::host ? free_host
                                                                                        : where == Where::pinned
                                                                                            ? cuda::free_pinned
                                                                                            : cuda::free_device),
      bytes_(bytes),
      where_(where) {
  ++allocated;
}

std::size_t allocations() { return allocated; }

void copy(View target, View source, std::size_t bytes) {
  if (bytes > target.bytes || bytes > source.bytes) {
    throw std::out_of_range("copy of " + std::to_string(bytes) + " bytes from " + std::to_string(source.bytes) +
                            " to " + std::to_string(target.bytes));
  }
  if (target.where == Where::device || source.where == Where::device) {
    cuda::copy(target.data, source.data, bytes);
  } else {
    std::memcpy(target.data, source.data, bytes);
  }
}

}  // namespace pipedream
