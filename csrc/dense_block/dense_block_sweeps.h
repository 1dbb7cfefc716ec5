// SPDX-License-Identifier: Apache-2.0
// Elementwise sweeps over a chunk of rows: activations, moments, gradient sinks.  Plain loops over the scalar maths of
// dense_block_math.h that the compiler vectorises over channels.  Included once per target.
namespace fastdense::FASTDENSE_TARGET {

template <typename T>
inline void activate_row(const Source<T>& s, const T* x, accumulate_t<T>* __restrict y, int64_t begin, int64_t end) {
  for (int64_t j = begin; j < end; ++j) y[j - begin] = norm_relu(load(x[j]), s.scale[j], s.shift[j]);
}

// y[rows, ldy] = act(source), row-major.
template <typename T>
inline void activate(const Source<T>& s, int64_t row, int64_t rows, accumulate_t<T>* y, int64_t ldy) {
  for (int64_t r = 0; r < rows; ++r) activate_row(s, s.x + (row + r) * s.ld, y + r * ldy, 0, s.channels);
}

// First pixel of the pooling window of pooled pixel `p`, counted over all images.
inline int64_t window_origin(const PoolGeometry& g, int64_t p) {
  const int64_t image = p / g.pixels(), in = p % g.pixels();
  const int64_t i2 = in % g.pooled(2), i1 = in / g.pooled(2) % g.pooled(1), i0 = in / g.pooled(2) / g.pooled(1);
  return ((image * g.size[0] + i0 * g.window[0]) * g.size[1] + i1 * g.window[1]) * g.size[2] + i2 * g.window[2];
}

// Pixel of a window relative to its origin.
inline int64_t window_offset(const PoolGeometry& g, int64_t w) {
  const int64_t w2 = w % g.window[2], w1 = w / g.window[2] % g.window[1], w0 = w / g.window[2] / g.window[1];
  return (w0 * g.size[1] + w1) * g.size[2] + w2;
}

// y[rows, ldy] = mean of act(source) over the window of each pooled pixel; columns [begin, end).
template <typename T>
inline void activate_pooled(const Source<T>& s, const PoolGeometry& g, int64_t row, int64_t rows, accumulate_t<T>* y,
                            int64_t ldy, int64_t begin, int64_t end) {
  using A = accumulate_t<T>;
  const int64_t volume = g.volume();
  const A share = A(1) / A(volume);
  for (int64_t r = 0; r < rows; ++r) {
    const T* origin = s.x + window_origin(g, row + r) * s.ld;
    A* __restrict out = y + r * ldy;
    for (int64_t j = begin; j < end; ++j) out[j - begin] = 0;
    for (int64_t w = 0; w < volume; ++w) {
      const T* x = origin + window_offset(g, w) * s.ld;
      for (int64_t j = begin; j < end; ++j) out[j - begin] += norm_relu(load(x[j]), s.scale[j], s.shift[j]);
    }
    for (int64_t j = begin; j < end; ++j) out[j - begin] *= share;
  }
}

// Row-major y[rows, ld] to panels[n / kPanel][rows][kPanel]; columns up to the end of the last panel are read.
template <typename A>
inline void to_panels(const A* y, int64_t ld, int64_t rows, int64_t n, A* panels) {
  for (int64_t j = 0; j < n; j += kPanel<A>)
    for (int64_t r = 0; r < rows; ++r) {
      A* __restrict out = panels + j * rows + r * kPanel<A>;
      for (int i = 0; i < kPanel<A>; ++i) out[i] = y[r * ld + j + i];
    }
}

// Columns [begin, end) of act(source) as panels, zero beyond the last channel.
template <typename T>
inline void activate_panels(const Source<T>& s, int64_t row, int64_t rows, int64_t begin, int64_t end,
                            accumulate_t<T>* panels) {
  using A = accumulate_t<T>;
  constexpr int kWidth = kPanel<A>;
  for (int64_t j = begin; j < end; j += kWidth, panels += rows * kWidth) {
    const T* x = s.x + row * s.ld + j;
    const A *scale = s.scale + j, *shift = s.shift + j;
    if (end - j >= kWidth) {
      for (int64_t r = 0; r < rows; ++r) {
        const T* __restrict in = x + r * s.ld;
        A* __restrict out = panels + r * kWidth;
        for (int i = 0; i < kWidth; ++i) out[i] = norm_relu(load(in[i]), scale[i], shift[i]);
      }
    } else {
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < kWidth; ++i)
          panels[r * kWidth + i] = i < end - j ? norm_relu(load(x[r * s.ld + i]), scale[i], shift[i]) : A(0);
    }
  }
}

