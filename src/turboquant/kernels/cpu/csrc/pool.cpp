#include "pool.h"

#include <dlfcn.h>
#if defined(__linux__)
#include <link.h>
#endif
#include <algorithm>
#include <atomic>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

namespace tq {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

#if defined(__linux__)
int keep_openmp(dl_phdr_info* info, size_t, void* found) {
  auto& best = *static_cast<std::string*>(found);
  const std::string path = info->dlpi_name ? info->dlpi_name : "";
  const std::string file = path.substr(path.rfind('/') + 1);
  const bool openmp = file.rfind("libgomp", 0) == 0 || file.rfind("libiomp5", 0) == 0 || file.rfind("libomp", 0) == 0;
  const bool torchs = path.find("/torch") != std::string::npos;
  if (openmp && (best.empty() || torchs)) best = path;
  return 0;
}
#endif

GompParallel find_team() {
#if defined(__linux__)
  std::string path;
  dl_iterate_phdr(keep_openmp, &path);
  if (path.empty()) return nullptr;
  void* library = dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  return library ? reinterpret_cast<GompParallel>(dlsym(library, "GOMP_parallel")) : nullptr;
#else
  return nullptr;
#endif
}

GompParallel team() {
  static const GompParallel found = find_team();
  return found;
}

struct Job {
  const std::function<void(int64_t, int)>* body;
  int64_t tasks;
  int threads;
  std::atomic<int64_t> next{0};
  std::atomic<int> workers{0};
  void work() {
    const int worker = workers.fetch_add(1);
    if (worker >= threads) return;
    for (int64_t i; (i = next.fetch_add(1)) < tasks;) (*body)(i, worker);
  }
};

void enter(void* job) { static_cast<Job*>(job)->work(); }

}  // namespace

void parallel(int64_t tasks, int threads, const std::function<void(int64_t, int)>& body) {
  threads = int(std::min<int64_t>(threads, tasks));
  if (threads <= 1) {
    for (int64_t i = 0; i < tasks; i++) body(i, 0);
    return;
  }
  Job job;
  job.body = &body, job.tasks = tasks, job.threads = threads;
  if (team()) {
    team()(enter, &job, unsigned(threads), 0);
    return;
  }
  std::vector<std::thread> others;
  for (int i = 1; i < threads; i++) others.emplace_back([&job] { job.work(); });
  job.work();
  for (auto& t : others) t.join();
}

const char* pool_name() { return team() ? "torch's OpenMP team" : "own threads"; }

}  // namespace tq
