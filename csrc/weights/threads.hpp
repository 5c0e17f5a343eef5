// Runs a function on several threads.
//
// torch has an OpenMP thread team. A second pool would compete with torch's workers, which spin for a while
// after each parallel region. So this borrows the team of the process: it looks up GOMP_parallel, the function
// that torch calls to run a parallel region, among the loaded libraries. GNU's, LLVM's and Intel's OpenMP all
// have it, and nothing is linked or loaded, so the core also runs without torch. If there is no such team, it
// starts threads for the call.
#pragma once

#include <dlfcn.h>

#include <thread>
#include <vector>

namespace pipedream {

// Calls work() on `count` threads at once, the calling thread included, and waits for all. work() must not throw.
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
