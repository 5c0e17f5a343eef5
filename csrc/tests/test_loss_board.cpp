#include <doctest/doctest.h>

#include <chrono>
#include <future>
#include <optional>
#include <stdexcept>
#include <thread>

#include "comm/loss_board.hpp"
#include "ranks.hpp"

namespace pipedream {
namespace {

// The loss of a microbatch of a rank in these tests.
double value_of(int owner, std::int64_t microbatch) { return owner + 0.001 * static_cast<double>(microbatch); }

void publish(LossBoard& board, std::int64_t microbatch) {
  board.publish(microbatch, {value_of(rank(), microbatch), microbatch + 0.5, microbatch % 2 == 1});
}

bool right(const Loss& loss, int owner, std::int64_t microbatch) {
  return loss.value == value_of(owner, microbatch) && loss.weight == microbatch + 0.5 &&
         loss.counted == (microbatch % 2 == 1);
}

TEST_CASE("LossBoard: every rank asks every rank, also itself, in any order") {
  const auto progress = make_progress();
  LossBoard board(progress, 16);
  for (int microbatch = 0; microbatch < 16; ++microbatch) publish(board, microbatch);
  for (int repeat = 0; repeat < 5; ++repeat) {
    for (int owner = 0; owner < ranks(); ++owner) {
      for (const std::int64_t microbatch : {15, 0, 7}) {
        CAPTURE(owner);
        CAPTURE(microbatch);
        CHECK(right(board.ask(owner, microbatch, soon()), owner, microbatch));
      }
    }
  }
  barrier(*progress);
}

//   next      ............................ publish(3)
//   this      ask(3): parked ............. returns
TEST_CASE("LossBoard: a request before publish() is answered by it") {
  const auto progress = make_progress();
  LossBoard board(progress, 4);
  auto asks = std::async(std::launch::async, [&] { return board.ask(next(), 3, soon()); });
  for (int microbatch = 0; microbatch < 3; ++microbatch) publish(board, microbatch);
  CHECK(asks.wait_for(std::chrono::milliseconds(100)) == std::future_status::timeout);
  barrier(*progress);
  publish(board, 3);
  CHECK(right(asks.get(), next(), 3));
  barrier(*progress);
}

TEST_CASE("LossBoard: several askers of one rank, also several threads, are answered in the order of publish()") {
  const auto progress = make_progress();
  LossBoard board(progress, 8);
  std::vector<std::future<Loss>> asks;
  for (const int microbatch : {5, 2, 5, 0}) {
    asks.push_back(std::async(std::launch::async, [&board, microbatch] { return board.ask(0, microbatch, soon()); }));
  }
  if (rank() == 0) {
    for (int microbatch = 0; microbatch < 6; ++microbatch) {
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
      publish(board, microbatch);
    }
  }
  CHECK(right(asks[3].get(), 0, 0));
  CHECK(right(asks[1].get(), 0, 2));
  CHECK(right(asks[0].get(), 0, 5));
  CHECK(right(asks[2].get(), 0, 5));
  barrier(*progress);
}

TEST_CASE("LossBoard: a loss that was overwritten is refused") {
  const auto progress = make_progress();
  progress->set_position({"epoch 1", 0, 2});
  LossBoard board(progress, 3);
  for (int microbatch = 0; microbatch < 10; ++microbatch) publish(board, microbatch);
  CHECK(right(board.ask(next(), 7, soon()), next(), 7));
  const std::string words =
      name_of_this() + ": the loss of epoch 1, minibatch 3, microbatch 0 is no longer kept: read step.loss before " +
      name_of_next() + " runs 3 more microbatches";
  CHECK_THROWS_WITH_AS(board.ask(next(), 6, soon()), words.c_str(), CoreError);
  CHECK(right(board.ask(next(), 9, soon()), next(), 9));
  barrier(*progress);
}

//   owner     receive 0 ............................... gets it
//   asker     ask(0) ─► answer, although the owner waits ─► send 0
TEST_CASE("LossBoard: an owner that waits for the asker's next message answers") {
  const auto progress = make_progress();
  LossBoard board(progress, 4);
  Ring ring(progress, 100);
  publish(board, 0);
  const std::vector<std::byte> data = pattern(0, 100);
  // Odd ranks receive first, from an even rank that asks them before it sends.
  const bool receives_first = rank() % 2 == 1;
  if (receives_first) {
    const std::size_t slot = ring.in.receive(0, soon()).slot;
    CHECK(std::equal(data.begin(), data.end(), ring.in.slot(slot).data));
  }
  CHECK(right(board.ask(next(), 0, soon()), next(), 0));
  ring.send(0, data);
  if (!receives_first) ring.in.receive(0, soon());
  ring.out.drain(soon());
  barrier(*progress);
}

//   owner   main       | computes, without a call of MPI ... |
//           progress   | poll   poll: request, answer        |                time ->
TEST_CASE("LossBoard: the progress thread answers while the owner's main thread computes") {
  if (ranks() == 1) return;
  const auto progress = make_progress();
  LossBoard board(progress, 4);
  publish(board, 0);
  const std::uint64_t before = progress->statistics().completions;
  barrier(*progress);
  const std::uint64_t polls = progress->statistics().polls_waiting;
  if (rank() == 0) {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    CHECK(right(board.ask(1, 0, soon()), 1, 0));
  } else if (rank() == 1) {
    while (progress->statistics().completions < before + 3) {  // the barrier, the request, the answer
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    CHECK(progress->statistics().polls_waiting == polls);
  }
  barrier(*progress);
}

TEST_CASE("LossBoard: a stall names the loss and its owner, and a later request still works") {
  const auto progress = make_progress();
  LossBoard board(progress, 4);
  const std::string words = " s for the loss of microbatch 1 of the run from " + name_of_next() +
                            ", which has not published it; see what that rank is doing";
  CHECK_THROWS_WITH_AS(board.ask(next(), 1, up_to(0.1)), doctest::Contains(words.c_str()), StallError);
  barrier(*progress);
  publish(board, 0);
  publish(board, 1);  // answers the request that was given up: the answer is dropped
  CHECK(right(board.ask(next(), 0, soon()), next(), 0));
  CHECK(right(board.ask(next(), 1, soon()), next(), 1));
  barrier(*progress);
}

TEST_CASE("LossBoard: ask() can be interrupted and repeated") {
  struct Interrupt {};
  const auto progress = make_progress();
  LossBoard board(progress, 4);
  CHECK_THROWS_AS(board.ask(next(), 0, {60, [] { throw Interrupt(); }}), Interrupt);
  barrier(*progress);
  publish(board, 0);
  CHECK(right(board.ask(next(), 0, soon()), next(), 0));
  barrier(*progress);
}

TEST_CASE("LossBoard: a failed request names the loss and the rank") {
  const auto progress = make_progress();
  LossBoard board(progress, 4);
  const std::string words =
      name_of_this() + ": MPI_Irecv failed for the loss of microbatch 7 of the run from rank 99: MPI_ERR_RANK";
  CHECK_THROWS_WITH_AS(board.ask(99, 7, soon()), doctest::Contains(words.c_str()), MpiError);
  CHECK_THROWS_AS(LossBoard(progress, 0), std::invalid_argument);
  barrier(*progress);
}

TEST_CASE("LossBoard: costs one receive until somebody asks") {
  const auto progress = make_progress();
  LossBoard board(progress, 4);
  barrier(*progress);
  const std::uint64_t before = progress->statistics().completions;
  for (int microbatch = 0; microbatch < 1000; ++microbatch) publish(board, microbatch);
  CHECK(progress->statistics().completions == before);
  barrier(*progress);
}

TEST_CASE("LossBoard: is destroyed before or after its Progress is closed, with requests in flight and parked") {
  for (const bool closed_first : {false, true}) {
    CAPTURE(closed_first);
    const auto progress = make_progress();
    std::optional<LossBoard> board(std::in_place, progress, 4);
    CHECK_THROWS_AS(board->ask(next(), 0, up_to(0)), StallError);
    if (closed_first) progress->close();
    if (closed_first) {
      const std::string words = name_of_this() + ": the channels are closed";
      CHECK_THROWS_WITH_AS(board->ask(next(), 0, soon()), words.c_str(), CoreError);
    }
    board.reset();
    progress->close();
    barrier();
  }
}

}  // namespace
}  // namespace pipedream
