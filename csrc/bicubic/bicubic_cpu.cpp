// SPDX-License-Identifier: Apache-2.0
// The bicubic ops on the CPU: threads over planes and blocks of rows.

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "bicubic/bicubic_kernels.h"
#include "bicubic/bicubic_ops.h"

namespace fastdense {
namespace {

// A table in the type of arithmetic.
template <typename A>
class Matrix {
 public:
  explicit Matrix(const BicubicTable& table) : table_(table), weight_(table.weight.size()) {
    for (size_t i = 0; i < weight_.size(); ++i) weight_[i] = convert(table.weight[i]);
    matrix_ = {table.rows, table.columns, table.taps, table.start.data(), weight_.data()};
  }

  const BicubicMatrix<A>* get() const { return &matrix_; }

  BicubicLanes<A> lanes(int64_t inner) {
    if (inner >= kBicubicWideInner) return {};
    const int64_t elements = table_.rows * inner, taps = table_.taps;
    const int64_t blocks = (elements + kBicubicBlock - 1) / kBicubicBlock;
    index_.resize(size_t(blocks * kBicubicBlock));
    lane_weight_.assign(size_t(blocks * taps * kBicubicBlock), A(0));
    for (int64_t b = 0; b < blocks; ++b) {
      int32_t* index = index_.data() + b * kBicubicBlock;
      for (int64_t i = 0; i < kBicubicBlock; ++i) {
        const int64_t e = b * kBicubicBlock + i, element = std::min(e, elements - 1), row = element / inner;
        index[i] = int32_t(table_.start[size_t(row)] * inner + element % inner);
        if (e >= elements) continue;
        for (int64_t k = 0; k < taps; ++k)
          lane_weight_[size_t((b * taps + k) * kBicubicBlock + i)] = weight_[size_t(row * taps + k)];
      }
      const auto [low, high] = std::minmax_element(index, index + kBicubicBlock);
      first_.push_back(*low);
      span_.push_back(int32_t(*high - *low + (taps - 1) * inner + 1));
      for (int64_t i = 0; i < kBicubicBlock; ++i) index[i] -= first_.back();
    }
    return {first_.data(), span_.data(), index_.data(), lane_weight_.data()};
  }

  // Of short weights; of `lanes`, which were made before, where there are any.
  BicubicShort shorts(int64_t inner) {
    const auto to_short = [&](double w) { return int16_t(std::ldexp(w, table_.bits)); };
    const int64_t taps = table_.taps, padded = (taps + kBicubicPadding - 1) / kBicubicPadding * kBicubicPadding;
    short_.assign(size_t(table_.rows * padded), 0);
    for (int64_t r = 0; r < table_.rows; ++r)
      for (int64_t k = 0; k < taps; ++k) short_[size_t(r * padded + k)] = to_short(table_.weight[size_t(r * taps + k)]);
    const bool close = !span_.empty() && *std::max_element(span_.begin(), span_.end()) <= kBicubicShortSpan;
    if (!close) return {table_.bits, padded, short_.data(), nullptr};
    const int64_t pairs = (taps + 1) / 2;
    short_lanes_.assign(span_.size() * size_t(pairs * kBicubicBlock * 2), 0);
    for (int64_t e = 0; e < table_.rows * inner; ++e)
      for (int64_t k = 0; k < taps; ++k)
        short_lanes_[size_t(((e / kBicubicBlock * pairs + k / 2) * kBicubicBlock + e % kBicubicBlock) * 2 + k % 2)] =
            short_[size_t(e / inner * padded + k)];
    return {table_.bits, padded, short_.data(), short_lanes_.data()};
  }

 private:
  static A convert(double w) {
    if constexpr (std::is_same_v<A, int32_t>)
      return fixed_weight(w);
    else
      return A(w);
  }

  const BicubicTable& table_;
  std::vector<A> weight_, lane_weight_;
  std::vector<int32_t> first_, span_, index_;
  std::vector<int16_t> short_, short_lanes_;
  BicubicMatrix<A> matrix_;
};

// planes x [height, width, inner] to planes x [rows, columns, inner].
template <typename T>
struct Planes {
  const T* input;
  T* output;
  const T* residual;  // like output, or nullptr
  int64_t planes, height, width, inner;
  const BicubicTable *rows, *columns;  // nullptr leaves an axis as it is
};

template <typename T, typename A>
void resample_planes(const Planes<T>& all, const BicubicFinish& finish) {
  const auto matrix = [&](const BicubicTable* table) { return table ? std::make_unique<Matrix<A>>(*table) : nullptr; };
  const auto row_matrix = matrix(all.rows), column_matrix = matrix(all.columns);
  constexpr double kMost = std::numeric_limits<A>::is_integer ? 255 : double(std::numeric_limits<A>::infinity());
  BicubicPlane<T, A> plane{};
  plane.height = all.height;
  plane.width = all.width;
  plane.inner = all.inner;
  plane.rows = row_matrix ? row_matrix->get() : nullptr;
  plane.columns = column_matrix ? column_matrix->get() : nullptr;
  if (column_matrix) plane.lanes = column_matrix->lanes(all.inner);
  plane.columns_first = finish.columns_first;
  plane.round_between = finish.round_between;
  plane.half_up = finish.half_up;
  if (finish.short_weights && all.inner < kBicubicWideInner) {
    if (row_matrix) plane.short_rows = row_matrix->shorts(1);
    if (column_matrix) plane.short_columns = column_matrix->shorts(all.inner);
    plane.is_short = all.inner == 1 || !column_matrix || plane.short_columns.lane_weight;
  }
  plane.low = A(std::max(finish.low, -kMost));
  plane.high = A(std::min(finish.high, kMost));
  const BicubicKernel<T, A> kernel = bicubic_kernel<T, A>(current_isa());
  const int64_t in_size = all.height * plane.in_width(), out_size = plane.out_rows() * plane.out_width();
  constexpr int64_t kLeastRows = 16, kGrain = 16384;
  const int64_t wanted = std::max<int64_t>(1, 4 * at::get_num_threads() / all.planes);
  const int64_t block = std::max(kLeastRows, (plane.out_rows() + wanted - 1) / wanted);
  const int64_t blocks = (plane.out_rows() + block - 1) / block;
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, std::max(in_size, out_size) / blocks));
  const int64_t memory = kernel.workspace_size(plane);
  at::parallel_for(0, all.planes * blocks, grain, [&](int64_t begin, int64_t end) {
    std::vector<A> workspace(static_cast<size_t>(memory));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t p = task / blocks, first = task % blocks * block;
      BicubicPlane<T, A> one = plane;
      one.input = all.input + p * in_size;
      one.output = all.output + p * out_size;
      one.residual = all.residual ? all.residual + p * out_size : nullptr;
      kernel.resample(one, first, std::min(first + block, plane.out_rows()), workspace.data());
    }
  });
}

