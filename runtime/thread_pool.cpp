#include "runtime/thread_pool.h"

#include <sched.h>

#include <cmath>
#include <cstdio>
#include <string>

#include "runtime/error.h"

namespace q4s {
namespace {

// Long enough to bridge the gap between two operations of a token, short enough to give an idle core back.
constexpr int kSpins = 20000;

void wait_for_change(std::atomic<uint32_t>& value, uint32_t old) {
  for (int i = 0; i < kSpins; ++i) {
    if (value.load(std::memory_order_acquire) != old) return;
    __builtin_ia32_pause();
  }
  value.wait(old, std::memory_order_acquire);
}

// Quota of the cgroup in cores, or 0 where none is set (v2, then v1).
double cgroup_quota() {
  double cores = 0;
  if (FILE* f = std::fopen("/sys/fs/cgroup/cpu.max", "r")) {
    double quota, period;
    if (std::fscanf(f, "%lf %lf", &quota, &period) == 2 && period > 0) cores = quota / period;
    std::fclose(f);
    return cores;
  }
  double quota = 0, period = 0;
  if (FILE* f = std::fopen("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "r")) {
    if (std::fscanf(f, "%lf", &quota) != 1) quota = 0;
    std::fclose(f);
  }
  if (FILE* f = std::fopen("/sys/fs/cgroup/cpu/cpu.cfs_period_us", "r")) {
    if (std::fscanf(f, "%lf", &period) != 1) period = 0;
    std::fclose(f);
  }
  return quota > 0 && period > 0 ? quota / period : 0;
}

}  // namespace

int usable_cores() {
  cpu_set_t set;
  int cores = int(std::thread::hardware_concurrency());
  if (sched_getaffinity(0, sizeof set, &set) == 0) cores = CPU_COUNT(&set);
  if (const double quota = cgroup_quota(); quota > 0) cores = std::min(cores, int(std::ceil(quota)));
  return std::max(cores, 1);
}

ThreadPool::ThreadPool(int threads) {
  if (threads == 0) threads = usable_cores();
  if (threads < 1 || threads > 1024)
    throw Error(ErrorKind::kUsage, "threads: " + std::to_string(threads) + " is not in 1..1024");
  workers_.reserve(size_t(threads) - 1);
  for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { work(i); });
}

ThreadPool::~ThreadPool() {
  stop_ = true;
  epoch_.fetch_add(1, std::memory_order_release);
  epoch_.notify_all();
  for (auto& w : workers_) w.join();
}

void ThreadPool::execute(int index) {
  try {
    (*job_)(Part{index, threads()});
  } catch (...) {
    std::lock_guard lock(error_mutex_);
    if (!error_) error_ = std::current_exception();
  }
}

void ThreadPool::work(int index) {
  uint32_t seen = 0;
  for (;;) {
    wait_for_change(epoch_, seen);
    seen = epoch_.load(std::memory_order_acquire);
    if (stop_) return;
    execute(index);
    barrier();
  }
}

void ThreadPool::run(const std::function<void(Part)>& fn) {
  job_ = &fn;
  error_ = nullptr;
  if (!workers_.empty()) {
    epoch_.fetch_add(1, std::memory_order_release);
    epoch_.notify_all();
  }
  execute(0);
  barrier();
  if (error_) std::rethrow_exception(error_);
}

void ThreadPool::barrier() {
  if (workers_.empty()) return;
  const uint32_t phase = phase_.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == uint32_t(threads())) {
    arrived_.store(0, std::memory_order_relaxed);
    phase_.fetch_add(1, std::memory_order_release);
    phase_.notify_all();
  } else {
    wait_for_change(phase_, phase);
  }
}

void ThreadPool::parallel_for(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& fn) {
  std::atomic<int64_t> next{0};
  run([&](Part) {
    for (;;) {
      const int64_t begin = next.fetch_add(grain, std::memory_order_relaxed);
      if (begin >= n) return;
      fn(begin, std::min(n, begin + grain));
    }
  });
}

}  // namespace q4s
