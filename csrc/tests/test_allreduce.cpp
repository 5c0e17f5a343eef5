#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <thread>

#include "comm/allreduce.hpp"
#include "ranks.hpp"

namespace pipedream {
namespace {

// --- reference implementation of 16-bit formats ---------------------------------------------------

// A 16-bit format as a table of its numbers. Rounds by searching for the nearest one.
class Halves {
 public:
  explicit Halves(int exponent_bits) : fraction_bits_(15 - exponent_bits) {
    const int bias = (1 << (exponent_bits - 1)) - 1;
    const int fractions = 1 << fraction_bits_;
    for (int bits = 0; bits < ((1 << exponent_bits) - 1) * fractions; ++bits) {
      const int exponent = bits / fractions, fraction = bits % fractions;
      magnitudes_.push_back(exponent ? std::ldexp(fractions + fraction, exponent - bias - fraction_bits_)
                                     : std::ldexp(fraction, 1 - bias - fraction_bits_));
    }
    infinity_ = static_cast<std::uint16_t>(magnitudes_.size());
    magnitudes_.push_back(2 * magnitudes_[infinity_ - fractions]);  // the number after the largest finite one
  }

  bool nan(std::uint16_t bits) const { return (bits & 0x7fff) > infinity_; }

  double wide(std::uint16_t bits) const {
    const std::uint16_t magnitude = bits & 0x7fff;
    const double value = nan(bits)                ? std::numeric_limits<double>::quiet_NaN()
                         : magnitude == infinity_ ? std::numeric_limits<double>::infinity()
                                                  : magnitudes_[magnitude];
    return bits & 0x8000 ? -value : value;
  }

  // Rounds to nearest, ties to even.
  std::uint16_t nearest(float value) const {
    const std::uint16_t sign = std::signbit(value) ? 0x8000 : 0;
    const double magnitude = std::fabs(static_cast<double>(value));
    const auto above = std::lower_bound(magnitudes_.begin(), magnitudes_.end(), magnitude);
    if (above == magnitudes_.end()) return sign | infinity_;
    std::uint16_t bits = static_cast<std::uint16_t>(above - magnitudes_.begin());
    if (bits > 0) {
      const double up = *above - magnitude, down = magnitude - *(above - 1);
      if (down < up || (down == up && bits % 2 == 1)) --bits;
    }
    return sign | bits;
  }

 private:
  int fraction_bits_;
  std::uint16_t infinity_;
  std::vector<double> magnitudes_;  // by bits; ascending
};

const Halves& halves(DType dtype) {
  static const Halves bfloat16(8), float16(5);
  return dtype == DType::bfloat16 ? bfloat16 : float16;
}

// A number that rank `rank` contributes: at most 2^13 in magnitude, so that sums fit float16, and of such different
// magnitudes that the result depends on the order of the sum.
double term(int rank, std::size_t bucket, std::size_t i) {
  std::uint64_t bits = (i * 64 + bucket) * 16 + static_cast<std::uint64_t>(rank) + 1;
  for (const int shift : {30, 27, 31}) bits = (bits ^ (bits >> shift)) * 0xbf58476d1ce4e5b9u;  // splitmix64
  const double unit = static_cast<double>(bits >> 11) / 9007199254740992.0 - 0.5;
  return std::ldexp(unit, static_cast<int>(bits % 15));
}

template <typename T>
T* numbers(const View& view) {
  return reinterpret_cast<T*>(view.data);
}

void put_in(const View& bucket, DType dtype, std::size_t index, std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) {
    const double value = term(rank(), index, i);
    switch (dtype) {
      case DType::float32:
        numbers<float>(bucket)[i] = static_cast<float>(value);
        break;
      case DType::float64:
        numbers<double>(bucket)[i] = value;
        break;
      default:
        numbers<std::uint16_t>(bucket)[i] = halves(dtype).nearest(static_cast<float>(value));
    }
  }
}

template <typename T>
bool sums_of(const View& bucket, std::size_t index, std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) {
    T total = static_cast<T>(term(0, index, i));
    for (int each = 1; each < ranks(); ++each) total += static_cast<T>(term(each, index, i));
    if (numbers<T>(bucket)[i] != total) return false;
  }
  return true;
}

// Compares with the sum in rank order, bit for bit. 16-bit formats are summed in float32 and rounded once.
bool holds_sum(const View& bucket, DType dtype, std::size_t index, std::size_t count) {
  if (dtype == DType::float32) return sums_of<float>(bucket, index, count);
  if (dtype == DType::float64) return sums_of<double>(bucket, index, count);
  const Halves& format = halves(dtype);
  const auto widened = [&](int each, std::size_t i) {
    return static_cast<float>(format.wide(format.nearest(static_cast<float>(term(each, index, i)))));
  };
  for (std::size_t i = 0; i < count; ++i) {
    float total = widened(0, i);
    for (int each = 1; each < ranks(); ++each) total += widened(each, i);
    if (numbers<std::uint16_t>(bucket)[i] != format.nearest(total)) return false;
  }
  return true;
}

