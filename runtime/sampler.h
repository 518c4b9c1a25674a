// From logits to a token id: penalties, then top-k, top-p, min-p on the model's probabilities, then
// temperature, in llama.cpp's order and with its meanings. Random numbers are a function of (seed, sequence,
// step) alone, so that the same seed gives the same text whatever else runs. Knows nothing of models.
#pragma once
#include <cstdint>
#include <span>
#include <unordered_map>
#include <vector>

namespace q4s {

struct SamplerOptions {
  float temperature = 0.8f;        // 0: greedy, ties to the lowest id
  int top_k = 40;                  // the k likeliest; 0: all
  float top_p = 0.95f;             // the likeliest that together reach p; 1: all
  float min_p = 0.05f;             // those at least min_p times as likely as the likeliest; 0: all
  float repeat_penalty = 1.0f;     // of ids among the last ones: logit divided if positive, else multiplied
  int repeat_last_n = 64;          // how many last ids the penalties look at; 0: none, -1: all
  float presence_penalty = 0.0f;   // taken off the logit of an id among them
  float frequency_penalty = 0.0f;  // the same, times the number it occurs
  uint64_t seed = 0;
  std::vector<int32_t> banned;  // ids never to be sampled

  void check() const;  // throws Error(kUsage) naming the option, its value and its range
};

class Sampler {
 public:
  explicit Sampler(SamplerOptions options, uint64_t sequence = 0);  // throws as check() does

  // Tells the sampler of an id that stands in the text, of the prompt or chosen: penalties look at it.
  void accept(int32_t id);
  // Chooses; accept() of the result is the caller's. logits: (vocab). The chosen id is the first whose
  // cumulative weight exceeds uniform * sum, in order of falling logit (then rising id) after top-k or top-p,
  // else of id. Throws Error(kRuntime) if one is NaN or infinite: no token may be made up from them.
  int32_t sample(std::span<const float> logits);

  // For a device that draws by the same rules: what it needs to go on from here, and the way back. drew()
  // stands for sample() and accept() of its result.
  const SamplerOptions& options() const { return options_; }
  uint64_t sequence() const { return sequence_; }
  uint64_t step() const { return step_; }
  std::span<const int32_t> history() const { return history_; }  // empty where repeat_last_n is 0
  void drew(int32_t id) {
    if (options_.temperature != 0) ++step_;
    accept(id);
  }

 private:
  struct Candidate {
    float logit;
    int32_t id;
  };
  // Fills weights_ with exp((logit - top) / temperature) of candidates_ and returns their sum.
  double weigh(float top, float temperature);

  SamplerOptions options_;
  uint64_t sequence_, step_ = 0;
  std::vector<int32_t> history_;             // what was accepted, for the window's trailing end
  std::unordered_map<int32_t, int> counts_;  // occurrences within the window
  std::vector<float> logits_;                // scratch (vocab): after penalties
  std::vector<Candidate> candidates_;        // scratch, at most vocab
  std::vector<float> weights_;               // scratch, as long as candidates_
};

}  // namespace q4s
