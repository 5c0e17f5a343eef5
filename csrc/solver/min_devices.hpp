// MinDevices: the fewest devices on which a pipeline keeps within a given time per microbatch.
//
// The inner loop of planning/solver/search.py, which explains the search and prepares the tables. For every pair
// of cuts it finds the fewest replicas of the stage between them that meet all limits (compute, synchronisation,
// boundaries, memory): a fixed-point iteration on the replica count.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

namespace pipedream {

// A table with a row for each position in the period of the topology and a column for each number of replicas.
struct Table {
  std::vector<double> values;
  std::size_t columns = 0;
  double at(std::size_t row, std::int64_t replicas) const { return values[row * columns + (replicas - 1)]; }
};

// The links of one level of the topology.
struct LinkLevel {
  Table into;                      // the level's share of the input boundary's traffic, by replica count
  Table out_of;                    // the level's share of the output boundary's traffic
  std::vector<double> transfer_s;  // by cut: activations forward and gradients back over one link
};

// Memory of a stage with 1, 2 or 3 microbatches in flight. It grows by the same amount for each further one.
struct MemoryLevel {
  std::vector<double> before;    // by cut: of all layers before it
  std::vector<double> entering;  // by cut: of a stage's input boundary there
  std::vector<double> leaving;   // by cut: of a stage's output boundary there
  double of(std::size_t first, std::size_t last) const {
    return before[last] - before[first] + entering[first] + leaving[last];
  }
};

// How a stage runs: as it is, or with recomputation of its forward before the backward.
struct Mode {
  std::vector<double> time_s;       // by cut: compute of all layers before it
  std::vector<MemoryLevel> memory;  // three levels, or none without a memory limit
};

struct Problem {
  std::int64_t devices = 0;
  double copies = 1;
  bool straight = false;
  bool overlap = true;  // synchronisation overlaps with compute
  bool first_output_free = false;
  double memory_bytes = 0;
  std::vector<double> parameter_bytes;  // by cut: of all layers before it
  Table round_s;                        // time of a synchronisation of 0 bytes
  Table round_s_per_byte;               // additional time per byte
  std::size_t period = 1;               // rows of all tables
  std::vector<LinkLevel> levels;
  std::vector<Mode> modes;
  std::vector<std::vector<std::int32_t>> begins;  // by last cut: the first cuts of allowed stages
};

struct Stage {
  std::int32_t last;
  std::int64_t replicas;
};

class MinDevices {
 public:
  explicit MinDevices(Problem problem) : problem_(std::move(problem)) {}

  // The stages of the pipeline on the fewest devices whose stages and boundaries keep within time_s, first stage
  // first; std::nullopt if there is none.
  std::optional<std::vector<Stage>> within(double time_s) const;

 private:
  std::int64_t fewest(const Mode& mode, std::size_t first, std::size_t last, std::int64_t left, std::int64_t most,
                      double limit_s) const;
  std::int64_t for_memory(const Mode& mode, std::size_t first, std::size_t last, std::int64_t behind) const;

  Problem problem_;
};

}  // namespace pipedream
