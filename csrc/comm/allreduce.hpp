// AllReduce: sums buckets over ranks while they compute, such as the gradients of a stage over its replicas.
//
//   backward   | layer 4 | layer 3 | layer 2 | layer 1 |            the buckets of a round are started in the
//   bucket 0       started ├── scatter ──┤├── gather ──┤            order in which their gradients are ready;
//   bucket 1                       started ├── scatter ──┤├── ...   transfers overlap with the rest of backward
//
// The sum is taken in rank order, whatever the arrival order of messages, so that all ranks and all runs get
// the same bits. Rank r sums the r-th shard of a bucket:
//
//   scatter (MPI_Ialltoall)       sum              gather (MPI_Iallgather)
//   rank 0   a0 b0 c0   ──►   a0 a1 a2   ──►   A = a0 + a1 + a2   ──►   A B C
//   rank 1   a1 b1 c1         b0 b1 b2         B = b0 + b1 + b2         A B C
//   rank 2   a2 b2 c2         c0 c1 c2         C = c0 + c1 + c2         A B C
//
// Each of R ranks sends 2 (R - 1) / R times the bucket's bytes, as in a ring all-reduce. Without `ordered` a
// bucket is one MPI_Iallreduce, in which MPI chooses the order.
//
// All ranks must start the collectives of a communicator in the same order. The caller starts the scatters
// bucket by bucket. A gather starts once its sum is ready and the gather of the bucket before it has started.
// Scatters and gathers use separate communicators.
#pragma once

#include <mpi.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "comm/channel.hpp"
#include "comm/progress.hpp"
#include "memory/memory.hpp"

namespace pipedream {

enum class DType { float32, float64, bfloat16, float16 };

DType dtype_from(const std::string& name);  // throws std::invalid_argument
std::size_t bytes_of(DType dtype);

struct BucketSpec {
  std::size_t count;  // numbers in the bucket
  DType dtype;
};

class AllReduce final : public Endpoint {
 public:
  // Collective over `parent`. Its ranks take part, and their order is the order of the sum.
  AllReduce(std::shared_ptr<Progress> progress, MPI_Comm parent, const std::vector<BucketSpec>& buckets, bool ordered,
            std::string label);
  ~AllReduce() override;
  AllReduce(const AllReduce&) = delete;
  AllReduce& operator=(const AllReduce&) = delete;

  std::size_t size() const { return buckets_.size(); }

  // The memory of a bucket: this rank's numbers before start(), the sum after wait().
  View bucket(std::size_t index) const { return buckets_.at(index)->values.view(); }

  // Starts to sum a bucket. All ranks start the buckets in the same order. Throws std::logic_error if wait() was not
  // called for the bucket's last sum, MpiError.
  void start(std::size_t index);

  // Whether wait() would return at once.
  bool done(std::size_t index);

  // Waits for the sum of a bucket. Throws MpiError, StallError.
  void wait(std::size_t index, const WaitOptions& options);

  // Frees the communicators, unless a sum is active on them. Progress::close() calls it too.
  void close() override;

  std::shared_ptr<void> memory(std::size_t index) const override { return buckets_[index]; }
  void completed(std::size_t index) override;
  std::string describe(std::size_t index) const override;

 private:
  enum class State { idle, scattering, summed, gathering, finished };
  struct Bucket {
    Buffer values;      // the caller's numbers: R shards
    Buffer arrived;     // this rank's shard of every rank
    std::size_t shard;  // numbers in a shard
    DType dtype;
    State state = State::idle;
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
  std::vector<std::size_t> started_;  // buckets that are not yet gathering, in start order
};

}  // namespace pipedream
