// SPDX-License-Identifier: Apache-2.0
// The kernels of dense_block_kernels.h for one target.
//
// Convolution.  The growth rate k is small, so the taps are unrolled on the narrow side: forward, one product makes all
// taps' contributions [rows, taps * k] of every input pixel, which are then added up at their output pixels; backward,
// the k-channel gradient is gathered at the taps [rows, taps * k] and serves both products, with respect to the input
// and to the weight.  No wide im2col, no padding arithmetic, and every product is a plain matrix product.

#include "common/gemm.h"
#ifdef FASTDENSE_TARGET_AMX
#include "common/gemm_amx.h"
#endif
#include "dense_block/dense_block_sweeps.h"

namespace fastdense::FASTDENSE_TARGET {

// Columns of a backward product that are worked on at once, a multiple of every panel width.
constexpr int64_t kColumnBlock = 256;
// Bytes of activated rows that a forward chunk keeps in L2.
constexpr int64_t kForwardBytes = 192 * 1024;
// Rows of a backward chunk: 16-bit factors leave room for more.
template <typename T>
constexpr int64_t kBackwardRows = sizeof(typename Gemm<T>::Operand) == 2 ? 384 : 192;

template <typename T>
constexpr int64_t chunk_rows(int64_t channels) {
  constexpr int64_t kMultiple = Gemm<T>::kAlign > 1 ? Gemm<T>::kAlign : kTileRows;
  const int64_t fit = kForwardBytes / int64_t(sizeof(typename Gemm<T>::Operand)) / (channels > 0 ? channels : 1);
  const int64_t rows = fit < 48 ? 48 : fit > 384 ? 384 : fit;
  return rows / kMultiple * kMultiple;
}

template <typename T, typename A = accumulate_t<T>>
void pack(const A* w, int64_t depth, int64_t n, int64_t depth_stride, int64_t column_stride, int64_t first_panel,
          int64_t last_panel, void* panels) {
  using G = Gemm<T>;
  auto* out = static_cast<typename G::Operand*>(panels);
  for (int64_t p = first_panel; p < last_panel; ++p) {
    const A* from = w + p * G::kPanel * column_stride;
    G::fill_panel(
        depth, n - p * G::kPanel, [=](int64_t k, int64_t i) { return from[k * depth_stride + i * column_stride]; },
        out + p * G::kPanel * round_up(depth, G::kAlign));
  }
}

template <typename T>
const typename Gemm<T>::Operand* unpacked(const void* panels) {
  return static_cast<const typename Gemm<T>::Operand*>(panels);
}

template <typename T, typename A = accumulate_t<T>>
void product(const Source<T>& s, const PoolGeometry* pool, int64_t row, int64_t rows, const void* panels, int64_t n,
             T* out, int64_t ldo, double* mean, double* m2, void* room) {
  using G = Gemm<T>;
  Scratch scratch(room);
  const Rows<T> y(scratch, rows, s.channels);
  const int64_t ldc = round_up(n, G::kPanel);
  A* c = scratch.take<A>(round_up(rows, G::kAlign) * ldc);
  if (pool) {
    A* pooled = scratch.take<A>(s.channels);
    for (int64_t r = 0; r < rows; ++r) {
      activate_pooled_row(s, *pool, row + r, 0, s.channels, pooled);
      auto* __restrict to = y.row(r, s.channels);
      for (int64_t j = 0; j < s.channels; ++j) to[j] = store<typename G::Operand>(pooled[j]);
    }
  } else {
    activate(s, row, rows, y);
  }
  G::multiply(rows, s.channels, n, y.data, y.ld, unpacked<T>(panels), c, ldc);
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

// The gradient d[pixels, k] of all images gathered at the taps of the rows from `row` on: t[rows, taps * k].
template <typename T>
inline void gather_taps(const ConvGeometry& g, int64_t row, int64_t rows, int64_t k, const typename Gemm<T>::Operand* d,
                        const Rows<T>& t) {
  using Operand = typename Gemm<T>::Operand;
  const int64_t pixels = g.pixels();
  int64_t image = row / pixels;
  PixelIndex p(g, row % pixels);
  for (int64_t r = 0; r < rows; ++r) {
    if (p.i[0] == g.size[0]) {
      ++image;
      p = PixelIndex(g, 0);
    }
    Operand* out = t.row(r, g.taps() * k);
    const Operand* in = d + image * pixels * k;
    for_each_tap(
        g, p, 0, g.size[0],
        [&](int64_t tap, int64_t q) {
          Operand* __restrict o = out + tap * k;
          for (int64_t j = 0; j < k; ++j) o[j] = in[q * k + j];
        },
        [&](int64_t tap) {
          for (int64_t j = 0; j < k; ++j) out[tap * k + j] = Operand{};
        });
    p.next(g);
  }
}

// v[rows, k] *= dropout factors (0 or 1 / (1 - rate)); the mask is a function of (seed, layer, row, channel).
template <typename V>
inline void apply_dropout(const Dropout& dropout, int64_t row, int64_t rows, int64_t k, V* v) {
  using A = accumulate_t<V>;
  if (dropout.rate == 0) return;
  const uint64_t threshold = dropout_threshold(dropout.rate);
  const A factor = dropout.rate < 1 ? A(1 / (1 - dropout.rate)) : A(0);
  for (int64_t i = 0; i < rows * k; ++i)
    v[i] = dropout_keep(dropout.seed, dropout.layer, uint64_t(row * k + i), threshold) ? store<V>(load(v[i]) * factor)
                                                                                       : store<V>(A(0));
}

template <typename T, typename A = accumulate_t<T>>
void conv(const Source<T>& s, const ConvGeometry& g, int64_t image, int64_t begin, int64_t end, const void* panels,
          int64_t k, T* slice, int64_t lds, const Dropout& dropout, double* mean, double* m2, void* room) {
  using G = Gemm<T>;
  Scratch scratch(room);
  const int64_t plane = g.plane(), halo = g.kernel[0] / 2, slab = (end - begin) * plane;
  const int64_t n = g.taps() * k, ldt = round_up(n, G::kPanel);
  const int64_t step = chunk_rows<T>(s.channels > n ? s.channels : n);
  A* out = scratch.take<A>(slab * k);
  const Rows<T> u(scratch, step, s.channels);
  A* t = scratch.take<A>(round_up(step, G::kAlign) * ldt);
  for (int64_t i = 0; i < slab * k; ++i) out[i] = 0;
  const int64_t last = (end + halo < g.size[0] ? end + halo : g.size[0]) * plane;
  for (int64_t pixel = (begin > halo ? begin - halo : 0) * plane; pixel < last; pixel += step) {
    const int64_t rows = last - pixel < step ? last - pixel : step;
    activate(s, image * g.pixels() + pixel, rows, u);
    G::multiply(rows, s.channels, n, u.data, u.ld, unpacked<T>(panels), t, ldt);
    scatter_taps(g, begin, end, pixel, rows, k, t, ldt, out);
  }
  const int64_t row = image * g.pixels() + begin * plane;
  apply_dropout(dropout, row, slab, k, out);
  store_rows(out, k, slab, k, slice + row * lds, lds, mean, m2);
}

template <typename T, typename A = accumulate_t<T>>
void finalise(const T* g, const T* x, int64_t ld, int64_t row, int64_t rows, int64_t n, const A* mean,
              const A* shift_sum, const A* slope_sum, const Dropout& dropout, void* out) {
  using Operand = typename Gemm<T>::Operand;
  Operand* d = static_cast<Operand*>(out) + row * n;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < n; ++j)
      d[r * n + j] = store<Operand>(finalise_gradient<A>(load(g[(row + r) * ld + j]), load(x[(row + r) * ld + j]),
                                                         mean[j], shift_sum[j], slope_sum[j]));
  apply_dropout(dropout, row, rows, n, d);
}

template <typename T, typename A = accumulate_t<T>>
void finalise_input(const T* g, const T* x, int64_t ld, int64_t row, int64_t rows, int64_t n, const A* mean,
                    const A* shift_sum, const A* slope_sum, T* dx) {
  for (int64_t r = row; r < row + rows; ++r)
    for (int64_t j = 0; j < n; ++j)
      dx[r * n + j] =
          store<T>(finalise_gradient<A>(load(g[r * ld + j]), load(x[r * ld + j]), mean[j], shift_sum[j], slope_sum[j]));
}

// dy = left * weight behind an activation: ReLU mask, sums, gradient, and dweight += left^T * activation; block by
// block of columns, so that everything stays in cache.
template <typename T, typename A = accumulate_t<T>>
void backward(const Source<T>& s, const PoolGeometry* pool, int64_t row, int64_t rows, const Rows<T>& left,
              int64_t depth, const void* panels, const BackwardSink<T>& sink, Scratch scratch) {
  using G = Gemm<T>;
  using Operand = typename G::Operand;
  const int64_t padded_rows = round_up(rows, G::kAlign), padded_depth = round_up(depth, G::kAlign);
  Operand* act = scratch.take<Operand>(padded_rows * kColumnBlock);
  A* dy = scratch.take<A>(padded_rows * kColumnBlock);
  Operand* room = scratch.take<Operand>(G::transposed_size(rows, depth));
  const Operand* transposed = sink.dweight ? G::transpose(rows, depth, left.data, left.ld, room) : nullptr;
  const int64_t volume = pool ? pool->volume() : 1;
  for (int64_t begin = 0; begin < s.channels; begin += kColumnBlock) {
    const int64_t end = s.channels - begin < kColumnBlock ? s.channels : begin + kColumnBlock;
    const int64_t n = end - begin, ldd = round_up(n, G::kPanel);
    if (sink.dweight) {
      if (pool)
        activate_pooled_panels(s, *pool, row, rows, begin, end, dy, act);
      else
        activate_panels(s, row, rows, begin, end, act);
      G::multiply_transposed(rows, depth, n, transposed, left.ld, act, sink.dweight + begin,
                             round_up(s.channels, G::kPanel));
    }
    if (!sink.gradient) continue;
    G::multiply(rows, depth, n, left.data, left.ld, unpacked<T>(panels) + begin * padded_depth, dy, ldd);
    A sum[kColumnBlock] = {}, weighted[kColumnBlock] = {};
    const auto sink_pixel = sink.accumulate ? sink_row<true, true, T> : sink_row<true, false, T>;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t first = pool ? window_origin(*pool, row + r) : row + r;
      for (int64_t w = 0; w < volume; ++w)
        sink_pixel(s, sink, first + (pool ? window_offset(*pool, w) : 0), begin, n, dy + r * ldd, A(1) / A(volume), sum,
                   weighted);
    }
    add_chunk_sums(n, sum, weighted, sink.sum + begin, sink.weighted + begin);
  }
}

