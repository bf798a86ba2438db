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

}  // namespace
#endif

std::vector<const Kernels*> available_kernels() {
  std::vector<const Kernels*> kernels;
#if defined(__x86_64__)
  if (has_avx512()) kernels.push_back(&kAvx512Kernels);
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
