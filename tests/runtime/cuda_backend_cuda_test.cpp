// Every operation of the CUDA backend against its definition over odd shapes (node_bench.h).
#include "node_bench.h"

using namespace q4s;

TEST_CASE("cuda: embed and gather") {
  if (!cuda()) return;
  for (Format f : {Format::kQ4, Format::kQ8, Format::kF32, Format::kF16, Format::kBF16, Format::kGgufQ8_0})
    for (int64_t k : some<int64_t>({96, 64, 172, 576, 33, 1}))
      for (bool upload : {true, false}) {
        if (f == Format::kGgufQ8_0 && k % 32) continue;
        CAPTURE(int(f));
        CAPTURE(k);
        Weight table = loaded(f, 37, k, 64, Grid::kInt, upload, {}, k == 64 || k == 33);
        Graph g({5, 3});
        Tensor& ids = g.input("ids", Rows::kTokens, 1, Type::kI32);
        Tensor& wanted = g.input("wanted", Rows::kOutputs, 1, Type::kI32);
        g.gather(g.embed(ids, table), wanted);
        Bench b(*cuda(), g, {4, 2}, {});
        b.input(ids, numbers(5, 37, 1));
        b.input(wanted, std::vector<int32_t>{3, 0, 0});
        b.check(f == Format::kGgufQ8_0 ? 1e-7 : 0);  // GGUF blocks become fp16
      }
}

TEST_CASE("cuda: rms_norm, swiglu, rotate") {
  if (!cuda()) return;
  for (int64_t dim : some<int64_t>({576, 64, 172, 4096, 1, 7}))
    for (int64_t tokens : some<int64_t>({1, 5, 130})) {
      CAPTURE(dim);
      CAPTURE(tokens);
      Weight gain = f32_weight("gain", 1, dim, 3);
      load_all({&gain});
      Graph g({tokens + 1, 1});
      Tensor& x = g.input("x", Rows::kTokens, dim, Type::kF32);
      g.rms_norm(x, gain, 1e-5f);
      Tensor& y = g.input("y", Rows::kTokens, 2 * dim, Type::kF32);
      g.swiglu(y);
      Bench b(*cuda(), g, {tokens, 1}, {});
      b.input(x, normal(tokens * dim, 1));
      b.input(y, normal(tokens * 2 * dim, 2, 3));
      b.check(1e-12);
    }
  for (auto [dim, m] :
       some<std::pair<int64_t, int64_t>>({{576, 9}, {64, 1}, {172, 43}, {4096, 1}, {5, 5}, {14336, 7}}))
    for (bool inverse : {false, true}) {
      CAPTURE(dim);
      Weight signs = make_weight_f32("signs", 1, dim, normal(dim, 5)), factor = f32_weight("factor", m, m, 6);
      load_all({&signs, &factor});
      Graph g({3, 1});
      Tensor& x = g.input("x", Rows::kTokens, dim, Type::kF32);
      g.rotate(x, signs, factor, inverse);
      Bench b(*cuda(), g, {2, 1}, {});
      b.input(x, normal(2 * dim, 1));
      b.check(1e-11);
    }
}

TEST_CASE("cuda: rope_kv and attention") {
  if (!cuda()) return;
  struct Shape {
    int64_t heads, kv_heads, head_dim;
  };
  for (const Shape s : some<Shape>({{9, 3, 64},
                                    {8, 4, 8},
                                    {4, 4, 128},
                                    {8, 1, 128},
                                    {2, 1, 256},
                                    {6, 2, 48},
                                    {3, 3, 80},
                                    {32, 8, 128}},
                                   3))
    for (KvType type : {KvType::kF16, KvType::kF32})
      for (int64_t tokens : some<int64_t>({1, 3, 70, 8, 17, 300}, 3))
        for (auto [ctx, sequences] : some<std::pair<int64_t, int64_t>>({{77, 3}, {600, 3}, {600, 1}}, 1)) {
          if (tokens > ctx) continue;
          CAPTURE(s.heads);
          CAPTURE(s.kv_heads);
          CAPTURE(s.head_dim);
          CAPTURE(tokens);
          CAPTURE(ctx);
          const HeadShape head{1, s.heads, s.kv_heads, s.head_dim};
          Weight table = make_weight_f32("rope", ctx, s.head_dim, normal(ctx * s.head_dim, 9));
          load_all({&table});
          Graph g({tokens + 2, 1});
          Tensor& position = g.input("position", Rows::kTokens, 1, Type::kI32);
          Tensor& sequence = g.input("sequence", Rows::kTokens, 1, Type::kI32);
          Tensor& qkv = g.input("qkv", Rows::kTokens, (s.heads + 2 * s.kv_heads) * s.head_dim, Type::kF32);
          g.attention(g.rope_kv(qkv, table, position, sequence, head), position, sequence, head);
          Bench b(*cuda(), g, {tokens, 1}, {nullptr, type, 2, sequences, ctx, s.kv_heads * s.head_dim});
          const Where where(tokens, sequences, ctx);
          b.input(position, where.position);
          b.input(sequence, where.sequence);
          b.input(qkv, normal(tokens * qkv.cols, 4, 0.7f));
          b.fill_cache(5);
          // fp16: a cache entry may round the other way; fast attention rounds q and the weights to fp16.
          b.check(type == KvType::kF16 ? 2e-6 : 2e-10);
        }
}

