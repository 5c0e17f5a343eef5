#include <doctest/doctest.h>

#include <future>
#include <set>
#include <stdexcept>

#include "channel.hpp"
#include "ranks.hpp"

namespace pipedream {
namespace {

constexpr std::size_t large = 1 << 20;  // beyond what any MPI sends ahead by itself

// A receiver that gives slots back in any order, and leaves guard bytes in them.
class Receiver {
 public:
  Receiver(ReceiveChannel& in, unsigned seed) : in_(in), draw_(seed), left_in_(in.slots(), std::byte{0}) {}

  void receive(std::int64_t minibatch, std::size_t size) {
    if (held_.size() == in_.slots() - 1 || (!held_.empty() && draw_() % 2)) {
      const std::size_t index = draw_() % held_.size();
      const View slot = in_.slot(held_[index]);
      std::memset(slot.data, static_cast<int>(guard), slot.bytes);
      left_in_[held_[index]] = guard;
      in_.release(held_[index]);
      held_.erase(held_.begin() + static_cast<std::ptrdiff_t>(index));
    }
    const Arrived arrived = in_.receive(minibatch, soon());
    const std::size_t index = arrived.slot;
    const View slot = in_.slot(index);
    const std::vector<std::byte> expected = pattern(minibatch, size);
    REQUIRE(arrived.whole == (size == slot.bytes));
    if (!arrived.whole) REQUIRE(arrived.shapes == std::vector<Shape>{{static_cast<std::int64_t>(size)}});
    REQUIRE(std::equal(expected.begin(), expected.end(), slot.data));
    REQUIRE(all(slot.data + size, slot.data + slot.bytes, left_in_[index]));
    REQUIRE(page_untouched(slot));
    held_.push_back(index);
  }

