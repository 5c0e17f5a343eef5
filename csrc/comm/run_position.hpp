// RunPosition: names a microbatch of the run the way people count, by epoch and minibatch.
//
//   microbatch of the run    100 101 102 103   104 105 106 107   108 109 ...      first = 100, n_microbatches = 4
//   minibatch of the epoch   0                 1                 2
//   microbatch of it         0   1   2   3     0   1   2   3     0   1            109: "epoch 2, minibatch 2,
//   microbatch 1"
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

namespace pipedream {

class RunPosition {
 public:
  // No position yet: microbatches are named by their number in the run.
  RunPosition() = default;

  // `where` is the current epoch, such as "epoch 2", `first` the number of its first microbatch in the run, and
  // `n_microbatches` the number of microbatches per minibatch. Throws std::invalid_argument if that is less than 1.
  RunPosition(std::string where, std::int64_t first, int n_microbatches)
      : where_(std::move(where)), first_(first), n_microbatches_(n_microbatches) {
    if (n_microbatches < 1) throw std::invalid_argument("a minibatch has at least one microbatch");
  }

  std::string name_of(std::int64_t microbatch) const {
    if (n_microbatches_ == 0 || microbatch < first_) return "microbatch " + std::to_string(microbatch) + " of the run";
    const std::int64_t index = microbatch - first_;
    const std::string minibatch = where_ + ", minibatch " + std::to_string(index / n_microbatches_);
    return n_microbatches_ == 1 ? minibatch : minibatch + ", microbatch " + std::to_string(index % n_microbatches_);
  }

 private:
  std::string where_;
  std::int64_t first_ = 0;
  int n_microbatches_ = 0;  // 0 without a position
};

}  // namespace pipedream
