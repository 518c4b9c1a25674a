#include "runtime/gguf.h"

#include <doctest/doctest.h>

#include <random>

#include "runtime/error.h"
#include "tests/runtime/test_files.h"

namespace q4s {
namespace {

using test::gguf_bytes;
using test::gguf_info;
using test::gguf_pair;
using test::gguf_string;
using test::raw;
using test::TempFolder;
using test::write_file;

enum : uint32_t { kU8, kI8, kU16, kI16, kU32, kI32, kF32, kBool, kString, kArray, kU64, kI64, kF64 };

std::vector<std::string> all_types() {
  return {gguf_pair("u8", kU8, raw(uint8_t(200))),
          gguf_pair("i8", kI8, raw(int8_t(-3))),
          gguf_pair("u16", kU16, raw(uint16_t(60000))),
          gguf_pair("i16", kI16, raw(int16_t(-300))),
          gguf_pair("u32", kU32, raw(uint32_t(4000000000u))),
          gguf_pair("i32", kI32, raw(int32_t(-70000))),
          gguf_pair("f32", kF32, raw(1.5f)),
          gguf_pair("yes", kBool, raw(uint8_t(1))),
          gguf_pair("text", kString, gguf_string("llama")),
          gguf_pair("u64", kU64, raw(uint64_t(1) << 40)),
          gguf_pair("i64", kI64, raw(int64_t(-1) << 40)),
          gguf_pair("f64", kF64, raw(2.5)),
          gguf_pair("texts", kArray,
                    raw(uint32_t(kString)) + raw(uint64_t(2)) + gguf_string("a") + gguf_string("")),
          gguf_pair("floats", kArray, raw(uint32_t(kF32)) + raw(uint64_t(2)) + raw(1.f) + raw(2.f)),
          gguf_pair("ints", kArray, raw(uint32_t(kI32)) + raw(uint64_t(2)) + raw(-1) + raw(7))};
}

// A (2, 32) Q8_0 matrix at 0 (68 bytes), an f32 vector of 3 at 96.
std::vector<std::string> two_tensors() { return {gguf_info("m", {32, 2}, 8, 0), gguf_info("v", {3}, 0, 96)}; }
std::string two_data() { return std::string(96, 'x') + raw(std::vector<float>{1, 2, 3}); }

std::string refusal(const std::string& bytes) {
  TempFolder dir;
  write_file(dir / "x.gguf", bytes);
  try {
    Gguf::open(dir / "x.gguf");
    return "";
  } catch (const Error& e) {
    CHECK(e.kind() == ErrorKind::kInput);
    CHECK(std::string(e.what()).starts_with(dir / "x.gguf"));
    return e.what();
  }
}

void check_refused(const std::string& bytes, const std::string& expected) {
  const std::string message = refusal(bytes);
  INFO(message);
  CHECK(message.find(expected) != std::string::npos);
}

TEST_CASE("gguf: metadata of every type and two tensors, versions 2 and 3") {
  for (const uint32_t version : {2u, 3u}) {
    TempFolder dir;
    write_file(dir / "x.gguf", gguf_bytes(all_types(), two_tensors(), two_data(), version));
    const Gguf file = Gguf::open(dir / "x.gguf");
    CHECK(file.integer("u8") == 200);
    CHECK(file.integer("i8") == -3);
    CHECK(file.integer("u16") == 60000);
    CHECK(file.integer("i16") == -300);
    CHECK(file.integer("u32") == 4000000000);
    CHECK(file.integer("i32") == -70000);
    CHECK(file.integer("u64") == int64_t(1) << 40);
    CHECK(file.integer("i64") == int64_t(-1) * (int64_t(1) << 40));
    CHECK(file.number("f32") == 1.5);
    CHECK(file.number("f64") == 2.5);
    CHECK(file.number("i8") == -3);
    CHECK(file.boolean("yes") == true);
    CHECK(file.text("text") == "llama");
    CHECK(file.texts("texts") == std::vector<std::string_view>{"a", ""});
    CHECK(file.floats("floats") == std::vector<float>{1, 2});
    CHECK(file.integers("ints") == std::vector<int64_t>{-1, 7});
    CHECK(file.integer("absent") == std::nullopt);
    CHECK_FALSE(file.has("absent"));
    CHECK(file.keys().size() == 15);
    CHECK_THROWS_WITH_AS(file.integer("text"), doctest::Contains("text is of type string, not an integer"),
                         Error);
    CHECK_THROWS_WITH_AS(file.text("texts"), doctest::Contains("texts is an array of string, not a string"),
                         Error);

    REQUIRE(file.tensors().size() == 2);
    const FileTensor* m = file.find("m");
    CHECK(m->format == Format::kGgufQ8_0);
    CHECK(m->shape == std::vector<int64_t>{2, 32});
    CHECK(m->bytes == 68);
    CHECK(m->data[0] == 'x');
    float last;
    std::memcpy(&last, file.find("v")->data + 8, 4);
    CHECK(last == 3);
    CHECK(file.find("w") == nullptr);
  }
}

TEST_CASE("gguf: truncated at every byte") {
  const std::string whole = gguf_bytes(all_types(), two_tensors(), two_data());
  for (size_t size = 0; size < whole.size(); ++size) {
    CAPTURE(size);
    CHECK(refusal(whole.substr(0, size)) != "");
  }
  CHECK(refusal(whole) == "");
  check_refused(whole.substr(0, whole.size() - 1), "file has " + std::to_string(whole.size() - 1) +
                                                       " bytes, header says " + std::to_string(whole.size()));
}

TEST_CASE("gguf: flipped bytes of the header never crash") {
  const std::string whole = gguf_bytes(all_types(), two_tensors(), two_data());
  const size_t header = whole.size() - two_data().size();
  std::mt19937 random(2);
  TempFolder dir;
  for (int i = 0; i < 5000; ++i) {
    std::string bad = whole;
    for (int flips = 1 + int(random() % 3); flips > 0; --flips) {
      bad[4 + random() % (header - 4)] = char(random());
    }
    write_file(dir / "x", bad);
    try {
      const Gguf file = Gguf::open(dir / "x");
      for (const FileTensor& t : file.tensors()) CHECK(t.data[t.bytes - 1] < 256);  // touches the last byte
      for (const std::string& key : file.keys()) {
        try {
          file.texts(key);
        } catch (const Error&) {
        }
      }
    } catch (const Error& e) {
      CHECK(e.kind() == ErrorKind::kInput);
    }
  }
}

TEST_CASE("gguf: lies are refused by field, offset and value") {
  const uint64_t huge = uint64_t(1) << 62;
  const auto meta = [](const std::string& pair) { return gguf_bytes({pair}, {}, ""); };
  const auto info = [](const std::string& i) { return gguf_bytes({}, {i}, std::string(256, 0)); };
  check_refused("GGUF" + raw(uint32_t(1)) + raw(uint64_t(0)) + raw(uint64_t(0)), "version is 1");
  check_refused("GGUF" + raw(__builtin_bswap32(3)) + raw(uint64_t(0)) + raw(uint64_t(0)), "big-endian");
  check_refused("GGUF" + raw(uint32_t(3)) + raw(huge) + raw(uint64_t(0)),
                "at byte 8: tensor count is 4611686");
  check_refused("GGUF" + raw(uint32_t(3)) + raw(uint64_t(0)) + raw(huge),
                "at byte 16: metadata count is 4611686");
  check_refused(meta(raw(huge) + std::string(16, 0)), "key at byte 32 needs 4611686018427387904");
  check_refused(meta(gguf_pair("k", kString, raw(huge))), "value of \"k\" at byte");
  check_refused(meta(gguf_pair("k", kArray, raw(uint32_t(kF64)) + raw(huge))),
                "length of the value of \"k\"");
  check_refused(meta(gguf_pair("k", kArray, raw(uint32_t(kArray)) + raw(uint64_t(1)))), "array of arrays");
  check_refused(meta(gguf_pair("k", 13, raw(uint64_t(1)))), "is 13, no known type");
  check_refused(meta(gguf_pair("k", kBool, raw(uint8_t(2)))), "bool of value 2");
  check_refused(gguf_bytes({gguf_pair("k", kU8, "1"), gguf_pair("k", kU8, "1")}, {}, ""),
                "key \"k\" appears twice");
  check_refused(meta(gguf_pair("general.alignment", kU32, raw(uint32_t(33)))), "general.alignment is 33");
  check_refused(meta(gguf_pair("general.alignment", kU32, raw(uint32_t(0)))), "general.alignment is 0");
  check_refused(meta(gguf_pair("general.alignment", kString, gguf_string("8"))), "not an integer");

  check_refused(meta(gguf_pair("split.count", kU16, raw(uint16_t(3)))), "one of 3 parts");

  check_refused(info(gguf_info("t", {}, 0, 0)), "0 dimensions");
  check_refused(info(gguf_info("t", {1, 1, 1, 1, 1}, 0, 0)), "5 dimensions");
  check_refused(info(gguf_info("t", {4, 0}, 0, 0)), "dimension 1 of 0");
  check_refused(info(gguf_info("t", {huge}, 0, 0)), "dimension 0 of 4611686018427387904");
  check_refused(info(gguf_info("t", {0x7fffffff, 0x7fffffff, 0x7fffffff}, 0, 0)), "overflows");
  check_refused(info(gguf_info("t", {33}, 8, 0)), "Q8_0 cannot have the shape [33]");
  check_refused(info(gguf_info("t", {4}, 0, 8)), "offset of tensor \"t\" is 8, no multiple of 32");
  check_refused(info(gguf_info("t", {4}, 0, 256)), "truncated: file has 320 bytes, header says 336");
  check_refused(info(gguf_info("t", {4}, 0, ~uint64_t(31))), "overflows");
  check_refused(info(gguf_info("t", {0x7fffffff, 0x7fffffff}, 0, 0)), "cannot have the shape");
  check_refused(gguf_bytes({}, {gguf_info("t", {4}, 0, 0), gguf_info("t", {4}, 0, 32)}, std::string(64, 0)),
                "tensor \"t\" appears twice");
  check_refused(gguf_bytes({}, {gguf_info("t", {16}, 0, 0), gguf_info("u", {4}, 0, 32)}, std::string(64, 0)),
                "tensor \"u\" at data offset 32 overlaps");
  const std::string k_quants =
      gguf_bytes({}, {gguf_info("t", {256}, 12, 0), gguf_info("u", {256}, 99, 0)}, std::string(64, 0));
  check_refused(k_quants, "\"t\": Q4_K");
  check_refused(k_quants, "\"u\": type number 99");
}

}  // namespace
}  // namespace q4s
