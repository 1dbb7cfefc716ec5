// SPDX-License-Identifier: Apache-2.0
// One warp that multiplies by way of cuda/mma.h, to test its host twins.
#include "cuda/mma.h"

using namespace fastdense;  // NOLINT: a test

namespace {

enum Fault { kNone, kEarlyRead, kMisaligned, kOtherProduct };

// out [16][8] = left [16][32 bytes] * right, `right` [8][32 bytes] by columns or, transposed, [16][8] by rows; both
// come by asynchronous copies in a group each, of which only `valid` bytes of every 16 exist.
template <typename T>
__global__ void product_kernel(const unsigned char* left, const unsigned char* right, float* out, bool transposed,
                               int valid, int fault) {
  wait_for_kernels_before();
  FASTDENSE_SHARED(shared);
  const unsigned lane = threadIdx.x;
  unsigned char *a = shared, *b = shared + 512;
  copy_async<16>(a + 16 * lane, left + 16 * lane, valid);
  commit_copies();
  if (lane < 16) copy_async<16>(b + 16 * lane, right + 16 * lane, 16);
  commit_copies();
  if (fault == kEarlyRead) {
    wait_copies<1>();
  } else {
    wait_copies<0>();
  }
  sync_warp();
  if (fault == kMisaligned) ++a;
  uint32_t l[4], r[4];
  load_matrices(l, a + 32 * (lane % 16) + 16 * (lane / 16));
  if (transposed) {
    load_matrices_transposed(r, b + 16 * (lane % 16));
  } else {
    load_matrices(r, b + 32 * (lane % 8) + 16 * (lane / 8 % 2));
  }
  float sum[4] = {};
  if (fault == kOtherProduct && lane == 3) {
    multiply_add<T>(sum, l, r[0], r[1]);
  } else {
    multiply_add<T>(sum, l, r[0], r[1]);
  }
  const unsigned row = lane / 4, column = 2 * (lane % 4);
  for (unsigned i = 0; i < 4; ++i) out[8 * (row + 8 * (i / 2)) + column + i % 2] = sum[i];
}

}  // namespace

extern "C" {
// The reason for a failure, or an empty text.
#define FASTDENSE_PRODUCT(name, T)                                                                                   \
  const char* product_##name(const void* left, const void* right, float* out, bool transposed, int valid, int fault, \
                             bool backwards, bool early) {                                                           \
    emulation::backwards = backwards;                                                                                \
    emulation::early_copies = early;                                                                                 \
    FASTDENSE_LAUNCH(product_kernel<T>, dim3(1), dim3(32), 512 + 256, nullptr,                                       \
                     static_cast<const unsigned char*>(left), static_cast<const unsigned char*>(right), out,         \
                     transposed, valid, fault);                                                                      \
    const cudaError_t error = cudaGetLastError();                                                                    \
    return error == cudaSuccess ? "" : cudaGetErrorString(error);                                                    \
  }
FASTDENSE_PRODUCT(bfloat16, bfloat16)
FASTDENSE_PRODUCT(float16, half)
FASTDENSE_PRODUCT(float32, float)

uint32_t round_to_tf32(float v) { return tf32_bits(v); }
uint32_t pack_bfloat16(float low, float high) { return pack_pair<bfloat16>(low, high); }
}
