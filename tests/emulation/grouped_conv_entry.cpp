// SPDX-License-Identifier: Apache-2.0
// The kernels of grouped_conv_launch.h for tests, on raw pointers: each with its plan and with what adds up its partial
// results.
#include <algorithm>
#include <cmath>
#include <vector>

#include "cuda/grouped_conv/grouped_conv_launch.h"

using namespace fastdense;  // NOLINT: a test

namespace {

const char* reason(cudaError_t error) { return error == cudaSuccess ? "" : cudaGetErrorString(error); }

NormParams<float> norm_params(const float* norm, int64_t width) {
  return {norm, norm + width, norm + 2 * width, norm + 3 * width, 1e-3f};
}

std::vector<float> unwritten(int64_t count) { return std::vector<float>(size_t(count), std::nanf("")); }

void copy_plan(const GroupedPlan& p, int64_t* to) {
  const int64_t values[] = {p.channels, p.parts, p.splits, p.buffers, p.tiles.pixels(), int64_t(p.shared_bytes)};
  std::copy_n(values, 6, to);
}

}  // namespace

extern "C" {
void set_schedule(bool backwards, bool early_copies) {
  emulation::backwards = backwards;
  emulation::early_copies = early_copies;
}

// norm: weight, bias, mean, var [4][width].  plans: channels of a part, parts, splits, buffers, pixels of a tile, bytes
// of shared memory of each kernel.
#define FASTDENSE_CONV(name, T)                                                                                        \
  void plans_##name(const GroupedShape* s, int64_t processors, int64_t shared, int64_t* plans) {                       \
    copy_plan(plan_grouped_forward<T>(*s, processors, shared), plans);                                                 \
    copy_plan(plan_grouped_input_gradient<T>(*s, processors, shared), plans + 6);                                      \
    copy_plan(plan_grouped_weight_gradient<T>(*s, processors, shared), plans + 12);                                    \
  }                                                                                                                    \
  const char* forward_##name(const GroupedShape* s, int64_t processors, int64_t shared, const T* z, const float* norm, \
                             const T* weight, T* out, float* mean, float* var) {                                       \
    const GroupedPlan plan = plan_grouped_forward<T>(*s, processors, shared);                                          \
    if (!plan) return "no plan";                                                                                       \
    const int64_t width = s->all_channels(), pixels = s->batch * s->out_height() * s->out_width();                     \
    std::vector<float> partial = unwritten(plan.splits * 2 * width);                                                   \
    std::vector<int64_t> counts(size_t(plan.splits), -1);                                                              \
    unsigned ticket = 0;                                                                                               \
    BlockMoments moments{};                                                                                            \
    if (mean) moments = {partial.data(), counts.data(), &ticket, mean, var, pixels};                                   \
    const cudaError_t error =                                                                                          \
        launch_grouped_forward<T>({z, norm_params(norm, width), weight, int(width), out, moments}, plan, nullptr);     \
    return error == cudaSuccess && ticket != 0 ? "the ticket is not 0 again" : reason(error);                          \
  }                                                                                                                    \
  const char* input_gradient_##name(const GroupedShape* s, int64_t processors, int64_t shared, const T* d,             \
                                    const T* weight, const T* z, const float* norm, T* dv, float* dweight,             \
                                    float* dbias) {                                                                    \
    const GroupedPlan plan = plan_grouped_input_gradient<T>(*s, processors, shared);                                   \
    if (!plan) return "no plan";                                                                                       \
    const int64_t width = s->all_channels();                                                                           \
    std::vector<float> partial = unwritten(plan.splits * 2 * width);                                                   \
    const NormParams<float> params = norm_params(norm, width);                                                         \
    const cudaError_t error = launch_grouped_input_gradient<T>(                                                        \
        {d, weight, z, params, int(width), int(s->height), int(s->width), dv, partial.data()}, plan, nullptr);         \
    if (error != cudaSuccess) return reason(error);                                                                    \
    return reason(launch_finalise_sums<float>(                                                                         \
        {partial.data(), plan.splits, params, dweight, dbias, nullptr, nullptr, 0}, width, {}, nullptr));              \
  }                                                                                                                    \
  const char* weight_gradient_##name(const GroupedShape* s, int64_t processors, int64_t shared, const T* d,            \
                                     const T* z, const float* norm, float* dweight) {                                  \
    const GroupedPlan plan = plan_grouped_weight_gradient<T>(*s, processors, shared);                                  \
    if (!plan) return "no plan";                                                                                       \
    const int64_t width = s->all_channels(), count = width * 9 * s->channels;                                          \
    std::vector<float> partial = unwritten(plan.splits * count);                                                       \
    const cudaError_t error = launch_grouped_weight_gradient<T>(                                                       \
        {d, z, norm_params(norm, width), int(width), partial.data()}, plan, nullptr);                                  \
    for (int64_t i = 0; i < count; ++i) {                                                                              \
      dweight[i] = 0;                                                                                                  \
      for (int64_t n = 0; n < plan.splits; ++n) dweight[i] += partial[size_t(n * count + i)];                          \
    }                                                                                                                  \
    return reason(error);                                                                                              \
  }
FASTDENSE_CONV(bfloat16, bfloat16)
FASTDENSE_CONV(float16, half)
FASTDENSE_CONV(float32, float)
}
