// The bad-input table: every event, by the real binaries, with its exit code and words that help.
#include <doctest/doctest.h>
#include <sys/stat.h>

#include <cmath>

#include "tests/tools/process.h"
#include "tests/tools/tiny_model.h"

using namespace q4s::test;

namespace {

// All tools that open a model say the same about a bad one.
void refused(const std::string& path, const std::string& words) {
  CAPTURE(path);
  for (const std::vector<std::string>& command :
       std::vector<std::vector<std::string>>{{tool("llama-run"), path, "-p", "x"},
                                             {tool("llama-ppl"), path, "/dev/null"},
                                             {tool("llama-bench"), path},
                                             {tool("llama-quant"), path, path + ".out.q4s"}}) {
    const Finished f = run(command);
    CAPTURE(command[0]);
    CAPTURE(f.err);
    CHECK(f.code == 3);
    CHECK(contains(f.err, words));
    CHECK(contains(f.err, "error: "));
  }
}

}  // namespace

TEST_CASE("files that are no model: path and reason, what they seem to be") {
  TempFolder dir;
  refused(dir / "missing.q4s", "missing.q4s");
  write_file(dir / "empty.q4s", "");
  refused(dir / "empty.q4s", "empty");
  mkfifo((dir / "fifo").c_str(), 0600);
  refused(dir / "fifo", "fifo");
  std::filesystem::create_directory(dir / "nothing");
  refused(dir / "nothing", "nothing");
  write_file(dir / "page.gguf", "<!DOCTYPE html><html><body>404</body></html>");
  refused(dir / "page.gguf", "HTML");
  write_file(dir / "lfs.gguf", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n");
  refused(dir / "lfs.gguf", "git-lfs");
  write_file(dir / "model.pt", std::string("\x80\x02}q\x00.", 6));
  refused(dir / "model.pt", "ickle");
  write_file(dir / "model.bin", "PK\x03\x04" + std::string(100, 'x'));
  refused(dir / "model.bin", "ip");
  write_file(dir / "random", std::string(5000, 'z'));
  refused(dir / "random", "random");
  if (geteuid() != 0) {
    write_file(dir / "secret.q4s", "x");
    chmod((dir / "secret.q4s").c_str(), 0);
    refused(dir / "secret.q4s", "ermission");
  }
}

TEST_CASE("a GGUF cut anywhere is refused, never read past its end") {
  TempFolder dir;
  TinyModel tiny;
  tiny.layers = 1;
  const std::string whole = tiny.gguf(), path = dir / "cut.gguf";
  // Through the tools a sample; the readers' own tests cut at every byte.
  for (size_t size = 1; size < whole.size(); size += size < 200 ? 37 : whole.size() / 9) {
    write_file(path, whole.substr(0, size));
    const Finished f = run({tool("llama-run"), path, "-p", "x", "-n", "1"});
    CAPTURE(size);
    CAPTURE(f.err);
    CHECK(f.code == 3);
    CHECK(contains(f.err, "cut.gguf"));
  }
}

TEST_CASE("folders: shards missing, pickle only, other architectures, all mismatches at once") {
  TempFolder dir;
  TinyModel tiny;
  const std::string folder = dir / "model";
  tiny.write_folder(folder);
  const std::string config = read_file(folder + "/config.json");
  const auto change = [&](const std::string& from, const std::string& to) {
    std::string text = read_file(folder + "/config.json");
    REQUIRE(contains(text, from));
    text.replace(text.find(from), from.size(), to);
    write_file(folder + "/config.json", text);
  };
  change("\"llama\"", "\"gemma\"");
  refused(folder, "gemma");
  write_file(folder + "/config.json", config);
  change("\"intermediate_size\":48", "\"intermediate_size\":49");
  change("\"vocab_size\":", "\"vocab_size\":1");
  const Finished both = run({tool("llama-run"), folder, "-p", "x"});
  CHECK(both.code == 3);
  CHECK(contains(both.err, "mlp.gate_proj"));
  CHECK(contains(both.err, "embed_tokens"));
  write_file(folder + "/config.json", config);
  std::filesystem::rename(folder + "/model.safetensors", folder + "/pytorch_model.bin");
  refused(folder, "safetensors");
  write_file(folder + "/model.safetensors.index.json",
             R"({"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}})");
  refused(folder, "model-00001-of-00002.safetensors");
  write_file(folder + "/model.safetensors.index.json",
             R"({"weight_map": {"model.norm.weight": "../x.safetensors"}})");
  refused(folder, "../x.safetensors");

  TinyModel other;
  other.architecture = "gpt2";
  other.write_gguf(dir / "gpt2.gguf");
  refused(dir / "gpt2.gguf", "gpt2");
}

