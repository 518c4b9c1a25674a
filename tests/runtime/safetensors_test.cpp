#include "runtime/safetensors.h"

#include <doctest/doctest.h>

#include <cmath>
#include <cstdlib>
#include <random>

#include "runtime/error.h"
#include "tests/runtime/test_files.h"

namespace q4s {
namespace {

using test::raw;
using test::safetensors_bytes;
using test::TempFolder;
using test::write_file;

const std::string kTwo =
    R"({"__metadata__":{"format":"pt"},"b":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},)"
    R"("a":{"dtype":"BF16","shape":[4],"data_offsets":[24,32]}})";

std::string two_tensors() {
  return safetensors_bytes(
      kTwo, raw(std::vector<float>{1, 2, 3, 4, 5, 6}) + raw(std::vector<uint16_t>{1, 2, 3, 4}));
}

// The message of the refusal, "" if the file was taken.
std::string refusal(const std::string& path) {
  try {
    Safetensors::open(path);
    return "";
  } catch (const Error& e) {
    CHECK(e.kind() == ErrorKind::kInput);
    CHECK(std::string(e.what()).starts_with(path.substr(0, path.rfind('/'))));
    return e.what();
  }
}

void check_refused(const std::string& bytes, const std::string& expected) {
  TempFolder dir;
  write_file(dir / "x.safetensors", bytes);
  const std::string message = refusal(dir / "x.safetensors");
  INFO(message);
  CHECK(message.find(expected) != std::string::npos);
}

TEST_CASE("safetensors: a file with two tensors") {
  TempFolder dir;
  write_file(dir / "x.safetensors", two_tensors());
  const Safetensors file = Safetensors::open(dir / "x.safetensors");
  REQUIRE(file.tensors().size() == 2);
  const FileTensor* b = file.find("b");
  REQUIRE(b);
  CHECK(b->format == Format::kF32);
  CHECK(b->shape == std::vector<int64_t>{2, 3});
  CHECK(b->bytes == 24);
  float values[6];
  std::memcpy(values, b->data, 24);
  CHECK(values[5] == 6);
  CHECK(file.find("a")->format == Format::kBF16);
  CHECK(file.find("a")->rows() == 1);
  CHECK(file.find("a")->columns() == 4);
  CHECK(file.find("c") == nullptr);
}

TEST_CASE("safetensors: tensors at odd offsets are still aligned in memory") {
  TempFolder dir;
  std::string header = R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})";
  while (header.size() % 8 != 1) header += ' ';
  write_file(dir / "x", safetensors_bytes(header, raw(std::vector<float>{7, 8})));
  const Safetensors file = Safetensors::open(dir / "x");
  const auto* values = reinterpret_cast<const float*>(file.find("a")->data);
  CHECK(reinterpret_cast<uintptr_t>(values) % 4 == 0);
  CHECK(values[1] == 8);
}

TEST_CASE("safetensors: truncated at every byte") {
  TempFolder dir;
  const std::string whole = two_tensors();
  for (size_t size = 0; size < whole.size(); ++size) {
    write_file(dir / "x", whole.substr(0, size));
    CAPTURE(size);
    CHECK(refusal(dir / "x") != "");
  }
}

TEST_CASE("safetensors: flipped bytes of the header never crash") {
  TempFolder dir;
  const std::string whole = two_tensors();
  std::mt19937 random(1);
  for (int i = 0; i < 3000; ++i) {
    std::string bad = whole;
    for (int flips = 1 + int(random() % 3); flips > 0; --flips) {
      bad[random() % (8 + kTwo.size())] = char(random());
    }
    write_file(dir / "x", bad);
    try {
      const Safetensors file = Safetensors::open(dir / "x");
      for (const FileTensor& t : file.tensors()) CHECK(t.data[t.bytes - 1] < 256);  // touches the last byte
    } catch (const Error& e) {
      CHECK(e.kind() == ErrorKind::kInput);
    }
  }
}

