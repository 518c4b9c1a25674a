// Writer of .q4s (format: q4s_file.h). Tensors go to OUT.partial as they come, over hours where need be;
// finish() turns it into OUT in one step, so that OUT is the old file or the whole new one at any moment.
//
// Going on after a kill: checkpoint() makes what was added so far durable, and notes it in
// OUT.partial.journal with a text of the caller's. A writer opened with `resume` finds the tensors and texts
// of all whole checkpoints and goes on behind the last; the finished file is the same bytes as that of an
// unbroken run.
//
// Journal: records of  KIND SPACE payload-bytes SPACE xxh3-of-payload NEWLINE payload NEWLINE  where KIND is
// "key" (first, once), "tensors" (a header as in the file, of one checkpoint's tensors) or "note" (ends that
// checkpoint).
#pragma once
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/types.h"
#include "runtime/atomic_file.h"
#include "runtime/q4s_file.h"
#include "runtime/q4s_format.h"

namespace q4s {

struct Q4sWriterOptions {
  bool force = false;   // overwrite OUT where it exists; without resume: drop unfinished work
  bool resume = false;  // go on with unfinished work where there is any
  std::string key;      // all that the bytes depend on (options, hashes of inputs), as a readable text
  std::vector<std::string> inputs;  // files being read: never overwritten, whatever `force` says
};

class Q4sWriter {
 public:
  // Throws Error(kUsage): as check_output, unfinished work there with neither `resume` nor `force`,
  // unfinished work of another key, another process at work on OUT. Writing anything may throw
  // Error(kResource); then OUT is untouched and the partial file removed.
  explicit Q4sWriter(const std::string& path, Q4sWriterOptions options = {});
  // Unfinished: keeps the partial file where there is a checkpoint to go on from, else removes it.
  ~Q4sWriter();
  Q4sWriter(const Q4sWriter&) = delete;
  Q4sWriter& operator=(const Q4sWriter&) = delete;

  // What a resumed writer found, in the order of addition; none of it is to be added again. The views read
  // the partial file and live as long as the writer.
  std::span<const Q4sTensor> kept() const { return kept_; }
  const Q4sTensor* find_kept(std::string_view name) const;
  std::span<const std::string> notes() const { return notes_; }  // one a checkpoint

  // kF32, kF16, kBF16, kQ8, kQ4. Written at once; the order of calls is the order in the file.
  void add_tensor(const std::string& name, const WeightView&);
  void checkpoint(std::string_view note);

  // Kept in memory until finish(), so to be set in every run, resumed or not.
  void add_feature(const std::string& name);
  void add_blob(const std::string& name, std::span<const uint8_t> bytes);
  void set_config(std::string_view json) { config_ = json; }
  void set_provenance(std::string_view json) { provenance_ = json; }

  void finish();

 private:
  void pad();
  void write_blob(const std::string& name, const void* data, size_t bytes);
  void start_fresh();
  bool load_journal();
  void record(const char* kind, std::string_view payload);

  std::string path_, partial_, journal_path_;
  Q4sWriterOptions options_;
  OutputFile out_, journal_;
  Q4sHeader header_;
  size_t saved_ = 0;  // tensors in the journal
  bool has_checkpoint_ = false, finished_ = false;

  MappedFile map_;  // of the partial file, for kept_
  std::vector<Q4sTensor> kept_;
  std::vector<std::string> notes_;

  struct Blob {
    std::string name;
    std::vector<uint8_t> bytes;
  };
  std::vector<Blob> blobs_;
  std::string config_ = "{}", provenance_ = "{}";
};

}  // namespace q4s
