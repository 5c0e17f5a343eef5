#include <doctest/doctest.h>

#include <chrono>
#include <future>
#include <stdexcept>
#include <thread>
#include <utility>

#include "progress.hpp"
#include "ranks.hpp"

namespace pipedream {
namespace {

constexpr std::size_t large = 1 << 20;

void sleep_a_little() { std::this_thread::sleep_for(std::chrono::milliseconds(1)); }

// Waits that tell when they have gone on for a while.
Waiting telling(std::promise<void>& begun) {
  return {60, [&begun, told = false]() mutable {
            if (!std::exchange(told, true)) begun.set_value();
          }};
}

// Without a poll.
bool failed(Progress& progress) {
  const Progress::Lock held = progress.lock();
  try {
    progress.check_usable();
    return false;
  } catch (const MpiError&) {
    return true;
  }
}

//   main       | no call to MPI at all ............... |
//   progress   | poll   poll   poll: two sent, two here |
TEST_CASE("Progress: a large message goes and comes while the main thread computes") {
  const auto progress = make_progress();
  Ring ring(progress, large);
  const std::vector<std::byte> data = pattern(1, large);
  const std::uint64_t before = progress->statistics().completions;
  meet(*progress);
  const std::uint64_t polls_waiting = progress->statistics().polls_waiting;
  ring.send(0, data);
  while (progress->statistics().completions < before + 5) sleep_a_little();  // to meet; headers and payloads
  CHECK(progress->statistics().polls_waiting == polls_waiting);
  CHECK(progress->statistics().polls_computing > 0);
  const std::size_t slot = ring.in.receive(0, up_to(0)).slot;
  CHECK(std::equal(data.begin(), data.end(), ring.in.slot(slot).data));
  meet(*progress);
}

TEST_CASE("Progress: a wait can be interrupted, and waited again") {
  struct Interrupt {};
  const auto progress = make_progress();
  Ring ring(progress, 10);
  int asked = 0;
  const Waiting waiting{60, [&asked] {
                          if (++asked == 2) throw Interrupt();
                        }};
  CHECK_THROWS_AS(ring.in.receive(0, waiting), Interrupt);
  CHECK(asked == 2);
  meet(*progress);
  ring.send(0, pattern(0, 10));
  ring.in.receive(0, soon());
  meet(*progress);
}

TEST_CASE("Progress: while one thread is interrupted others wait on") {
  struct Interrupt {};
  const auto progress = make_progress();
  Ring first(progress, 10), second(progress, 10);
  auto waits = std::async(std::launch::async, [&] { second.in.receive(0, soon()); });
  CHECK_THROWS_AS(first.in.receive(0, {60, [] { throw Interrupt(); }}), Interrupt);
  meet(*progress);
  second.send(0, pattern(0, 10));
  waits.get();
  meet(*progress);
}

TEST_CASE("Progress: a call that fails names rank, call, purpose and peer") {
  const auto progress = make_progress();
  const std::string who = name_of_this() + ": ";
  const std::vector<std::byte> data(10);
  const auto channel = SendChannel::make(progress, line(99, 0, 1 << 20));
  const std::string words = who + "MPI_Isend failed for the test's bytes, minibatch ";
  CHECK_THROWS_WITH_AS(channel->send(7, {{data.data(), {10}}}, soon()), doctest::Contains(words.c_str()), MpiError);
  CHECK_THROWS_WITH_AS(channel->send(7, {{data.data(), {10}}}, soon()), doctest::Contains("to rank 99: MPI_ERR_RANK"),
                       MpiError);
  const std::string receive =
      who + "MPI_Irecv failed for the test's bytes from rank 99, after 0 messages: MPI_ERR_RANK";
  CHECK_THROWS_WITH_AS(ReceiveChannel::make(progress, line(99, 0, 10), 1), doctest::Contains(receive.c_str()),
                       MpiError);
  meet(*progress);
}

// The ends disagree about the capacity, and MPI cuts the message. Whoever polls meets the failure: a thread
// that waits for something else, or the progress thread.
TEST_CASE("Progress: a failure stays, whichever thread met it") {
  for (const bool somebody_waits : {false, true}) {
    CAPTURE(somebody_waits);
    const auto progress = make_progress();
    Ring other(progress, 10);
    const auto out = SendChannel::make(progress, line(next(), 0, 1000));
    const std::vector<std::byte> data(1000);
    out->send(0, {{data.data(), {1000}}}, soon());
    meet(*progress);
    std::promise<void> begun;
    std::future<void> waits;
    if (somebody_waits) {
      waits = std::async(std::launch::async, [&] { other.in.receive(0, telling(begun)); });
      begun.get_future().get();
    }
    const auto in = ReceiveChannel::make(progress, line(previous(), 0, 500), 2);
    const std::string words =
        name_of_this() + ": MPI_Irecv failed for the test's bytes from " + name_of_previous() + ", after 0 messages: ";
    if (somebody_waits) {
      CHECK_THROWS_WITH_AS(waits.get(), doctest::Contains(words.c_str()), MpiError);
    } else {
      while (!failed(*progress)) sleep_a_little();
    }
    CHECK_THROWS_WITH_AS(in->receive(0, soon()), doctest::Contains(words.c_str()), MpiError);
    CHECK_THROWS_WITH_AS(in->receive(0, soon()), doctest::Contains("MPI_ERR_TRUNCATE"), MpiError);
    CHECK_THROWS_AS(other.in.receive(0, soon()), MpiError);
    CHECK_THROWS_AS(other.in.ready(), MpiError);
    meet();
  }
}

// Used to end the whole job: the communicator was gone, and with it the way errors come back.
TEST_CASE("Progress: who uses a channel after close() is told so") {
  const auto progress = make_progress();
  Ring ring(progress, 10);
  meet(*progress);
  progress->close();
  progress->close();
  const std::string words = name_of_this() + ": the channels are closed";
  CHECK_THROWS_WITH_AS(ring.send(0, pattern(0, 10)), words.c_str(), CoreError);
  CHECK_THROWS_WITH_AS(ring.in.receive(0, soon()), words.c_str(), CoreError);
  CHECK_THROWS_WITH_AS(ring.in.ready(), words.c_str(), CoreError);
  CHECK_THROWS_WITH_AS(Ring(progress, 10), words.c_str(), CoreError);
  meet();
}

TEST_CASE("Progress: close() ends the waits of other threads") {
  const auto progress = make_progress();
  Ring ring(progress, 10);
  std::promise<void> begun;
  auto waits = std::async(std::launch::async, [&] { ring.in.receive(0, telling(begun)); });
  begun.get_future().get();
  meet(*progress);
  progress->close();
  CHECK_THROWS_AS(waits.get(), CoreError);
  meet();
}

// The next communicator gets the number of one that was freed, and found what was still under way on it: MPI
// then ended the job without a word.
TEST_CASE("Progress: comes and goes with messages under way that nobody takes") {
  static const std::vector<std::byte> data = pattern(0, large);
  for (int again = 0; again < 10; ++again) {
    const auto progress = make_progress();
    Ring ring(progress, large, 2), unused(progress, 100, 2);
    meet(*progress);
    ring.send(0, data);
    while (!ring.in.ready()) sleep_a_little();
    if (again % 2) ring.in.receive(0, soon());
    if (again % 3 == 0) progress->close();
  }
  meet();
}

// What is none of ours: a tag that another library uses on our communicator, say.
TEST_CASE("Progress: a foreign message is refused") {
  struct Foreign final : Endpoint {
    std::shared_ptr<std::vector<std::byte>> bytes = std::make_shared<std::vector<std::byte>>(sizeof(Header) + 5, guard);
    int done = 0;
    std::shared_ptr<void> memory(std::size_t) const override { return bytes; }
    void completed(std::size_t) override { ++done; }
    std::string describe(std::size_t) const override { return "a foreign message"; }
  } foreign;
  const auto progress = make_progress();
  const auto in = ReceiveChannel::make(progress, line(previous(), 3, 10), 1);
  {
    const Progress::Lock held = progress->lock();
    foreign.done += progress->send(&foreign, 0, foreign.bytes->data(), foreign.bytes->size(), next(), 6);
  }
  const std::string words = name_of_this() +
                            ": a message that is none of ours came on the channel for the test's bytes from " +
                            name_of_previous();
  CHECK_THROWS_WITH_AS(in->receive(0, soon()), words.c_str(), MessageError);
  progress->wait([&] { return foreign.done == 1; }, up_to(60), [](double) { return std::exception_ptr(); });
  meet(*progress);
  progress->forget(&foreign);
}

}  // namespace
}  // namespace pipedream
