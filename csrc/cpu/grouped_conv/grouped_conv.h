// SPDX-License-Identifier: Apache-2.0
// Grouped 3x3 convolutions with few channels a group, with norm + ReLU in front and batch statistics behind: the loops
// over bundles of groups and rows of images, threads and memory around cpu/grouped_conv/grouped_conv_kernels.h.
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <type_traits>

#include "cpu/block_forward.h"
#include "cpu/grouped_conv/grouped_conv_kernels.h"

namespace fastdense {

template <typename T>
class GroupedConvolution3x3 {
  static_assert(std::is_same_v<T, accumulate_t<T>>);

 public:
  GroupedConvolution3x3(const BlockForward<T>& block, const GroupedConv& conv)
      : kernels_(grouped_conv_kernels<T>(current_isa())),
        block_(block),
        conv_(conv),
        layout_(kernels_.layout(conv)),
        stripes_((conv.out_height() + layout_.rows - 1) / layout_.rows),
        workspace_(block.bytes(block.workers * layout_.workspace_bytes)) {
    // Bundles of a unit share the rows of a stripe while they are in cache; their weights stay there too.
    constexpr int64_t kNearWeights = 48 * 1024 / sizeof(T);
    bundles_at_once_ = std::clamp<int64_t>(kNearWeights / layout_.weights, 1, layout_.bundles);
    bundle_runs_ = (layout_.bundles + bundles_at_once_ - 1) / bundles_at_once_;
    const int64_t wanted = block.workers > 1 ? (4 * block.workers + bundle_runs_ - 1) / bundle_runs_ : 1;
    parts_ = std::min(wanted, conv.images * stripes_);
  }

  at::Tensor pack_forward(const at::Tensor& weight) const { return pack(weight, false); }
  std::vector<int64_t> packed_sizes() const { return {layout_.bundles, layout_.weights}; }

  // out [pixels, groups * out] = the convolution of relu(norm(source)), and its batch statistics where wanted.
  // `packed`: what pack_forward() made of the weight.
  void forward(const at::Tensor& packed, const Source<T>& source, T* out, const BatchStatistics<T>& statistics) const {
    const int64_t columns = conv_.groups * conv_.out;
    const at::Tensor partial =
        block_.template temporary<double>({statistics.mean ? conv_.images * stripes_ : 0, 2, columns});
    const auto body = of_unit(
        [&](int64_t worker, int64_t, const OutputRows& rows, int64_t bundle) {
          kernels_.forward(conv_, rows, bundle, source, of_bundle(packed, bundle), out, workspace(worker));
        },
        [&](int64_t stripe, const OutputRows& rows, int64_t first, int64_t end) {
          if (!statistics.mean) return;
          const int64_t begin = first * layout_.columns, n = std::min(end * layout_.columns, columns) - begin;
          const int64_t line = rows.image * conv_.out_height() + rows.first;
          double* mean = partial.template mutable_data_ptr<double>() + 2 * stripe * columns + begin;
          block_.kernels.moments(out + line * conv_.out_width() * columns + begin, columns,
                                 rows.count * conv_.out_width(), n, mean, mean + columns);
        });
    block_.share_units(units(), body);
    const auto count = [&](int64_t stripe) { return rows_of(stripe).count * conv_.out_width(); };
    if (statistics.mean) block_.combine(partial, columns, count, statistics.mean, statistics.var);
  }

  // Gradients of what the norm reads and of its sums, by epilogue(worker), from dy [pixels, groups * out]; returns that
  // of the weight, undefined unless it is needed.
  template <typename Epilogue>
  at::Tensor backward(const at::Tensor& weight, const Source<T>& source, const T* dy, bool needs_weight,
                      const Epilogue& epilogue) const {
    const at::Tensor packed = pack(weight, true);
    const at::Tensor partial = at::zeros({needs_weight ? parts_ : 0, layout_.bundles * layout_.weights},
                                         at::TensorOptions().dtype(BlockForward<T>::kAccumulate));
    const auto body = of_unit(
        [&](int64_t worker, int64_t part, const OutputRows& rows, int64_t bundle) {
          BackwardEpilogue<T> to = epilogue(worker);
          if (needs_weight)
            to.dweight = partial.template mutable_data_ptr<T>() + part * partial.size(1) + bundle * layout_.weights;
          kernels_.backward(conv_, rows, bundle, source, dy, of_bundle(packed, bundle), to, workspace(worker));
        },
        [](auto...) {});
    block_.for_each_worker(units(), body);
    return needs_weight ? unpack(partial, weight) : at::Tensor();
  }

 private:
  at::Tensor pack(const at::Tensor& weight, bool reversed) const {
    const at::Tensor plain = block_.accumulate_type(weight);
    const T* from = plain.template const_data_ptr<T>();
    at::Tensor packed = block_.template temporary<T>({layout_.bundles, layout_.weights});
    block_.share_units(layout_.bundles, [&](int64_t, int64_t bundle) {
      kernels_.pack(from, conv_, reversed, bundle, packed.template mutable_data_ptr<T>() + bundle * layout_.weights);
    });
    return packed;
  }
  const T* of_bundle(const at::Tensor& packed, int64_t bundle) const {
    return packed.template const_data_ptr<T>() + bundle * layout_.weights;
  }

  // The sum of the gradients of all parts, in order.
  at::Tensor unpack(const at::Tensor& partial, const at::Tensor& weight) const {
    const at::Tensor packed = partial.size(0) == 1 ? partial : partial.sum(0);
    const T* from = packed.template const_data_ptr<T>();
    at::Tensor out = block_.template temporary<T>(weight.sizes());
    T* to = out.template mutable_data_ptr<T>();
    block_.share_units(layout_.bundles, [&](int64_t, int64_t bundle) {
      kernels_.unpack(from + bundle * layout_.weights, conv_, bundle, to);
    });
    return out;
  }

  OutputRows rows_of(int64_t stripe) const {
    const int64_t first = stripe % stripes_ * layout_.rows;
    return {stripe / stripes_, first, std::min(layout_.rows, conv_.out_height() - first)};
  }

  // What is done for a unit, one part of the stripes of all images and a run of bundles, so that sums of a part do not
  // depend on the worker: body(worker, part, its rows, bundle) for each.  done(stripe, its rows, first bundle, end)
  // after such a run.
  template <typename Body, typename Done>
  auto of_unit(const Body& body, const Done& done) const {
    return [this, body, done](int64_t worker, int64_t unit) {
      const int64_t stripes = conv_.images * stripes_;
      const int64_t part = unit % parts_, first = unit / parts_ * bundles_at_once_;
      const int64_t end = std::min(first + bundles_at_once_, layout_.bundles);
      for (int64_t stripe = part * stripes / parts_; stripe < (part + 1) * stripes / parts_; ++stripe) {
        const OutputRows rows = rows_of(stripe);
        for (int64_t bundle = first; bundle < end; ++bundle) body(worker, part, rows, bundle);
        done(stripe, rows, first, end);
      }
    };
  }
  int64_t units() const { return bundle_runs_ * parts_; }

  void* workspace(int64_t worker) const {
    return workspace_.mutable_data_ptr<uint8_t>() + worker * layout_.workspace_bytes;
  }

  const GroupedConvKernels<T>& kernels_;
  const BlockForward<T>& block_;
  const GroupedConv conv_;
  const GroupedConvLayout layout_;
  const int64_t stripes_;  // of an image
  const at::Tensor workspace_;
  int64_t bundles_at_once_, bundle_runs_, parts_;
};

}  // namespace fastdense
