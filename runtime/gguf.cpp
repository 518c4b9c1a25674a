#include "runtime/gguf.h"

#include <algorithm>
#include <cstring>
#include <map>

#include "runtime/error.h"
#include "runtime/file_kind.h"

namespace q4s {
namespace {

// The format's value types, by number.
enum : uint32_t { kU8, kI8, kU16, kI16, kU32, kI32, kF32, kBool, kString, kArray, kU64, kI64, kF64, kTypes };
constexpr uint64_t kTypeBytes[kTypes] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};  // 0: of no fixed size
constexpr const char* kTypeNames[kTypes] = {"u8",   "i8",     "u16",   "i16", "u32", "i32", "f32",
                                            "bool", "string", "array", "u64", "i64", "f64"};

bool is_integer(uint32_t t) { return t <= kI32 || t == kU64 || t == kI64; }
bool is_float(uint32_t t) { return t == kF32 || t == kF64; }
bool is_bool(uint32_t t) { return t == kBool; }
bool is_string(uint32_t t) { return t == kString; }
bool is_number(uint32_t t) { return is_integer(t) || is_float(t); }

// ggml's tensor types, by number; gaps are types that were withdrawn.
struct TensorType {
  uint32_t id;
  const char* name;
};
constexpr TensorType kOtherTypes[] = {
    {4, "Q4_2"},    {5, "Q4_3"},     {6, "Q5_0"},   {7, "Q5_1"},    {9, "Q8_1"},   {10, "Q2_K"},
    {11, "Q3_K"},   {12, "Q4_K"},    {13, "Q5_K"},  {14, "Q6_K"},   {15, "Q8_K"},  {16, "IQ2_XXS"},
    {17, "IQ2_XS"}, {18, "IQ3_XXS"}, {19, "IQ1_S"}, {20, "IQ4_NL"}, {21, "IQ3_S"}, {22, "IQ2_S"},
    {23, "IQ4_XS"}, {24, "I8"},      {25, "I16"},   {26, "I32"},    {27, "I64"},   {28, "F64"},
    {29, "IQ1_M"},  {34, "TQ1_0"},   {35, "TQ2_0"}, {39, "MXFP4"}};

bool known_type(uint32_t id, Format* format) {
  switch (id) {
    case 0: *format = Format::kF32; return true;
    case 1: *format = Format::kF16; return true;
    case 2: *format = Format::kGgufQ4_0; return true;
    case 3: *format = Format::kGgufQ4_1; return true;
    case 8: *format = Format::kGgufQ8_0; return true;
    case 30: *format = Format::kBF16; return true;
    default: return false;
  }
}

std::string other_type(uint32_t id) {
  for (const TensorType& t : kOtherTypes) {
    if (t.id == id) return t.name;
  }
  return "type number " + std::to_string(id);
}

template <class T>
T load(const uint8_t* at) {
  T value;
  std::memcpy(&value, at, sizeof value);
  return value;
}

std::string_view load_string(const uint8_t* at) {
  return {reinterpret_cast<const char*>(at) + 8, size_t(load<uint64_t>(at))};
}

double load_number(uint32_t type, const uint8_t* at) {
  return type == kF32 ? double(load<float>(at)) : load<double>(at);
}

// u64 values beyond int64 come out negative; the caller refuses those.
int64_t load_integer(uint32_t type, const uint8_t* at) {
  switch (type) {
    case kU8: return load<uint8_t>(at);
    case kI8: return load<int8_t>(at);
    case kU16: return load<uint16_t>(at);
    case kI16: return load<int16_t>(at);
    case kU32: return load<uint32_t>(at);
    case kI32: return load<int32_t>(at);
    default: return load<int64_t>(at);
  }
}

}  // namespace

// Walks the header once, front to back; every size is checked against what is left of the file before it is
// used.
class GgufParser {
 public:
  explicit GgufParser(Gguf& out) : out_(out), bytes_(out.map_.bytes()) {}

