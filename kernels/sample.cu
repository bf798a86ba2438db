#include "kernels/sample.h"

#include <algorithm>
#include <cstddef>

#include "kernels/choose.cuh"
#include "kernels/common.cuh"
#include "kernels/dot.cuh"
#include "kernels/edges.cuh"
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
constexpr int kWorthWaiting = 64;       // so many rows take longer than a look at the row's state
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
  unsigned long long top = 0;
  const auto score_one = [&](float& value, int i) {
    if (i >= p.vocab_size) return;
    value = score(value, i);
    top = Max()(top, ordered(isfinite(value) ? value : HUGE_VALF, i));  // infinite from then on
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
  top = block_reduce(top, 0ull, Max());
  if (threadIdx.x == 0) atomicMax(&state.top, top);
}

// Whether the candidates' policy applies to a row: its comparisons need finite scores.
__device__ bool covers(const Sample& p, const RowState& state) {
  return p.known ? isfinite(score_in(state.top)) : state.covered != 0;
}

// --- scan ---

// Counts top-k's lower ends.
__global__ void __launch_bounds__(kScanThreads) scan_kernel(Sample p) {
  __shared__ std::uint32_t bins[kBins];
  let_next_start();
  wait_for_previous();
  const float* lower = p.lower + blockIdx.y * score_stride(p.vocab_size);
  const int first = blockIdx.x * blockDim.x + threadIdx.x, step = gridDim.x * blockDim.x;
  constexpr int kAhead = 4;
  float low[kAhead];
  const auto load = [&](int at) {
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      const int i = at + a * step;
      low[a] = i < p.vocab_size ? lower[i] : -HUGE_VALF;
    }
  };
  load(first);  // whether or not it will be used: with the state, one trip to the L2 cache
  RowState& state = p.rows[blockIdx.y];
  const bool counts = state.request.selection == Selection::kTopK;
  const float top = score_in(state.top);
  if (blockIdx.x == 0 && threadIdx.x == 0 && !p.known) state.times.sample = global_ns();
  if (!counts || !covers(p, state)) return;
  for (int b = threadIdx.x; b < kBins; b += blockDim.x) bins[b] = 0;
  __syncthreads();
  for (int at = first; at < p.vocab_size;) {
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      const int bin = bin_of(top, low[a]);
      if (bin < kBins - 1) atomicAdd(&bins[bin], 1u);  // nobody asks about the last one
    }
    at += kAhead * step;
    load(at);
  }
  __syncthreads();
  for (int b = threadIdx.x; b < kBins; b += blockDim.x) {
    if (bins[b] > 0) atomicAdd(&state.lower_ends[b], bins[b]);
  }
}

// --- select ---

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

// The noisy score that a token needs to win where another has this one at least: less two
// logarithms' errors and the roundings of two sums.
__device__ float beaten_from(float noisy) {
  return noisy - (2 * kNoiseError + fabsf(noisy) * 0x1p-22f);
}
// With temperature alone a block that finds more than this in a flat row looks again.
constexpr int kManyNoisy = 4;

// What a block of top-p may take of the row's candidates: likely tokens do not lie evenly.
__device__ int block_limit(const Sample& p) {
  return min(kBlockCandidates, 2 * candidate_limit(p) / static_cast<int>(gridDim.x) + kWarp);
}

