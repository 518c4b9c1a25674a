// Opens a model from a Hugging Face folder, a GGUF file or a .q4s file: maps the file, checks every tensor
// against the config, and stacks wq|wk|wv and gate|up by row pointers, so that unquantised weights are never
// copied.
#include <cstring>
#include <functional>
#include <set>

#include "kernels/linear.h"
#include "models/llama.h"
#include "runtime/error.h"
#include "runtime/file_kind.h"
#include "runtime/gguf.h"
#include "runtime/q4s_file.h"
#include "runtime/safetensors.h"
#include "runtime/tokenizer.h"

namespace q4s {
namespace {

// The tensor names of one kind of checkpoint; "%" stands for the block.
struct Names {
  const char *embed, *final_norm, *head, *attn_norm, *q, *k, *v, *o, *mlp_norm, *gate, *up, *down;
};
constexpr Names kHf = {"model.embed_tokens.weight",
                       "model.norm.weight",
                       "lm_head.weight",
                       "model.layers.%.input_layernorm.weight",
                       "model.layers.%.self_attn.q_proj.weight",
                       "model.layers.%.self_attn.k_proj.weight",
                       "model.layers.%.self_attn.v_proj.weight",
                       "model.layers.%.self_attn.o_proj.weight",
                       "model.layers.%.post_attention_layernorm.weight",
                       "model.layers.%.mlp.gate_proj.weight",
                       "model.layers.%.mlp.up_proj.weight",
                       "model.layers.%.mlp.down_proj.weight"};
constexpr Names kGguf = {"token_embd.weight",      "output_norm.weight",       "output.weight",
                         "blk.%.attn_norm.weight", "blk.%.attn_q.weight",      "blk.%.attn_k.weight",
                         "blk.%.attn_v.weight",    "blk.%.attn_output.weight", "blk.%.ffn_norm.weight",
                         "blk.%.ffn_gate.weight",  "blk.%.ffn_up.weight",      "blk.%.ffn_down.weight"};

std::string block_name(const char* pattern, int64_t block) {
  std::string s(pattern);
  return s.replace(s.find('%'), 1, std::to_string(block));
}

// Row i of a head in file order for row j of the head as the engine wants it. GGUF files store the rows of q
// and k so that rope's pairs are neighbours; the engine pairs i with i + head_dim/2.
int64_t gguf_rope_row(int64_t row, int64_t head_dim) {
  const int64_t head = row / head_dim, i = row % head_dim, half = head_dim / 2;
  return head * head_dim + (i < half ? 2 * i : 2 * (i - half) + 1);
}

// Finds tensors, notes what is missing or misshapen, and knows at the end which were never asked for.
class Checkpoint {
 public:
  using Find = std::function<const FileTensor*(const std::string&)>;
  explicit Checkpoint(Find find) : find_(std::move(find)) {}

  const FileTensor* get(const std::string& name, std::vector<int64_t> shape) {
    used_.insert(name);
    const FileTensor* t = find_(name);
    if (!t) {
      problems_ += "\n  " + name + ": missing";
      return nullptr;
    }
    if (t->shape != shape) {
      problems_ += "\n  " + name + ": shape " + shape_text(t->shape) + ", expected " + shape_text(shape);
      return nullptr;
    }
    return t;
  }
  void allow(const std::string& name) { used_.insert(name); }

  void finish(std::span<const FileTensor> all, const std::string& where) {
    for (const FileTensor& t : all)
      if (!used_.contains(t.name) && !t.name.ends_with(".rotary_emb.inv_freq"))
        problems_ += "\n  " + in_quotes(t.name) + ": not a tensor of a LLaMA";
    if (!problems_.empty())
      throw Error(ErrorKind::kInput, where + ": tensors do not fit the config:" + problems_);
  }

