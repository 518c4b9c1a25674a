// A complete model of a few hundred kB with random weights, as a GGUF file and as a Hugging Face folder, for
// tests that must not depend on data beside the repository.
#pragma once
#include <filesystem>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <vector>

#include "tests/runtime/test_files.h"
#include "tests/runtime/tiny_vocab.h"

namespace q4s::test {

struct TinyModel {
  int64_t dim = 32, hidden = 48, layers = 2, heads = 4, kv_heads = 2, context = 64;
  GgufVocab vocab = tiny_bpe({"<s>", "</s>", "<|im_start|>", "<|im_end|>"});
  std::string architecture = "llama";
  float first_weight = 0.1f;  // of the embedding: to plant a NaN

  struct Tensor {
    std::string gguf, hf;
    std::vector<uint64_t> shape;  // rows, columns
  };
  std::vector<Tensor> tensors() const {
    const uint64_t d = uint64_t(dim), f = uint64_t(hidden), kv = uint64_t(dim / heads * kv_heads);
    std::vector<Tensor> all = {{"token_embd", "model.embed_tokens", {vocab.tokens.size(), d}}};
    for (int64_t l = 0; l < layers; ++l) {
      const std::string g = "blk." + std::to_string(l) + ".", h = "model.layers." + std::to_string(l) + ".";
      for (const Tensor& t : std::vector<Tensor>{{"attn_norm", "input_layernorm", {d}},
                                                 {"attn_q", "self_attn.q_proj", {d, d}},
                                                 {"attn_k", "self_attn.k_proj", {kv, d}},
                                                 {"attn_v", "self_attn.v_proj", {kv, d}},
                                                 {"attn_output", "self_attn.o_proj", {d, d}},
                                                 {"ffn_norm", "post_attention_layernorm", {d}},
                                                 {"ffn_gate", "mlp.gate_proj", {f, d}},
                                                 {"ffn_up", "mlp.up_proj", {f, d}},
                                                 {"ffn_down", "mlp.down_proj", {d, f}}})
        all.push_back({g + t.gguf, h + t.hf, t.shape});
    }
    all.push_back({"output_norm", "model.norm", {d}});
    for (Tensor& t : all) t.gguf += ".weight", t.hf += ".weight";
    return all;
  }

  std::vector<float> values(const Tensor& t, size_t index) const {
    size_t n = 1;
    for (uint64_t s : t.shape) n *= s;
    std::vector<float> v(n, 1.f);  // norms
    std::mt19937 random(uint32_t(index) + 1);
    if (t.shape.size() > 1)
      for (float& x : v) x = float(int32_t(random())) / float(INT32_MAX) * 0.4f;
    if (index == 0) v[0] = first_weight;
    return v;
  }

  // GGUF has the two halves of a rotary head interleaved; a checkpoint of Hugging Face has them one after the
  // other.
  std::vector<float> hf_order(const Tensor& t, const std::vector<float>& gguf) const {
    const size_t d = size_t(dim), half = size_t(dim / heads / 2);
    if (!t.gguf.ends_with("attn_q.weight") && !t.gguf.ends_with("attn_k.weight")) return gguf;
    std::vector<float> out(gguf.size());
    for (size_t row = 0; row < t.shape[0]; ++row) {
      const size_t head = row / (2 * half), j = row / 2 % half, side = row % 2;
      std::copy_n(gguf.begin() + long(row * d), d,
                  out.begin() + long((head * 2 * half + side * half + j) * d));
    }
    return out;
  }

