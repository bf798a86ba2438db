#include "kernels/int8_head.h"

#include <algorithm>

#include "kernels/bulk.cuh"
#include "kernels/int8_layout.cuh"
#include "kernels/launch.cuh"
#include "kernels/round_state.cuh"
#include "kernels/score.cuh"
#include "kernels/warpgroup.cuh"

namespace infemeral::cuda {
namespace {

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
struct alignas(16) StateView {
  float scale, scale_factor, error_factor, norm_factor;  // of bound()
  float penalty, inverse_temperature;
  bool covered, needs_lower;
  __device__ StateBound bound() const { return {scale, scale_factor, error_factor, norm_factor}; }
};

// The sum of a state's products with a row, from those with its high and low bytes.
__device__ std::int64_t whole_sum(std::int32_t high, std::int32_t low) {
  return std::int64_t{256} * high + low;
}

// The largest lower end that a thread has seen of a state.
struct LowerEnd {
  float score = -HUGE_VALF;
  int token = -1;
  __device__ void raise(float low, int id) {
    if (low > score) score = low, token = id;
  }
};

// Intervals from the sums of one tile: rows `row` and `row` + 8, each with the high and the low
// plane of state s. `best` becomes that with the largest lower end.
__device__ void write_any_intervals(const Product& p, const StateView* states, int s, int row,
                                    const RowBound (&row_bounds)[2], const std::int32_t (&sums)[4],
                                    LowerEnd& best) {
  if (!states[s].covered) return;
  const StateBound bound = states[s].bound();
  const Scorer score(states[s].penalty, states[s].inverse_temperature,
                     p.seen + static_cast<std::size_t>(s) * p.seen_words);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int id = row + 8 * half;
    if (id >= p.vocab_size) continue;
    const float centre =
        approximate_logit(whole_sum(sums[2 * half], sums[2 * half + 1]), row_bounds[half], bound);
    const std::size_t at = s * score_stride(p.vocab_size) + id;
    if (p.approximate) {
      p.upper[at] = centre;
      continue;
    }
    const float radius = logit_radius(row_bounds[half], bound);
    const float low = score(centre - radius, id);
    p.upper[at] = score(centre + radius, id);
    if (states[s].needs_lower) p.lower[at] = low;
    best.raise(low, id);
  }
}

// The same for all groups of states where none has a repetition penalty: straight code, in which
// the steps of one interval do not wait for another's.
template <int Groups>
__device__ void write_plain_intervals(const Product& p, const StateView* states, int row,
                                      const RowBound (&row_bounds)[2],
                                      const std::int32_t (&sums)[Groups][4],
                                      LowerEnd (&best)[Groups]) {
  const int lane = threadIdx.x % kWarp;
  std::size_t at = lane % 4 * score_stride(p.vocab_size) + row;
#pragma unroll
  for (int g = 0; g < Groups; ++g, at += 4 * score_stride(p.vocab_size)) {
    const StateView state = states[4 * g + lane % 4];
    const StateBound bound = state.bound();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float centre = approximate_logit(whole_sum(sums[g][2 * half], sums[g][2 * half + 1]),
                                             row_bounds[half], bound);
      const float radius = logit_radius(row_bounds[half], bound);
      const float low = (centre - radius) * state.inverse_temperature;
      const float high = (centre + radius) * state.inverse_temperature;
      if (row + 8 * half >= p.vocab_size || !state.covered) continue;
      p.upper[at + 8 * half] = high;
      if (state.needs_lower) p.lower[at + 8 * half] = low;
      best[g].raise(low, row + 8 * half);
    }
  }
}

template <int Groups>
__device__ void write_intervals(const Product& p, const StateView* states, bool penalties, int row,
                                const RowBound (&row_bounds)[2],
                                const std::int32_t (&sums)[Groups][4], LowerEnd (&best)[Groups]) {
  if (!penalties) return write_plain_intervals(p, states, row, row_bounds, sums, best);
#pragma unroll
  for (int g = 0; g < Groups; ++g) {
    write_any_intervals(p, states, 4 * g + threadIdx.x % 4, row, row_bounds, sums[g], best[g]);
  }
}

constexpr int kConsumers = 8;  // warps that multiply a piece
// Teams of those, which take turns at the pieces: while one makes intervals, the other multiplies.
// It pays where there are many intervals a piece.
template <bool Warpgroups>
constexpr int kTeams = Warpgroups ? 2 : 1;
template <bool Warpgroups>  // and one warp that fetches
constexpr int kProductThreads = (kTeams<Warpgroups> * kConsumers + 1) * kWarp;

