// A line between two ranks, which both ends of a channel are made with; and what both ends do alike.
#pragma once

#include <cstdio>
#include <string>
#include <vector>

#include "memory.hpp"
#include "message.hpp"

namespace pipedream {

// How tensors in device memory get into the network.
enum class Route {
  direct,  // MPI reads and writes where they are
  staged,  // chunk by chunk through two pinned buffers, because MPI cannot reach device memory
};

struct Line {
  int peer;
  int tag;  // MPI tags 2·tag and 2·tag + 1 are used
  std::vector<Part> parts;
  Where where = Where::host;
  Route route = Route::direct;
  // Of a staged line. A chunk should take longer to copy than to notice: tens of microseconds.
  std::size_t chunk = std::size_t{4} << 20;

  // Where the planned tensors stand in a slot.
  std::vector<Place> places() const {
    std::vector<Place> all;
    for (const Part& part : parts) all.push_back({aligned(extent(all)), part.bytes()});
    return all;
  }
  std::size_t capacity() const { return extent(places()); }  // bytes of the largest payload
  std::size_t header_bytes() const { return parts.size() * sizeof(Header); }
  bool small() const { return capacity() <= largest_small_payload && where == Where::host; }
  int header_tag() const { return 2 * tag; }
  int payload_tag() const { return 2 * tag + 1; }

  std::string label() const {
    if (parts.size() == 1) return parts[0].label;
    return parts[0].label + " and " + std::to_string(parts.size() - 1) + " more";
  }
};

// Throws std::invalid_argument for a line without tensors, MessageError when MPI cannot take its messages.
const Line& checked(const Line& line);

inline std::string with_one_decimal(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.1f", value);
  return text;
}

}  // namespace pipedream
