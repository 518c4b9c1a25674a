// Where tests find real data that is not part of the repository: $Q4S_DATA, else shared/data near the
// sources.
#pragma once
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <string>

namespace q4s::test {

// The path of a file of the data folder, or empty after one clear line: the caller then returns.
inline std::string shared_data(const std::string& name) {
  const std::string sources = Q4S_SOURCE_DIR;
  std::string found;
  const char* chosen = std::getenv("Q4S_DATA");
  for (const std::string& folder : {std::string(chosen != nullptr ? chosen : ""), sources + "/../shared/data",
                                    sources + "/../../shared/data"}) {
    if (folder.empty() || !std::filesystem::exists(folder + "/" + name)) continue;
    found = folder + "/" + name;
    break;
  }
  if (found.empty()) std::printf("SKIPPED: no %s (set Q4S_DATA to the folder of test data)\n", name.c_str());
  return found;
}

// The SmolLM2 GGUF: $Q4S_SMOLLM2, else where the quickstart puts it, or models/ near the sources.
inline std::string smollm2_gguf() {
  const std::string sources = Q4S_SOURCE_DIR, name = "/SmolLM2-135M-Instruct.Q4_1.gguf";
  const char* chosen = std::getenv("Q4S_SMOLLM2");
  for (const std::string& path :
       {std::string(chosen != nullptr ? chosen : ""), sources + "/build/models" + name,
        sources + "/../models" + name, sources + "/../../models" + name}) {
    if (!path.empty() && std::filesystem::exists(path)) return path;
  }
  std::printf("SKIPPED: no SmolLM2 GGUF (set Q4S_SMOLLM2 to the file)\n");
  return "";
}

}  // namespace q4s::test
