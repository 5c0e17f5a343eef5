// Work for several threads of the caller's choosing.
//
// torch keeps an OpenMP team. A second pool beside it would compete with torch's workers, which spin for
// a while after each of torch's own parallel regions, so the team of this process is borrowed: the very
// function that torch calls to run one, found by name among the libraries already loaded. Whichever OpenMP
// torch came with (GNU's, LLVM's and Intel's all have it), nothing is linked or loaded for it, and the
// core still runs without torch. Where there is no such team, threads are started for the call.
#pragma once

#include <dlfcn.h>

#include <thread>
#include <vector>

namespace pipedream {

// Calls work() on `count` threads at once, the calling one among them, and waits for all. It must not throw.
template <typename Work>
void on_threads(int count, Work& work) {
  if (count <= 1) return work();
  using Parallel = void (*)(void (*)(void*), void*, unsigned count, unsigned flags);
  static const auto parallel = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  const auto call = [](void* data) { (*static_cast<Work*>(data))(); };
  if (parallel != nullptr) return parallel(call, &work, static_cast<unsigned>(count), 0);
  std::vector<std::thread> others;
  for (int i = 1; i < count; ++i) others.emplace_back(call, &work);
  work();
  for (std::thread& other : others) other.join();
}

}  // namespace pipedream
