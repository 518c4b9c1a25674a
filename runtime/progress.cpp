#include "runtime/progress.h"

#include <algorithm>
#include <cmath>
#include <memory>

#include "runtime/log.h"

namespace q4s {

Progress::Progress(std::string label, int64_t total, std::string unit)
    : label_(std::move(label)), unit_(std::move(unit)), total_(std::max<int64_t>(total, 1)) {}

Progress::~Progress() { log_status(""); }

void Progress::update(int64_t done, const std::string& note) {
  const auto now = Clock::now();
  const double seconds = std::chrono::duration<double>(now - start_).count();
  const double fraction = std::clamp(double(done) / double(total_), 0.0, 1.0);
  std::string text =
      strprintf("%lld/%lld %s, %.0f %%", (long long)done, (long long)total_, unit_.c_str(), 100 * fraction);
  if (done > skipped_ && done < total_)
    text += ", ETA " + duration_text(seconds * double(total_ - done) / double(done - skipped_));
  if (!note.empty()) text += ", " + note;

  if (log_to_terminal()) {
    if (now - drawn_ < std::chrono::milliseconds(100) && done < total_) return;
    drawn_ = now;
    constexpr int kWidth = 24;
    const int full = int(std::lround(fraction * kWidth));
    log_status(label_ + " [" + std::string(full, '=') + std::string(kWidth - full, ' ') + "] " + text);
  } else if (const int64_t tenth = int64_t(10 * fraction); tenth > tenth_) {
    tenth_ = tenth;
    log_info("%s %s", label_.c_str(), text.c_str());
  }
}

std::function<void(size_t, size_t)> bytes_bar(const std::string& label) {
  if (!log_to_terminal()) return nullptr;
  return [label, bar = std::shared_ptr<Progress>()](size_t done, size_t total) mutable {
    if (!bar) bar = std::make_shared<Progress>(label, int64_t(total / 1000000), "MB");
    bar->update(int64_t(done / 1000000));
    if (done >= total) bar.reset();
  };
}

std::string duration_text(double s) {
  if (s < 1) return strprintf("%.0f ms", s * 1e3);
  if (s < 60) return strprintf("%.1f s", s);
  const long long whole = std::llround(s);
  if (whole < 3600) return strprintf("%lldm%02llds", whole / 60, whole % 60);
  return strprintf("%lldh%02lldm", whole / 3600, whole / 60 % 60);
}

std::string bytes_text(double bytes) {
  if (bytes < 1e3) return strprintf("%.0f B", bytes);
  if (bytes < 1e6) return strprintf("%.1f kB", bytes / 1e3);
  if (bytes < 1e9) return strprintf("%.1f MB", bytes / 1e6);
  return strprintf("%.2f GB", bytes / 1e9);
}

}  // namespace q4s
