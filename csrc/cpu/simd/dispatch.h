// SPDX-License-Identifier: Apache-2.0
// Kernels that are compiled once for each instruction set, and the choice between them when the program runs.
//
// <op>_kernels.h declares a function in the namespace of every set by FASTDENSE_EACH_ISA (or FASTDENSE_EACH_ISA_BF16,
// which adds the sets with products of bfloat16), <op>_kernels_impl.h defines it in namespace FASTDENSE_TARGET.
// setup.py writes the files that compile the second once for each set, into build/kernels.
#pragma once

#include <type_traits>
#include <utility>

#include "core/scalar.h"
#include "cpu/simd/isa.h"

// clang-format off
#define FASTDENSE_EACH_ISA(...)         \
  namespace baseline { __VA_ARGS__ }    \
  namespace avx2 { __VA_ARGS__ }        \
  namespace avx512 { __VA_ARGS__ }

#define FASTDENSE_EACH_ISA_BF16(...)    \
  FASTDENSE_EACH_ISA(__VA_ARGS__)       \
  namespace avx512_bf16 { __VA_ARGS__ } \
  namespace amx { __VA_ARGS__ }

// Calls what FASTDENSE_EACH_ISA declared, of the widest set up to `isa` that was compiled.
#if defined(__x86_64__)
#define FASTDENSE_DISPATCH(isa, ...)           \
  ((isa) >= Isa::kAvx512 ? avx512::__VA_ARGS__ \
   : (isa) == Isa::kAvx2 ? avx2::__VA_ARGS__   \
                         : baseline::__VA_ARGS__)
#else
#define FASTDENSE_DISPATCH(isa, ...) ((void)(isa), baseline::__VA_ARGS__)
#endif

// The same for FASTDENSE_EACH_ISA_BF16, whose last two sets serve bfloat16 alone.  A statement: it returns.
#ifdef FASTDENSE_HAS_AMX
#define FASTDENSE_RETURN_AMX(T, isa, ...)    \
  if constexpr (std::is_same_v<T, bfloat16>) \
    if ((isa) == Isa::kAmx) return amx::__VA_ARGS__;
#else
#define FASTDENSE_RETURN_AMX(T, isa, ...)
#endif
#ifdef FASTDENSE_HAS_AVX512_BF16
#define FASTDENSE_RETURN_AVX512_BF16(T, isa, ...) \
  if constexpr (std::is_same_v<T, bfloat16>)      \
    if ((isa) >= Isa::kAvx512Bf16) return avx512_bf16::__VA_ARGS__;
#else
#define FASTDENSE_RETURN_AVX512_BF16(T, isa, ...)
#endif
#define FASTDENSE_RETURN_DISPATCH_BF16(T, isa, ...) \
  FASTDENSE_RETURN_AMX(T, isa, __VA_ARGS__)         \
  FASTDENSE_RETURN_AVX512_BF16(T, isa, __VA_ARGS__) \
  return FASTDENSE_DISPATCH(isa, __VA_ARGS__)
// clang-format on
