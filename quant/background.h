// One thread that does jobs in order while the caller goes on: writing block l - 1 while block l is solved.
#pragma once
#include <condition_variable>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>

namespace q4s {

class Background {
 public:
  Background();
  ~Background();  // after the jobs that are there
  Background(const Background&) = delete;
  Background& operator=(const Background&) = delete;

  // Waits while another job waits. Throws what an earlier one threw; later jobs are then dropped.
  void submit(std::function<void()> job);
  void finish();  // until all is done; throws likewise

 private:
  void work();
  void rethrow();

  std::mutex mutex_;
  std::condition_variable changed_;
  std::function<void()> next_;
  bool busy_ = false, stop_ = false;
  std::exception_ptr error_;
  std::thread thread_;
};

}  // namespace q4s
