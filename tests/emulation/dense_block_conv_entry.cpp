// SPDX-License-Identifier: Apache-2.0
// The kernels of dense_block_conv_launch.h for tests, on raw pointers: each with its plan and with what adds up its
// partial results.
#include <vector>

#include "dense_block/dense_block_conv_launch.h"

using namespace fastdense;  // NOLINT: a test

namespace {

const char* reason(cudaError_t error) { return error == cudaSuccess ? "" : cudaGetErrorString(error); }

NormParams<float> norm_params(const float* norm, int64_t b) {
  return {norm, norm + b, norm + 2 * b, norm + 3 * b, 1e-3f};
}

std::vector<float> unwritten(int64_t count) { return std::vector<float>(size_t(count), std::nanf("")); }

}  // namespace

extern "C" {
void set_schedule(bool backwards, bool early_copies) {
  emulation::backwards = backwards;
  emulation::early_copies = early_copies;
}

// norm: weight, bias, mean, var [4][b].
#define FASTDENSE_CONV(name, T)                                                                                        \
  const char* forward_##name(const ConvShape* s, int64_t processors, int64_t shared, const T* z, const float* norm,    \
                             const T* weight, T* x, int64_t ldx, const int64_t* seed, double rate, float* mean,        \
                             float* var) {                                                                             \
    const ConvPlan plan = plan_conv_forward<T>(*s, processors, shared);                                                \
    if (!plan) return "no plan";                                                                                       \
    std::vector<float> partial = unwritten(plan.splits * 2 * s->k);                                                    \
    std::vector<int64_t> counts(size_t(plan.splits), -1);                                                              \
    const int64_t pixels = s->batch * s->height * s->width;                                                            \
    const DropoutParams dropout{seed, 3, dropout_threshold(rate), 1 / (1 - rate)};                                     \
    unsigned ticket = 0;                                                                                               \
    const BlockMoments moments{partial.data(), counts.data(), &ticket, mean, var, pixels};                             \
    const cudaError_t error = launch_conv_forward<T>(                                                                  \
        {z, norm_params(norm, s->b), weight, int(s->b), int(s->k), {x, ldx}, dropout, moments}, plan, nullptr);        \
    return error == cudaSuccess && ticket != 0 ? "the ticket is not 0 again" : reason(error);                          \
  }                                                                                                                    \
  const char* input_gradient_##name(const ConvShape* s, int64_t processors, int64_t shared, const T* d,                \
                                    const T* weight, int64_t ld, const T* z, const float* norm, T* dv, float* dweight, \
                                    float* dbias) {                                                                    \
    const ConvPlan plan = plan_conv_input_gradient<T>(*s, processors, shared);                                         \
    if (!plan) return "no plan";                                                                                       \
    std::vector<float> partial = unwritten(plan.splits * 2 * s->b);                                                    \
    const NormParams<float> params = norm_params(norm, s->b);                                                          \
    const cudaError_t error = launch_conv_input_gradient<T>(                                                           \
        {d, weight, ld, z, params, int(s->b), int(s->k), dv, partial.data()}, plan, nullptr);                          \
    if (error != cudaSuccess) return reason(error);                                                                    \
    return reason(launch_finalise_sums<float>(                                                                         \
        {partial.data(), plan.splits, params, dweight, dbias, nullptr, nullptr, 0}, s->b, {}, nullptr));               \
  }                                                                                                                    \
  const char* weight_gradient_##name(const ConvShape* s, int64_t processors, int64_t shared, const T* d, const T* z,   \
                                     const float* norm, float* dweight) {                                              \
    const ConvPlan plan = plan_conv_weight_gradient<T>(*s, processors, shared);                                        \
    if (!plan) return "no plan";                                                                                       \
    const int64_t count = s->k * 9 * s->b;                                                                             \
    std::vector<float> partial = unwritten(plan.splits * count);                                                       \
    const cudaError_t error = launch_conv_weight_gradient<T>(                                                          \
        {d, z, norm_params(norm, s->b), int(s->b), int(s->k), partial.data()}, plan, nullptr);                         \
    for (int64_t i = 0; i < count; ++i) {                                                                              \
      dweight[i] = 0;                                                                                                  \
      for (int64_t n = 0; n < plan.splits; ++n) dweight[i] += partial[size_t(n * count + i)];                          \
    }                                                                                                                  \
    return reason(error);                                                                                              \
  }
FASTDENSE_CONV(bfloat16, bfloat16)
FASTDENSE_CONV(float16, half)
FASTDENSE_CONV(float32, float)

// How many tiles, buffers and parts the forward plan has.
void forward_plan(const ConvShape* s, int64_t processors, int64_t shared, int64_t* plan) {
  const ConvPlan p = plan_conv_forward<bfloat16>(*s, processors, shared);
  const int64_t values[] = {p ? p.tiles.count() : 0, p.buffers, p.parts, int64_t(p.shared_bytes)};
  std::copy_n(values, 4, plan);
}
}
