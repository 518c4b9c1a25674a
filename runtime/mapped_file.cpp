#include "runtime/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "runtime/error.h"

namespace q4s {

MappedFile::MappedFile(const std::string& path) : path_(path) {
  const auto refuse = [&](const std::string& why) -> void {
    throw Error(ErrorKind::kInput, path + ": " + why);
  };
  // O_NONBLOCK: opening a FIFO must not wait for its writer.
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) refuse(std::strerror(errno));
  struct stat info;
  const bool known = fstat(fd, &info) == 0;
  const char* why = !known                   ? "its size cannot be read"
                    : S_ISDIR(info.st_mode)  ? "is a directory, not a file"
                    : S_ISFIFO(info.st_mode) ? "is a FIFO, not a file"
                    : !S_ISREG(info.st_mode) ? "is not a regular file"
                    : info.st_size == 0      ? "is empty (0 bytes)"
                                             : nullptr;
  if (why) {
    close(fd);
    refuse(why);
  }
  void* map = mmap(nullptr, size_t(info.st_size), PROT_READ, MAP_SHARED, fd, 0);
  const int reason = errno;
  close(fd);
  if (map == MAP_FAILED) {
    throw Error(reason == ENOMEM ? ErrorKind::kResource : ErrorKind::kInput,
                path + ": cannot be mapped: " + std::strerror(reason));
  }
  data_ = static_cast<const uint8_t*>(map);
  size_ = size_t(info.st_size);
  (void)madvise(map, size_,
                MADV_HUGEPAGE);  // what is not cached yet is read in large pages, where the kernel can
}

MappedFile::~MappedFile() {
  if (data_) munmap(const_cast<uint8_t*>(data_), size_);
}

MappedFile::MappedFile(MappedFile&& other) noexcept { *this = std::move(other); }

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

namespace {
void advise(const void* begin, size_t bytes, int advice) {
  if (bytes == 0) return;
  const auto page = uintptr_t(sysconf(_SC_PAGESIZE));
  const uintptr_t start = reinterpret_cast<uintptr_t>(begin) / page * page;
  const size_t length = reinterpret_cast<uintptr_t>(begin) + bytes - start;
  (void)madvise(reinterpret_cast<void*>(start), length, advice);  // a hint: a refusal changes nothing
}
}  // namespace

void advise_will_need(const void* begin, size_t bytes) { advise(begin, bytes, MADV_WILLNEED); }
void advise_dont_need(const void* begin, size_t bytes) { advise(begin, bytes, MADV_DONTNEED); }
void advise_sequential(const void* begin, size_t bytes) { advise(begin, bytes, MADV_SEQUENTIAL); }

}  // namespace q4s
