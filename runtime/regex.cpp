// See regex.h. The only file that includes PCRE2.
#include "runtime/regex.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include "runtime/error.h"
#include "runtime/utf8.h"

namespace q4s {
namespace {

std::string message(int code) {
  char text[256];
  pcre2_get_error_message(code, reinterpret_cast<PCRE2_UCHAR*>(text), sizeof text);
  return text;
}

}  // namespace

struct Regex::Compiled {
  pcre2_code* code = nullptr;
  std::string pattern;
  ~Compiled() { pcre2_code_free(code); }

  // The first match at or after `from` and its end in `end`; npos: none. text must be valid UTF-8.
  size_t match(pcre2_match_data* data, std::string_view text, size_t from, size_t* end) const {
    const auto* subject = reinterpret_cast<PCRE2_SPTR>(text.data());
    int rc = pcre2_match(code, subject, text.size(), from, PCRE2_NO_UTF_CHECK, data, nullptr);
    if (rc == PCRE2_ERROR_JIT_STACKLIMIT) {  // the interpreter keeps its stack on the heap
      rc = pcre2_match(code, subject, text.size(), from, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT, data, nullptr);
    }
    if (rc == PCRE2_ERROR_NOMATCH) return std::string_view::npos;
    if (rc < 0) throw Error(ErrorKind::kRuntime, "regex /" + pattern + "/: " + message(rc));
    const PCRE2_SIZE* span = pcre2_get_ovector_pointer(data);
    *end = span[1];
    return span[0];
  }
};

namespace {

struct MatchData {
  explicit MatchData(const pcre2_code* code) : data(pcre2_match_data_create_from_pattern(code, nullptr)) {}
  ~MatchData() { pcre2_match_data_free(data); }
  MatchData(const MatchData&) = delete;
  pcre2_match_data* data;
};

}  // namespace

Regex::Regex(const std::string& pattern) : compiled_(std::make_unique<Compiled>()) {
  int error = 0;
  PCRE2_SIZE offset = 0;
  compiled_->pattern = pattern;
  compiled_->code = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(),
                                  PCRE2_UTF | PCRE2_UCP, &error, &offset, nullptr);
  if (compiled_->code == nullptr) {
    throw Error(ErrorKind::kInput,
                "regex /" + pattern + "/, offset " + std::to_string(offset) + ": " + message(error));
  }
  pcre2_jit_compile(compiled_->code, PCRE2_JIT_COMPLETE);  // where it cannot, matching interprets
}

Regex::~Regex() = default;
Regex::Regex(Regex&&) noexcept = default;
Regex& Regex::operator=(Regex&&) noexcept = default;

bool Regex::search(std::string_view text) const {
  const MatchData scratch(compiled_->code);
  size_t end = 0;
  return compiled_->match(scratch.data, text, 0, &end) != std::string_view::npos;
}

void Regex::split(std::string_view text, const std::function<void(std::string_view)>& piece) const {
  const MatchData scratch(compiled_->code);
  size_t done = 0;
  for (size_t from = 0; from < text.size();) {
    size_t end = 0;
    const size_t begin = compiled_->match(scratch.data, text, from, &end);
    if (begin == std::string_view::npos) break;
    if (end <= begin) {  // an empty match cuts nothing
      if (begin >= text.size()) break;
      from = begin + utf8_unit(text.substr(begin)).size;
      continue;
    }
    if (begin > done) piece(text.substr(done, begin - done));
    piece(text.substr(begin, end - begin));
    from = done = end;
  }
  if (done < text.size()) piece(text.substr(done));
}

}  // namespace q4s
