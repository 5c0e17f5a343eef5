// WeightPool: versioned weights in a fixed number of flat slabs.
//
// A 1F1B stage with W = 2 warm-up microbatches, and so 3 slabs. vN is a version. A microbatch holds the version
// that was newest at its forward until its backward. U is an optimizer step:
//
//   action   F0  F1  F2  B0 U1  F3  B1 U2  F4  B2 U3  F5  B3 U4 ...        time ->
//   slab 0   v0  v0  v0  v0 v0  v0  v0 v0  v0  -  v3  v3  v3 v3
//   slab 1   .   .   .   .  v1  v1  v1 v1  v1  v1 v1  v1  -  v4
//   slab 2   .   .   .   .  .   .   .  v2  v2  v2 v2  v2  v2 v2
//
// After the backward of microbatch k, the W microbatches in flight hold at most W versions, the newest
// included, so one of W + 1 slabs is always free for the next version. With W = 0 no microbatch holds the
// newest version at its optimizer step, which updates it in place.
//
// An optimizer step overwrites the oldest version that no microbatch holds. The newer ones are kept, held or
// not, for schedules whose forwards ask for an older version by number (vertical sync, 2BW).
#pragma once

#include <cstdint>
#include <unordered_map>
#include <vector>

#include "memory/memory.hpp"

namespace pipedream {

class WeightPool {
 public:
  // Allocates `slabs` slabs of `bytes` bytes. Nothing is allocated after that.
  WeightPool(std::size_t bytes, std::size_t slabs, MemoryKind kind);

  std::int64_t newest() const { return version_[newest_]; }
  std::size_t newest_slab() const { return newest_; }
  std::size_t size() const { return slabs_.size(); }
  View slab(std::size_t index) const { return slabs_.at(index).view(); }

  // Holds `version` for `microbatch`, or the newest version for -1; returns its slab. Throws std::logic_error if
  // the microbatch already holds a version, or if the version is not kept.
  std::size_t acquire(std::int64_t microbatch, std::int64_t version = -1);

  // Slab and version that `microbatch` holds. Throws std::out_of_range if it holds none.
  std::size_t slab_of(std::int64_t microbatch) const;
  std::int64_t version_of(std::int64_t microbatch) const { return version_[slab_of(microbatch)]; }

  void release(std::int64_t microbatch);

  // Chooses the slab for the next version: the oldest that no microbatch holds, or the newest version's own slab
  // if that is not held and no other is free. With `copy` the slab starts as a copy of the newest version. With
  // `overwrite` it is the newest version's own slab even if that is held, as in naive pipelining. Throws
  // std::logic_error that names the holders if every slab is held.
  struct Update {
    std::size_t source, target;
  };
  Update begin_update(bool copy, bool overwrite = false);

  // Makes the slab chosen by begin_update the newest version; returns its number.
  std::int64_t commit();

  // Number of microbatches that hold a version.
  std::size_t holders() const { return held_.size(); }

 private:
  std::string all_held() const;

  std::vector<Buffer> slabs_;
  std::vector<std::int64_t> version_;                   // by slab; -1 if it was never written
  std::vector<std::size_t> references_;                 // by slab: number of microbatches that hold it
  std::unordered_map<std::int64_t, std::size_t> held_;  // microbatch -> slab
  std::size_t newest_ = 0;
  std::size_t writing_;  // slab between begin_update() and commit(), or none_
  static constexpr std::size_t none_ = static_cast<std::size_t>(-1);
};

}  // namespace pipedream
