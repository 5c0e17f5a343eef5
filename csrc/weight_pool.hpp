// Versioned parameters in a fixed number of flat slabs.
//
// A 1F1B stage with W = 2 warm-up minibatches, and so 3 slabs. vN is a version; a minibatch holds
// the version that was newest at its forward until its backward:
//
//   action   F0  F1  F2  B0 U1  F3  B1 U2  F4  B2 U3  F5  B3 U4 ...        time ->
//   slab 0   v0  v0  v0  v0 v0  v0  v0 v0  v0  -  v3  v3  v3 v3
//   slab 1   .   .   .   .  v1  v1  v1 v1  v1  v1 v1  v1  -  v4
//   slab 2   .   .   .   .  .   .   .  v2  v2  v2 v2  v2  v2 v2
//
// After the backward of minibatch k the W minibatches still in flight hold at most W versions, the
// newest among them, so one of W + 1 slabs is always free for the next. With W = 0 nobody holds the
// newest version at its update, and it is updated in place.
//
// An update is written over the oldest version that nobody holds: the newest ones are kept, held or
// not, for schedules in which a forward asks for an older version by number (vertical sync, 2BW).
#pragma once

#include <cstdint>
#include <unordered_map>
#include <vector>

#include "memory.hpp"

namespace pipedream {

class WeightPool {
 public:
  // Allocates `slabs` slabs of `bytes` bytes; nothing is allocated after that.
  WeightPool(std::size_t bytes, std::size_t slabs, Where where);

  std::int64_t newest() const { return version_[newest_]; }
  std::size_t newest_slab() const { return newest_; }
  std::size_t size() const { return slabs_.size(); }
  View slab(std::size_t index) const { return slabs_.at(index).view(); }

  // Holds `version` for `minibatch`, or the newest for -1; returns its slab. Throws std::logic_error if
  // it holds one already, or if the version is not kept.
  std::size_t acquire(std::int64_t minibatch, std::int64_t version = -1);

  // Slab and version that `minibatch` holds. Throws std::out_of_range if it holds none.
  std::size_t slab_of(std::int64_t minibatch) const;
  std::int64_t version_of(std::int64_t minibatch) const { return version_[slab_of(minibatch)]; }

  void release(std::int64_t minibatch);

  // Chooses the slab for the next version: the oldest that nobody holds, or the newest's own if nobody
  // holds that and no other is free. With `copy` it begins as a copy of the newest version. With
  // `overwrite` it is the newest's own whoever holds it: what naive pipelining does. Throws
  // std::logic_error when every slab is held, and names the holders.
  struct Step {
    std::size_t source, target;
  };
  Step begin_update(bool copy, bool overwrite = false);

  // Makes the slab chosen by begin_update the newest version; returns its number.
  std::int64_t commit();

  // Minibatches that hold a version.
  std::size_t holders() const { return held_.size(); }

 private:
  std::string all_held() const;

  std::vector<Buffer> slabs_;
  std::vector<std::int64_t> version_;                   // by slab; -1 while never written
  std::vector<std::size_t> references_;                 // by slab: minibatches that hold it
  std::unordered_map<std::int64_t, std::size_t> held_;  // minibatch -> slab
  std::size_t newest_ = 0;
  std::size_t writing_;  // slab under begin_update, or none_
  static constexpr std::size_t none_ = static_cast<std::size_t>(-1);
};

}  // namespace pipedream
