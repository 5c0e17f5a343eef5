#include <doctest/doctest.h>

#include <future>
#include <set>
#include <stdexcept>

#include "comm/channel.hpp"
#include "ranks.hpp"

namespace pipedream {
namespace {

constexpr std::size_t large = 1 << 20;  // beyond the eager limit of any MPI

// A receiver that releases slots in random order and fills them with guard bytes.
class Receiver {
 public:
  Receiver(RecvChannel& in, unsigned seed) : in_(in), draw_(seed), left_in_(in.slots(), std::byte{0}) {}

  void receive(std::int64_t microbatch, std::size_t size) {
    if (held_.size() == in_.slots() - 1 || (!held_.empty() && draw_() % 2)) {
      const std::size_t index = draw_() % held_.size();
      const View slot = in_.slot(held_[index]);
      std::memset(slot.data, static_cast<int>(guard), slot.bytes);
      left_in_[held_[index]] = guard;
      in_.release(held_[index]);
      held_.erase(held_.begin() + static_cast<std::ptrdiff_t>(index));
    }
    const Received received = in_.receive(microbatch, soon());
    const std::size_t index = received.slot;
    const View slot = in_.slot(index);
    const std::vector<std::byte> expected = pattern(microbatch, size);
    REQUIRE(received.as_planned == (size == slot.bytes));
    if (!received.as_planned) REQUIRE(received.shapes == std::vector<Shape>{{static_cast<std::int64_t>(size)}});
    REQUIRE(std::equal(expected.begin(), expected.end(), slot.data));
    REQUIRE(all(slot.data + size, slot.data + slot.bytes, left_in_[index]));
    REQUIRE(page_untouched(slot));
    held_.push_back(index);
  }

