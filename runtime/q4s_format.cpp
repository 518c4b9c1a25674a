#include "runtime/q4s_format.h"

#include <algorithm>
#include <cstring>
#include <nlohmann/json.hpp>
#include <optional>
#include <unordered_set>

#include "runtime/checksum.h"
#include "runtime/error.h"
#include "runtime/file_kind.h"
#include "runtime/file_tensor.h"
#include "runtime/json_check.h"

namespace q4s {
namespace {

using Json = nlohmann::json;

[[noreturn]] void refuse(const std::string& where, const std::string& why) {
  throw Error(ErrorKind::kInput, where + ": " + why);
}

std::string dump(const Json& json) { return json.dump(-1, ' ', true).substr(0, 100); }

// Fields of one JSON object, each refused by name and value when it is not of its kind.
class Fields {
 public:
  Fields(const Json& json, std::string where) : json_(json), where_(std::move(where)) {
    if (!json.is_object()) refuse(where_, "is " + dump(json) + ", not an object");
  }
  const std::string& where() const { return where_; }

  const Json& at(const char* key) const {
    const auto it = json_.find(key);
    if (it == json_.end()) refuse(where_, std::string("has no ") + key);
    return *it;
  }
  const Json& list(const char* key) const {
    if (!at(key).is_array()) wrong(key, "a list");
    return at(key);
  }
  const std::string& text(const char* key) const {
    if (!at(key).is_string()) wrong(key, "a text");
    return at(key).get_ref<const std::string&>();
  }
  uint64_t number(const char* key) const {
    if (!at(key).is_number_unsigned()) wrong(key, "an unsigned integer");
    return at(key).get<uint64_t>();
  }
  std::pair<uint64_t, uint64_t> two(const char* key) const {
    const Json& v = list(key);
    if (v.size() != 2 || !v[0].is_number_unsigned() || !v[1].is_number_unsigned()) {
      wrong(key, "two unsigned integers");
    }
    return {v[0].get<uint64_t>(), v[1].get<uint64_t>()};
  }
  Q4sPart part(const char* key) const {
    const auto [offset, bytes] = two(key);
    if (offset > UINT64_MAX - bytes) wrong(key, "a range that 64 bits can hold");
    return {offset, bytes};
  }
  uint64_t checksum() const {
    const std::string& hex = text("xxh3");
    if (hex.size() != 16 || hex.find_first_not_of("0123456789abcdef") != std::string::npos) {
      wrong("xxh3", "16 lower-case hex digits");
    }
    return std::stoull(hex, nullptr, 16);
  }
  [[noreturn]] void wrong(const char* key, const char* wanted) const {
    refuse(where_, std::string(key) + " is " + dump(at(key)) + ", not " + wanted);
  }

