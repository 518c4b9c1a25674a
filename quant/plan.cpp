#include "quant/plan.h"

#include "quant/allocate.h"
#include "runtime/error.h"
#include "runtime/log.h"
#include "runtime/progress.h"

namespace q4s {

double planned_bits(const LlamaConfig& c, const QuantizeOptions& o) {
  double bytes = 0;
  for (int64_t l = 0; l < c.layers; ++l) {
    for (Unit u : kUnits) {
      const std::string name = unit_name(l, u);
      bytes += o.covers(name) ? double(format_bytes(unit_rows(c, u), unit_columns(c, u), o.format_of(name)))
                              : 2.0 * double(unit_rows(c, u) * unit_columns(c, u));
    }
  }
  return 8.0 * bytes / double(c.linear_weights());
}

void show_plan(const LlamaModel& m, const QuantizeOptions& o, int64_t samples, int64_t seq_len,
               bool self_written) {
  const LlamaConfig& c = m.config;
  const double bits = planned_bits(c, o);
  const double table = double(c.vocab * c.dim) * (c.tied ? 1 : 2) *
                       (o.head == Format::kF16  ? 2.0
                        : o.head == Format::kQ8 ? 1.0 + 2.0 / 64
                                                : 0.5 + 2.0 / 128);
  log_info("blocks      %lld, %.1f M weights, %.3f bits a weight", (long long)c.layers,
           double(c.linear_weights()) / 1e6, bits);
  log_info("file        %s", bytes_text(double(c.linear_weights()) * bits / 8 + table).c_str());
  for (const bool gpu : {false, true}) {
    const QuantizePlan p = plan_quantize(c, o, samples, seq_len, gpu);
    log_info("memory, %s %s: weights %s, Hessian %s, working %s, activations %s, forward %s",
             gpu ? "GPU" : "CPU", bytes_text(double(p.total())).c_str(),
             bytes_text(double(p.weights)).c_str(), bytes_text(double(p.hessian)).c_str(),
             bytes_text(double(p.working)).c_str(), bytes_text(double(p.activations)).c_str(),
             bytes_text(double(p.forward)).c_str());
  }
  if (samples) {
    log_info("calibration %lld x %lld tokens, %s", (long long)samples, (long long)seq_len,
             self_written ? "written by the model" : "from the text");
    log_info("work        %.1f TFLOP", quantize_flops(c, o, samples, seq_len, self_written) / 1e12);
  }
}

void require_memory(const LlamaModel& m, const Backend& b, const QuantizeOptions& o, int64_t samples,
                    int64_t seq_len) {
  const QuantizePlan p = plan_quantize(m.config, o, samples, seq_len, b.name() == "cuda");
  const std::optional<size_t> free = b.free_bytes();
  if (!free || size_t(p.total()) <= *free) return;
  throw Error(
      ErrorKind::kResource,
      strprintf(
          "out of memory on %s: weights %s, Hessian %s, working %s, activations %s, forward %s, in all %s; "
          "free: %s. Fewer --samples need less, or --device cpu",
          b.describe().c_str(), bytes_text(double(p.weights)).c_str(), bytes_text(double(p.hessian)).c_str(),
          bytes_text(double(p.working)).c_str(), bytes_text(double(p.activations)).c_str(),
          bytes_text(double(p.forward)).c_str(), bytes_text(double(p.total())).c_str(),
          bytes_text(double(*free)).c_str()));
}

}  // namespace q4s
