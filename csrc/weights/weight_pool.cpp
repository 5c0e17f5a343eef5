#include "weights/weight_pool.hpp"

#include <algorithm>
#include <map>
#include <stdexcept>
#include <string>

namespace pipedream {

WeightPool::WeightPool(std::size_t bytes, std::size_t slabs, MemoryKind kind)
    : version_(slabs, -1), references_(slabs, 0), writing_(none_) {
  if (slabs == 0) throw std::invalid_argument("a weight pool needs at least one slab");
  slabs_.reserve(slabs);
  for (std::size_t index = 0; index < slabs; ++index) slabs_.emplace_back(bytes, kind);
  held_.reserve(2 * slabs);
  version_[newest_] = 0;
}

std::size_t WeightPool::acquire(std::int64_t microbatch, std::int64_t version) {
  std::size_t slab = newest_;
  if (version >= 0) {
    const auto found = std::find(version_.begin(), version_.end(), version);
    if (found == version_.end()) {
      throw std::logic_error("weight version " + std::to_string(version) + " is not kept: the newest is " +
                             std::to_string(newest()) + ", of " + std::to_string(size()) + " slabs");
    }
    slab = static_cast<std::size_t>(found - version_.begin());
  }
  if (!held_.emplace(microbatch, slab).second) {
    throw std::logic_error("microbatch " + std::to_string(microbatch) + " of the run already holds a weight version");
  }
  ++references_[slab];
  return slab;
}

std::size_t WeightPool::slab_of(std::int64_t microbatch) const {
  const auto found = held_.find(microbatch);
  if (found == held_.end()) {
    throw std::out_of_range("microbatch " + std::to_string(microbatch) + " of the run holds no weight version");
  }
  return found->second;
}

void WeightPool::release(std::int64_t microbatch) {
  --references_[slab_of(microbatch)];
  held_.erase(microbatch);
}

WeightPool::Update WeightPool::begin_update(bool copy, bool overwrite) {
  if (writing_ != none_) throw std::logic_error("an update has begun: commit it first");
  std::size_t target = newest_;
  for (std::size_t index = 0; index < size() && !overwrite; ++index) {
    if (index == newest_ || references_[index] != 0) continue;
    if (target == newest_ || version_[index] < version_[target]) target = index;
  }
  if (target == newest_ && references_[newest_] != 0 && !overwrite) throw std::logic_error(all_held());
  if (copy && target != newest_) pipedream::copy(slab(target), slab(newest_), slabs_[target].bytes());
  if (target != newest_) version_[target] = -1;  // no forward may acquire a version that is being overwritten
  writing_ = target;
  return {newest_, target};
}

std::int64_t WeightPool::commit() {
  if (writing_ == none_) throw std::logic_error("there is no update to commit: call begin_update first");
  version_[writing_] = newest() + 1;
  newest_ = writing_;
  writing_ = none_;
  return newest();
}

std::string WeightPool::all_held() const {
  std::map<std::int64_t, std::vector<std::int64_t>> by_version;
  for (const auto& [microbatch, slab] : held_) by_version[version_[slab]].push_back(microbatch);
  std::string text = "all " + std::to_string(size()) + " weight slabs are held:";
  for (auto& [version, microbatches] : by_version) {
    std::sort(microbatches.begin(), microbatches.end());
    text += " version " + std::to_string(version) + " by microbatch";
    for (std::size_t i = 0; i < microbatches.size(); ++i) text += (i ? ", " : " ") + std::to_string(microbatches[i]);
    text += " of the run;";
  }
  text.back() = '.';
  return text;
}

}  // namespace pipedream
