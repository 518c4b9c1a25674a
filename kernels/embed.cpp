// Row look-up. Token by token; the unpacking itself lives in dequantize.cpp.
#include "kernels/embed.h"

#include "kernels/linear.h"

namespace q4s {

void embed_cpu(const EmbedArgs& a, Part part) {
  const auto [begin, end] = part.of(a.tokens);
  for (int64_t t = begin; t < end; ++t) dequantize_rows(a.table, a.ids[t], a.ids[t] + 1, a.y + t * a.table.k);
}

}  // namespace q4s
