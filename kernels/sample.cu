#include "kernels/sample.h"

#include <algorithm>
#include <cstddef>

#include "kernels/choose.cuh"
#include "kernels/common.cuh"
#include "kernels/dot.cuh"
#include "kernels/filters.cuh"
#include "kernels/gumbel.cuh"
#include "kernels/launch.cuh"
#include "kernels/score.cuh"

namespace infemeral::cuda {
namespace {

constexpr int kScoreThreads = 256;
constexpr int kScanThreads = 512;
constexpr int kSelectThreads = 256;
constexpr int kBlockCandidates = 1024;  // that one block of select can take
constexpr int kChooseThreads = 512;
constexpr int kChooseFullThreads = 1024;

// --- score ---

__global__ void __launch_bounds__(kScoreThreads) score_kernel(Sample p) {
  let_next_start();
  wait_for_previous();
  RowState& state = p.rows[blockIdx.y];
  if (blockIdx.x == 0 && threadIdx.x == 0) state.times.sample = global_ns();
  float* scores = p.upper + blockIdx.y * score_stride(p.vocab_size);
  const Scorer score(state.request, p.seen + static_cast<std::size_t>(blockIdx.y) * p.seen_words);
  float top = -HUGE_VALF;
  const auto score_one = [&](float& value, int i) {
    if (i >= p.vocab_size) return;
    value = score(value, i);
    top = isfinite(value) ? fmaxf(top, value) : HUGE_VALF;  // infinite from then on
  };
  const int step = 4 * static_cast<int>(gridDim.x * blockDim.x);
  for (int i = 4 * static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); i < p.vocab_size;
       i += step) {
    float4 four = *reinterpret_cast<const float4*>(scores + i);
    score_one(four.x, i);
    score_one(four.y, i + 1);
    score_one(four.z, i + 2);
    score_one(four.w, i + 3);
    *reinterpret_cast<float4*>(scores + i) = four;
  }
  top = block_reduce(top, -HUGE_VALF, Max());
  if (threadIdx.x == 0) atomicMax(&state.top, ordered(top, -1));  // whose it is, nobody asks
}

// Whether the candidates' policy applies to a row: its comparisons need finite scores.
__device__ bool covers(const Sample& p, const RowState& state) {
  return p.known ? isfinite(score_in(state.top)) : state.covered != 0;
}

// --- scan ---

__device__ int bin_of(float top, float score) {
  const float depth = fmaxf(0.0f, (top - score) * kBinsPerNat);
  return depth < kBins - 1 ? static_cast<int>(depth) : kBins - 1;
}

__global__ void __launch_bounds__(kScanThreads) scan_kernel(Sample p) {
  __shared__ Bin bins[kBins];
  let_next_start();
  wait_for_previous();
  const std::size_t base = blockIdx.y * score_stride(p.vocab_size);
  const float *lower = p.lower + base, *upper = p.upper + base;
  const int first = blockIdx.x * blockDim.x + threadIdx.x, step = gridDim.x * blockDim.x;
  constexpr int kAhead = 4;
  float high[kAhead], low[kAhead];
  const auto load = [&](int at) {
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      const int i = at + a * step;
      high[a] = i < p.vocab_size ? upper[i] : -HUGE_VALF;
      low[a] = i < p.vocab_size ? lower[i] : -HUGE_VALF;
    }
  };
  load(first);  // whether or not it will be used: with the state, one trip to the L2 cache
  RowState& state = p.rows[blockIdx.y];
  const RowRequest request = state.request;
  const float top = score_in(state.top);
  if (blockIdx.x == 0 && threadIdx.x == 0 && !p.known) state.times.sample = global_ns();
  const bool unlimited = request.selection == Selection::kUnlimited;
  if (!covers(p, state) || !(unlimited || request.selection == Selection::kTopK ||
                             request.selection == Selection::kNucleus)) {
    return;
  }
  for (int b = threadIdx.x; b < kBins; b += blockDim.x) bins[b] = {};
  __syncthreads();
  // The likeliest token has at least top - 3.2 with its noise.
  const float reachable = top - 3.2f - kMostNoise;
  float best = -HUGE_VALF;
  const auto count = [&](float high_end, float low_end) {
    // The last bin is left empty: nobody asks about it.
    const int high_bin = bin_of(top, high_end);
    if (high_bin == kBins - 1) return;  // then so is the lower end's
    atomicAdd(&bins[high_bin].upper_ends, 1u);
    atomicMax(&bins[high_bin].ceiling, ordered(high_end));
    const int low_bin = bin_of(top, low_end);
    if (low_bin < kBins - 1) atomicAdd(&bins[low_bin].lower_ends, 1u);
  };
  for (int at = first; at < p.vocab_size;) {
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      if (!unlimited) {
        count(high[a], low[a]);
      } else if (low[a] >= reachable) {
        best = fmaxf(best, low[a] + gumbel_noise_near(request, at + a * step));
      }
    }
    at += kAhead * step;
    load(at);
  }
  if (unlimited) {
    best = block_reduce(best, -HUGE_VALF, Max());
    if (threadIdx.x == 0) atomicMax(&state.best_noisy, ordered(best));
    return;
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

// --- select ---

// The edges are found by a block of kDigits threads, each with the bin of its index.

// Bins below the edge hold every token that top-k can keep: an interval that begins in one of them
// is above all that end beyond, and k of them do. When fewer than k begin within reach, tokens out
// of reach cannot win the draw anyway, and have no probability.
__device__ int top_k_edge(int top_k, const Bin& own, std::uint32_t* counts) {
  __shared__ int edge;
  counts[threadIdx.x] = own.lower_ends;
  if (threadIdx.x == 0) edge = kBins - 1;
  __syncthreads();
  running_sums<kDigits>(counts);
  const auto k = static_cast<std::uint32_t>(top_k);
  const int b = threadIdx.x;
  if (b < kBins - 1 && counts[b] >= k && (b == 0 || counts[b - 1] < k)) edge = b + 1;
  __syncthreads();
  return edge;
}

// What the intervals down to some depth amount to. Probabilities are relative to exp(top).
struct Depth {
  std::uint32_t upper_ends;
  float least;   // the probability that they have for certain
  float beyond;  // the most that can lie deeper; counted from the deep end
  __device__ Depth& operator+=(const Depth& other) {
    upper_ends += other.upper_ends;
    least += other.least;
    beyond += other.beyond;
    return *this;
  }
};
__device__ Depth from_lane_below(const Depth& d, int offset) {
  return {cuda::from_lane_below(d.upper_ends, offset), cuda::from_lane_below(d.least, offset),
          cuda::from_lane_below(d.beyond, offset)};
}

// The band of the nucleus: as deep as leaves the least probability beyond it, at a price that pays.
// 0 when none does. Only an estimate: choose bounds what lies beyond rigorously.
__device__ int nucleus_edge(float top_p, float top, const Bin& own, const Bin& deep, int limit,
                            Depth* depths) {
  constexpr int kShares = 3;
  __shared__ int edges[kShares];
  // Where the nucleus ends by what is certain: the token there has about this probability. What
  // lies beyond the band moves the cut when it is not small beside that.
  __shared__ float at_cut;
  const int b = threadIdx.x;
  const float certain = expf(-static_cast<float>(b + 1) / kBinsPerNat);
  depths[b] = {
      own.upper_ends, own.lower_ends * certain,
      deep.upper_ends > 0 ? deep.upper_ends * expf(from_ordered(deep.ceiling) - top) : 0.0f};
  if (b < kShares) edges[b] = 0;
  if (b == 0) at_cut = 0;
  __syncthreads();
  running_sums<kDigits>(depths);
  const float enough = top_p * depths[kBins - 1].least;
  if (b < kBins && depths[b].least >= enough && (b == 0 || depths[b - 1].least < enough)) {
    at_cut = certain;
  }
  __syncthreads();
  // For each share the least e in [1, kBins - 1] with no more than that in bins e and beyond.
  const int e = b;
  if (e >= 1 && e < kBins && depths[e - 1].upper_ends <= static_cast<std::uint32_t>(limit)) {
    const float beyond = depths[kBins - 1 - e].beyond, with_one_more = depths[kBins - e].beyond;
    float share = at_cut / 16;
    for (int i = 0; i < kShares; ++i, share *= 4) {
      if (beyond <= share && (e == 1 || with_one_more > share)) edges[i] = e;
    }
  }
  __syncthreads();
  // The smallest share that the limit allows.
  return edges[0] > 0 ? edges[0] : edges[1] > 0 ? edges[1] : edges[2];
}

// What a block has found in its part of a row.
struct Found {
  int n;
  std::int32_t ids[kBlockCandidates];
  float scores[kBlockCandidates];  // upper ends, and then what rescoring made of them
};

// Those that cannot reach `least` go. By one warp.
__device__ void keep_from(float least, Found& found) {
  const int lane = threadIdx.x % kWarp, n = found.n;
  int kept = 0;
  for (int c = lane; c - lane < n; c += kWarp) {
    const bool keep = c < n && found.scores[c] >= least;
    const int id = c < n ? found.ids[c] : 0;
    const unsigned kept_by = __ballot_sync(0xffffffffu, keep);
    __syncwarp();  // all have read what is written now
    if (keep) found.ids[kept + __popc(kept_by & ((1u << lane) - 1))] = id;
    kept += __popc(kept_by);
    __syncwarp();
  }
  if (lane == 0) found.n = kept;
}

// The exact logits, in `scores`: a row a warp, or two when there are more: a row's way from memory
// is what takes time. By the whole block.
__device__ void rescore(const Sample& p, const float4* state, Found& found) {
  constexpr int kWarps = kSelectThreads / kWarp;
  const int warp = threadIdx.x / kWarp, n = found.n;
  const auto row_of = [&](int c) {
    return p.lm_head + static_cast<std::size_t>(found.ids[c]) * p.stride;
  };
  if (n <= kWarps && warp < n) {
    const __half* const row[1] = {row_of(warp)};
    float sum[1][1];
    dot_rows<1, 1, 16>(row, state, p.stride, sum);
    if (threadIdx.x % kWarp == 0) found.scores[warp] = sum[0][0];
  }
  for (int c = warp; c < n && n > kWarps; c += 2 * kWarps) {
    const int second = min(c + kWarps, n - 1);
    const __half* const rows[2] = {row_of(c), row_of(second)};
    float sum[2][1];
    dot_rows<2, 1, 6>(rows, state, p.stride, sum);
    if (threadIdx.x % kWarp == 0) {
      found.scores[c] = sum[0][0];
      if (c + kWarps < n) found.scores[second] = sum[1][0];
    }
  }
}

// Greedy rows need no more than the best candidate: the last block of the row to arrive here hands
// it to the host.
__device__ void finish_greedy(const Sample& p, bool covered) {
  RowState& state = p.rows[blockIdx.y];
  __threadfence();
  __syncthreads();
  if (threadIdx.x != 0) return;
  if (atomicAdd(&state.blocks_done, 1u) + 1 != gridDim.x) return;
  __threadfence();
  const volatile RowState& now = state;
  const unsigned long long best = now.best;
  const bool finite = now.finite;
  const Ending ending = ending_of(now);
  const bool certain = covered && has_candidates(p, ending.candidates);
  finish(p, blockIdx.y, certain ? token_in(best) : -1, finite, ending);
}

// With so many rows a block's part of one is large and has many candidates to rescore. Where that
// takes long, it pays to know the likeliest token's exact score first: they become fewer.
constexpr int kManyRows = 5;
constexpr int kLongRow = 2048;

// A block takes a part of the vocabulary of one row.
// At most 128 KB of registers: one block finds room beside the product's.
// Greedy: all rows are.
template <bool Greedy>
__global__ void __launch_bounds__(kSelectThreads, 2) select_kernel(Sample p) {
  extern __shared__ float4 shared_state[];
  __shared__ std::uint32_t counts[kDigits];
  __shared__ Depth depths[kDigits];
  __shared__ Found found;
  __shared__ float likeliest_score;
  let_next_start();
  wait_for_previous();
  RowState& state = p.rows[blockIdx.y];
  const float* upper = p.upper + blockIdx.y * score_stride(p.vocab_size);
  // Pieces of 32 tokens go round the blocks: likely tokens lie together, and the block that finds
  // most is the last to end.
  constexpr int kPieceThreads = 8;
  constexpr int kPieces = kSelectThreads / kPieceThreads, kPiece = 4 * kPieceThreads;
  constexpr int kAhead = 4;
  const int step = kPieces * static_cast<int>(gridDim.x) * kPiece;
  const auto own_piece = threadIdx.x / kPieceThreads * gridDim.x + blockIdx.x;
  const int own_first = static_cast<int>(own_piece) * kPiece + threadIdx.x % kPieceThreads * 4;
  float4 high[kAhead];
  const auto load_upper = [&](int first) {
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      const int i = first + a * step;
      if (i < p.vocab_size) high[a] = *reinterpret_cast<const float4*>(upper + i);
    }
  };
  // All that is needed at once, whether or not it will be used.
  load_upper(own_first);
  const RowRequest request = state.request;
  const bool covered = covers(p, state);
  const float top = score_in(state.top);
  const int likeliest = token_in(state.top);
  static_assert(kSelectThreads == kDigits);
  Bin own_bin = {}, deep_bin = {};  // the thread's, from the top and from the deep end
  if (!Greedy && threadIdx.x < kBins) {
    own_bin = state.bins[threadIdx.x];
    deep_bin = state.bins[kBins - 1 - threadIdx.x];
  }
  const bool leads = blockIdx.x == 0 && threadIdx.x == 0;
  if (leads && state.times.sample == 0) state.times.sample = global_ns();
  if (!p.known) {
    load_states(p.states + static_cast<std::size_t>(blockIdx.y) * p.stride, 1, p.stride,
                shared_state);
  }
  const bool greedy = Greedy || request.selection == Selection::kGreedy;
  if (!covered) {
    if (greedy) finish_greedy(p, covered);
    return;
  }
  if (threadIdx.x == 0) found.n = 0;

  float threshold = -HUGE_VALF;
  int edge = kBins;
  switch (Greedy ? Selection::kGreedy : request.selection) {
    case Selection::kGreedy:
      threshold = top;
      break;
    case Selection::kMinP:
      threshold = top + logf(request.min_p);
      break;
    case Selection::kTopK:
      edge = top_k_edge(request.top_k, own_bin, counts);
      // With top-p the tokens below min-p's floor still count in the normaliser.
      if (request.top_p >= 1 && request.min_p > 0) threshold = top + logf(request.min_p);
      break;
    case Selection::kNucleus:
      edge = nucleus_edge(request.top_p, top, own_bin, deep_bin, candidate_limit(p), depths);
      break;
    case Selection::kUnlimited:
      threshold = from_ordered(state.best_noisy);
      // Two logarithms, and the roundings of two sums.
      threshold -= 2 * kNoiseError + fabsf(threshold) * 0x1p-22f;
      break;
  }

  if (leads) state.edge = edge;
  __syncthreads();
  const Scorer score(request, p.seen + static_cast<std::size_t>(blockIdx.y) * p.seen_words);
  // One warp finds out how much higher the threshold may be while the others look. It is the
  // largest score, or that with min-p's distance, and the likeliest token's is at most the largest.
  const bool raises = !p.known && p.n >= kManyRows && p.stride >= kLongRow && likeliest >= 0 &&
                      (greedy || request.selection == Selection::kMinP);
  if (raises && threadIdx.x / kWarp == kSelectThreads / kWarp - 1) {
    const __half* const row[1] = {p.lm_head + static_cast<std::size_t>(likeliest) * p.stride};
    float sum[1][1];
    dot_rows<1, 1, 16>(row, shared_state, p.stride, sum);
    if (threadIdx.x % kWarp == 0) likeliest_score = score(sum[0][0], likeliest);
  }
  const auto look = [&](int i, float end) {
    const float own = end;
    if (!Greedy && request.selection == Selection::kUnlimited && end + kMostNoise >= threshold) {
      end += gumbel_noise_near(request, i);
    }
    if (i < p.vocab_size && end >= threshold && (edge == kBins || bin_of(top, end) < edge)) {
      const int c = atomicAdd(&found.n, 1);
      if (c < kBlockCandidates) found.ids[c] = i, found.scores[c] = own;
    }
  };
  for (int first = own_first; first < p.vocab_size;) {
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      const int i = first + a * step;
      if (i >= p.vocab_size) break;
      look(i, high[a].x);
      look(i + 1, high[a].y);
      look(i + 2, high[a].z);
      look(i + 3, high[a].w);
    }
    first += kAhead * step;
    load_upper(first);
  }
  __syncthreads();
  // Too many for this block are too many for the row: who takes the token will see it.
  const bool too_many = found.n > kBlockCandidates;
  if (raises && !too_many && found.n > 0) {
    const float raised = greedy ? likeliest_score : likeliest_score + logf(request.min_p);
    __syncthreads();  // everybody has seen how many there were
    if (threadIdx.x / kWarp == 0) keep_from(fmaxf(threshold, raised), found);
    __syncthreads();
  }
  const int n = found.n;
  __shared__ int base;
  if (n > 0) {
    int place = 0;
    if (threadIdx.x == 0) {
      const unsigned claimed = too_many ? 2 * kMaxCandidates : n;
      place = static_cast<int>(atomicAdd(&state.candidates, claimed));
    }
    if (!too_many) {
      if (!p.known) rescore(p, shared_state, found);
      if (threadIdx.x == 0) base = place;  // only now: it takes as long from memory as the rows
      __syncthreads();
      ScoredToken* out = p.candidates + static_cast<std::size_t>(blockIdx.y) * kMaxCandidates;
      for (int c = threadIdx.x; c < n; c += kSelectThreads) {
        const int id = found.ids[c];
        const float exact = p.known ? found.scores[c] : score(found.scores[c], id);
        if (greedy) {
          atomicMax(&state.best, ordered(exact, id));
        } else if (base + c < kMaxCandidates) {
          out[base + c] = {exact, id};
        }
      }
    }
  }
  if (greedy) finish_greedy(p, covered);
}

