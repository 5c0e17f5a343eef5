#include <doctest/doctest.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <new>
#include <random>
#include <stdexcept>
#include <utility>
#include <vector>

#include "copy_part.hpp"
#include "memory.hpp"

namespace pipedream {
namespace {

TEST_CASE("Buffer: begins on a page and with zeros") {
  for (const std::size_t bytes : {0u, 1u, 4095u, 4096u, 4097u, 100000u}) {
    const Buffer buffer(bytes, Where::host);
    CHECK(reinterpret_cast<std::uintptr_t>(buffer.data()) % 4096 == 0u);
    CHECK(buffer.bytes() == bytes);
    CHECK(std::all_of(buffer.data(), buffer.data() + bytes, [](std::byte each) { return each == std::byte{0}; }));
  }
}

TEST_CASE("Buffer: moves without moving its bytes") {
  Buffer first(100, Where::host);
  std::byte* const data = first.data();
  const std::size_t before = allocations();
  const Buffer second = std::move(first);
  CHECK(second.data() == data);
  CHECK(first.data() == nullptr);
  CHECK(allocations() == before);
}

TEST_CASE("Buffer: counts allocations") {
  const std::size_t before = allocations();
  const Buffer one(1, Where::host), two(1, Where::host);
  CHECK(allocations() == before + 2);
}

TEST_CASE("Copy by many threads: every byte, wherever both ends begin, and none beside them") {
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

// The size rounded up to a page was 0: a buffer of all memory there is, with one page behind it.
TEST_CASE("Buffer: more than all memory is refused") {
  CHECK_THROWS_AS(Buffer(std::numeric_limits<std::size_t>::max(), Where::host), std::bad_alloc);
}

TEST_CASE("Buffer: other memory needs CUDA") {
  if (cuda::compiled()) return;
  CHECK_THROWS_AS(Buffer(1, Where::pinned), std::runtime_error);
  CHECK_THROWS_AS(Buffer(1, Where::device), std::runtime_error);
}

TEST_CASE("Where: names go forth and back") {
  for (const Where where : {Where::host, Where::pinned, Where::device}) CHECK(where_from(name_of(where)) == where);
  CHECK_THROWS_AS(where_from("disk"), std::invalid_argument);
}

TEST_CASE("Copy: stays within both ends") {
  Buffer from(10, Where::host), to(8, Where::host);
  from.data()[7] = std::byte{7};
  copy(to.view(), from.view(), 8);
  CHECK(to.data()[7] == std::byte{7});
  CHECK_THROWS_AS(copy(to.view(), from.view(), 9), std::out_of_range);
  CHECK_THROWS_AS(copy(from.view(), to.view(), 9), std::out_of_range);
}

TEST_CASE("View: of the rest of a buffer") {
  const Buffer buffer(10, Where::host);
  CHECK(buffer.view(4).data == buffer.data() + 4);
  CHECK(buffer.view(4).bytes == 6u);
}

}  // namespace
}  // namespace pipedream
