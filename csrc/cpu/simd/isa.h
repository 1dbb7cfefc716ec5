// SPDX-License-Identifier: Apache-2.0
// Which vector instructions the CPU loops may use, chosen when the program runs.
//
// The extension is compiled for the baseline of its architecture, so that one binary runs everywhere; loops
// that gain from wider vectors are compiled once more for each instruction set (per-function targets) and picked by
// current_isa(). FASTDENSE_SIMD=baseline|avx2|avx512|avx512_bf16|amx in the environment chooses a narrower one.
#pragma once

// The matrix tiles of AMX-BF16 need a compiler that knows them and Linux's permission.
#if defined(__x86_64__) && defined(__linux__) && (__has_include(<amxbf16intrin.h>) || __has_include(<amxintrin.h>))
#define FASTDENSE_HAS_AMX
#endif
#if defined(__x86_64__) && __has_include(<avx512bf16intrin.h>)
#define FASTDENSE_HAS_AVX512_BF16
#endif

namespace fastdense {

enum class Isa { kBaseline = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAmx = 4 };

Isa current_isa();

const char* isa_name(Isa isa);

// For tests; throws std::invalid_argument when the machine lacks it.
void set_isa(Isa isa);
void set_isa(const char* name);

}  // namespace fastdense
