#include "kernels/sample.h"

#include <curand_kernel.h>

#include "kernels/common.cuh"
#include "kernels/dot.cuh"
#include "kernels/filters.cuh"
#include "kernels/launch.cuh"
#include "kernels/score.cuh"

namespace infemeral::cuda {
namespace {

constexpr int kScanThreads = 512;
constexpr int kSelectThreads = 256;
constexpr int kSliceCandidates = 1024;  // that one block of select can take
constexpr int kChooseThreads = 512;
constexpr int kChooseFullThreads = 1024;

// --- noise ---

// The 32 random bits of a token: cuRAND's Philox, with the counters of engine/sampling.h.
__device__ std::uint32_t random_bits(const RowRequest& request, int token) {
  const auto block = static_cast<unsigned>(token) / 4;
  const uint4 words = curand_Philox4x32_10(
      make_uint4(block, 0, static_cast<unsigned>(request.position),
                 static_cast<unsigned>(request.position >> 32)),
      make_uint2(static_cast<unsigned>(request.seed), static_cast<unsigned>(request.seed >> 32)));
  switch (token % 4) {
    case 0:
      return words.x;
    case 1:
      return words.y;
    case 2:
      return words.z;
    default:
      return words.w;
  }
}

__device__ double gumbel_noise(const RowRequest& request, int token) {
  const double uniform = (random_bits(request, token) + 0.5) * 0x1p-32;  // never 0 or 1
  return -log(-log(uniform));
}

// The same in float32, for telling who cannot win: within kNoiseError of it. Near 1 the logarithm
// is taken of the distance to 1, which float32 can hold.
constexpr float kNoiseError = 1e-3f;
constexpr float kMostNoise = 23;  // -ln(-ln(1 - 2^-33)) is 22.87; the least is -3.14
__device__ float gumbel_noise_near(const RowRequest& request, int token) {
  const std::uint32_t bits = random_bits(request, token);
  const float log_uniform = bits >> 31 ? log1pf(-(static_cast<float>(~bits) + 0.5f) * 0x1p-32f)
                                       : logf((static_cast<float>(bits) + 0.5f) * 0x1p-32f);
  return -logf(-log_uniform);
}

// --- scan ---

__device__ int bin_of(float top, float score) {
  const float depth = fmaxf(0.0f, (top - score) * kBinsPerNat);
  return depth < kBins - 1 ? static_cast<int>(depth) : kBins - 1;
}

__global__ void __launch_bounds__(kScanThreads) scan_kernel(Sample p) {
  let_next_start();
  wait_for_previous();
  RowState& state = p.rows[blockIdx.y];
  if (blockIdx.x == 0 && threadIdx.x == 0) state.times.sample = global_ns();
  if (!state.covered) return;
  const std::size_t base = blockIdx.y * score_stride(p.vocab_size);
  const float *lower = p.lower + base, *upper = p.upper + base;
  const int first = blockIdx.x * blockDim.x + threadIdx.x, step = gridDim.x * blockDim.x;
  const RowRequest& request = state.request;

  if (request.selection == Selection::kUnlimited) {
    // The likeliest token has at least top - 3.2 with its noise.
    const float reachable = from_ordered(state.top) - 3.2f - kMostNoise;
    float best = -HUGE_VALF;
    for (int i = first; i < p.vocab_size; i += step) {
      const float low = lower[i];
      if (low >= reachable) best = fmaxf(best, low + gumbel_noise_near(request, i));
    }
    best = block_reduce(best, -HUGE_VALF, Max());
    if (threadIdx.x == 0) atomicMax(&state.best_noisy, ordered(best));
    return;
  }
  if (request.selection != Selection::kTopK && request.selection != Selection::kNucleus) return;

  __shared__ Bin bins[kBins];
  for (int b = threadIdx.x; b < kBins; b += blockDim.x) bins[b] = {};
  __syncthreads();
  const float top = from_ordered(state.top);
  constexpr int kAhead = 4;
  for (int base_id = first; base_id < p.vocab_size; base_id += kAhead * step) {
    float high[kAhead], low[kAhead];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      const int i = base_id + a * step;
      high[a] = i < p.vocab_size ? upper[i] : -HUGE_VALF;
      low[a] = i < p.vocab_size ? lower[i] : -HUGE_VALF;
    }
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      // The last bin is left empty: nobody asks about it.
      const int high_bin = bin_of(top, high[a]);
      if (high_bin == kBins - 1) continue;  // then so is the lower end's
      atomicAdd(&bins[high_bin].upper_ends, 1u);
      atomicMax(&bins[high_bin].ceiling, ordered(high[a]));
      const int low_bin = bin_of(top, low[a]);
      if (low_bin < kBins - 1) atomicAdd(&bins[low_bin].lower_ends, 1u);
    }
  }
  __syncthreads();
  for (int b = threadIdx.x; b < kBins; b += blockDim.x) {
    if (bins[b].upper_ends > 0) {
      atomicAdd(&state.bins[b].upper_ends, bins[b].upper_ends);
      atomicMax(&state.bins[b].ceiling, bins[b].ceiling);
    }
    if (bins[b].lower_ends > 0) atomicAdd(&state.bins[b].lower_ends, bins[b].lower_ends);
  }
}

