// SPDX-License-Identifier: Apache-2.0
// The loops of norm_relu_max_pool_kernels.h for one instruction set; see cpu/simd/target.h.

namespace fastdense {
namespace FASTDENSE_TARGET {
namespace {

// Numbers of a vector.  Loops that move bytes beside wider numbers would else take as many numbers at a time as a
// vector has bytes, and most lines have fewer.
#if defined(FASTDENSE_TARGET_AVX512)
constexpr int kVectorBytes = 64;
#elif defined(FASTDENSE_TARGET_AVX2)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
template <typename A>
constexpr int kLanes = kVectorBytes / sizeof(A);

// body(i) for i in [begin, end): whole vectors, then halves of one.
template <typename A, typename Body>
inline void for_each_lane(int64_t begin, int64_t end, const Body& shared) {
  const Body body = shared;  // whose pointers no store of the loops can change
  const int64_t whole = begin + (end - begin) / kLanes<A> * kLanes<A>;
#pragma omp simd simdlen(kLanes<A>)
  for (int64_t i = begin; i < whole; ++i) body(i);
#pragma omp simd simdlen(kLanes<A> / 2)
  for (int64_t i = whole; i < end; ++i) body(i);
}

// As wide as the arithmetic, so that selects of both vectorise alike.
template <typename A>
using Position = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;

// The line of an image, or of a plane: its indices along the outer two axes.
struct Line {
  int64_t outer, i0, i1;
  Line(int64_t line, const int64_t (&size)[3])
      : outer(line / (size[0] * size[1])), i0(line / size[1] % size[0]), i1(line % size[1]) {}
};

// Numbers `stride` apart side by side, so that loops over windows are loops over neighbours: phase p of a line holds
// its elements p, p + stride, ...
template <typename A>
struct Phases {
  A* data;
  int64_t stride, length;
  Phases(A* memory, const MaxPoolGeometry& g)
      : data(memory), stride(g.stride[2]), length((g.size[2] + stride - 1) / stride) {}
  static int64_t memory(const MaxPoolGeometry& g) { return g.size[2] + g.stride[2]; }

  // data of each index i of the line = value(i)
  template <typename Value>
  void scatter(int64_t size, const Value& value) const {
    if (stride == 1) return scatter<1>(size, value);
    if (stride == 2) return scatter<2>(size, value);
    for (int64_t p = 0; p < stride; ++p)
      for (int64_t i = 0; i * stride + p < size; ++i) data[p * length + i] = value(i * stride + p);
  }