// --- choose ---

// One block a row.
__global__ void __launch_bounds__(kChooseThreads) choose_kernel(Sample p) {
  extern __shared__ unsigned long long masses[];
  auto* cached = reinterpret_cast<ScoredToken*>(masses + Candidates::kCached);
  let_next_start();
  wait_for_previous();
  const RowState& state = p.rows[blockIdx.x];
  const ScoredToken* items = p.candidates + static_cast<std::size_t>(blockIdx.x) * kMaxCandidates;
  // All that is needed at once, whether or not it will be used.
  constexpr int kOwn = Candidates::kCached / kChooseThreads;
  static_assert(kBins <= kChooseThreads);
  ScoredToken own[kOwn];
#pragma unroll
  for (int i = 0; i < kOwn; ++i) own[i] = items[threadIdx.x + i * kChooseThreads];
  const RowRequest request = state.request;
  const Ending ending = ending_of(state);
  const bool finite = state.finite, covered = covers(p, state);
  const std::uint32_t edge = state.edge;
  Bin bin = {};
  if (threadIdx.x < kBins) bin = state.bins[threadIdx.x];

  if (request.selection == Selection::kGreedy) return;  // select has done it
  int token = -1;
  if (finite && covered && has_candidates(p, ending.candidates)) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) cached[threadIdx.x + i * kChooseThreads] = own[i];
    __syncthreads();
    const bool nucleus = request.selection == Selection::kNucleus;
    const auto n = static_cast<int>(ending.candidates);
    token = choose_from(Candidates{items, n, cached, masses, 0}, request,
                        [&](float max) { return nucleus ? rest_in(bin, edge, max) : no_rest(); });
  }
  if (threadIdx.x == 0) finish(p, blockIdx.x, token, finite, ending);
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
  const int token = choose_from(Everything{scores, p.vocab_size, 0}, state.request,
                                [](float) { return no_rest(); });
  if (threadIdx.x != 0) return;
  const bool proven = state.covered || !p.need_proof;
  finish(p, blockIdx.x, proven ? token : -1, state.finite, ending_of(state));
}

