#include "runtime/q4s_file.h"

#include <algorithm>
#include <cinttypes>
#include <cstdio>

#include "runtime/checksum.h"
#include "runtime/error.h"
#include "runtime/file_tensor.h"
#include "runtime/json_check.h"
#include "runtime/q4s_format.h"

namespace q4s {

Q4sFile Q4sFile::open(const std::string& path) {
  Q4sFile out;
  out.map_ = MappedFile(path);
  const uint8_t* const file = out.map_.data();
  const Q4sPreamble preamble = parse_preamble(out.map_.bytes(), path);
  const std::string where = path + ": header";
  const std::string_view text(reinterpret_cast<const char*>(file) + preamble.header_offset,
                              preamble.header_bytes);
  Q4sHeader header = parse_header(text, where);
  const uint64_t end = check_layout(header, kQ4sAlign, where);
  if (next_part(end) != preamble.header_offset) {
    throw Error(ErrorKind::kInput, where + ": begins at byte " + std::to_string(preamble.header_offset) +
                                       ", but what it lists ends at " + std::to_string(end));
  }

  out.minor_ = preamble.minor;
  out.features_ = std::move(header.features);
  for (Q4sEntry& e : header.tensors) {
    out.index_.emplace(e.name, out.tensors_.size());
    const WeightView view = entry_view(e, file);
    out.tensors_.push_back({std::move(e.name), view, e.checksum});
  }
  for (Q4sBlobEntry& b : header.blobs) {
    if (xxh3(file + b.data.offset, b.data.bytes) != b.checksum) {
      throw Error(ErrorKind::kInput, path + ": blob " + in_quotes(b.name) +
                                         " is damaged: its bytes differ from their "
                                         "checksum");
    }
    out.blobs_.push_back({std::move(b.name), {file + b.data.offset, size_t(b.data.bytes)}});
  }
  check_json(out.config_json(), path + ": config");
  check_json(out.provenance_json(), path + ": provenance");
  return out;
}

const Q4sTensor* Q4sFile::find(std::string_view name) const {
  const auto it = index_.find(std::string(name));
  return it == index_.end() ? nullptr : &tensors_[it->second];
}

bool Q4sFile::has_blob(std::string_view name) const {
  return std::any_of(blobs_.begin(), blobs_.end(), [&](const Q4sBlob& b) { return b.name == name; });
}

std::span<const uint8_t> Q4sFile::blob(std::string_view name) const {
  for (const Q4sBlob& b : blobs_) {
    if (b.name == name) return b.bytes;
  }
  throw Error(ErrorKind::kInput, path() + ": has no blob " + in_quotes(name));
}

std::string Q4sFile::blob_text(std::string_view name) const {
  const std::span<const uint8_t> bytes = blob(name);
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

bool Q4sFile::has_feature(std::string_view name) const {
  return std::find(features_.begin(), features_.end(), name) != features_.end();
}

void Q4sFile::verify() const {
  std::string bad;
  const uint8_t* padding = map_.data() + 48;  // what lies between the parts
  const auto part = [&](const std::string& name, const void* data, size_t bytes) {
    const auto* begin = static_cast<const uint8_t*>(data);
    if (std::any_of(padding, begin, [](uint8_t b) { return b != 0; })) bad += "\n  padding before " + name;
    padding = begin + bytes;
  };
  for (const Q4sTensor& t : tensors_) {
    const WeightView& v = t.view;
    part(in_quotes(t.name), v.data, size_t(v.n * row_bytes(v.format, v.k)));
    if (v.scales) part("the scales of " + in_quotes(t.name), v.scales, size_t(v.n * v.groups() * 2));
    const uint64_t sum = view_checksum(v);
    if (sum != t.checksum) {
      bad += "\n  tensor " + in_quotes(t.name) + ": checksum " + checksum_text(sum) + ", header says " +
             checksum_text(t.checksum);
    }
  }
  for (const Q4sBlob& b : blobs_) part(in_quotes(b.name), b.bytes.data(), b.bytes.size());
  const auto header = size_t(next_part(uint64_t(padding - map_.data())));
  part("the header", map_.data() + header, map_.size() - header);
  if (!bad.empty()) throw Error(ErrorKind::kInput, path() + ": damaged:" + bad);
}

std::string Q4sFile::show() const {
  std::string out;
  const auto line = [&](const char* format, auto... values) {
    char text[512];
    std::snprintf(text, sizeof text, format, values...);
    out += text;
    out += '\n';
  };
  line("%s: .q4s version %d.%d, %" PRIu64 " bytes", path().c_str(), int(kQ4sMajor), int(minor_), bytes());
  for (const std::string& f : features_) line("feature     %s", f.c_str());
  out += "config      " + config_json() + "\nprovenance  " + provenance_json() + "\n";
  for (const Q4sBlob& b : blobs_) {
    line("blob        %-44s %12zu bytes", in_quotes(b.name).c_str(), b.bytes.size());
  }
  line("%-44s %-5s %6s %5s %16s %14s %8s  %s", "tensor", "type", "group", "grid", "shape", "bytes", "bits/w",
       "xxh3");
  uint64_t all_bytes = 0, all_weights = 0;
  for (const Q4sTensor& t : tensors_) {
    const WeightView& v = t.view;
    const uint64_t weights = uint64_t(v.n) * uint64_t(v.k);
    const uint64_t size = uint64_t(v.n * row_bytes(v.format, v.k) + (v.scales ? v.n * v.groups() * 2 : 0));
    all_bytes += size;
    all_weights += weights;
    const std::string group = v.scales ? std::to_string(v.group) : "-";
    const std::string shape = std::to_string(v.n) + " x " + std::to_string(v.k);
    line("%-44s %-5s %6s %5s %16s %14" PRIu64 " %8.3f  %s", in_quotes(t.name).c_str(), format_name(v.format),
         group.c_str(),
         !v.scales               ? "-"
         : v.grid == Grid::kHalf ? "half"
                                 : "int",
         shape.c_str(), size, 8.0 * double(size) / double(weights), checksum_text(t.checksum).c_str());
  }
  line("%zu tensors, %" PRIu64 " weights, %" PRIu64 " bytes, %.3f bits a weight", tensors_.size(),
       all_weights, all_bytes, all_weights ? 8.0 * double(all_bytes) / double(all_weights) : 0.0);
  return out;
}

}  // namespace q4s