 private:
  Find find_;
  std::set<std::string> used_;
  std::string problems_;
};

Weight plain(std::string name, const FileTensor* t) {
  Weight w;
  w.name = std::move(name);
  if (t) w.view = t->view();
  return w;
}

Weight vector_f32(std::string name, const FileTensor* t) {
  if (!t) return {};
  std::vector<float> values(size_t(t->columns()));
  dequantize_rows(t->view(), 0, 1, values.data());
  return make_weight_f32(std::move(name), 1, t->columns(), std::move(values));
}

struct StackPart {
  const FileTensor* tensor;
  int64_t rope_head_dim;  // 0: rows as they lie in the file
};

// The rows of several matrices as one. Parts of different formats (rare) are unpacked into f32 of our own.
Weight stacked(std::string name, std::initializer_list<StackPart> parts) {
  Weight w;
  w.name = std::move(name);
  bool mixed = false;
  for (const StackPart& p : parts) {
    if (!p.tensor) return w;
    mixed |= p.tensor->format != parts.begin()->tensor->format;
    w.view.n += p.tensor->rows();
  }
  const FileTensor& first = *parts.begin()->tensor;
  w.view.format = mixed ? Format::kF32 : first.format;
  w.view.k = first.columns();
  if (mixed) w.bytes.resize(size_t(w.view.n * w.view.k) * sizeof(float));
  for (const StackPart& p : parts) {
    const WeightView v = p.tensor->view();
    for (int64_t i = 0; i < v.n; ++i) {
      const int64_t row = p.rope_head_dim ? gguf_rope_row(i, p.rope_head_dim) : i;
      if (mixed) {
        uint8_t* to = w.bytes.data() + w.rows.size() * size_t(v.k) * sizeof(float);
        dequantize_rows(v, row, row + 1, reinterpret_cast<float*>(to));
        w.rows.push_back(to);
      } else {
        w.rows.push_back(v.row(row));
      }
    }
  }
  w.view.rows = w.rows.data();
  return w;
}

void read_checkpoint(LlamaModel& m, const Names& names, Checkpoint::Find find,
                     std::span<const FileTensor> all, int64_t rope_head_dim) {
  const LlamaConfig& c = m.config;
  Checkpoint file(std::move(find));
  LlamaWeights& w = m.weights;
  w.embed = plain("embed", file.get(names.embed, {c.vocab, c.dim}));
  for (int64_t l = 0; l < c.layers; ++l) {
    const std::string blk = "blk." + std::to_string(l) + ".";
    const auto get = [&](const char* pattern, std::vector<int64_t> shape) {
      return file.get(block_name(pattern, l), std::move(shape));
    };
    LlamaBlock b;
    b.attn_norm = vector_f32(blk + "attn_norm", get(names.attn_norm, {c.dim}));
    b.qkv = stacked(blk + "qkv", {{get(names.q, {c.q_dim(), c.dim}), rope_head_dim},
                                  {get(names.k, {c.kv_dim(), c.dim}), rope_head_dim},
                                  {get(names.v, {c.kv_dim(), c.dim}), 0}});
    b.o = plain(blk + "o", get(names.o, {c.dim, c.q_dim()}));
    b.mlp_norm = vector_f32(blk + "mlp_norm", get(names.mlp_norm, {c.dim}));
    b.gate_up = stacked(blk + "gate_up",
                        {{get(names.gate, {c.hidden, c.dim}), 0}, {get(names.up, {c.hidden, c.dim}), 0}});
    b.down = plain(blk + "down", get(names.down, {c.dim, c.hidden}));
    set_row_roles(b, c);
    w.blocks.push_back(std::move(b));
  }
  w.final_norm = vector_f32("final_norm", file.get(names.final_norm, {c.dim}));
  if (c.tied)
    file.allow(names.head);  // some tied checkpoints store a copy
  else
    w.head = plain("head", file.get(names.head, {c.vocab, c.dim}));
  file.allow("rope_freqs.weight");
  file.finish(all, m.path);
}

std::string read_text(const std::string& path) {
  const MappedFile f(path);
  return {reinterpret_cast<const char*>(f.data()), f.size()};
}

LlamaModel open_hf(const std::string& path) {
  LlamaModel m;
  m.path = path, m.kind = "hf";
  m.config = config_from_hf(read_text(path + "/config.json"), path + "/config.json");
  auto file = std::make_shared<const Safetensors>(Safetensors::open(path));
  read_checkpoint(
      m, kHf, [&](const std::string& n) { return file->find(n); }, file->tensors(), 0);
  m.files.push_back(file);
  m.tokenizer = Tokenizer::from_folder(path);
  return m;
}

LlamaModel open_gguf(const std::string& path) {
  LlamaModel m;
  m.path = path, m.kind = "gguf";
  auto file = std::make_shared<const Gguf>(Gguf::open(path));
  m.config = config_from_gguf(*file, path);
  read_checkpoint(
      m, kGguf, [&](const std::string& n) { return file->find(n); }, file->tensors(), m.config.head_dim);
  m.files.push_back(file);
  m.tokenizer = Tokenizer::from_gguf(gguf_vocab(*file));
  return m;
}

LlamaModel open_q4s(const std::string& path) {
  LlamaModel m;
  m.path = path, m.kind = "q4s";
  auto file = std::make_shared<const Q4sFile>(Q4sFile::open(path));
  m.config = config_from_q4s(file->config_json(), path);
  m.provenance = file->provenance_json();
  const LlamaConfig& c = m.config;
  std::set<std::string> used;
  std::string problems;
  const auto get = [&](const std::string& name, int64_t n, int64_t k, bool vector = false) {
    Weight w;
    w.name = name;
    used.insert(name);
    const Q4sTensor* t = file->find(name);
    if (!t) {
      problems += "\n  " + name + ": missing";
    } else if (t->view.n != n || t->view.k != k) {
      problems += "\n  " + name + ": shape " + shape_text({t->view.n, t->view.k}) + ", expected " +
                  shape_text({n, k});
    } else if (vector && t->view.format != Format::kF32) {
      problems += "\n  " + name + ": format " + format_name(t->view.format) + ", expected f32";
    } else {
      w.view = t->view;
    }
    return w;
  };
  LlamaWeights& w = m.weights;
  w.embed = get("embed", c.vocab, c.dim);
  for (int64_t l = 0; l < c.layers; ++l) {
    const std::string blk = "blk." + std::to_string(l) + ".";
    LlamaBlock b;
    b.attn_norm = get(blk + "attn_norm", 1, c.dim, true);
    b.qkv = get(blk + "qkv", c.qkv_dim(), c.dim);
    b.o = get(blk + "o", c.dim, c.q_dim());
    b.mlp_norm = get(blk + "mlp_norm", 1, c.dim, true);
    b.gate_up = get(blk + "gate_up", 2 * c.hidden, c.dim);
    b.down = get(blk + "down", c.dim, c.hidden);
    set_row_roles(b, c);
    w.blocks.push_back(std::move(b));
  }
  w.final_norm = get("final_norm", 1, c.dim, true);
  if (!c.tied) w.head = get("head", c.vocab, c.dim);
  if (c.rotated) {
    const int64_t odd = c.dim / (c.dim & -c.dim);
    w.rotation_signs = get("rotation.signs", 1, c.dim, true);
    w.rotation_factor = get("rotation.factor", odd, odd, true);
  }
  for (const Q4sTensor& t : file->tensors())
    if (!used.contains(t.name)) problems += "\n  " + in_quotes(t.name) + ": not a tensor of a LLaMA";
  if (!problems.empty()) throw Error(ErrorKind::kInput, path + ": tensors do not fit the config:" + problems);
  const auto blob = file->blob("tokenizer");
  m.tokenizer = Tokenizer::parse({reinterpret_cast<const char*>(blob.data()), blob.size()});
  m.files.push_back(file);
  return m;
}

}  // namespace

LlamaModel open_llama(const std::string& path) {
  LlamaModel m;
  switch (file_kind(path)) {
    case FileKind::kFolder: m = open_hf(path); break;
    case FileKind::kGguf: m = open_gguf(path); break;
    case FileKind::kQ4s: m = open_q4s(path); break;
    default: refuse_kind(path, MappedFile(path).bytes(), "a .q4s file, a GGUF file or a Hugging Face folder");
  }
  if (m.tokenizer->vocab_size() > m.config.vocab)
    throw Error(ErrorKind::kInput, path + ": the tokenizer has " + std::to_string(m.tokenizer->vocab_size()) +
                                       " tokens, the embedding " + std::to_string(m.config.vocab) + " rows");
  m.weights.mark_head();
  return m;
}

}  // namespace q4s
