#include <doctest/doctest.h>

#include <chrono>
#include <future>
#include <stdexcept>
#include <thread>
#include <utility>

#include "comm/progress.hpp"
#include "ranks.hpp"

namespace pipedream {
namespace {

constexpr std::size_t large = 1 << 20;

void sleep_a_little() { std::this_thread::sleep_for(std::chrono::milliseconds(1)); }

// Options of a wait that sets `begun` after about 50 ms.
WaitOptions telling(std::promise<void>& begun) {
  return {60, [&begun, told = false]() mutable {
            if (!std::exchange(told, true)) begun.set_value();
          }};
}

// Whether an MPI call has failed; does not poll.
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
//   progress   | poll   poll   poll: two sent, two received |
TEST_CASE("Progress: large messages are sent and received while the main thread computes") {
  const auto progress = make_progress();
  Ring ring(progress, large);
  const std::vector<std::byte> data = pattern(1, large);
  const std::uint64_t before = progress->statistics().completions;
  barrier(*progress);
  const std::uint64_t polls_waiting = progress->statistics().polls_waiting;
  ring.send(0, data);
  while (progress->statistics().completions < before + 5) sleep_a_little();  // the barrier; headers and payloads
  CHECK(progress->statistics().polls_waiting == polls_waiting);
  CHECK(progress->statistics().polls_computing > 0);
  const std::size_t slot = ring.in.receive(0, up_to(0)).slot;
  CHECK(std::equal(data.begin(), data.end(), ring.in.slot(slot).data));
  barrier(*progress);
}

// Two tensors of consecutive bytes: one message each, because as one message they would be copied piece by piece.
TEST_CASE("Progress: each large tensor is a message of its own") {
  const auto progress = make_progress();
  const TensorSpec tensor{"the test's bytes", "uint8", 1, {large}};
  Ring ring(progress, ChannelSpec{0, 0, {tensor, tensor}}, 2);
  const std::vector<std::byte> first = pattern(1, large), second = pattern(2, large);
  const std::uint64_t before = progress->statistics().completions;
  barrier(*progress);
  ring.out.send(0, {{first.data(), {large}}, {second.data(), {large}}}, soon());
  const std::size_t slot = ring.in.receive(0, soon()).slot;
  ring.out.drain(soon());
  // The barrier; headers and two tensors, sent and received.
  CHECK(progress->statistics().completions == before + 1 + 2 * 3);
  CHECK(std::equal(first.begin(), first.end(), ring.in.slot(slot).data));
  CHECK(std::equal(second.begin(), second.end(), ring.in.slot(slot).data + large));
  barrier(*progress);
}

TEST_CASE("Progress: a wait can be interrupted and repeated") {
  struct Interrupt {};
  const auto progress = make_progress();
  Ring ring(progress, 10);
  int asked = 0;
  const WaitOptions waiting{60, [&asked] {
                              if (++asked == 2) throw Interrupt();
                            }};
  CHECK_THROWS_AS(ring.in.receive(0, waiting), Interrupt);
  CHECK(asked == 2);
  barrier(*progress);
  ring.send(0, pattern(0, 10));
  ring.in.receive(0, soon());
  barrier(*progress);
}

TEST_CASE("Progress: an interrupt of one thread leaves other waits running") {
  struct Interrupt {};
  const auto progress = make_progress();
  Ring first(progress, 10), second(progress, 10);
  auto waits = std::async(std::launch::async, [&] { second.in.receive(0, soon()); });
  CHECK_THROWS_AS(first.in.receive(0, {60, [] { throw Interrupt(); }}), Interrupt);
  barrier(*progress);
  second.send(0, pattern(0, 10));
  waits.get();
  barrier(*progress);
}

TEST_CASE("Progress: a failed call names rank, call, purpose and peer") {
  const auto progress = make_progress();
  const std::string who = name_of_this() + ": ";
  const std::vector<std::byte> data(10);
  const auto channel = SendChannel::make(progress, spec(99, 0, 1 << 20));
  const std::string words =
      who + "MPI_Isend failed for the test's bytes, microbatch 7 of the run, to rank 99: MPI_ERR_RANK";
  CHECK_THROWS_WITH_AS(channel->send(7, {{data.data(), {10}}}, soon()), doctest::Contains(words.c_str()), MpiError);
  const std::string receive =
      who + "MPI_Irecv failed for the test's bytes from rank 99, after 0 messages: MPI_ERR_RANK";
  CHECK_THROWS_WITH_AS(RecvChannel::make(progress, spec(99, 0, 10), 1), doctest::Contains(receive.c_str()), MpiError);
  barrier(*progress);
}

// The ends disagree about the capacity, and MPI truncates the message. The failure occurs on the thread that polls: a
// thread that waits for another channel, or the progress thread.
TEST_CASE("Progress: after a failure on any thread, every call fails") {
  for (const bool somebody_waits : {false, true}) {
    CAPTURE(somebody_waits);
    const auto progress = make_progress();
    Ring other(progress, 10);
    const auto out = SendChannel::make(progress, spec(next(), 0, 1000));
    const std::vector<std::byte> data(1000);
    out->send(0, {{data.data(), {1000}}}, soon());
    barrier(*progress);
    std::promise<void> begun;
    std::future<void> waits;
    if (somebody_waits) {
      waits = std::async(std::launch::async, [&] { other.in.receive(0, telling(begun)); });
      begun.get_future().get();
    }
    const auto in = RecvChannel::make(progress, spec(previous(), 0, 500), 2);
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
    barrier();
  }
}

// Regression: this aborted the job, since the communicator and its error handler were freed.
TEST_CASE("Progress: a channel throws after close()") {
  const auto progress = make_progress();
  Ring ring(progress, 10);
  barrier(*progress);
  progress->close();
  progress->close();
  const std::string words = name_of_this() + ": the channels are closed";
  CHECK_THROWS_WITH_AS(ring.send(0, pattern(0, 10)), words.c_str(), CoreError);
  CHECK_THROWS_WITH_AS(ring.in.receive(0, soon()), words.c_str(), CoreError);
  CHECK_THROWS_WITH_AS(ring.in.ready(), words.c_str(), CoreError);
  CHECK_THROWS_WITH_AS(Ring(progress, 10), words.c_str(), CoreError);
  barrier();
}

TEST_CASE("Progress: close() ends the waits of other threads") {
  const auto progress = make_progress();
  Ring ring(progress, 10);
  std::promise<void> begun;
  auto waits = std::async(std::launch::async, [&] { ring.in.receive(0, telling(begun)); });
  begun.get_future().get();
  barrier(*progress);
  progress->close();
  CHECK_THROWS_AS(waits.get(), CoreError);
  barrier();
}

// Regression: a new communicator reuses the context id of a freed one. It received messages that were still in flight,
// and MPI aborted the job without a message.
TEST_CASE("Progress: is created and destroyed with messages in flight that no rank receives") {
  static const std::vector<std::byte> data = pattern(0, large);
  for (int again = 0; again < 10; ++again) {
    const auto progress = make_progress();
    Ring ring(progress, large, 2), unused(progress, 100, 2);
    barrier(*progress);
    ring.send(0, data);
    while (!ring.in.ready()) sleep_a_little();
    if (again % 2) ring.in.receive(0, soon());
    if (again % 3 == 0) progress->close();
  }
  barrier();
}

// A message of another program, for example of a library that uses the same tag.
TEST_CASE("Progress: a foreign message is refused") {
  struct Foreign final : Endpoint {
    std::shared_ptr<std::vector<std::byte>> bytes = std::make_shared<std::vector<std::byte>>(sizeof(Header) + 5, guard);
    int done = 0;
    std::shared_ptr<void> memory(std::size_t) const override { return bytes; }
    void completed(std::size_t) override { ++done; }
    std::string describe(std::size_t) const override { return "a foreign message"; }
  } foreign;
  const auto progress = make_progress();
  const auto in = RecvChannel::make(progress, spec(previous(), 3, 10), 1);
  {
    const Progress::Lock held = progress->lock();
    foreign.done += progress->send(&foreign, 0, foreign.bytes->data(), foreign.bytes->size(), next(), 6);
  }
  const std::string words = name_of_this() +
                            ": a message of another program arrived on the channel for the test's bytes from " +
                            name_of_previous();
  CHECK_THROWS_WITH_AS(in->receive(0, soon()), words.c_str(), MessageError);
  progress->wait([&] { return foreign.done == 1; }, up_to(60), [](double) { return std::exception_ptr(); });
  barrier(*progress);
  progress->forget(&foreign);
}

//   microbatch   ... 99 | 100 101 102 103 | 104 105 106 107 | 108 109
//   minibatch           |        0        |        1        |    2         of epoch 2
TEST_CASE("RunPosition: names microbatches by epoch and minibatch") {
  const RunPosition none;
  CHECK(none.name_of(0) == "microbatch 0 of the run");
  CHECK(none.name_of(109) == "microbatch 109 of the run");
  const RunPosition cut("epoch 2", 100, 4);
  CHECK(cut.name_of(99) == "microbatch 99 of the run");
  CHECK(cut.name_of(100) == "epoch 2, minibatch 0, microbatch 0");
  CHECK(cut.name_of(103) == "epoch 2, minibatch 0, microbatch 3");
  CHECK(cut.name_of(109) == "epoch 2, minibatch 2, microbatch 1");
  const RunPosition whole("epoch 2", 100, 1);
  CHECK(whole.name_of(109) == "epoch 2, minibatch 9");
  CHECK_THROWS_AS(RunPosition("epoch 2", 100, 0), std::invalid_argument);
}

TEST_CASE("Progress: messages name microbatches by the position in the run") {
  const auto progress = make_progress();
  progress->set_position({"epoch 2", 100, 4});
  Ring ring(progress, 10);
  const auto says = [&](const std::string& text) { return name_of_this() + text; };
  const std::string source = ": the test's bytes from " + name_of_previous();
  CHECK_THROWS_WITH_AS(ring.in.receive(109, up_to(0)),
                       doctest::Contains((" s for epoch 2, minibatch 2, microbatch 1" + source).c_str()), StallError);
  CHECK_THROWS_WITH_AS(ring.send(109, std::vector<std::byte>(11)),
                       says(": the test's bytes of epoch 2, minibatch 2, microbatch 1 is uint8 [11], 11 bytes, but the "
                            "channel was planned for 10")
                           .c_str(),
                       MessageError);
  barrier(*progress);
  ring.send(109, pattern(0, 10));
  const std::string mismatch =
      says(" expected epoch 2, minibatch 2, microbatch 0 but got epoch 2, minibatch 2, microbatch 1" + source);
  CHECK_THROWS_WITH_AS(ring.in.receive(108, soon()), mismatch.c_str(), MessageError);
  ring.in.receive(109, soon());
  progress->set_position({"epoch 3", 110, 1});
  const std::string last =
      " s for epoch 3, minibatch 0" + source + "; messages received so far: 1, the last was microbatch 109 of the run";
  CHECK_THROWS_WITH_AS(ring.in.receive(110, up_to(0)), doctest::Contains(last.c_str()), StallError);
  const auto nowhere = SendChannel::make(progress, spec(99, 0, 1 << 20));
  const std::vector<std::byte> data(10);
  CHECK_THROWS_WITH_AS(nowhere->send(110, {{data.data(), {10}}}, soon()),
                       doctest::Contains("the test's bytes, epoch 3, minibatch 0, to rank 99"), MpiError);
  barrier(*progress);
}

}  // namespace
}  // namespace pipedream
