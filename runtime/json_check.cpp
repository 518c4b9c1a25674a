#include "runtime/json_check.h"

#include <nlohmann/json.hpp>
#include <unordered_set>
#include <vector>

#include "runtime/error.h"
#include "runtime/file_tensor.h"

namespace q4s {
namespace {

using Json = nlohmann::json;

class Checker : public nlohmann::json_sax<Json> {
 public:
  explicit Checker(const std::string& where) : where_(where) {}

  bool null() override { return true; }
  bool boolean(bool) override { return true; }
  bool number_integer(number_integer_t) override { return true; }
  bool number_unsigned(number_unsigned_t) override { return true; }
  bool number_float(number_float_t, const string_t&) override { return true; }
  bool string(string_t&) override { return true; }
  bool binary(binary_t&) override { return true; }
  bool start_object(std::size_t) override { return descend(); }
  bool start_array(std::size_t) override { return descend(); }
  bool end_object() override { return ascend(); }
  bool end_array() override { return ascend(); }
  bool key(string_t& name) override {
    if (!keys_.back().insert(name).second) refuse("key " + in_quotes(name) + " appears twice");
    return true;
  }
  bool parse_error(std::size_t position, const std::string&, const nlohmann::detail::exception& e) override {
    std::string what = e.what();  // "[json.exception...] parse error at ...: syntax error ..."
    if (const size_t colon = what.find(": "); colon != std::string::npos) what.erase(0, colon + 2);
    refuse("not JSON at byte " + std::to_string(position) + ": " + what.substr(0, 200));
  }

 private:
  [[noreturn]] void refuse(const std::string& why) const {
    throw Error(ErrorKind::kInput, where_ + ": " + why);
  }
  bool descend() {
    constexpr size_t kMaxDepth = 64;
    if (keys_.size() == kMaxDepth) refuse("nested deeper than " + std::to_string(kMaxDepth));
    keys_.emplace_back();
    return true;
  }
  bool ascend() {
    keys_.pop_back();
    return true;
  }

  const std::string& where_;
  std::vector<std::unordered_set<std::string>> keys_;  // one set per open object or array
};

}  // namespace

void check_json(std::string_view text, const std::string& where) {
  Checker checker(where);
  Json::sax_parse(text, &checker);
}

}  // namespace q4s
