// Optimizer steps on several threads: which thread takes which chunk, and nothing beside the tensors is touched.
#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "fused.hpp"

using namespace pipedream;

namespace {

constexpr Sgd rule{-0.5f, 0.0f, 0.9f, 1.0f, 1.0f, Momentum::kept, false, false};
constexpr float guard = 99.0f;

// Sizes that end within a vector, within a chunk and beyond many.
const std::vector<std::size_t> sizes{1, 7, 4096, 100'003, 1'000'001};

struct Tensor {
  explicit Tensor(std::size_t count) : weights(count), target(count + 2, guard), gradient(count), buffer(count) {
    for (std::size_t i = 0; i < count; ++i) {
      weights[i] = static_cast<float>(i % 257) * 0.25f;
      gradient[i] = static_cast<float>(i % 31) - 15.0f;
      buffer[i] = static_cast<float>(i % 7);
    }
  }
  Operand operand() {
    return {weights.size(), weights.data(), target.data() + 1, gradient.data(), buffer.data(), nullptr};
  }
  std::vector<float> weights, target, gradient, buffer;
};

constexpr std::size_t line = 64;  // bytes

std::uint16_t* on_a_line(std::uint16_t* from) {
  return from + (line - reinterpret_cast<std::uintptr_t>(from) % line) % line / sizeof *from;
}

float multiplied_added(const Run& run, float a, float b, float c) {
  return run.contracted ? std::fma(a, b, c) : a * b + c;
}

// Every way to run that this CPU has.
std::vector<Run> runs() {
  std::vector<Run> every;
  for (const int threads : {1, 2, 3, 5}) {
    for (const Stores stores : {Stores::cached, Stores::streaming}) {
      every.push_back({threads, false, stores});
      for (const Vectors vectors : {Vectors::wide, Vectors::widest}) {
        if (vectors <= fused_vectors()) every.push_back({threads, true, stores, vectors});
      }
    }
  }
  return every;
}

}  // namespace

TEST_CASE("any number of threads, any vectors and either kind of store make the same numbers") {
  for (const Run& run : runs()) {
    CAPTURE(run.threads);
    CAPTURE(run.contracted);
    CAPTURE(static_cast<int>(run.at_most));
    CAPTURE(static_cast<int>(run.stores));
    std::vector<Tensor> tensors;
    for (const std::size_t size : sizes) tensors.emplace_back(size);
    std::vector<Operand> operands;
    for (Tensor& tensor : tensors) operands.push_back(tensor.operand());
    fused_step(rule, operands, {false, false}, run);
    for (const Tensor& tensor : tensors) {
      CHECK(tensor.target.front() == guard);
      CHECK(tensor.target.back() == guard);
      const Tensor before(tensor.weights.size());
      std::size_t wrong = 0;
      for (std::size_t i = 0; i < tensor.weights.size(); ++i) {
        const float kept = multiplied_added(run, before.gradient[i], 1.0f, before.buffer[i] * 0.9f);
        wrong +=
            tensor.buffer[i] != kept || tensor.target[i + 1] != multiplied_added(run, kept, -0.5f, before.weights[i]);
      }
      CHECK(wrong == 0);
      CHECK(tensor.weights == before.weights);
    }
  }
}

TEST_CASE("masters are stepped in place, and the weights are their roundings") {
  for (const Run& run : runs()) {
    for (const std::size_t count : sizes) {
      for (const std::size_t off : {0, 1}) {  // on a line of the caches, and beside it
        Tensor tensor(count);
        std::vector<std::uint16_t> room(count + 2 * line, 7);
        std::uint16_t* const halves = on_a_line(room.data() + 1) + off;
        Operand operand = tensor.operand();
        operand.target = halves;
        fused_step(rule, {operand}, {true, false}, run);
        std::size_t wrong = 0;
        for (std::size_t i = 0; i < count; ++i) {
          std::uint32_t bits;
          std::memcpy(&bits, &tensor.weights[i], sizeof bits);
          wrong += halves[i] != bfloat16_from(bits);
        }
        CHECK(wrong == 0);
        CHECK(halves[-1] == 7);
        CHECK(halves[count] == 7);
      }
    }
  }
}

TEST_CASE("Adam makes the same masters, weights and averages whichever way it runs") {
  constexpr Adam adam{-0.01f, 0.99f, 0.1f, 0.99f, 0.01f, 0.5f, 1e-8f, 1.0f, Decay::decoupled};
  struct Made {
    std::vector<float> weights, first, second;
    std::vector<std::uint16_t> halves;
    bool operator==(const Made& other) const {
      return weights == other.weights && first == other.first && second == other.second && halves == other.halves;
    }
  };
  for (const std::size_t count : sizes) {
    std::vector<Made> by_rounding[2];  // multiply and add rounded twice, and once
    for (const Run& run : runs()) {
      Tensor tensor(count);
      std::vector<float> second(count, 0.25f);
      Made made;
      made.halves.assign(count + 2, 7);
      Operand operand = tensor.operand();
      operand.target = made.halves.data() + 1;
      operand.second = second.data();
      fused_step(adam, {operand}, {true, false}, run);
      CHECK(made.halves.front() == 7);
      CHECK(made.halves.back() == 7);
      made.weights = tensor.weights;
      made.first = tensor.buffer;
      made.second = second;
      by_rounding[run.contracted].push_back(made);
    }
    for (const std::vector<Made>& alike : by_rounding) {
      for (const Made& made : alike) CHECK(made == alike.front());
    }
    const Tensor before(count);
    CHECK(by_rounding[0].front().weights != before.weights);
  }
}
