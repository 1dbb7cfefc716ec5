// SPDX-License-Identifier: Apache-2.0
// Closes what cpu/simd/target.h opened.
#ifdef FASTDENSE_TARGET_ISA
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