// A block takes a part of the vocabulary of one row.
// At most 128 KB of registers: one block finds room beside the product's.
// Greedy: all rows are.
template <bool Greedy>
__global__ void __launch_bounds__(kSelectThreads, 2) select_kernel(Sample p) {
  extern __shared__ float4 shared_state[];
  __shared__ std::uint32_t counts[kDigits];
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
  // With many rows a block's part of one is 6144 tokens of a small vocabulary: one trip.
  constexpr int kAhead = Greedy ? 6 : 4;
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
  const std::uint32_t lower_ends =
      !Greedy && threadIdx.x < kBins ? state.lower_ends[threadIdx.x] : 0;
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
  // visit(token, upper end), by all threads.
  const auto for_each_token = [&](const auto& visit) {
    for (int first = own_first; first < p.vocab_size;) {
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        const int i = first + a * step;
        if (i >= p.vocab_size) break;
        visit(i, high[a].x);
        visit(i + 1, high[a].y);
        visit(i + 2, high[a].z);
        visit(i + 3, high[a].w);
      }
      first += kAhead * step;
      load_upper(first);
    }
  };
  bool too_many = false;  // for the block, and so for the row: who takes the token will see it
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
      counts[threadIdx.x] = lower_ends;
      edge = top_k_edge(request.top_k, counts);
      // With top-p the tokens below min-p's floor still count in the normaliser.
      if (request.top_p >= 1 && request.min_p > 0) threshold = top + logf(request.min_p);
      break;
    case Selection::kNucleus:
      counts[threadIdx.x] = 0;
      __syncthreads();
      for_each_token([&](int i, float end) {
        const int bin = bin_of(top, end);
        if (i < p.vocab_size && bin < kBins - 1) atomicAdd(&counts[bin], 1u);
      });
      if (own_first + kAhead * step < p.vocab_size) load_upper(own_first);  // again
      __syncthreads();
      edge = nucleus_edge(counts, request.top_p, top, block_limit(p), p.known, state);
      too_many = edge == kBins;
      break;
    case Selection::kUnlimited:
      threshold = beaten_from(top + gumbel_noise_near(request, likeliest));
      break;
  }

  if (threadIdx.x == 0) found.n = too_many ? kBlockCandidates + 1 : 0;
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
#pragma unroll 1
  for (bool again = false;; again = true) {
    if (!too_many) for_each_token(look);
    __syncthreads();
    if (Greedy || request.selection != Selection::kUnlimited) break;
    if (again || found.n <= kManyNoisy) break;
    // Only who can beat the best of the block's own has to stay.
    const float* lower = p.lower + blockIdx.y * score_stride(p.vocab_size);
    float best = -HUGE_VALF;
    for (int c = threadIdx.x; c < min(found.n, kBlockCandidates); c += kSelectThreads) {
      best = fmaxf(best, lower[found.ids[c]] + gumbel_noise_near(request, found.ids[c]));
    }
    best = block_reduce(best, -HUGE_VALF, Max());
    threshold = fmaxf(threshold, beaten_from(best));
    if (threadIdx.x == 0) found.n = 0;
    if (own_first + kAhead * step < p.vocab_size) load_upper(own_first);
    __syncthreads();
  }
  too_many = found.n > kBlockCandidates;
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
    if (n > kWorthWaiting) {
      // The row may be lost already.
      if (threadIdx.x == 0) base = place;
      __syncthreads();
      too_many = too_many || base + n > candidate_limit(p);
      __syncthreads();
    }
    if (!too_many) {
      // The noise while the rows come: by those threads first that rescoring needs last.
      const int own = kSelectThreads - 1 - static_cast<int>(threadIdx.x);
      double noise = 0;
      if (!greedy && own < n) noise = gumbel_noise(request, found.ids[own]);
      if (!p.known) rescore(p, shared_state, found);
      if (threadIdx.x == 0) base = place;  // only now: it takes as long from memory as the rows
      __syncthreads();
      Candidate* out = p.candidates + static_cast<std::size_t>(blockIdx.y) * kMaxCandidates;
      for (int c = own; c < n; c += kSelectThreads) {
        const int id = found.ids[c];
        const float exact = p.known ? found.scores[c] : score(found.scores[c], id);
        if (greedy) {
          atomicMax(&state.best, ordered(exact, id));
        } else if (base + c < kMaxCandidates) {
          out[base + c] = {exact, id, c == own ? noise : gumbel_noise(request, id)};
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
  auto* cached = reinterpret_cast<Candidate*>(masses + Candidates::kCached);
  let_next_start();
  wait_for_previous();
  const RowState& state = p.rows[blockIdx.x];
  const Candidate* items = p.candidates + static_cast<std::size_t>(blockIdx.x) * kMaxCandidates;
  // All that is needed at once, whether or not it will be used.
  constexpr int kOwn = Candidates::kCached / kChooseThreads;
  Candidate own[kOwn];
#pragma unroll
  for (int i = 0; i < kOwn; ++i) own[i] = items[threadIdx.x + i * kChooseThreads];
  const RowRequest request = state.request;
  const Ending ending = ending_of(state);
  const bool finite = state.finite, covered = covers(p, state);
  const float top = score_in(state.top);
  const unsigned long long rest_mass = state.rest_mass;
  const std::uint32_t rest_ceiling = state.rest_ceiling;

  if (request.selection == Selection::kGreedy) return;  // select has done it
  int token = -1;
  if (finite && covered && has_candidates(p, ending.candidates)) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) cached[threadIdx.x + i * kChooseThreads] = own[i];
    __syncthreads();
    const Candidates candidates = {items, static_cast<int>(ending.candidates), cached, masses, 0};
    token = choose_from(candidates, request,
                        [&](float max) { return rest_below(max, top, rest_mass, rest_ceiling); });
  }
  if (threadIdx.x == 0) finish(p, blockIdx.x, token, finite, ending);
}

__global__ void __launch_bounds__(kChooseFullThreads) choose_full_kernel(Sample p) {
  let_next_start();
  wait_for_previous();
  RowState& state = p.rows[blockIdx.x];
  if (threadIdx.x == 0 && state.times.sample == 0) state.times.sample = global_ns();
  float* scores = p.upper + blockIdx.x * score_stride(p.vocab_size);
  if (!p.known) {
    const Scorer score(state.request, p.seen + static_cast<std::size_t>(blockIdx.x) * p.seen_words);
    for (int i = threadIdx.x; i < p.vocab_size; i += blockDim.x) scores[i] = score(scores[i], i);
    __syncthreads();
  }
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
      Candidates::kCached * (sizeof(unsigned long long) + sizeof(Candidate));
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
