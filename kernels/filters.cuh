// Top-k and top-p over the items of one row, by one block, without sorting them:
// engine/sampling.h's filters. Tests compile this for the host too (tests/emulated_block.h).
#pragma once

#include "kernels/block.cuh"
#include "kernels/head_types.h"

namespace infemeral::cuda {

// values[b] becomes the sum of values[0 .. b], for N values. For whole blocks.
template <int N, typename T>
__device__ void running_sums(T* values) {
  static_assert(N % kWarp == 0);
  __shared__ T totals[N / kWarp];
  const int lane = threadIdx.x % kWarp;
  for (int i = threadIdx.x; i < N; i += blockDim.x) {
    T sum = values[i];
    for (int offset = 1; offset < kWarp; offset *= 2) {
      const T before = from_lane_below(sum, offset);
      if (lane >= offset) sum += before;
    }
    values[i] = sum;
    if (lane == kWarp - 1) totals[i / kWarp] = sum;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < N; i += blockDim.x) {
    T sum = values[i];
#pragma unroll 1
    for (int w = 0; w < i / kWarp; ++w) sum += totals[w];
    values[i] = sum;
  }
  __syncthreads();
}

// Scores by depth below the maximum, bytes of their bits: a thread each.
inline constexpr int kDigits = 256;
static_assert(kBins <= kDigits);

// exp(score - max) in units of 2^-40, as engine/sampling.h defines it.
__device__ INFEMERAL_ONE_COPY unsigned long long probability_mass(float score, float max) {
  return static_cast<unsigned long long>(exp(static_cast<double>(score) - max) * 0x1p40);
}

// Items to choose from: score, probability_mass below their maximum, id.
struct Candidates {                     // those that select left; the first kCached are at hand
  static constexpr int kCached = 2048;  // in 32 KB: a block has 64 on the oldest devices
  const ScoredToken* items;
  int n;
  const ScoredToken* cached;
  unsigned long long* masses;
  float max;
  __device__ float score(int i) const { return i < kCached ? cached[i].score : items[i].score; }
  __device__ int id(int i) const { return i < kCached ? cached[i].id : items[i].id; }
  __device__ unsigned long long mass(int i) const {
    return i < kCached ? masses[i] : probability_mass(items[i].score, max);
  }
  __device__ void know_max(float largest) {
    max = largest;
#pragma unroll 1
    for (int i = threadIdx.x; i < min(n, kCached); i += blockDim.x) {
      masses[i] = probability_mass(cached[i].score, max);
    }
    __syncthreads();
  }
};
struct Everything {  // all tokens
  const float* scores;
  int n;
  float max;
  __device__ float score(int i) const { return scores[i]; }
  __device__ int id(int i) const { return i; }
  __device__ unsigned long long mass(int i) const { return probability_mass(scores[i], max); }
  __device__ void know_max(float largest) { max = largest; }
};

struct Cut {
  float score;                // the least score that is in
  unsigned long long inside;  // the weight of all that are in
};

// What a block of cut_at shares, whatever the items: memory that is asked for once.
// Weights are below 2^44. They are added in parts of 11 bits, whose sums over 2^21 tokens fit 32
// bits: such additions are what shared memory does in one go, however many meet in one place.
inline constexpr int kParts = 4, kPartBits = 11;
inline constexpr int kListed = 256;
struct CutMemory {
  std::uint32_t parts[kParts][kDigits];
  unsigned long long sums[kDigits];
  float listed[kListed];  // those of the chosen depth, when they are few
  unsigned long long listed_weight[kListed];
  int n_listed;
  unsigned long long above;  // the weight of what is certainly in
  int chosen;
  Cut found;
};
__device__ inline CutMemory& cut_memory() {
  __shared__ CutMemory memory;
  return memory;
}

// The fewest largest scores that weigh `enough` together, ties with the last one included. The
// whole block calls it; the scores from `floor` on must weigh that much. First by depth below the
// maximum, where scores spread, then, among those of one depth, eight bits at a time.
template <typename Items, typename Weight>
__device__ Cut cut_at(const Items& items, float floor, float max, double enough,
                      const Weight& weight) {
  constexpr int kPerNat = 8;
  CutMemory& memory = cut_memory();
  auto& parts = memory.parts;
  auto& sums = memory.sums;
  auto& listed = memory.listed;
  auto& listed_weight = memory.listed_weight;
  int &n_listed = memory.n_listed, &chosen = memory.chosen;
  if (threadIdx.x == 0) {
    chosen = kDigits - 1;  // should NaN leave too few
    memory.above = 0;
  }
  const auto depth_of = [&](float score) {
    const float depth = (max - score) * kPerNat;
    return depth < kDigits - 1 ? static_cast<int>(depth) : kDigits - 1;
  };
  const auto weight_at = [&](int digit) {
    unsigned long long sum = 0;
    for (int part = 0; part < kParts; ++part) {
      sum += static_cast<unsigned long long>(parts[part][digit]) << (part * kPartBits);
    }
    return sum;
  };
  if (threadIdx.x == 0) n_listed = 0;
  unsigned long long before = 0, last = 0;
  int depth = 0;
  std::uint32_t prefix = 0;
#pragma unroll 1
  for (int shift = 32; shift >= 0; shift -= 8) {
    for (int i = threadIdx.x; i < kParts * kDigits; i += blockDim.x) {
      parts[i / kDigits][i % kDigits] = 0;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < items.n; i += blockDim.x) {
      const float score = items.score(i);
      if (!(score >= floor)) continue;
      int digit = depth_of(score);
      if (shift < 32) {
        const std::uint32_t key = ordered(score);
        if (digit != depth || (shift < 24 && (key ^ prefix) >> (shift + 8) != 0)) continue;
        digit = 255 - static_cast<int>(key >> shift & 255);  // the largest come first
      }
      const unsigned long long w = weight(i);
      for (int part = 0; part < kParts; ++part) {
        const auto bits =
            static_cast<std::uint32_t>(w >> (part * kPartBits)) & ((1u << kPartBits) - 1);
        if (bits != 0) atomicAdd(&parts[part][digit], bits);
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kDigits; i += blockDim.x) sums[i] = weight_at(i);
    __syncthreads();
    running_sums<kDigits>(sums);
    if (threadIdx.x < kDigits) {
      const unsigned long long until = before + sums[threadIdx.x],
                               from = before + (threadIdx.x > 0 ? sums[threadIdx.x - 1] : 0);
      if (static_cast<double>(until) >= enough && static_cast<double>(from) < enough) {
        chosen = threadIdx.x;
        memory.above = from;
      }
    }
    __syncthreads();
    before = memory.above;
    last = weight_at(chosen);
    if (shift < 32) {
      prefix |= static_cast<std::uint32_t>(255 - chosen) << shift;
      __syncthreads();
      continue;
    }
    depth = chosen;
    for (int i = threadIdx.x; i < items.n; i += blockDim.x) {
      const float score = items.score(i);
      if (!(score >= floor) || depth_of(score) != depth) continue;
      const int at = atomicAdd(&n_listed, 1);
      if (at >= kListed) continue;
      listed[at] = score;
      listed_weight[at] = weight(i);
    }
    __syncthreads();
    if (n_listed > kListed) continue;  // bit by bit
    if (threadIdx.x < n_listed) {
      const float score = listed[threadIdx.x];
      unsigned long long larger = before, equal = 0;
      for (int i = 0; i < n_listed; ++i) {
        if (listed[i] > score) larger += listed_weight[i];
        if (listed[i] == score) equal += listed_weight[i];
      }
      if (static_cast<double>(larger) < enough && static_cast<double>(larger + equal) >= enough) {
        memory.found = {score, larger + equal};
      }
    }
    __syncthreads();
    const Cut cut = memory.found;
    __syncthreads();
    return cut;
  }
  return {from_ordered(prefix), before + last};
}

// What is known about the tokens that are not among the items (engine/sampling.h's Rest).
struct Rest {
  float ceiling;            // minus infinity: there are none
  unsigned long long mass;  // at most
};
__device__ inline Rest no_rest() {
  return {-HUGE_VALF, 0};
}

// What top-k and top-p keep: all scores from `floor` on.
struct Filtered {
  float floor = -HUGE_VALF;
  unsigned long long total = 0;   // the probability of what top-k kept
  unsigned long long inside = 0;  // and of what top-p kept of it
  Rest rest = no_rest();          // of the whole block
};

// What the threads of a block know together.
struct Totals {
  unsigned long long kept;
  Rest rest;
};
__device__ inline Totals from_lane_xor(const Totals& t, int offset) {
  return {from_lane_xor(t.kept, offset),
          {from_lane_xor(t.rest.ceiling, offset), from_lane_xor(t.rest.mass, offset)}};
}
__device__ inline Totals totals_in_block(const Totals& own) {
  const auto add = [](const Totals& a, const Totals& b) -> Totals {
    return {a.kept + b.kept, {fmaxf(a.rest.ceiling, b.rest.ceiling), a.rest.mass + b.rest.mass}};
  };
  return block_reduce(own, Totals{0, no_rest()}, add);
}

// `rest` is this thread's part of it.
template <typename Items>
__device__ Filtered filter_many(const Items& items, const RowRequest& request, float max,
                                const Rest& rest) {
  Filtered kept;
  if (request.top_k > 0 && request.top_k < items.n) {
    kept.floor = cut_at(items, kept.floor, max, request.top_k, [](int) { return 1ull; }).score;
  }
  if (request.top_p >= 1) return kept;
  Totals totals = {0, rest};
  for (int i = threadIdx.x; i < items.n; i += blockDim.x) {
    if (items.score(i) >= kept.floor) totals.kept += items.mass(i);
  }
  totals = totals_in_block(totals);
  kept.total = totals.kept;
  kept.rest = totals.rest;
  const auto mass = [&](int i) { return items.mass(i); };
  const Cut cut =
      cut_at(items, kept.floor, max, request.top_p * static_cast<double>(kept.total), mass);
  kept.floor = cut.score;
  kept.inside = cut.inside;
  return kept;
}

// The same for so few that it can be counted what goes before each: they are sorted then.
inline constexpr int kFew = 512;
template <typename Items>
__device__ Filtered filter_few(const Items& items, const RowRequest& request, const Rest& rest) {
  __shared__ float4 given[kFew / 4];
  __shared__ float sorted[kFew];
  __shared__ unsigned long long sums[kFew];  // of the masses down to each
  __shared__ float floor;
  __shared__ unsigned long long inside;
  const int n = items.n;
  const auto exists = [&](int i) { return i < n && !isnan(items.score(i)); };
#pragma unroll 1
  for (int own = threadIdx.x; own < kFew; own += blockDim.x) {
    reinterpret_cast<float*>(given)[own] = exists(own) ? items.score(own) : -HUGE_VALF;
  }
  __syncthreads();
#pragma unroll 1
  for (int own = threadIdx.x; own < kFew; own += blockDim.x) {
    const float score = reinterpret_cast<const float*>(given)[own];
    const int warp = own / kWarp * kWarp;  // whose items are told apart one by one
    int place = own;                       // of what is not an item: where it is, behind the others
    if (own < n) {
      place = 0;
#pragma unroll 2
      for (int i = 0; i < warp; i += 4) {
        const float4 s = given[i / 4];
        place += (s.x >= score) + (s.y >= score) + (s.z >= score) + (s.w >= score);
      }
#pragma unroll 4
      for (int i = warp; i < warp + kWarp; ++i) {
        const float s = reinterpret_cast<const float*>(given)[i];
        place += s > score || (s == score && i < own);
      }
#pragma unroll 2
      for (int i = warp + kWarp; i < n; i += 4) {
        const float4 s = given[i / 4];
        place += (s.x > score) + (s.y > score) + (s.z > score) + (s.w > score);
      }
    }
    sorted[place] = score;
    sums[place] = exists(own) && request.top_p < 1 ? items.mass(own) : 0;
  }
  __syncthreads();
  Filtered kept;
  if (request.top_k > 0 && request.top_k < n) kept.floor = sorted[request.top_k - 1];
  if (request.top_p >= 1) return kept;
  Totals totals = {0, rest};
#pragma unroll 1
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    if (sorted[i] >= kept.floor) totals.kept += sums[i];
  }
  totals = totals_in_block(totals);
  kept.total = totals.kept;
  kept.rest = totals.rest;
  running_sums<kFew>(sums);
  const double enough = request.top_p * static_cast<double>(kept.total);
#pragma unroll 1
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    if (static_cast<double>(sums[i]) >= enough &&
        (i == 0 || static_cast<double>(sums[i - 1]) < enough)) {
      floor = sorted[i];
    }
  }
  __syncthreads();
  kept.floor = floor;
#pragma unroll 1
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    // With the last of those that are equal to it.
    if (sorted[i] == kept.floor && (i + 1 == n || sorted[i + 1] != kept.floor)) inside = sums[i];
  }
  __syncthreads();
  kept.inside = inside;
  return kept;
}

}  // namespace infemeral::cuda
