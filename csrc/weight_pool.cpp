#include "weight_pool.hpp"

#include <algorithm>
#include <map>
#include <stdexcept>
#include <string>

namespace pipedream {

WeightPool::WeightPool(std::size_t bytes, std::size_t slabs, Where where)
    : version_(slabs, -1), references_(slabs, 0), writing_(none_) {
  if (slabs == 0) throw std::invalid_argument("a weight pool needs at least one slab");
  slabs_.reserve(slabs);
  for (std::size_t index = 0; index < slabs; ++index) slabs_.emplace_back(bytes, where);
  held_.reserve(2 * slabs);
  version_[newest_] = 0;
}

std::size_t WeightPool::acquire(std::int64_t minibatch, std::int64_t version) {
  std::size_t slab = newest_;
  if (version >= 0) {
    const auto found = std::find(version_.begin(), version_.end(), version);
    if (found == version_.end()) {
      throw std::logic_error("weight version " + std::to_string(version) + " is not kept: the newest is " +
                             std::to_string(newest()) + ", of " + std::to_string(size()) + " slabs");
    }
    slab = static_cast<std::size_t>(found - version_.begin());
  }
  if (!held_.emplace(minibatch, slab).second) {
    throw std::logic_error("minibatch " + std::to_string(minibatch) + " holds a weight version already");
  }
  ++references_[slab];
  return slab;
}

std::size_t WeightPool::slab_of(std::int64_t minibatch) const {
  const auto found = held_.find(minibatch);
  if (found == held_.end()) {
    throw std::out_of_range("minibatch " + std::to_string(minibatch) + " holds no weight version");
  }
  return found->second;
}

void WeightPool::release(std::int64_t minibatch) {
  --references_[slab_of(minibatch)];
  held_.erase(minibatch);
}

WeightPool::Step WeightPool::begin_update(bool copy, bool overwrite) {
  if (writing_ != none_) throw std::logic_error("an update is under way: commit it first");
  std::size_t target = newest_;
  for (std::size_t index = 0; index < size() && !overwrite; ++index) {
    if (index == newest_ || references_[index] != 0) continue;
    if (target == newest_ || version_[index] < version_[target]) target = index;
  }
  if (target == newest_ && references_[newest_] != 0 && !overwrite) throw std::logic_error(all_held());
  if (copy && target != newest_) pipedream::copy(slab(target), slab(newest_), slabs_[target].bytes());
  if (target != newest_) version_[target] = -1;  // no forward may ask for what is being written over
  writing_ = target;
  return {newest_, target};
}

std::int64_t WeightPool::commit() {
  if (writing_ == none_) throw std::logic_error("there is no update to commit: begin_update first");
  version_[writing_] = newest() + 1;
  newest_ = writing_;
  writing_ = none_;
  return newest();
}

std::string WeightPool::all_held() const {
  std::map<std::int64_t, std::vector<std::int64_t>> by_version;
  for (const auto& [minibatch, slab] : held_) by_version[version_[slab]].push_back(minibatch);
  std::string text = "all " + std::to_string(size()) + " weight slabs are held:";
  for (auto& [version, minibatches] : by_version) {
    std::sort(minibatches.begin(), minibatches.end());
    text += " version " + std::to_string(version) + " by minibatch";
    for (std::size_t i = 0; i < minibatches.size(); ++i) text += (i ? ", " : " ") + std::to_string(minibatches[i]);
    text += ";";
  }
  text.back() = '.';
  return text;
}

}  // namespace pipedream
