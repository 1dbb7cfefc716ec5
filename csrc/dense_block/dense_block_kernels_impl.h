// SPDX-License-Identifier: Apache-2.0
// The kernels of dense_block_kernels.h for one target.
//
// Convolution.  The growth rate k is small, so the taps are unrolled on the narrow side: forward, one product makes all
// taps' contributions [rows, taps * k] of every input pixel, which are then added up at their output pixels; backward,
// the k-channel gradient is gathered at the taps [rows, taps * k] and serves both products, with respect to the input
// and to the weight.  No wide im2col, no padding arithmetic, and every product is a plain matrix product.

#include "common/gemm.h"
#include "dense_block/dense_block_sweeps.h"

namespace fastdense::FASTDENSE_TARGET {

// Columns of a backward product that are worked on at once, a multiple of every panel width.
constexpr int64_t kColumnBlock = 256;
// Bytes of activated rows that a forward chunk keeps in L2.
constexpr int64_t kForwardBytes = 192 * 1024;

template <typename A>
constexpr int64_t padded(int64_t n) {
  return (n + kPanel<A> - 1) / kPanel<A> * kPanel<A>;
}

template <typename A>
constexpr int64_t chunk_rows(int64_t channels) {
  const int64_t fit = kForwardBytes / int64_t(sizeof(A)) / (channels > 0 ? channels : 1);
  const int64_t rows = fit < 48 ? 48 : fit > 384 ? 384 : fit;
  return rows / kTileRows * kTileRows;
}

// Row stride of row-major scratch: off the power of two, so that rows do not fall into the same cache set.
template <typename A>
constexpr int64_t scratch_ld(int64_t n) {
  return padded<A>(n) + 16;
}

template <typename A>
void pack(const A* w, int64_t depth, int64_t n, int64_t depth_stride, int64_t column_stride, int64_t first_panel,
          int64_t last_panel, A* panels) {
  for (int64_t p = first_panel; p < last_panel; ++p) {
    const int64_t j = p * kPanel<A>, width = n - j < kPanel<A> ? n - j : kPanel<A>;
    A* out = panels + j * depth;
    for (int64_t k = 0; k < depth; ++k, out += kPanel<A>) {
      const A* in = w + k * depth_stride + j * column_stride;
      for (int64_t i = 0; i < width; ++i) out[i] = in[i * column_stride];
      for (int64_t i = width; i < kPanel<A>; ++i) out[i] = 0;
    }
  }
}

template <typename T, typename A = accumulate_t<T>>
void product(const Source<T>& s, const PoolGeometry* pool, int64_t row, int64_t rows, const A* panels, int64_t n,
             T* out, int64_t ldo, double* mean, double* m2, A* scratch) {
  const int64_t ldy = scratch_ld<A>(s.channels), ldc = padded<A>(n);
  A *y = scratch, *c = scratch + rows * ldy;
  if (pool)
    activate_pooled(s, *pool, row, rows, y, ldy, 0, s.channels);
  else
    activate(s, row, rows, y, ldy);
  gemm(rows, s.channels, n, y, ldy, panels, c, ldc);
  store_rows(c, ldc, rows, n, out + row * ldo, ldo, mean, m2);
}

struct PixelIndex {
  int64_t i[3];
  explicit PixelIndex(const ConvGeometry& g, int64_t pixel)
      : i{pixel / g.plane(), pixel / g.size[2] % g.size[1], pixel % g.size[2]} {}
  void next(const ConvGeometry& g) {
    if (++i[2] < g.size[2]) return;
    i[2] = 0;
    if (++i[1] < g.size[1]) return;
    i[1] = 0;
    ++i[0];
  }
};

// Calls visit(tap, pixel) for every tap at which input pixel p meets an output pixel q = p - offset(tap) whose
// outermost index lies in [begin, end), and outside(tap) for the others.
template <typename Visit, typename Outside>
inline void for_each_tap(const ConvGeometry& g, const PixelIndex& p, int64_t begin, int64_t end, Visit visit,
                         Outside outside) {
  int64_t tap = 0;
  for (int64_t t0 = 0; t0 < g.kernel[0]; ++t0) {
    const int64_t q0 = p.i[0] - t0 + g.kernel[0] / 2;
    for (int64_t t1 = 0; t1 < g.kernel[1]; ++t1) {
      const int64_t q1 = p.i[1] - t1 + g.kernel[1] / 2;
      const bool inside = begin <= q0 && q0 < end && 0 <= q1 && q1 < g.size[1];
      for (int64_t t2 = 0; t2 < g.kernel[2]; ++t2, ++tap) {
        const int64_t q2 = p.i[2] - t2 + g.kernel[2] / 2;
        if (inside && 0 <= q2 && q2 < g.size[2])
          visit(tap, (q0 * g.size[1] + q1) * g.size[2] + q2);
        else
          outside(tap);
      }
    }
  }
}

// out[slab pixels, k] += contributions t[rows, taps * k] of the input pixels from `pixel` on.
template <typename A>
inline void scatter_taps(const ConvGeometry& g, int64_t begin, int64_t end, int64_t pixel, int64_t rows, int64_t k,
                         const A* t, int64_t ldt, A* out) {
  const int64_t first = begin * g.plane();
  PixelIndex p(g, pixel);
  for (int64_t r = 0; r < rows; ++r, p.next(g)) {
    const A* row = t + r * ldt;
    for_each_tap(
        g, p, begin, end,
        [&](int64_t tap, int64_t q) {
          A* __restrict o = out + (q - first) * k;
          const A* contribution = row + tap * k;
          for (int64_t j = 0; j < k; ++j) o[j] += contribution[j];
        },
        [](int64_t) {});
  }
}

// t[rows, taps * k] = the gradient d[pixels, k] of all images gathered at the taps of the rows from `row` on.
template <typename A>
inline void gather_taps(const ConvGeometry& g, int64_t row, int64_t rows, int64_t k, const A* d, A* t, int64_t ldt) {
  const int64_t pixels = g.pixels();
  int64_t image = row / pixels;
  PixelIndex p(g, row % pixels);
  for (int64_t r = 0; r < rows; ++r) {
    if (p.i[0] == g.size[0]) {
      ++image;
      p = PixelIndex(g, 0);
    }
    A* out = t + r * ldt;
    const A* in = d + image * pixels * k;
    for_each_tap(
        g, p, 0, g.size[0],
        [&](int64_t tap, int64_t q) {
          A* __restrict o = out + tap * k;
          for (int64_t j = 0; j < k; ++j) o[j] = in[q * k + j];
        },
        [&](int64_t tap) {
          for (int64_t j = 0; j < k; ++j) out[tap * k + j] = 0;
        });
    p.next(g);
  }
}

// v[rows, k] *= dropout factors (0 or 1 / (1 - rate)); the mask is a function of (seed, layer, row, channel).
template <typename A>
inline void apply_dropout(const Dropout& dropout, int64_t row, int64_t rows, int64_t k, A* v) {
  if (dropout.rate == 0) return;
  const uint64_t threshold = dropout_threshold(dropout.rate);
  const A factor = dropout.rate < 1 ? A(1 / (1 - dropout.rate)) : A(0);
  for (int64_t i = 0; i < rows * k; ++i)
    v[i] = dropout_keep(dropout.seed, dropout.layer, uint64_t(row * k + i), threshold) ? v[i] * factor : A(0);
}

template <typename T, typename A = accumulate_t<T>>
void conv(const Source<T>& s, const ConvGeometry& g, int64_t image, int64_t begin, int64_t end, const A* panels,
          int64_t k, T* slice, int64_t lds, const Dropout& dropout, double* mean, double* m2, A* scratch) {
  const int64_t plane = g.plane(), halo = g.kernel[0] / 2, slab = (end - begin) * plane;
  const int64_t n = g.taps() * k, ldu = scratch_ld<A>(s.channels), ldt = padded<A>(n);
  const int64_t step = chunk_rows<A>(s.channels > n ? s.channels : n);
  A *out = scratch, *u = out + slab * k, *t = u + step * ldu;
  for (int64_t i = 0; i < slab * k; ++i) out[i] = 0;
  const int64_t last = (end + halo < g.size[0] ? end + halo : g.size[0]) * plane;
  for (int64_t pixel = (begin > halo ? begin - halo : 0) * plane; pixel < last; pixel += step) {
    const int64_t rows = last - pixel < step ? last - pixel : step;
    activate(s, image * g.pixels() + pixel, rows, u, ldu);
    gemm(rows, s.channels, n, u, ldu, panels, t, ldt);
    scatter_taps(g, begin, end, pixel, rows, k, t, ldt, out);
  }
  const int64_t row = image * g.pixels() + begin * plane;
  apply_dropout(dropout, row, slab, k, out);
  store_rows(out, k, slab, k, slice + row * lds, lds, mean, m2);
}

template <typename T, typename A = accumulate_t<T>>
void finalise(const T* g, const T* x, int64_t ld, int64_t row, int64_t rows, int64_t n, const A* mean,
              const A* shift_sum, const A* slope_sum, const Dropout& dropout, A* d) {
  for (int64_t r = row; r < row + rows; ++r)
    for (int64_t j = 0; j < n; ++j)
      d[r * n + j] =
          finalise_gradient<A>(load(g[r * ld + j]), load(x[r * ld + j]), mean[j], shift_sum[j], slope_sum[j]);
  apply_dropout(dropout, row, rows, n, d + row * n);
}

template <typename T, typename A = accumulate_t<T>>
void finalise_input(const T* g, const T* x, int64_t ld, int64_t row, int64_t rows, int64_t n, const A* mean,
                    const A* shift_sum, const A* slope_sum, T* dx) {
  for (int64_t r = row; r < row + rows; ++r)
    for (int64_t j = 0; j < n; ++j)
      dx[r * n + j] =
          store<T>(finalise_gradient<A>(load(g[r * ld + j]), load(x[r * ld + j]), mean[j], shift_sum[j], slope_sum[j]));
}

// Spreads the gradient of a pooled pixel over its window.
template <typename T, typename A = accumulate_t<T>>
inline void sink_window(const Source<T>& s, const PoolGeometry& pool, int64_t pooled_row, int64_t begin, int64_t n,
                        const A* dy, const BackwardSink<T>& sink, A* __restrict masked, A* sum, A* weighted) {
  const int64_t origin = window_origin(pool, pooled_row), volume = pool.volume();
  const A share = A(1) / A(volume);
  const A *scale = s.scale + begin, *shift = s.shift + begin;
  for (int64_t w = 0; w < volume; ++w) {
    const int64_t pixel = origin + window_offset(pool, w);
    const T* x = s.x + pixel * s.ld + begin;
    for (int64_t i = 0; i < n; ++i)
      masked[i] = relu_passes(norm_relu(A(load(x[i])), scale[i], shift[i])) ? dy[i] * share : A(0);
    sink_row(sink, x, sink.gradient + pixel * sink.ld + begin, begin, n, masked, sum, weighted);
  }
}

// dy = left * weight behind an activation: ReLU mask, sums, gradient, and dweight += left^T * activation.
// `left` [rows, ldl]; block by block of columns, so that everything stays in cache.
template <typename T, typename A = accumulate_t<T>>
void backward(const Source<T>& s, const PoolGeometry* pool, int64_t row, int64_t rows, const A* left, int64_t ldl,
              int64_t depth, const A* panels, const BackwardSink<T>& sink, A* scratch) {
  A *act = scratch, *dy = act + rows * kColumnBlock, *pooled = dy + rows * kColumnBlock;
  for (int64_t begin = 0; begin < s.channels; begin += kColumnBlock) {
    const int64_t end = s.channels - begin < kColumnBlock ? s.channels : begin + kColumnBlock;
    const int64_t n = end - begin, ldd = padded<A>(n);
    gemm(rows, depth, n, left, ldl, panels + begin * depth, dy, ldd);
    if (pool) {
      activate_pooled(s, *pool, row, rows, pooled, ldd, begin, end);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = n; i < ldd; ++i) pooled[r * ldd + i] = 0;
      to_panels(pooled, ldd, rows, n, act);
    } else {
      activate_panels(s, row, rows, begin, end, act);
    }
    if (sink.dweight) gemm_transposed(rows, depth, n, left, ldl, act, sink.dweight + begin, padded<A>(s.channels));
    if (!sink.gradient) continue;
    A sum[kColumnBlock] = {}, weighted[kColumnBlock] = {};
    for (int64_t r = 0; r < rows; ++r) {
      A* gradient = dy + r * ldd;
      if (pool) {
        sink_window(s, *pool, row + r, begin, n, gradient, sink, pooled, sum, weighted);
      } else {
        const int64_t pixel = row + r;
        mask_row(act, rows, r, n, gradient);
        sink_row(sink, s.x + pixel * s.ld + begin, sink.gradient + pixel * sink.ld + begin, begin, n, gradient, sum,
                 weighted);
      }
    }
    add_chunk_sums(n, sum, weighted, sink.sum + begin, sink.weighted + begin);
  }
}

