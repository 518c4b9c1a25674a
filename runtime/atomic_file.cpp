#include "runtime/atomic_file.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <utility>

#include "runtime/error.h"

namespace q4s {
namespace {

constexpr size_t kBuffer = size_t(4) << 20;  // whole huge pages: so the file is cached, and mapped later

std::string folder_of(const std::string& path) {
  const std::string folder = std::filesystem::path(path).parent_path().string();
  return folder.empty() ? "." : folder;
}

}  // namespace

void check_output(const std::string& path, bool force, std::span<const std::string> inputs) {
  const auto refuse = [&](const std::string& why) { throw Error(ErrorKind::kUsage, path + ": " + why); };
  struct stat folder;
  if (path.empty()) refuse("the name of the output is empty");
  if (stat(folder_of(path).c_str(), &folder) != 0) {
    refuse("its folder cannot be used: " + std::string(strerror(errno)));
  }
  if (!S_ISDIR(folder.st_mode)) refuse(folder_of(path) + " is not a folder");

  struct stat target;
  if (stat(path.c_str(), &target) != 0) {
    if (errno != ENOENT) refuse(strerror(errno));
    return;
  }
  if (S_ISDIR(target.st_mode)) refuse("is a directory");
  if (!S_ISREG(target.st_mode)) refuse("is not a regular file");
  for (const std::string& input : inputs) {
    struct stat source;
    if (stat(input.c_str(), &source) == 0 && source.st_dev == target.st_dev &&
        source.st_ino == target.st_ino) {
      refuse("is the input " + input + " itself");
    }
  }
  if (!force) refuse("exists; --force overwrites it");
}

OutputFile::OutputFile(const std::string& path, bool keep_bytes) : path_(path) {
  fd_ = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | (keep_bytes ? 0 : O_TRUNC), 0666);
  if (fd_ < 0) {
    const bool usage = errno == EACCES || errno == EPERM || errno == EROFS || errno == ENOENT ||
                       errno == ENOTDIR || errno == EISDIR || errno == ENAMETOOLONG || errno == ELOOP;
    throw Error(usage ? ErrorKind::kUsage : ErrorKind::kResource,
                path + ": cannot be opened for writing: " + strerror(errno));
  }
  const off_t end = lseek(fd_, 0, SEEK_END);
  if (end < 0) fail("seek");
  position_ = uint64_t(end);
  buffer_.reserve(kBuffer);
}

OutputFile::~OutputFile() {
  if (fd_ >= 0) close(fd_);
}

OutputFile::OutputFile(OutputFile&& other) noexcept { *this = std::move(other); }

OutputFile& OutputFile::operator=(OutputFile&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(fd_, other.fd_);
  std::swap(position_, other.position_);
  std::swap(buffer_, other.buffer_);
  std::swap(failed_, other.failed_);
  return *this;
}

void OutputFile::fail(const std::string& what) {
  const int reason = errno;
  failed_ = true;
  throw Error(ErrorKind::kResource,
              path_ + ": " + what + " failed at byte " + std::to_string(position_) + ": " + strerror(reason));
}

void OutputFile::flush() {
  const char* at = buffer_.data();
  for (size_t left = buffer_.size(); left > 0;) {
    const ssize_t done = ::write(fd_, at, left);
    if (done < 0 && errno == EINTR) continue;
    if (done < 0) fail("write");
    at += done;
    left -= size_t(done);
  }
  buffer_.clear();
}

void OutputFile::write(const void* data, size_t bytes) {
  const char* at = static_cast<const char*>(data);
  position_ += bytes;
  while (bytes > 0) {
    const size_t part = std::min(bytes, kBuffer - buffer_.size());
    buffer_.insert(buffer_.end(), at, at + part);
    if (buffer_.size() == kBuffer) flush();
    at += part;
    bytes -= part;
  }
}

void OutputFile::rewrite(uint64_t offset, const void* data, size_t bytes) {
  flush();
  const char* at = static_cast<const char*>(data);
  while (bytes > 0) {
    const ssize_t done = pwrite(fd_, at, bytes, off_t(offset));
    if (done < 0 && errno == EINTR) continue;
    if (done < 0) fail("write");
    at += done;
    offset += uint64_t(done);
    bytes -= size_t(done);
  }
}

void OutputFile::cut(uint64_t bytes) {
  flush();
  if (ftruncate(fd_, off_t(bytes)) != 0) fail("truncate");
  if (lseek(fd_, off_t(bytes), SEEK_SET) < 0) fail("seek");
  position_ = bytes;
}

void OutputFile::sync() {
  flush();
  if (fsync(fd_) != 0) fail("fsync");
}

bool OutputFile::lock() {
  struct stat held, named;
  return flock(fd_, LOCK_EX | LOCK_NB) == 0 && fstat(fd_, &held) == 0 && stat(path_.c_str(), &named) == 0 &&
         held.st_dev == named.st_dev && held.st_ino == named.st_ino;
}

void replace_file(const std::string& temporary, const std::string& target) {
  const auto fail = [&](const char* what) {
    throw Error(ErrorKind::kResource, target + ": " + what + " failed: " + strerror(errno));
  };
  if (rename(temporary.c_str(), target.c_str()) != 0) fail("rename");
  const int folder = open(folder_of(target).c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (folder < 0) return;  // a folder that may be written but not read: the rename has happened all the same
  const bool synced = fsync(folder) == 0 || errno == EINVAL;  // EINVAL: this file system has no such thing
  const int reason = errno;
  close(folder);
  errno = reason;
  if (!synced) fail("fsync of the folder");
}

AtomicFile::AtomicFile(const std::string& path, bool force, std::span<const std::string> inputs)
    : path_(path), temporary_(path + ".tmp" + std::to_string(getpid())) {
  check_output(path, force, inputs);
  out_ = OutputFile(temporary_, false);
}

AtomicFile::~AtomicFile() {
  if (!committed_) unlink(temporary_.c_str());
}

void AtomicFile::commit() {
  out_.sync();
  replace_file(temporary_, path_);
  committed_ = true;
}

}  // namespace q4s
