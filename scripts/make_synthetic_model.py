#!/usr/bin/env python3
# A Hugging Face folder of any LLaMA shape with random weights, for speed and memory at sizes whose real weights are not
# at hand: scripts/make_synthetic_model.py OUT --shape 7b --tokenizer tokenizer.model [--layers 2] ...
# Rows differ in size, a few channels of the residual stream are outliers, and what writes the stream is scaled so that
# activations stay bounded at any depth. Needs numpy; shards are written in parallel, never a whole model in memory.
import argparse, json, multiprocessing, os, shutil
import numpy as np

SHAPES = {  # dim, hidden, layers, heads, kv heads, vocab, context, rope theta
    "135m": (576, 1536, 30, 9, 3, 49152, 8192, 1e5),
    "7b": (4096, 11008, 32, 32, 32, 32000, 4096, 1e4),
    "8b": (4096, 14336, 32, 32, 8, 128256, 8192, 5e5),
    "13b": (5120, 13824, 40, 40, 40, 32000, 4096, 1e4),
    "70b": (8192, 28672, 80, 64, 8, 32000, 4096, 1e4),
}
POOL = 1 << 24  # normals that all tensors are cut from
ROWS = 1024     # of a tensor at a time


def tensors_of(a):
    """[(file, [(name, shape, kind)])]: one file for the tables, one a layer."""
    hd = a.dim // a.heads
    layers = [[(f"model.layers.{i}.{n}.weight", s, k) for n, s, k in (
        ("input_layernorm", (a.dim,), "norm"),
        ("self_attn.q_proj", (a.heads * hd, a.dim), "in"), ("self_attn.k_proj", (a.kv_heads * hd, a.dim), "in"),
        ("self_attn.v_proj", (a.kv_heads * hd, a.dim), "in"), ("self_attn.o_proj", (a.dim, a.heads * hd), "out"),
        ("post_attention_layernorm", (a.dim,), "norm"),
        ("mlp.gate_proj", (a.hidden, a.dim), "in"), ("mlp.up_proj", (a.hidden, a.dim), "in"),
        ("mlp.down_proj", (a.dim, a.hidden), "out"))] for i in range(a.layers)]
    tables = [("model.embed_tokens.weight", (a.vocab, a.dim), "embed"), ("model.norm.weight", (a.dim,), "norm"),
              ("lm_head.weight", (a.vocab, a.dim), "in")]
    all_ = [tables] + layers
    return [(f"model-{i + 1:05d}-of-{len(all_):05d}.safetensors", t) for i, t in enumerate(all_)]


def values(rng, pool, shape, kind, a):
    """Yields fp16 pieces of a tensor, some rows each."""
    outliers = np.random.default_rng(a.seed).choice(a.dim, 4, replace=False)  # the same channels in every layer
    if kind == "norm":
        gain = 1 + 0.1 * rng.standard_normal(shape[0], dtype=np.float32)
        gain[outliers] *= 4
        yield gain.astype(np.float16)
        return
    n, k = shape
    scale = {"embed": 1.0, "in": k ** -0.5, "out": (2 * a.layers * k) ** -0.5}[kind]
    rows = scale * np.exp(0.25 * rng.standard_normal((n, 1), dtype=np.float32))
    if kind == "out":
        rows[outliers] *= 6
    for i in range(0, n, ROWS):
        count = min(ROWS, n - i)
        at = int(rng.integers(0, POOL))
        piece = np.take(pool, np.arange(at, at + count * k) % POOL, mode="wrap") if count * k > POOL - at else pool[at:at + count * k]
        yield (piece.reshape(count, k) * rows[i:i + count]).astype(np.float16)


def write(job):
    index, (name, tensors), a = job
    rng = np.random.default_rng((a.seed, index))
    pool = np.random.default_rng(a.seed).standard_normal(POOL, dtype=np.float32)
    header, at = {}, 0
    for tensor, shape, _ in tensors:
        size = 2 * int(np.prod(shape))
        header[tensor] = {"dtype": "F16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(os.path.join(a.out, name), "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for _, shape, kind in tensors:
            for piece in values(rng, pool, shape, kind, a):
                f.write(piece.tobytes())
    return at


def main():
    p = argparse.ArgumentParser()
    p.add_argument("out")
    p.add_argument("--shape", choices=SHAPES, default="7b")
    p.add_argument("--tokenizer", required=True, help="tokenizer.model or tokenizer.json to put beside the weights")
    for name in ("dim", "hidden", "layers", "heads", "kv-heads", "vocab", "context"):
        p.add_argument("--" + name, type=int)
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--jobs", type=int, default=os.cpu_count())
    a = p.parse_args()
    names = ("dim", "hidden", "layers", "heads", "kv_heads", "vocab", "context")
    for name, value in zip(names, SHAPES[a.shape]):
        if getattr(a, name) is None:
            setattr(a, name, value)
    os.makedirs(a.out, exist_ok=True)
    files = tensors_of(a)
    with multiprocessing.Pool(min(a.jobs, len(files))) as pool:
        total = sum(pool.map(write, [(i, f, a) for i, f in enumerate(files)], chunksize=1))
    with open(os.path.join(a.out, "model.safetensors.index.json"), "w") as f:
        json.dump({"metadata": {"total_size": total}, "weight_map": {t[0]: n for n, ts in files for t in ts}}, f)
    with open(os.path.join(a.out, "config.json"), "w") as f:
        json.dump({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": a.dim,
                   "intermediate_size": a.hidden, "num_hidden_layers": a.layers, "num_attention_heads": a.heads,
                   "num_key_value_heads": a.kv_heads, "vocab_size": a.vocab, "max_position_embeddings": a.context,
                   "rms_norm_eps": 1e-5, "rope_theta": SHAPES[a.shape][7], "tie_word_embeddings": False,
                   "torch_dtype": "float16", "bos_token_id": 1, "eos_token_id": 2}, f, indent=1)
    shutil.copy(a.tokenizer, a.out)
    base = os.path.basename(a.tokenizer)
    if base.endswith(".model") and base != "tokenizer.model":
        os.rename(os.path.join(a.out, base), os.path.join(a.out, "tokenizer.model"))
    print(f"{a.out}: {total / 1e9:.2f} GB, {len(files)} shards")


if __name__ == "__main__":
    main()
