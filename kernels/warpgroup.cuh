// Products by a warpgroup, four warps together (PTX ISA: wgmma): each warp's 16 rows from its
// registers, the columns from shared memory, where all four share them. Instructions of compute
// capability 9.0a alone; kWarpgroupProducts says whether the code that is being compiled has them.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace infemeral::cuda {

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
inline constexpr bool kWarpgroupProducts = true;
#define INFEMERAL_WARPGROUP_ASM(...) asm volatile(__VA_ARGS__)
#else
inline constexpr bool kWarpgroupProducts = false;
#define INFEMERAL_WARPGROUP_ASM(...) static_cast<void>(0)
#endif

// A matrix descriptor: 8 x Groups columns of 32 bytes in shared memory, in the order of
// warpgroup_plane_offset() (kernels/layout.h): matrices of 8 columns x 16 bytes, first those of all
// columns' first halves.
struct Columns {
  std::uint64_t descriptor;
};
template <int Groups>
__device__ inline Columns columns_at(const std::byte* shared) {
  constexpr std::uint64_t kMatrix = 128 >> 4;  // in units of 16 bytes, as all of a descriptor
  const auto address = static_cast<std::uint64_t>(__cvta_generic_to_shared(shared));
  return {address >> 4 | Groups * kMatrix << 16 | kMatrix << 32};
}

// Between these, `sums` and the rows' registers belong to the products.
__device__ inline void begin_products() {
  INFEMERAL_WARPGROUP_ASM("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ inline void end_products() {
  INFEMERAL_WARPGROUP_ASM(
      "wgmma.commit_group.sync.aligned;\n"
      "wgmma.wait_group.sync.aligned 0;" ::
          : "memory");
}

// sums += a * b: 64 rows x 32 columns times 32 columns x Groups x 8 states' planes, whole numbers.
// Of `a` and of the sums, a warp has what mma.m16n8k32 gives it.
__device__ inline void multiply_add(std::int32_t (&s)[4][4], unsigned a0, unsigned a1, unsigned a2,
                                    unsigned a3, const Columns& b) {
  INFEMERAL_WARPGROUP_ASM(
      "wgmma.mma_async.sync.aligned.m64n32k32.s32.s8.s8 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, "
      "%10, %11, %12, %13, %14, %15}, {%16, %17, %18, %19}, %20, 1;"
      : "+r"(s[0][0]), "+r"(s[0][1]), "+r"(s[0][2]), "+r"(s[0][3]), "+r"(s[1][0]), "+r"(s[1][1]),
        "+r"(s[1][2]), "+r"(s[1][3]), "+r"(s[2][0]), "+r"(s[2][1]), "+r"(s[2][2]), "+r"(s[2][3]),
        "+r"(s[3][0]), "+r"(s[3][1]), "+r"(s[3][2]), "+r"(s[3][3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b.descriptor));
}
__device__ inline void multiply_add(std::int32_t (&s)[8][4], unsigned a0, unsigned a1, unsigned a2,
                                    unsigned a3, const Columns& b) {
  INFEMERAL_WARPGROUP_ASM(
      "wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, "
      "%10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, "
      "%28, %29, %30, %31}, {%32, %33, %34, %35}, %36, 1;"
      : "+r"(s[0][0]), "+r"(s[0][1]), "+r"(s[0][2]), "+r"(s[0][3]), "+r"(s[1][0]), "+r"(s[1][1]),
        "+r"(s[1][2]), "+r"(s[1][3]), "+r"(s[2][0]), "+r"(s[2][1]), "+r"(s[2][2]), "+r"(s[2][3]),
        "+r"(s[3][0]), "+r"(s[3][1]), "+r"(s[3][2]), "+r"(s[3][3]), "+r"(s[4][0]), "+r"(s[4][1]),
        "+r"(s[4][2]), "+r"(s[4][3]), "+r"(s[5][0]), "+r"(s[5][1]), "+r"(s[5][2]), "+r"(s[5][3]),
        "+r"(s[6][0]), "+r"(s[6][1]), "+r"(s[6][2]), "+r"(s[6][3]), "+r"(s[7][0]), "+r"(s[7][1]),
        "+r"(s[7][2]), "+r"(s[7][3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b.descriptor));
}

#undef INFEMERAL_WARPGROUP_ASM

}  // namespace infemeral::cuda