// --- sums ----------------------------------------------------------------------------------------

constexpr DType kinds[] = {DType::float32, DType::float64, DType::bfloat16, DType::float16};

TEST_CASE("AllReduce: the sum in rank order, bit for bit, and nothing beyond it is written") {
  const auto progress = make_progress();
  std::vector<BucketSpec> shapes;
  for (const DType dtype : kinds) {
    for (const std::size_t count : {1u, 2u, 3u, 5u, 1000u, 20011u}) shapes.push_back({count, dtype});
  }
  AllReduce allreduce(progress, MPI_COMM_WORLD, shapes, true, "gradients of stage 1");
  const std::size_t before = allocations();
  for (int round = 0; round < 3; ++round) {
    for (std::size_t index = 0; index < shapes.size(); ++index) {
      put_in(allreduce.bucket(index), shapes[index].dtype, index, shapes[index].count);
      if (round == 1) std::this_thread::sleep_for(std::chrono::microseconds(300 * rank()));
      allreduce.start(index);
    }
    for (std::size_t index = shapes.size(); index-- > 0;) {
      CAPTURE(index);
      allreduce.wait(index, soon());
      const auto [count, dtype] = shapes[index];
      const View bucket = allreduce.bucket(index);
      const std::byte* const end = bucket.data + count * bytes_of(dtype);
      CHECK(holds_sum(bucket, dtype, index, count));
      CHECK(all(end, bucket.data + bucket.bytes, std::byte{0}));
      CHECK(page_untouched(bucket));
    }
  }
  CHECK(allocations() == before);
  barrier(*progress);
}

TEST_CASE("AllReduce: unordered, with whole numbers") {
  const auto progress = make_progress();
  const std::size_t count = 20011;
  AllReduce allreduce(progress, MPI_COMM_WORLD, {{count, DType::float32}, {count, DType::float64}}, false, "test");
  for (int round = 0; round < 3; ++round) {
    for (std::size_t i = 0; i < count; ++i) {
      numbers<float>(allreduce.bucket(0))[i] = static_cast<float>(i + rank());
      numbers<double>(allreduce.bucket(1))[i] = static_cast<double>(i * (rank() + 1));
    }
    allreduce.start(0);
    allreduce.start(1);
    allreduce.wait(1, soon());
    allreduce.wait(0, soon());
    bool right = true;
    for (std::size_t i = 0; i < count; ++i) {
      const std::size_t total = ranks() * (ranks() - 1) / 2;
      right &= numbers<float>(allreduce.bucket(0))[i] == static_cast<float>(ranks() * i + total);
      right &= numbers<double>(allreduce.bucket(1))[i] == static_cast<double>(i * (total + ranks()));
    }
    CHECK(right);
    CHECK(page_untouched(allreduce.bucket(0)));
    CHECK(page_untouched(allreduce.bucket(1)));
  }
  barrier(*progress);
}

// 16-bit formats are always summed in order: MPI cannot add them.
TEST_CASE("AllReduce: every 16-bit number plus zero is itself") {
  for (const bool ordered : {true, false}) {
    const auto progress = make_progress();
    AllReduce allreduce(progress, MPI_COMM_WORLD, {{65536, DType::bfloat16}, {65536, DType::float16}}, ordered, "test");
    for (const std::size_t index : {0u, 1u}) {
      for (std::size_t bits = 0; bits < 65536; ++bits) {
        // -0 + x is x for every x; +0 would lose the sign of -0.
        numbers<std::uint16_t>(allreduce.bucket(index))[bits] = rank() == 0 ? static_cast<std::uint16_t>(bits) : 0x8000;
      }
      allreduce.start(index);
    }
    for (const std::size_t index : {0u, 1u}) {
      allreduce.wait(index, soon());
      const Halves& format = halves(index == 0 ? DType::bfloat16 : DType::float16);
      std::size_t wrong = 0;
      for (std::size_t i = 0; i < 65536; ++i) {
        const std::uint16_t bits = static_cast<std::uint16_t>(i),
                            got = numbers<std::uint16_t>(allreduce.bucket(index))[i];
        wrong += format.nan(bits) ? !format.nan(got) : got != bits;
      }
      CHECK(wrong == 0);
    }
    barrier(*progress);
  }
}

TEST_CASE("AllReduce: sums of 16 bits that overflow") {
  const auto progress = make_progress();
  AllReduce allreduce(progress, MPI_COMM_WORLD, {{1, DType::bfloat16}, {1, DType::float16}}, true, "test");
  numbers<std::uint16_t>(allreduce.bucket(0))[0] = 0x7f7f;  // the largest finite numbers
  numbers<std::uint16_t>(allreduce.bucket(1))[0] = 0x7bff;
  for (const std::size_t index : {0u, 1u}) allreduce.start(index);
  for (const std::size_t index : {0u, 1u}) allreduce.wait(index, soon());
  CHECK(numbers<std::uint16_t>(allreduce.bucket(0))[0] == (ranks() == 1 ? 0x7f7f : 0x7f80));
  CHECK(numbers<std::uint16_t>(allreduce.bucket(1))[0] == (ranks() == 1 ? 0x7bff : 0x7c00));
  barrier(*progress);
}

