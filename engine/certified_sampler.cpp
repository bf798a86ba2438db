// Which tokens of a row need the float16 head. Workers see every interval once and keep those that
// could still matter, by a threshold that they share and that only rises; what is left at the end
// does not depend on when it rose.
#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>

#include "engine/certified_head.h"

namespace infemeral {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Raises `shared` to `value`, unless it is there already.
template <typename Float>
void raise(std::atomic<Float>& shared, Float value) {
  Float now = shared.load(std::memory_order_relaxed);
  while (now < value && !shared.compare_exchange_weak(now, value, std::memory_order_relaxed)) {
  }
}

// A histogram of scores near the largest, in bins of 1/8 on one grid for all workers.
constexpr std::int32_t kBinsPerNat = 8;
constexpr std::int32_t kBins = 256;  // 32 nats: exp(-28) is no unit of probability_mass

// Its bin's place on the grid. Free of branches, so that the compiler takes several at once.
inline std::int32_t bin_key(float score) {
  constexpr float kFar = 0x1p26f;  // beyond it all scores share a bin, which is valid
  const float near = score < kFar ? score : kFar;
  const float scaled = (near > -kFar ? near : -kFar) * static_cast<float>(kBinsPerNat);
  const auto whole = static_cast<std::int32_t>(scaled);
  return whole - (scaled < static_cast<float>(whole) ? 1 : 0);
}

struct Bin {
  std::uint32_t count = 0;
  float ceiling = -kInfinity;  // the largest score

  void add(const Bin& other) {
    count += other.count;
    ceiling = std::max(ceiling, other.ceiling);
  }
};

class Histogram {
 public:
  void clear() { *this = Histogram(); }

  // At most CertifiedSampler::kBlock scores, none above `largest`.
  void add(std::span<const float> scores, float largest) {
    if (bin_key(largest) > top_) advance(bin_key(largest));
    std::array<std::int32_t, CertifiedSampler::kBlock> keys;
    for (std::size_t i = 0; i < scores.size(); ++i) keys[i] = bin_key(scores[i]);
    for (std::size_t i = 0; i < scores.size(); ++i) {
      Bin& bin = keys[i] > top_ - kBins ? ring_[slot(keys[i])] : deep_;
      ++bin.count;
      bin.ceiling = std::max(bin.ceiling, scores[i]);
    }
  }

  std::int32_t top() const { return top_; }  // the largest key

  // The bins by their depth below `top`, which is not below this one's; the last takes the rest.
  void add_to(std::array<Bin, kBins + 1>& bins, std::int32_t top) const {
    if (top_ == kNone) return;
    for (std::int32_t key = top_; key > top_ - kBins; --key) {
      bins[static_cast<std::size_t>(std::min(top - key, kBins))].add(ring_[slot(key)]);
    }
    bins[kBins].add(deep_);
  }

 private:
  static constexpr std::int32_t kNone = -(1 << 30);  // below every key

  static std::size_t slot(std::int32_t key) { return static_cast<std::uint32_t>(key) % kBins; }
  void advance(std::int32_t key) {
    for (std::int32_t k = std::max(top_, key - kBins) + 1; k <= key; ++k) {
      deep_.add(ring_[slot(k)]);
      ring_[slot(k)] = {};
    }
    top_ = key;
  }

  std::int32_t top_ = kNone;
  std::array<Bin, kBins> ring_;  // the keys (top_ - kBins, top_]
  Bin deep_;                     // all below
};

}  // namespace

struct CertifiedSampler::State {
  enum class Policy {
    kRefuse,   // scores might leave float32
    kMaximum,  // greedy, or min-p alone
    kTopK,
    kGumbel,  // temperature alone
    kNucleus  // top-p over the whole vocabulary
  };

  struct Seen {
    double upper;  // with the token's noise under kGumbel
    std::int32_t id;
  };
  // Two cache lines apart: the processor fetches them in pairs.
  struct alignas(128) Worker {
    std::vector<Seen> seen;      // all that can be candidates, as far as this worker knows
    std::vector<float> largest;  // kTopK: a heap of the k largest lower ends, the least on top
    Histogram histogram;         // kNucleus
  };

