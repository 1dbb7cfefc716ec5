// SPDX-License-Identifier: Apache-2.0
// The kernels of cuda/conv1x1/conv1x1_launch.h for tests, on raw pointers.
#include "cuda/conv1x1/conv1x1_launch.h"

using namespace fastdense;  // NOLINT: a test

namespace {

// The reason for a failure, or an empty text.
const char* reason(cudaError_t error) { return error == cudaSuccess ? "" : cudaGetErrorString(error); }

}  // namespace

extern "C" {
void set_schedule(bool backwards, bool early_copies) {
  emulation::backwards = backwards;
  emulation::early_copies = early_copies;
}

// norm: weight, bias, mean, var [4][columns].
#define FASTDENSE_CONV1X1(name, T)                                                                                    \
  int64_t tile_##name(int64_t rows, int64_t width, int64_t multiprocessors) {                                         \
    return conv1x1_tile<T>(rows, width, multiprocessors);                                                             \
  }                                                                                                                   \
  int64_t splits_##name(int64_t rows, int64_t columns, int64_t multiprocessors) {                                     \
    return conv1x1_backward_splits<T>(rows, columns, multiprocessors);                                                \
  }                                                                                                                   \
  const char* forward_##name(const T* x, int64_t ldx, const T* weight, int64_t ldw, T* z, const float* norm,          \
                             float eps, float* partial, int64_t rows, int64_t columns, int64_t width, int64_t tile) { \
    const NormParams<float> params{norm, norm + columns, norm + 2 * columns, norm + 3 * columns, eps};                \
    return reason(launch_conv1x1<T>({{x, ldx}, {weight, ldw}, {z, width}, params, {partial}, {}}, rows, columns,      \
                                    width, tile, (rows + tile - 1) / tile, nullptr));                                 \
  }                                                                                                                   \
  const char* statistics_##name(const T* x, int64_t ldx, const T* weight, int64_t ldw, T* z, const float* norm,       \
                                float eps, float* partial, int64_t* counts, unsigned* ticket, float* statistics,      \
                                int64_t rows, int64_t columns, int64_t width, int64_t tile, int64_t blocks) {         \
    const NormParams<float> params{norm, norm + columns, norm + 2 * columns, norm + 3 * columns, eps};                \
    const BlockMoments moments{partial, counts, ticket, statistics, statistics + width, rows};                        \
    return reason(launch_conv1x1<T>({{x, ldx}, {weight, ldw}, {z, width}, params, moments, {}}, rows, columns, width, \
                                    tile, blocks, nullptr));                                                          \
  }                                                                                                                   \
  const char* backward_##name(const T* dz, const T* x, int64_t ldx, const T* weight, int64_t ldw, T* gradient,        \
                              const float* norm, float eps, float* partial, float* dweight, bool add, int64_t rows,   \
                              int64_t columns, int64_t width, int64_t splits) {                                       \
    const NormParams<float> params{norm, norm + columns, norm + 2 * columns, norm + 3 * columns, eps};                \
    return reason(launch_conv1x1_backward<T>(                                                                         \
        {{dz, width}, {x, ldx}, {weight, ldw}, {gradient, ldx}, params, partial, dweight, add}, rows, columns, width, \
        splits, nullptr));                                                                                            \
  }
FASTDENSE_CONV1X1(bfloat16, bfloat16)
FASTDENSE_CONV1X1(float16, half)
FASTDENSE_CONV1X1(float32, float)

const char* sum_partials(const float* partial, int64_t splits, int64_t count, float* to) {
  return reason(launch_finalise_sums<float>({}, 0, {partial, splits, count, to, 1, count}, nullptr));
}
}
