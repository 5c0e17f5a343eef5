// A device that is none: host memory, and streams that are threads. What is put on a stream is done later,
// one after the other, each after a moment, so that whoever forgets to wait reads what was there before.
//
// Linked instead of memory_cuda.cu, so that the channels for device memory run where there is no GPU.
#pragma once

#include <functional>

#include "streams.hpp"

namespace pipedream::fake {

// Puts work on a stream, such as a kernel.
void launch(cuda::Handle stream, std::function<void()> work);

// Streams no longer wait for events: what a channel without its waits would do.
void ignore_waits(bool ignored);

// Kernels so far that have made several copies at once.
std::size_t kernels();

}  // namespace pipedream::fake