  void parse() {
    if (!std::string_view(reinterpret_cast<const char*>(bytes_.data()), bytes_.size()).starts_with("GGUF")) {
      refuse_kind(out_.path(), bytes_, "a GGUF file");
    }
    at_ = 4;
    const auto version = take<uint32_t>("version");
    if (version != 2 && version != 3) {
      const bool swapped = __builtin_bswap32(version) == 2 || __builtin_bswap32(version) == 3;
      refuse(4, "version is " + std::to_string(version) + (swapped ? ", as in a big-endian file" : "") +
                    "; 2 and 3 are supported");
    }
    const auto tensors = take_count("tensor count", 24);  // an info is at least 8 + 4 + 0 + 4 + 8 bytes
    const auto pairs = take_count("metadata count", 13);  // a pair at least 8 + 4 + 1
    for (uint64_t i = 0; i < pairs; ++i) take_pair();
    const int64_t parts = out_.integer("split.count").value_or(1);
    if (parts > 1) {  // a joined one keeps the key with 0
      throw Error(ErrorKind::kInput, out_.path() + ": is one of " + std::to_string(parts) +
                                         " parts of a split model; join them (llama-gguf-split --merge)");
    }
    take_tensors(tensors);
  }

 private:
  [[noreturn]] void refuse(uint64_t offset, const std::string& why) const {
    throw Error(ErrorKind::kInput, out_.path() + ": at byte " + std::to_string(offset) + ": " + why);
  }

  void need(uint64_t bytes, const std::string& field) const {
    if (bytes <= bytes_.size() - at_) return;
    throw Error(ErrorKind::kInput, out_.path() + ": truncated, or a length lies: file has " +
                                       std::to_string(bytes_.size()) + " bytes, " + field + " at byte " +
                                       std::to_string(at_) + " needs " + std::to_string(bytes) + " more");
  }

  template <class T>
  T take(const std::string& field) {
    need(sizeof(T), field);
    const T value = load<T>(bytes_.data() + at_);
    at_ += sizeof(T);
    return value;
  }

  uint64_t take_count(const std::string& field, uint64_t least_bytes) {
    const auto count = take<uint64_t>(field);
    if (count > (bytes_.size() - at_) / least_bytes) {
      refuse(at_ - 8, field + " is " + std::to_string(count) + ", more than a file of " +
                          std::to_string(bytes_.size()) + " bytes can hold");
    }
    return count;
  }

  std::string_view take_string(const std::string& field) {
    const auto length = take<uint64_t>(field + " length");
    need(length, field);
    at_ += length;
    return {reinterpret_cast<const char*>(bytes_.data()) + at_ - length, size_t(length)};
  }

  // Passes over `count` values, checking them.
  void skip_values(uint32_t type, uint64_t count, const std::string& field) {
    if (type == kString) {
      for (uint64_t i = 0; i < count; ++i) take_string(field);
      return;
    }
    uint64_t bytes;
    if (__builtin_mul_overflow(count, kTypeBytes[type], &bytes)) bytes = ~uint64_t(0);
    need(bytes, field);
    if (type == kBool) {
      for (uint64_t i = 0; i < count; ++i) {
        if (bytes_[at_ + i] > 1) {
          refuse(at_ + i, field + " is a bool of value " + std::to_string(bytes_[at_ + i]));
        }
      }
    }
    at_ += bytes;
  }

  uint32_t take_type(const std::string& field) {
    const auto type = take<uint32_t>(field);
    if (type >= kTypes) refuse(at_ - 4, field + " is " + std::to_string(type) + ", no known type");
    return type;
  }

  void take_pair() {
    const uint64_t start = at_;
    const std::string key(take_string("key"));
    const std::string field = "value of " + in_quotes(key);
    Gguf::Value value{take_type("type of the " + field), false, 1, nullptr};
    if (value.type == kArray) {
      value.array = true;
      value.type = take_type("element type of the " + field);
      if (value.type == kArray) refuse(at_ - 4, field + " is an array of arrays, which is not supported");
      value.count = take_count("length of the " + field, std::max<uint64_t>(1, kTypeBytes[value.type]));
    }
    value.at = bytes_.data() + at_;
    skip_values(value.type, value.count, field);
    if (!out_.values_.emplace(key, value).second) refuse(start, "key " + in_quotes(key) + " appears twice");
    out_.keys_.push_back(key);
  }

