#include "runtime/file_kind.h"

#include <sys/stat.h>

#include <cstring>
#include <string_view>

#include "runtime/error.h"
#include "runtime/mapped_file.h"

namespace q4s {

const char* const kPickleAdvice =
    "pickle is never opened here, because loading it can run any code; convert the model to safetensors "
    "where you trust it, e.g. python3 -c \"from transformers import AutoModelForCausalLM as M; "
    "M.from_pretrained('DIR').save_pretrained('OUT', safe_serialization=True)\"";

FileKind file_kind(std::span<const uint8_t> bytes) {
  const std::string_view all(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  if (all.starts_with(std::string_view("Q4S\0", 4))) return FileKind::kQ4s;
  if (all.starts_with("GGUF")) return FileKind::kGguf;
  for (const char* magic : {"lmgg", "fmgg", "tjgg", "algg"}) {
    if (all.starts_with(magic)) return FileKind::kOldGgml;
  }
  if (all.starts_with("version https://git-lfs")) return FileKind::kLfsPointer;
  if (all.starts_with("PK\x03\x04")) return FileKind::kZip;
  if (all.size() > 2 && bytes[0] == 0x80 && bytes[1] >= 2 && bytes[1] <= 5) return FileKind::kPickle;

  std::string_view text = all.substr(0, 512);
  if (text.starts_with("\xef\xbb\xbf")) text.remove_prefix(3);
  while (!text.empty() && std::strchr(" \t\r\n", text[0]) && text[0]) text.remove_prefix(1);
  std::string lower(text.substr(0, 16));
  for (char& c : lower) c = char(c >= 'A' && c <= 'Z' ? c - 'A' + 'a' : c);
  for (const char* start : {"<!doctype", "<html", "<head", "<?xml"}) {
    if (lower.starts_with(start)) return FileKind::kHtml;
  }
  // safetensors has no magic: a plausible header length, then the brace that opens the header.
  if (bytes.size() > 9 && bytes[8] == '{' && bytes[6] == 0 && bytes[7] == 0) return FileKind::kSafetensors;
  if (lower.starts_with("{")) return FileKind::kJson;
  return FileKind::kUnknown;
}

FileKind file_kind(const std::string& path) {
  struct stat info;
  if (stat(path.c_str(), &info) == 0 && S_ISDIR(info.st_mode)) return FileKind::kFolder;
  return file_kind(MappedFile(path).bytes());
}

const char* describe(FileKind kind) {
  switch (kind) {
    case FileKind::kFolder: return "a directory";
    case FileKind::kQ4s: return "a .q4s file";
    case FileKind::kGguf: return "a GGUF file";
    case FileKind::kSafetensors: return "a safetensors file";
    case FileKind::kOldGgml: return "a ggml file of the time before GGUF";
    case FileKind::kHtml: return "an HTML page, as failed downloads leave";
    case FileKind::kLfsPointer: return "a git-lfs pointer, not the file it points to";
    case FileKind::kZip: return "a zip archive, as PyTorch checkpoints are";
    case FileKind::kPickle: return "a Python pickle, as old PyTorch checkpoints are";
    case FileKind::kJson: return "a JSON text";
    case FileKind::kUnknown: return "something unknown";
  }
  return "?";
}

void refuse_kind(const std::string& path, std::span<const uint8_t> bytes, const std::string& expected) {
  const FileKind kind = file_kind(bytes);
  std::string text = path + ": not " + expected;
  if (kind == FileKind::kUnknown) {
    text += "; its first bytes are";
    for (size_t i = 0; i < bytes.size() && i < 8; ++i) {
      text += ' ';
      text += "0123456789abcdef"[bytes[i] >> 4];
      text += "0123456789abcdef"[bytes[i] & 15];
    }
    throw Error(ErrorKind::kInput, text);
  }
  text += std::string("; it seems to be ") + describe(kind);
  switch (kind) {
    case FileKind::kHtml: text += ": download it again"; break;
    case FileKind::kLfsPointer: text += ": run `git lfs pull` beside it"; break;
    case FileKind::kZip:
    case FileKind::kPickle: text += std::string(": ") + kPickleAdvice; break;
    case FileKind::kOldGgml: text += ": convert it to GGUF"; break;
    default: break;
  }
  throw Error(ErrorKind::kInput, text);
}

}  // namespace q4s
