// Writing files so that a reader sees the old one or the whole new one, never a part: a temporary file beside
// the target, every write checked, fsync, rename, fsync of the folder.
#pragma once
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace q4s {

// May `path` be written? Throws Error(kUsage) saying which: its folder is missing, it is no regular file, it
// exists and `force` is not given, or it is the same file (inode) as one of `inputs`, whatever `force` says.
void check_output(const std::string& path, bool force, std::span<const std::string> inputs = {});

// A file written front to back through a buffer. Failing to open it is Error(kUsage) when path or permissions
// are to blame; everything else is Error(kResource) naming path and reason (disk full, quota, EIO).
class OutputFile {
 public:
  OutputFile() = default;
  OutputFile(const std::string& path, bool keep_bytes);  // made if absent; emptied unless keep_bytes
  ~OutputFile();
  OutputFile(OutputFile&&) noexcept;
  OutputFile& operator=(OutputFile&&) noexcept;

  void write(const void* data, size_t bytes);
  void rewrite(uint64_t offset, const void* data, size_t bytes);  // over bytes already written
  void cut(uint64_t bytes);                        // forget what follows; goes on writing there
  void sync();                                     // on the disk when this returns
  uint64_t position() const { return position_; }  // bytes written so far
  bool is_open() const { return fd_ >= 0; }
  bool failed() const { return failed_; }  // an Error(kResource) was thrown
  // False when another process holds the file, or it is no longer the file at its path.
  bool lock();

 private:
  [[noreturn]] void fail(const std::string& what);
  void flush();

  std::string path_;
  int fd_ = -1;
  uint64_t position_ = 0;
  std::vector<char> buffer_;
  bool failed_ = false;
};

// rename(temporary, target), then fsync of the folder.
void replace_file(const std::string& temporary, const std::string& target);

// A small file (a report) written at once: nothing at `path` changes before commit().
class AtomicFile {
 public:
  explicit AtomicFile(const std::string& path, bool force, std::span<const std::string> inputs = {});
  ~AtomicFile();  // without commit(): removes the temporary file
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;
  void write(std::string_view text) { out_.write(text.data(), text.size()); }
  void commit();

 private:
  std::string path_, temporary_;
  OutputFile out_;
  bool committed_ = false;
};

}  // namespace q4s