TEST_CASE("NaN in the weights: llama-run names the position and never makes up a token") {
  TempFolder dir;
  TinyModel tiny;
  tiny.first_weight = std::nanf("");
  tiny.write_gguf(dir / "nan.gguf");
  const Finished f = run({tool("llama-run"), dir / "nan.gguf", "-p", "x", "--no-display-prompt"});
  CHECK(f.code == 1);
  CHECK(contains(f.err, "position"));
  CHECK(f.out == "");
}

TEST_CASE("values out of range and contradictions are usage errors") {
  TempFolder dir;
  const std::string path = dir / "tiny.gguf";
  TinyModel().write_gguf(path);
  write_file(dir / "t.txt", "hello");
  for (const std::vector<std::string>& more : std::vector<std::vector<std::string>>{{"-c", "-5"},
                                                                                    {"--temp", "nan"},
                                                                                    {"-t", "1e9"},
                                                                                    {"-t", "100000"},
                                                                                    {"--top-p", "2"},
                                                                                    {"--min-p", "-1"},
                                                                                    {"--top-k", "x"},
                                                                                    {"-n", "-2"},
                                                                                    {"--repeat-last-n", "-2"},
                                                                                    {"--stop", ""},
                                                                                    {"-c", "65"},
                                                                                    {"--device", "tpu"},
                                                                                    {"--device", "cuda:x"},
                                                                                    {"-f", dir / "t.txt"},
                                                                                    {"another"}}) {
    std::vector<std::string> command = {tool("llama-run"), path, "-p", "x"};
    command.insert(command.end(), more.begin(), more.end());
    const Finished f = run(command);
    CAPTURE(more[0]);
    CAPTURE(f.err);
    CHECK(f.code == 2);
    CHECK(f.out == "");
  }
  const Finished beyond = run({tool("llama-run"), path, "-p", std::string(100, 'x')});
  CHECK(beyond.code == 2);
  CHECK(contains(beyond.err, "101 tokens"));
  CHECK(contains(beyond.err, "64"));
  const Finished window = run({tool("llama-ppl"), path, dir / "t.txt", "-c", "65"});
  CHECK(window.code == 2);
  for (const std::vector<std::string>& more :
       std::vector<std::vector<std::string>>{{},
                                             {path, "--shape", "tinyllama"},
                                             {"--shape", "nonsense"},
                                             {path, "-p", "0", "-n", "0"},
                                             {path, "-p", "1,,2"},
                                             {path, "-t", "5000"},
                                             {path, "-r", "0"}}) {
    std::vector<std::string> command = {tool("llama-bench")};
    command.insert(command.end(), more.begin(), more.end());
    const Finished f = run(command);
    CHECK(f.code == 2);
    CHECK(f.out == "");
  }
}

TEST_CASE("no GPU: one line and the CPU; 5 where one is demanded") {
  TempFolder dir;
  const std::string path = dir / "tiny.gguf";
  TinyModel().write_gguf(path);
  const Launch hidden{.env = {"CUDA_VISIBLE_DEVICES="}};
  const Finished demanded = run({tool("llama-run"), path, "-p", "x", "-n", "1", "--device", "cuda"}, hidden);
  CHECK(demanded.code == 5);
  const Finished automatic = run({tool("llama-run"), path, "-p", "x", "-n", "1"}, hidden);
  CHECK(automatic.code == 0);
  CHECK(contains(automatic.err, "CPU"));
}

#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)  // they need address space without end
TEST_CASE("memory that is not there") {
  TempFolder dir;
  TinyModel tiny;
  tiny.context = 1 << 24;
  tiny.write_gguf(dir / "long.gguf");
  const Finished f = run({"/bin/sh", "-c",
                          "ulimit -v 2000000; exec '" + tool("llama-run") + "' '" + (dir / "long.gguf") +
                              "' -p x -n 1 -c 16000000"});
  CAPTURE(f.err);
  CHECK(f.code == 4);
}
#endif