// Blocks for each of n rows: enough together to fill the device.
int blocks_for(const Stage& stage, int n, int per_multiprocessor) {
  const int wanted = per_multiprocessor * stage.multiprocessors;
  return wanted > n ? wanted / n : 1;
}

}  // namespace

cudaError_t score_logits(const Stage& stage, const Sample& args) {
  const int useful = (args.vocab_size + 4 * kScoreThreads - 1) / (4 * kScoreThreads);
  const int most = blocks_for(stage, args.n, 4);
  return launch(stage, {dim3(useful < most ? useful : most, args.n), dim3(kScoreThreads)},
                score_kernel, args);
}

cudaError_t forget_candidates(const Stage& stage, RowState* row) {
  constexpr std::size_t kBegin = offsetof(RowState, top);
  return cudaMemsetAsync(reinterpret_cast<std::byte*>(row) + kBegin, 0, sizeof(RowState) - kBegin,
                         stage.stream);
}

cudaError_t scan(const Stage& stage, const Sample& args) {
  // Every block adds its bins to the row's: not more blocks than have something to count.
  const int useful = (args.vocab_size + 2 * kScanThreads - 1) / (2 * kScanThreads);
  const int most = blocks_for(stage, args.n, 2);
  return launch(stage, {dim3(useful < most ? useful : most, args.n), dim3(kScanThreads)},
                scan_kernel, args);
}

