// A fixed set of threads that all execute the same function, each with its Part; the caller is part 0.
// Workers spin briefly between jobs, then sleep. One pool lives in the CPU backend and is lent to the
// quantiser.
#pragma once
#include <atomic>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "kernels/types.h"

namespace q4s {

// Cores this process may use: the smaller of its affinity mask and its cgroup's CPU quota, at least 1.
int usable_cores();

class ThreadPool {
 public:
  // threads = 0: usable_cores(). Throws Error(kUsage) beyond 1024.
  explicit ThreadPool(int threads = 0);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const { return int(workers_.size()) + 1; }

  // Runs fn(Part{i, threads()}) on every thread and waits. The first exception is thrown again here. Not
  // reentrant.
  void run(const std::function<void(Part)>& fn);
  // Inside run(): waits until every thread has arrived. A function that may throw must not use it.
  void barrier();
  // fn(begin, end) over [0, n) in chunks of `grain`, taken in turn: for uneven work whose result does not
  // depend on which thread did it.
  void parallel_for(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& fn);

 private:
  void work(int index);
  void execute(int index);

  std::vector<std::thread> workers_;
  const std::function<void(Part)>* job_ = nullptr;
  std::atomic<uint32_t> epoch_{0};    // a new value starts a job
  std::atomic<uint32_t> arrived_{0};  // barrier: threads waiting
  std::atomic<uint32_t> phase_{0};    // barrier: a new value opens it
  std::atomic<bool> stop_{false};
  std::mutex error_mutex_;
  std::exception_ptr error_;
};

}  // namespace q4s