// Mean and M2 of the columns of x[rows, ld], by tiles of kTile rows that are combined in order (Chan).  The second pass
// over a tile also takes the sum of the deviations, which would be 0 but for the rounding of the mean, and corrects
// both.
template <typename T>
void moments(const T* x, int64_t ld, int64_t rows, int64_t n, double* mean, double* m2) {
  using A = accumulate_t<T>;
  constexpr int64_t kTile = 128;
  constexpr int64_t kColumns = 64;
  for (int64_t j = 0; j < n; j += kColumns) {
    const int64_t width = n - j < kColumns ? n - j : kColumns;
    for (int64_t i = 0; i < width; ++i) mean[j + i] = m2[j + i] = 0;
    for (int64_t r = 0; r < rows; r += kTile) {
      const int64_t tile = rows - r < kTile ? rows - r : kTile;
      const T* first = x + r * ld + j;
      A near[kColumns] = {}, squares[kColumns] = {}, rest[kColumns] = {};  // `near` the mean, up to rounding
      for (int64_t q = 0; q < tile; ++q)
        for (int64_t i = 0; i < width; ++i) near[i] += load(first[q * ld + i]);
      for (int64_t i = 0; i < width; ++i) near[i] /= A(tile);
      for (int64_t q = 0; q < tile; ++q)
        for (int64_t i = 0; i < width; ++i) {
          const A delta = load(first[q * ld + i]) - near[i];
          squares[i] += delta * delta;
          rest[i] += delta;
        }
      for (int64_t i = 0; i < width; ++i) {
        const double shift = double(rest[i]) / double(tile);
        const Moments<double> part = {double(tile), double(near[i]) + shift,
                                      double(squares[i]) - double(rest[i]) * shift};
        const auto sum = combine_moments<double>({double(r), mean[j + i], m2[j + i]}, part);
        mean[j + i] = sum.mean;
        m2[j + i] = sum.m2;
      }
    }
  }
}

// Rounds v[rows, ldv] into out[rows, ldo]; the moments are those of the stored values.
template <typename T>
inline void store_rows(const accumulate_t<T>* v, int64_t ldv, int64_t rows, int64_t n, T* out, int64_t ldo,
                       double* mean, double* m2) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < n; ++j) out[r * ldo + j] = store<T>(v[r * ldv + j]);
  if (mean) moments(out, ldo, rows, n, mean, m2);
}

// dy[n] where the activation passed its ReLU, else 0.  `panels` hold the activations of all rows.
template <typename A>
inline void mask_row(const A* panels, int64_t rows, int64_t row, int64_t n, A* __restrict dy) {
  constexpr int kWidth = kPanel<A>;
  for (int64_t j = 0; j < n; j += kWidth) {
    const A* __restrict y = panels + j * rows + row * kWidth;
    for (int i = 0; i < kWidth; ++i) dy[j + i] = relu_passes(y[i]) ? dy[j + i] : A(0);
  }
}

// One row of a sink from column `begin` on: `dy` is already masked by the ReLU.  The sums are those of this chunk.
template <typename T>
inline void sink_row(const BackwardSink<T>& sink, const T* __restrict x, T* __restrict g, int64_t begin, int64_t n,
                     const accumulate_t<T>* __restrict dy, accumulate_t<T>* __restrict sum,
                     accumulate_t<T>* __restrict weighted) {
  using A = accumulate_t<T>;
  const A* __restrict mean = sink.mean + begin;
  if (sink.scale) {
    const A* __restrict scale = sink.scale + begin;
    for (int64_t i = 0; i < n; ++i) {
      g[i] = store<T>(mul_add(scale[i], dy[i], A(load(g[i]))));
      sum[i] += dy[i];
      weighted[i] += dy[i] * (load(x[i]) - mean[i]);
    }
  } else {
    for (int64_t i = 0; i < n; ++i) {
      const T stored = store<T>(dy[i]);
      g[i] = stored;
      sum[i] += load(stored);
      weighted[i] += load(stored) * (load(x[i]) - mean[i]);
    }
  }
}

template <typename A>
inline void add_chunk_sums(int64_t n, const A* chunk_sum, const A* chunk_weighted, double* sum, double* weighted) {
  for (int64_t i = 0; i < n; ++i) sum[i] += double(chunk_sum[i]);
  for (int64_t i = 0; i < n; ++i) weighted[i] += double(chunk_weighted[i]);
}

}  // namespace fastdense::FASTDENSE_TARGET
