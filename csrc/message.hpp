// What travels on a channel: a header of 128 bytes, then the tensor's bytes.
//
//   small (capacity <= 16 KiB, host memory)      large
//   one message, tag 2c                          two messages, tags 2c and 2c + 1
//   ┌────────┬─────────┐                         ┌────────┐ ┌─────────────────────┐
//   │ header │ payload │                         │ header │ │       payload       │
//   └────────┴─────────┘                         └────────┘ └─────────────────────┘
//   copied into the sender's staging buffer      payload sent from the tensor itself; its receive is
//                                                posted ahead, so its transfer waits for no header
//
// Either way the payload lands in the receiver's slot, where forward or backward reads it.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
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

inline std::string text_of(const std::string& dtype, const Shape& shape) {
  std::string text = dtype + " [";
  for (std::size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

}  // namespace pipedream