  SampleRequest request;
  std::size_t vocab_size = 0;
  Policy policy = Policy::kRefuse;
  Scorer scorer;
  std::vector<Worker> workers;
  std::atomic<float> top;            // the largest lower end
  std::atomic<double> floor;         // no token whose Seen::upper is below it is a candidate
  std::vector<float> upper_of;       // kNucleus: of every token
  std::vector<float> block_ceiling;  // kNucleus: the largest of every block
  std::vector<Candidate> candidates;

  std::size_t k() const { return static_cast<std::size_t>(request.params.top_k); }

  Policy choose_policy() const;
  void observe_maximum(Worker& worker, std::size_t first, std::span<const float> lower,
                       std::span<const float> upper);
  void observe_top_k(Worker& worker, std::size_t first, std::span<const float> lower,
                     std::span<const float> upper);
  void observe_gumbel(Worker& worker, std::size_t first, std::span<const float> lower,
                      std::span<const float> upper);
  void observe_nucleus(Worker& worker, std::size_t first, std::span<const float> lower,
                       std::span<const float> upper);
  float kth_largest();
  bool rescore_from(std::size_t first, const Rescore& rescore, HeadCounters& counters);
  std::optional<std::int32_t> finish_nucleus(const Rescore& rescore, HeadCounters& counters);
};

CertifiedSampler::CertifiedSampler() : state_(std::make_unique<State>()) {}
CertifiedSampler::~CertifiedSampler() = default;
CertifiedSampler::CertifiedSampler(CertifiedSampler&&) noexcept = default;
CertifiedSampler& CertifiedSampler::operator=(CertifiedSampler&&) noexcept = default;

CertifiedSampler::State::Policy CertifiedSampler::State::choose_policy() const {
  const SamplingParams& params = request.params;
  // Scores stay finite: logits are below 2^100.
  if (!params.greedy() && params.temperature < 1e-4f) return Policy::kRefuse;
  if (params.repetition_penalty < 1e-3f) return Policy::kRefuse;
  if (params.greedy()) return Policy::kMaximum;
  if (params.top_k > 0 && k() < vocab_size) return Policy::kTopK;
  if (params.top_p < 1) return Policy::kNucleus;
  return params.min_p > 0 ? Policy::kMaximum : Policy::kGumbel;
}

void CertifiedSampler::start(const SampleRequest& request, std::size_t vocab_size,
                             std::size_t workers) {
  State& s = *state_;
  s.request = request;
  s.vocab_size = vocab_size;
  s.policy = s.choose_policy();
  if (s.policy == State::Policy::kRefuse) return;
  s.scorer.start(request, vocab_size);
  s.top = -kInfinity;
  s.floor = -kInfinity;
  if (s.workers.size() < workers) s.workers.resize(workers);
  for (State::Worker& worker : s.workers) {
    worker.seen.clear();
    worker.largest.clear();
    if (s.policy == State::Policy::kNucleus) worker.histogram.clear();
  }
  if (s.policy == State::Policy::kNucleus) {
    s.upper_of.resize(vocab_size);
    s.block_ceiling.resize((vocab_size + kBlock - 1) / kBlock);
  }
}

void CertifiedSampler::observe(std::size_t worker, std::size_t first, std::span<float> lower,
                               std::span<float> upper) {
  State& s = *state_;
  if (s.policy == State::Policy::kRefuse) return;
  s.scorer.score(lower, first);
  s.scorer.score(upper, first);
  switch (s.policy) {
    case State::Policy::kRefuse:
      break;
    case State::Policy::kMaximum:
      return s.observe_maximum(s.workers[worker], first, lower, upper);
    case State::Policy::kTopK:
      return s.observe_top_k(s.workers[worker], first, lower, upper);
    case State::Policy::kGumbel:
      return s.observe_gumbel(s.workers[worker], first, lower, upper);
    case State::Policy::kNucleus:
      return s.observe_nucleus(s.workers[worker], first, lower, upper);
  }
}

