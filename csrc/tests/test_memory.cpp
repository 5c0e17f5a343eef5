#include <doctest/doctest.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <new>
#include <random>
#include <stdexcept>
#include <utility>
#include <vector>

#include "memory/copy_part.hpp"
#include "memory/memory.hpp"

namespace pipedream {
namespace {

TEST_CASE("Buffer: is page-aligned and zeroed") {
  for (const std::size_t bytes : {0u, 1u, 4095u, 4096u, 4097u, 100000u}) {
    const Buffer buffer(bytes, MemoryKind::host);
    CHECK(reinterpret_cast<std::uintptr_t>(buffer.data()) % 4096 == 0u);
    CHECK(buffer.bytes() == bytes);
    CHECK(std::all_of(buffer.data(), buffer.data() + bytes, [](std::byte each) { return each == std::byte{0}; }));
  }
}

TEST_CASE("Buffer: a move keeps the address") {
  Buffer first(100, MemoryKind::host);
  std::byte* const data = first.data();
  const std::size_t before = allocations();
  const Buffer second = std::move(first);
  CHECK(second.data() == data);
  CHECK(first.data() == nullptr);
  CHECK(allocations() == before);
}

TEST_CASE("Buffer: counts allocations") {
  const std::size_t before = allocations();
  const Buffer one(1, MemoryKind::host), two(1, MemoryKind::host);
  CHECK(allocations() == before + 2);
}

TEST_CASE("copy_part: copies every byte, at any alignment, and no others") {
  std::mt19937 draw(3);
  for (int round = 0; round < 300; ++round) {
    const std::size_t threads = 1 + draw() % 40, bytes = draw() % 700, to = draw() % 32, from = draw() % 32;
    std::vector<std::byte> source(800), target(800, std::byte{0xee});
    for (std::byte& each : source) each = static_cast<std::byte>(draw());
    std::vector<std::byte> expected = target;
    std::copy_n(source.begin() + std::ptrdiff_t(from), bytes, expected.begin() + std::ptrdiff_t(to));
    for (std::size_t thread = 0; thread < threads; ++thread) {
      copy_part(target.data() + to, source.data() + from, bytes, thread, threads);
    }
    CHECK(target == expected);
  }
}

// Regression: this size, rounded up to a page, overflowed to 0, and a buffer of one page was returned.
TEST_CASE("Buffer: a size beyond all memory is refused") {
  CHECK_THROWS_AS(Buffer(std::numeric_limits<std::size_t>::max(), MemoryKind::host), std::bad_alloc);
}

TEST_CASE("Buffer: pinned and device memory need CUDA") {
  if (cuda::compiled()) return;
  CHECK_THROWS_AS(Buffer(1, MemoryKind::pinned), std::runtime_error);
  CHECK_THROWS_AS(Buffer(1, MemoryKind::device), std::runtime_error);
}

TEST_CASE("MemoryKind: names round-trip") {
  for (const MemoryKind kind : {MemoryKind::host, MemoryKind::pinned, MemoryKind::device})
    CHECK(memory_kind_from(name_of(kind)) == kind);
  CHECK_THROWS_AS(memory_kind_from("disk"), std::invalid_argument);
}

TEST_CASE("copy: stays within both views") {
  Buffer from(10, MemoryKind::host), to(8, MemoryKind::host);
  from.data()[7] = std::byte{7};
  copy(to.view(), from.view(), 8);
  CHECK(to.data()[7] == std::byte{7});
  CHECK_THROWS_AS(copy(to.view(), from.view(), 9), std::out_of_range);
  CHECK_THROWS_AS(copy(from.view(), to.view(), 9), std::out_of_range);
}

TEST_CASE("View: of a buffer from an offset") {
  const Buffer buffer(10, MemoryKind::host);
  CHECK(buffer.view(4).data == buffer.data() + 4);
  CHECK(buffer.view(4).bytes == 6u);
}

}  // namespace
}  // namespace pipedream