template <typename T, typename A = accumulate_t<T>>
void conv_backward(const Source<T>& s, const ConvGeometry& g, int64_t row, int64_t rows, const A* d, int64_t k,
                   const A* panels, const BackwardSink<T>& sink, A* scratch) {
  const int64_t depth = g.taps() * k, ldl = scratch_ld<A>(depth);
  gather_taps(g, row, rows, k, d, scratch, ldl);
  backward<T>(s, nullptr, row, rows, scratch, ldl, depth, panels, sink, scratch + rows * ldl);
}

template <typename T, typename A = accumulate_t<T>>
void product_backward(const Source<T>& s, int64_t row, int64_t rows, const T* dv, const T* z, int64_t b, const A* norm,
                      A inv_count, const A* panels, const BackwardSink<T>& sink, A* scratch) {
  const int64_t ldl = scratch_ld<A>(b);
  const A *scale = norm, *mean = norm + b, *rstd = norm + 2 * b, *t1 = norm + 3 * b, *t2 = norm + 4 * b;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t at = (row + r) * b;
    A* __restrict dz = scratch + r * ldl;
    for (int64_t j = 0; j < b; ++j)
      dz[j] = norm_input_gradient<A>(load(dv[at + j]), load(z[at + j]), {scale[j], A(0), mean[j], rstd[j]}, t1[j],
                                     t2[j], inv_count);
  }
  backward<T>(s, nullptr, row, rows, scratch, ldl, b, panels, sink, scratch + rows * ldl);
}

