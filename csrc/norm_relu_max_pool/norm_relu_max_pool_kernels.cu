// SPDX-License-Identifier: Apache-2.0
#include "cuda/for_each.h"
#include "cuda/norm_relu/column_reduce.h"
#include "cuda/norm_relu/columns.h"
#include "norm_relu_max_pool/norm_relu_max_pool_launch.h"

namespace fastdense {
namespace {

// Element i of a tensor [N, C, size]: its indices, and where its image or plane starts in a tensor of other size.
// 32-bit divisions, which GPUs have, within an image.
struct Element {
  int64_t image;
  uint32_t channel, i0, i1, i2;

  __device__ Element(const NormPoolShape& s, const int64_t (&size)[3], int64_t i) {
    const int64_t pixels = size[0] * size[1] * size[2], per_image = s.channels * pixels;
    image = i / per_image;
    const auto in = uint32_t(i - image * per_image);
    const uint32_t inner = s.channels_last ? uint32_t(s.channels) : uint32_t(pixels), outer = in / inner;
    channel = s.channels_last ? in - outer * inner : outer;
    const uint32_t pixel = s.channels_last ? outer : in - outer * inner, size1 = uint32_t(size[1]),
                   size2 = uint32_t(size[2]), line = pixel / size2;
    i2 = pixel - line * size2;
    i0 = line / size1;
    i1 = line - i0 * size1;
  }
  __device__ int64_t origin(const NormPoolShape& s, int64_t pixels) const {
    return s.channels_last ? image * pixels * s.channels + channel : (image * s.channels + channel) * pixels;
  }
};

// From pixel to pixel of a channel.
__device__ __forceinline__ int64_t pixel_step(const NormPoolShape& s) { return s.channels_last ? s.channels : 1; }

template <typename T>
struct PooledValue {
  using A = accumulate_t<T>;
  NormPoolForwardParams<T> p;

  __device__ void operator()(int64_t i) const {
    const MaxPoolGeometry& g = p.shape.g;
    const Element o(p.shape, g.pooled, i);
    const NormCoefficients<A> norm = p.norm(o.channel);
    const T* x = p.x + o.origin(p.shape, g.pixels());
    const int64_t step = pixel_step(p.shape);
    const IndexRange r0 = window_positions(g, 0, o.i0), r1 = window_positions(g, 1, o.i1),
                     r2 = window_positions(g, 2, o.i2);
    A best = 0;
    int index = kNoIndex;
    for (int64_t w0 = r0.begin; w0 < r0.end; ++w0)
      for (int64_t w1 = r1.begin; w1 < r1.end; ++w1) {
        const int64_t line = window_start(g, 0, o.i0, o.i1, o.i2) + (w0 * g.size[1] + w1) * g.size[2];
        for (int64_t w2 = r2.begin; w2 < r2.end; ++w2) {
          const A value = mul_add(A(load(x[(line + w2) * step])), norm.scale, norm.shift);
          if (!takes_lead(value, best)) continue;
          best = value;
          index = int((w0 * g.window[1] + w1) * g.window[2] + w2);
        }
      }
    p.y[i] = store<T>(best);
    if (p.indices) p.indices[i] = uint8_t(index);
  }
};

// Gathers the gradients of the windows whose index is this element, in ascending order.
template <typename T>
struct InputGradient {
  using A = accumulate_t<T>;
  NormPoolBackwardParams<T> p;