TEST_CASE("AllReduce: together with channels, and while the main thread computes") {
  const auto progress = make_progress();
  AllReduce allreduce(progress, MPI_COMM_WORLD, {{100000, DType::float32}, {7, DType::float64}}, true, "test");
  Ring ring(progress, 100000, 3);
  const std::vector<std::byte> data = pattern(0, 100000);
  for (int microbatch = 0; microbatch < 10; ++microbatch) {
    put_in(allreduce.bucket(0), DType::float32, 0, 100000);
    put_in(allreduce.bucket(1), DType::float64, 1, 7);
    allreduce.start(0);
    ring.send(microbatch, data);
    allreduce.start(1);
    const std::size_t slot = ring.in.receive(microbatch, soon()).slot;
    CHECK(std::equal(data.begin(), data.end(), ring.in.slot(slot).data));
    ring.in.release(slot);
    while (!allreduce.done(1) || !allreduce.done(0)) std::this_thread::yield();
    allreduce.wait(0, up_to(0));
    allreduce.wait(1, up_to(0));
    CHECK(holds_sum(allreduce.bucket(0), DType::float32, 0, 100000));
    CHECK(holds_sum(allreduce.bucket(1), DType::float64, 1, 7));
  }
  ring.out.drain(soon());
  barrier(*progress);
}

TEST_CASE("AllReduce: over groups of ranks") {
  const auto progress = make_progress();
  MPI_Comm half = MPI_COMM_NULL;
  MPI_Comm_split(MPI_COMM_WORLD, rank() % 2, rank(), &half);
  {
    AllReduce allreduce(progress, half, {{1000, DType::float32}}, true, "test");
    for (int i = 0; i < 1000; ++i) numbers<float>(allreduce.bucket(0))[i] = static_cast<float>(rank());
    allreduce.start(0);
    allreduce.wait(0, soon());
    float total = 0;
    for (int each = rank() % 2; each < ranks(); each += 2) total += static_cast<float>(each);
    for (int i = 0; i < 1000; ++i) REQUIRE(numbers<float>(allreduce.bucket(0))[i] == total);
  }
  MPI_Comm_free(&half);
  barrier(*progress);
}

// --- errors --------------------------------------------------------------------------------------

TEST_CASE("AllReduce: a bucket must not be started twice without a wait") {
  const auto progress = make_progress();
  AllReduce allreduce(progress, MPI_COMM_WORLD, {{10, DType::float32}, {10, DType::float32}}, true, "gradients");
  allreduce.start(1);
  CHECK_THROWS_WITH_AS(allreduce.start(1), "gradients, bucket 1 of 2 was started, but not waited for",
                       std::logic_error);
  allreduce.wait(1, soon());
  CHECK_THROWS_AS(allreduce.start(2), std::out_of_range);
  barrier(*progress);
}

TEST_CASE("AllReduce: a stall names the bucket") {
  if (ranks() == 1) return;
  const auto progress = make_progress();
  AllReduce allreduce(progress, MPI_COMM_WORLD, {{10, DType::float32}}, true, "gradients");
  if (rank() == 0) {
    allreduce.start(0);
    CHECK_THROWS_WITH_AS(allreduce.wait(0, up_to(0.1)),
                         "rank 0 has waited 0 s for the other replicas: gradients, bucket 0 of 1", StallError);
    CHECK_FALSE(allreduce.done(0));
  }
  barrier(*progress);
  if (rank() != 0) allreduce.start(0);
  allreduce.wait(0, soon());
  barrier(*progress);
}

TEST_CASE("AllReduce: is destroyed before or after its Progress is closed, also during a sum") {
  for (const bool started : {false, true}) {
    for (const bool closed_first : {false, true}) {
      CAPTURE(started);
      CAPTURE(closed_first);
      const auto progress = make_progress();
      {
        AllReduce allreduce(progress, MPI_COMM_WORLD, {{100000, DType::float32}}, true, "gradients");
        if (started) allreduce.start(0);
        if (closed_first) progress->close();
        if (closed_first && !started) {
          const std::string words = name_of_this() + ": the channels are closed";
          CHECK_THROWS_WITH_AS(allreduce.start(0), words.c_str(), CoreError);
        }
      }
      barrier();
    }
  }
}

TEST_CASE("DType: from torch's names") {
  CHECK(dtype_from("float32") == DType::float32);
  CHECK(dtype_from("float64") == DType::float64);
  CHECK(dtype_from("bfloat16") == DType::bfloat16);
  CHECK(dtype_from("float16") == DType::float16);
  CHECK_THROWS_WITH_AS(dtype_from("int8"), "gradients of dtype int8 cannot be averaged over replicas",
                       std::invalid_argument);
}

}  // namespace
}  // namespace pipedream
