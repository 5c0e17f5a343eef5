// What travels on a channel: a header of 128 bytes for each tensor, then the tensors, each on a cache line
// of its own.
//
//   small (up to 16 KiB, host memory)               large
//   one message, tag 2c                             two messages, tags 2c and 2c + 1
//   ┌────────┬────────┬───────────┬───────────┐     ┌────────┬────────┐ ┌───────────┬───────────┐
//   │ header │ header │ tensor 0  │ tensor 1  │     │ header │ header │ │ tensor 0  │ tensor 1  │
//   └────────┴────────┴───────────┴───────────┘     └────────┴────────┘ └───────────┴───────────┘
//   copied into the sender's staging buffer         tensors sent from where they are; their receive is
//                                                   posted ahead, so their transfer waits for no header
//
// Either way the tensors land in the receiver's slot, where forward or backward reads them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

namespace pipedream {

using Shape = std::vector<std::int64_t>;

struct Header {
  static constexpr std::uint32_t expected_magic = 0x31445050;  // "PPD1"
  static constexpr std::size_t most_dims = 8;

  std::uint32_t magic = expected_magic;
  std::uint32_t dims = 0;
  std::int64_t minibatch = -1;
  std::uint64_t payload_bytes = 0;
  std::int64_t shape[most_dims] = {};
  char dtype[40] = {};

  Shape shape_vector() const { return Shape(shape, shape + (dims < most_dims ? dims : most_dims)); }
  std::string dtype_name() const { return std::string(dtype, strnlen(dtype, sizeof dtype)); }
};
static_assert(sizeof(Header) == 128, "the header is 128 bytes on every rank");

// Below this a copy is cheaper than a second message (a few microseconds each); above it is not.
constexpr std::size_t largest_small_payload = 16 * 1024;

// A tensor begins on a cache line, in the message as in the slot.
constexpr std::size_t tensor_alignment = 64;
inline std::size_t aligned(std::size_t bytes) {
  return (bytes + tensor_alignment - 1) / tensor_alignment * tensor_alignment;
}

inline std::size_t elements(const Shape& shape) {
  std::size_t count = 1;
  for (const std::int64_t size : shape) count *= static_cast<std::size_t>(size);
  return count;
}

inline std::string text_of(const std::string& dtype, const Shape& shape) {
  std::string text = dtype + " [";
  for (std::size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

// One tensor of a boundary as it was planned: what is sent may be smaller in any dimension.
struct Part {
  std::string label;  // such as "activation of layer 'conv3' (stage 1)"
  std::string dtype;  // such as "bfloat16"
  std::size_t item;   // bytes of one element
  Shape shape;

  std::size_t bytes() const { return elements(shape) * item; }
};

// One tensor that is sent: the caller's memory, and its shape.
struct Piece {
  const void* data;
  Shape shape;
};

// Where a tensor stands behind the headers, or in the slot.
struct Place {
  std::size_t offset;
  std::size_t bytes;
};

// Bytes of all tensors together, one behind the other.
inline std::size_t extent(const std::vector<Place>& places) {
  return places.empty() ? 0 : places.back().offset + places.back().bytes;
}

}  // namespace pipedream
