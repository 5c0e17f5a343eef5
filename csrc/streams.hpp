// Streams and events of the device, for copies that nobody waits for. A build without nvcc has none of
// them: every call throws.
//
//   compute stream   kernel ─── kernel ●  event           ● is recorded by whoever wrote the tensor;
//   copy stream                        └──► copy ● event    the copy stream waits for it, the host does not
//   progress thread        poll   poll   poll   poll └──► MPI_Isend                            time ->
#pragma once

#include <cstddef>
#include <vector>

namespace pipedream::cuda {

using Handle = void*;  // a cudaStream_t, such as torch.cuda.current_stream().cuda_stream

// A stream of its own that waits for no other, not even for the default stream.
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

// A moment on a stream.
class Event {
 public:
  Event();
  ~Event();
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;

  void record(Handle stream);        // when everything put on the stream so far is done
  void before(Handle stream) const;  // what is put on this stream from now on waits for it
  bool happened() const;             // also when it was never recorded

 private:
  void* handle_ = nullptr;
};

// Queues a copy between any two kinds of memory. Host memory must be pinned.
void copy_on(Handle stream, std::byte* target, const std::byte* source, std::size_t bytes);

// Within device memory.
struct Copy {
  std::byte* target;
  const std::byte* source;
  std::size_t bytes;
};

// Queues several copies that a kernel makes all at once: each by itself would cost a launch.
void copy_all_on(Handle stream, const std::vector<Copy>& copies);

// The device that calls of this thread are about, MPI's among them.
void use_device(int index);

}  // namespace pipedream::cuda
