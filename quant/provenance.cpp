#include "quant/provenance.h"

#include <algorithm>
#include <filesystem>
#include <set>

#include "runtime/checksum.h"
#include "runtime/mapped_file.h"

namespace q4s {

using Json = nlohmann::ordered_json;

namespace {

// The files that make a model, in a fixed order.
std::vector<std::filesystem::path> model_files(const std::string& path) {
  if (!std::filesystem::is_directory(path)) return {path};
  static const std::set<std::string> known = {"config.json",
                                              "generation_config.json",
                                              "tokenizer.json",
                                              "tokenizer_config.json",
                                              "tokenizer.model",
                                              "special_tokens_map.json",
                                              "model.safetensors.index.json"};
  std::vector<std::filesystem::path> files;
  for (const auto& e : std::filesystem::directory_iterator(path))
    if (known.contains(e.path().filename().string()) || e.path().extension() == ".safetensors")
      files.push_back(e.path());
  std::sort(files.begin(), files.end());
  return files;
}

}  // namespace

Json source_json(const std::string& path, ThreadPool& pool) {
  const std::vector<std::filesystem::path> files = model_files(path);
  std::vector<Json> entries(files.size());
  pool.parallel_for(int64_t(files.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const MappedFile map(files[i].string());
      entries[i] = {{"name", files[i].filename().string()},
                    {"bytes", map.size()},
                    {"xxh3", checksum_text(xxh3(map.data(), map.size()))}};
    }
  });
  return entries;
}

Json calibration_json(const Calibration& c) {
  return {
      {"source", c.source == "self-written" ? c.source : std::filesystem::path(c.source).filename().string()},
      {"samples", c.samples},
      {"seq_len", c.seq_len},
      {"tokens", c.samples * c.seq_len},
      {"xxh3", c.hash},
      {"seed", c.seed}};
}

Json losses_json(const std::vector<BlockReport>& blocks) {
  Json j = Json::object();
  for (const BlockReport& b : blocks)
    for (const LinearReport& l : b.linears)
      j["blk." + std::to_string(b.block) + "." + l.name] = {{"loss", l.loss.loss},
                                                            {"relative_loss", l.loss.relative}};
  return j;
}

}  // namespace q4s
