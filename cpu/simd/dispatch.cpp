#include "cpu/simd/dispatch.h"

#include <cstdlib>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace infemeral::simd {

extern const Kernels kPortableKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern void (*const kAvxVnniDotI8)(const Int8Product&);
extern void (*const kAvx512VnniDotI8)(const Int8Product&);

namespace {

// Not every compiler's __builtin_cpu_supports knows F16C.
bool has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}

bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

// A bit that __builtin_cpu_supports has a name for in new compilers only.
bool has_avx_vnni() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned kAvxVnni = 1u << 4;
  return has_avx2() && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 &&
         (eax & kAvxVnni) != 0;
}

bool has_avx512_vnni() {
  return has_avx512() && __builtin_cpu_supports("avx512vnni");
}

Kernels with_dot_i8(Kernels kernels, const char* name, void (*dot_i8)(const Int8Product&)) {
  kernels.name = name;
  kernels.dot_i8 = dot_i8;
  return kernels;
}

}  // namespace
#endif

std::vector<const Kernels*> available_kernels() {
  std::vector<const Kernels*> kernels;
#if defined(__x86_64__)
  static const Kernels avx512_vnni = with_dot_i8(kAvx512Kernels, "avx512vnni", kAvx512VnniDotI8);
  static const Kernels avx_vnni = with_dot_i8(kAvx2Kernels, "avxvnni", kAvxVnniDotI8);
  if (has_avx512_vnni()) kernels.push_back(&avx512_vnni);
  if (has_avx512()) kernels.push_back(&kAvx512Kernels);
  if (has_avx_vnni()) kernels.push_back(&avx_vnni);
  if (has_avx2()) kernels.push_back(&kAvx2Kernels);
#endif
  kernels.push_back(&kPortableKernels);
  return kernels;
}

absl::StatusOr<const Kernels*> choose_kernels() {
  const std::vector<const Kernels*> kernels = available_kernels();
  const char* wanted = std::getenv("INFEMERAL_ISA");
  if (wanted == nullptr || *wanted == '\0') return kernels.front();
  for (const Kernels* k : kernels) {
    if (std::string_view(wanted) == k->name) return k;
  }
  return absl::InvalidArgumentError(absl::StrCat(
      "INFEMERAL_ISA is \"", wanted, "\"; this machine has ",
      absl::StrJoin(kernels, ", ",
                    [](std::string* out, const Kernels* k) { absl::StrAppend(out, k->name); })));
}

}  // namespace infemeral::simd
