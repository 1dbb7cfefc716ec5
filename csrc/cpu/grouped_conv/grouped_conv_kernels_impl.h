// SPDX-License-Identifier: Apache-2.0
// The kernels of cpu/grouped_conv/grouped_conv_kernels.h for one target.

#include "cpu/grouped_conv/grouped_rows.h"

namespace fastdense::FASTDENSE_TARGET {

// The bytes of rows that a bundle keeps in L2, and of those that the gradient of the weight keeps in L1.
constexpr int64_t kGroupedBytes = 128 * 1024, kGroupedNearBytes = 20 * 1024;

// Whether groups rather than channels are the lanes: whichever fills more of them, and channels where it is close, as
// they need not be taken apart.
template <typename A>
bool lanes_are_groups(const GroupedConv& g) {
  constexpr int64_t kLanes = Vec<A>::kLanes;
  const auto filled = [](int64_t n) { return double(n) / double(round_up(n, kLanes)); };
  return filled(g.groups) > 1.25 * std::min(filled(g.in), filled(g.out));
}

template <typename A, bool kLanesAreGroups>
struct GroupedBundle {
  static constexpr int64_t kLanes = Vec<A>::kLanes, kGroups = kLanesAreGroups ? kLanes : 1;
  const GroupedConv& g;

  int64_t bundles() const { return (g.groups + kGroups - 1) / kGroups; }
  // Numbers of a vector for each of the channels of a group.
  static int64_t vectors(int64_t channels) { return kLanesAreGroups ? channels : (channels + kLanes - 1) / kLanes; }
  static int64_t padded(int64_t channels) { return vectors(channels) * kLanes; }
  // Weights [3][3][depth][vectors of `channels`].
  static int64_t weights(int64_t depth, int64_t channels) { return 9 * depth * padded(channels); }
  int64_t numbers() const { return std::max(weights(g.in, g.out), weights(g.out, g.in)); }

  // The columns of a bundle.
  ColumnRange columns(int64_t bundle, int64_t channels) const {
    const int64_t first = bundle * kGroups, count = std::min(kGroups, g.groups - first);
    return {first * channels, count * channels};
  }

  int64_t in_rows(int64_t rows) const { return (rows - 1) * g.stride + 3; }
  int64_t bytes(int64_t rows) const {
    return HaloRows<A, kLanesAreGroups>(g.width, g.in, in_rows(rows)).bytes() +
           HaloRows<A, kLanesAreGroups>(g.out_width(), g.out, rows + 2).bytes();
  }
  int64_t rows() const {
    int64_t most = g.out_height();
    while (most > 1 && bytes(most) > kGroupedBytes) --most;
    const int64_t parts = (g.out_height() + most - 1) / most;
    return (g.out_height() + parts - 1) / parts;
  }
  int64_t workspace_bytes() const {
    const int64_t wide = std::max(g.width, g.out_width()) * std::max(padded(g.in), padded(g.out)) + 2 * kLanes;
    return bytes(rows()) + (2 * wide + 4 * (padded(g.in) + padded(g.out))) * int64_t(sizeof(A)) + 16 * 64;
  }

