#include "runtime/mapped_file.h"

#include <doctest/doctest.h>
#include <sys/stat.h>
#include <unistd.h>

#include "runtime/checksum.h"
#include "runtime/error.h"
#include "runtime/file_kind.h"
#include "tests/runtime/test_files.h"

namespace q4s {
namespace {

using test::TempFolder;
using test::write_file;

void check_refused(const std::string& path, const std::string& why) {
  try {
    MappedFile file(path);
    FAIL("taken: " << path);
  } catch (const Error& e) {
    CHECK(e.kind() == ErrorKind::kInput);
    CHECK(std::string(e.what()) == path + ": " + why);
  }
}

TEST_CASE("mapped file: bytes, hints and move") {
  TempFolder dir;
  write_file(dir / "x", "hello");
  MappedFile a(dir / "x");
  CHECK(a.size() == 5);
  MappedFile b = std::move(a);
  CHECK(std::string(b.bytes().begin(), b.bytes().end()) == "hello");
  advise_will_need(b.data() + 1, 3);
  advise_sequential(b.data(), b.size());
  advise_dont_need(b.data(), b.size());
  CHECK(b.data()[4] == 'o');
}

TEST_CASE("mapped file: what is no file is refused with path and reason") {
  TempFolder dir;
  check_refused(dir / "absent", "No such file or directory");
  check_refused(dir.path(), "is a directory, not a file");
  REQUIRE(mkfifo((dir / "fifo").c_str(), 0600) == 0);
  check_refused(dir / "fifo", "is a FIFO, not a file");
  check_refused("/dev/null", "is not a regular file");
  write_file(dir / "empty", "");
  check_refused(dir / "empty", "is empty (0 bytes)");
  write_file(dir / "secret", "x");
  chmod((dir / "secret").c_str(), 0);
  if (geteuid() != 0) check_refused(dir / "secret", "Permission denied");
}

TEST_CASE("file kind: what a file seems to be") {
  const auto kind = [](const std::string& s) {
    return file_kind({reinterpret_cast<const uint8_t*>(s.data()), s.size()});
  };
  CHECK(kind(std::string("Q4S\0....", 8)) == FileKind::kQ4s);
  CHECK(kind("GGUF\x03") == FileKind::kGguf);
  CHECK(kind("tjgg\x01") == FileKind::kOldGgml);
  CHECK(kind(test::safetensors_bytes("{}", "")) == FileKind::kSafetensors);
  CHECK(kind("\n <!DOCTYPE html><html>") == FileKind::kHtml);
  CHECK(kind("\xef\xbb\xbf<html>") == FileKind::kHtml);
  CHECK(kind("version https://git-lfs.github.com/spec/v1\noid") == FileKind::kLfsPointer);
  CHECK(kind("PK\x03\x04") == FileKind::kZip);
  CHECK(kind("\x80\x02}q") == FileKind::kPickle);
  CHECK(kind(" {\"a\": 1}") == FileKind::kJson);
  CHECK(kind("") == FileKind::kUnknown);
  CHECK(kind(std::string(20, 0)) == FileKind::kUnknown);
  TempFolder dir;
  CHECK(file_kind(dir.path()) == FileKind::kFolder);
  CHECK_THROWS_AS(file_kind(dir / "absent"), Error);
}

TEST_CASE("file kind: a refusal says what the file seems to be and what to do") {
  const auto message = [](const std::string& s) -> std::string {
    try {
      refuse_kind("x", {reinterpret_cast<const uint8_t*>(s.data()), s.size()}, "a .q4s file");
    } catch (const Error& e) {
      return e.what();
    }
  };
  CHECK(message("<html>") ==
        "x: not a .q4s file; it seems to be an HTML page, as failed downloads leave: download it again");
  CHECK(message("GGUF") == "x: not a .q4s file; it seems to be a GGUF file");
  CHECK(message("version https://git-lfs.github.com").ends_with("run `git lfs pull` beside it"));
  CHECK(message("PK\x03\x04").find("pickle is never opened") != std::string::npos);
  CHECK(message("abc") == "x: not a .q4s file; its first bytes are 61 62 63");
}

TEST_CASE("checksum: XXH3-64 of known bytes, whole and in pieces") {
  CHECK(checksum_text(xxh3("", 0)) == "2d06800538d394c2");  // the published value for empty input
  Checksum pieces;
  pieces.update("hel", 3);
  pieces.update("lo", 2);
  CHECK(pieces.value() == xxh3("hello", 5));
}

}  // namespace
}  // namespace q4s