 private:
  RecvChannel& in_;
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

TEST_CASE("Channel: random sizes with guard bytes, small and large, slots released in any order") {
  const auto progress = make_progress();
  for (const std::size_t capacity : {1u, 100u, 16384u, 16385u, 100000u, 1u << 20}) {
    CAPTURE(capacity);
    Ring ring(progress, capacity, 3);
    Receiver receiver(ring.in, static_cast<unsigned>(rank()));
    std::vector<Guarded> sent;
    const std::vector<std::size_t> sizes = random_sizes(capacity, 25);
    std::size_t bytes = 0;
    for (std::size_t microbatch = 0; microbatch < sizes.size(); ++microbatch) {
      const std::size_t size = sizes[microbatch];
      sent.emplace_back(pattern(static_cast<std::int64_t>(microbatch), size));
      ring.send(static_cast<std::int64_t>(microbatch), sent.back().data(), size, soon());
      receiver.receive(static_cast<std::int64_t>(microbatch), size);
      bytes += size;
    }
    ring.out.drain(soon());
    for (std::size_t microbatch = 0; microbatch < sizes.size(); ++microbatch) {
      CHECK(sent[microbatch].untouched(pattern(static_cast<std::int64_t>(microbatch), sizes[microbatch])));
    }
    CHECK(ring.out.in_flight() == 0);
    CHECK(ring.out.traffic().messages == 25);
    CHECK(ring.in.traffic().messages == 25);
    CHECK(ring.out.traffic().payload_bytes == bytes);
    CHECK(ring.in.traffic().payload_bytes == bytes);
  }
  barrier(*progress);
}

// Each end has its own thread, and all share one Progress:
//
//   rank 0   out 0 ──►   rank 1   in 0        senders run ahead until two sends are in flight
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
      std::vector<std::byte> alive[2];  // as send() requires
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
  barrier(*progress);
}

//   slot 0   microbatch 0, in use .................... | 1 | 2 | 3
//   sends    0 done   1 in flight   2 in flight   3 waits
TEST_CASE("Channel: the third send in flight waits") {
  const auto progress = make_progress();
  Ring ring(progress, large, 1);
  std::vector<std::vector<std::byte>> data;
  for (int microbatch = 0; microbatch < 4; ++microbatch) data.push_back(pattern(microbatch, large));
  ring.send(0, data[0]);
  std::size_t slot = ring.in.receive(0, soon()).slot;
  ring.send(1, data[1]);
  ring.send(2, data[2]);
  CHECK(ring.out.in_flight() == 2);
  const std::string words = " s to send microbatch 3 of the run: the test's bytes to " + name_of_next() +
                            "; 3 messages sent so far, of which " + name_of_next() + " has not taken the last";
  CHECK_THROWS_WITH_AS(ring.send(3, data[3].data(), large, up_to(0.2)), doctest::Contains(words.c_str()), StallError);
  CHECK(ring.out.in_flight() == 2);
  barrier(*progress);  // no rank releases a slot before all ranks have checked this
  auto sending = std::async(std::launch::async, [&] { ring.send(3, data[3]); });
  for (int microbatch = 1; microbatch < 4; ++microbatch) {
    ring.in.release(slot);
    slot = ring.in.receive(microbatch, soon()).slot;
    CHECK(std::equal(data[microbatch].begin(), data[microbatch].end(), ring.in.slot(slot).data));
  }
  sending.get();
  ring.out.drain(soon());
  CHECK(ring.out.in_flight() == 0);
  barrier(*progress);
}

TEST_CASE("Channel: slots are reused, nothing is allocated") {
  const auto progress = make_progress();
  for (const std::size_t capacity : {1000u, 100000u}) {
    Ring ring(progress, capacity, 2);
    const std::size_t before = allocations();
    const std::vector<std::byte> data = pattern(0, capacity);
    std::set<const void*> addresses;
    for (int microbatch = 0; microbatch < 20; ++microbatch) {
      ring.send(microbatch, data);
      const std::size_t slot = ring.in.receive(microbatch, soon()).slot;
      addresses.insert(ring.in.slot(slot).data);
      ring.in.release(slot);
    }
    ring.out.drain(soon());
    CHECK(addresses.size() == 2);
    CHECK(allocations() == before);
  }
  barrier(*progress);
}

TEST_CASE("Channel: ready() does not wait") {
  const auto progress = make_progress();
  Ring ring(progress, 10);
  CHECK_FALSE(ring.in.ready());
  barrier(*progress);
  ring.send(0, pattern(0, 10));
  while (!ring.in.ready()) std::this_thread::yield();
  ring.in.receive(0, up_to(0));
  barrier(*progress);
}

TEST_CASE("Channel: a message that differs from the plan is refused, and the error names it") {
  struct Fault {
    std::int64_t microbatch;
    std::string dtype;
    Shape shape;
    std::string words;
  };
  const std::string expected = " expected float32 [4, 3] (or smaller) but got ";
  const Fault faults[] = {
      {5, "float32", {2, 3}, " expected microbatch 4 of the run but got microbatch 5 of the run: "},
      {4, "float64", {2, 3}, expected + "float64 [2, 3] for microbatch 4 of the run: "},
      {4, "float32", {2, 4}, expected + "float32 [2, 4] for microbatch 4 of the run: "},
      {4, "float32", {5, 3}, expected + "float32 [5, 3] for microbatch 4 of the run: "},
      {4, "float32", {6}, expected + "float32 [6] for microbatch 4 of the run: "},
      {4, "float32", {}, expected + "float32 [] for microbatch 4 of the run: "},
  };
  const auto progress = make_progress();
  for (const Fault& fault : faults) {
    const TensorSpec expects{"the test's bytes", "float32", 4, {4, 3}},
        sends{"the test's bytes", fault.dtype, 1, fault.shape};
    Ring ring(progress, {0, 0, {sends}}, {0, 0, {expects}}, 1);
    const std::vector<std::byte> data(64);
    ring.out.send(fault.microbatch, {{data.data(), fault.shape}}, soon());
    const std::string words = name_of_this() + fault.words + "the test's bytes from " + name_of_previous();
    CHECK_THROWS_WITH_AS(ring.in.receive(4, soon()), words.c_str(), MessageError);
    ring.out.drain(soon());
    barrier(*progress);
  }
}

TEST_CASE("Channel: a message that does not fit is not sent") {
  const auto progress = make_progress();
  Ring ring(progress, 10);
  const std::vector<std::byte> data(11);
  const std::string words =
      name_of_this() +
      ": the test's bytes of microbatch 3 of the run is uint8 [11], 11 bytes, but the channel was planned for 10";
  CHECK_THROWS_WITH_AS(ring.send(3, data), words.c_str(), MessageError);
  const Shape nine(9, 1), eight(8, 1);
  CHECK_THROWS_AS(ring.out.send(3, {{data.data(), nine}}, soon()), MessageError);
  CHECK_THROWS_AS(ring.out.send(3, {}, soon()), MessageError);
  CHECK(ring.out.traffic().messages == 0);
  CHECK(ring.out.in_flight() == 0);

  const std::string forty(40, 'x');
  CHECK_THROWS_AS(Ring(progress, ChannelSpec{0, 0, {{"the test's bytes", forty + 'x', 1, {10}}}}, 1), MessageError);
  CHECK_THROWS_AS(Ring(progress, ChannelSpec{0, 0, {{"the test's bytes", forty, 1, nine}}}, 1), MessageError);
  CHECK_THROWS_AS(Ring(progress, ChannelSpec{0, 0, {}}, 1), std::invalid_argument);
  Ring longest(progress, ChannelSpec{0, 0, {{"the test's bytes", forty, 1, eight}}}, 1);
  longest.out.send(0, {{data.data(), eight}}, soon());
  CHECK(longest.in.receive(0, soon()).as_planned);
  barrier(*progress);
}

// Three tensors, the second smaller than planned or empty. Every tensor is aligned to a cache line; a large one is in
// its planned place.
TEST_CASE("Channel: several tensors arrive together") {
  const auto progress = make_progress();
  for (const std::int64_t scale : {1, 1000}) {
    CAPTURE(scale);
    const ChannelSpec spec{
        0, 0, {{"a", "int8", 1, {7 * scale}}, {"b", "float32", 4, {5, 3 * scale}}, {"c", "bool", 1, {scale}}}};
    Ring ring(progress, spec, 2);
    for (std::int64_t microbatch = 0; microbatch < 6; ++microbatch) {
      const std::int64_t rows = 5 - microbatch;
      const std::vector<std::byte> a = pattern(1, 7 * scale), b = pattern(2, rows * 3 * scale * 4),
                                   c = pattern(3, scale);
      ring.out.send(microbatch, {{a.data(), {7 * scale}}, {b.data(), {rows, 3 * scale}}, {c.data(), {scale}}}, soon());
      const Received received = ring.in.receive(microbatch, soon());
      CHECK(received.as_planned == (rows == 5));
      if (!received.as_planned) CHECK(received.shapes == std::vector<Shape>{{7 * scale}, {rows, 3 * scale}, {scale}});
      const std::vector<ByteRange> ranges = received.as_planned ? spec.layout() : received.ranges;
      if (scale > 1) CHECK(ranges[2].offset == spec.layout()[2].offset);
      const std::byte* const slot = ring.in.slot(received.slot).data;
      for (const auto& [place, expected] :
           {std::pair(ranges[0], &a), std::pair(ranges[1], &b), std::pair(ranges[2], &c)}) {
        CHECK(place.offset % tensor_alignment == 0);
        CHECK(place.bytes == expected->size());
        CHECK(std::equal(expected->begin(), expected->end(), slot + place.offset));
      }
      ring.in.release(received.slot);
      ring.out.drain(soon());  // before the tensors are destroyed
    }
    CHECK(ring.out.traffic().messages == 6);
  }
  barrier(*progress);
}

TEST_CASE("Channel: a payload beyond the limit of an MPI message is refused when the channel is created") {
  const auto progress = make_progress();
  const ChannelSpec large_spec = spec(next(), 1, std::size_t{1} << 31);
  const char* const words =
      "the test's bytes: 2147483648 bytes exceed the limit of one MPI message (2 GiB): use smaller microbatches";
  CHECK_THROWS_WITH_AS(SendChannel::make(progress, large_spec), words, MessageError);
  CHECK_THROWS_WITH_AS(RecvChannel::make(progress, large_spec, 1), words, MessageError);
  barrier(*progress);
}

TEST_CASE("Channel: a stall names the microbatch and the peer") {
  const auto progress = make_progress();
  Ring ring(progress, 10);
  const std::string waited = name_of_this() + " has waited 0.";
  const std::string first = " s for microbatch 0 of the run: the test's bytes from " + name_of_previous() +
                            "; messages received so far: none";
  CHECK_THROWS_WITH_AS(ring.in.receive(0, up_to(0.1)), doctest::Contains(waited.c_str()), StallError);
  CHECK_THROWS_WITH_AS(ring.in.receive(0, up_to(0.1)), doctest::Contains(first.c_str()), StallError);
  barrier(*progress);
  ring.send(0, pattern(0, 10));
  ring.in.receive(0, soon());
  const std::string second = " s for microbatch 1 of the run: the test's bytes from " + name_of_previous() +
                             "; messages received so far: 1, the last was microbatch 0 of the run";
  CHECK_THROWS_WITH_AS(ring.in.receive(1, up_to(0.1)), doctest::Contains(second.c_str()), StallError);
  barrier(*progress);
}

TEST_CASE("Channel: slots run out") {
  const auto progress = make_progress();
  Ring ring(progress, 10, 1);
  ring.send(0, pattern(0, 10));
  const std::size_t slot = ring.in.receive(0, soon()).slot;
  const std::string words = name_of_this() +
                            ": all 1 slots are in use, so microbatch 1 of the run has none: the test's bytes from " +
                            name_of_previous();
  CHECK_THROWS_WITH_AS(ring.in.receive(1, soon()), words.c_str(), MessageError);
  ring.in.release(slot);
  const std::string unused = "slot 0 is not in use: the test's bytes from " + name_of_previous();
  CHECK_THROWS_WITH_AS(ring.in.release(slot), unused.c_str(), std::logic_error);
  CHECK_THROWS_AS(ring.in.release(1), std::out_of_range);
  CHECK_THROWS_AS(Ring(progress, 10, 0), std::invalid_argument);
  barrier(*progress);
}

// Regression: the staging buffer was freed with its channel while MPI still read it. A message between 4 and 16 KiB is
// neither eager nor sent from the caller's memory.
TEST_CASE("Channel: a message arrives although its channel was destroyed") {
  const auto progress = make_progress();
  for (const std::size_t capacity : {1000u, 16384u, unsigned{large}}) {
    CAPTURE(capacity);
    const std::vector<std::byte> data = pattern(0, capacity);
    const Shape shape{static_cast<std::int64_t>(capacity)};
    SendChannel::make(progress, spec(next(), 1, capacity))->send(0, {{data.data(), shape}}, soon());
    const std::vector<std::vector<std::byte>> others(20, std::vector<std::byte>(16384 + sizeof(Header), guard));
    barrier(*progress);
    const auto channel = RecvChannel::make(progress, spec(previous(), 1, capacity), 1);
    const Received received = channel->receive(0, soon());
    CHECK(received.as_planned);
    CHECK(std::equal(data.begin(), data.end(), channel->slot(received.slot).data));
    barrier(*progress);  // keep `data` until all ranks have received it
  }
}

TEST_CASE("Channel: destroyed ends leave nothing behind for the next channel") {
  const auto progress = make_progress();
  const std::vector<std::byte> data = pattern(0, 1000);
  for (int again = 0; again < 20; ++again) {
    {
      const auto receiver = RecvChannel::make(progress, spec(previous(), 1, 1000), 3);
      const auto sender = SendChannel::make(progress, spec(next(), 1, 1000));
      sender->send(again, {{data.data(), {1000}}}, soon());
      const std::size_t slot = receiver->receive(again, soon()).slot;
      CHECK(std::equal(data.begin(), data.end(), receiver->slot(slot).data));
      sender->drain(soon());
    }
    barrier(*progress);  // all receivers are destroyed before the next message is sent
  }
}

TEST_CASE("Channel: both ends are destroyed during a large message") {
  const auto progress = make_progress();
  const std::vector<std::byte> data = pattern(0, large);
  {
    Ring(progress, large, 2).send(0, data);
  }
  Ring ring(progress, large, 2);
  barrier(*progress);
  ring.send(7, data);
  const std::size_t slot = ring.in.receive(7, soon()).slot;
  CHECK(std::equal(data.begin(), data.end(), ring.in.slot(slot).data));
  ring.out.drain(soon());
  progress->close();
  barrier();
}

}  // namespace
}  // namespace pipedream