  // visit(number of the packed weights, number of the weight) for each weight of a bundle.
  template <typename Visit>
  void for_each_weight(bool reversed, int64_t bundle, const Visit& visit) const {
    const int64_t depth = reversed ? g.out : g.in, channels = reversed ? g.in : g.out;
    // Reversed kernels of stride 2 have the taps of odd columns first.
    const int order[3] = {reversed ? 2 : 0, reversed && g.stride == 2 ? 0 : 1, !reversed ? 2 : g.stride == 2 ? 1 : 0};
    for (int64_t lane = 0; lane < padded(channels); ++lane) {
      const int64_t of = lane % kLanes;
      const int64_t group = bundle * kGroups + (kLanesAreGroups ? group_of_lane<A>(of) : 0);
      const int64_t channel = kLanesAreGroups ? lane / kLanes : lane;
      if (group >= g.groups || channel >= channels) continue;
      for (int64_t k = 0; k < depth; ++k) {
        const int64_t in = reversed ? channel : k, out = reversed ? k : channel;
        const int64_t from = ((group * g.out + out) * g.in + in) * 9;
        for (int64_t t = 0; t < 9; ++t)
          visit((t * depth + k) * padded(channels) + lane, from + t / 3 * 3 + order[t % 3]);
      }
    }
  }
};

// call(GroupedBundle) of the kind that suits a convolution.
template <typename A, typename Call>
auto with_bundle(const GroupedConv& g, const Call& call) {
  return lanes_are_groups<A>(g) ? call(GroupedBundle<A, true>{g}) : call(GroupedBundle<A, false>{g});
}

template <typename T, typename A = accumulate_t<T>>
GroupedConvLayout layout(const GroupedConv& g) {
  return with_bundle<A>(g, [](const auto& b) -> GroupedConvLayout {
    return {b.bundles(), b.kGroups * b.g.out, b.numbers(), b.rows(), b.workspace_bytes()};
  });
}

template <typename T, typename A = accumulate_t<T>>
void pack_grouped(const A* weight, const GroupedConv& g, bool reversed, int64_t bundle, A* packed) {
  with_bundle<A>(g, [&](const auto& b) {
    zero_numbers(packed, b.numbers());
    b.for_each_weight(reversed, bundle, [&](int64_t to, int64_t from) { packed[to] = weight[from]; });
  });
}

template <typename T, typename A = accumulate_t<T>>
void unpack_grouped(const A* packed, const GroupedConv& g, int64_t bundle, A* weight) {
  with_bundle<A>(g, [&](const auto& b) {
    b.for_each_weight(false, bundle, [&](int64_t from, int64_t to) { weight[to] = packed[from]; });
  });
}

// Takes columns of an image [height, width, ld] into rows.
template <typename A, bool kLanesAreGroups, typename Change>
void take_rows(const A* x, int64_t ld, int64_t image, int64_t images, int64_t height, ColumnRange columns,
               const Change& change, const HaloRows<A, kLanesAreGroups>& rows) {
  rows.fill(height, [&](int64_t y, A* to) {
    const A* from = x + (image * height + y) * rows.width * ld + columns.begin;
    if constexpr (kLanesAreGroups)
      take_groups(from, ld, rows.width, rows.channels, columns.count, image == images - 1 && y == height - 1, change,
                  to);
    else
      take_channels(from, ld, rows.width, rows.channels, change, to);
  });
}

// What the convolution reads, with norm and ReLU.
template <typename A, bool kLanesAreGroups>
void take_source(const GroupedBundle<A, kLanesAreGroups>& b, int64_t image, int64_t bundle, const Source<A>& s,
                 Workspace& workspace, const HaloRows<A, kLanesAreGroups>& x) {
  const GroupedConv& g = b.g;
  const ColumnRange columns = b.columns(bundle, g.in);
  NormRelu<A> change{s.scale + columns.begin, s.shift + columns.begin};
  if constexpr (kLanesAreGroups) {
    A *scale = workspace.take<A>(b.padded(g.in)), *shift = workspace.take<A>(b.padded(g.in));
    for (int64_t i = 0; i < b.padded(g.in); ++i) {
      const int64_t column = group_of_lane<A>(i % b.kLanes) * g.in + i / b.kLanes;
      scale[i] = column < columns.count ? change.scale[column] : A(0);
      shift[i] = column < columns.count ? change.shift[column] : A(0);
    }
    change = {scale, shift};
  }
  take_rows(s.x, s.ld, image, g.images, g.height, columns, change, x);
}

// A line of results [pixels][padded channels], and where its groups are put together.
template <typename A, bool kLanesAreGroups>
struct GroupedLine {
  int64_t pixels, channels, step;
  A* sums;
  A* together = nullptr;

