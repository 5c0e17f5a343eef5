#include "fake_device.hpp"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>

#include "memory/copy_part.hpp"
#include "memory/memory.hpp"

namespace pipedream {

namespace {

std::atomic<bool> waits_ignored{false};
std::atomic<std::size_t> kernels_launched{0};

class FakeStream {
 public:
  FakeStream() : thread_([this] { run(); }) {}
  ~FakeStream() {
    put([this] { ended_ = true; });
    thread_.join();
  }

  void put(std::function<void()> work) {
    const std::lock_guard held(mutex_);
    queue_.push_back(std::move(work));
    wake_.notify_one();
  }

 private:
  void run() {
    while (!ended_) {
      std::function<void()> work;
      {
        std::unique_lock held(mutex_);
        wake_.wait(held, [this] { return !queue_.empty(); });
        work = std::move(queue_.front());
        queue_.pop_front();
      }
      std::this_thread::sleep_for(std::chrono::microseconds(100));
      work();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::function<void()>> queue_;
  bool ended_ = false;  // accessed by the stream's thread only
  std::thread thread_;
};

// Number of records, and the number of the last completed one. Streams keep it alive.
struct FakeEvent {
  std::mutex mutex;
  std::condition_variable changed;
  std::size_t recorded = 0, happened = 0;
};
using SharedEvent = std::shared_ptr<FakeEvent>;

FakeStream& stream_of(cuda::Handle handle) { return *static_cast<FakeStream*>(handle); }

}  // namespace

namespace fake {

void launch(cuda::Handle stream, std::function<void()> work) { stream_of(stream).put(std::move(work)); }
void ignore_waits(bool ignored) { waits_ignored = ignored; }
std::size_t kernels() { return kernels_launched; }

}  // namespace fake

namespace cuda {

bool compiled() { return true; }
int device_count() { return 1; }

std::byte* allocate(std::size_t bytes, MemoryKind) {
  const std::size_t rounded = (bytes + 4095) / 4096 * 4096 + 4096;
  void* const data = std::aligned_alloc(4096, rounded);
  std::memset(data, 0, rounded);
  return static_cast<std::byte*>(data);
}
void free_pinned(std::byte* data) { std::free(data); }
void free_device(std::byte* data) { std::free(data); }
void copy(std::byte* target, const std::byte* source, std::size_t bytes) { std::memcpy(target, source, bytes); }

Stream::Stream() : handle_(new FakeStream) {}
Stream::~Stream() { delete static_cast<FakeStream*>(handle_); }

Event::Event() : handle_(new SharedEvent(std::make_shared<FakeEvent>())) {}
Event::~Event() { delete static_cast<SharedEvent*>(handle_); }

void Event::record(Handle stream) {
  const SharedEvent event = *static_cast<SharedEvent*>(handle_);
  std::size_t number = 0;
  {
    const std::lock_guard held(event->mutex);
    number = ++event->recorded;
  }
  stream_of(stream).put([event, number] {
    const std::lock_guard held(event->mutex);
    event->happened = number;
    event->changed.notify_all();
  });
}

void Event::block(Handle stream) const {
  const SharedEvent event = *static_cast<SharedEvent*>(handle_);
  std::size_t number = 0;
  {
    const std::lock_guard held(event->mutex);
    number = event->recorded;
  }
  if (waits_ignored) return;
  stream_of(stream).put([event, number] {
    std::unique_lock held(event->mutex);
    event->changed.wait(held, [&] { return event->happened >= number; });
  });
}

bool Event::query() const {
  const SharedEvent event = *static_cast<SharedEvent*>(handle_);
  const std::lock_guard held(event->mutex);
  return event->happened == event->recorded;
}

void copy_on(Handle stream, std::byte* target, const std::byte* source, std::size_t bytes) {
  stream_of(stream).put([=] { std::memcpy(target, source, bytes); });
}

void copy_all_on(Handle stream, const std::vector<Copy>& copies) {
  ++kernels_launched;
  constexpr std::size_t threads = 37;
  stream_of(stream).put([copies] {
    for (const Copy& copy : copies) {
      for (std::size_t thread = 0; thread < threads; ++thread) {
        copy_part(copy.target, copy.source, copy.bytes, thread, threads);
      }
    }
  });
}

void use_device(int) {}

}  // namespace cuda

}  // namespace pipedream
