// SPDX-License-Identifier: Apache-2.0
// The bicubic ops on CUDA.
#include <ATen/DeviceGuard.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <list>
#include <mutex>

#include "bicubic/bicubic_launch.h"
#include "bicubic/bicubic_ops.h"

namespace fastdense {
namespace {

template <typename A>
constexpr at::ScalarType kScalarType = std::is_same_v<A, double>  ? at::kDouble
                                       : std::is_same_v<A, float> ? at::kFloat
                                                                  : at::kInt;

struct DeviceTable {
  std::shared_ptr<const BicubicTable> table;  // what it was made of
  at::Device device;
  at::ScalarType dtype;
  at::Tensor start, weight;
  bool captured = false;  // by a graph, which reads it in every replay
};

// Copies a table to the device, once: a graph that is captured after a first call finds it there, and what it has found
// stays for its replays.  The tables are never freed: at exit the driver may be gone before they are.
DeviceTable device_table(const std::shared_ptr<const BicubicTable>& table, at::Device device, at::ScalarType dtype) {
  constexpr size_t kMostEntries = 64;
  static std::mutex mutex;
  static auto& cache = *new std::list<DeviceTable>;  // the most recently used first
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = std::find_if(cache.begin(), cache.end(), [&](const DeviceTable& t) {
    return t.table == table && t.device == device && t.dtype == dtype;
  });
  const bool capturing = c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
  if (found != cache.end()) {
    cache.splice(cache.begin(), cache, found);
    found->captured |= capturing;
    return *found;
  }
  TORCH_CHECK(!capturing, "bicubic: expected tables for these sizes to be on the device; call once before capturing");
  const at::Tensor start = at::empty({table->rows}, at::kInt),
                   weight = at::empty({table->rows, table->taps}, at::kDouble);
  std::copy(table->start.begin(), table->start.end(), start.mutable_data_ptr<int32_t>());
  std::copy(table->weight.begin(), table->weight.end(), weight.mutable_data_ptr<double>());
  at::Tensor typed = weight.to(dtype);
  if (dtype == at::kInt)
    std::transform(table->weight.begin(), table->weight.end(), typed.mutable_data_ptr<int32_t>(), fixed_weight);
  cache.push_front({table, device, dtype, start.to(device), typed.to(device)});
  if (cache.size() > kMostEntries) {
    const auto oldest = std::find_if(cache.rbegin(), cache.rend(), [](const DeviceTable& t) { return !t.captured; });
    if (oldest != cache.rend()) cache.erase(std::next(oldest).base());
  }
  return cache.front();
}

template <typename A>
BicubicBand<A> band(const DeviceTable& t) {
  return {t.table->rows, t.table->columns, t.table->taps, t.start.const_data_ptr<int32_t>(),
          t.weight.const_data_ptr<A>()};
}

template <typename T, typename A>
class Resampler {
 public:
  Resampler(const BicubicArgs& args, const at::Tensor& residual, const at::Tensor& out, const BicubicFinish& finish)
      : args_(args), residual_(residual), out_(out), finish_(finish), stream_(c10::cuda::getCurrentCUDAStream()) {}

  void run() {
    std::vector<int64_t> axes;
    for (size_t d = 0; d < args_.tables.size(); ++d)
      if (args_.tables[d]) axes.push_back(int64_t(d));
    if (axes.size() == 2 && finish_.columns_first) std::swap(axes[0], axes[1]);
    if (axes.empty()) {
      out_.copy_(args_.input);
      if (residual_.defined()) out_.add_(residual_);
      if (finish_.low != -INFINITY || finish_.high != INFINITY) out_.clamp_(finish_.low, finish_.high);
    } else if (!image(axes)) {
      passes(axes);
    }
  }

 private:
  A low() const { return A(std::max(finish_.low, -kMost)); }
  A high() const { return A(std::min(finish_.high, kMost)); }
  static constexpr double kMost = std::numeric_limits<A>::is_integer ? 255 : double(std::numeric_limits<A>::infinity());

  DeviceTable table(int64_t axis) {
    DeviceTable t = device_table(args_.tables[size_t(axis)], out_.device(), kScalarType<A>);
    t.start.record_stream(stream_);
    t.weight.record_stream(stream_);
    return t;
  }

  // The last two axes in one kernel, where it is the cheaper order and its rows fit into registers.
  bool image(const std::vector<int64_t>& axes) {
    if constexpr (std::is_same_v<T, uint8_t>) {
      return false;
    } else {
      const int64_t dims = int64_t(args_.tables.size());
      if (axes.size() != 2 || axes[0] != dims - 1 || axes[1] != dims - 2 || !finish_.columns_first) return false;
      if (args_.tables[size_t(dims - 2)]->taps > kMostRollingTaps) return false;
      const DeviceTable rows = table(dims - 2), columns = table(dims - 1);
      const at::Tensor& in = args_.input;
      const int64_t planes = args_.planes() * (dims == 3 ? in.size(2) : 1);
      const BicubicImagePass<T, A> pass{
          data<const T>(in), data<T>(out_), data<const T>(residual_), planes, in.size(-2), in.size(-1),
          args_.inner(),     band<A>(rows), band<A>(columns),         low(),  high()};
      C10_CUDA_CHECK(launch_bicubic_image(pass, stream_));
      return true;
    }
  }

