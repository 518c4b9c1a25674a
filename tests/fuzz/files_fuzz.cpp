// Fuzz target of the three readers of model files, for libFuzzer; built where Q4S_FUZZ is on
// (tests/CMakeLists.txt):
//   cmake --build build-fuzz --target files_fuzz && build-fuzz/tests/files_fuzz -max_len=32768 CORPUS
// Whatever the bytes are, a reader takes them or throws Error(kInput); what it took can be read to the last
// byte.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "runtime/checksum.h"
#include "runtime/error.h"
#include "runtime/gguf.h"
#include "runtime/q4s_file.h"
#include "runtime/q4s_format.h"
#include "runtime/safetensors.h"

namespace q4s {
namespace {

volatile uint8_t sink;

void touch(std::span<const FileTensor> tensors) {
  for (const FileTensor& t : tensors) sink = uint8_t(t.data[0] ^ t.data[t.bytes - 1]);
}

// A .q4s is its header with right checksums around it; else no change would get past them.
std::string forge_q4s(std::string_view header) {
  constexpr uint64_t kHeaderAt = 8 * kQ4sAlign;
  std::string file(kHeaderAt, '\0');
  file += header;
  const auto front = preamble_bytes(
      {kQ4sMajor, kQ4sMinor, kHeaderAt, header.size(), file.size(), xxh3(header.data(), header.size())});
  file.replace(0, front.size(), reinterpret_cast<const char*>(front.data()), front.size());
  return file;
}

void read_as_all(const std::string& path, bool forged) {
  const auto guarded = [](auto&& read) {
    try {
      read();
    } catch (const Error& e) {
      if (e.kind() != ErrorKind::kInput) std::abort();
    }
  };
  guarded([&] {
    const Q4sFile file = Q4sFile::open(path);
    file.show();
    file.verify();
  });
  if (forged) return;
  guarded([&] { touch(Safetensors::open(path).tensors()); });
  guarded([&] {
    const Gguf file = Gguf::open(path);
    touch(file.tensors());
    for (const std::string& key : file.keys()) {
      guarded([&] { file.integer(key); });
      guarded([&] { file.number(key); });
      guarded([&] { file.boolean(key); });
      guarded([&] { file.text(key); });
      guarded([&] { file.texts(key); });
      guarded([&] { file.floats(key); });
      guarded([&] { file.integers(key); });
    }
  });
}

void read_bytes(std::string_view bytes, bool forged) {
  const int fd = memfd_create("fuzz", 0);
  if (fd < 0 || write(fd, bytes.data(), bytes.size()) != ssize_t(bytes.size())) std::abort();
  read_as_all("/proc/self/fd/" + std::to_string(fd), forged);
  close(fd);
}

}  // namespace
}  // namespace q4s

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view bytes(reinterpret_cast<const char*>(data), size);
  q4s::read_bytes(bytes, false);
  if (size > 0 && data[0] == '{') q4s::read_bytes(q4s::forge_q4s(bytes), true);
  return 0;
}