 private:
  const Json& json_;
  std::string where_;
};

std::optional<Format> parse_format(const std::string& name) {
  for (const Format f : {Format::kF32, Format::kF16, Format::kBF16, Format::kQ8, Format::kQ4}) {
    if (name == format_name(f)) return f;
  }
  return {};
}

Q4sEntry parse_tensor(const Json& json, const std::string& where) {
  const Fields outer(json, where);
  Q4sEntry e;
  e.name = outer.text("name");
  const Fields in(json, where + " " + in_quotes(e.name));
  const auto format = parse_format(in.text("format"));
  if (!format) in.wrong("format", "one of f32, f16, bf16, q8, q4");
  e.format = *format;
  const auto [n, k] = in.two("shape");
  if (n == 0 || k == 0 || n > kMaxDim || k > kMaxDim) in.wrong("shape", "two dimensions of 1 to 2147483647");
  e.n = int64_t(n);
  e.k = int64_t(k);
  if (has_scales(e.format)) {
    const uint64_t group = in.number("group");
    if (group == 0 || group > kMaxDim || (group % 32 != 0 && group != k)) {
      in.wrong("group", "a multiple of 32 or the whole row");
    }
    e.group = int64_t(group);
    const std::string& grid = in.text("grid");
    if (grid != "int" && !(grid == "half" && e.format == Format::kQ4)) {
      in.wrong("grid", "int, or half for q4");
    }
    e.grid = grid == "half" ? Grid::kHalf : Grid::kInt;
    if (in.number("bits") != (e.format == Format::kQ4 ? 4 : 8)) in.wrong("bits", "that of the format");
    e.scales = in.part("scales");
  }
  e.data = in.part("data");
  e.checksum = in.checksum();

  uint64_t data, scales;
  if (!part_bytes(e, &data, &scales)) refuse(in.where(), "shape " + dump(in.at("shape")) + " overflows");
  const auto sized = [&](const char* key, const Q4sPart& part, uint64_t bytes) {
    if (part.bytes == bytes) return;
    refuse(in.where(), std::string(key) + " has " + std::to_string(part.bytes) + " bytes, shape " +
                           dump(in.at("shape")) + " needs " + std::to_string(bytes));
  };
  sized("data", e.data, data);
  sized("scales", e.scales, scales);
  return e;
}

Q4sBlobEntry parse_blob(const Json& json, const std::string& where) {
  const Fields outer(json, where);
  const std::string& name = outer.text("name");
  const Fields in(json, where + " " + in_quotes(name));
  return {name, in.part("data"), in.checksum()};
}

void put(uint8_t* at, uint64_t value, int bytes) {
  for (int i = 0; i < bytes; ++i) at[i] = uint8_t(value >> 8 * i);
}

uint64_t take(const uint8_t* at, int bytes) {
  uint64_t value = 0;
  for (int i = 0; i < bytes; ++i) value |= uint64_t(at[i]) << 8 * i;
  return value;
}

}  // namespace

bool part_bytes(const Q4sEntry& e, uint64_t* data, uint64_t* scales) {
  const int64_t bytes = tensor_bytes(e.format, e.n, e.k);
  if (bytes < 0) return false;
  *data = uint64_t(bytes);
  // n < 2^31, k < 2^31 and a group of 32 or the whole row: no overflow here.
  *scales = has_scales(e.format) ? uint64_t(e.n) * uint64_t(ceil_div(e.k, e.group)) * 2 : 0;
  return true;
}

std::array<uint8_t, kQ4sAlign> preamble_bytes(const Q4sPreamble& p) {
  std::array<uint8_t, kQ4sAlign> out{};
  std::memcpy(out.data(), "Q4S", 4);
  put(&out[4], p.major, 2);
  put(&out[6], p.minor, 2);
  put(&out[8], p.header_offset, 8);
  put(&out[16], p.header_bytes, 8);
  put(&out[24], p.file_bytes, 8);
  put(&out[32], p.header_checksum, 8);
  put(&out[40], xxh3(out.data(), 40), 8);
  return out;
}

Q4sPreamble parse_preamble(std::span<const uint8_t> file, const std::string& path) {
  if (file.size() < 4 || std::memcmp(file.data(), "Q4S", 4) != 0) {
    if (std::all_of(file.begin(), file.begin() + std::min<ptrdiff_t>(48, ptrdiff_t(file.size())),
                    [](uint8_t b) { return b == 0; })) {
      refuse(path,
             "not a finished .q4s file: its preamble is empty, as in a file whose writing was cut short");
    }
    refuse_kind(path, file, "a .q4s file");
  }
  const std::string size = std::to_string(file.size());
  if (file.size() < kQ4sAlign) {
    refuse(path, "truncated: file has " + size + " bytes, its preamble alone has 4096");
  }
  Q4sPreamble p;
  p.major = uint16_t(take(&file[4], 2));
  p.minor = uint16_t(take(&file[6], 2));
  if (p.major != kQ4sMajor) {
    refuse(path, "format version at byte 4 is " + std::to_string(p.major) + "." + std::to_string(p.minor) +
                     "; this program reads 1.x");
  }
  const uint64_t stored = take(&file[40], 8), computed = xxh3(file.data(), 40);
  if (stored != computed) {
    refuse(path, "preamble is damaged: checksum at byte 40 is " + checksum_text(stored) +
                     ", bytes 0 to 39 have " + checksum_text(computed));
  }
  p.header_offset = take(&file[8], 8);
  p.header_bytes = take(&file[16], 8);
  p.file_bytes = take(&file[24], 8);
  p.header_checksum = take(&file[32], 8);
  if (p.file_bytes != file.size()) {
    refuse(path, std::string(p.file_bytes > file.size() ? "truncated" : "bytes appended") + ": file has " +
                     size + " bytes, header says " + std::to_string(p.file_bytes));
  }
  if (p.header_offset < kQ4sAlign || p.header_offset > p.file_bytes || p.header_offset % kQ4sAlign != 0) {
    refuse(path, "header offset at byte 8 is " + std::to_string(p.header_offset) +
                     ", no multiple of 4096 inside the " + size + " bytes of the file");
  }
  if (p.header_bytes != p.file_bytes - p.header_offset || p.header_bytes > kQ4sMaxHeader) {
    refuse(path, "header size at byte 16 is " + std::to_string(p.header_bytes) + ", but from byte " +
                     std::to_string(p.header_offset) + " to the end there are " +
                     std::to_string(p.file_bytes - p.header_offset) + " (and at most 16777216 are allowed)");
  }
  const uint64_t header = xxh3(file.data() + p.header_offset, p.header_bytes);
  if (header != p.header_checksum) {
    refuse(path, "header is damaged: checksum at byte 32 is " + checksum_text(p.header_checksum) +
                     ", the header has " + checksum_text(header));
  }
  return p;
}

std::string header_text(const Q4sHeader& header) {
  std::string out;
  const auto text = [&](const char* key, const std::string& s) { out += key + Json(s).dump(-1, ' ', true); };
  const auto part = [&](const char* key, const Q4sPart& p) {
    out += key + std::to_string(p.offset) + "," + std::to_string(p.bytes) + "]";
  };
  const auto list = [&](const char* key, const auto& items, auto&& write) {  // one a line
    out += key;
    const char* separator = "\n";
    for (const auto& item : items) {
      out += separator;
      write(item);
      separator = ",\n";
    }
    out += "]";
  };
  list("{\"features\":[", header.features, [&](const std::string& f) { text("", f); });
  list(",\n\"tensors\":[", header.tensors, [&](const Q4sEntry& e) {
    text("{\"name\":", e.name);
    text(",\"format\":", format_name(e.format));
    out += ",\"shape\":[" + std::to_string(e.n) + "," + std::to_string(e.k) + "]";
    if (has_scales(e.format)) {
      out += e.format == Format::kQ4 ? ",\"bits\":4" : ",\"bits\":8";
      out += ",\"group\":" + std::to_string(e.group);
      text(",\"grid\":", e.grid == Grid::kHalf ? "half" : "int");
    }
    part(",\"data\":[", e.data);
    if (has_scales(e.format)) part(",\"scales\":[", e.scales);
    text(",\"xxh3\":", checksum_text(e.checksum));
    out += "}";
  });
  list(",\n\"blobs\":[", header.blobs, [&](const Q4sBlobEntry& b) {
    text("{\"name\":", b.name);
    part(",\"data\":[", b.data);
    text(",\"xxh3\":", checksum_text(b.checksum));
    out += "}";
  });
  return out + "}\n";
}

Q4sHeader parse_header(std::string_view text, const std::string& where) {
  check_json(text, where);
  const Json json = Json::parse(text);
  const Fields top(json, where);
  Q4sHeader header;
  for (const Json& f : top.list("features")) {
    if (!f.is_string()) refuse(where, "features has " + dump(f) + ", not a text");
    const auto& name = f.get_ref<const std::string&>();
    if (std::find(std::begin(kQ4sFeatures), std::end(kQ4sFeatures), name) == std::end(kQ4sFeatures)) {
      refuse(where,
             "needs the feature " + in_quotes(name) + ", which this program does not know; a newer one may");
    }
    header.features.push_back(name);
  }
  std::unordered_set<std::string> names;
  const auto once = [&](const std::string& what, const std::string& name) {
    if (!names.insert(name).second) refuse(where, what + " " + in_quotes(name) + " is listed twice");
  };
  for (const Json& t : top.list("tensors")) {
    header.tensors.push_back(parse_tensor(t, where + ": tensor"));
    once("tensor", header.tensors.back().name);
  }
  names.clear();
  for (const Json& b : top.list("blobs")) {
    header.blobs.push_back(parse_blob(b, where + ": blob"));
    once("blob", header.blobs.back().name);
  }
  return header;
}

uint64_t check_layout(const Q4sHeader& header, uint64_t at, const std::string& where) {
  const auto place = [&](const std::string& what, const Q4sPart& part) {
    const uint64_t right = next_part(at);
    if (part.offset != right) {
      refuse(where,
             what + " begins at byte " + std::to_string(part.offset) +
                 (part.offset % kQ4sAlign ? ", which is no multiple of 4096"
                  : part.offset < right   ? ", inside the part before it, which ends at " + std::to_string(at)
                                          : ", leaving a hole from " + std::to_string(at)));
    }
    at = part.end();
  };
  for (const Q4sEntry& e : header.tensors) {
    place("tensor " + in_quotes(e.name) + " data", e.data);
    if (has_scales(e.format)) place("tensor " + in_quotes(e.name) + " scales", e.scales);
  }
  for (const Q4sBlobEntry& b : header.blobs) place("blob " + in_quotes(b.name), b.data);
  return at;
}

WeightView entry_view(const Q4sEntry& e, const uint8_t* file) {
  WeightView view{.format = e.format, .grid = e.grid, .n = e.n, .k = e.k, .group = e.group};
  view.data = file + e.data.offset;
  if (has_scales(e.format)) view.scales = reinterpret_cast<const uint16_t*>(file + e.scales.offset);
  return view;
}

uint64_t view_checksum(const WeightView& view) {
  Checksum sum;
  sum.update(view.data, size_t(view.n * row_bytes(view.format, view.k)));
  if (view.scales) sum.update(view.scales, size_t(view.n * view.groups() * 2));
  return sum.value();
}

}  // namespace q4s
