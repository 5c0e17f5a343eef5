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

}  // namespace

TEST_CASE("any number of threads and either kind of store make the same numbers") {
  for (const int threads : {1, 2, 3, 5}) {
    for (const Stores stores : {Stores::cached, Stores::streaming}) {
      std::vector<Tensor> tensors;
      for (const std::size_t size : sizes) tensors.emplace_back(size);
      std::vector<Operand> operands;
      for (Tensor& tensor : tensors) operands.push_back(tensor.operand());
      fused_step(rule, operands, {false, false}, {threads, false, stores});
      for (const Tensor& tensor : tensors) {
        CHECK(tensor.target.front() == guard);
        CHECK(tensor.target.back() == guard);
        const Tensor before(tensor.weights.size());
        std::size_t wrong = 0;
        for (std::size_t i = 0; i < tensor.weights.size(); ++i) {
          const float kept = before.buffer[i] * 0.9f + before.gradient[i];
          wrong += tensor.buffer[i] != kept || tensor.target[i + 1] != before.weights[i] + kept * -0.5f;
        }
        CHECK(wrong == 0);
        CHECK(tensor.weights == before.weights);
      }
    }
  }
}

TEST_CASE("masters are stepped in place, and the weights are their roundings") {
  for (const std::size_t count : sizes) {
    Tensor tensor(count);
    std::vector<std::uint16_t> halves(count);
    Operand operand = tensor.operand();
    operand.target = halves.data();
    fused_step(rule, {operand}, {true, false}, {3, false, Stores::chosen});
    std::size_t wrong = 0;
    for (std::size_t i = 0; i < count; ++i) {
      std::uint32_t bits;
      std::memcpy(&bits, &tensor.weights[i], sizeof bits);
      wrong += halves[i] != bfloat16_from(bits);
    }
    CHECK(wrong == 0);
  }
}
