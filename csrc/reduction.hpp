// Sums over ranks while they compute: gradients of one stage, over its replicas.
//
//   backward   | layer 4 | layer 3 | layer 2 | layer 1 |            the buckets of a round are started in
//   bucket 0       started ├── scatter ──┤├── gather ──┤            order as their gradients come in, and
//   bucket 1                       started ├── scatter ──┤├── ...   travel behind the rest of backward
//
// The sum is taken in the order of the ranks, whatever order messages come in, so that all ranks
// hold the same bits and every run makes them again. Rank r is responsible for the r-th part of a bucket:
//
//   scatter (MPI_Ialltoall)       sum              gather (MPI_Iallgather)
//   rank 0   a0 b0 c0   ──►   a0 a1 a2   ──►   A = a0 + a1 + a2   ──►   A B C
//   rank 1   a1 b1 c1         b0 b1 b2         B = b0 + b1 + b2         A B C
//   rank 2   a2 b2 c2         c0 c1 c2         C = c0 + c1 + c2         A B C
//
// Each rank sends 2 (R - 1) / R of the bucket's bytes: as little as a ring does. Without `ordered`
// it is one MPI_Iallreduce, in which MPI chooses the order.
//
// The collectives of one communicator must be started in the same order on all ranks. Scatters are
// started by the caller, bucket by bucket; a gather is started when its sum is there, but never before
// that of the bucket before it. They have a communicator each.
#pragma once

#include <mpi.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "channel.hpp"
#include "memory.hpp"
#include "progress.hpp"

namespace pipedream {

enum class Number { float32, float64, bfloat16, float16 };

Number number_from(const std::string& dtype);  // throws std::invalid_argument
std::size_t bytes_of(Number number);

struct BucketShape {
  std::size_t count;  // of numbers
  Number number;
};

class Reduction final : public Endpoint {
 public:
  // Collective over `parent`, whose ranks are those that take part, in the order of the sum.
  Reduction(std::shared_ptr<Progress> progress, MPI_Comm parent, const std::vector<BucketShape>& buckets, bool ordered,
            std::string label);
  ~Reduction() override;
  Reduction(const Reduction&) = delete;
  Reduction& operator=(const Reduction&) = delete;

  std::size_t size() const { return buckets_.size(); }

  // What this rank puts in before start(), and the sum after wait().
  View bucket(std::size_t index) const { return buckets_.at(index)->values.view(); }

  // Starts to sum a bucket; all ranks start them in the same order. Throws std::logic_error if its last
  // sum was not waited for, MpiError.
  void start(std::size_t index);

  // Whether wait() would return at once.
  bool done(std::size_t index);

  // Waits for the sum of a bucket. Throws MpiError, StallError.
  void wait(std::size_t index, const Waiting& waiting);

  // Frees the communicators, unless a sum is under way on them. Called by Progress::close() when that comes first.
  void close() override;

  std::shared_ptr<void> memory(std::size_t index) const override { return buckets_[index]; }
  void completed(std::size_t index) override;
  std::string describe(std::size_t index) const override;

 private:
  enum class State { resting, scattering, summed, gathering, finished };
  struct Bucket {
    Buffer values;     // the caller's: R parts
    Buffer arrived;    // the own part of every rank
    std::size_t part;  // numbers in one
    Number number;
    State state = State::resting;
  };
  void gather_in_order();

  std::shared_ptr<Progress> progress_;
  MPI_Comm scatter_ = MPI_COMM_NULL;
  MPI_Comm gather_ = MPI_COMM_NULL;
  int rank_ = 0;
  int ranks_ = 1;
  const bool ordered_;
  const std::string label_;
  std::vector<std::shared_ptr<Bucket>> buckets_;
  std::vector<std::size_t> started_;  // not yet gathering, in order of start
};

}  // namespace pipedream
