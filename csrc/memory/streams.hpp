// CUDA streams and events, for copies that the host does not wait for. In a build without nvcc every call
// throws.
//
//   compute stream   kernel ─── kernel ●  event           ● is recorded by the writer of the tensor;
//   copy stream                        └──► copy ● event    the copy stream waits for it, the host does not
//   progress thread        poll   poll   poll   poll └──► MPI_Isend                            time ->
#pragma once

#include <cstddef>
#include <vector>

namespace pipedream::cuda {

using Handle = void*;  // a cudaStream_t, such as torch.cuda.current_stream().cuda_stream

// A non-blocking stream: it does not synchronise with any other stream, the default stream included.
class Stream {
 public:
  Stream();
  ~Stream();
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  Handle handle() const { return handle_; }

 private:
  Handle handle_ = nullptr;
};

// A CUDA event without timing. Member names as in at::cuda::CUDAEvent.
class Event {
 public:
  Event();
  ~Event();
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;

  void record(Handle stream);       // captures the work queued on the stream so far
  void block(Handle stream) const;  // work queued on this stream from now on waits for the event
  bool query() const;               // true once that work is done, and if the event was never recorded

 private:
  void* handle_ = nullptr;
};

// Queues a copy between any two kinds of memory. Host memory must be pinned.
void copy_on(Handle stream, std::byte* target, const std::byte* source, std::size_t bytes);

// A copy within device memory.
struct Copy {
  std::byte* target;
  const std::byte* source;
  std::size_t bytes;
};

// Queues several copies as one kernel, which saves a launch per copy.
void copy_all_on(Handle stream, const std::vector<Copy>& copies);

// Selects the device for all CUDA calls of this thread, those of MPI included.
void use_device(int index);

}  // namespace pipedream::cuda
