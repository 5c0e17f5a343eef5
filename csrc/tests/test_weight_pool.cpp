#include <doctest/doctest.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <random>
#include <set>
#include <stdexcept>

#include "weights/weight_pool.hpp"

namespace pipedream {
namespace {

constexpr std::size_t bytes = 1000;

// Fills a slab with its version.
void fill(const View& slab, std::int64_t version) {
  std::memset(slab.data, static_cast<int>(version % 251), slab.bytes);
}

bool holds(const View& slab, std::int64_t version) {
  for (std::size_t i = 0; i < slab.bytes; ++i) {
    if (slab.data[i] != static_cast<std::byte>(version % 251)) return false;
  }
  return true;
}

std::int64_t update(WeightPool& pool) {
  const WeightPool::Update step = pool.begin_update(false);
  fill(pool.slab(step.target), pool.newest() + 1);
  return pool.commit();
}

// The drawing in weight_pool.hpp: 2 warm-up microbatches, 3 slabs.
//
//   F0 F1 F2 B0 U1 F3 B1 U2 F4 B2 U3 F5 B3 U4
TEST_CASE("WeightPool: one forward, one backward") {
  WeightPool pool(bytes, 3, MemoryKind::host);
  const std::size_t before = allocations();
  for (int microbatch = 0; microbatch < 3; ++microbatch) CHECK(pool.acquire(microbatch) == 0u);
  const std::size_t slab_of_update[] = {1, 2, 0, 1, 2, 0};
  for (int microbatch = 0; microbatch < 6; ++microbatch) {
    CHECK(pool.version_of(microbatch) == std::max(0, microbatch - 2));
    CHECK(holds(pool.slab(pool.slab_of(microbatch)), pool.version_of(microbatch)));
    pool.release(microbatch);
    CHECK(update(pool) == microbatch + 1);
    CHECK(pool.newest_slab() == slab_of_update[microbatch]);
    pool.acquire(microbatch + 3);
  }
  CHECK(allocations() == before);
}

TEST_CASE("WeightPool: without warm-up the weights are updated in place") {
  WeightPool pool(bytes, 1, MemoryKind::host);
  for (int microbatch = 0; microbatch < 5; ++microbatch) {
    pool.acquire(microbatch);
    pool.release(microbatch);
    const WeightPool::Update step = pool.begin_update(true);
    CHECK(step.source == step.target);
    pool.commit();
  }
  CHECK(pool.newest() == 5);
}

TEST_CASE("WeightPool: copies the newest version on demand") {
  WeightPool pool(bytes, 2, MemoryKind::host);
  fill(pool.slab(0), 7);
  pool.acquire(0);
  const WeightPool::Update step = pool.begin_update(true);
  CHECK(step.target == 1u);
  CHECK(holds(pool.slab(1), 7));
}

TEST_CASE("WeightPool: keeps old versions, which are acquired by number") {
  WeightPool pool(bytes, 3, MemoryKind::host);
  update(pool);
  update(pool);
  for (const std::int64_t version : {0, 1, 2}) {
    pool.acquire(10 + version, version);
    CHECK(pool.version_of(10 + version) == version);
    CHECK(holds(pool.slab(pool.slab_of(10 + version)), version));
    pool.release(10 + version);
  }
  update(pool);
  CHECK_THROWS_WITH(pool.acquire(1, 0), "weight version 0 is not kept: the newest is 3, of 3 slabs");
}

// Regression: it could be acquired before commit(), while it was being overwritten.
TEST_CASE("WeightPool: a version that is being overwritten cannot be acquired") {
  WeightPool pool(bytes, 2, MemoryKind::host);
  update(pool);
  pool.begin_update(false);  // overwrites version 0
  CHECK_THROWS_AS(pool.acquire(5, 0), std::logic_error);
  CHECK(pool.holders() == 0u);
  pool.acquire(5);
  CHECK(pool.version_of(5) == 1);
  CHECK(pool.commit() == 2);
}

TEST_CASE("WeightPool: overwrite updates the newest version even if it is held") {
  WeightPool pool(bytes, 3, MemoryKind::host);
  pool.acquire(0);
  const WeightPool::Update step = pool.begin_update(false, true);
  CHECK(step.source == step.target);
  pool.commit();
  CHECK(pool.version_of(0) == 1);
}

TEST_CASE("WeightPool: errors name the holders") {
  WeightPool pool(bytes, 2, MemoryKind::host);
  pool.acquire(4);
  pool.acquire(3);
  update(pool);
  pool.acquire(5);
  CHECK_THROWS_WITH(
      pool.begin_update(false),
      "all 2 weight slabs are held: version 0 by microbatch 3, 4 of the run; version 1 by microbatch 5 of the run.");
  CHECK_THROWS_WITH(pool.acquire(5), "microbatch 5 of the run already holds a weight version");
  CHECK_THROWS_WITH(pool.release(9), "microbatch 9 of the run holds no weight version");
  CHECK_THROWS_WITH(pool.commit(), "there is no update to commit: call begin_update first");
}

TEST_CASE("WeightPool: needs a slab") {
  CHECK_THROWS_AS(WeightPool(bytes, 0, MemoryKind::host), std::invalid_argument);
}

// A held version keeps its number and its bytes.
TEST_CASE("WeightPool: random moves, against a model") {
  for (unsigned seed = 0; seed < 200; ++seed) {
    std::mt19937 draw(seed);
    const std::size_t slabs = 1 + draw() % 4;
    WeightPool pool(bytes, slabs, MemoryKind::host);
    std::map<std::int64_t, std::int64_t> held;  // microbatch -> version
    std::int64_t newest = 0;
    for (int move = 0; move < 60; ++move) {
      const std::int64_t microbatch = draw() % 6;
      switch (draw() % 3) {
        case 0:
          if (held.count(microbatch)) {
            CHECK_THROWS_AS(pool.acquire(microbatch), std::logic_error);
          } else {
            pool.acquire(microbatch);
            held[microbatch] = newest;
          }
          break;
        case 1:
          if (held.count(microbatch)) {
            pool.release(microbatch);
            held.erase(microbatch);
          } else {
            CHECK_THROWS_AS(pool.release(microbatch), std::out_of_range);
          }
          break;
        default: {
          std::set<std::int64_t> alive;
          for (const auto& [_, version] : held) alive.insert(version);
          const bool newest_held = alive.count(newest) != 0;
          alive.insert(newest);
          if (alive.size() == slabs && newest_held) {
            CHECK_THROWS_AS(pool.begin_update(false), std::logic_error);
          } else {
            CHECK(update(pool) == ++newest);
          }
        }
      }
      REQUIRE(pool.newest() == newest);
      REQUIRE(pool.holders() == held.size());
      for (const auto& [each, version] : held) {
        REQUIRE(pool.version_of(each) == version);
        REQUIRE(holds(pool.slab(pool.slab_of(each)), version));
      }
    }
  }
}

}  // namespace
}  // namespace pipedream