template <typename T, typename A = accumulate_t<T>>
void pool_backward(const Source<T>& s, const PoolGeometry& g, int64_t row, int64_t rows, const T* grad, int64_t ldg,
                   int64_t n, const A* panels, const BackwardSink<T>& sink, A* scratch) {
  const int64_t ldl = scratch_ld<A>(n);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < n; ++j) scratch[r * ldl + j] = load(grad[(row + r) * ldg + j]);
  backward<T>(s, &g, row, rows, scratch, ldl, n, panels, sink, scratch + rows * ldl);
}

template <typename T, typename A = accumulate_t<T>>
void norm(const Source<T>& s, bool with_relu, int64_t row, int64_t rows, T* out) {
  for (int64_t r = row; r < row + rows; ++r)
    for (int64_t j = 0; j < s.channels; ++j) {
      const A v = mul_add(A(load(s.x[r * s.ld + j])), s.scale[j], s.shift[j]);
      out[r * s.channels + j] = store<T>(with_relu ? relu(v) : v);
    }
}

template <typename T, typename A = accumulate_t<T>>
void norm_backward(const Source<T>& s, bool with_relu, int64_t row, int64_t rows, const T* grad,
                   const BackwardSink<T>& sink, A* scratch) {
  const int64_t n = s.channels;
  A *sum = scratch, *weighted = sum + n, *masked = weighted + n;
  for (int64_t j = 0; j < 2 * n; ++j) sum[j] = 0;
  for (int64_t r = row; r < row + rows; ++r) {
    const T* x = s.x + r * s.ld;
    for (int64_t j = 0; j < n; ++j) {
      const bool pass = !with_relu || relu_passes(norm_relu(A(load(x[j])), s.scale[j], s.shift[j]));
      masked[j] = pass ? A(load(grad[r * n + j])) : A(0);
    }
    sink_row(sink, x, sink.gradient + r * sink.ld, 0, n, masked, sum, weighted);
  }
  add_chunk_sums(n, sum, weighted, sink.sum, sink.weighted);
}

