#include "solver/min_devices.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

namespace pipedream {

namespace {

constexpr std::int64_t kImpossible = std::numeric_limits<std::int32_t>::max();

// Returns kImpossible if the value is too large for an integer.
std::int64_t rounded_up(double value) {
  return value < static_cast<double>(kImpossible) ? static_cast<std::int64_t>(std::ceil(value)) : kImpossible;
}

}  // namespace

std::optional<std::vector<Stage>> MinDevices::within(double time_s) const {
  const Problem& q = problem_;
  const std::size_t cuts = q.parameter_bytes.size();
  const double limit_s = time_s * (1 + 1e-12);            // so that rounding does not add a device
  std::vector<std::int64_t> needed(cuts, q.devices + 1);  // devices for all layers after a cut
  std::vector<Stage> chosen(cuts, Stage{-1, 0});
  needed[cuts - 1] = 0;
  for (std::size_t last = cuts - 1; last > 0; --last) {
    const std::int64_t left = q.devices - needed[last];
    if (left < 1) continue;
    for (const std::int32_t first : q.begins[last]) {
      for (const Mode& mode : q.modes) {
        // Only a solution with fewer devices than the best so far is useful.
        std::int64_t most = std::min(needed[first] - 1 - needed[last], left);
        if (q.straight) most = std::min<std::int64_t>(most, 1);
        const std::int64_t replicas = fewest(mode, first, last, left, most, limit_s);
        if (replicas > most) continue;
        needed[first] = needed[last] + replicas;
        chosen[first] = {static_cast<std::int32_t>(last), replicas};
      }
    }
  }
  if (needed[0] > q.devices) return std::nullopt;
  std::vector<Stage> stages;
  for (std::size_t cut = 0; cut + 1 < cuts; cut = static_cast<std::size_t>(chosen[cut].last)) {
    stages.push_back(chosen[cut]);
  }
  return stages;
}

// Returns the replicas of a stage that ends on device left - 1; a number above `most` if `most` are too few.
std::int64_t MinDevices::fewest(const Mode& mode, std::size_t first, std::size_t last, std::int64_t left,
                                std::int64_t most, double limit_s) const {
  const Problem& q = problem_;
  const double compute_s = mode.time_s[last] - mode.time_s[first];
  std::int64_t replicas = std::max<std::int64_t>(rounded_up(compute_s / (limit_s * q.copies)), 1);
  if (replicas > most) return replicas;
  if (!mode.memory.empty()) replicas = std::max(replicas, for_memory(mode, first, last, q.devices - left));
  const double weights = q.parameter_bytes[last] - q.parameter_bytes[first];
  const std::size_t row = static_cast<std::size_t>(left - 1) % q.period;
  const bool output_counts = first > 0 || !q.first_output_free;
  while (replicas <= most) {
    const double sync_s = q.round_s.at(row, replicas) + weights * q.round_s_per_byte.at(row, replicas);
    const double stage_s = q.overlap ? std::max(compute_s, sync_s) : compute_s + sync_s;
    double boundary_s = 0;
    for (const LinkLevel& level : q.levels) {
      boundary_s = std::max(boundary_s, level.into.at(row, replicas) * level.transfer_s[first]);
      if (output_counts) boundary_s = std::max(boundary_s, level.out_of.at(row, replicas) * level.transfer_s[last]);
    }
    const double wanted = std::max(stage_s / q.copies, boundary_s * static_cast<double>(replicas)) / limit_s;
    if (wanted <= static_cast<double>(replicas)) return replicas;
    replicas = rounded_up(wanted);
  }
  return replicas;
}

// Returns the replicas that keep the microbatches in flight on each, ceil(behind / replicas) + 1, within the memory.
std::int64_t MinDevices::for_memory(const Mode& mode, std::size_t first, std::size_t last, std::int64_t behind) const {
  const double one = mode.memory[0].of(first, last), two = mode.memory[1].of(first, last),
               three = mode.memory[2].of(first, last), limit = problem_.memory_bytes;
  if (one > limit) return kImpossible;
  if (behind == 0) return 1;
  if (two > limit) return kImpossible;
  if (three <= two) return 1;
  const double in_flight = 2 + std::floor((limit - two) / (three - two));
  return rounded_up(static_cast<double>(behind) / (in_flight - 1));
}

}  // namespace pipedream
