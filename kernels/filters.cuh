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
  static constexpr int kCached = 1024;  // in 24 KB: a block has 64 on the oldest devices
  const Candidate* items;
  int n;
  const Candidate* cached;
  unsigned long long* masses;
  float max;
  __device__ float score(int i) const { return i < kCached ? cached[i].score : items[i].score; }
  __device__ int id(int i) const { return i < kCached ? cached[i].id : items[i].id; }
  __device__ double noise(int i) const { return i < kCached ? cached[i].noise : items[i].noise; }
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
  float score;               // the least score that is in
  unsigned long long above;  // the weight of all that are larger
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
  unsigned long long before = 0;
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
        memory.found = {score, larger};
      }
    }
    __syncthreads();
    const Cut cut = memory.found;
    __syncthreads();
    return cut;
  }
  return {from_ordered(prefix), before};
}

// What is known about the tokens that are not among the items (engine/sampling.h's Rest).
struct Rest {
  float ceiling;            // minus infinity: there are none
  unsigned long long mass;  // at most
};
__device__ inline Rest no_rest() {
  return {-HUGE_VALF, 0};
}

// What top-k and top-p say of an item. Where a nucleus ends depends on how much of the mass that
// the rest may have it has.
enum class Kept {
  kNo,
  kPerhaps,
  kYes,
  kUnknown  // it may be kept, and then so may some of the rest
};

struct Filtered {
  float floor = -HUGE_VALF;    // the least score that may be kept
  float certain = -HUGE_VALF;  // the least one that is; infinite: the rest may have kept ones
  __device__ Kept of(float score) const {
    return score < floor          ? Kept::kNo
           : certain == HUGE_VALF ? Kept::kUnknown
           : score < certain      ? Kept::kPerhaps
                                  : Kept::kYes;
  }
};

__device__ inline double enough_of(const RowRequest& request, unsigned long long mass) {
  return request.top_p * static_cast<double>(mass);
}

template <typename Items>
__device__ Filtered filter_many(const Items& items, const RowRequest& request, float max,
                                const Rest& rest) {
  Filtered kept;
  if (request.top_k > 0 && request.top_k < items.n) {
    kept.floor = cut_at(items, kept.floor, max, request.top_k, [](int) { return 1ull; }).score;
  }
  if (request.top_p >= 1) return kept;
  unsigned long long total = 0;  // of what top-k keeps
  for (int i = threadIdx.x; i < items.n; i += blockDim.x) {
    if (items.score(i) >= kept.floor) total += items.mass(i);
  }
  total = block_reduce(total, 0ull, Sum());
  const double enough = enough_of(request, total);
  const double enough_with_rest = enough_of(request, total + rest.mass);
  const float least = kept.floor;
  if (static_cast<double>(total) < enough_with_rest) return {-HUGE_VALF, HUGE_VALF};
  kept.floor = HUGE_VALF;
#pragma unroll 1
  for (double wanted = enough_with_rest;; wanted = enough) {
    const Cut cut = cut_at(items, least, max, wanted, [&](int i) { return items.mass(i); });
    kept = {fminf(kept.floor, cut.score), cut.score};
    if (static_cast<double>(cut.above) < enough) break;
  }
  if (kept.floor <= rest.ceiling) kept.certain = HUGE_VALF;
  return kept;
}

// The same for so few items that each can be compared with all.
inline constexpr int kFew = 512;
struct alignas(16) Few {  // those that top-k keeps, in any order
  unsigned long long masses[kFew];
  float scores[kFew];  // up to a multiple of four there follow minus infinity, and no mass
  int items[kFew];
  int n;
};

// For the whole block. NaN becomes minus infinity.
template <typename Items>
__device__ const Few& share_few(const Items& items, const RowRequest& request, float max) {
  __shared__ Few few;
  __shared__ float4 all[kFew / 4];
  const int n = items.n, k = request.top_k;
  const bool limited = k > 0 && k < n;
  if (threadIdx.x == 0) few.n = limited ? 0 : n;
#pragma unroll 1
  for (int i = threadIdx.x; i < (n + 3) / 4 * 4; i += blockDim.x) {
    const bool exists = i < n && !isnan(items.score(i));
    reinterpret_cast<float*>(all)[i] = exists ? items.score(i) : -HUGE_VALF;
    few.scores[i] = -HUGE_VALF;
    few.masses[i] = 0;
  }
  if (limited) __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    const float own = reinterpret_cast<float*>(all)[i];
    int place = i;
    if (limited) {
      int larger = 0;
#pragma unroll 2
      for (int j = 0; j < n; j += 4) {
        const float4 s = all[j / 4];
        larger += (s.x > own) + (s.y > own) + (s.z > own) + (s.w > own);
      }
      if (larger >= k) continue;
      place = atomicAdd(&few.n, 1);
    }
    few.scores[place] = own;
    few.masses[place] = request.top_p < 1 ? probability_mass(own, max) : 0;
    few.items[place] = i;
  }
  __syncthreads();
  return few;
}

// An item is in the nucleus unless the larger ones have enough without it.
__device__ inline Kept kept_of_few(const Few& few, int place, const RowRequest& request,
                                   const Rest& rest) {
  if (request.top_p >= 1) return Kept::kYes;
  const float own = few.scores[place];
  const auto* scores = reinterpret_cast<const float4*>(few.scores);
  const auto* masses = reinterpret_cast<const ulonglong2*>(few.masses);
  unsigned long long total = 0, larger = 0;
#pragma unroll 2
  for (int j = 0; j < few.n; j += 4) {
    const float4 s = scores[j / 4];
    const ulonglong2 low = masses[j / 2], high = masses[j / 2 + 1];
    total += (low.x + low.y) + (high.x + high.y);
    larger += ((s.x > own ? low.x : 0) + (s.y > own ? low.y : 0)) +
              ((s.z > own ? high.x : 0) + (s.w > own ? high.y : 0));
  }
  const double enough_with_rest = enough_of(request, total + rest.mass);
  if (static_cast<double>(larger) >= enough_with_rest) return Kept::kNo;
  if (own <= rest.ceiling || static_cast<double>(total) < enough_with_rest) {
    return Kept::kUnknown;
  }
  return static_cast<double>(larger) < enough_of(request, total) ? Kept::kYes : Kept::kPerhaps;
}

}  // namespace infemeral::cuda