// Tiles that a block takes at a time, a piece. With one state the memory is the limit, and small
// pieces end at the same time on all multiprocessors: two warps share a tile. With more states
// their planes have to be fetched along with every piece, so that large ones are cheaper: a warp a
// tile.
template <bool Single>
constexpr int kTiles = Single ? kConsumers / 2 : kConsumers;
// Pieces on their way at once. 128 KB are enough to keep the memory busy, and leave room for the
// next kernel to stand by.
template <bool Single>
constexpr int kMaxStages = 32 / kTiles<Single>;

template <int Groups>
constexpr int kPlaneChunk = Groups * 512 * kChunkBlocks;  // bytes of the planes of a chunk

// What a stage of a chunk holds: rows, planes, and with a piece's first chunk its rows' bounds.
template <int Groups, bool Single>
constexpr int kStage = kTiles<Single>*(kTileBytes + kTileRows * int{sizeof(RowBound)}) +
                       (Single ? 0 : kPlaneChunk<Groups>);

// A block goes through pieces of some tiles, chunk by chunk; its warps keep the sums. With bulk
// copies (compute capability 9.0) one more warp keeps `stages` chunks on their way to shared
// memory; elsewhere every warp loads its own part into registers. Multiprocessors do not get equal
// shares of the memory's speed, so they claim pieces as they go.
//
// Single: one state, which every block rounds for itself into its shared memory, while the first
// chunks are on their way. Else the states' planes are fetched along with the chunks.
// Warpgroups: four warps multiply together, where there is such an instruction: the planes come
// from shared memory once for all of them.
template <int Groups, bool Single, bool Warpgroups>
__global__ void __launch_bounds__(kProductThreads<Warpgroups>, 1)
    product_kernel(Product p, int stages) {
  static_assert(Groups == 1 || !Single);
  static_assert(Groups >= 4 || !Warpgroups);
  if constexpr (Warpgroups && !kWarpgroupProducts) return;  // never launched
  constexpr int kPieceTiles = kTiles<Single>;
  extern __shared__ __align__(128) std::byte shared[];
  __shared__ StateView states[4 * Groups];
  __shared__ bool penalties;  // or else something that only write_intervals() does
  const int lane = threadIdx.x % kWarp, warp = __shfl_sync(0xffffffffu, threadIdx.x / kWarp, 0);
  const int tiles = tiles_of(p.vocab_size);
  const int chunks = (p.stride / kAlign + kChunkBlocks - 1) / kChunkBlocks;
  const int tile_in_piece = warp % kPieceTiles;
  LowerEnd best[Groups];
  const auto view = [&](int s, const StateBound& bound, bool covered) {
    const RowRequest& request = p.rows[s].request;
    const Selection selection = request.selection;
    if (request.repetition_penalty != 1) penalties = true;
    states[s] = {bound.scale,       bound.scale_factor,         bound.error_factor,
                 bound.norm_factor, request.repetition_penalty, request.inverse_temperature,
                 covered,           needs_lower_ends(selection)};
  };
  if (threadIdx.x == 0) penalties = p.approximate;
  if (threadIdx.x < 4 * Groups) states[threadIdx.x].covered = false;
  const auto row_of = [&](int piece) {  // the lane's, and that plus 8
    return (piece * kPieceTiles + tile_in_piece) * kTileRows + lane / 4;
  };

#if __CUDA_ARCH__ >= 900
  constexpr int kConsumerWarps = kTeams<Warpgroups> * kConsumers;
  constexpr int kConsumerThreads = kConsumerWarps * kWarp;
  const int pieces = tiles / kPieceTiles;
  constexpr int kSinglePlanes = 128;  // bytes of a block of columns: two of eight columns
  constexpr int kRowBytes = kPieceTiles * kTileBytes;
  constexpr int kBoundsAt = kRowBytes + (Single ? 0 : kPlaneChunk<Groups>);
  constexpr int kBoundBytes = kPieceTiles * kTileRows * sizeof(RowBound);
  constexpr int kStageBytes = kStage<Groups, Single>;
  static_assert(kBoundsAt + kBoundBytes == kStageBytes && kBoundBytes % 128 == 0);
  constexpr int kStages = kMaxStages<Single>;
  // A team sees only what is for it, and each time that a stage was filled for it.
  __shared__ std::uint64_t full[kTeams<Warpgroups>][kStages], empty[kStages];
  __shared__ int piece_in[kStages];  // -1: there are no more
  std::byte* const own_planes = shared + stages * kStageBytes;
  if (threadIdx.x == 0) {
    for (int i = 0; i < stages; ++i) {
      for (auto& of_team : full) barrier_init(&of_team[i], 1);
      barrier_init(&empty[i], kConsumers);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  // Pieces that are everybody's own fill the stages before anything may be claimed.
  const int own_pieces = (stages + chunks - 1) / chunks;
  if (warp == kConsumerWarps) {
    if (lane == 0) {
      struct Place {  // of the chunk that is next
        int stage = 0, chunk = 0, turn = 0, piece;
      } at;
      unsigned parities = 0;  // a bit a stage: how often it was filled
      at.piece = blockIdx.x;
      int claimed = 0;  // the piece after this one, once the own ones are used up
      bool may_claim = false;
      const auto claim = [&] {
        return own_pieces * static_cast<int>(gridDim.x) +
               static_cast<int>(atomicAdd(&p.rows[0].claimed, 1u));
      };
      const auto advance = [&] {
        if (++at.stage == stages) at.stage = 0;
        if (++at.chunk < chunks) return;
        at.chunk = 0;
        if (++at.turn < own_pieces) {
          at.piece += gridDim.x;
        } else {
          at.piece = claimed;
          if (may_claim) claimed = claim();  // known long before it is needed
        }
      };
      const auto full_at = [&](int stage, int turn) {
        return &full[turn % kTeams<Warpgroups>][stage];
      };
      const auto wait_for_room = [&] {
        barrier_wait(&empty[at.stage], ~(parities >> at.stage) & 1);
        parities ^= 1u << at.stage;
      };
      const auto fetch_rows = [&] {
        const Chunk chunk = chunk_at(at.chunk, at.piece * kPieceTiles, tiles, p.stride);
        const int bytes = kPieceTiles * chunk.blocks * kBlockBytes;
        const int bound_bytes = at.chunk == 0 ? kBoundBytes : 0;
        std::byte* const to = shared + at.stage * kStageBytes;
        piece_in[at.stage] = at.piece;
        std::uint64_t* const arrived = full_at(at.stage, at.turn);
        barrier_expect(arrived, bytes + bound_bytes + (Single ? 0 : chunk.blocks * Groups * 512));
        copy_bulk_once(to, p.copy + chunk.offset, bytes, arrived);
        if (bound_bytes > 0) {
          copy_bulk(to + kBoundsAt, p.bounds + at.piece * kPieceTiles * kTileRows, bound_bytes,
                    arrived);
        }
      };
      const auto fetch_planes = [&](int stage, int chunk, int turn) {
        if constexpr (Single) return;
        const int blocks = min(kChunkBlocks, p.stride / kAlign - chunk * kChunkBlocks);
        copy_bulk(shared + stage * kStageBytes + kRowBytes,
                  p.planes + static_cast<std::size_t>(chunk) * kPlaneChunk<Groups>,
                  blocks * Groups * 512, full_at(stage, turn));
      };
      // The weights do not depend on the kernels before: on their way before those have ended.
      int early = 0;
      for (; early < stages && at.turn < own_pieces && at.piece < pieces; ++early) {
        parities ^= 1u << at.stage;
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
      for (int i = 0; i < early; ++i) fetch_planes(i, i % chunks, i / chunks);
      if constexpr (Single) fetch_to_cache();
      while (at.piece < pieces) {
        wait_for_room();
        fetch_rows();
        fetch_planes(at.stage, at.chunk, at.turn);
        advance();
      }
      // The end is a piece for every team.
      for (int team = 0; team < kTeams<Warpgroups>; ++team) {
        wait_for_room();
        piece_in[at.stage] = -1;
        barrier_arrive(full_at(at.stage, at.turn));
        at.stage = (at.stage + chunks) % stages;
        ++at.turn;
      }
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
    constexpr int kSharers = Single ? 2 : 1, kOwnBlocks = kChunkBlocks / kSharers;
    const int first_block = Single ? warp / kPieceTiles * kOwnBlocks : 0;
    __shared__ std::int32_t handed_over[2][kSharers > 1 ? kPieceTiles : 1][kWarp][4];
    RowBound row_bounds[2];
    std::int32_t sums[Groups][4] = {};
    const int team = warp / kConsumers;
    int stage = team * chunks % stages, chunk = 0, piece = 0, turn = 0;
    unsigned parities = 0;  // a bit a stage: how often it was this team's
    if constexpr (!Single) sync_threads<kConsumerThreads>();  // `states` is complete
    while (true) {
      const int blocks = min(kChunkBlocks, p.stride / kAlign - chunk * kChunkBlocks);
      const std::byte* rows = shared + stage * kStageBytes;
      const std::byte* a = rows + (tile_in_piece * blocks + first_block) * kBlockBytes + lane * 16;
      barrier_wait(&full[team][stage], parities >> stage & 1);
      parities ^= 1u << stage;
      if (chunk == 0) {
        piece = __shfl_sync(0xffffffffu, piece_in[stage], 0);
        if (piece < 0) {
          if (lane == 0) barrier_arrive(&empty[stage]);  // the other team's end may be in it
          break;
        }
        const auto* bounds = reinterpret_cast<const RowBound*>(rows + kBoundsAt);
        row_bounds[0] = bounds[tile_in_piece * kTileRows + lane / 4];
        row_bounds[1] = bounds[tile_in_piece * kTileRows + lane / 4 + 8];
      }
      struct Rows {
        uint4 upper, lower;
      };
      const auto load_rows = [&](int i) {  // of block i
        return Rows{*reinterpret_cast<const uint4*>(a + i * kBlockBytes),
                    *reinterpret_cast<const uint4*>(a + i * kBlockBytes + kBlockBytes / 2)};
      };
      const auto multiply = [&](int i, const Rows& own) {
        const int block = first_block + i;
        uint4 y[Groups];
#pragma unroll
        for (int g = 0; g < Groups; ++g) {
          y[g] = make_uint4(0, 0, 0, 0);
          if constexpr (Single) {
            if (lane < kSinglePlanes / 16) {
              y[g] = *reinterpret_cast<const uint4*>(
                  own_planes + (chunk * kChunkBlocks + block) * kSinglePlanes + lane * 16);
            }
          } else {
            y[g] = *reinterpret_cast<const uint4*>(rows + kRowBytes + (block * Groups + g) * 512 +
                                                   lane * 16);
          }
        }
        // In this order: products that add to the same sums wait for each other.
        const uint4 u = own.upper, l = own.lower;
#pragma unroll
        for (int g = 0; g < Groups; ++g) {
          multiply_add(sums[g], u.x, l.x, u.y, l.y, y[g].x, y[g].y);
        }
#pragma unroll
        for (int g = 0; g < Groups; ++g) {
          multiply_add(sums[g], u.z, l.z, u.w, l.w, y[g].z, y[g].w);
        }
      };
      if constexpr (Warpgroups) {
#pragma unroll 1  // products that overlap would add nothing: the memory is slower than they are
        for (int i = 0; i < blocks; ++i) {
          const Rows own = load_rows(i);
          const uint4 u = own.upper, l = own.lower;
          const std::byte* planes = rows + kRowBytes + i * Groups * 512;
          begin_products();
          multiply_add(sums, u.x, l.x, u.y, l.y, columns_at<Groups>(planes));
          multiply_add(sums, u.z, l.z, u.w, l.w, columns_at<Groups>(planes + Groups * 256));
          end_products();
        }
      } else {
        Rows own[kOwnBlocks];
#pragma unroll
        for (int i = 0; i < kOwnBlocks; ++i) {
          if (first_block + i < blocks) own[i] = load_rows(i);
        }
#pragma unroll
        for (int i = 0; i < kOwnBlocks; ++i) {
          if (first_block + i < blocks) multiply(i, own[i]);
        }
      }
      __syncwarp();
      if (lane == 0) barrier_arrive(&empty[stage]);
      if (++stage == stages) stage = 0;
      if (++chunk < chunks) continue;
      chunk = 0;
      if constexpr (Warpgroups) {  // the next one is the other team's
        stage = (stage + chunks) % stages;
      }
      if constexpr (kSharers > 1) {
        auto& handed = handed_over[turn % 2][tile_in_piece][lane];
        if (warp >= kPieceTiles) {
          for (int j = 0; j < 4; ++j) handed[j] = sums[0][j];
        }
        sync_threads<kConsumerThreads>();  // `states` is complete, too
        if (warp < kPieceTiles) {
          for (int j = 0; j < 4; ++j) sums[0][j] += handed[j];
        }
        ++turn;
      }
      if (kSharers == 1 || warp < kPieceTiles) {
        write_intervals(p, states, penalties, row_of(piece), row_bounds, sums, best);
      }
#pragma unroll
      for (auto& of_group : sums) {
#pragma unroll
        for (std::int32_t& sum : of_group) sum = 0;
      }
    }
  }
#else
  (void)stages;
  (void)shared;
  __syncthreads();
  wait_for_previous();
  if (threadIdx.x < p.n) {
    view(threadIdx.x, p.rows[threadIdx.x].bound, p.rows[threadIdx.x].covered != 0);
  }
  __syncthreads();
  // Here a piece is as many tiles as there are warps.
  for (int first = blockIdx.x * kConsumers; first < tiles && warp < kConsumers;
       first += gridDim.x * kConsumers) {
    const int row = (first + warp) * kTileRows + lane / 4;
    const RowBound row_bounds[2] = {p.bounds[row], p.bounds[row + 8]};
    std::int32_t sums[Groups][4] = {};
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const Chunk at = chunk_at(chunk, first + warp, tiles, p.stride);
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
    write_intervals(p, states, penalties, row, row_bounds, sums, best);
  }
#endif

  let_next_start();  // not before: a kernel that stands by slows the copies down, by a microsecond
  // The best lower end of every state: over the warp's rows, the block, the device.
  constexpr int kTops = kTeams<Warpgroups> * kConsumers;
  __shared__ unsigned long long tops[kTops][4 * Groups];
  unsigned long long own[Groups];
#pragma unroll
  for (int g = 0; g < Groups; ++g) own[g] = ordered(best[g].score, best[g].token);
  int group = 0, half = Groups / 2;
#pragma unroll
  for (int offset = 4; offset < kWarp; offset *= 2, half /= 2) {
    if (half == 0) {
      own[0] = Max()(own[0], from_lane_xor(own[0], offset));
      continue;
    }
    // Two lanes that hold the same groups: each goes on with half of them.
    const bool upper = (lane & offset) != 0;
    if (upper) group += half;
#pragma unroll
    for (int g = 0; g < half; ++g) {
      const unsigned long long kept = upper ? own[g + half] : own[g];
      const unsigned long long given = upper ? own[g] : own[g + half];
      own[g] = Max()(kept, from_lane_xor(given, offset));
    }
  }
  if (warp < kTops) tops[warp][4 * group + lane % 4] = own[0];
  __syncthreads();
  for (int s = threadIdx.x; s < p.n; s += blockDim.x) {
    unsigned long long top = 0;
    for (int w = 0; w < kTops; ++w) top = Max()(top, tops[w][s]);
    atomicMax(&p.rows[s].top, top);
  }
}

template <int Groups, bool Single, bool Warpgroups = false>
cudaError_t run(const Stage& stage, const Product& args) {
  const auto kernel = product_kernel<Groups, Single, Warpgroups>;
  const int tiles = static_cast<int>(int8_rows(args.vocab_size)) / kTileRows;
  int stages = 0, per_multiprocessor = 1;
  std::size_t shared_bytes = 0;
  cudaError_t error;
  if (stage.overlap) {
    constexpr std::size_t kStageBytes = kStage<Groups, Single>;
    constexpr std::size_t kReserved = 8192;  // barriers and the like
    const std::size_t planes = Single ? 2 * static_cast<std::size_t>(args.stride) : 0;
    const std::size_t room = stage.shared_bytes - kReserved;
    if (planes + kStageBytes > room) return cudaErrorInvalidConfiguration;
    stages = static_cast<int>((room - planes) / kStageBytes);
    stages = std::min(stages, kMaxStages<Single>);
    shared_bytes = stages * kStageBytes + planes;
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared_bytes));
  } else {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, kernel,
                                                          kProductThreads<Warpgroups>, 0);
  }
  if (error != cudaSuccess) return error;
  const int resident = per_multiprocessor * stage.multiprocessors;
  return launch(stage,
                {dim3(std::min(tiles / kTiles<Single>, resident)),
                 dim3(kProductThreads<Warpgroups>), shared_bytes},
                kernel, args, stages);
}

}  // namespace

cudaError_t int8_head(const Stage& stage, const Product& args) {
  if (args.n == 1 && stage.overlap) return run<1, true>(stage, args);
  const cudaError_t error = quantise_states(stage, args);
  if (error != cudaSuccess) return error;
  switch (column_groups(args.n)) {
    case 1:
      return run<1, false>(stage, args);
    case 2:
      return run<2, false>(stage, args);
    case 4:
      return warpgroup_products(stage, args.n) ? run<4, false, true>(stage, args)
                                               : run<4, false>(stage, args);
    default:
      return warpgroup_products(stage, args.n) ? run<8, false, true>(stage, args)
                                               : run<8, false>(stage, args);
  }
}

}  // namespace infemeral::cuda