// --- results ---

__device__ int candidate_limit(int vocab_size) {
  return min(kMaxCandidates, max(256, vocab_size / 4));
}

// The row's result to the host; by one thread.
__device__ void finish(const Sample& p, int row, int token, Outcome outcome) {
  const RowState& state = p.rows[row];
  p.tokens[row] = token;
  RowResult& result = p.results[row];
  result.token = token;
  result.outcome = outcome;
  result.rows_rescored = outcome == Outcome::kToken ? state.candidates : 0;
  result.times = state.times;
  result.times.end = global_ns();
  __threadfence_system();
  *static_cast<volatile std::uint32_t*>(&result.sequence) = state.request.sequence;
}

// --- select ---

// Bins below the edge hold every token that top-k can keep: an interval that begins in one of them
// is above all that end beyond, and k of them do. When fewer than k begin within reach, tokens out
// of reach cannot win the draw anyway, and have no probability.
__device__ int top_k_edge(const RowState& state, std::uint32_t* counts) {
  for (int b = threadIdx.x; b < kSummed; b += blockDim.x) {
    counts[b] = b < kBins ? state.bins[b].lower_ends : 0;
  }
  __shared__ int edge;
  if (threadIdx.x == 0) edge = kBins - 1;
  __syncthreads();
  running_sums(counts);
  const auto k = static_cast<std::uint32_t>(state.request.top_k);
  for (int b = threadIdx.x; b < kBins - 1; b += blockDim.x) {
    if (counts[b] >= k && (b == 0 || counts[b - 1] < k)) edge = b + 1;
  }
  __syncthreads();
  return edge;
}

