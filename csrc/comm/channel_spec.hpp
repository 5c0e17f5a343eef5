// ChannelSpec: what both ends of a channel must agree on, and what they derive from it.
#pragma once

#include <cstdio>
#include <string>
#include <vector>

#include "comm/message.hpp"
#include "memory/memory.hpp"

namespace pipedream {

// How tensors in device memory reach the network.
enum class Route {
  direct,  // MPI reads and writes device memory
  staged,  // chunk by chunk through two pinned buffers, because MPI cannot access device memory
};

struct ChannelSpec {
  int peer_rank;
  int tag;  // uses the MPI tags 2 * tag and 2 * tag + 1
  std::vector<TensorSpec> tensors;
  MemoryKind kind = MemoryKind::host;
  Route route = Route::direct;
  // Bytes of a staged chunk. Copying a chunk should take longer than noticing its end, which takes tens of
  // microseconds.
  std::size_t chunk = std::size_t{4} << 20;

  // Byte ranges of the tensors in a slot if all have their planned shapes.
  std::vector<ByteRange> layout() const {
    std::vector<ByteRange> ranges;
    for (const TensorSpec& tensor : tensors) ranges.push_back({aligned(total_bytes(ranges)), tensor.bytes()});
    return ranges;
  }
  std::size_t capacity() const { return total_bytes(layout()); }  // bytes of the largest payload
  std::size_t header_bytes() const { return tensors.size() * sizeof(Header); }
  bool small() const { return capacity() <= largest_small_payload && kind == MemoryKind::host; }
  // Whether each tensor is a message of its own, sent from where it is to its planned place in the slot.
  bool in_place() const { return !small() && kind == MemoryKind::host; }
  int header_tag() const { return 2 * tag; }
  int payload_tag() const { return 2 * tag + 1; }

  std::string label() const {
    if (tensors.size() == 1) return tensors[0].label;
    return tensors[0].label + " and " + std::to_string(tensors.size() - 1) + " more";
  }
};

// Returns `spec`. Throws std::invalid_argument if it has no tensors, MessageError if MPI cannot send its messages.
const ChannelSpec& checked(const ChannelSpec& spec);

inline std::string with_one_decimal(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.1f", value);
  return text;
}

}  // namespace pipedream
