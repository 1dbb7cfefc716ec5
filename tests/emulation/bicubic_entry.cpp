// SPDX-License-Identifier: Apache-2.0
// Calls the launchers of bicubic_kernels.cu from Python.
#include "bicubic/bicubic_launch.h"
#include "emulation.h"

using namespace fastdense;  // NOLINT: a test

namespace {

template <typename A>
struct Band {
  int64_t rows, columns, taps;
  const int32_t* start;
  const A* weight;
  BicubicBand<A> get() const { return {rows, columns, taps, start, weight}; }
};

template <typename T, typename A>
int axis(const void* input, void* output, const void* residual, int64_t planes, int64_t inner, const Band<A>* band,
         double low, double high) {
  return launch_bicubic_axis<T, T, A>(
      {static_cast<const T*>(input), static_cast<T*>(output), static_cast<const T*>(residual), planes, inner,
       band->get(), false, false, A(low), A(high)},
      nullptr);
}

template <typename T, typename A>
int two(const void* input, void* between, void* output, int64_t planes, int64_t inner, const Band<A>* rows,
        const Band<A>* columns, bool columns_first, bool round) {
  const BicubicBand<A> r = rows->get(), c = columns->get();
  const auto* in = static_cast<const T*>(input);
  auto* middle = static_cast<A*>(between);
  auto* out = static_cast<T*>(output);
  if (columns_first) {
    launch_bicubic_axis<T, A, A>({in, middle, nullptr, planes * r.columns, inner, c, true, round, A(0), A(255)},
                                 nullptr);
    return launch_bicubic_axis<A, T, A>({middle, out, nullptr, planes, c.rows * inner, r, false, round, A(0), A(255)},
                                        nullptr);
  }
  launch_bicubic_axis<T, A, A>({in, middle, nullptr, planes, c.columns * inner, r, true, round, A(0), A(255)}, nullptr);
  return launch_bicubic_axis<A, T, A>({middle, out, nullptr, planes * r.rows, inner, c, false, round, A(0), A(255)},
                                      nullptr);
}

template <typename T, typename A>
int image(const void* input, void* output, const void* residual, int64_t planes, int64_t inner, const Band<A>* rows,
          const Band<A>* columns, double low, double high) {
  return launch_bicubic_image<T, A>(
      {static_cast<const T*>(input), static_cast<T*>(output), static_cast<const T*>(residual), planes, rows->columns,
       columns->columns, inner, rows->get(), columns->get(), A(low), A(high)},
      nullptr);
}

}  // namespace

extern "C" {

void set_backwards(bool value) { emulation::backwards = value; }
int64_t launches() { return emulation::launches; }

#define FASTDENSE_ENTRIES(name, T, A)                                                                               \
  int axis_##name(const void* i, void* o, const void* r, int64_t planes, int64_t inner, const Band<A>* b, double l, \
                  double h) {                                                                                       \
    return axis<T, A>(i, o, r, planes, inner, b, l, h);                                                             \
  }                                                                                                                 \
  int image_##name(const void* i, void* o, const void* r, int64_t planes, int64_t inner, const Band<A>* rows,       \
                   const Band<A>* columns, double l, double h) {                                                    \
    return image<T, A>(i, o, r, planes, inner, rows, columns, l, h);                                                \
  }
FASTDENSE_ENTRIES(float32, float, float)
FASTDENSE_ENTRIES(float64, double, double)
FASTDENSE_ENTRIES(bfloat16, bfloat16, float)
FASTDENSE_ENTRIES(float16, half, float)

#define FASTDENSE_BYTES(name, A)                                                                        \
  int bytes_##name(const void* i, void* m, void* o, int64_t planes, int64_t inner, const Band<A>* rows, \
                   const Band<A>* columns, bool first, bool round) {                                    \
    return two<uint8_t, A>(i, m, o, planes, inner, rows, columns, first, round);                        \
  }
FASTDENSE_BYTES(last, float)
FASTDENSE_BYTES(matlab, double)
FASTDENSE_BYTES(pillow, int32_t)
}