template <typename T, typename A = accumulate_t<T>>
void conv_backward(const Source<T>& s, const ConvGeometry& g, int64_t row, int64_t rows, const void* d, int64_t k,
                   const void* panels, const BackwardSink<T>& sink, void* room) {
  Scratch scratch(room);
  const int64_t depth = g.taps() * k;
  const Rows<T> left(scratch, rows, depth);
  gather_taps<T>(g, row, rows, k, unpacked<T>(d), left);
  backward<T>(s, nullptr, row, rows, left, depth, panels, sink, scratch);
}

template <typename T, typename A = accumulate_t<T>>
void product_backward(const Source<T>& s, int64_t row, int64_t rows, const T* dv, const T* z, int64_t b, const A* norm,
                      A inv_count, const void* panels, const BackwardSink<T>& sink, void* room) {
  using Operand = typename Gemm<T>::Operand;
  Scratch scratch(room);
  const Rows<T> left(scratch, rows, b);
  const A *scale = norm, *mean = norm + b, *rstd = norm + 2 * b, *t1 = norm + 3 * b, *t2 = norm + 4 * b;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t at = (row + r) * b;
    Operand* __restrict dz = left.row(r, b);
    for (int64_t j = 0; j < b; ++j)
      dz[j] = store<Operand>(norm_input_gradient<A>(load(dv[at + j]), load(z[at + j]),
                                                    {scale[j], A(0), mean[j], rstd[j]}, t1[j], t2[j], inv_count));
  }
  backward<T>(s, nullptr, row, rows, left, b, panels, sink, scratch);
}