template <typename A>
int64_t scratch_size(int64_t widest_source, int64_t widest_product, int64_t slab) {
  const int64_t rows = chunk_rows<A>(1), least = chunk_rows<A>(widest_source);
  const int64_t forward = kForwardBytes / int64_t(sizeof(A)) + least * scratch_ld<A>(widest_source) +
                          rows * (scratch_ld<A>(0) + kPanel<A> + padded<A>(widest_product)) + slab;
  const int64_t backward = kBackwardRows * (scratch_ld<A>(widest_product) + 3 * kColumnBlock);
  const int64_t norm = 3 * widest_source;
  return (forward > backward ? forward : backward) + norm;
}

template <typename T>
const DenseBlockKernels<T>& dense_block_kernels() {
  using A = accumulate_t<T>;
  static const DenseBlockKernels<T> kernels = {
      kPanel<A>,   pack<A>,           moments<T>,       product<T>,          conv<T>,
      finalise<T>, finalise_input<T>, conv_backward<T>, product_backward<T>, pool_backward<T>,
      norm<T>,     norm_backward<T>,  scratch_size<A>,  chunk_rows<A>};
  return kernels;
}

template const DenseBlockKernels<float>& dense_block_kernels<float>();
template const DenseBlockKernels<double>& dense_block_kernels<double>();
template const DenseBlockKernels<bfloat16>& dense_block_kernels<bfloat16>();
template const DenseBlockKernels<half>& dense_block_kernels<half>();

}  // namespace fastdense::FASTDENSE_TARGET
