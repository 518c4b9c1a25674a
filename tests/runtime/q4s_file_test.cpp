#include "runtime/q4s_file.h"

#include <doctest/doctest.h>

#include <random>
#include <sstream>

#include "runtime/checksum.h"
#include "runtime/error.h"
#include "runtime/q4s_format.h"
#include "tests/runtime/q4s_sample.h"
#include "tests/runtime/test_files.h"

namespace q4s {
namespace {

using test::read_file;
using test::Sample;
using test::TempFolder;
using test::write_file;

std::string sample_bytes() {
  TempFolder dir;
  Sample().write(dir / "x.q4s");
  return read_file(dir / "x.q4s");
}

// "" when the file is taken, else the text of the refusal.
std::string refusal(const std::string& bytes, bool verify = false) {
  TempFolder dir;
  write_file(dir / "x.q4s", bytes);
  try {
    const Q4sFile file = Q4sFile::open(dir / "x.q4s");
    if (verify) file.verify();
    return "";
  } catch (const Error& e) {
    CHECK(e.kind() == ErrorKind::kInput);
    CHECK(std::string(e.what()).starts_with(dir / "x.q4s"));
    return e.what();
  }
}

void check_refused(const std::string& bytes, const std::string& expected) {
  const std::string message = refusal(bytes);
  INFO(message);
  INFO(expected);
  CHECK(message.find(expected) != std::string::npos);
}

// Golden files are kept as lines "offset: bytes in hex", zeros between.
std::string golden(const std::string& name) {
  std::istringstream in(read_file(std::string(Q4S_SOURCE_DIR) + "/tests/golden/" + name));
  std::string out, line;
  while (std::getline(in, line)) {
    if (line.empty() || line[0] == '#') continue;
    size_t used;
    const size_t offset = std::stoul(line, &used, 16);
    REQUIRE(offset >= out.size());
    out.resize(offset);
    for (size_t i = used + 2; i + 1 < line.size(); i += 2) {
      out += char(std::stoi(line.substr(i, 2), nullptr, 16));
    }
  }
  return out;
}

void check_sample(const Q4sFile& file) {
  const Sample sample;
  REQUIRE(file.tensors().size() == 5);
  for (const auto& [name, format] : Sample::tensors()) {
    const Q4sTensor* t = file.find(name);
    REQUIRE(t);
    const WeightView want = sample.view(format);
    CHECK(t->view.format == format);
    CHECK(t->view.n == want.n);
    CHECK(t->view.k == want.k);
    CHECK(t->view.group == want.group);
    CHECK(t->view.grid == want.grid);
    CHECK(reinterpret_cast<uintptr_t>(t->view.data) % 4096 == 0);
    const size_t bytes = size_t(want.n * row_bytes(format, want.k));
    if (format != Format::kQ4) {
      CHECK(std::memcmp(t->view.data, want.data, bytes) == 0);
    } else {
      for (size_t i = 0; i < bytes; ++i) {
        CHECK(t->view.data[i] == (i % 18 == 17 ? want.data[i] & 15 : want.data[i]));
      }
    }
    if (want.scales) CHECK(std::memcmp(t->view.scales, want.scales, size_t(want.n * want.groups() * 2)) == 0);
  }
  CHECK(file.find("other") == nullptr);
  CHECK(file.config_json() == R"({"dim":3})");
  CHECK(file.provenance_json() == R"({"tool":"test"})");
  const auto blob = file.blob("tokenizer.model");
  CHECK(std::string(blob.begin(), blob.end()) == "tokenizer bytes");
  CHECK_FALSE(file.has_blob("other"));
  CHECK_THROWS_AS(file.blob("other"), Error);
  CHECK(file.has_feature("rotation"));
  file.verify();
}

TEST_CASE("q4s: what was written is read back") {
  TempFolder dir;
  Sample().write(dir / "x.q4s");
  const Q4sFile file = Q4sFile::open(dir / "x.q4s");
  check_sample(file);
  const std::string text = file.show();
  CHECK(text.find("\"blk.0.a\"") != std::string::npos);
  CHECK(text.find("half") != std::string::npos);
  CHECK(text.find("tokenizer.model") != std::string::npos);
}

TEST_CASE("q4s: rows given by pointer make the same bytes as rows in a block") {
  TempFolder dir;
  const std::vector<float> values{1, 2, 3, 4, 5, 6};
  const auto* data = reinterpret_cast<const uint8_t*>(values.data());
  const uint8_t* rows[] = {data, data + 8, data + 16};
  for (const bool pointers : {false, true}) {
    Q4sWriter writer(dir / (pointers ? "b" : "a"));
    WeightView view{.format = Format::kF32, .n = 3, .k = 2, .data = pointers ? nullptr : data};
    if (pointers) view.rows = rows;
    writer.add_tensor("t", view);
    writer.finish();
  }
  CHECK(read_file(dir / "a") == read_file(dir / "b"));
}

TEST_CASE("q4s: golden bytes of version 1.0") {
  const std::string want = golden("q4s_1_0.hex");
  CHECK(sample_bytes() == want);  // the writer still makes them
  TempFolder dir;
  write_file(dir / "x.q4s", want);
  check_sample(Q4sFile::open(dir / "x.q4s"));  // the reader still takes them
}

TEST_CASE("q4s: truncated at every byte of preamble and header, and at every part") {
  const std::string whole = sample_bytes();
  const std::string all = std::to_string(whole.size());
  for (size_t size = 0; size < whole.size(); size += size < 64 || size > whole.size() - 1500 ? 1 : 97) {
    const std::string message = refusal(whole.substr(0, size));
    CAPTURE(size);
    CHECK(message != "");
    if (size >= 4096) {
      CHECK(message.find("truncated: file has " + std::to_string(size) + " bytes, header says " + all) !=
            std::string::npos);
    }
  }
  check_refused(whole + "x", "bytes appended: file has");
}

TEST_CASE("q4s: every flipped byte is found by open or verify") {
  const std::string whole = sample_bytes();
  CHECK(refusal(whole, true) == "");
  TempFolder dir;
  for (size_t at = 0; at < whole.size(); at += at % 4096 < 160 || at > whole.size() - 1500 ? 1 : 61) {
    std::string bad = whole;
    bad[at] = char(bad[at] ^ 0x10);
    CAPTURE(at);
    CHECK(refusal(bad, true) != "");
  }
}

TEST_CASE("q4s: verify names the tensors that differ, and only those") {
  const std::string whole = sample_bytes();
  TempFolder dir;
  write_file(dir / "x", whole);
  const Q4sFile file = Q4sFile::open(dir / "x");
  const auto offset = [&](const void* at) {
    return size_t(static_cast<const uint8_t*>(at) - file.tensors()[0].view.data) + 4096;
  };
  std::string bad = whole;
  bad[offset(file.find("blk.0.a")->view.scales)] ^= 1;
  bad[offset(file.find("embed")->view.data) + 7] ^= 1;
  const std::string message = refusal(bad, true);
  CHECK(message.find("tensor \"blk.0.a\"") != std::string::npos);
  CHECK(message.find("tensor \"embed\"") != std::string::npos);
  CHECK(message.find("norm") == std::string::npos);
}

// A file whose header was edited and whose checksums are right again.
std::string forged(const std::string& from, const std::string& to, uint16_t major = 1, uint16_t minor = 0) {
  std::string bytes = sample_bytes();
  const Q4sPreamble was =
      parse_preamble({reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size()}, "sample");
  std::string header = bytes.substr(was.header_offset);
  if (!from.empty()) {
    REQUIRE(header.find(from) != std::string::npos);
    header.replace(header.find(from), from.size(), to);
  }
  bytes.resize(was.header_offset);
  bytes += header;
  const auto front = preamble_bytes(
      {major, minor, was.header_offset, header.size(), bytes.size(), xxh3(header.data(), header.size())});
  bytes.replace(0, front.size(), reinterpret_cast<const char*>(front.data()), front.size());
  return bytes;
}

TEST_CASE("q4s: lies with right checksums are refused by field and value") {
  CHECK(forged("", "") == sample_bytes());
  check_refused(forged("", "", 2), "format version at byte 4 is 2.0");
  CHECK(refusal(forged("", "", 1, 7)) == "");  // a later minor version
  CHECK(refusal(forged("\"shape\"", "\"later\":1,\"shape\"")) == "");
  check_refused(forged("rotation", "levitation"), "needs the feature \"levitation\"");
  check_refused(forged("\"rotation\"", "1"), "features has 1, not a text");
  check_refused(forged("\"blk.0.b\"", "\"blk.0.a\""), "tensor \"blk.0.a\" is listed twice");
  check_refused(forged("\"provenance\"", "\"config\""), "blob \"config\" is listed twice");
  check_refused(forged("\"provenance\"", "\"something\""), "has no blob \"provenance\"");
  check_refused(forged("\"f32\"", "\"f64\""), "tensor \"norm\": format is \"f64\", not one of");
  check_refused(forged("\"shape\":[1,3]", "\"shape\":[0,3]"), "shape is [0,3], not");
  check_refused(forged("\"shape\":[1,3]", "\"shape\":[4294967296,3]"), "shape is [4294967296,3], not");
  check_refused(forged("\"shape\":[1,3]", "\"shape\":[2147483647,2147483647]"), "overflows");
  check_refused(forged("\"shape\":[1,3]", "\"shape\":[1,4]"), "data has 12 bytes, shape [1,4] needs 16");
  check_refused(forged("\"shape\":[1,3]", "\"shape\":[-1,3]"), "shape is [-1,3], not");
  check_refused(forged("\"shape\":[1,3]", "\"shape\":[1,3.0]"), "shape is [1,3.0], not");
  check_refused(forged("\"shape\":[1,3]", "\"shape\":[3]"), "shape is [3], not");
  check_refused(forged("\"shape\":[1,3],", ""), "tensor \"norm\": has no shape");
  check_refused(forged("\"group\":32", "\"group\":31"), "group is 31, not");
  check_refused(forged("\"group\":32", "\"group\":0"), "group is 0, not");
  check_refused(forged("\"group\":32", "\"group\":64"), "scales has 8 bytes");
  check_refused(forged("\"grid\":\"half\"", "\"grid\":\"odd\""), "grid is \"odd\", not");
  check_refused(forged("\"bits\":4", "\"bits\":3"), "bits is 3, not");
  check_refused(forged("\"data\":[4096,", "\"data\":[4097,"), "begins at byte 4097, which is no multiple");
  check_refused(forged("\"data\":[4096,", "\"data\":[8192,"), "leaving a hole");
  check_refused(forged("\"data\":[8192,", "\"data\":[4096,"), "inside the part before it");
  check_refused(forged("\"data\":[4096,", "\"data\":[18446744073709551610,"),
                "not a range that 64 bits can hold");
  check_refused(forged("\"data\":[4096,12]", "\"data\":[4096]"), "data is [4096], not");
  check_refused(forged("\"xxh3\":\"", "\"xxh3\":\"0"), "not 16 lower-case hex digits");
  check_refused(forged("\"name\":\"norm\"", "\"name\":7"), "name is 7, not a text");
  check_refused(forged("\"tensors\"", "\"tensor\""), "has no tensors");
  check_refused(forged("{\"features\"", "[\"features\""), "not JSON");
  check_refused(forged("\"name\":\"norm\"", "\"name\":\"x\",\"name\":\"norm\""), "\"name\" appears twice");
  const std::string blobs = forged("", "");
  check_refused(forged("\"data\":[4096,12],", "\"data\":[4096,18446744073709551615],"), "64 bits");

  std::string bad = sample_bytes();
  bad[45] ^= 1;
  check_refused(bad, "preamble is damaged");
  bad = sample_bytes();
  bad[bad.size() - 3] ^= 1;
  check_refused(bad, "header is damaged: checksum at byte 32");
  Q4sPreamble p;
  const auto preamble_only = [&] {
    const auto front = preamble_bytes(p);
    return std::string(reinterpret_cast<const char*>(front.data()), front.size());
  };
  p.file_bytes = 4096;
  p.header_offset = uint64_t(1) << 63;
  check_refused(preamble_only(), "header offset at byte 8 is 9223372036854775808");
  p.header_offset = 4096;
  p.header_bytes = ~uint64_t(0);
  check_refused(preamble_only(), "header size at byte 16 is 18446744073709551615");
  p.header_bytes = 0;
  p.header_checksum = xxh3("", 0);
  check_refused(preamble_only(), "header: not JSON");
}

TEST_CASE("q4s: other files are named for what they are") {
  check_refused("<!DOCTYPE html>", "HTML page");
  check_refused("GGUF" + std::string(60, 1), "seems to be a GGUF file");
  check_refused("version https://git-lfs.github.com/spec/v1\n", "git lfs pull");
  check_refused("PK\x03\x04", "pickle is never opened");
  check_refused(std::string(4096, 0), "preamble is empty");
  check_refused("", "is empty (0 bytes)");
}

TEST_CASE("q4s: random headers with right checksums never crash") {
  const std::string whole = sample_bytes();
  const Q4sPreamble was =
      parse_preamble({reinterpret_cast<const uint8_t*>(whole.data()), whole.size()}, "sample");
  std::mt19937 random(3);
  TempFolder dir;
  for (int i = 0; i < 3000; ++i) {
    std::string bad = whole;
    for (int flips = 1 + int(random() % 3); flips > 0; --flips) {
      const char digits[] = "0123456789-.,[]{}\"x";
      bad[was.header_offset + random() % was.header_bytes] =
          random() % 2 ? digits[random() % (sizeof digits - 1)] : char(random());
    }
    const auto front = preamble_bytes({1, 0, was.header_offset, was.header_bytes, bad.size(),
                                       xxh3(bad.data() + was.header_offset, was.header_bytes)});
    bad.replace(0, front.size(), reinterpret_cast<const char*>(front.data()), front.size());
    write_file(dir / "x", bad);
    try {
      const Q4sFile file = Q4sFile::open(dir / "x");
      file.show();
      file.verify();
    } catch (const Error& e) {
      CHECK(e.kind() == ErrorKind::kInput);
    }
  }
}

}  // namespace
}  // namespace q4s