template <typename T, typename A = accumulate_t<T>>
void pool_backward(const Source<T>& s, const PoolGeometry& g, int64_t row, int64_t rows, const T* grad, int64_t ldg,
                   int64_t n, const void* panels, const BackwardSink<T>& sink, void* room) {
  using Operand = typename Gemm<T>::Operand;
  Scratch scratch(room);
  const Rows<T> left(scratch, rows, n);
  for (int64_t r = 0; r < rows; ++r) {
    Operand* __restrict out = left.row(r, n);
    for (int64_t j = 0; j < n; ++j) out[j] = store<Operand>(load(grad[(row + r) * ldg + j]));
  }
  backward<T>(s, &g, row, rows, left, n, panels, sink, scratch);
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
                   const BackwardSink<T>& sink, void* room) {
  Scratch scratch(room);
  const int64_t n = s.channels;
  A *sum = scratch.take<A>(n), *weighted = scratch.take<A>(n), *dy = scratch.take<A>(n);
  for (int64_t j = 0; j < n; ++j) sum[j] = weighted[j] = 0;
  for (int64_t r = row; r < row + rows; ++r) {
    for (int64_t j = 0; j < n; ++j) dy[j] = load(grad[r * n + j]);
    (with_relu ? sink_row<true, true, T> : sink_row<false, true, T>)(s, sink, r, 0, n, dy, A(1), sum, weighted);
  }
  add_chunk_sums(n, sum, weighted, sink.sum, sink.weighted);
}

