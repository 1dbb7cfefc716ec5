// SPDX-License-Identifier: Apache-2.0
// Opens the code of one instruction set.  A file that setup.py writes includes <op>_kernels.h and with it every shared
// header (so that shared inline functions stay portable), defines FASTDENSE_TARGET (a namespace) and
// FASTDENSE_TARGET_<SET>, includes this file, then <op>_kernels_impl.h, and ends with cpu/simd/target_end.h.
// FASTDENSE_TARGET_PAIRS: instructions that multiply bfloat16 pair by pair.
#if defined(FASTDENSE_TARGET_AVX2) || defined(FASTDENSE_TARGET_AVX512)
#include <immintrin.h>
#endif

#if defined(FASTDENSE_TARGET_AMX)
#define FASTDENSE_TARGET_ISA "amx-tile,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"
#elif defined(FASTDENSE_TARGET_PAIRS)
#define FASTDENSE_TARGET_ISA "avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"
#elif defined(FASTDENSE_TARGET_AVX512)
#define FASTDENSE_TARGET_ISA "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"
#elif defined(FASTDENSE_TARGET_AVX2)
#define FASTDENSE_TARGET_ISA "avx2,fma,f16c"
#endif

#ifdef FASTDENSE_TARGET_ISA
#define FASTDENSE_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define FASTDENSE_PUSH(isa) FASTDENSE_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
FASTDENSE_PUSH(FASTDENSE_TARGET_ISA)
#else
#define FASTDENSE_PUSH(isa) FASTDENSE_PRAGMA(GCC target(isa))
#pragma GCC push_options
FASTDENSE_PUSH(FASTDENSE_TARGET_ISA)
#endif
#endif
