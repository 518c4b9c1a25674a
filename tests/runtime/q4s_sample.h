// The small .q4s file that the tests write, golden bytes and must-fail files are made from: one tensor of
// every format, short last groups, an odd K, a blob, a feature.
#pragma once
#include <string>
#include <vector>

#include "runtime/q4s_writer.h"

namespace q4s::test {

struct Sample {
  std::vector<float> f32{1.f, -2.f, 0.5f};
  std::vector<uint16_t> f16{0x3c00, 0xc000, 0x3800, 0x0001}, bf16{0x3f80, 0xc000};
  std::vector<uint8_t> q8, q4;
  std::vector<uint16_t> q8_scales{0x3c00, 0xbc00}, q4_scales{0x2c00, 0xac00, 0x0000, 0x2e66};

  Sample() {
    for (int i = 0; i < 2 * 40; ++i) q8.push_back(uint8_t(i - 40));
    for (int i = 0; i < 2 * 18; ++i) q4.push_back(uint8_t(i * 37));
    q4[17] |= 0xf0;  // the unused half byte of an odd row: the file must not depend on it
  }

  WeightView view(Format format) const {
    switch (format) {
      case Format::kF32: return {.format = format, .n = 1, .k = 3, .data = bytes(f32)};
      case Format::kF16: return {.format = format, .n = 2, .k = 2, .data = bytes(f16)};
      case Format::kBF16: return {.format = format, .n = 1, .k = 2, .data = bytes(bf16)};
      case Format::kQ8:
        return {
            .format = format, .n = 2, .k = 40, .group = 64, .data = q8.data(), .scales = q8_scales.data()};
      default:
        return {.format = Format::kQ4,
                .grid = Grid::kHalf,
                .n = 2,
                .k = 35,
                .group = 32,
                .data = q4.data(),
                .scales = q4_scales.data()};
    }
  }

  static const std::vector<std::pair<std::string, Format>>& tensors() {
    static const std::vector<std::pair<std::string, Format>> all = {{"norm", Format::kF32},
                                                                    {"blk.0.a", Format::kQ4},
                                                                    {"blk.0.b", Format::kF16},
                                                                    {"blk.1.a", Format::kBF16},
                                                                    {"embed", Format::kQ8}};
    return all;
  }

  void write_rest(Q4sWriter& writer) const {
    writer.add_feature("rotation");
    writer.set_config(R"({"dim":3})");
    writer.set_provenance(R"({"tool":"test"})");
    const std::string tokens = "tokenizer bytes";
    writer.add_blob("tokenizer.model", {reinterpret_cast<const uint8_t*>(tokens.data()), tokens.size()});
    writer.finish();
  }

  void write(const std::string& path, Q4sWriterOptions options = {}) const {
    Q4sWriter writer(path, options);
    for (const auto& [name, format] : tensors()) writer.add_tensor(name, view(format));
    write_rest(writer);
  }

 private:
  template <class T>
  static const uint8_t* bytes(const std::vector<T>& v) {
    return reinterpret_cast<const uint8_t*>(v.data());
  }
};

}  // namespace q4s::test
