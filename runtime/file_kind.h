// What a file seems to be, by its first bytes, and what to tell the user about it. Never opens pickle.
#pragma once
#include <cstdint>
#include <span>
#include <string>

namespace q4s {

enum class FileKind {
  kFolder,
  kQ4s,
  kGguf,
  kSafetensors,
  kOldGgml,     // GGML, GGMF, GGJT: before GGUF
  kHtml,        // an error page saved under the model's name
  kLfsPointer,  // git clone without git-lfs
  kZip,         // what PyTorch's .bin, .pt, .pth are
  kPickle,
  kJson,
  kUnknown,
};

FileKind file_kind(std::span<const uint8_t> bytes);  // the whole file, or at least its first 4 KiB

// The same for a path; a directory is kFolder. Throws Error(kInput) as MappedFile does.
FileKind file_kind(const std::string& path);

// "a GGUF file", "an HTML page, as failed downloads leave".
const char* describe(FileKind);

// Throws Error(kInput): "PATH: not EXPECTED; it seems to be an HTML page ...: download it again".
// expected: "a .q4s file".
[[noreturn]] void refuse_kind(const std::string& path, std::span<const uint8_t> bytes,
                              const std::string& expected);

// How to turn a PyTorch checkpoint into safetensors; ends the message about a folder that has only pickle.
extern const char* const kPickleAdvice;

}  // namespace q4s
