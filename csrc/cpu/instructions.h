// Which instruction sets kernels are compiled for, and which of them this processor has.
#pragma once

#include <c10/util/Exception.h>

#include <optional>
#include <string>

// Other sets are compiled in beside the baseline and chosen when the extension runs, so one binary serves all x86-64.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define THOUGHT_KERNELS_X86 1
#endif

namespace thought_kernels {

enum class Instructions { kBaseline, kAvx2, kAvx512 };

// The widest set that the processor has, or the named one, which tests use to run them all.
inline Instructions choose_instructions(const char* function, const std::optional<std::string>& name) {
    bool avx2 = false, avx512 = false;
#ifdef THOUGHT_KERNELS_X86
    __builtin_cpu_init();
    avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
    if (avx512 && name.value_or("avx512") == "avx512") return Instructions::kAvx512;
    if (avx2 && name.value_or("avx2") == "avx2") return Instructions::kAvx2;
    TORCH_CHECK_VALUE(name.value_or("baseline") == "baseline", function,
                      ": instructions must be None or a set that this processor has (baseline", avx2 ? ", avx2" : "",
                      avx512 ? ", avx512" : "", "), got ", *name);
    return Instructions::kBaseline;
}

}  // namespace thought_kernels