// The band of the nucleus: as deep as leaves the least probability beyond it, at a price that pays.
// 0 when none does. Only an estimate: choose bounds what lies beyond rigorously.
__device__ int nucleus_edge(const RowState& state, int limit, float* mass, float* least,
                            std::uint32_t* counts) {
  const float top = from_ordered(state.top);
  for (int b = threadIdx.x; b < kSummed; b += blockDim.x) {
    counts[b] = 0;
    mass[b] = least[b] = 0;
    if (b >= kBins) continue;
    counts[b] = state.bins[b].upper_ends;
    least[b] = state.bins[b].lower_ends * expf(-static_cast<float>(b + 1) / kBinsPerNat);
    // From the deep end, so that a running sum is what lies beyond a bin.
    const Bin& deep = state.bins[kBins - 1 - b];
    if (deep.upper_ends > 0) {
      mass[b] = deep.upper_ends * expf(from_ordered(deep.ceiling) - top);
    }
  }
  __shared__ int edge;
  if (threadIdx.x == 0) edge = 0;
  __syncthreads();
  running_sums(counts);
  running_sums(mass);
  running_sums(least);
  // Where the nucleus ends by what is certain: the token there has about this probability. What
  // lies beyond the band moves the cut when it is not small beside that.
  __shared__ float at_cut;
  if (threadIdx.x == 0) at_cut = 0;
  __syncthreads();
  const float enough = state.request.top_p * least[kBins - 1];
  for (int b = threadIdx.x; b < kBins; b += blockDim.x) {
    if (least[b] >= enough && (b == 0 || least[b - 1] < enough)) {
      at_cut = expf(-static_cast<float>(b + 1) / kBinsPerNat);
    }
  }
  __syncthreads();
  for (float share = at_cut / 16; share <= at_cut; share *= 4) {
    // The least e in [1, kBins - 1] with no more than the share in bins e and beyond.
    for (int e = 1 + threadIdx.x; e < kBins; e += blockDim.x) {
      const float beyond = mass[kBins - 1 - e], with_one_more = mass[kBins - e];
      const bool first = beyond <= share && (e == 1 || with_one_more > share);
      if (first && counts[e - 1] <= static_cast<std::uint32_t>(limit)) edge = e;
    }
    __syncthreads();
    const bool done = edge > 0;
    __syncthreads();  // the next share may write it
    if (done) break;
  }
  return edge;
}

// Greedy rows need no more than the best candidate: the last block of the row to arrive here hands
// it to the host.
__device__ void finish_greedy(const Sample& p, RowState& state) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x != 0) return;
  if (atomicAdd(&state.blocks_done, 1u) + 1 != gridDim.x) return;
  __threadfence();
  const auto candidates = *static_cast<volatile std::uint32_t*>(&state.candidates);
  const auto best = *static_cast<volatile unsigned long long*>(&state.best);
  if (!state.finite) {
    finish(p, blockIdx.y, 0, Outcome::kNotFinite);
  } else if (!state.covered || candidates == 0 ||
             candidates > static_cast<std::uint32_t>(candidate_limit(p.vocab_size))) {
    finish(p, blockIdx.y, 0, Outcome::kUncertain);
  } else {
    finish(p, blockIdx.y, static_cast<int>(~static_cast<std::uint32_t>(best)), Outcome::kToken);
  }
}

