// Problems for heads that must agree: small random lm_heads and states, every way to be difficult
// that is known, and every kind of sampling.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "engine/float16.h"
#include "engine/sampling.h"
#include "tests/test_random.h"

namespace infemeral {

// lm_head as its values and as binary16, V x H, and a state. Values may go beyond binary16's 65504
// on their way in, never in what is stored.
struct Problem {
  std::size_t vocab, hidden;
  std::size_t marked;  // a column that some difficulties are about
  std::vector<float> weights;
  std::vector<std::uint16_t> halves;
  std::vector<float> state;

  Problem(std::size_t v, std::size_t h)
      : vocab(v), hidden(h), marked(random_index(h)), weights(v * h), state(h) {}
  float* row(std::size_t i) { return &weights[i * hidden]; }
  const float* row(std::size_t i) const { return &weights[i * hidden]; }
  void copy_row(std::size_t from, std::size_t to) { std::copy_n(row(from), hidden, row(to)); }
  void store() {
    halves.resize(weights.size());
    for (std::size_t i = 0; i < weights.size(); ++i) {
      halves[i] = f32_to_f16(std::clamp(weights[i], -65504.0f, 65504.0f));
      weights[i] = f16_to_f32(halves[i]);
    }
  }
};

// What makes a random problem difficult: changes of its rows, and of every state that is drawn.
struct Kind {
  std::string name;
  std::function<void(Problem&)> rows = [](Problem&) {};
  std::function<void(Problem&)> state = [](Problem&) {};
  bool covered = true;  // whether the proof should cover most of its states
};

inline void scale_state(Problem& p, float scale) {
  for (float& y : p.state) y *= scale;
}

inline const Kind kRandomKind = {"random"};

inline const std::vector<Kind> kDifficultKinds = {
    {"ties: every row several times",
     [](Problem& p) {
       for (std::size_t i = p.vocab / 4; i < p.vocab; ++i) p.copy_row(i % (p.vocab / 4), i);
     }},
    {"near-ties: rows that differ by one binary16 step of one value",
     [](Problem& p) {
       for (std::size_t i = 1; i < p.vocab; ++i) {
         p.copy_row(0, i);
         float& w = p.row(i)[random_index(p.hidden)];
         w = f16_to_f32(static_cast<std::uint16_t>(f32_to_f16(w) + (i % 2 ? 1 : -1)));
       }
     }},
    {"flat: a state that barely tells rows apart",
     [](Problem& p) {
       for (std::size_t i = 1; i < p.vocab; ++i) {
         p.copy_row(0, i);
         p.row(i)[random_index(p.hidden)] *= 1 + normal(0.01f);
       }
     }},
    {"norms from 2^-13 to 2^13",
     [](Problem& p) {
       for (std::size_t i = 0; i < p.vocab; ++i) {
         const float scale = std::exp2(uniform(-13, 13));
         for (std::size_t j = 0; j < p.hidden; ++j) p.row(i)[j] *= scale;
       }
     },
     [](Problem& p) { scale_state(p, std::exp2(uniform(-13, 4))); }},
    {"zero rows",
     [](Problem& p) {
       for (std::size_t i = 0; i < p.vocab; ++i) {
         if (random_index(3) != 0) std::fill_n(p.row(i), p.hidden, 0.0f);
       }
     }},
    {"subnormal rows under a large state",
     [](Problem& p) {
       for (float& w : p.weights) w *= 0x1p-17f;
     },
     [](Problem& p) { scale_state(p, 0x1p17f); }},
    {"a state with subnormal values", [](Problem&) {},
     [](Problem& p) {
       for (std::size_t j = 1; j < p.hidden; ++j) {
         if (random_index(2) == 0) p.state[j] = normal(0x1p-140f);
       }
     }},
    {"one huge coordinate", [](Problem&) {},
     [](Problem& p) { p.state[random_index(p.hidden)] = normal(1e4f); }},
    {"one huge coordinate that the rows do not use",
     [](Problem& p) {
       for (std::size_t i = 0; i < p.vocab; ++i) p.row(i)[p.marked] = 0;
     },
     [](Problem& p) { p.state[p.marked] = 1e6f; }},
    {"one huge weight a row, where the state is small",
     [](Problem& p) {
       for (std::size_t i = 0; i < p.vocab; ++i) p.row(i)[p.marked] = normal(100);
     },
     [](Problem& p) { p.state[p.marked] = 1e-3f; }},
    {"a tiny state", [](Problem&) {},
     [](Problem& p) { scale_state(p, std::exp2(uniform(-148, -50))); }, false},
    {"a huge state", [](Problem&) {},
     [](Problem& p) { scale_state(p, std::exp2(uniform(80, 100))); }, false},
    {"all zero", [](Problem&) {},
     [](Problem& p) { std::fill(p.state.begin(), p.state.end(), 0.0f); }, false},
    {"whole numbers: no rounding at all, many equal logits",
     [](Problem& p) {
       for (float& w : p.weights) w = std::round(w);
     },
     [](Problem& p) {
       for (float& y : p.state) y = std::round(y);
     }},
    {"sums that cancel",
     [](Problem& p) {
       for (std::size_t i = 0; i < p.vocab; ++i) {
         for (std::size_t j = 1; j < p.hidden; j += 2) p.row(i)[j] = p.row(i)[j - 1];
       }
     },
     [](Problem& p) {
       for (std::size_t j = 1; j < p.hidden; j += 2) {
         p.state[j - 1] *= 100;
         p.state[j] = -p.state[j - 1] * (1 + normal(0x1p-20f));
       }
     }},
};

// Another state for the problem's rows.
inline void draw_state(const Kind& kind, Problem& p) {
  const float scale = uniform(0.1f, 3);  // from flat to peaked
  for (float& y : p.state) y = normal(scale);
  kind.state(p);
}

// Call store() before the rows are used.
inline Problem make_problem(const Kind& kind) {
  // Now and then a vocabulary of which only a part may be rescored, and rows of several blocks.
  const bool large = random_index(400) == 0;
  Problem p(large ? 1000 + random_index(2000) : 20 + random_index(180),
            1 + random_index(large ? 700 : 70));
  for (float& w : p.weights) w = normal();
  kind.rows(p);
  draw_state(kind, p);
  return p;
}
inline constexpr std::size_t kMaxProblemVocab = 3000, kMaxProblemHidden = 700;

inline std::vector<std::int32_t> random_history(std::size_t vocab_size) {
  std::vector<std::int32_t> history(random_index(30));
  for (std::int32_t& id : history) id = static_cast<std::int32_t>(random_index(vocab_size));
  return history;
}

inline const std::vector<SamplingParams> kSamplingKinds = {
    {},
    {.repetition_penalty = 1.3f},
    {.repetition_penalty = 0.6f},
    {.temperature = 1},
    {.temperature = 0.3f, .repetition_penalty = 1.2f},
    {.temperature = 0.7f, .top_k = 5},
    {.temperature = 1.5f, .top_k = 40, .repetition_penalty = 1.1f},
    {.temperature = 1, .min_p = 0.1f},
    {.temperature = 0.9f, .top_k = 10, .min_p = 0.02f},
    {.temperature = 0.8f, .top_k = 20, .top_p = 0.8f},
    {.temperature = 1.5f, .top_k = 18, .top_p = 0.9f, .min_p = 0.15f},
    {.temperature = 0.7f, .top_p = 0.9f},
    {.temperature = 0.8f, .top_p = 0.99f, .min_p = 0.05f},
    {.temperature = 1, .top_p = 0.5f, .repetition_penalty = 1.2f},
    {.temperature = 1.2f, .top_k = 1000, .top_p = 0.95f, .min_p = 0.05f},
};

// A device's logarithms and exponentials may differ from the host's in their last bits. Whether
// that can be why `other` was drawn from these logits instead of `token`: their scores with noise
// are as close as such bits, or top-p's or min-p's edge lies next to one of them.
inline bool last_bits_decide(std::span<const float> logits, const SampleRequest& request,
                             std::int32_t token, std::int32_t other) {
  if (request.params.greedy()) return false;
  Scorer scorer;
  scorer.start(request, logits.size());
  const auto noisy = [&](std::int32_t id) {
    return scorer.score(logits[static_cast<std::size_t>(id)], id) +
           gumbel_noise(request.params.seed, request.position, static_cast<std::uint32_t>(id));
  };
  // Logarithms are below 32 here, and their last bits below 2^-48.
  const double a = noisy(token), b = noisy(other);
  if (std::fabs(a - b) <= 0x1p-48 + 0x1p-52 * std::fabs(a)) return true;
  for (float factor : {1 - 0x1p-20f, 1 + 0x1p-20f}) {  // some float32 steps
    SampleRequest moved = request;
    if (moved.params.top_p < 1) moved.params.top_p *= factor;
    moved.params.min_p *= factor;
    std::vector<float> scratch(logits.begin(), logits.end());
    if (Sampler().sample(scratch, moved) == other) return true;
  }
  return false;
}

}  // namespace infemeral
