// A fake device: its memory is host memory, and its streams are threads. A stream performs its work in order, each
// item after a short delay, so that code that forgets to wait reads old data.
//
// Linked instead of memory_cuda.cu, so that channels for device memory are tested without a GPU.
#pragma once

#include <functional>

#include "memory/streams.hpp"

namespace pipedream::fake {

// Queues work on a stream, such as a kernel.
void launch(cuda::Handle stream, std::function<void()> work);

// Makes streams ignore waits for events, to show what a channel without them would do.
void ignore_waits(bool ignored);

// Number of calls of copy_all_on() so far.
std::size_t kernels();

}  // namespace pipedream::fake
