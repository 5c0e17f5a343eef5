// A message on a channel: a header of 128 bytes for each tensor, then the tensors, each aligned to a cache
// line.
//
//   small (up to 16 KiB, host memory)               large, host memory
//   one message, tag 2c                             one message with tag 2c, and one per tensor with tag 2c + 1
//   ┌────────┬────────┬───────────┬───────────┐     ┌────────┬────────┐ ┌───────────┐ ┌───────────┐
//   │ header │ header │ tensor 0  │ tensor 1  │     │ header │ header │ │ tensor 0  │ │ tensor 1  │
//   └────────┴────────┴───────────┴───────────┘     └────────┴────────┘ └───────────┘ └───────────┘
//   copied into the sender's staging buffer         tensors are sent in place; their receives are posted
//                                                   ahead, so their transfer does not wait for the header
//
// From device memory, the tensors follow the headers as one message, or as chunks. In all cases they are received into
// a slot, where forward or backward reads them.
//
// Consecutive bytes are what MPI transfers best: the receiver copies them out of the sender's memory, or the network
// card does. Several tensors as one message of a derived datatype go through buffers of some KiB instead, and each of
// these waits until the sender, which computes, calls MPI again.
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
  static constexpr std::size_t max_dims = 8;

  std::uint32_t magic = expected_magic;
  std::uint32_t dims = 0;
  std::int64_t microbatch = -1;
  std::uint64_t payload_bytes = 0;
  std::int64_t shape[max_dims] = {};
  char dtype[40] = {};

  Shape shape_vector() const { return Shape(shape, shape + (dims < max_dims ? dims : max_dims)); }
  std::string dtype_name() const { return std::string(dtype, strnlen(dtype, sizeof dtype)); }
};
static_assert(sizeof(Header) == 128, "the header is 128 bytes on every rank");

// Up to this size a copy costs less than a second message, which takes a few microseconds.
constexpr std::size_t largest_small_payload = 16 * 1024;

// Alignment of tensors in a message and in a slot: a cache line.
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

// A tensor as planned. The tensor that is sent may be smaller in any dimension.
struct TensorSpec {
  std::string label;       // such as "activation of layer 'conv3' (stage 1)"
  std::string dtype;       // such as "bfloat16"
  std::size_t item_bytes;  // bytes of one element
  Shape shape;

  std::size_t bytes() const { return elements(shape) * item_bytes; }
};

// A tensor to send: the caller's memory and its shape.
struct TensorRef {
  const void* data;
  Shape shape;
};

// The bytes of a tensor in a payload or in a slot.
struct ByteRange {
  std::size_t offset;
  std::size_t bytes;
};

// Bytes of a payload with these tensors, the alignment gaps included.
inline std::size_t total_bytes(const std::vector<ByteRange>& ranges) {
  return ranges.empty() ? 0 : ranges.back().offset + ranges.back().bytes;
}

}  // namespace pipedream
