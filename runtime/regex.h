// Regular expressions over UTF-8 with Unicode classes: PCRE2 behind one type, used to split text for
// byte-level BPE and to pick tensors by name. The only header that stands for PCRE2.
#pragma once
#include <functional>
#include <memory>
#include <string>
#include <string_view>

namespace q4s {

class Regex {
 public:
  explicit Regex(const std::string& pattern);  // throws Error(kInput) with the offset of the mistake
  ~Regex();
  Regex(Regex&&) noexcept;
  Regex& operator=(Regex&&) noexcept;

  bool search(std::string_view text) const;  // matches anywhere
  // Cuts text into its non-empty matches and what lies between them, in order, nothing lost. text must be
  // valid UTF-8. Throws Error(kRuntime) if matching takes unreasonably long.
  void split(std::string_view text, const std::function<void(std::string_view)>& piece) const;

 private:
  struct Compiled;
  std::unique_ptr<Compiled> compiled_;
};

}  // namespace q4s