TEST_CASE("safetensors: lies are refused by name and value") {
  const auto one = [](const std::string& entry) {
    return safetensors_bytes(R"({"t":)" + entry + "}", "12345678");
  };
  check_refused(one(R"({"dtype":"F32","shape":[2],"data_offsets":[0,9]})"), "end past the data");
  check_refused(one(R"({"dtype":"F32","shape":[2],"data_offsets":[8,0]})"), "backwards");
  check_refused(one(R"({"dtype":"F32","shape":[3],"data_offsets":[0,8]})"),
                "hold 8 bytes, shape [3] of F32 needs 12");
  check_refused(one(R"({"dtype":"F32","shape":[0],"data_offsets":[0,0]})"), "out of range");
  check_refused(one(R"({"dtype":"F32","shape":[-2],"data_offsets":[0,8]})"), "-2 is not an unsigned integer");
  check_refused(one(R"({"dtype":"F32","shape":[2.0],"data_offsets":[0,8]})"),
                "2.0 is not an unsigned integer");
  check_refused(one(R"({"dtype":"F32","shape":[2147483648],"data_offsets":[0,8]})"), "out of range");
  check_refused(one(R"({"dtype":"F32","shape":[2147483647,2147483647,2147483647],"data_offsets":[0,8]})"),
                "overflows");
  check_refused(one(R"({"dtype":"F32","shape":[2147483647,2147483647,2],"data_offsets":[0,8]})"), "too many");
  check_refused(one(R"({"dtype":"F32","shape":[1],"data_offsets":[0,4]})"), "header says");
  check_refused(one(R"({"dtype":"F32","shape":[1],"data_offsets":[4,8]})"), "hole");
  check_refused(one(R"({"dtype":"F32","shape":[2]})"), "no data_offsets");
  check_refused(one(R"({"dtype":"F32","shape":2,"data_offsets":[0,8]})"), "not a list");
  check_refused(one(R"({"dtype":1,"shape":[2],"data_offsets":[0,8]})"), "not a text");
  check_refused(one("7"), "no dtype");
  check_refused(safetensors_bytes("{\"t\":", ""), "not JSON");
  check_refused(safetensors_bytes("{} x", ""), "not JSON");
  check_refused(safetensors_bytes("{" + std::string(100, '['), ""), "not JSON");
  check_refused(safetensors_bytes("{\"a\":" + std::string(100, '['), ""), "nested deeper");
  check_refused(safetensors_bytes("{\"\xff\":1}", ""), "not JSON");

  const std::string t = R"("t":{"dtype":"F32","shape":[1],"data_offsets":[0,4]})";
  const std::string u = R"("u":{"dtype":"F32","shape":[1],"data_offsets":[0,4]})";
  check_refused(safetensors_bytes("{" + t + "," + t + "}", "1234"), "\"t\" appears twice");
  check_refused(safetensors_bytes("{" + t + "," + u + "}", "1234"), "inside the one before it");
  std::string lie = two_tensors();
  lie.replace(0, 8, raw(uint64_t(1) << 40));
  check_refused(lie, "truncated: file has");
  lie.replace(0, 8, raw(~uint64_t(0)));
  check_refused(lie, "not a safetensors file");

  const std::string types = R"({"x":{"dtype":"F8_E4M3","shape":[4],"data_offsets":[0,4]},)"
                            R"("y":{"dtype":"I64","shape":[1],"data_offsets":[4,12]}})";
  check_refused(safetensors_bytes(types, "123456789012"), "\"x\": \"F8_E4M3\"");
  check_refused(safetensors_bytes(types, "123456789012"), "\"y\": \"I64\"");
}

