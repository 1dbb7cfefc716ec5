// SPDX-License-Identifier: Apache-2.0
// What fused kernels use of a multiprocessor beyond C++, from compute capability 8.0 on: asynchronous copies into
// shared memory, matrix fragments and tensor-core products.  PTX, or under FASTDENSE_EMULATE host twins on the same
// names.
//
// Fragments are those of mma.m16n8: of a [16][kDepth] left factor, a [kDepth][8] right factor and a [16][8] sum, with
// kDepth = 16 numbers of two bytes or 8 of four.  With g = lane / 4 and t = lane % 4 a lane holds, in words of 4 bytes,
//   left    a[0] row g, word t      a[1] row g + 8, word t      a[2] row g, word t + 4      a[3] row g + 8, word t + 4
//   right   b[0] column g, word t   b[1] column g, word t + 4   words running down the column
//   sum     c[0], c[1] row g, columns 2t, 2t + 1                c[2], c[3] row g + 8, the same columns
#pragma once

#include <cstdint>

#include "core/scalar.h"
#include "cuda/launch.h"

namespace fastdense {

// Whether the device that is compiled for has them: kernels of others are left empty by if constexpr.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr bool kTensorCores = false;
#else
constexpr bool kTensorCores = true;
#endif

#ifdef FASTDENSE_EMULATE

// Copies `valid` bytes, a multiple of 4, and clears the rest of kBytes (4, 8 or 16, which both addresses are a multiple
// of) at some time before the wait for its group returns.
template <int kBytes>
void copy_async(void* shared, const void* global, int valid) {
  emulation::check_aligned(shared, kBytes);
  emulation::check_aligned(global, kBytes);
  emulation::block.copy(shared, global, kBytes, valid);
}
inline void commit_copies() { emulation::block.commit(); }
// Until at most kPending of this thread's committed groups are under way; others' copies need a barrier as well.
template <int kPending>
void wait_copies() {
  emulation::block.wait(kPending);
}

// Four [8][8] matrices of two-byte numbers, or [8][4] of four: lane 8 i + r gives the address of row r of matrix i, and
// gets word t of row g of each, or transposed (two-byte numbers only) the numbers 2t and 2t + 1 of column g.
inline void load_matrices(uint32_t (&m)[4], const void* row, int line = __builtin_LINE()) {
  emulation::load_matrices(m, row, false, line);
}
inline void load_matrices_transposed(uint32_t (&m)[4], const void* row, int line = __builtin_LINE()) {
  emulation::load_matrices(m, row, true, line);
}

// c += a * b for numbers of type T; float stands for TF32, whose words must come from tf32_bits().
template <typename T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, int line = __builtin_LINE()) {
  constexpr int kNumbers = 4 / sizeof(T);  // of a word
  emulation::multiply_add(c, a, b0, b1, line, kNumbers, [](uint32_t word, int i) {
    if constexpr (sizeof(T) == 2) {
      return load(T(uint16_t(word >> 16 * i)));
    } else {
      return bit_cast<float>(word);
    }
  });
}

// Rounded to 10 bits of mantissa, to nearest, halves away from zero.
inline uint32_t tf32_bits(float v) {
  const uint32_t bits = bit_cast<uint32_t>(v);
  return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fffffff : (bits + 0x1000) & ~uint32_t(0x1fff);
}

// Two numbers of two bytes in a word, rounded to nearest even.
template <typename T>
uint32_t pack_pair(float low, float high) {
  return to_bits(store<T>(low)) | uint32_t(to_bits(store<T>(high))) << 16;
}

inline void sync_warp(int line = __builtin_LINE()) { emulation::block.warp_barrier(line); }

// What follows from a number is computed anew, not kept in registers from one turn of a loop to the next.
inline void forget(int&) {}

#else

__device__ __forceinline__ uint32_t shared_address(const void* at) {
  return uint32_t(__cvta_generic_to_shared(const_cast<void*>(at)));
}

template <int kBytes>
__device__ __forceinline__ void copy_async(void* shared, const void* global, int valid) {
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(valid)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)), "l"(global),
                 "n"(kBytes), "r"(valid)
                 : "memory");
  }
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ void load_matrices(uint32_t (&m)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&m)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(shared_address(row))
               : "memory");
}

template <typename T>
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

#define FASTDENSE_MULTIPLY_ADD(T, instruction)                                                                       \
  template <>                                                                                                        \
  __device__ __forceinline__ void multiply_add<T>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { \
    asm("mma.sync.aligned." instruction " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"           \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                             \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                                             \
  }
FASTDENSE_MULTIPLY_ADD(bfloat16, "m16n8k16.row.col.f32.bf16.bf16.f32")
FASTDENSE_MULTIPLY_ADD(half, "m16n8k16.row.col.f32.f16.f16.f32")
FASTDENSE_MULTIPLY_ADD(float, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef FASTDENSE_MULTIPLY_ADD

__device__ __forceinline__ uint32_t tf32_bits(float v) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(v));
  return bits;
}

template <typename T>
__device__ __forceinline__ uint32_t pack_pair(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack_pair<bfloat16>(float low, float high) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
template <>
__device__ __forceinline__ uint32_t pack_pair<half>(float low, float high) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

__device__ __forceinline__ void sync_warp() { __syncwarp(); }
__device__ __forceinline__ void forget(int& number) { asm volatile("" : "+r"(number)); }

#endif

template <typename T>
FASTDENSE_HD float low_of_pair(uint32_t word) {
  return load(T(uint16_t(word)));
}
template <typename T>
FASTDENSE_HD float high_of_pair(uint32_t word) {
  return load(T(uint16_t(word >> 16)));
}

// The storage types that tensor cores multiply; float as TF32.  A build for tests may ask for fewer.
#ifndef FASTDENSE_FOR_EACH_TENSOR_CORE_TYPE
#define FASTDENSE_FOR_EACH_TENSOR_CORE_TYPE(X) X(float) X(bfloat16) X(half)
#endif

}  // namespace fastdense