  GroupedLine(Workspace& workspace, int64_t pixels, int64_t channels)
      : pixels(pixels),
        channels(channels),
        step(GroupedBundle<A, kLanesAreGroups>::padded(channels)),
        sums(workspace.take<A>(pixels * step)) {
    if constexpr (kLanesAreGroups) together = workspace.take<A>(pixels * step + Vec<A>::kLanes);
  }
  // visit(pixel, its columns)
  template <typename Visit>
  void for_each_pixel(const Visit& visit) const {
    if constexpr (kLanesAreGroups) put_groups(sums, pixels, channels, together);
    const A* from = kLanesAreGroups ? together : sums;
    for (int64_t p = 0; p < pixels; ++p) visit(p, from + p * step);
  }
};

template <typename A, bool kLanesAreGroups>
void forward(const GroupedBundle<A, kLanesAreGroups>& b, const OutputRows& rows, int64_t bundle, const Source<A>& s,
             const A* packed, A* out, Workspace workspace) {
  const GroupedConv& g = b.g;
  const int64_t width = g.out_width(), ld = g.groups * g.out;
  const ColumnRange columns = b.columns(bundle, g.out);
  HaloRows<A, kLanesAreGroups> x(g.width, g.in, b.in_rows(rows.count));
  x.take(workspace, rows.first * g.stride - 1);
  take_source(b, rows.image, bundle, s, workspace, x);
  const GroupedLine<A, kLanesAreGroups> line(workspace, width, g.out);
  const bool direct = !kLanesAreGroups && g.out == line.step;
  const ProductSteps steps{3 * g.in, g.stride * x.pixel_step(), line.step, direct ? ld : line.step};
  for (int64_t y = rows.first; y < rows.first + rows.count; ++y) {
    A* to = out + (rows.image * g.out_height() + y) * width * ld + columns.begin;
    TapRows<A> taps;
    for (int64_t t = 0; t < 3; ++t) taps.add(x.row(y * g.stride + t - 1), packed + t * 3 * g.in * line.step);
    product_row<kLanesAreGroups>(taps, steps, width, b.vectors(g.out), direct ? to : line.sums);
    if (direct) continue;
    line.for_each_pixel([&](int64_t p, const A* from) { copy_numbers(from, columns.count, to + p * ld); });
  }
}

// A line of the gradient of the input, from rows of the output's.
template <typename A, bool kLanesAreGroups>
void gradient_line(const GroupedConv& g, int64_t y, const HaloRows<A, kLanesAreGroups>& dy, const A* packed,
                   const GroupedLine<A, kLanesAreGroups>& line) {
  const int64_t tap = 3 * g.out * line.step, vectors = line.step / Vec<A>::kLanes;
  TapRows<A> taps;
  if (g.stride == 1) {
    for (int64_t t = 0; t < 3; ++t) taps.add(dy.row(y + 1 - t), packed + t * tap);
    product_row<kLanesAreGroups>(taps, {3 * g.out, dy.pixel_step(), line.step, line.step}, g.width, vectors, line.sums);
    return;
  }
  // An even pixel has been at the middle of the kernel, an odd one at its ends; first the odd columns.
  for (int64_t t = 1 - y % 2; t < 3; t += 2) taps.add(dy.row((y + 1 - t) / 2) + dy.pixel_step(), packed + t * tap);
  const ProductSteps steps{2 * g.out, dy.pixel_step(), line.step, 2 * line.step};
  product_row<kLanesAreGroups>(taps, steps, g.width / 2, vectors, line.sums + line.step);
  for (TapRow<A>& row : taps.row) row.weights += 2 * g.out * line.step;
  product_row<kLanesAreGroups>(taps, {g.out, steps.x, steps.weights, steps.out}, (g.width + 1) / 2, vectors, line.sums);
}

// dweight += over rows, as many at once as stay in L1.
template <typename A, bool kLanesAreGroups>
void add_weight_gradient(const GroupedBundle<A, kLanesAreGroups>& b, const OutputRows& rows,
                         const HaloRows<A, kLanesAreGroups>& x, const HaloRows<A, kLanesAreGroups>& dy, A* dweight) {
  const GroupedConv& g = b.g;
  const int64_t line = (x.row_step() + dy.row_step()) * int64_t(sizeof(A));
  const int64_t at_once = std::max<int64_t>(1, kGroupedNearBytes / line);
  for_each_run(rows.count, at_once, [&](int64_t begin, int64_t count) {
    const int64_t y = rows.first + begin;
    for (int64_t t = 0; t < 3; ++t)
      outer_rows<kLanesAreGroups, A>({x.row(y * g.stride + t - 1), g.stride * x.row_step(), g.stride * x.pixel_step()},
                                     {dy.row(y) + dy.pixel_step(), dy.row_step(), dy.pixel_step()}, count,
                                     g.out_width(), 3 * g.in, b.vectors(g.out),
                                     dweight + t * 3 * g.in * b.padded(g.out));
  });
}

template <typename A, bool kLanesAreGroups>
void backward(const GroupedBundle<A, kLanesAreGroups>& b, const OutputRows& rows, int64_t bundle, const Source<A>& s,
              const A* gradient, const A* packed, const BackwardEpilogue<A>& epilogue, Workspace workspace) {
  const GroupedConv& g = b.g;
  HaloRows<A, kLanesAreGroups> dy(g.out_width(), g.out, rows.count + 2);
  dy.take(workspace, rows.first - 1);
  take_rows(gradient, g.groups * g.out, rows.image, g.images, g.out_height(), b.columns(bundle, g.out), AsItIs<A>(),
            dy);
  if (epilogue.dweight) {
    HaloRows<A, kLanesAreGroups> x(g.width, g.in, b.in_rows(rows.count));
    x.take(workspace, rows.first * g.stride - 1);
    take_source(b, rows.image, bundle, s, workspace, x);
    add_weight_gradient(b, rows, x, dy, epilogue.dweight);
  }
  const ColumnRange columns = b.columns(bundle, g.in);
  const GroupedLine<A, kLanesAreGroups> line(workspace, g.width, g.in);
  A *sum = workspace.take<A>(columns.count), *weighted = workspace.take<A>(columns.count);
  const int64_t first = rows.first * g.stride, end = std::min((rows.first + rows.count) * g.stride, g.height);
  sum_in_groups(end - first, g.width, columns.count, sum, weighted, epilogue.sum + columns.begin,
                epilogue.weighted + columns.begin, [&](int64_t r) {
                  gradient_line(g, first + r, dy, packed, line);
                  const int64_t pixel = (rows.image * g.height + first + r) * g.width;
                  line.for_each_pixel([&](int64_t p, const A* dx) {
                    epilogue_row<true, false, A>(s, epilogue, pixel + p, columns, dx, A(1), sum, weighted);
                  });
                });
}

template <typename T, typename A = accumulate_t<T>>
void forward_grouped(const GroupedConv& g, const OutputRows& rows, int64_t bundle, const Source<T>& s, const A* packed,
                     T* out, void* memory) {
  with_bundle<A>(g, [&](const auto& b) { forward(b, rows, bundle, s, packed, out, Workspace(memory)); });
}

template <typename T, typename A = accumulate_t<T>>
void backward_grouped(const GroupedConv& g, const OutputRows& rows, int64_t bundle, const Source<T>& s, const T* dy,
                      const A* reversed, const BackwardEpilogue<T>& epilogue, void* memory) {
  with_bundle<A>(g, [&](const auto& b) { backward(b, rows, bundle, s, dy, reversed, epilogue, Workspace(memory)); });
}

template <typename T>
const GroupedConvKernels<T>& grouped_conv_kernels() {
  static const GroupedConvKernels<T> kernels = {layout<T>, pack_grouped<T>, forward_grouped<T>, backward_grouped<T>,
                                                unpack_grouped<T>};
  return kernels;
}

template const GroupedConvKernels<float>& grouped_conv_kernels<float>();
template const GroupedConvKernels<double>& grouped_conv_kernels<double>();

}  // namespace fastdense::FASTDENSE_TARGET
