#include "kernels/int8_head.h"

#include "kernels/common.cuh"
#include "kernels/launch.cuh"
#include "kernels/score.cuh"

namespace infemeral::cuda {
namespace {

constexpr int kTileRows = 16;
constexpr int kBlockBytes = kTileRows * kAlign;
constexpr int kChunkBlocks = 4;  // blocks of kAlign columns in a chunk of a tile
constexpr int kTileBytes = kChunkBlocks * kBlockBytes;

// Tiles of the whole copy.
__device__ int tiles_of(int vocab_size) {
  return static_cast<int>(int8_rows(vocab_size)) / kTileRows;
}

// Where a chunk of a tile lies, and how many blocks it has.
struct Chunk {
  std::size_t offset;
  int blocks;
};
__device__ Chunk chunk_at(int chunk, int tile, int tiles, int stride) {
  const int blocks = min(kChunkBlocks, stride / kAlign - chunk * kChunkBlocks);
  return {static_cast<std::size_t>(chunk) * tiles * kTileBytes +
              static_cast<std::size_t>(tile) * blocks * kBlockBytes,
          blocks};
}

// Where 16 columns from `column` on of row `row` lie in the copy.
__device__ std::size_t copy_offset(int row, int column, int tiles, int stride) {
  const int block = column / kAlign, r = row % kTileRows;
  const Chunk chunk = chunk_at(block / kChunkBlocks, row / kTileRows, tiles, stride);
  return chunk.offset + block % kChunkBlocks * kBlockBytes + r / 8 * (kBlockBytes / 2) +
         (r % 8 * 4 + column / 16 % 4) * 16;
}

// --- rows ---

constexpr int kRowWarps = 8;

// A warp a row; a lane takes groups of 16 columns.
__global__ void quantise_rows_kernel(QuantiseRows p) {
  const int lane = threadIdx.x % kWarp;
  const int index = blockIdx.x * kRowWarps + threadIdx.x / kWarp;
  const int filled = (p.count + kGroupRows - 1) / kGroupRows * kGroupRows;
  if (index >= filled) return;
  const bool exists = index < p.count;
  const __half* row = p.rows + static_cast<std::size_t>(exists ? index : 0) * p.stride;
  const int out_row = p.first + index;

  float largest = 0;
  double squares = 0;
  for (int i = lane; i < p.hidden_size && exists; i += kWarp) {
    const float w = __half2float(row[i]);
    largest = fmaxf(largest, fabsf(w));
    squares += static_cast<double>(w) * w;
  }
  largest = warp_reduce(largest, Max());
  squares = warp_reduce(squares, Sum());

  RoundingSums sums;
  sums.norm = norm_up(squares);
  sums.scale = largest / static_cast<float>(kRowMax);
  const bool rounds = exists && sums.norm < HUGE_VALF && sums.scale != 0;
  double error = 0;
  for (int group = lane; group < p.stride / 16; group += kWarp) {
    std::int8_t q[16] = {};
    for (int j = 0; j < 16 && rounds; ++j) {
      const float w = __half2float(row[group * 16 + j]);
      const float whole = whole_steps(w, sums.scale, static_cast<float>(kRowMax));
      const double kept = static_cast<double>(sums.scale) * whole;
      q[j] = static_cast<std::int8_t>(whole);
      error += (w - kept) * (w - kept);
    }
    uint4 bytes;
    memcpy(&bytes, q, sizeof bytes);
    *reinterpret_cast<uint4*>(
        p.copy + copy_offset(out_row, group * 16, tiles_of(p.vocab_size), p.stride)) = bytes;
  }
  error = warp_reduce(error, Sum());
  if (lane != 0) return;
  RowBound bound;
  if (rounds) {
    bound = {sums.scale, norm_up(error), sums.norm};
  } else if (exists) {  // all zero, or not finite, which no state is certifiable with
    const float norm = sums.norm < HUGE_VALF ? sums.norm : HUGE_VALF;
    bound = {0, norm, norm};
  }
  p.bounds[out_row] = bound;
  // Norms are not negative: their bits are in their order.
  atomicMax(reinterpret_cast<unsigned*>(p.largest_norm), __float_as_uint(bound.norm));
}

// --- states ---

// The threads that round a state together: the first Threads of a block.
template <int Threads>
__device__ void sync_threads() {
  asm volatile("bar.sync 1, %0;" ::"n"(Threads) : "memory");
}

// Values combined over those threads, in every thread.
template <int Threads, int N, typename Op>
__device__ void combine(float (&values)[N], Op op) {
  constexpr int kWarps = Threads / kWarp;
  __shared__ float partial[kWarps][N];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const auto reduce = [&](int lanes) {
    for (int offset = lanes / 2; offset > 0; offset /= 2) {
#pragma unroll
      for (float& value : values) {
        value = op(value, __shfl_xor_sync(0xffffffffu, value, offset));
      }
    }
  };
  reduce(kWarp);
  sync_threads<Threads>();  // an earlier call may still read
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (lane == 0) partial[warp][i] = values[i];
  }
  sync_threads<Threads>();
#pragma unroll
  for (int i = 0; i < N; ++i) values[i] = partial[lane % kWarps][i];
  reduce(kWarps);
}

// Sums of floats that are not negative, in a tree, and their roots: a few hundred roundings at most
// for every state that fits a device, which this factor covers.
constexpr double kSumSlack = 1 + 0x1p-14;

// Rounds the state y to whole numbers and hands each value's high and low byte to write(i, high,
// low). True when the proof covers the state; `bound` is then set in thread 0. A barrier of these
// threads lies between the writes and the return. All sums are in units of the state's scale, where
// nothing overflows and nothing that counts underflows.
template <int Threads, typename Write>
__device__ bool round_state(const float* y, int n, float largest_norm, const Write& write,
                            StateBound& bound) {
  constexpr int kKept = 4096 / Threads;  // values that a thread keeps; it makes more of them anew
  float kept[kKept];
#pragma unroll
  for (int k = 0; k < kKept; ++k) {
    const int i = threadIdx.x + k * Threads;
    kept[k] = i < n ? y[i] : 0;
  }
  float largest[1] = {0};
#pragma unroll
  for (int k = 0; k < kKept; ++k) largest[0] = fmaxf(largest[0], fabsf(kept[k]));
  for (int i = threadIdx.x + kKept * Threads; i < n; i += Threads) {
    largest[0] = fmaxf(largest[0], fabsf(y[i]));
  }
  combine<Threads>(largest, Max());
  RoundingSums sums;
  sums.largest = largest[0];
  const auto most = static_cast<float>(kStateMax);
  sums.scale = sums.largest / most;
  // Below it nothing is covered, and scales could be subnormal.
  const bool divides = sums.largest >= 0x1p-60f && isfinite(sums.largest);
  const float inverse = divides ? 1 / sums.scale : 0;
  // A product instead of engine/certified_bound.h's quotient may round a tie the other way. Any
  // whole numbers will do: the error is that of those which were really taken.
  const auto whole = [&](float x) { return fminf(fmaxf(nearest_whole(x * inverse), -most), most); };
  float squares[3] = {0, 0, 0};  // of the state, of its error, of the whole numbers
  const auto round_one = [&](int i, float x) {
    const float steps = whole(x);
    const float in_units = x * inverse, error = fmaf(-sums.scale, steps, x) * inverse;
    squares[0] = fmaf(in_units, in_units, squares[0]);
    squares[1] = fmaf(error, error, squares[1]);
    squares[2] = fmaf(steps, steps, squares[2]);
    const auto v = static_cast<std::int32_t>(steps);
    const std::int32_t low = ((v + 128) & 255) - 128;
    write(i, static_cast<std::byte>((v - low) >> 8), static_cast<std::byte>(low));
    return steps;
  };
#pragma unroll
  for (int k = 0; k < kKept; ++k) {
    const int i = threadIdx.x + k * Threads;
    if (i < n) kept[k] = round_one(i, kept[k]);
  }
  for (int i = threadIdx.x + kKept * Threads; i < n; i += Threads) round_one(i, y[i]);
  combine<Threads>(squares, Sum());

  float split[2] = {0, squares[2]};  // the outliers' sum, the others' squares
  for (int round = 0; round < kOutlierRounds; ++round) {
    // Any cut is a valid one: float32 will do.
    const float cut = sqrtf(12 / static_cast<float>(n) * split[1]);
    float next[2] = {0, 0};
    const auto add = [&](float steps) {
      const float magnitude = fabsf(steps);
      const bool outlier = magnitude > cut;
      next[0] += outlier ? magnitude : 0.0f;
      next[1] = fmaf(magnitude, outlier ? 0.0f : magnitude, next[1]);
    };
#pragma unroll
    for (int k = 0; k < kKept; ++k) add(kept[k]);
    for (int i = threadIdx.x + kKept * Threads; i < n; i += Threads) add(whole(y[i]));
    combine<Threads>(next, Sum());
    const bool settled = next[0] == split[0];
    split[0] = next[0];
    split[1] = next[1];
    if (settled) break;
  }
  const auto root = [&](float sum) {
    return round_up(kSumSlack * sqrtf(sum) * static_cast<double>(sums.scale));
  };
  sums.norm = root(squares[0]);
  if (!divides || !proof_covers(sums, n, largest_norm)) return false;
  if (threadIdx.x == 0) {
    sums.error = root(squares[1]);
    sums.squares = kSumSlack * squares[2];
    sums.outliers = kSumSlack * split[0];
    sums.rest_squares = kSumSlack * split[1];
    bound = state_bound(sums, n);
  }
  return true;
}

constexpr int kStateThreads = 512;

// One block a state.
__global__ void __launch_bounds__(kStateThreads) quantise_states_kernel(Product p) {
  let_next_start();
  wait_for_previous();
  const int s = blockIdx.x, groups = column_groups(p.n);
  RowState& out = p.rows[s];
  if (threadIdx.x == 0) out.times.de_embed = global_ns();
  const auto write = [&](int i, std::byte high, std::byte low) {
    p.planes[plane_offset(groups, s, 0, i)] = high;
    p.planes[plane_offset(groups, s, 1, i)] = low;
  };
  for (int i = p.hidden_size + threadIdx.x; i < p.stride; i += kStateThreads) {
    write(i, std::byte{0}, std::byte{0});
  }
  StateBound bound;
  const bool covered = round_state<kStateThreads>(p.states + static_cast<std::size_t>(s) * p.stride,
                                                  p.hidden_size, *p.largest_norm, write, bound);
  if (!covered || threadIdx.x != 0) return;  // decode has cleared `covered`
  out.bound = bound;
  out.covered = 1;
}

// --- product ---

// sums += a * b: 16 rows x 32 columns times 32 columns x 8 states' planes, whole numbers.
__device__ void multiply_add(std::int32_t (&sums)[4], unsigned a0, unsigned a1, unsigned a2,
                             unsigned a3, unsigned b0, unsigned b1) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else
  const auto quarter = [](std::int32_t& c0, std::int32_t& c1, unsigned a, unsigned b) {
    asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
        : "+r"(c0), "+r"(c1)
        : "r"(a), "r"(b));
  };
  quarter(sums[0], sums[1], a0, b0);
  quarter(sums[2], sums[3], a1, b0);
  quarter(sums[0], sums[1], a2, b1);
  quarter(sums[2], sums[3], a3, b1);