  __device__ void operator()(int64_t i) const {
    const MaxPoolGeometry& g = p.shape.g;
    const Element e(p.shape, g.size, i);
    const int64_t origin = e.origin(p.shape, g.pooled_pixels()), step = pixel_step(p.shape);
    const IndexRange r0 = windows_of(g, 0, e.i0), r1 = windows_of(g, 1, e.i1), r2 = windows_of(g, 2, e.i2);
    A dy = 0;
    for (int64_t o0 = r0.begin; o0 < r0.end; ++o0)
      for (int64_t o1 = r1.begin; o1 < r1.end; ++o1)
        for (int64_t o2 = r2.begin; o2 < r2.end; ++o2) {
          const int64_t w0 = e.i0 + g.padding[0] - o0 * g.stride[0], w1 = e.i1 + g.padding[1] - o1 * g.stride[1],
                        w2 = e.i2 + g.padding[2] - o2 * g.stride[2];
          const int64_t at = origin + ((o0 * g.pooled[1] + o1) * g.pooled[2] + o2) * step;
          if (p.indices[at] == (w0 * g.window[1] + w1) * g.window[2] + w2) dy += load(p.grad[at]);
        }
    p.dx[i] = store<T>(
        norm_input_gradient<A>(dy, load(p.x[i]), p.norm(e.channel), p.t1[e.channel], p.t2[e.channel], p.inv_count));
  }
};

// Adds the terms of the pooled value at `at`, whose window starts at pixel `start`, which may lie outside.
template <typename T, typename A>
__device__ __forceinline__ void add_at_index(const NormPoolSumsParams<T>& p, T grad, uint8_t index, int64_t origin,
                                             int64_t start, A mean, A& sum, A& weighted) {
  const int64_t pixel = start + position_offset(p.shape.g, index);
  if (index == kNoIndex || pixel < 0 || pixel >= p.shape.g.pixels()) return;  // a hook may have made up another
  const A g = load(grad);
  const int64_t at = origin + pixel * pixel_step(p.shape);
  sum += g;
  weighted += g * (load(p.x[at]) - mean);
}

// Of pooled pixel `in` within an image, the pixel in it where its window starts.
__device__ __forceinline__ int64_t start_in_image(const MaxPoolGeometry& g, uint32_t in) {
  const auto size1 = uint32_t(g.pooled[1]), size2 = uint32_t(g.pooled[2]);
  const uint32_t line = in / size2, i0 = line / size1;
  return window_start(g, 0, i0, line - i0 * size1, in - line * size2);
}

template <typename T, int V>
class RowSums : public Columns<NormPoolSumsParams<T>, V> {
  using A = accumulate_t<T>;
  using Base = Columns<NormPoolSumsParams<T>, V>;
  using Base::p_, Base::first_, Base::count_;

 public:
  using typename Base::Params;
  static constexpr int kTileRows = 1;
  using State = ColumnSums<A, V>;
  __device__ RowSums(const Params& p, int64_t first, int count) : Base(p, first, count), mean_(p.mean, first, count) {}

  template <int kRows>
  __device__ void tile(int64_t row, int64_t step) {
    for (int r = 0; r < kRows; ++r, row += step) pooled_row(row);
  }
  __device__ State& state() { return state_; }
  __device__ A* partial() const { return p_.partial; }

 private:
  __device__ void pooled_row(int64_t row) {
    const MaxPoolGeometry& g = p_.shape.g;
    const int64_t c = p_.shape.channels, image = row / g.pooled_pixels(), origin = image * g.pixels() * c + first_;
    const int64_t start = start_in_image(g, uint32_t(row - image * g.pooled_pixels()));
    const Vector<T, V> grad = read<V>(p_.grad + row * c + first_, count_);
    const Vector<uint8_t, V> indices = read<V>(p_.indices + row * c + first_, count_);
#pragma unroll
    for (int i = 0; i < V; ++i)
      if (i < count_)
        add_at_index(p_, grad.v[i], indices.v[i], origin + i, start, mean_[i], state_.first(i), state_.second(i));
  }