TEST_CASE("cuda: linear in every format") {
  if (!cuda()) return;
  struct Case {
    Format format;
    double bound;
  };
  // Operands of fp16 products are rounded to 2^-11; bf16 ones are split in two; f32 is exact up to summation.
  for (const Case c : {Case{Format::kQ4, 1e-6},
                       {Format::kQ8, 1e-6},
                       {Format::kF16, 1e-6},
                       {Format::kBF16, 1e-8},
                       {Format::kF32, 1e-10},
                       {Format::kGgufQ4_0, 1e-6},
                       {Format::kGgufQ4_1, 1e-6},
                       {Format::kGgufQ8_0, 1e-6}})
    for (auto [n, k] : some<std::pair<int64_t, int64_t>>(
             {{192, 576}, {48, 64}, {344, 64}, {64, 172}, {17, 33}, {1, 1}, {2050, 1024}}, 3))
      for (int64_t tokens : some<int64_t>({1, 2, 8, 9, 16, 17, 33, 130}, 3))
        for (int64_t group : some<int64_t>({128, 64, 32, 1 << 20})) {
          const bool grouped = c.format == Format::kQ4 || c.format == Format::kQ8;
          if (!grouped && group != 128) continue;
          if (int(c.format) >= int(Format::kGgufQ8_0) && k % 32) continue;
          for (Grid grid : {Grid::kInt, Grid::kHalf}) {
            if (grid == Grid::kHalf && c.format != Format::kQ4) continue;
            CAPTURE(int(c.format));
            CAPTURE(n);
            CAPTURE(k);
            CAPTURE(tokens);
            CAPTURE(group);
            CAPTURE(int(grid));
            // A head is stored for the decode kernels alone; it must serve any number of tokens all the same.
            Weight w = loaded(c.format, n, k, group, grid, tokens % 2, {}, n == 17 || n == 192);
            Graph g({tokens + 1, 1});
            Tensor& x = g.input("x", Rows::kTokens, k, Type::kF32);
            Tensor& r = g.input("r", Rows::kTokens, n, Type::kF32);
            g.linear(x, w);
            g.linear(x, w, &r);
            Bench b(*cuda(), g, {tokens, 1}, {});
            b.input(x, normal(tokens * k, 1));
            b.input(r, normal(tokens * n, 2));
            b.check(c.bound);
          }
        }
}

TEST_CASE("cuda: fused linears") {
  if (!cuda()) return;
  struct Shape {
    int64_t dim, hidden, heads, kv_heads, head_dim;
  };
  for (const Shape s : some<Shape>({{576, 1536, 9, 3, 64},
                                    {64, 172, 8, 4, 8},
                                    {256, 688, 2, 2, 128},
                                    {320, 97, 5, 1, 48},
                                    {1024, 2816, 8, 2, 128}}))
    for (Format f : {Format::kQ4, Format::kF16})
      for (int64_t tokens : some<int64_t>({1, 2, 8, 16, 17, 70}, 3))
        for (int64_t group : {int64_t(128), int64_t(32)}) {
          if (f == Format::kF16 && group != 128) continue;
          CAPTURE(s.dim);
          CAPTURE(tokens);
          CAPTURE(group);
          CAPTURE(int(f));
          const int64_t ctx = 90;
          const HeadShape head{0, s.heads, s.kv_heads, s.head_dim};
          Weight gain = f32_weight("gain", 1, s.dim, 3);
          Weight table = make_weight_f32("rope", ctx, s.head_dim, normal(ctx * s.head_dim, 9));
          Weight qkv = loaded(f, (s.heads + 2 * s.kv_heads) * s.head_dim, s.dim, group, Grid::kInt, true,
                              {RowRoles::Kind::kQkv, s.heads, s.kv_heads, s.head_dim});
          Weight gate_up =
              loaded(f, 2 * s.hidden, s.dim, group, Grid::kInt, false, {RowRoles::Kind::kGateUp});
          Weight down = loaded(f, s.dim, s.hidden, group, Grid::kHalf, true);
          Weight head_w = loaded(f, 50, s.dim, group, Grid::kInt, true);
          load_all({&gain, &table});
          Graph g({tokens + 1, 1});
          Tensor& position = g.input("position", Rows::kTokens, 1, Type::kI32);
          Tensor& sequence = g.input("sequence", Rows::kTokens, 1, Type::kI32);
          Tensor& x = g.input("x", Rows::kTokens, s.dim, Type::kF32);
          g.norm_linear_rope_kv(x, gain, 1e-5f, qkv, table, position, sequence, head);
          g.norm_linear_swiglu(x, gain, 1e-5f, gate_up);
          g.linear(g.norm_linear_swiglu(x, gain, 1e-5f, gate_up), down, &x);
          g.norm_linear(x, gain, 1e-5f, head_w);
          g.linear(x, gate_up);  // stored rows may be permuted: results never are
          g.linear(x, qkv);
          Bench b(*cuda(), g, {tokens, 1}, {nullptr, KvType::kF16, 1, 2, ctx, s.kv_heads * s.head_dim});
          const Where where(tokens, 2, ctx);
          b.input(position, where.position);
          b.input(sequence, where.sequence);
          b.input(x, normal(tokens * s.dim, 1, 2));
          b.fill_cache(5);
          b.check(2e-6);
        }
}

TEST_CASE("cuda: errors say what they are") {
  if (!cuda()) return;
  const auto kind_of = [](const auto& fn) {
    try {
      fn();
    } catch (const Error& e) {
      std::printf("%s\n", e.what());
      return e.kind();
    }
    return ErrorKind::kUsage;  // none was thrown
  };
  CHECK(kind_of([] { make_cuda_backend(99); }) == ErrorKind::kNoDevice);
  CHECK(kind_of([] { cuda()->allocate(size_t(1) << 50, "a test"); }) == ErrorKind::kResource);
  CHECK(cuda()->free_bytes().value() > 0);
  std::byte* p = cuda()->allocate(16, "a test");  // the failed one left nothing behind
  uint32_t word = 1;
  cuda()->read(&word, p, 4);
  CHECK(word == 0);
  cuda()->release(p);
}
