// Channels for device memory, on a fake device (fake_device.hpp): both routes, any chunk size, any order.
#include <doctest/doctest.h>

#include <chrono>
#include <future>
#include <thread>

#include "comm/channel.hpp"
#include "fake_device.hpp"
#include "ranks.hpp"

namespace pipedream {
namespace {

std::shared_ptr<Progress> with_device() { return std::make_shared<Progress>(MPI_COMM_WORLD, true, 0); }

ChannelSpec on_device(std::vector<TensorSpec> tensors, Route route, std::size_t chunk = 1000) {
  return {0, 0, std::move(tensors), MemoryKind::device, route, chunk};
}

// Waits for the work queued on a stream so far.
void wait_for(const cuda::Stream& stream) {
  cuda::Event event;
  event.record(stream.handle());
  while (!event.query()) std::this_thread::sleep_for(std::chrono::microseconds(50));
}

#ifdef __SANITIZE_THREAD__
constexpr bool under_thread_sanitizer = true;
#else
constexpr bool under_thread_sanitizer = false;
#endif

constexpr Route routes[] = {Route::direct, Route::staged};

TEST_CASE("Device: random sizes, in chunks or whole, slots released in any order") {
  const auto progress = with_device();
  const cuda::Stream compute;
  for (const Route route : routes) {
    for (const std::size_t capacity : {1u, 999u, 1000u, 1001u, 20000u}) {
      CAPTURE(static_cast<int>(route));
      CAPTURE(capacity);
      Ring ring(progress, on_device({tensor_spec(capacity)}, route), 3);
      std::mt19937 draw(static_cast<unsigned>(capacity));
      std::vector<std::vector<std::byte>> sent;
      std::deque<std::size_t> held;
      for (std::int64_t microbatch = 0; microbatch < 12; ++microbatch) {
        const std::size_t size =
            microbatch < 2 ? capacity * static_cast<std::size_t>(microbatch) : draw() % (capacity + 1);
        sent.push_back(pattern(microbatch, size));
        ring.out.send(microbatch, {{sent.back().data(), {std::int64_t(size)}}}, soon(), compute.handle());
        const Received received = ring.in.receive(microbatch, soon());
        CHECK(shape_of(received, {std::int64_t(capacity)}) == Shape{std::int64_t(size)});
        CHECK(std::equal(sent.back().begin(), sent.back().end(), ring.in.slot(received.slot).data));
        held.push_back(received.slot);
        if (held.size() == 3) {
          if (draw() % 2) std::swap(held[0], held[1]);
          ring.in.release(held.front(), compute.handle());
          held.pop_front();
        }
      }
      ring.out.drain(soon());
      CHECK(ring.out.in_flight() == 0);
    }
  }
  barrier(*progress);
}

TEST_CASE("Device: several tensors are one message, and nothing is allocated") {
  const auto progress = with_device();
  const cuda::Stream compute;
  for (const Route route : routes) {
    const ChannelSpec spec =
        on_device({{"a", "int8", 1, {70}}, {"b", "float32", 4, {5, 300}}, {"c", "bool", 1, {1000}}}, route);
    Ring ring(progress, spec, 2);
    const std::size_t before = allocations();
    for (std::int64_t microbatch = 0; microbatch < 6; ++microbatch) {
      const std::int64_t rows = 5 - microbatch;
      const std::vector<std::byte> a = pattern(1, 70), b = pattern(2, std::size_t(rows) * 1200), c = pattern(3, 1000);
      ring.out.send(microbatch, {{a.data(), {70}}, {b.data(), {rows, 300}}, {c.data(), {1000}}}, soon(),
                    compute.handle());
      const Received received = ring.in.receive(microbatch, soon());
      const std::vector<ByteRange> ranges = received.as_planned ? spec.layout() : received.ranges;
      const std::byte* const slot = ring.in.slot(received.slot).data;
      CHECK(std::equal(a.begin(), a.end(), slot + ranges[0].offset));
      CHECK(std::equal(b.begin(), b.end(), slot + ranges[1].offset));
      CHECK(std::equal(c.begin(), c.end(), slot + ranges[2].offset));
      ring.in.release(received.slot, compute.handle());
      ring.out.drain(soon());  // before the tensors are destroyed
    }
    CHECK(allocations() == before);
  }
  barrier(*progress);
}

TEST_CASE("Device: many tensors of any size are packed by one kernel") {
  const auto progress = with_device();
  const cuda::Stream compute;
  for (const Route route : routes) {
    CAPTURE(static_cast<int>(route));
    const std::vector<TensorSpec> specs(70, tensor_spec(500));
    const ChannelSpec spec = on_device(specs, route);
    Ring ring(progress, spec, 2);
    std::mt19937 draw(7);
    const std::size_t before = fake::kernels();
    for (std::int64_t microbatch = 0; microbatch < 3; ++microbatch) {
      std::vector<std::vector<std::byte>> sent;
      std::vector<TensorRef> tensors;
      for (std::size_t number = 0; number < specs.size(); ++number) {
        sent.push_back(pattern(std::int64_t(number), draw() % 501));
        tensors.push_back({sent.back().data(), {std::int64_t(sent.back().size())}});
      }
      ring.out.send(microbatch, tensors, soon(), compute.handle());
      const Received received = ring.in.receive(microbatch, soon());
      const std::byte* const slot = ring.in.slot(received.slot).data;
      const std::vector<ByteRange> ranges = received.as_planned ? spec.layout() : received.ranges;
      for (std::size_t number = 0; number < specs.size(); ++number) {
        CAPTURE(number);
        CHECK(std::equal(sent[number].begin(), sent[number].end(), slot + ranges[number].offset));
      }
      ring.in.release(received.slot, compute.handle());
      ring.out.drain(soon());  // before the tensors are destroyed
    }
    CHECK(fake::kernels() - before == (route == Route::direct ? 3 : 0));
  }
  barrier(*progress);
}

//   compute stream   kernel writes 7s ............ ●
//   send             called here ─┘                └─ copied from here on                     time ->
TEST_CASE("Device: a send waits for the kernel that writes the tensor, and would not without the event") {
  const auto progress = with_device();
  const cuda::Stream compute;
  for (const Route route : routes) {
    for (const bool waits : {true, false}) {
      if (!waits && under_thread_sanitizer) continue;  // the early read is a data race on purpose
      CAPTURE(static_cast<int>(route));
      CAPTURE(waits);
      fake::ignore_waits(!waits);
      Ring ring(progress, on_device({tensor_spec(5000)}, route), 1);
      std::vector<std::byte> data(5000, std::byte{1});
      std::promise<void> too_late;  // without waits the message arrives before the kernel ends
      fake::launch(compute.handle(), [&] {
        waits ? std::this_thread::sleep_for(std::chrono::milliseconds(50)) : too_late.get_future().wait();
        std::fill(data.begin(), data.end(), std::byte{7});
      });
      ring.out.send(0, {{data.data(), {5000}}}, soon(), compute.handle());
      const std::size_t slot = ring.in.receive(0, soon()).slot;
      barrier(*progress);  // this rank's message has arrived too
      too_late.set_value();
      const std::byte* const got = ring.in.slot(slot).data;
      CHECK(all(got, got + 5000, waits ? std::byte{7} : std::byte{1}));
      wait_for(compute);
      ring.out.drain(soon());
      barrier(*progress);
    }
  }
  fake::ignore_waits(false);
}

//   compute stream   kernel reads slot 0 .......... ●
//   release          called here ─┘                 └─ the next message may land
TEST_CASE("Device: a slot is not written while a kernel still reads it") {
  const auto progress = with_device();
  const cuda::Stream compute;
  for (const Route route : routes) {
    CAPTURE(static_cast<int>(route));
    Ring ring(progress, on_device({tensor_spec(5000)}, route), 1);
    const std::vector<std::byte> first(5000, std::byte{1}), second(5000, std::byte{2});
    ring.out.send(0, {{first.data(), {5000}}}, soon(), compute.handle());
    ring.out.send(1, {{second.data(), {5000}}}, soon(), compute.handle());
    const std::size_t slot = ring.in.receive(0, soon()).slot;
    const std::byte* const memory = ring.in.slot(slot).data;
    bool undisturbed = false;
    fake::launch(compute.handle(), [&] {
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
      undisturbed = all(memory, memory + 5000, std::byte{1});
    });
    ring.in.release(slot, compute.handle());
    CHECK(ring.in.receive(1, soon()).slot == slot);
    CHECK(all(memory, memory + 5000, std::byte{2}));
    wait_for(compute);
    CHECK(undisturbed);
    ring.out.drain(soon());
    barrier(*progress);
  }
}

TEST_CASE("Device: channels are destroyed during a message") {
  const auto progress = with_device();
  const cuda::Stream compute;
  const std::vector<std::byte> data = pattern(0, 100000);
  for (const Route route : routes) {
    {
      Ring ring(progress, on_device({tensor_spec(data.size())}, route), 2);
      ring.out.send(0, {{data.data(), {std::int64_t(data.size())}}}, soon(), compute.handle());
    }
    barrier(*progress);
  }
  progress->close();
  barrier();
}

}  // namespace
}  // namespace pipedream
