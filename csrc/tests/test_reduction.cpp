#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <thread>

#include "ranks.hpp"
#include "reduction.hpp"

namespace pipedream {
namespace {

// --- numbers, written a second time --------------------------------------------------------------

// A format of 16 bits as a table of the numbers in it, and the nearest of them by search.
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
    magnitudes_.push_back(2 * magnitudes_[infinity_ - fractions]);  // where the next number would be
  }

  bool nan(std::uint16_t bits) const { return (bits & 0x7fff) > infinity_; }

  double wide(std::uint16_t bits) const {
    const std::uint16_t magnitude = bits & 0x7fff;
    const double value = nan(bits)                ? std::numeric_limits<double>::quiet_NaN()
                         : magnitude == infinity_ ? std::numeric_limits<double>::infinity()
                                                  : magnitudes_[magnitude];
    return bits & 0x8000 ? -value : value;
  }

  // To nearest, ties to even.
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

const Halves& halves(Number number) {
  static const Halves bfloat16(8), float16(5);
  return number == Number::bfloat16 ? bfloat16 : float16;
}

// What rank `rank` puts in: up to 2^13 either way, small enough for a sum of halves, and so different in
// size that the order of the terms tells.
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

void put_in(const View& bucket, Number number, std::size_t index, std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) {
    const double value = term(rank(), index, i);
    switch (number) {
      case Number::float32:
        numbers<float>(bucket)[i] = static_cast<float>(value);
        break;
      case Number::float64:
        numbers<double>(bucket)[i] = value;
        break;
      default:
        numbers<std::uint16_t>(bucket)[i] = halves(number).nearest(static_cast<float>(value));
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

// Bit for bit the sum in the order of the ranks; halves in float32, rounded once.
bool holds_sum(const View& bucket, Number number, std::size_t index, std::size_t count) {
  if (number == Number::float32) return sums_of<float>(bucket, index, count);
  if (number == Number::float64) return sums_of<double>(bucket, index, count);
  const Halves& format = halves(number);
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

constexpr Number kinds[] = {Number::float32, Number::float64, Number::bfloat16, Number::float16};

TEST_CASE("Reduction: the sum in the order of the ranks, to the bit, and nothing beyond it") {
  const auto progress = make_progress();
  std::vector<BucketShape> shapes;
  for (const Number number : kinds) {
    for (const std::size_t count : {1u, 2u, 3u, 5u, 1000u, 20011u}) shapes.push_back({count, number});
  }
  Reduction reduction(progress, MPI_COMM_WORLD, shapes, true, "gradients of stage 1");
  const std::size_t before = allocations();
  for (int round = 0; round < 3; ++round) {
    for (std::size_t index = 0; index < shapes.size(); ++index) {
      put_in(reduction.bucket(index), shapes[index].number, index, shapes[index].count);
      if (round == 1) std::this_thread::sleep_for(std::chrono::microseconds(300 * rank()));
      reduction.start(index);
    }
    for (std::size_t index = shapes.size(); index-- > 0;) {
      CAPTURE(index);
      reduction.wait(index, soon());
      const auto [count, number] = shapes[index];
      const View bucket = reduction.bucket(index);
      const std::byte* const end = bucket.data + count * bytes_of(number);
      CHECK(holds_sum(bucket, number, index, count));
      CHECK(all(end, bucket.data + bucket.bytes, std::byte{0}));
      CHECK(page_untouched(bucket));
    }
  }
  CHECK(allocations() == before);
  meet(*progress);
}

TEST_CASE("Reduction: without an order, whole numbers") {
  const auto progress = make_progress();
  const std::size_t count = 20011;
  Reduction reduction(progress, MPI_COMM_WORLD, {{count, Number::float32}, {count, Number::float64}}, false, "test");
  for (int round = 0; round < 3; ++round) {
    for (std::size_t i = 0; i < count; ++i) {
      numbers<float>(reduction.bucket(0))[i] = static_cast<float>(i + rank());
      numbers<double>(reduction.bucket(1))[i] = static_cast<double>(i * (rank() + 1));
    }
    reduction.start(0);
    reduction.start(1);
    reduction.wait(1, soon());
    reduction.wait(0, soon());
    bool right = true;
    for (std::size_t i = 0; i < count; ++i) {
      const std::size_t total = ranks() * (ranks() - 1) / 2;
      right &= numbers<float>(reduction.bucket(0))[i] == static_cast<float>(ranks() * i + total);
      right &= numbers<double>(reduction.bucket(1))[i] == static_cast<double>(i * (total + ranks()));
    }
    CHECK(right);
    CHECK(page_untouched(reduction.bucket(0)));
    CHECK(page_untouched(reduction.bucket(1)));
  }
  meet(*progress);
}

// Halves have an order whether or not one is asked for: MPI cannot add them.
TEST_CASE("Reduction: every number of 16 bits survives, and zero added") {
  for (const bool ordered : {true, false}) {
    const auto progress = make_progress();
    Reduction reduction(progress, MPI_COMM_WORLD, {{65536, Number::bfloat16}, {65536, Number::float16}}, ordered,
                        "test");
    for (const std::size_t index : {0u, 1u}) {
      for (std::size_t bits = 0; bits < 65536; ++bits) {
        // -0 + x is x for every x; +0 would lose the sign of -0.
        numbers<std::uint16_t>(reduction.bucket(index))[bits] = rank() == 0 ? static_cast<std::uint16_t>(bits) : 0x8000;
      }
      reduction.start(index);
    }
    for (const std::size_t index : {0u, 1u}) {
      reduction.wait(index, soon());
      const Halves& format = halves(index == 0 ? Number::bfloat16 : Number::float16);
      std::size_t wrong = 0;
      for (std::size_t i = 0; i < 65536; ++i) {
        const std::uint16_t bits = static_cast<std::uint16_t>(i),
                            got = numbers<std::uint16_t>(reduction.bucket(index))[i];
        wrong += format.nan(bits) ? !format.nan(got) : got != bits;
      }
      CHECK(wrong == 0);
    }
    meet(*progress);
  }
}

TEST_CASE("Reduction: sums of 16 bits that overflow") {
  const auto progress = make_progress();
  Reduction reduction(progress, MPI_COMM_WORLD, {{1, Number::bfloat16}, {1, Number::float16}}, true, "test");
  numbers<std::uint16_t>(reduction.bucket(0))[0] = 0x7f7f;  // the largest numbers there are
  numbers<std::uint16_t>(reduction.bucket(1))[0] = 0x7bff;
  for (const std::size_t index : {0u, 1u}) reduction.start(index);
  for (const std::size_t index : {0u, 1u}) reduction.wait(index, soon());
  CHECK(numbers<std::uint16_t>(reduction.bucket(0))[0] == (ranks() == 1 ? 0x7f7f : 0x7f80));
  CHECK(numbers<std::uint16_t>(reduction.bucket(1))[0] == (ranks() == 1 ? 0x7bff : 0x7c00));
  meet(*progress);
}

TEST_CASE("Reduction: beside channels, and while the main thread computes") {
  const auto progress = make_progress();
  Reduction reduction(progress, MPI_COMM_WORLD, {{100000, Number::float32}, {7, Number::float64}}, true, "test");
  Ring ring(progress, 100000, 3);
  const std::vector<std::byte> data = pattern(0, 100000);
  for (int minibatch = 0; minibatch < 10; ++minibatch) {
    put_in(reduction.bucket(0), Number::float32, 0, 100000);
    put_in(reduction.bucket(1), Number::float64, 1, 7);
    reduction.start(0);
    ring.send(minibatch, data);
    reduction.start(1);
    const std::size_t slot = ring.in.receive(minibatch, soon()).slot;
    CHECK(std::equal(data.begin(), data.end(), ring.in.slot(slot).data));
    ring.in.release(slot);
    while (!reduction.done(1) || !reduction.done(0)) std::this_thread::yield();
    reduction.wait(0, up_to(0));
    reduction.wait(1, up_to(0));
    CHECK(holds_sum(reduction.bucket(0), Number::float32, 0, 100000));
    CHECK(holds_sum(reduction.bucket(1), Number::float64, 1, 7));
  }
  ring.out.drain(soon());
  meet(*progress);
}

TEST_CASE("Reduction: of some ranks, each group for itself") {
  const auto progress = make_progress();
  MPI_Comm half = MPI_COMM_NULL;
  MPI_Comm_split(MPI_COMM_WORLD, rank() % 2, rank(), &half);
  {
    Reduction reduction(progress, half, {{1000, Number::float32}}, true, "test");
    for (int i = 0; i < 1000; ++i) numbers<float>(reduction.bucket(0))[i] = static_cast<float>(rank());
    reduction.start(0);
    reduction.wait(0, soon());
    float total = 0;
    for (int each = rank() % 2; each < ranks(); each += 2) total += static_cast<float>(each);
    for (int i = 0; i < 1000; ++i) REQUIRE(numbers<float>(reduction.bucket(0))[i] == total);
  }
  MPI_Comm_free(&half);
  meet(*progress);
}

// --- errors --------------------------------------------------------------------------------------

TEST_CASE("Reduction: a bucket is waited for before it is started again") {
  const auto progress = make_progress();
  Reduction reduction(progress, MPI_COMM_WORLD, {{10, Number::float32}, {10, Number::float32}}, true, "gradients");
  reduction.start(1);
  CHECK_THROWS_WITH_AS(reduction.start(1), "gradients, bucket 1 of 2 was started, but not waited for",
                       std::logic_error);
  reduction.wait(1, soon());
  CHECK_THROWS_AS(reduction.start(2), std::out_of_range);
  meet(*progress);
}

TEST_CASE("Reduction: waiting too long says for what") {
  if (ranks() == 1) return;
  const auto progress = make_progress();
  Reduction reduction(progress, MPI_COMM_WORLD, {{10, Number::float32}}, true, "gradients");
  if (rank() == 0) {
    reduction.start(0);
    CHECK_THROWS_WITH_AS(reduction.wait(0, up_to(0.1)),
                         "rank 0 has waited 0 s for the other replicas: gradients, bucket 0 of 1", StallError);
    CHECK_FALSE(reduction.done(0));
  }
  meet(*progress);
  if (rank() != 0) reduction.start(0);
  reduction.wait(0, soon());
  meet(*progress);
}

TEST_CASE("Reduction: goes before or after its progress, in the middle of a sum too") {
  for (const bool started : {false, true}) {
    for (const bool closed_first : {false, true}) {
      CAPTURE(started);
      CAPTURE(closed_first);
      const auto progress = make_progress();
      {
        Reduction reduction(progress, MPI_COMM_WORLD, {{100000, Number::float32}}, true, "gradients");
        if (started) reduction.start(0);
        if (closed_first) progress->close();
        if (closed_first && !started) {
          const std::string words = name_of_this() + ": the channels are closed";
          CHECK_THROWS_WITH_AS(reduction.start(0), words.c_str(), CoreError);
        }
      }
      meet();
    }
  }
}

TEST_CASE("Number: by torch's names") {
  CHECK(number_from("float32") == Number::float32);
  CHECK(number_from("float64") == Number::float64);
  CHECK(number_from("bfloat16") == Number::bfloat16);
  CHECK(number_from("float16") == Number::float16);
  CHECK_THROWS_WITH_AS(number_from("int8"), "gradients of dtype int8 cannot be averaged over replicas",
                       std::invalid_argument);
}

}  // namespace
}  // namespace pipedream