// A block takes a slice of the vocabulary of one row.
// At most 64 KB of registers: one block finds room beside the product's.
__global__ void __launch_bounds__(kSelectThreads, 2) select_kernel(Sample p) {
  extern __shared__ float4 shared_state[];
  __shared__ std::uint32_t counts[kSummed];
  __shared__ float mass[kSummed], least[kSummed];
  __shared__ int found, base;
  __shared__ std::int32_t ids[kSliceCandidates];
  __shared__ float logits[kSliceCandidates];
  let_next_start();
  wait_for_previous();
  RowState& state = p.rows[blockIdx.y];
  const float* upper = p.upper + blockIdx.y * score_stride(p.vocab_size);
  const int slice = ((p.vocab_size + gridDim.x - 1) / gridDim.x + 3) / 4 * 4;
  const int begin = blockIdx.x * slice, end = min(p.vocab_size, begin + slice);
  constexpr int kAhead = 4;
  constexpr int kStep = 4 * kSelectThreads;
  float4 high[kAhead];
  const auto load_upper = [&](int first) {
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      const int i = first + a * kStep;
      if (i < end) high[a] = *reinterpret_cast<const float4*>(upper + i);
    }
  };
  // All that is needed at once, whether or not it will be used.
  load_upper(begin + 4 * threadIdx.x);
  load_states(p.states + static_cast<std::size_t>(blockIdx.y) * p.stride, 1, p.stride,
              shared_state);
  const bool leads = blockIdx.x == 0 && threadIdx.x == 0;
  if (leads && state.times.sample == 0) state.times.sample = global_ns();
  const RowRequest request = state.request;
  const bool greedy = request.selection == Selection::kGreedy;
  if (!state.covered) {
    if (greedy) finish_greedy(p, state);
    return;
  }
  const float top = from_ordered(state.top);
  if (threadIdx.x == 0) found = 0;

  float threshold = -HUGE_VALF;
  int edge = kBins;
  switch (request.selection) {
    case Selection::kGreedy:
      threshold = top;
      break;
    case Selection::kMinP:
      threshold = top + logf(request.min_p);
      break;
    case Selection::kTopK:
      edge = top_k_edge(state, counts);
      // With top-p the tokens below min-p's floor still count in the normaliser.
      if (request.top_p >= 1 && request.min_p > 0) threshold = top + logf(request.min_p);
      break;
    case Selection::kNucleus:
      edge = nucleus_edge(state, candidate_limit(p.vocab_size), mass, least, counts);
      break;
    case Selection::kUnlimited:
      threshold = from_ordered(state.best_noisy);
      // Two logarithms, and the roundings of two sums.
      threshold -= 2 * kNoiseError + fabsf(threshold) * 0x1p-22f;
      break;
  }
  if (leads) state.edge = edge;

  __syncthreads();
  const auto look = [&](int i, float score) {
    if (request.selection == Selection::kUnlimited && score + kMostNoise >= threshold) {
      score += gumbel_noise_near(request, i);
    }
    if (i < end && score >= threshold && (edge == kBins || bin_of(top, score) < edge)) {
      const int c = atomicAdd(&found, 1);
      if (c < kSliceCandidates) ids[c] = i;
    }
  };
  for (int first = begin + 4 * threadIdx.x; first < end;) {
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      const int i = first + a * kStep;
      if (i >= end) break;
      look(i, high[a].x);
      look(i + 1, high[a].y);
      look(i + 2, high[a].z);
      look(i + 3, high[a].w);
    }
    first += kAhead * kStep;
    load_upper(first);
  }
  __syncthreads();
  if (found == 0) {
    if (greedy) finish_greedy(p, state);
    return;
  }
  if (threadIdx.x == 0) {
    // Too many for this block are too many for the row: choose will see it.
    const int claimed = found <= kSliceCandidates ? found : 2 * kMaxCandidates;
    base = static_cast<int>(atomicAdd(&state.candidates, static_cast<unsigned>(claimed)));
  }
  if (found > kSliceCandidates) {
    if (greedy) finish_greedy(p, state);
    return;
  }
  for (int c = threadIdx.x / kWarp; c < found; c += kSelectThreads / kWarp) {
    const __half* const row[1] = {p.lm_head + static_cast<std::size_t>(ids[c]) * p.stride};
    float sum[1][1];
    dot_rows<1, 1, 16>(row, shared_state, p.stride, sum);
    if (threadIdx.x % kWarp == 0) logits[c] = sum[0][0];
  }
  __syncthreads();
  const Scorer score(request, p.seen + static_cast<std::size_t>(blockIdx.y) * p.seen_words);
  ScoredToken* out = p.candidates + static_cast<std::size_t>(blockIdx.y) * kMaxCandidates;
  for (int c = threadIdx.x; c < found && base + c < kMaxCandidates; c += kSelectThreads) {
    const float value = score(logits[c], ids[c]);
    if (greedy) {
      atomicMax(&state.best, static_cast<unsigned long long>(ordered(value)) << 32 |
                                 ~static_cast<std::uint32_t>(ids[c]));
    } else {
      out[base + c] = {value, ids[c]};
    }
  }
  if (greedy) finish_greedy(p, state);
}

// --- choose ---

