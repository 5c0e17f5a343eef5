// Optimizer steps on several threads: the result does not depend on who takes which chunk, and only tensors are
// written.
#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "weights/fused.hpp"

using namespace pipedream;

namespace {

constexpr Sgd rule{-0.5f, 0.0f, 0.9f, 1.0f, 1.0f, Momentum::kept, false, false};
constexpr float guard = 99.0f;

// Sizes within a vector, within a chunk and of many chunks.
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

constexpr std::size_t line = 64;  // bytes of a cache line

std::uint16_t* on_a_line(std::uint16_t* from) {
  return from + (line - reinterpret_cast<std::uintptr_t>(from) % line) % line / sizeof *from;
}

float multiplied_added(const StepOptions& options, float a, float b, float c) {
  return options.fma ? std::fma(a, b, c) : a * b + c;
}

// All options that this CPU supports.
std::vector<StepOptions> all_options() {
  std::vector<StepOptions> every;
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

TEST_CASE("the result does not depend on threads, vectors and kind of store") {
  for (const StepOptions& options : all_options()) {
    CAPTURE(options.threads);
    CAPTURE(options.fma);
    CAPTURE(static_cast<int>(options.at_most));
    CAPTURE(static_cast<int>(options.stores));
    std::vector<Tensor> tensors;
    for (const std::size_t size : sizes) tensors.emplace_back(size);
    std::vector<Operand> operands;
    for (Tensor& tensor : tensors) operands.push_back(tensor.operand());
    fused_step(rule, operands, {false, false}, options);
    for (const Tensor& tensor : tensors) {
      CHECK(tensor.target.front() == guard);
      CHECK(tensor.target.back() == guard);
      const Tensor before(tensor.weights.size());
      std::size_t wrong = 0;
      for (std::size_t i = 0; i < tensor.weights.size(); ++i) {
        const float kept = multiplied_added(options, before.gradient[i], 1.0f, before.buffer[i] * 0.9f);
        wrong += tensor.buffer[i] != kept ||
                 tensor.target[i + 1] != multiplied_added(options, kept, -0.5f, before.weights[i]);
      }
      CHECK(wrong == 0);
      CHECK(tensor.weights == before.weights);
    }
  }
}

TEST_CASE("master weights are updated in place, and the weights are rounded from them") {
  for (const StepOptions& options : all_options()) {
    for (const std::size_t count : sizes) {
      for (const std::size_t off : {0, 1}) {  // aligned to a cache line, and not
        Tensor tensor(count);
        std::vector<std::uint16_t> room(count + 2 * line, 7);
        std::uint16_t* const halves = on_a_line(room.data() + 1) + off;
        Operand operand = tensor.operand();
        operand.target = halves;
        fused_step(rule, {operand}, {true, false}, options);
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

TEST_CASE("Adam computes the same master weights, weights and averages with all options") {
  constexpr Adam adam{-0.01f, 0.99f, 0.1f, 0.99f, 0.01f, 0.5f, 1e-8f, 1.0f, Decay::decoupled};
  struct Made {
    std::vector<float> weights, first, second;
    std::vector<std::uint16_t> halves;
    bool operator==(const Made& other) const {
      return weights == other.weights && first == other.first && second == other.second && halves == other.halves;
    }
  };
  for (const std::size_t count : sizes) {
    std::vector<Made> by_rounding[2];  // by StepOptions::fma
    for (const StepOptions& options : all_options()) {
      Tensor tensor(count);
      std::vector<float> second(count, 0.25f);
      Made made;
      made.halves.assign(count + 2, 7);
      Operand operand = tensor.operand();
      operand.target = made.halves.data() + 1;
      operand.second = second.data();
      fused_step(adam, {operand}, {true, false}, options);
      CHECK(made.halves.front() == 7);
      CHECK(made.halves.back() == 7);
      made.weights = tensor.weights;
      made.first = tensor.buffer;
      made.second = second;
      by_rounding[options.fma].push_back(made);
    }
    for (const std::vector<Made>& alike : by_rounding) {
      for (const Made& made : alike) CHECK(made == alike.front());
    }
    const Tensor before(count);
    CHECK(by_rounding[0].front().weights != before.weights);
  }
}
