// Progress of long work on stderr: a bar with ETA on a terminal, otherwise a plain line at each tenth. Silent
// with
// --quiet. Knows nothing of what is being done.
#pragma once
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

namespace q4s {

class Progress {
 public:
  // label "quantising", unit "blocks": "quantising 12/30 blocks, 40 %, ETA 1m20s". total > 0.
  Progress(std::string label, int64_t total, std::string unit);
  ~Progress();  // removes the bar
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  // done of total; work done before this run (a resumed job) belongs into `skip`, so that the ETA leaves it
  // out.
  void update(int64_t done, const std::string& note = "");
  void skip(int64_t done) { skipped_ = done; }

 private:
  using Clock = std::chrono::steady_clock;
  std::string label_, unit_;
  int64_t total_, skipped_ = 0, tenth_ = 0;
  Clock::time_point start_ = Clock::now(), drawn_{};
};

// For work that reports bytes done of all: a bar in MB, made at the first report and removed at the last.
// Null where stderr is no terminal: plain lines would say little.
std::function<void(size_t, size_t)> bytes_bar(const std::string& label);

// "850 ms", "12.3 s", "1m20s", "2h05m"
std::string duration_text(double seconds);
// "93.1 MB": decimal units
std::string bytes_text(double bytes);

}  // namespace q4s