// What is known about the tokens that are not among the candidates (engine/sampling.h's Rest).
struct Rest {
  float ceiling = -HUGE_VALF;
  unsigned long long mass = 0;
};

__device__ Rest rest_beyond(const RowState& state, float max) {
  Rest rest;
  for (int b = static_cast<int>(state.edge) + threadIdx.x; b < kBins - 1; b += blockDim.x) {
    const Bin& bin = state.bins[b];
    if (bin.upper_ends == 0) continue;
    const float ceiling = from_ordered(bin.ceiling);
    rest.ceiling = fmaxf(rest.ceiling, ceiling);
    // One unit a token: exp is not known to be monotone to the last bit.
    rest.mass += bin.upper_ends * (probability_mass(ceiling, max) + 1);
  }
  rest.ceiling = block_reduce(rest.ceiling, -HUGE_VALF, Max());
  rest.mass = block_reduce(rest.mass, 0ull, Sum());
  return rest;
}

// The larger score; of equals the lower id.
struct Choice {
  double score;
  int id;
};
__device__ bool better(const Choice& a, const Choice& b) {
  if (b.id < 0) return a.id >= 0;
  return a.id >= 0 && (a.score > b.score || (a.score == b.score && a.id < b.id));
}
__device__ Choice best_in_block(Choice choice) {
  __shared__ Choice partial[kWarp];
  const auto warp_best = [](Choice c) {
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      const Choice other = {__shfl_xor_sync(0xffffffffu, c.score, offset),
                            __shfl_xor_sync(0xffffffffu, c.id, offset)};
      if (better(other, c)) c = other;
    }
    return c;
  };
  choice = warp_best(choice);
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = choice;
  __syncthreads();
  const int lane = threadIdx.x % kWarp;
  const int warps = blockDim.x / kWarp;
  return warp_best(lane < warps ? partial[lane] : Choice{0, -1});
}

// The token, or -1 when the rest could change it. Called by the whole block.
template <typename Items>
__device__ int choose_from(Items items, const RowState& state, bool with_rest) {
  const RowRequest& request = state.request;
  const bool greedy = request.selection == Selection::kGreedy;
  float max = -HUGE_VALF;
  for (int i = threadIdx.x; i < items.n; i += blockDim.x) max = fmaxf(max, items.score(i));
  max = block_reduce(max, -HUGE_VALF, Max());

  float floor = -HUGE_VALF;
  const bool filters = request.top_k > 0 || request.top_p < 1;
  if (!greedy && isfinite(max)) {
    if (filters) items.know_max(max);
    const Filtered kept = !filters                            ? Filtered{}
                          : items.n <= static_cast<int>(kFew) ? filter_few(items, request)
                                                              : filter_many(items, request, max);
    if (with_rest && request.top_p < 1) {
      const Rest rest = rest_beyond(state, max);
      const double enough = request.top_p * static_cast<double>(kept.total + rest.mass);
      if (kept.floor <= rest.ceiling || static_cast<double>(kept.inside) < enough) return -1;
    }
    floor = fmaxf(kept.floor, max + logf(request.min_p));  // ln 0 is minus infinity
  }

  Choice best = {0, -1};
  for (int i = threadIdx.x; i < items.n; i += blockDim.x) {
    const float score = items.score(i);
    if (isnan(score) || score < floor || (greedy && score < max)) continue;
    const int id = items.id(i);
    Choice own = {score, id};
    if (!greedy && isfinite(max)) own.score += gumbel_noise(request, id);
    if (better(own, best)) best = own;
  }
  const int token = best_in_block(best).id;
  return token < 0 ? 0 : token;  // nothing but NaN: as the CPU, the first
}