 private:
  ReceiveChannel& in_;
  std::mt19937 draw_;
  std::vector<std::byte> left_in_;  // by slot
  std::vector<std::size_t> held_;
};

std::vector<std::size_t> random_sizes(std::size_t capacity, std::size_t count) {
  std::mt19937 draw(static_cast<unsigned>(capacity));
  std::vector<std::size_t> sizes{0, 1, capacity, capacity - 1};
  while (sizes.size() < count) sizes.push_back(draw() % (capacity + 1));
  return sizes;
}

TEST_CASE("Channel: random sizes with guard bytes, small and large, slots given back in any order") {
  const auto progress = make_progress();
  for (const std::size_t capacity : {1u, 100u, 16384u, 16385u, 100000u, 1u << 20}) {
    CAPTURE(capacity);
    Ring ring(progress, capacity, 3);
    Receiver receiver(ring.in, static_cast<unsigned>(rank()));
    std::vector<Guarded> sent;
    const std::vector<std::size_t> sizes = random_sizes(capacity, 25);
    std::size_t bytes = 0;
    for (std::size_t minibatch = 0; minibatch < sizes.size(); ++minibatch) {
      const std::size_t size = sizes[minibatch];
      sent.emplace_back(pattern(static_cast<std::int64_t>(minibatch), size));
      ring.send(static_cast<std::int64_t>(minibatch), sent.back().data(), size, soon());
      receiver.receive(static_cast<std::int64_t>(minibatch), size);
      bytes += size;
    }
    ring.out.drain(soon());
    for (std::size_t minibatch = 0; minibatch < sizes.size(); ++minibatch) {
      CHECK(sent[minibatch].untouched(pattern(static_cast<std::int64_t>(minibatch), sizes[minibatch])));
    }
    CHECK(ring.out.in_flight() == 0);
    CHECK(ring.out.traffic().messages == 25);
    CHECK(ring.in.traffic().messages == 25);
    CHECK(ring.out.traffic().payload_bytes == bytes);
    CHECK(ring.in.traffic().payload_bytes == bytes);
  }
  meet(*progress);
}

// Every end has a thread of its own, and they share one Progress:
//
//   rank 0   out 0 ──►   rank 1   in 0        the senders run ahead as far as they are let
//            out 1 ──►            in 1
TEST_CASE("Channel: between threads") {
  const auto progress = make_progress();
  Ring small(progress, 1000, 2), medium(progress, 20000, 3), big(progress, 1 << 20, 4);
  std::vector<std::future<void>> threads;
  for (Ring* ring : {&small, &medium, &big}) {
    const std::size_t capacity = ring->in.slot(0).bytes;
    const std::size_t count = capacity < 100000 ? 200 : 30;
    threads.push_back(std::async(std::launch::async, [ring, capacity, count] {
      const std::vector<std::size_t> sizes = random_sizes(capacity, count);
      std::vector<std::byte> alive[2];  // as send() asks for
      for (std::size_t k = 0; k < count; ++k) {
        std::vector<std::byte> payload = pattern(static_cast<std::int64_t>(k), sizes[k]);
        ring->send(static_cast<std::int64_t>(k), payload);
        alive[k % 2] = std::move(payload);
      }
      ring->out.drain(soon());
    }));
    threads.push_back(std::async(std::launch::async, [ring, capacity, count] {
      Receiver receiver(ring->in, static_cast<unsigned>(rank()));
      const std::vector<std::size_t> sizes = random_sizes(capacity, count);
      for (std::size_t k = 0; k < count; ++k) receiver.receive(static_cast<std::int64_t>(k), sizes[k]);
    }));
  }
  for (std::future<void>& thread : threads) thread.get();
  CHECK(progress->statistics().completions >= 2 * (200 + 2 * 200 + 2 * 30));
  meet(*progress);
}

//   slot 0   minibatch 0, in use .................... | 1 | 2 | 3
//   sends    0 done   1 under way   2 under way   3 waits
TEST_CASE("Channel: the third send under way waits") {
  const auto progress = make_progress();
  Ring ring(progress, large, 1);
  std::vector<std::vector<std::byte>> data;
  for (int minibatch = 0; minibatch < 4; ++minibatch) data.push_back(pattern(minibatch, large));
  ring.send(0, data[0]);
  std::size_t slot = ring.in.receive(0, soon()).slot;
  ring.send(1, data[1]);
  ring.send(2, data[2]);
  CHECK(ring.out.in_flight() == 2);
  const std::string words = " s to send minibatch 3: the test's bytes to " + name_of_next() +
                            "; 3 messages sent so far, of which " + name_of_next() + " has not taken the last";
  CHECK_THROWS_WITH_AS(ring.send(3, data[3].data(), large, up_to(0.2)), doctest::Contains(words.c_str()), StallError);
  CHECK(ring.out.in_flight() == 2);
  meet(*progress);  // nobody gives a slot back before all have seen that
  auto sending = std::async(std::launch::async, [&] { ring.send(3, data[3]); });
  for (int minibatch = 1; minibatch < 4; ++minibatch) {
    ring.in.release(slot);
    slot = ring.in.receive(minibatch, soon()).slot;
    CHECK(std::equal(data[minibatch].begin(), data[minibatch].end(), ring.in.slot(slot).data));
  }
  sending.get();
  ring.out.drain(soon());
  CHECK(ring.out.in_flight() == 0);
  meet(*progress);
}

TEST_CASE("Channel: the same slots again and again, nothing is allocated") {
  const auto progress = make_progress();
  for (const std::size_t capacity : {1000u, 100000u}) {
    Ring ring(progress, capacity, 2);
    const std::size_t before = allocations();
    const std::vector<std::byte> data = pattern(0, capacity);
    std::set<const void*> addresses;
    for (int minibatch = 0; minibatch < 20; ++minibatch) {
      ring.send(minibatch, data);
      const std::size_t slot = ring.in.receive(minibatch, soon()).slot;
      addresses.insert(ring.in.slot(slot).data);
      ring.in.release(slot);
    }
    ring.out.drain(soon());
    CHECK(addresses.size() == 2);
    CHECK(allocations() == before);
  }
  meet(*progress);
}

TEST_CASE("Channel: ready() tells without waiting") {
  const auto progress = make_progress();
  Ring ring(progress, 10);
  CHECK_FALSE(ring.in.ready());
  meet(*progress);
  ring.send(0, pattern(0, 10));
  while (!ring.in.ready()) std::this_thread::yield();
  ring.in.receive(0, up_to(0));
  meet(*progress);
}

TEST_CASE("Channel: a message that was not planned is refused, and says what it is") {
  struct Fault {
    std::int64_t minibatch;
    std::string dtype;
    Shape shape;
    std::string words;
  };
  const std::string expected = " expected float32 [4, 3] (or smaller) but got ";
  const Fault faults[] = {
      {5, "float32", {2, 3}, " expected minibatch 4 but got minibatch 5: "},
      {4, "float64", {2, 3}, expected + "float64 [2, 3] for minibatch 4: "},
      {4, "float32", {2, 4}, expected + "float32 [2, 4] for minibatch 4: "},
      {4, "float32", {5, 3}, expected + "float32 [5, 3] for minibatch 4: "},
      {4, "float32", {6}, expected + "float32 [6] for minibatch 4: "},
      {4, "float32", {}, expected + "float32 [] for minibatch 4: "},
  };
  const auto progress = make_progress();
  for (const Fault& fault : faults) {
    const Part expects{"the test's bytes", "float32", 4, {4, 3}},
        sends{"the test's bytes", fault.dtype, 1, fault.shape};
    Ring ring(progress, {0, 0, {sends}}, {0, 0, {expects}}, 1);
    const std::vector<std::byte> data(64);
    ring.out.send(fault.minibatch, {{data.data(), fault.shape}}, soon());
    const std::string words = name_of_this() + fault.words + "the test's bytes from " + name_of_previous();
    CHECK_THROWS_WITH_AS(ring.in.receive(4, soon()), words.c_str(), MessageError);
    ring.out.drain(soon());
    meet(*progress);
  }
}

TEST_CASE("Channel: a message that does not fit never leaves") {
  const auto progress = make_progress();
  Ring ring(progress, 10);
  const std::vector<std::byte> data(11);
  const std::string words =
      name_of_this() + ": the test's bytes of minibatch 3 is uint8 [11], 11 bytes, but the channel was planned for 10";
  CHECK_THROWS_WITH_AS(ring.send(3, data), words.c_str(), MessageError);
  const Shape nine(9, 1), eight(8, 1);
  CHECK_THROWS_AS(ring.out.send(3, {{data.data(), nine}}, soon()), MessageError);
  CHECK_THROWS_AS(ring.out.send(3, {}, soon()), MessageError);
  CHECK(ring.out.traffic().messages == 0);
  CHECK(ring.out.in_flight() == 0);

  const std::string forty(40, 'x');
  CHECK_THROWS_AS(Ring(progress, Line{0, 0, {{"the test's bytes", forty + 'x', 1, {10}}}}, 1), MessageError);
  CHECK_THROWS_AS(Ring(progress, Line{0, 0, {{"the test's bytes", forty, 1, nine}}}, 1), MessageError);
  CHECK_THROWS_AS(Ring(progress, Line{0, 0, {}}, 1), std::invalid_argument);
  Ring longest(progress, Line{0, 0, {{"the test's bytes", forty, 1, eight}}}, 1);
  longest.out.send(0, {{data.data(), eight}}, soon());
  CHECK(longest.in.receive(0, soon()).whole);
  meet(*progress);
}

// Three tensors, the second smaller than planned or empty: every tensor begins on a cache line.
TEST_CASE("Channel: several tensors are one message") {
  const auto progress = make_progress();
  for (const std::int64_t scale : {1, 1000}) {
    CAPTURE(scale);
    const Line line{
        0, 0, {{"a", "int8", 1, {7 * scale}}, {"b", "float32", 4, {5, 3 * scale}}, {"c", "bool", 1, {scale}}}};
    Ring ring(progress, line, 2);
    for (std::int64_t minibatch = 0; minibatch < 6; ++minibatch) {
      const std::int64_t rows = 5 - minibatch;
      const std::vector<std::byte> a = pattern(1, 7 * scale), b = pattern(2, rows * 3 * scale * 4),
                                   c = pattern(3, scale);
      ring.out.send(minibatch, {{a.data(), {7 * scale}}, {b.data(), {rows, 3 * scale}}, {c.data(), {scale}}}, soon());
      const Arrived arrived = ring.in.receive(minibatch, soon());
      CHECK(arrived.whole == (rows == 5));
      if (!arrived.whole) CHECK(arrived.shapes == std::vector<Shape>{{7 * scale}, {rows, 3 * scale}, {scale}});
      const std::vector<Place> places = arrived.whole ? line.places() : arrived.places;
      const std::byte* const slot = ring.in.slot(arrived.slot).data;
      for (const auto& [place, expected] :
           {std::pair(places[0], &a), std::pair(places[1], &b), std::pair(places[2], &c)}) {
        CHECK(place.offset % tensor_alignment == 0);
        CHECK(place.bytes == expected->size());
        CHECK(std::equal(expected->begin(), expected->end(), slot + place.offset));
      }
      ring.in.release(arrived.slot);
      ring.out.drain(soon());  // before the tensors go
    }
    CHECK(ring.out.traffic().messages == 6);
  }
  meet(*progress);
}

TEST_CASE("Channel: more than one MPI message takes is refused when the channel is made") {
  const auto progress = make_progress();
  const Line large_line = line(next(), 1, std::size_t{1} << 31);
  const char* const words =
      "the test's bytes: 2147483648 bytes are more than one MPI message takes (2 GiB): use smaller minibatches";
  CHECK_THROWS_WITH_AS(SendChannel::make(progress, large_line), words, MessageError);
  CHECK_THROWS_WITH_AS(ReceiveChannel::make(progress, large_line, 1), words, MessageError);
  meet(*progress);
}

TEST_CASE("Channel: waiting too long says for what and whom") {
  const auto progress = make_progress();
  Ring ring(progress, 10);
  const std::string waited = name_of_this() + " has waited 0.";
  const std::string first =
      " s for minibatch 0: the test's bytes from " + name_of_previous() + "; messages received so far: none";
  CHECK_THROWS_WITH_AS(ring.in.receive(0, up_to(0.1)), doctest::Contains(waited.c_str()), StallError);
  CHECK_THROWS_WITH_AS(ring.in.receive(0, up_to(0.1)), doctest::Contains(first.c_str()), StallError);
  meet(*progress);
  ring.send(0, pattern(0, 10));
  ring.in.receive(0, soon());
  const std::string second = " s for minibatch 1: the test's bytes from " + name_of_previous() +
                             "; messages received so far: 1, the last was minibatch 0";
  CHECK_THROWS_WITH_AS(ring.in.receive(1, up_to(0.1)), doctest::Contains(second.c_str()), StallError);
  meet(*progress);
}

TEST_CASE("Channel: slots run out") {
  const auto progress = make_progress();
  Ring ring(progress, 10, 1);
  ring.send(0, pattern(0, 10));
  const std::size_t slot = ring.in.receive(0, soon()).slot;
  const std::string words =
      name_of_this() + ": all 1 slots are in use, so minibatch 1 has none: the test's bytes from " + name_of_previous();
  CHECK_THROWS_WITH_AS(ring.in.receive(1, soon()), words.c_str(), MessageError);
  ring.in.release(slot);
  const std::string unused = "slot 0 is not in use: the test's bytes from " + name_of_previous();
  CHECK_THROWS_WITH_AS(ring.in.release(slot), unused.c_str(), std::logic_error);
  CHECK_THROWS_AS(ring.in.release(1), std::out_of_range);
  CHECK_THROWS_AS(Ring(progress, 10, 0), std::invalid_argument);
  meet(*progress);
}

// What MPI still reads when a channel goes away was freed with it. Between 4 and 16 KiB a message is
// neither sent ahead by MPI nor sent from the caller's memory.
TEST_CASE("Channel: what was sent arrives although its channel has gone") {
  const auto progress = make_progress();
  for (const std::size_t capacity : {1000u, 16384u, unsigned{large}}) {
    CAPTURE(capacity);
    const std::vector<std::byte> data = pattern(0, capacity);
    const Shape shape{static_cast<std::int64_t>(capacity)};
    SendChannel::make(progress, line(next(), 1, capacity))->send(0, {{data.data(), shape}}, soon());
    const std::vector<std::vector<std::byte>> others(20, std::vector<std::byte>(16384 + sizeof(Header), guard));
    meet(*progress);
    const auto channel = ReceiveChannel::make(progress, line(previous(), 1, capacity), 1);
    const Arrived arrived = channel->receive(0, soon());
    CHECK(arrived.whole);
    CHECK(std::equal(data.begin(), data.end(), channel->slot(arrived.slot).data));
    meet(*progress);  // `data` stays until everybody has it
  }
}

TEST_CASE("Channel: ends that go away leave nothing behind for the next") {
  const auto progress = make_progress();
  const std::vector<std::byte> data = pattern(0, 1000);
  for (int again = 0; again < 20; ++again) {
    {
      const auto receiver = ReceiveChannel::make(progress, line(previous(), 1, 1000), 3);
      const auto sender = SendChannel::make(progress, line(next(), 1, 1000));
      sender->send(again, {{data.data(), {1000}}}, soon());
      const std::size_t slot = receiver->receive(again, soon()).slot;
      CHECK(std::equal(data.begin(), data.end(), receiver->slot(slot).data));
      sender->drain(soon());
    }
    meet(*progress);  // all receivers have gone before the next message leaves
  }
}

TEST_CASE("Channel: both ends go away in the middle of a large message") {
  const auto progress = make_progress();
  const std::vector<std::byte> data = pattern(0, large);
  {
    Ring(progress, large, 2).send(0, data);
  }
  Ring ring(progress, large, 2);
  meet(*progress);
  ring.send(7, data);
  const std::size_t slot = ring.in.receive(7, soon()).slot;
  CHECK(std::equal(data.begin(), data.end(), ring.in.slot(slot).data));
  ring.out.drain(soon());
  progress->close();
  meet();
}

}  // namespace
}  // namespace pipedream