namespace {

template <bool Greedy>
cudaError_t run_select(const Stage& stage, const Sample& args) {
  const auto kernel = select_kernel<Greedy>;
  const std::size_t shared_bytes = args.known ? 0 : sizeof(float) * args.stride;
  const cudaError_t error = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  if (error != cudaSuccess) return error;
  return launch(stage,
                {dim3(blocks_for(stage, args.n, args.n >= kManyRows ? 2 : 1), args.n),
                 dim3(kSelectThreads), shared_bytes},
                kernel, args);
}

cudaError_t choose(const Stage& stage, const Sample& args) {
  constexpr std::size_t kSharedBytes =
      Candidates::kCached * (sizeof(unsigned long long) + sizeof(ScoredToken));
  static_assert(kSharedBytes <= 32 << 10);  // beside what the filters share, in a block of 64
  const cudaError_t error = cudaFuncSetAttribute(
      choose_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(kSharedBytes));
  if (error != cudaSuccess) return error;
  return launch(stage, {dim3(args.n), dim3(kChooseThreads), kSharedBytes}, choose_kernel, args);
}

}  // namespace

cudaError_t select(const Stage& stage, const Sample& args, bool chooses) {
  if (!chooses) return run_select<true>(stage, args);
  const cudaError_t error = run_select<false>(stage, args);
  return error != cudaSuccess ? error : choose(stage, args);
}

cudaError_t choose_full(const Stage& stage, const Sample& args) {
  return launch(stage, {dim3(args.n), dim3(kChooseFullThreads)}, choose_full_kernel, args);
}

}  // namespace infemeral::cuda