  const ColumnValues<A, V> mean_;
  State state_;
};

// Blocks take a channel of planes each, threads its values in turns; a split of them as in a reduction.
// body(plane, index in it)
template <typename Body>
__device__ void for_each_of_split(int64_t rows, int64_t pixels, int64_t channels, const Body& body) {
  const int64_t per_split = (rows + gridDim.y - 1) / gridDim.y, begin = blockIdx.y * per_split;
  const int64_t end = begin + per_split < rows ? begin + per_split : rows;
  for (int64_t image = begin / pixels; image * pixels < end; ++image) {
    const int64_t before = image * pixels, last = end - before < pixels ? end - before : pixels;
    for (int64_t i = (begin > before ? begin - before : 0) + threadIdx.y; i < last; i += blockDim.y)
      body(image * channels + blockIdx.x, i);
  }
}

template <typename A, typename State>
__device__ void write_split(State& state, A* partial, int64_t channels) {
  FASTDENSE_SHARED(shared);
  join_lanes<A>(state, shared);
  if (threadIdx.y > 0) return;
  A* to = partial + 2 * int64_t(blockIdx.y) * channels + blockIdx.x;
  to[0] = state.first(0);
  to[channels] = state.second(0);
}

template <typename T>
__global__ void plane_moments_kernel(const __grid_constant__ PlaneMomentsParams<T> p, int64_t rows, int64_t channels) {
  using A = accumulate_t<T>;
  const T first = p.x[blockIdx.x * p.pixels];
  const A pivot = load(first);
  if (blockIdx.y == 0 && threadIdx.y == 0) p.pivot[blockIdx.x] = first;
  ColumnMoments<A, 1> moments;
  for_each_of_split(rows, p.pixels, channels, [&](int64_t plane, int64_t i) {
    const A value[1][1] = {{A(load(p.x[plane * p.pixels + i])) - pivot}};
    moments.add_rows(value);
  });
  write_split<A>(moments, p.partial, channels);
}

template <typename T>
__global__ void plane_sums_kernel(const __grid_constant__ NormPoolSumsParams<T> p, int64_t rows) {
  using A = accumulate_t<T>;
  const MaxPoolGeometry& g = p.shape.g;
  const A mean = p.mean[blockIdx.x];
  ColumnSums<A, 1> sums;
  for_each_of_split(rows, g.pooled_pixels(), p.shape.channels, [&](int64_t plane, int64_t i) {
    const int64_t at = plane * g.pooled_pixels() + i;
    add_at_index(p, p.grad[at], p.indices[at], plane * g.pixels(), start_in_image(g, uint32_t(i)), mean, sums.first(0),
                 sums.second(0));
  });
  write_split<A>(sums, p.partial, p.shape.channels);
}

// A block for a channel and a split.
template <typename A, typename State>
struct PlaneShape {
  dim3 grid, block;
  size_t shared_bytes;
  PlaneShape(int64_t channels, int64_t splits)
      : grid(unsigned(channels), unsigned(splits)),
        block(1, kReduceThreads),
        shared_bytes(State::kNumbers * sizeof(A) * kReduceThreads / 2) {}
};

}  // namespace

template <typename T>
cudaError_t launch_plane_moments(const PlaneMomentsParams<T>& p, int64_t rows, int64_t channels, int64_t splits,
                                 cudaStream_t stream) {
  using A = accumulate_t<T>;
  if (rows == 0 || channels == 0) return cudaSuccess;
  const PlaneShape<A, ColumnMoments<A, 1>> shape(channels, splits);
  FASTDENSE_LAUNCH(plane_moments_kernel, shape.grid, shape.block, shape.shared_bytes, stream, p, rows, channels);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch_norm_pool(const NormPoolForwardParams<T>& p, int64_t count, cudaStream_t stream) {
  return for_each(count, PooledValue<T>{p}, stream);
}

template <typename T>
cudaError_t launch_norm_pool_sums(const NormPoolSumsParams<T>& p, int64_t rows, int64_t splits, cudaStream_t stream) {
  using A = accumulate_t<T>;
  const int64_t channels = p.shape.channels;
  if (rows == 0 || channels == 0) return cudaSuccess;
  if (p.shape.channels_last) {
    const uintptr_t bits = address_bits(p.grad, channels) | reinterpret_cast<uintptr_t>(p.indices) * sizeof(T);
    return launch_column_reduce<RowSums, T>(p, bits, rows, channels, splits, stream);
  }
  const PlaneShape<A, ColumnSums<A, 1>> shape(channels, splits);
  FASTDENSE_LAUNCH(plane_sums_kernel, shape.grid, shape.block, shape.shared_bytes, stream, p, rows);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch_norm_pool_backward(const NormPoolBackwardParams<T>& p, int64_t count, cudaStream_t stream) {
  return for_each(count, InputGradient<T>{p}, stream);
}

#define FASTDENSE_NORM_POOL(T)                                                                                         \
  template cudaError_t launch_plane_moments<T>(const PlaneMomentsParams<T>&, int64_t, int64_t, int64_t, cudaStream_t); \
  template cudaError_t launch_norm_pool<T>(const NormPoolForwardParams<T>&, int64_t, cudaStream_t);                    \
  template cudaError_t launch_norm_pool_sums<T>(const NormPoolSumsParams<T>&, int64_t, int64_t, cudaStream_t);         \
  template cudaError_t launch_norm_pool_backward<T>(const NormPoolBackwardParams<T>&, int64_t, cudaStream_t);
FASTDENSE_FOR_EACH_STORAGE(FASTDENSE_NORM_POOL)
#undef FASTDENSE_NORM_POOL

}  // namespace fastdense