  void take_tensors(uint64_t count) {
    const int64_t alignment = out_.integer("general.alignment").value_or(32);
    if (alignment < 8 || alignment > (1 << 20) || (alignment & (alignment - 1)) != 0) {
      throw Error(ErrorKind::kInput, out_.path() + ": general.alignment is " + std::to_string(alignment) +
                                         ", not a power of two from 8 to 1048576");
    }
    struct Place {
      uint64_t offset;
      size_t tensor;
    };
    std::vector<Place> places;
    std::map<std::string, std::vector<std::string>> unsupported;  // type -> tensors
    for (uint64_t i = 0; i < count; ++i) {
      const uint64_t start = at_;
      FileTensor t;
      t.name = take_string("name of tensor " + std::to_string(i));
      const std::string where = "tensor " + in_quotes(t.name);
      const auto dims = take<uint32_t>("dimension count of " + where);
      if (dims < 1 || dims > 4) {
        refuse(at_ - 4, where + " has " + std::to_string(dims) + " dimensions, not 1 to 4");
      }
      int64_t weights = 1;
      for (uint32_t d = 0; d < dims; ++d) {
        const auto dim = take<uint64_t>("dimensions of " + where);
        if (dim == 0 || dim > kMaxDim) {
          refuse(at_ - 8, where + " has dimension " + std::to_string(d) + " of " + std::to_string(dim) +
                              ", out of range");
        }
        if (__builtin_mul_overflow(weights, int64_t(dim), &weights)) {
          refuse(at_ - 8, "shape of " + where + " overflows");
        }
        t.shape.insert(t.shape.begin(), int64_t(dim));
      }
      const auto type = take<uint32_t>("type of " + where);
      const auto offset = take<uint64_t>("offset of " + where);
      if (!out_.index_.emplace(t.name, out_.tensors_.size()).second) refuse(start, where + " appears twice");
      if (!known_type(type, &t.format)) {
        unsupported[other_type(type)].push_back(t.name);
        continue;
      }
      const int64_t bytes = tensor_bytes(t.format, t.rows(), t.columns());
      if (bytes < 0) {
        refuse(start,
               where + " of type " + format_name(t.format) + " cannot have the shape " + shape_text(t.shape));
      }
      if (offset % uint64_t(alignment) != 0) {
        refuse(at_ - 8, "offset of " + where + " is " + std::to_string(offset) + ", no multiple of " +
                            std::to_string(alignment));
      }
      t.bytes = size_t(bytes);
      places.push_back({offset, out_.tensors_.size()});
      out_.tensors_.push_back(std::move(t));
    }
    if (!unsupported.empty()) {
      std::string list;
      for (const auto& [type, names] : unsupported) {
        for (const std::string& name : names) list += "\n  " + in_quotes(name) + ": " + type;
      }
      throw Error(ErrorKind::kInput, out_.path() +
                                         ": tensors of types that are not supported (F32, F16, BF16, Q8_0, "
                                         "Q4_0 and Q4_1 are):" +
                                         list);
    }

    const uint64_t data = (at_ + uint64_t(alignment) - 1) / uint64_t(alignment) * uint64_t(alignment);
    std::sort(places.begin(), places.end(), [](Place a, Place b) { return a.offset < b.offset; });
    uint64_t end = 0;
    for (const Place& p : places) {
      FileTensor& t = out_.tensors_[p.tensor];
      if (p.offset < end) {
        throw Error(ErrorKind::kInput, out_.path() + ": tensor " + in_quotes(t.name) + " at data offset " +
                                           std::to_string(p.offset) +
                                           " overlaps the one before it, which ends at " +
                                           std::to_string(end));
      }
      if (__builtin_add_overflow(p.offset, uint64_t(t.bytes), &end) || end > ~uint64_t(0) - data) {
        throw Error(ErrorKind::kInput, out_.path() + ": offset of tensor " + in_quotes(t.name) + " is " +
                                           std::to_string(p.offset) + ", which overflows");
      }
    }
    if (!places.empty() && data + end > bytes_.size()) {
      throw Error(ErrorKind::kInput, out_.path() + ": truncated: file has " + std::to_string(bytes_.size()) +
                                         " bytes, header says " + std::to_string(data + end) + " (tensor " +
                                         in_quotes(out_.tensors_[places.back().tensor].name) +
                                         " ends there)");
    }
    for (const Place& p : places) out_.tensors_[p.tensor].data = bytes_.data() + data + p.offset;
  }

