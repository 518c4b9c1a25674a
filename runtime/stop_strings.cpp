#include "runtime/stop_strings.h"

#include <algorithm>
#include <utility>

#include "runtime/error.h"

namespace q4s {

StopStrings::StopStrings(std::vector<std::string> strings) : strings_(std::move(strings)) {
  for (const std::string& s : strings_)
    if (s.empty()) throw Error(ErrorKind::kUsage, "--stop: an empty string would stop at once");
}

std::string StopStrings::push(std::string_view text) {
  if (hit_) return "";
  held_ += text;
  size_t pass = 0, stop_end = std::string::npos;
  for (const std::string& s : strings_) {
    const size_t at = held_.find(s);
    if (at == std::string::npos || at + s.size() > stop_end || (at + s.size() == stop_end && at > pass))
      continue;
    hit_ = true;
    pass = at;
    stop_end = at + s.size();
  }
  if (!hit_) {
    // Keep the longest end of the text that begins a stop string.
    size_t keep = 0;
    for (const std::string& s : strings_)
      for (size_t n = std::min(s.size() - 1, held_.size()); n > keep; --n)
        if (held_.compare(held_.size() - n, n, s, 0, n) == 0) keep = n;
    pass = held_.size() - keep;
  }
  std::string passed = held_.substr(0, pass);
  held_.erase(0, hit_ ? held_.size() : pass);
  return passed;
}

std::string StopStrings::flush() { return std::exchange(held_, ""); }

}  // namespace q4s