  void write_gguf(const std::string& path) const { write_file(path, gguf()); }
  std::string gguf() const {
    const auto u32 = [](const char* key, int64_t v) { return gguf_pair(key, 4, raw(uint32_t(v))); };
    const auto text = [](const char* key, const std::string& v) { return gguf_pair(key, 8, gguf_string(v)); };
    const auto strings = [](const char* key, const std::vector<std::string>& v) {
      std::string body = raw(uint32_t(8)) + raw(uint64_t(v.size()));
      for (const std::string& s : v) body += gguf_string(s);
      return gguf_pair(key, 9, body);
    };
    const std::vector<std::string> pairs = {
        text("general.architecture", architecture),
        u32("llama.embedding_length", dim),
        u32("llama.feed_forward_length", hidden),
        u32("llama.block_count", layers),
        u32("llama.attention.head_count", heads),
        u32("llama.attention.head_count_kv", kv_heads),
        u32("llama.context_length", context),
        text("tokenizer.ggml.model", vocab.model),
        text("tokenizer.ggml.pre", vocab.pre),
        strings("tokenizer.ggml.tokens", vocab.tokens),
        gguf_pair("tokenizer.ggml.token_type", 9,
                  raw(uint32_t(5)) + raw(uint64_t(vocab.types.size())) + raw(vocab.types)),
        strings("tokenizer.ggml.merges", vocab.merges),
        u32("tokenizer.ggml.bos_token_id", 0),
        u32("tokenizer.ggml.eos_token_id", 1),
        gguf_pair("tokenizer.ggml.add_bos_token", 7, raw(uint8_t(1))),
    };
    std::vector<std::string> infos;
    std::string data;
    const std::vector<Tensor> all = tensors();
    for (size_t i = 0; i < all.size(); ++i) {
      infos.push_back(gguf_info(all[i].gguf, {all[i].shape.rbegin(), all[i].shape.rend()}, 0, data.size()));
      data += raw(values(all[i], i));
      data.resize((data.size() + 31) / 32 * 32);
    }
    return gguf_bytes(pairs, infos, data);
  }

  void write_folder(const std::string& folder) const {
    using nlohmann::json;
    std::filesystem::create_directory(folder);
    const json config = {{"architectures", {"LlamaForCausalLM"}},
                         {"model_type", "llama"},
                         {"hidden_size", dim},
                         {"intermediate_size", hidden},
                         {"num_hidden_layers", layers},
                         {"num_attention_heads", heads},
                         {"num_key_value_heads", kv_heads},
                         {"max_position_embeddings", context},
                         {"vocab_size", vocab.tokens.size()},
                         {"rms_norm_eps", 1e-5},
                         {"tie_word_embeddings", true},
                         {"bos_token_id", 0},
                         {"eos_token_id", 1},
                         {"hidden_act", "silu"}};
    write_file(folder + "/config.json", config.dump());
    json header = json::object();
    std::string data;
    const std::vector<Tensor> all = tensors();
    for (size_t i = 0; i < all.size(); ++i) {
      const std::string bytes = raw(hf_order(all[i], values(all[i], i)));
      header[all[i].hf] = {{"dtype", "F32"},
                           {"shape", all[i].shape},
                           {"data_offsets", {data.size(), data.size() + bytes.size()}}};
      data += bytes;
    }
    write_file(folder + "/model.safetensors", safetensors_bytes(header.dump(), data));
    json tokenizer = {
        {"model", {{"type", "BPE"}, {"vocab", json::object()}, {"merges", vocab.merges}}},
        {"added_tokens", json::array()},
        {"pre_tokenizer", {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", true}}},
        {"decoder", {{"type", "ByteLevel"}}},
        {"normalizer", nullptr}};
    for (size_t id = 0; id < vocab.tokens.size(); ++id) {
      if (vocab.types[id] == 1)
        tokenizer["model"]["vocab"][vocab.tokens[id]] = id;
      else
        tokenizer["added_tokens"].push_back({{"id", id}, {"content", vocab.tokens[id]}, {"special", true}});
    }
    write_file(folder + "/tokenizer.json", tokenizer.dump());
    write_file(folder + "/tokenizer_config.json",
               R"({"add_bos_token": true, "bos_token": "<s>", "eos_token": "</s>"})");
  }
};

}  // namespace q4s::test