template <typename T, typename A>
void resample_tensor(const BicubicArgs& args, const at::Tensor& residual, const at::Tensor& out,
                     const BicubicFinish& finish) {
  const at::Tensor& in = args.input;
  const auto dims = args.tables.size();
  const T* from = static_cast<const T*>(in.const_data_ptr());
  T* to = static_cast<T*>(out.mutable_data_ptr());
  const T* added = residual.defined() ? static_cast<const T*>(residual.const_data_ptr()) : nullptr;
  const auto table = [&](size_t back) { return back <= dims ? args.tables[dims - back].get() : nullptr; };
  const auto size = [&](const at::Tensor& t, size_t back) { return back <= dims ? t.size(-int64_t(back)) : 1; };
  const int64_t depth = size(in, 3), planes = args.planes(), inner = args.inner();
  if (!table(3)) {
    return resample_planes<T, A>({from, to, added, planes * depth, size(in, 2), size(in, 1), inner, table(2), table(1)},
                                 finish);
  }
  // Three axes: the depth is an axis of rows whose pixels are whole images; first where it shrinks.
  const BicubicFinish open{finish.columns_first, false, -INFINITY, INFINITY};
  const int64_t image = size(out, 2) * size(out, 1), in_image = size(in, 2) * size(in, 1), deep = size(out, 3);
  const bool depth_first = deep < depth;
  std::vector<T> between(size_t(planes * inner * (depth_first ? deep * in_image : depth * image)));
  if (depth_first) {
    resample_planes<T, A>({from, between.data(), nullptr, planes, depth, in_image, inner, table(3), nullptr}, open);
    resample_planes<T, A>(
        {between.data(), to, added, planes * deep, size(in, 2), size(in, 1), inner, table(2), table(1)}, finish);
  } else {
    resample_planes<T, A>(
        {from, between.data(), nullptr, planes * depth, size(in, 2), size(in, 1), inner, table(2), table(1)}, open);
    resample_planes<T, A>({between.data(), to, added, planes, depth, image, inner, table(3), nullptr}, finish);
  }
}

struct Engine {
  // Twice as fast as integers of 32 bits, but not as those of 16 bits: bicubic_short_impl.h.
  static bool sums_bytes_in_float(const BicubicArgs& args) {
    const bool has_short = current_isa() >= Isa::kAvx512 && args.inner() < kBicubicWideInner;
    return !has_short && is_exact_in_float(args);
  }
  template <typename T, typename A>
  static void resample(const BicubicArgs& args, const at::Tensor& residual, const at::Tensor& out,
                       const BicubicFinish& finish) {
    resample_tensor<T, A>(args, residual, out, finish);
  }
};

at::Tensor bicubic_cpu(const at::Tensor& input,  // [N, C, spatial]
                       at::IntArrayRef size, at::ArrayRef<double> step, double a, bool antialias,
                       std::string_view border, bool align_corners, const std::optional<at::Tensor>& residual,
                       double low, double high) {
  return run_bicubic<Engine>("bicubic", input, size, step, {a, antialias, border, align_corners}, false,
                             {residual, low, high});
}

at::Tensor bicubic_backward_cpu(const at::Tensor& grad_output, at::IntArrayRef size, at::ArrayRef<double> step,
                                double a, bool antialias, std::string_view border, bool align_corners) {
  return run_bicubic<Engine>("_bicubic_backward", grad_output, size, step, {a, antialias, border, align_corners}, true,
                             {std::nullopt, -INFINITY, INFINITY});
}

at::Tensor bicubic_uint8_cpu(const at::Tensor& input,  // [N, C, spatial] of one or two axes
                             at::IntArrayRef size, at::ArrayRef<double> step, double a, bool antialias,
                             std::string_view border, bool align_corners, std::string_view rounding) {
  return run_bicubic_uint8<Engine>(input, size, step, {a, antialias, border, align_corners}, rounding);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastdense, CPU, m) {
  m.impl("bicubic", &bicubic_cpu);
  m.impl("_bicubic_backward", &bicubic_backward_cpu);
  m.impl("bicubic_uint8", &bicubic_uint8_cpu);
}
TORCH_LIBRARY_IMPL(fastdense_meta, Meta, m) {
  m.impl("bicubic", &bicubic_cpu);
  m.impl("_bicubic_backward", &bicubic_backward_cpu);
  m.impl("bicubic_uint8", &bicubic_uint8_cpu);
}

}  // namespace fastdense
