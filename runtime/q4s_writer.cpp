#include "runtime/q4s_writer.h"

#include <sys/stat.h>
#include <unistd.h>

#include <charconv>
#include <cstring>

#include "runtime/checksum.h"
#include "runtime/error.h"
#include "runtime/file_tensor.h"

namespace q4s {
namespace {

bool exists(const std::string& path) {
  struct stat info;
  return stat(path.c_str(), &info) == 0 && info.st_size > 0;
}

// One record of the journal at the front of `rest`, which moves behind it; false at the end and at a torn
// record.
bool take_record(std::string_view& rest, std::string_view* kind, std::string_view* payload) {
  const size_t line = rest.find('\n');
  if (line == std::string_view::npos) return false;
  const std::string_view head = rest.substr(0, line);
  const size_t space = head.find(' '), second = head.find(' ', space + 1);
  if (space == std::string_view::npos || second == std::string_view::npos) return false;
  size_t bytes = 0;
  const auto number = head.substr(space + 1, second - space - 1);
  const auto parsed = std::from_chars(number.data(), number.data() + number.size(), bytes);
  if (parsed.ec != std::errc() || parsed.ptr != number.data() + number.size()) return false;
  if (bytes >= rest.size() - line - 1 || rest[line + 1 + bytes] != '\n') return false;
  *kind = head.substr(0, space);
  *payload = rest.substr(line + 1, bytes);
  if (head.substr(second + 1) != checksum_text(xxh3(payload->data(), bytes))) return false;
  rest.remove_prefix(line + 1 + bytes + 1);
  return true;
}

}  // namespace

Q4sWriter::Q4sWriter(const std::string& path, Q4sWriterOptions options)
    : path_(path),
      partial_(path + ".partial"),
      journal_path_(partial_ + ".journal"),
      options_(std::move(options)) {
  check_output(path_, options_.force, options_.inputs);
  check_output(partial_, true, options_.inputs);
  check_output(journal_path_, true, options_.inputs);
  out_ = OutputFile(partial_, true);
  if (!out_.lock()) throw Error(ErrorKind::kUsage, partial_ + ": another process is writing it");
  const bool unfinished = exists(partial_) && exists(journal_path_);
  if (unfinished && !options_.resume && !options_.force) {
    throw Error(ErrorKind::kUsage, partial_ +
                                       ": unfinished work of an interrupted run: --resume goes on with it, "
                                       "--force starts anew");
  }
  if (!(unfinished && options_.resume && load_journal())) start_fresh();
}

Q4sWriter::~Q4sWriter() {
  if (finished_ || !out_.is_open()) return;
  if (!has_checkpoint_ || out_.failed() || journal_.failed()) {
    unlink(partial_.c_str());
    unlink(journal_path_.c_str());
  }
}

void Q4sWriter::start_fresh() {
  unlink(journal_path_.c_str());  // first: a journal must never speak of a partial file that was emptied
  out_.cut(0);
  const std::array<uint8_t, kQ4sAlign> empty{};
  out_.write(empty.data(), empty.size());
}

// Takes over all whole checkpoints whose bytes are as noted; false if there are none.
bool Q4sWriter::load_journal() {
  struct stat info;
  if (stat(partial_.c_str(), &info) != 0 || uint64_t(info.st_size) < kQ4sAlign) return false;
  map_ = MappedFile(partial_);
  const MappedFile text(journal_path_);
  std::string_view rest(reinterpret_cast<const char*>(text.data()), text.size()), kind, payload;
  if (!take_record(rest, &kind, &payload) || kind != "key") return false;
  if (payload != options_.key) {
    throw Error(ErrorKind::kUsage, partial_ +
                                       ": unfinished work of a run with other options or inputs; --force "
                                       "without --resume starts anew\n  then: " +
                                       std::string(payload) + "\n  now:  " + options_.key);
  }
  uint64_t end = kQ4sAlign;
  size_t journal_end = 0;
  while (take_record(rest, &kind, &payload) && kind == "tensors") {
    Q4sHeader part = parse_header(payload, journal_path_);
    const uint64_t part_end = check_layout(part, end, journal_path_);
    bool whole = part_end <= map_.size() && take_record(rest, &kind, &payload) && kind == "note";
    for (const Q4sEntry& e : part.tensors) {
      whole = whole && view_checksum(entry_view(e, map_.data())) == e.checksum;
    }
    if (!whole) break;
    for (Q4sEntry& e : part.tensors) {
      kept_.push_back({e.name, entry_view(e, map_.data()), e.checksum});
      header_.tensors.push_back(std::move(e));
    }
    notes_.emplace_back(payload);
    end = part_end;
    journal_end = text.size() - rest.size();
  }
  if (notes_.empty()) return false;
  advise_dont_need(map_.data(), map_.size());  // read for the checksums; the caller reads what it wants again
  saved_ = header_.tensors.size();
  has_checkpoint_ = true;
  journal_ = OutputFile(journal_path_, true);
  journal_.cut(journal_end);
  out_.cut(end);
  return true;
}

const Q4sTensor* Q4sWriter::find_kept(std::string_view name) const {
  for (const Q4sTensor& t : kept_) {
    if (t.name == name) return &t;
  }
  return nullptr;
}

void Q4sWriter::pad() {
  const std::array<uint8_t, kQ4sAlign> zeros{};
  out_.write(zeros.data(), size_t(next_part(out_.position()) - out_.position()));
}

void Q4sWriter::add_tensor(const std::string& name, const WeightView& view) {
  Q4sEntry e;
  e.name = name;
  e.format = view.format;
  e.n = view.n;
  e.k = view.k;
  Checksum sum;
  const auto write = [&](const void* data, size_t bytes) {
    out_.write(data, bytes);
    sum.update(data, bytes);
  };
  pad();
  e.data.offset = out_.position();
  const auto row = size_t(row_bytes(view.format, view.k));
  const bool half_byte = view.format == Format::kQ4 && view.k % 2 != 0;
  if (!view.rows && !half_byte) {
    write(view.data, size_t(view.n) * row);
  } else {
    std::vector<uint8_t> copy(row);
    for (int64_t i = 0; i < view.n; ++i) {
      std::memcpy(copy.data(), view.row(i), row);
      if (half_byte) copy.back() &= 15;
      write(copy.data(), row);
    }
  }
  e.data.bytes = out_.position() - e.data.offset;
  if (has_scales(view.format)) {
    e.grid = view.grid;
    e.group = view.group;
    pad();
    e.scales.offset = out_.position();
    write(view.scales, size_t(view.n * view.groups() * 2));
    e.scales.bytes = out_.position() - e.scales.offset;
  }
  e.checksum = sum.value();
  header_.tensors.push_back(std::move(e));
}

void Q4sWriter::record(const char* kind, std::string_view payload) {
  const std::string head = std::string(kind) + " " + std::to_string(payload.size()) + " " +
                           checksum_text(xxh3(payload.data(), payload.size())) + "\n";
  journal_.write(head.data(), head.size());
  journal_.write(payload.data(), payload.size());
  journal_.write("\n", 1);
}

void Q4sWriter::checkpoint(std::string_view note) {
  out_.sync();  // before the journal speaks of it
  if (!journal_.is_open()) {
    journal_ = OutputFile(journal_path_, false);
    record("key", options_.key);
  }
  Q4sHeader part;
  part.tensors.assign(header_.tensors.begin() + ptrdiff_t(saved_), header_.tensors.end());
  record("tensors", header_text(part));
  record("note", note);
  journal_.sync();
  saved_ = header_.tensors.size();
  has_checkpoint_ = true;
}

void Q4sWriter::add_feature(const std::string& name) { header_.features.push_back(name); }

void Q4sWriter::add_blob(const std::string& name, std::span<const uint8_t> bytes) {
  blobs_.push_back({name, {bytes.begin(), bytes.end()}});
}

void Q4sWriter::write_blob(const std::string& name, const void* data, size_t bytes) {
  pad();
  header_.blobs.push_back({name, {out_.position(), bytes}, xxh3(data, bytes)});
  out_.write(data, bytes);
}

void Q4sWriter::finish() {
  write_blob("config", config_.data(), config_.size());
  write_blob("provenance", provenance_.data(), provenance_.size());
  for (const Blob& b : blobs_) write_blob(b.name, b.bytes.data(), b.bytes.size());
  pad();
  const std::string text = header_text(header_);
  Q4sPreamble preamble;
  preamble.header_offset = out_.position();
  preamble.header_bytes = text.size();
  preamble.header_checksum = xxh3(text.data(), text.size());
  out_.write(text.data(), text.size());
  preamble.file_bytes = out_.position();
  const auto front = preamble_bytes(preamble);
  out_.rewrite(0, front.data(), front.size());
  out_.sync();
  Q4sFile::open(partial_);  // our own checks, before the old file goes
  check_output(path_, options_.force, options_.inputs);
  replace_file(partial_, path_);
  finished_ = true;
  unlink(journal_path_.c_str());
}

}  // namespace q4s
