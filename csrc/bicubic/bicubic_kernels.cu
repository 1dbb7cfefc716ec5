// SPDX-License-Identifier: Apache-2.0
// Resampling on a GPU, by gathering only: no atomics, no zero fill, no shared memory, so any scale fits and reruns are
// bit-identical.  Sums run over the taps in the order of the CPU kernels.
//
// The image kernel resamples both axes at once: a thread owns one output column and marches down a strip of rows; the
// columns of the input rows that it needs roll through registers, so a new row costs `taps` loads and a result `taps`
// multiply-adds.  The axis kernel does one axis, for reductions with many taps and for single axes.
#include <algorithm>
#include <limits>

#include "bicubic/bicubic_launch.h"
#include "cuda/for_each.h"

namespace fastdense {
namespace {

// Index holds the numbers of the result: 32 bits where they are enough, since GPUs do not divide wider ones.
template <typename In, typename Out, typename A, typename Index>
struct ResampleAxis {
  BicubicAxisPass<In, Out, A> p;

  FASTDENSE_HD void operator()(int64_t i) const {
    const auto inner = Index(p.inner), rows = Index(p.band.rows);
    const Index line = Index(i) / inner, at = Index(i) - line * inner, plane = line / rows, row = line - plane * rows;
    const In* in = p.input + (int64_t(plane) * p.band.columns + p.band.start[row]) * p.inner + at;
    const A* weight = p.band.weight + int64_t(row) * p.band.taps;
    A sum = A(0);
    for (int64_t k = 0; k < p.band.taps; ++k) sum = add_tap(weight[k], widen<A>(in[k * p.inner]), sum);
    if constexpr (std::is_same_v<Out, A>) {
      if (p.first) {
        p.output[i] = p.round ? round_between(sum) : sum;
        return;
      }
    }
    if constexpr (!std::is_same_v<Out, int32_t>) {
      if (p.residual) sum += widen<A>(p.residual[i]);
      p.output[i] = finish_sample<Out, A>(sum, p.low, p.high);
    }
  }
};

// Rows of the result that a thread makes.
constexpr int kStrip = 32;

template <int kTaps, typename T, typename A>
__global__ void bicubic_image_kernel(BicubicImagePass<T, A> p) {
  wait_for_kernels_before();
  const int64_t out_width = p.columns.rows * p.inner, in_width = p.width * p.inner;
  const int64_t element = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (element >= out_width) return;
  const int64_t column = element / p.inner;
  const A* weight = p.columns.weight + column * p.columns.taps;
  const int64_t strips = (p.rows.rows + kStrip - 1) / kStrip;
  // A grid is only so high: strips in turns as well as planes.
  for (int64_t plane = blockIdx.z; plane < p.planes; plane += gridDim.z)
    for (int64_t strip = blockIdx.y; strip < strips; strip += gridDim.y) {
      const int64_t begin = strip * kStrip, end = begin + kStrip < p.rows.rows ? begin + kStrip : p.rows.rows;
      const T* in = p.input + plane * p.height * in_width + p.columns.start[column] * p.inner + element % p.inner;
      A rolling[kTaps];  // the last kTaps resampled input rows, up to `next`
      int64_t next = p.rows.start[begin];
      for (int64_t row = begin; row < end; ++row) {
        const int64_t first = p.rows.start[row];
        for (next = next < first ? first : next; next < first + kTaps; ++next) {
          A sum = A(0);
          for (int64_t k = 0; k < p.columns.taps; ++k)
            sum = add_tap(weight[k], widen<A>(in[next * in_width + k * p.inner]), sum);
#pragma unroll
          for (int k = 0; k + 1 < kTaps; ++k) rolling[k] = rolling[k + 1];
          rolling[kTaps - 1] = sum;
        }
        A sum = A(0);
#pragma unroll
        for (int k = 0; k < kTaps; ++k) sum = add_tap(p.rows.weight[row * kTaps + k], rolling[k], sum);
        const int64_t at = (plane * p.rows.rows + row) * out_width + element;
        if (p.residual) sum += widen<A>(p.residual[at]);
        p.output[at] = finish_sample<T, A>(sum, p.low, p.high);
      }
    }
}

template <int kTaps, typename T, typename A>
cudaError_t launch_image(const BicubicImagePass<T, A>& p, cudaStream_t stream) {
  if constexpr (kTaps > 0) {
    if (p.rows.taps < kTaps) return launch_image<kTaps - 1>(p, stream);
    constexpr int64_t kThreads = 128, kMost = 65535;  // of the second and third dimension of a grid
    const int64_t width = p.columns.rows * p.inner, strips = (p.rows.rows + kStrip - 1) / kStrip;
    const dim3 grid(unsigned((width + kThreads - 1) / kThreads), unsigned(std::min(strips, kMost)),
                    unsigned(std::min(p.planes, kMost)));
    FASTDENSE_LAUNCH((bicubic_image_kernel<kTaps, T, A>), grid, dim3(kThreads), 0, stream, p);
  }
  return cudaGetLastError();
}

}  // namespace

template <typename In, typename Out, typename A>
cudaError_t launch_bicubic_axis(const BicubicAxisPass<In, Out, A>& pass, cudaStream_t stream) {
  const int64_t count = pass.planes * pass.band.rows * pass.inner;
  if (count <= std::numeric_limits<uint32_t>::max())
    return for_each(count, ResampleAxis<In, Out, A, uint32_t>{pass}, stream);
  return for_each(count, ResampleAxis<In, Out, A, int64_t>{pass}, stream);
}

template <typename T, typename A>
cudaError_t launch_bicubic_image(const BicubicImagePass<T, A>& pass, cudaStream_t stream) {
  return launch_image<int(kMostRollingTaps)>(pass, stream);
}

#define FASTDENSE_BICUBIC_AXIS(In, Out, A) \
  template cudaError_t launch_bicubic_axis<In, Out, A>(const BicubicAxisPass<In, Out, A>&, cudaStream_t);
// One axis, the first of two, and the second of two.
#define FASTDENSE_BICUBIC(T, A) \
  FASTDENSE_BICUBIC_AXIS(T, T, A) FASTDENSE_BICUBIC_AXIS(T, A, A) FASTDENSE_BICUBIC_AXIS(A, T, A)
FASTDENSE_BICUBIC_AXIS(float, float, float)
FASTDENSE_BICUBIC_AXIS(double, double, double)
FASTDENSE_BICUBIC(bfloat16, float)
FASTDENSE_BICUBIC(half, float)
FASTDENSE_BICUBIC(uint8_t, float)
FASTDENSE_BICUBIC(uint8_t, double)
FASTDENSE_BICUBIC(uint8_t, int32_t)
#undef FASTDENSE_BICUBIC
#undef FASTDENSE_BICUBIC_AXIS

template cudaError_t launch_bicubic_image<float, float>(const BicubicImagePass<float, float>&, cudaStream_t);
template cudaError_t launch_bicubic_image<double, double>(const BicubicImagePass<double, double>&, cudaStream_t);
template cudaError_t launch_bicubic_image<bfloat16, float>(const BicubicImagePass<bfloat16, float>&, cudaStream_t);
template cudaError_t launch_bicubic_image<half, float>(const BicubicImagePass<half, float>&, cudaStream_t);

}  // namespace fastdense