void CertifiedSampler::State::observe_maximum(Worker& worker, std::size_t first,
                                              std::span<const float> lower,
                                              std::span<const float> upper) {
  const float block_top = largest_of(lower);
  if (block_top > top.load(std::memory_order_relaxed)) {
    raise(top, block_top);
    const float least =
        request.params.greedy() ? block_top : min_p_floor(block_top, request.params.min_p);
    raise<double>(floor, least);
  }
  const double least = floor.load(std::memory_order_relaxed);
  if (largest_of(upper) < least) return;
  for (std::size_t i = 0; i < upper.size(); ++i) {
    if (upper[i] >= least) worker.seen.push_back({upper[i], static_cast<std::int32_t>(first + i)});
  }
}

// The k-th largest lower end that one worker has seen is not above the k-th largest of all.
void CertifiedSampler::State::observe_top_k(Worker& worker, std::size_t first,
                                            std::span<const float> lower,
                                            std::span<const float> upper) {
  std::vector<float>& heap = worker.largest;
  const float block_top = largest_of(lower);
  raise(top, block_top);
  if (heap.size() < k() || block_top > heap.front()) {
    for (float end : lower) {
      if (heap.size() == k()) {
        if (end <= heap.front()) continue;
        std::pop_heap(heap.begin(), heap.end(), std::greater<>());
        heap.back() = end;
      } else {
        heap.push_back(end);
      }
      std::push_heap(heap.begin(), heap.end(), std::greater<>());
    }
    if (heap.size() == k()) raise<double>(floor, heap.front());
  }
  const double least = floor.load(std::memory_order_relaxed);
  if (largest_of(upper) < least) return;
  for (std::size_t i = 0; i < upper.size(); ++i) {
    if (upper[i] >= least) worker.seen.push_back({upper[i], static_cast<std::int32_t>(first + i)});
  }
}

// Every token that can win the draw without filters.
void CertifiedSampler::State::observe_gumbel(Worker& worker, std::size_t first,
                                             std::span<const float> lower,
                                             std::span<const float> upper) {
  double best = floor.load(std::memory_order_relaxed);
  std::uint64_t bits =
      noise_above(request.params.seed, request.position, static_cast<std::uint32_t>(first),
                  upper.size(), noise_needed(best, largest_of(upper)));
  for (; bits != 0; bits &= bits - 1) {
    const auto i = static_cast<std::size_t>(std::countr_zero(bits));
    const auto id = static_cast<std::uint32_t>(first + i);
    const double noise = gumbel_noise(request.params.seed, request.position, id);
    if (upper[i] + noise < best) continue;
    best = std::max(best, lower[i] + noise);
    worker.seen.push_back({upper[i] + noise, static_cast<std::int32_t>(id)});
  }
  raise(floor, best);
}

void CertifiedSampler::State::observe_nucleus(Worker& worker, std::size_t first,
                                              std::span<const float> lower,
                                              std::span<const float> upper) {
  raise(top, largest_of(lower));
  const float ceiling = largest_of(upper);
  block_ceiling[first / kBlock] = ceiling;
  std::copy(upper.begin(), upper.end(), upper_of.begin() + static_cast<std::ptrdiff_t>(first));
  worker.histogram.add(upper, ceiling);
}

// The full head's scores for the candidates from index `first` on; false when they are too many.
bool CertifiedSampler::State::rescore_from(std::size_t first, const Rescore& rescore,
                                           HeadCounters& counters) {
  // Beyond this many single rows the full head is cheaper.
  if (candidates.size() > std::max<std::size_t>(256, vocab_size / 4)) return false;
  const std::span<Candidate> fresh = std::span(candidates).subspan(first);
  rescore(fresh);
  counters.rows_rescored += fresh.size();
  for (Candidate& c : fresh) c.score = scorer.score(c.score, c.id);
  return true;
}

float CertifiedSampler::State::kth_largest() {
  std::vector<float>& all = workers.front().largest;
  for (std::size_t w = 1; w < workers.size(); ++w) {
    all.insert(all.end(), workers[w].largest.begin(), workers[w].largest.end());
  }
  const auto kth = all.begin() + static_cast<std::ptrdiff_t>(k() - 1);
  std::nth_element(all.begin(), kth, all.end(), std::greater<>());
  return *kth;
}

