#include "quant/background.h"

namespace q4s {

Background::Background() : thread_([this] { work(); }) {}

Background::~Background() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

void Background::rethrow() {
  if (error_) std::rethrow_exception(error_);
}

void Background::submit(std::function<void()> job) {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return !next_; });
  rethrow();
  next_ = std::move(job);
  changed_.notify_all();
}

void Background::finish() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return !next_ && !busy_; });
  rethrow();
}

void Background::work() {
  std::unique_lock lock(mutex_);
  for (;;) {
    changed_.wait(lock, [&] { return next_ || stop_; });
    if (!next_) return;
    const std::function<void()> job = std::move(next_);
    next_ = nullptr;
    busy_ = true;
    changed_.notify_all();
    if (!error_) {
      lock.unlock();
      std::exception_ptr error;
      try {
        job();
      } catch (...) {
        error = std::current_exception();
      }
      lock.lock();
      error_ = error;
    }
    busy_ = false;
    changed_.notify_all();
  }
}

}  // namespace q4s