#endif
}

// What the product needs to know of a state; in shared memory.
struct StateView {
  float scale, scale_factor, error_factor, norm_factor;  // its StateBound
  float penalty, inverse_temperature;
  bool covered, needs_lower;
};

// Intervals from the sums of one tile: rows `row` and `row` + 8, each with the high and the low
// plane of state 4 g + t.
template <int Groups>
__device__ void write_intervals(const Product& p, const StateView* states, int row,
                                const RowBound (&row_bounds)[2],
                                const std::int32_t (&sums)[Groups][4], float (&best)[Groups]) {
#pragma unroll
  for (int g = 0; g < Groups; ++g) {
    const int s = 4 * g + threadIdx.x % 4;
    if (s >= p.n || !states[s].covered) continue;
    const StateBound bound = {states[s].scale, states[s].scale_factor, states[s].error_factor,
                              states[s].norm_factor};
    const Scorer score(states[s].penalty, states[s].inverse_temperature,
                       p.seen + static_cast<std::size_t>(s) * p.seen_words);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int id = row + 8 * half;
      if (id >= p.vocab_size) continue;
      const std::int64_t dot = std::int64_t{256} * sums[g][2 * half] + sums[g][2 * half + 1];
      const float centre = approximate_logit(dot, row_bounds[half], bound);
      const std::size_t at = s * score_stride(p.vocab_size) + id;
      if (p.approximate) {
        p.upper[at] = centre;
        continue;
      }
      const float radius = logit_radius(row_bounds[half], bound);
      const float low = score(centre - radius, id);
      p.upper[at] = score(centre + radius, id);
      if (states[s].needs_lower) p.lower[at] = low;
      best[g] = fmaxf(best[g], low);
    }
  }
}