  // One axis after the other; in between, values stay in the type of arithmetic.
  void passes(const std::vector<int64_t>& axes) {
    std::vector<int64_t> sizes = args_.input.sizes().vec();
    at::Tensor current = args_.input;
    for (size_t i = 0; i < axes.size(); ++i) {
      const int64_t dim = axes[i] + 2;
      sizes[size_t(dim)] = out_.size(dim);
      int64_t inner = args_.inner();
      for (size_t d = size_t(dim) + 1; d < sizes.size(); ++d) inner *= sizes[d];
      const bool last = i + 1 == axes.size();
      int64_t count = 1;
      for (int64_t size : sizes) count *= size;
      const at::Tensor next = last ? out_ : at::empty({count}, out_.options().dtype(kScalarType<A>));
      const int64_t planes = count / sizes[size_t(dim)] / inner;
      if (i == 0 && last)
        launch<T, T>(current, next, planes, inner, axes[i], last);
      else if (i == 0)
        launch<T, A>(current, next, planes, inner, axes[i], last);
      else if (last)
        launch<A, T>(current, next, planes, inner, axes[i], last);
      else if constexpr (std::is_same_v<T, A>)
        launch<A, A>(current, next, planes, inner, axes[i], last);
      else
        TORCH_INTERNAL_ASSERT(false, "three axes are resampled in float32 or float64");
      current = next;
    }
  }

  template <typename In, typename Out>
  void launch(const at::Tensor& in, const at::Tensor& out, int64_t planes, int64_t inner, int64_t axis, bool last) {
    const DeviceTable t = table(axis);
    const BicubicAxisPass<In, Out, A> pass{data<const In>(in),
                                           data<Out>(out),
                                           last ? data<const Out>(residual_) : nullptr,
                                           planes,
                                           inner,
                                           band<A>(t),
                                           !last,
                                           finish_.round_between,
                                           low(),
                                           high()};
    C10_CUDA_CHECK(launch_bicubic_axis(pass, stream_));
  }

  template <typename V>
  static V* data(const at::Tensor& t) {
    if constexpr (std::is_const_v<V>)
      return t.defined() ? static_cast<V*>(t.const_data_ptr()) : nullptr;
    else
      return static_cast<V*>(t.mutable_data_ptr());
  }

  const BicubicArgs& args_;
  const at::Tensor &residual_, &out_;
  const BicubicFinish finish_;
  const c10::cuda::CUDAStream stream_;
};

struct Engine {
  static bool sums_bytes_in_float(const BicubicArgs&) { return false; }
  template <typename T, typename A>
  static void resample(const BicubicArgs& args, const at::Tensor& residual, const at::Tensor& out,
                       const BicubicFinish& finish) {
    Resampler<T, A>(args, residual, out, finish).run();
  }
};

at::Tensor bicubic_cuda(const at::Tensor& input,  // [N, C, spatial]
                        at::IntArrayRef size, at::ArrayRef<double> step, double a, bool antialias,
                        std::string_view border, bool align_corners, const std::optional<at::Tensor>& residual,
                        double low, double high) {
  const c10::OptionalDeviceGuard guard(at::device_of(input));
  return run_bicubic<Engine>("bicubic", input, size, step, {a, antialias, border, align_corners}, false,
                             {residual, low, high});
}

at::Tensor bicubic_backward_cuda(const at::Tensor& grad_output, at::IntArrayRef size, at::ArrayRef<double> step,
                                 double a, bool antialias, std::string_view border, bool align_corners) {
  const c10::OptionalDeviceGuard guard(at::device_of(grad_output));
  return run_bicubic<Engine>("_bicubic_backward", grad_output, size, step, {a, antialias, border, align_corners}, true,
                             {std::nullopt, -INFINITY, INFINITY});
}

at::Tensor bicubic_uint8_cuda(const at::Tensor& input,  // [N, C, spatial] of one or two axes
                              at::IntArrayRef size, at::ArrayRef<double> step, double a, bool antialias,
                              std::string_view border, bool align_corners, std::string_view rounding) {
  const c10::OptionalDeviceGuard guard(at::device_of(input));
  return run_bicubic_uint8<Engine>(input, size, step, {a, antialias, border, align_corners}, rounding);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastdense, CUDA, m) {
  m.impl("bicubic", &bicubic_cuda);
  m.impl("_bicubic_backward", &bicubic_backward_cuda);
  m.impl("bicubic_uint8", &bicubic_uint8_cuda);
}

}  // namespace fastdense