TEST_CASE("safetensors: sharded folder") {
  const auto shard = [](const std::string& name) {
    return safetensors_bytes("{\"" + name + R"(":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})",
                             raw(1.5f));
  };
  TempFolder dir;
  const std::string index = dir / "model.safetensors.index.json";
  write_file(dir / "m1.safetensors", shard("a"));
  write_file(dir / "m2.safetensors", shard("b"));
  write_file(index, R"({"metadata":{},"weight_map":{"a":"m1.safetensors","b":"m2.safetensors"}})");
  const Safetensors file = Safetensors::open(dir.path());
  CHECK(file.tensors().size() == 2);
  CHECK(file.files().size() == 2);
  CHECK(file.find("b") != nullptr);

  const auto refused = [&](const std::string& text, const std::string& expected) {
    write_file(index, text);
    const std::string message = refusal(dir.path());
    INFO(message);
    CHECK(message.find(expected) != std::string::npos);
  };
  refused(R"({"weight_map":{"a":"m3.safetensors"}})", "\"m3.safetensors\", which is missing");
  refused(R"({"weight_map":{"a":"../m1.safetensors"}})",
          "\"../m1.safetensors\", which is not a plain file name");
  refused(R"({"weight_map":{"a":"/etc/passwd"}})", "\"/etc/passwd\", which is not a plain file name");
  refused(R"({"weight_map":{"a":".."}})", "\"..\", which is not a plain file name");
  refused(R"({"weight_map":{"c":"m1.safetensors"}})", "\"c\" in \"m1.safetensors\", which does not hold it");
  refused(R"({"weight_map":{"a":"m1.safetensors","b":"m1.safetensors"}})", "\"b\" in \"m1.safetensors\"");
  refused(R"({"weight_map":{"a":"m1.safetensors","a":"m2.safetensors"}})", "\"a\" appears twice");
  refused(R"({"weight_map":{"a":1}})", "not a text");
  refused(R"({"weight_map":[]})", "no weight_map");
  refused("[]", "not a JSON object");
  write_file(dir / "m2.safetensors", shard("a"));
  refused(R"({"weight_map":{"a":"m1.safetensors","b":"m2.safetensors"}})", "\"a\" is in another shard");
}

TEST_CASE("safetensors: other files under the name are named for what they are") {
  check_refused("<!DOCTYPE html><html>", "HTML page");
  check_refused("version https://git-lfs.github.com/spec/v1\n", "git lfs pull");
  check_refused("PK\x03\x04" + std::string(60, 1), "pickle is never opened");
  check_refused("GGUF" + std::string(60, 1), "seems to be a GGUF file");
  check_refused(std::string(60, 0), "its first bytes are 00 00");
  check_refused("", "is empty (0 bytes)");
}

TEST_CASE("safetensors: a real model") {
  const char* given = std::getenv("Q4S_DATA");
  std::string folder;
  for (const std::string& data :
       {std::string(given ? given : ""), std::string(Q4S_SOURCE_DIR) + "/../shared/data",
        std::string(Q4S_SOURCE_DIR) + "/../../shared/data"}) {
    if (folder.empty() && std::filesystem::exists(data + "/stories260K")) folder = data + "/stories260K";
  }
  if (folder.empty()) {
    MESSAGE("SKIPPED: no shared data (Q4S_DATA)");
    return;
  }
  const Safetensors file = Safetensors::open(folder);
  CHECK(file.tensors().size() == 47);
  const FileTensor* down = file.find("model.layers.4.mlp.down_proj.weight");
  REQUIRE(down);
  CHECK(down->shape == std::vector<int64_t>{64, 172});
  const auto* values = reinterpret_cast<const float*>(down->data);
  for (int i = 0; i < 64 * 172; ++i) REQUIRE(std::abs(values[i]) < 10);
}

TEST_CASE("safetensors: a folder with pickle only, or with nothing") {
  TempFolder dir;
  CHECK(refusal(dir.path()).find("neither model.safetensors") != std::string::npos);
  write_file(dir / "pytorch_model.bin", "PK\x03\x04");
  const std::string message = refusal(dir.path());
  CHECK(message.find("pytorch_model.bin") != std::string::npos);
  CHECK(message.find("pickle is never opened") != std::string::npos);
}

}  // namespace
}  // namespace q4s