 private:
  template <int kStride, typename Value>
  void scatter(int64_t size, const Value& value) const {
    for (int64_t p = 0; p < kStride; ++p) {
      A* __restrict to = data + p * length;
      const int64_t count = (size - p + kStride - 1) / kStride;
      for_each_lane<A>(0, count, [=](int64_t i) { to[i] = value(i * kStride + p); });
    }
  }
};

// The windows whose position w lies inside the line, and the phase in which window o finds it at o.
template <typename A>
struct Along {
  int64_t begin, end;
  A* phase;
  Along(const MaxPoolGeometry& g, const Phases<A>& phases, int64_t w) {
    const int64_t stride = g.stride[2], offset = w - g.padding[2];
    const int64_t steps = offset < 0 ? -((-offset + stride - 1) / stride) : offset / stride;  // rounded down
    begin = -steps < 0 ? 0 : -steps;
    end = offset < g.size[2] ? min_index(g.pooled[2], (g.size[2] - 1 - offset) / stride + 1) : 0;
    phase = phases.data + (offset - steps * stride) * phases.length + steps;
  }
};

template <typename T>
int64_t workspace(const NormPool<T>& p) {
  const int64_t planes = 2 * p.g.pooled[2] + Phases<accumulate_t<T>>::memory(p.g);
  return p.channels_last ? 2 * p.channels : max_index(planes, p.gradient_lines() * p.g.size[2]);
}

// body(number of the position, offset from x) for the positions of the outer two axes of window (o0, o1).
template <typename Body>
void for_each_line_of_window(const MaxPoolGeometry& g, int64_t o0, int64_t o1, const Body& body) {
  const IndexRange r0 = window_positions(g, 0, o0), r1 = window_positions(g, 1, o1);
  for (int64_t w0 = r0.begin; w0 < r0.end; ++w0)
    for (int64_t w1 = r1.begin; w1 < r1.end; ++w1) {
      const int64_t i0 = o0 * g.stride[0] - g.padding[0] + w0, i1 = o1 * g.stride[1] - g.padding[1] + w1;
      body((w0 * g.window[1] + w1) * g.window[2], (i0 * g.size[1] + i1) * g.size[2]);
    }
}

// body(number of the position, offset from y) for the windows that contain (i0, i1), in ascending order.
template <typename Body>
void for_each_window_of_line(const MaxPoolGeometry& g, int64_t i0, int64_t i1, const Body& body) {
  const IndexRange r0 = windows_of(g, 0, i0), r1 = windows_of(g, 1, i1);
  for (int64_t o0 = r0.begin; o0 < r0.end; ++o0)
    for (int64_t o1 = r1.begin; o1 < r1.end; ++o1) {
      const int64_t w0 = i0 + g.padding[0] - o0 * g.stride[0], w1 = i1 + g.padding[1] - o1 * g.stride[1];
      body((w0 * g.window[1] + w1) * g.window[2], (o0 * g.pooled[1] + o1) * g.pooled[2]);
    }
}

template <typename T, typename A>
void store_pooled(int64_t count, const A* __restrict best, const Position<A>* __restrict position, T* __restrict y,
                  uint8_t* __restrict indices) {
  for_each_lane<A>(0, count, [=](int64_t j) { y[j] = store<T>(best[j]); });
  if (!indices) return;
  for_each_lane<A>(0, count, [=](int64_t j) { indices[j] = uint8_t(position[j]); });
}

template <typename A>
inline void lead(A value, Position<A> w, A& best, Position<A>& position) {
  const bool taken = takes_lead(value, best);
  best = taken ? value : best;
  position = taken ? w : position;
}

template <typename T, typename A = accumulate_t<T>>
void forward_rows(const NormPoolForward<T>& p, int64_t number, A* memory) {
  const MaxPoolGeometry g = p.g;
  const Line line(number, g.pooled);
  const int64_t n = p.channels;
  const T* image = p.x + line.outer * g.pixels() * n;
  const A* __restrict scale = p.scale;
  const A* __restrict shift = p.shift;
  A* __restrict best = memory;
  auto* __restrict position = reinterpret_cast<Position<A>*>(memory + n);
  for (int64_t o = 0; o < g.pooled[2]; ++o) {
    for (int64_t j = 0; j < n; ++j) best[j] = 0;
    for (int64_t j = 0; j < n; ++j) position[j] = kNoIndex;
    const IndexRange along = window_positions(g, 2, o);
    for_each_line_of_window(g, line.i0, line.i1, [&](int64_t first, int64_t offset) {
      for (int64_t w = along.begin; w < along.end; ++w) {
        const T* __restrict x = image + (offset + o * g.stride[2] - g.padding[2] + w) * n;
        const auto number = Position<A>(first + w);
        for_each_lane<A>(
            0, n, [=](int64_t j) { lead(mul_add(A(load(x[j])), scale[j], shift[j]), number, best[j], position[j]); });
      }
    });
    const int64_t at = (number * g.pooled[2] + o) * n;
    store_pooled(n, best, position, p.y + at, p.indices ? p.indices + at : nullptr);
  }
}

template <typename T, typename A = accumulate_t<T>>
void forward_plane(const NormPoolForward<T>& p, int64_t number, A* memory) {
  const MaxPoolGeometry g = p.g;
  const Line line(number, g.pooled);
  const int64_t n = g.pooled[2], channel = line.outer % p.channels;
  const T* plane = p.x + line.outer * g.pixels();
  const A scale = p.scale[channel], shift = p.shift[channel];
  A* __restrict best = memory;
  auto* __restrict position = reinterpret_cast<Position<A>*>(memory + n);
  const Phases<A> phases(memory + 2 * n, g);
  for (int64_t j = 0; j < n; ++j) best[j] = 0;
  for (int64_t j = 0; j < n; ++j) position[j] = kNoIndex;
  for_each_line_of_window(g, line.i0, line.i1, [&](int64_t first, int64_t offset) {
    const T* x = plane + offset;
    phases.scatter(g.size[2], [=](int64_t i) { return mul_add(A(load(x[i])), scale, shift); });
    for (int64_t w = 0; w < g.window[2]; ++w) {
      const Along<A> along(g, phases, w);
      const auto number = Position<A>(first + w);
      const A* __restrict phase = along.phase;
      for_each_lane<A>(along.begin, along.end, [=](int64_t o) { lead(phase[o], number, best[o], position[o]); });
    }
  });
  store_pooled(n, best, position, p.y + number * n, p.indices ? p.indices + number * n : nullptr);
}

template <typename T, typename A = accumulate_t<T>>
void forward(const NormPoolForward<T>& p, int64_t line, A* memory) {
  p.channels_last ? forward_rows(p, line, memory) : forward_plane(p, line, memory);
}

// Adds g of a pooled value, and g times the deviation of the x at its index; nothing where there is none.  `at` is the
// place of the pooled value, `origin` that of position 0.
template <typename T, typename A = accumulate_t<T>>
inline void add_index_terms(const NormPoolBackward<T>& p, int64_t at, int64_t origin, A mean, A& sum, A& weighted) {
  const int64_t place = origin + p.offsets[p.indices[at]];
  const bool has_index = uint64_t(place) < uint64_t(p.numbers);  // nor has what a hook may have made up
  const A g = has_index ? A(load(p.grad[at])) : A(0);
  const A deviation = has_index ? A(load(p.x[place])) - mean : A(0);
  sum += g;
  weighted += g * deviation;
}

template <typename T, typename A = accumulate_t<T>>
void sums_rows(const NormPoolBackward<T>& p, int64_t number, double* sum, double* weighted, A* memory) {
  const MaxPoolGeometry& g = p.g;
  const Line line(number, g.pooled);
  const int64_t n = p.channels;
  A *line_sum = memory, *line_weighted = memory + n;
  for (int64_t j = 0; j < 2 * n; ++j) memory[j] = 0;
  for (int64_t o = 0; o < g.pooled[2]; ++o) {
    const int64_t origin = window_start(g, line.outer, line.i0, line.i1, o) * n, at = (number * g.pooled[2] + o) * n;
    for (int64_t j = 0; j < n; ++j) add_index_terms(p, at + j, origin + j, p.mean[j], line_sum[j], line_weighted[j]);
  }
  for (int64_t j = 0; j < n; ++j) sum[j] += double(line_sum[j]);
  for (int64_t j = 0; j < n; ++j) weighted[j] += double(line_weighted[j]);
}

template <typename T, typename A = accumulate_t<T>>
void sums_plane(const NormPoolBackward<T>& p, int64_t number, double* sum, double* weighted) {
  const MaxPoolGeometry& g = p.g;
  const Line line(number, g.pooled);
  const int64_t channel = line.outer % p.channels;
  A line_sum = 0, line_weighted = 0;
  for (int64_t o = 0; o < g.pooled[2]; ++o)
    add_index_terms(p, number * g.pooled[2] + o, window_start(g, line.outer, line.i0, line.i1, o), p.mean[channel],
                    line_sum, line_weighted);
  sum[channel] += double(line_sum);
  weighted[channel] += double(line_weighted);
}

template <typename T, typename A = accumulate_t<T>>
void sums(const NormPoolBackward<T>& p, int64_t line, double* sum, double* weighted, A* memory) {
  p.channels_last ? sums_rows(p, line, sum, weighted, memory) : sums_plane(p, line, sum, weighted);
}

template <typename T, typename A = accumulate_t<T>>
void input_gradient_rows(const NormPoolBackward<T>& p, int64_t number, A* memory) {
  const MaxPoolGeometry g = p.g;
  const Line line(number, g.size);
  const int64_t n = p.channels, image = line.outer * g.pooled_pixels();
  const A inv_count = p.inv_count;
  const A* __restrict scale = p.scale;
  const A* __restrict mean = p.mean;
  const A* __restrict rstd = p.rstd;
  const A* __restrict t1 = p.t1;
  const A* __restrict t2 = p.t2;
  A* __restrict dy = memory;
  for (int64_t i = 0; i < g.size[2]; ++i) {
    for (int64_t j = 0; j < n; ++j) dy[j] = 0;
    const IndexRange along = windows_of(g, 2, i);
    for_each_window_of_line(g, line.i0, line.i1, [&](int64_t first, int64_t offset) {
      for (int64_t o = along.begin; o < along.end; ++o) {
        const int64_t at = (image + offset + o) * n;
        const T* __restrict grad = p.grad + at;
        const uint8_t* __restrict indices = p.indices + at;
        const auto position = Position<A>(first + i + g.padding[2] - o * g.stride[2]);  // a byte would not vectorise
        for_each_lane<A>(0, n, [=](int64_t j) { dy[j] += indices[j] == position ? A(load(grad[j])) : A(0); });
      }
    });
    const int64_t at = (number * g.size[2] + i) * n;
    const T* __restrict x = p.x + at;
    T* __restrict dx = p.dx + at;
    for_each_lane<A>(0, n, [=](int64_t j) {
      const NormCoefficients<A> norm{scale[j], A(0), mean[j], rstd[j]};
      dx[j] = store<T>(norm_input_gradient<A>(dy[j], load(x[j]), norm, t1[j], t2[j], inv_count));
    });
  }
}

// Scatters the gradients of all windows that reach into the lines, in ascending order.
template <typename T, typename A = accumulate_t<T>>
void input_gradient_plane(const NormPoolBackward<T>& p, int64_t number, A* memory) {
  const MaxPoolGeometry g = p.g;
  const int64_t lines = p.gradient_lines(), blocks = (g.size[1] + lines - 1) / lines, slice = number / blocks;
  const int64_t plane = slice / g.size[0], i0 = slice % g.size[0], first = number % blocks * lines;
  const int64_t last = min_index(first + lines, g.size[1]) - 1, channel = plane % p.channels;
  const int64_t begin = (slice * g.size[1] + first) * g.size[2], count = (last + 1 - first) * g.size[2];
  A* __restrict dy = memory;
  for (int64_t i = 0; i < count; ++i) dy[i] = 0;
  const IndexRange r0 = windows_of(g, 0, i0);
  for (int64_t o0 = r0.begin; o0 < r0.end; ++o0)
    for (int64_t o1 = windows_of(g, 1, first).begin; o1 < windows_of(g, 1, last).end; ++o1) {
      const int64_t at = ((plane * g.pooled[0] + o0) * g.pooled[1] + o1) * g.pooled[2];
      const int64_t start = window_start(g, plane, o0, o1, 0) - begin;
      for (int64_t o2 = 0; o2 < g.pooled[2]; ++o2) {
        const int64_t i = start + o2 * g.stride[2] + p.offsets[p.indices[at + o2]];
        if (0 <= i && i < count) dy[i] += load(p.grad[at + o2]);
      }
    }
  const NormCoefficients<A> norm{p.scale[channel], A(0), p.mean[channel], p.rstd[channel]};
  const A t1 = p.t1[channel], t2 = p.t2[channel], inv_count = p.inv_count;
  const T* __restrict x = p.x + begin;
  T* __restrict dx = p.dx + begin;
  for_each_lane<A>(0, count, [=](int64_t i) {
    dx[i] = store<T>(norm_input_gradient<A>(dy[i], load(x[i]), norm, t1, t2, inv_count));
  });
}

template <typename T, typename A = accumulate_t<T>>
void input_gradient(const NormPoolBackward<T>& p, int64_t unit, A* memory) {
  p.channels_last ? input_gradient_rows(p, unit, memory) : input_gradient_plane(p, unit, memory);
}

}  // namespace

template <typename T>
const NormPoolKernels<T>& norm_pool_kernels() {
  static const NormPoolKernels<T> kernels = {workspace<T>, forward<T>, sums<T>, input_gradient<T>};
  return kernels;
}

template const NormPoolKernels<float>& norm_pool_kernels<float>();
template const NormPoolKernels<double>& norm_pool_kernels<double>();
template const NormPoolKernels<bfloat16>& norm_pool_kernels<bfloat16>();
template const NormPoolKernels<half>& norm_pool_kernels<half>();

}  // namespace FASTDENSE_TARGET
}  // namespace fastdense
