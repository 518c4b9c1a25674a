// Ends a streamed text before the stop string that is complete first, however the text arrives in pieces.
// Knows nothing of tokens.
#pragma once
#include <string>
#include <string_view>
#include <vector>

namespace q4s {

class StopStrings {
 public:
  // Throws Error(kUsage) for an empty string.
  explicit StopStrings(std::vector<std::string> strings);

  // Text in; out comes what can no longer belong to a stop string. Nothing more after a hit.
  std::string push(std::string_view text);
  bool hit() const { return hit_; }
  std::string flush();  // end of the text: what was held back, unless a stop string was hit

 private:
  std::vector<std::string> strings_;
  std::string held_;  // shorter than the longest stop string
  bool hit_ = false;
};

}  // namespace q4s
