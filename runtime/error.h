// The one exception type of the project: a kind, which is also the exit code of the tools, and a text that
// says what, where (file, tensor, offset), what was expected and what was found. Own bugs are asserted, not
// thrown.
#pragma once
#include <stdexcept>
#include <string>

namespace q4s {

enum class ErrorKind {  // values are the tools' exit codes
  kRuntime = 1,         // failed while running: non-finite logits, device fault
  kUsage = 2,
  kInput = 3,     // bad, corrupt or unsupported input
  kResource = 4,  // out of memory or disk
  kNoDevice = 5,  // a GPU was demanded and none is usable
};

class Error : public std::runtime_error {
 public:
  Error(ErrorKind kind, const std::string& text) : std::runtime_error(text), kind_(kind) {}
  ErrorKind kind() const { return kind_; }

 private:
  ErrorKind kind_;
};

}  // namespace q4s