constexpr int kConsumers = 8;                              // warps that multiply
constexpr int kProductThreads = (kConsumers + 1) * kWarp;  // and one that fetches

// Tiles that a block takes at a time. With one state the memory is the limit, and small pieces end
// at the same time on all multiprocessors: two warps share a tile. With many states their planes
// have to be fetched along with every piece, so that large ones are cheaper: a warp a tile.
template <bool Single>
constexpr int kTiles = Single ? kConsumers / 2 : kConsumers;
// Pieces on their way at once. 128 KB are enough to keep the memory busy, and leave room for the
// next kernel to stand by.
template <bool Single>
constexpr int kMaxStages = 32 / kTiles<Single>;

template <int Groups>
constexpr int kPlaneChunk = Groups * 512 * kChunkBlocks;  // bytes of the planes of a chunk

#if __CUDA_ARCH__ >= 900
// Barriers in shared memory and copies that complete on them (PTX ISA: mbarrier, cp.async.bulk).
__device__ std::uint32_t shared_address(const void* p) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(p));
}
__device__ void barrier_init(std::uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals));
}
__device__ void barrier_expect(std::uint64_t* barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
__device__ void barrier_arrive(std::uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}
__device__ void barrier_wait(std::uint64_t* barrier, int parity) {
  int done = 0;
  while (done == 0) {
    asm volatile(
        "{\n .reg .pred p;\n"
        " mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        " selp.s32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  }
}
__device__ void copy_bulk(void* shared, const void* global, int bytes, std::uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}
#endif

// A block goes through pieces of some tiles, chunk by chunk; its warps keep the sums. With bulk
// copies (compute capability 9.0) one more warp keeps `stages` chunks on their way to shared
// memory; elsewhere every warp loads its own part into registers. Multiprocessors do not get equal
// shares of the memory's speed, so they claim pieces as they go.
//
// Single: one state, which every block rounds for itself into its shared memory, while the first
// chunks are on their way. Else the states' planes are fetched along with the chunks.
template <int Groups, bool Single>
__global__ void __launch_bounds__(kProductThreads, 1) product_kernel(Product p, int stages) {
  static_assert(Groups == 1 || !Single);
  constexpr int kPieceTiles = kTiles<Single>;
  extern __shared__ __align__(128) std::byte shared[];
  __shared__ StateView states[4 * Groups];
  let_next_start();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int tiles = tiles_of(p.vocab_size), pieces = tiles / kPieceTiles;
  const int chunks = (p.stride / kAlign + kChunkBlocks - 1) / kChunkBlocks;
  const int tile_in_piece = warp % kPieceTiles;
  float best[Groups];
#pragma unroll
  for (int g = 0; g < Groups; ++g) best[g] = -HUGE_VALF;
  const auto view = [&](int s, const StateBound& bound, bool covered) {
    const RowRequest& request = p.rows[s].request;
    const Selection selection = request.selection;
    states[s] = {bound.scale,
                 bound.scale_factor,
                 bound.error_factor,
                 bound.norm_factor,
                 request.repetition_penalty,
                 request.inverse_temperature,
                 covered,
                 selection != Selection::kGreedy && selection != Selection::kMinP};
  };
  const auto row_of = [&](int piece) {  // the lane's, and that plus 8
    return (piece * kPieceTiles + tile_in_piece) * kTileRows + lane / 4;
  };

#if __CUDA_ARCH__ >= 900
  constexpr int kConsumerThreads = kConsumers * kWarp;
  constexpr int kSinglePlanes = 128;  // bytes of a block of columns: two of eight columns
  constexpr int kRowBytes = kPieceTiles * kTileBytes;
  constexpr int kStageBytes = kRowBytes + (Single ? 0 : kPlaneChunk<Groups>);
  __shared__ std::uint64_t full[kMaxStages<Single>], empty[kMaxStages<Single>];
  __shared__ int piece_in[kMaxStages<Single>];  // -1: there are no more
  std::byte* const own_planes = shared + stages * kStageBytes;
  if (threadIdx.x == 0) {
    for (int i = 0; i < stages; ++i) {
      barrier_init(&full[i], 1);
      barrier_init(&empty[i], kConsumers);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  // Pieces that are everybody's own fill the stages before anything may be claimed.
  const int own_pieces = (stages + chunks - 1) / chunks;
  if (warp == kConsumers) {
    if (lane == 0) {
      struct Place {  // of the chunk that is next
        int stage = 0, parity = 0, chunk = 0, turn = 0, piece;
      } at;
      at.piece = blockIdx.x;
      int claimed = 0;  // the piece after this one, once the own ones are used up
      bool may_claim = false;
      const auto claim = [&] {
        return own_pieces * static_cast<int>(gridDim.x) +
               static_cast<int>(atomicAdd(&p.rows[0].claimed, 1u));
      };
      const auto advance = [&] {
        if (++at.stage == stages) at.stage = 0, at.parity ^= 1;
        if (++at.chunk < chunks) return;
        at.chunk = 0;
        if (++at.turn < own_pieces) {
          at.piece += gridDim.x;
        } else {
          at.piece = claimed;
          if (may_claim) claimed = claim();  // known long before it is needed
        }
      };
      const auto fetch_rows = [&] {
        const Chunk chunk = chunk_at(at.chunk, at.piece * kPieceTiles, tiles, p.stride);
        const int bytes = kPieceTiles * chunk.blocks * kBlockBytes;
        piece_in[at.stage] = at.piece;
        barrier_expect(&full[at.stage], bytes + (Single ? 0 : chunk.blocks * Groups * 512));
        copy_bulk(shared + at.stage * kStageBytes, p.copy + chunk.offset, bytes, &full[at.stage]);
      };
      const auto fetch_planes = [&](int stage, int chunk) {
        if constexpr (Single) return;
        const int blocks = min(kChunkBlocks, p.stride / kAlign - chunk * kChunkBlocks);
        copy_bulk(shared + stage * kStageBytes + kRowBytes,
                  p.planes + static_cast<std::size_t>(chunk) * kPlaneChunk<Groups>,
                  blocks * Groups * 512, &full[stage]);
      };
      // The weights do not depend on the kernels before: on their way before those have ended.
      int early = 0;
      for (; early < stages && at.turn < own_pieces && at.piece < pieces; ++early) {
        fetch_rows();
        advance();
      }
      // What follows, to the L2 cache: the memory must not stand still while states are rounded,
      // here or in the kernel before.
      const auto fetch_to_cache = [&] {
        constexpr int kCached = 128 / (kRowBytes >> 10);
        for (int i = 0; i < kCached && at.turn < own_pieces + Single && at.chunk + i < chunks &&
                        at.piece < pieces;
             ++i) {
          const Chunk chunk = chunk_at(at.chunk + i, at.piece * kPieceTiles, tiles, p.stride);
          asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p.copy + chunk.offset),
                       "r"(kPieceTiles * chunk.blocks * kBlockBytes));
        }
      };
      if constexpr (!Single) fetch_to_cache();
      wait_for_previous();
      asm volatile("fence.proxy.async;" ::: "memory");  // planes were written by ordinary stores
      may_claim = true;
      claimed = claim();
      if (at.turn >= own_pieces) at.piece = claimed, claimed = claim();
      for (int i = 0; i < early; ++i) fetch_planes(i, i % chunks);
      if constexpr (Single) fetch_to_cache();
      while (at.piece < pieces) {
        barrier_wait(&empty[at.stage], at.parity ^ 1);
        fetch_rows();
        fetch_planes(at.stage, at.chunk);
        advance();
      }
      barrier_wait(&empty[at.stage], at.parity ^ 1);
      piece_in[at.stage] = -1;
      barrier_arrive(&full[at.stage]);
    }
  } else {
    wait_for_previous();
    if constexpr (Single) {
      RowState& state = p.rows[0];
      const bool leads = blockIdx.x == 0 && threadIdx.x == 0;
      if (leads) state.times.de_embed = global_ns();
      const auto write = [&](int i, std::byte high, std::byte low) {
        std::byte* to = own_planes + i / kAlign * kSinglePlanes + i % kAlign;
        to[0] = high;
        to[kSinglePlanes / 2] = low;
      };
      for (int i = p.hidden_size + threadIdx.x; i < p.stride; i += kConsumerThreads) {
        write(i, std::byte{0}, std::byte{0});
      }
      StateBound bound;
      const bool covered =
          round_state<kConsumerThreads>(p.states, p.hidden_size, *p.largest_norm, write, bound);
      if (threadIdx.x == 0) view(0, bound, covered);
      if (leads) state.covered = covered;
    } else if (threadIdx.x < p.n) {
      view(threadIdx.x, p.rows[threadIdx.x].bound, p.rows[threadIdx.x].covered != 0);
    }
    // Warps that share a tile take their own blocks of every chunk.
    constexpr int kSharers = kConsumers / kPieceTiles, kOwnBlocks = kChunkBlocks / kSharers;
    const int first_block = warp / kPieceTiles * kOwnBlocks;
    __shared__ std::int32_t handed_over[2][kSharers > 1 ? kPieceTiles : 1][kWarp][4];
    RowBound row_bounds[2];
    std::int32_t sums[Groups][4] = {};
    int stage = 0, parity = 0, chunk = 0, piece = 0, turn = 0;
    while (true) {
      const int blocks = min(kChunkBlocks, p.stride / kAlign - chunk * kChunkBlocks);
      const std::byte* rows = shared + stage * kStageBytes;
      const std::byte* a = rows + (tile_in_piece * blocks + first_block) * kBlockBytes + lane * 16;
      barrier_wait(&full[stage], parity);
      if (chunk == 0) {
        piece = piece_in[stage];
        if (piece < 0) break;
        row_bounds[0] = p.bounds[row_of(piece)];  // early: they come from memory
        row_bounds[1] = p.bounds[row_of(piece) + 8];
      }
      uint4 upper[kOwnBlocks], lower[kOwnBlocks];
#pragma unroll
      for (int i = 0; i < kOwnBlocks; ++i) {
        if (first_block + i < blocks) {
          upper[i] = *reinterpret_cast<const uint4*>(a + i * kBlockBytes);
          lower[i] = *reinterpret_cast<const uint4*>(a + i * kBlockBytes + kBlockBytes / 2);
        }
      }
#pragma unroll
      for (int i = 0; i < kOwnBlocks; ++i) {
        const int block = first_block + i;
        if (block >= blocks) break;
#pragma unroll
        for (int g = 0; g < Groups; ++g) {
          uint4 y = make_uint4(0, 0, 0, 0);
          if constexpr (Single) {
            if (lane < kSinglePlanes / 16) {
              y = *reinterpret_cast<const uint4*>(
                  own_planes + (chunk * kChunkBlocks + block) * kSinglePlanes + lane * 16);
            }
          } else {
            y = *reinterpret_cast<const uint4*>(rows + kRowBytes + (block * Groups + g) * 512 +
                                                lane * 16);
          }
          multiply_add(sums[g], upper[i].x, lower[i].x, upper[i].y, lower[i].y, y.x, y.y);
          multiply_add(sums[g], upper[i].z, lower[i].z, upper[i].w, lower[i].w, y.z, y.w);
        }
      }
      __syncwarp();
      if (lane == 0) barrier_arrive(&empty[stage]);
      if (++stage == stages) stage = 0, parity ^= 1;
      if (++chunk < chunks) continue;
      chunk = 0;
      if constexpr (kSharers > 1) {
        auto& handed = handed_over[turn % 2][tile_in_piece][lane];
        if (warp >= kPieceTiles) {
          for (int j = 0; j < 4; ++j) handed[j] = sums[0][j];
        }
        sync_threads<kConsumerThreads>();  // `states` is complete, too
        if (warp < kPieceTiles) {
          for (int j = 0; j < 4; ++j) sums[0][j] += handed[j];
        }
      } else if (turn == 0) {
        sync_threads<kConsumerThreads>();  // `states` is complete
      }
      ++turn;
      if (warp < kPieceTiles) {
        write_intervals<Groups>(p, states, row_of(piece), row_bounds, sums, best);
      }
#pragma unroll
      for (int g = 0; g < Groups; ++g) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[g][j] = 0;
      }
    }
  }
#else
  (void)stages;
  (void)shared;
  wait_for_previous();
  if (threadIdx.x < p.n) {
    view(threadIdx.x, p.rows[threadIdx.x].bound, p.rows[threadIdx.x].covered != 0);
  }
  __syncthreads();
  for (int piece = blockIdx.x; piece < pieces && warp < kPieceTiles; piece += gridDim.x) {
    const RowBound row_bounds[2] = {p.bounds[row_of(piece)], p.bounds[row_of(piece) + 8]};
    std::int32_t sums[Groups][4] = {};
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const Chunk at = chunk_at(chunk, piece * kPieceTiles + tile_in_piece, tiles, p.stride);
      const std::byte* a = p.copy + at.offset + lane * 16;
      const std::byte* b =
          p.planes + static_cast<std::size_t>(chunk) * kPlaneChunk<Groups> + lane * 16;
      uint4 upper[kChunkBlocks], lower[kChunkBlocks];
#pragma unroll
      for (int block = 0; block < kChunkBlocks; ++block) {
        if (block < at.blocks) {
          upper[block] = load_streaming(a + block * kBlockBytes);
          lower[block] = load_streaming(a + block * kBlockBytes + kBlockBytes / 2);
        }
      }
#pragma unroll
      for (int block = 0; block < kChunkBlocks; ++block) {
        if (block >= at.blocks) break;
#pragma unroll
        for (int g = 0; g < Groups; ++g) {
          const auto y = *reinterpret_cast<const uint4*>(b + (block * Groups + g) * 512);
          multiply_add(sums[g], upper[block].x, lower[block].x, upper[block].y, lower[block].y, y.x,
                       y.y);
          multiply_add(sums[g], upper[block].z, lower[block].z, upper[block].w, lower[block].w, y.z,
                       y.w);
        }
      }
    }
    write_intervals<Groups>(p, states, row_of(piece), row_bounds, sums, best);
  }
#endif

  // The best lower end of every state: over the warp's rows, the block, the device.
  __shared__ std::uint32_t top[4 * Groups];
  for (int i = threadIdx.x; i < 4 * Groups; i += blockDim.x) top[i] = 0;
  __syncthreads();
#pragma unroll
  for (int g = 0; g < Groups; ++g) {
    float value = best[g];
    for (int offset = 4; offset < kWarp; offset *= 2) {
      value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, offset));
    }
    if (lane < 4) atomicMax(&top[4 * g + lane], ordered(value));
  }
  __syncthreads();
  for (int s = threadIdx.x; s < p.n; s += blockDim.x) atomicMax(&p.rows[s].top, top[s]);
}