// top-p over the whole vocabulary: a band of the likeliest tokens is rescored, the mass of the rest
// is bounded from above, bin by bin. The band grows until that mass does not matter to the token.
std::optional<std::int32_t> CertifiedSampler::State::finish_nucleus(const Rescore& rescore,
                                                                    HeadCounters& counters) {
  std::int32_t top_key = workers.front().histogram.top();
  for (const Worker& worker : workers) top_key = std::max(top_key, worker.histogram.top());
  std::array<Bin, kBins + 1> bins;  // of the upper ends, by the depth below top_key
  for (const Worker& worker : workers) worker.histogram.add_to(bins, top_key);
  const auto depth_of = [&](float score) {
    return static_cast<std::size_t>(std::min(top_key - bin_key(score), kBins));
  };
  // Masses in units of exp(top), at most.
  const double likeliest = top;
  std::array<double, kBins + 1> masses;
  for (std::size_t b = 0; b < bins.size(); ++b) {
    masses[b] = bins[b].count == 0 ? 0 : bins[b].count * std::exp(bins[b].ceiling - likeliest);
  }
  const double total = std::accumulate(masses.begin(), masses.end(), 0.0);

  candidates.clear();
  std::size_t edge = 0;  // bins below it are the band
  // Most tokens are clear with 1/128 of the mass unknown. A wider band costs rows, which even in
  // hundreds are cheap beside a pass of the full head.
  for (double share : {0x1p-7, 0x1p-10, 0x1p-14, 0x1p-18}) {
    std::size_t wider = bins.size();
    double mass = 0;
    const std::size_t least = depth_of(static_cast<float>(likeliest)) + 1;
    while (wider > least) {
      mass += masses[wider - 1];
      if (mass > share * total) break;
      --wider;
    }
    if (wider <= edge) continue;
    if (edge > 0) ++counters.widenings;
    const std::size_t known = candidates.size();
    for (std::size_t block = 0; block < block_ceiling.size(); ++block) {
      if (depth_of(block_ceiling[block]) >= wider) continue;
      const std::size_t end = std::min(vocab_size, (block + 1) * kBlock);
      for (std::size_t i = block * kBlock; i < end; ++i) {
        const std::size_t depth = depth_of(upper_of[i]);
        if (depth >= edge && depth < wider) candidates.push_back({0, static_cast<std::int32_t>(i)});
      }
    }
    edge = wider;
    if (!rescore_from(known, rescore, counters)) return std::nullopt;

    float max = -kInfinity;
    for (const Candidate& c : candidates) max = std::max(max, c.score);
    Rest rest;
    for (std::size_t b = edge; b < bins.size(); ++b) {
      if (bins[b].count == 0) continue;
      rest.ceiling = std::max(rest.ceiling, bins[b].ceiling);
      // One unit a token: the library's exp is not known to be monotone to the last bit.
      rest.mass += bins[b].count * (probability_mass(bins[b].ceiling, max) + 1);
    }
    if (const auto token = choose(candidates, request, rest)) return token;
  }
  return std::nullopt;
}

std::optional<std::int32_t> CertifiedSampler::finish(const Rescore& rescore,
                                                     HeadCounters& counters) {
  State& s = *state_;
  if (s.policy == State::Policy::kRefuse) return std::nullopt;
  if (s.policy == State::Policy::kNucleus) return s.finish_nucleus(rescore, counters);
  double least = s.floor;
  if (s.policy == State::Policy::kTopK) {
    least = s.kth_largest();
    // With top-p the tokens below min-p's floor still count in the normaliser.
    if (s.request.params.top_p == 1) {
      least = std::max<double>(least, min_p_floor(s.top, s.request.params.min_p));
    }
  }
  s.candidates.clear();
  for (const State::Worker& worker : s.workers) {
    for (const State::Seen& seen : worker.seen) {
      if (seen.upper >= least) s.candidates.push_back({0, seen.id});
    }
  }
  if (!s.rescore_from(0, rescore, counters)) return std::nullopt;
  return choose(s.candidates, s.request, {});
}

}  // namespace infemeral