  Gguf& out_;
  std::span<const uint8_t> bytes_;
  uint64_t at_ = 0;
};

Gguf Gguf::open(const std::string& path) {
  Gguf out;
  out.map_ = MappedFile(path);
  GgufParser(out).parse();
  return out;
}

const FileTensor* Gguf::find(std::string_view name) const {
  const auto it = index_.find(std::string(name));
  return it == index_.end() ? nullptr : &tensors_[it->second];
}

const Gguf::Value* Gguf::value_of(std::string_view key, bool array, bool (*fits)(uint32_t),
                                  const char* wanted) const {
  const auto it = values_.find(std::string(key));
  if (it == values_.end()) return nullptr;
  const Value& v = it->second;
  if (v.array != array || !fits(v.type)) {
    throw Error(ErrorKind::kInput, path() + ": " + std::string(key) + " is " +
                                       (v.array ? "an array of " : "of type ") + kTypeNames[v.type] +
                                       ", not " + wanted);
  }
  return &v;
}

std::optional<int64_t> Gguf::integer(std::string_view key) const {
  const Value* v = value_of(key, false, is_integer, "an integer");
  if (!v) return {};
  const int64_t value = load_integer(v->type, v->at);
  if (v->type == kU64 && value < 0) {
    throw Error(ErrorKind::kInput,
                path() + ": " + std::string(key) + " is " + std::to_string(uint64_t(value)) + ", too large");
  }
  return value;
}

std::optional<double> Gguf::number(std::string_view key) const {
  const Value* v = value_of(key, false, is_number, "a number");
  if (!v) return {};
  if (is_float(v->type)) return load_number(v->type, v->at);
  return double(*integer(key));
}

std::optional<bool> Gguf::boolean(std::string_view key) const {
  const Value* v = value_of(key, false, is_bool, "a bool");
  if (!v) return {};
  return *v->at != 0;
}

std::optional<std::string_view> Gguf::text(std::string_view key) const {
  const Value* v = value_of(key, false, is_string, "a string");
  if (!v) return {};
  return load_string(v->at);
}

std::optional<std::vector<int64_t>> Gguf::integers(std::string_view key) const {
  const Value* v = value_of(key, true, is_integer, "an array of integers");
  if (!v) return {};
  std::vector<int64_t> out(v->count);
  for (uint64_t i = 0; i < v->count; ++i) out[i] = load_integer(v->type, v->at + i * kTypeBytes[v->type]);
  return out;
}

std::optional<std::vector<float>> Gguf::floats(std::string_view key) const {
  const Value* v = value_of(key, true, is_float, "an array of floats");
  if (!v) return {};
  std::vector<float> out(v->count);
  for (uint64_t i = 0; i < v->count; ++i) {
    out[i] = float(load_number(v->type, v->at + i * kTypeBytes[v->type]));
  }
  return out;
}

std::optional<std::vector<std::string_view>> Gguf::texts(std::string_view key) const {
  const Value* v = value_of(key, true, is_string, "an array of strings");
  if (!v) return {};
  std::vector<std::string_view> out(v->count);
  const uint8_t* at = v->at;
  for (std::string_view& text : out) {
    text = load_string(at);
    at += 8 + text.size();
  }
  return out;
}

}  // namespace q4s