template <int Groups, bool Single>
cudaError_t run(const Stage& stage, const Product& args) {
  const auto kernel = product_kernel<Groups, Single>;
  const int pieces = static_cast<int>(int8_rows(args.vocab_size)) / (kTileRows * kTiles<Single>);
  int stages = 0, per_multiprocessor = 1;
  std::size_t shared_bytes = 0;
  cudaError_t error;
  if (stage.overlap) {
    constexpr std::size_t kStageBytes =
        kTiles<Single> * kTileBytes + (Single ? 0 : kPlaneChunk<Groups>);
    constexpr std::size_t kReserved = 8192;  // barriers and the like
    const std::size_t planes = Single ? 2 * static_cast<std::size_t>(args.stride) : 0;
    const std::size_t room = stage.shared_bytes - kReserved;
    if (planes + 2 * kStageBytes > room) return cudaErrorInvalidConfiguration;
    stages = static_cast<int>((room - planes) / kStageBytes);
    stages = stages < kMaxStages<Single> ? stages : kMaxStages<Single>;
    shared_bytes = stages * kStageBytes + planes;
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared_bytes));
  } else {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, kernel,
                                                          kProductThreads, 0);
  }
  if (error != cudaSuccess) return error;
  const int resident = per_multiprocessor * stage.multiprocessors;
  return launch(stage,
                {dim3(pieces < resident ? pieces : resident), dim3(kProductThreads), shared_bytes},
                kernel, args, stages);
}

}  // namespace

cudaError_t quantise_rows(const Stage& stage, const QuantiseRows& args) {
  const int filled = (args.count + kGroupRows - 1) / kGroupRows * kGroupRows;
  quantise_rows_kernel<<<(filled + kRowWarps - 1) / kRowWarps, kRowWarps * kWarp, 0,
                         stage.stream>>>(args);
  return cudaGetLastError();
}

cudaError_t int8_head(const Stage& stage, const Product& args) {
  if (args.n == 1 && stage.overlap) return run<1, true>(stage, args);
  const cudaError_t error =
      launch(stage, {dim3(args.n), dim3(kStateThreads)}, quantise_states_kernel, args);
  if (error != cudaSuccess) return error;
  switch (column_groups(args.n)) {
    case 1:
      return run<1, false>(stage, args);
    case 2:
      return run<2, false>(stage, args);
    case 4:
      return run<4, false>(stage, args);
    default:
      return run<8, false>(stage, args);
  }
}

}  // namespace infemeral::cuda