// An upper bound over all the kernels above.
template <typename T, typename A = accumulate_t<T>>
int64_t scratch_bytes(int64_t widest_source, int64_t widest_product, int64_t slab) {
  using Operand = typename Gemm<T>::Operand;
  constexpr int64_t kAlign = Gemm<T>::kAlign, kPanel = Gemm<T>::kPanel, kOperand = sizeof(Operand), kA = sizeof(A);
  const auto operands = [](int64_t rows, int64_t depth) {
    return round_up(rows, kAlign) * Rows<T>::stride(depth) * kOperand;
  };
  const int64_t rows = chunk_rows<T>(1), product = round_up(rows, kAlign) * round_up(widest_product, kPanel) * kA;
  // Chunks of narrow sources have more rows, at most kForwardBytes of them, and the padding.
  const int64_t activated =
      operands(rows, kAlign) + kForwardBytes + operands(chunk_rows<T>(widest_source), widest_source);
  const int64_t forward = activated + product + slab * kA;
  const int64_t backward = operands(kBackwardRows<T>, widest_product) +
                           Gemm<T>::transposed_size(kBackwardRows<T>, widest_product) * kOperand +
                           round_up(kBackwardRows<T>, kAlign) * kColumnBlock * (kOperand + kA);
  constexpr int64_t kGaps = 16 * 64;
  return round_up((forward > backward ? forward : backward) + 3 * widest_source * kA + kGaps, 64);
}

template <typename T>
const DenseBlockKernels<T>& dense_block_kernels() {
  static const DenseBlockKernels<T> kernels = {Gemm<T>::kPanel,   Gemm<T>::kAlign,  sizeof(typename Gemm<T>::Operand),
                                               kBackwardRows<T>,  pack<T>,          moments<T>,
                                               product<T>,        conv<T>,          finalise<T>,
                                               finalise_input<T>, conv_backward<T>, product_backward<T>,
                                               pool_backward<T>,  norm<T>,          norm_backward<T>,
                                               scratch_bytes<T>,  chunk_rows<T>};
  return kernels;
}

#ifndef FASTDENSE_TARGET_AMX
template const DenseBlockKernels<float>& dense_block_kernels<float>();
template const DenseBlockKernels<double>& dense_block_kernels<double>();
template const DenseBlockKernels<half>& dense_block_kernels<half>();
#endif
template const DenseBlockKernels<bfloat16>& dense_block_kernels<bfloat16>();

}  // namespace fastdense::FASTDENSE_TARGET
