// Channels for device memory, on a device that is none (fake_device.hpp): both ways, any chunk, any order.
#include <doctest/doctest.h>

#include <chrono>
#include <future>
#include <thread>

#include "channel.hpp"
#include "fake_device.hpp"
#include "ranks.hpp"

namespace pipedream {
namespace {

std::shared_ptr<Progress> with_device() { return std::make_shared<Progress>(MPI_COMM_WORLD, true, 0); }

Line on_device(std::vector<Part> parts, Route route, std::size_t chunk = 1000) {
  return {0, 0, std::move(parts), Where::device, route, chunk};
}

// Everything put on a stream so far is done.
void wait_for(const cuda::Stream& stream) {
  cuda::Event event;
  event.record(stream.handle());
  while (!event.happened()) std::this_thread::sleep_for(std::chrono::microseconds(50));
}

#ifdef __SANITIZE_THREAD__
constexpr bool under_thread_sanitizer = true;
#else
constexpr bool under_thread_sanitizer = false;
#endif

constexpr Route routes[] = {Route::direct, Route::staged};

TEST_CASE("Device: random sizes, in chunks or whole, slots given back in any order") {
  const auto progress = with_device();
  const cuda::Stream compute;
  for (const Route route : routes) {
    for (const std::size_t capacity : {1u, 999u, 1000u, 1001u, 20000u}) {
      CAPTURE(static_cast<int>(route));
      CAPTURE(capacity);
      Ring ring(progress, on_device({part(capacity)}, route), 3);
      std::mt19937 draw(static_cast<unsigned>(capacity));
      std::vector<std::vector<std::byte>> sent;
      std::deque<std::size_t> held;
      for (std::int64_t minibatch = 0; minibatch < 12; ++minibatch) {
        const std::size_t size =
            minibatch < 2 ? capacity * static_cast<std::size_t>(minibatch) : draw() % (capacity + 1);
        sent.push_back(pattern(minibatch, size));
        ring.out.send(minibatch, {{sent.back().data(), {std::int64_t(size)}}}, soon(), compute.handle());
        const Arrived arrived = ring.in.receive(minibatch, soon());
        CHECK(shape_of(arrived, {std::int64_t(capacity)}) == Shape{std::int64_t(size)});
        CHECK(std::equal(sent.back().begin(), sent.back().end(), ring.in.slot(arrived.slot).data));
        held.push_back(arrived.slot);
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
  meet(*progress);
}

TEST_CASE("Device: several tensors are one message, and nothing is allocated") {
  const auto progress = with_device();
  const cuda::Stream compute;
  for (const Route route : routes) {
    const Line line =
        on_device({{"a", "int8", 1, {70}}, {"b", "float32", 4, {5, 300}}, {"c", "bool", 1, {1000}}}, route);
    Ring ring(progress, line, 2);
    const std::size_t before = allocations();
    for (std::int64_t minibatch = 0; minibatch < 6; ++minibatch) {
      const std::int64_t rows = 5 - minibatch;
      const std::vector<std::byte> a = pattern(1, 70), b = pattern(2, std::size_t(rows) * 1200), c = pattern(3, 1000);
      ring.out.send(minibatch, {{a.data(), {70}}, {b.data(), {rows, 300}}, {c.data(), {1000}}}, soon(),
                    compute.handle());
      const Arrived arrived = ring.in.receive(minibatch, soon());
      const std::vector<Place> places = arrived.whole ? line.places() : arrived.places;
      const std::byte* const slot = ring.in.slot(arrived.slot).data;
      CHECK(std::equal(a.begin(), a.end(), slot + places[0].offset));
      CHECK(std::equal(b.begin(), b.end(), slot + places[1].offset));
      CHECK(std::equal(c.begin(), c.end(), slot + places[2].offset));
      ring.in.release(arrived.slot, compute.handle());
      ring.out.drain(soon());  // before the tensors go
    }
    CHECK(allocations() == before);
  }
  meet(*progress);
}

TEST_CASE("Device: many tensors are packed by one kernel, whatever their sizes") {
  const auto progress = with_device();
  const cuda::Stream compute;
  for (const Route route : routes) {
    CAPTURE(static_cast<int>(route));
    std::vector<Part> parts;
    for (int number = 0; number < 70; ++number) parts.push_back(part(500));
    const Line line = on_device(parts, route);
    Ring ring(progress, line, 2);
    std::mt19937 draw(7);
    const std::size_t before = fake::kernels();
    for (std::int64_t minibatch = 0; minibatch < 3; ++minibatch) {
      std::vector<std::vector<std::byte>> sent;
      std::vector<Piece> tensors;
      for (std::size_t number = 0; number < parts.size(); ++number) {
        sent.push_back(pattern(std::int64_t(number), draw() % 501));
        tensors.push_back({sent.back().data(), {std::int64_t(sent.back().size())}});
      }
      ring.out.send(minibatch, tensors, soon(), compute.handle());
      const Arrived arrived = ring.in.receive(minibatch, soon());
      const std::byte* const slot = ring.in.slot(arrived.slot).data;
      const std::vector<Place> places = arrived.whole ? line.places() : arrived.places;
      for (std::size_t number = 0; number < parts.size(); ++number) {
        CAPTURE(number);
        CHECK(std::equal(sent[number].begin(), sent[number].end(), slot + places[number].offset));
      }
      ring.in.release(arrived.slot, compute.handle());
      ring.out.drain(soon());  // before the tensors go
    }
    CHECK(fake::kernels() - before == (route == Route::direct ? 3 : 0));
  }
  meet(*progress);
}

//   compute stream   kernel writes 7s ............ ●
//   send             called here ─┘                └─ copied from here on                     time ->
TEST_CASE("Device: a send waits for the kernel that writes the tensor, and would not without the event") {
  const auto progress = with_device();
  const cuda::Stream compute;
  for (const Route route : routes) {
    for (const bool waits : {true, false}) {
      if (!waits && under_thread_sanitizer) continue;  // to read too early is a race, and that is the point
      CAPTURE(static_cast<int>(route));
      CAPTURE(waits);
      fake::ignore_waits(!waits);
      Ring ring(progress, on_device({part(5000)}, route), 1);
      std::vector<std::byte> data(5000, std::byte{1});
      std::promise<void> too_late;  // nothing waits: the message has arrived before the kernel ends
      fake::launch(compute.handle(), [&] {
        waits ? std::this_thread::sleep_for(std::chrono::milliseconds(50)) : too_late.get_future().wait();
        std::fill(data.begin(), data.end(), std::byte{7});
      });
      ring.out.send(0, {{data.data(), {5000}}}, soon(), compute.handle());
      const std::size_t slot = ring.in.receive(0, soon()).slot;
      meet(*progress);  // what this rank has sent has arrived too
      too_late.set_value();
      const std::byte* const got = ring.in.slot(slot).data;
      CHECK(all(got, got + 5000, waits ? std::byte{7} : std::byte{1}));
      wait_for(compute);
      ring.out.drain(soon());
      meet(*progress);
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
    Ring ring(progress, on_device({part(5000)}, route), 1);
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
    meet(*progress);
  }
}

TEST_CASE("Device: channels go away in the middle of a message") {
  const auto progress = with_device();
  const cuda::Stream compute;
  const std::vector<std::byte> data = pattern(0, 100000);
  for (const Route route : routes) {
    {
      Ring ring(progress, on_device({part(data.size())}, route), 2);
      ring.out.send(0, {{data.data(), {std::int64_t(data.size())}}}, soon(), compute.handle());
    }
    meet(*progress);
  }
  progress->close();
  meet();
}

}  // namespace
}  // namespace pipedream
