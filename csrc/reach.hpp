// Reach: on how few devices a pipeline keeps within a given time per minibatch.
//
// The inner loop of planning/solver/search.py, which explains it and prepares the tables: for every pair of
// cuts the fewest replicas of the stage between them, found by putting the number of replicas in
// until no demand (compute, synchronisation, boundaries, memory) asks for more.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

namespace pipedream {

// A table with a row for each place in the period of the topology, a column per number of replicas.
struct Table {
  std::vector<double> values;
  std::size_t columns = 0;
  double at(std::size_t row, std::int64_t replicas) const { return values[row * columns + (replicas - 1)]; }
};

// Links of one level of the topology.
struct LinkLevel {
  Table into;                      // share of the input side's traffic, per replica count
  Table out_of;                    // of the output side's
  std::vector<double> transfer_s;  // by cut: activations forth and gradients back over one link
};

// What a stage keeps in memory with 1, 2 and 3 minibatches in flight; it grows by as much for each more.
struct MemoryLevel {
  std::vector<double> before;    // by cut: of all layers before it
  std::vector<double> entering;  // by cut: for what enters there
  std::vector<double> leaving;   // by cut: for what leaves there
  double of(std::size_t first, std::size_t last) const {
    return before[last] - before[first] + entering[first] + leaving[last];
  }
};

// A way to run a stage: as it is, or with its forward run again before the backward.
struct Mode {
  std::vector<double> time_s;       // by cut: compute of all layers before it
  std::vector<MemoryLevel> memory;  // three, or none without a limit
};

struct Question {
  std::int64_t devices = 0;
  double copies = 1;
  bool straight = false;
  bool overlap = true;  // synchronisation beside compute
  bool first_output_free = false;
  double memory_bytes = 0;
  std::vector<double> parameter_bytes;  // by cut: of all layers before it
  Table round_s;                        // a synchronisation of no bytes
  Table round_s_per_byte;               // and of every byte more
  std::size_t period = 1;               // rows of all tables
  std::vector<LinkLevel> levels;
  std::vector<Mode> modes;
  std::vector<std::vector<std::int32_t>> begins;  // by last cut: the first cuts of allowed stages
};

struct Stage {
  std::int32_t last;
  std::int64_t replicas;
};

class Reach {
 public:
  explicit Reach(Question question) : question_(std::move(question)) {}

  // The pipeline on the fewest devices whose stages and boundaries keep within time_s, first stage
  // first; nothing if there is none.
  std::optional<std::vector<Stage>> within(double time_s) const;

 private:
  std::int64_t fewest(const Mode& mode, std::size_t first, std::size_t last, std::int64_t left, std::int64_t most,
                      double limit_s) const;
  std::int64_t for_memory(const Mode& mode, std::size_t first, std::size_t last, std::int64_t behind) const;

  Question question_;
};

}  // namespace pipedream