// One block a row.
__global__ void __launch_bounds__(kChooseThreads) choose_kernel(Sample p) {
  extern __shared__ unsigned long long masses[];
  float* scores = reinterpret_cast<float*>(masses + Candidates::kCached);
  let_next_start();
  wait_for_previous();
  const RowState& state = p.rows[blockIdx.x];
  if (state.request.selection == Selection::kGreedy) return;  // select has done it
  const int n = static_cast<int>(state.candidates);
  int token = -1;
  if (state.finite && state.covered && n > 0 && n <= candidate_limit(p.vocab_size)) {
    const ScoredToken* own = p.candidates + static_cast<std::size_t>(blockIdx.x) * kMaxCandidates;
    for (int i = threadIdx.x; i < min(n, Candidates::kCached); i += blockDim.x) {
      scores[i] = own[i].score;
    }
    __syncthreads();
    const Candidates items = {own, n, scores, masses, 0};
    token = choose_from(items, state, state.request.selection == Selection::kNucleus);
  }
  if (threadIdx.x != 0) return;
  const Outcome outcome = !state.finite ? Outcome::kNotFinite
                          : token < 0   ? Outcome::kUncertain
                                        : Outcome::kToken;
  finish(p, blockIdx.x, token < 0 ? 0 : token, outcome);
}

__global__ void __launch_bounds__(kChooseFullThreads) choose_full_kernel(Sample p) {
  let_next_start();
  wait_for_previous();
  RowState& state = p.rows[blockIdx.x];
  if (threadIdx.x == 0 && state.times.sample == 0) state.times.sample = global_ns();
  float* scores = p.upper + blockIdx.x * score_stride(p.vocab_size);
  const Scorer score(state.request, p.seen + static_cast<std::size_t>(blockIdx.x) * p.seen_words);
  for (int i = threadIdx.x; i < p.vocab_size; i += blockDim.x) scores[i] = score(scores[i], i);
  __syncthreads();
  const int token = choose_from(Everything{scores, p.vocab_size, 0}, state, false);
  if (threadIdx.x != 0) return;
  const bool proven = state.covered || !p.need_proof;
  finish(p, blockIdx.x, token,
         !state.finite ? Outcome::kNotFinite
         : proven      ? Outcome::kToken
                       : Outcome::kUncertain);
}

// Blocks for each of n rows: enough together to fill the device.
int slices(const Stage& stage, int n, int per_multiprocessor) {
  const int wanted = per_multiprocessor * stage.multiprocessors;
  return wanted > n ? wanted / n : 1;
}

}  // namespace

cudaError_t scan(const Stage& stage, const Sample& args) {
  // Every block adds its bins to the row's: not more blocks than have something to count.
  const int useful = (args.vocab_size + 2 * kScanThreads - 1) / (2 * kScanThreads);
  const int most = slices(stage, args.n, 2);
  return launch(stage, {dim3(useful < most ? useful : most, args.n), dim3(kScanThreads)},
                scan_kernel, args);
}

cudaError_t select(const Stage& stage, const Sample& args) {
  const auto shared_bytes = sizeof(float) * args.stride;
  if (shared_bytes > 32 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(
        select_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  return launch(
      stage,
      {dim3(slices(stage, args.n, args.n > 4 ? 2 : 1), args.n), dim3(kSelectThreads), shared_bytes},
      select_kernel, args);
}

cudaError_t choose(const Stage& stage, const Sample& args) {
  constexpr std::size_t kSharedBytes =
      Candidates::kCached * (sizeof(unsigned long long) + sizeof(float));
  static_assert(kSharedBytes <= 32 << 10);  // beside 25 KB of the filters, in a block of 64
  const cudaError_t error = cudaFuncSetAttribute(
      choose_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(kSharedBytes));
  if (error != cudaSuccess) return error;
  return launch(stage, {dim3(args.n), dim3(kChooseThreads), kSharedBytes}, choose_kernel, args);
}

cudaError_t choose_full(const Stage& stage, const Sample& args) {
  return launch(stage, {dim3(args.n), dim3(kChooseFullThreads)}, choose_full_kernel, args);
}

}  // namespace infemeral::cuda
