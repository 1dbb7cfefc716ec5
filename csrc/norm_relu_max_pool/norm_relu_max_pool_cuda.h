// SPDX-License-Identifier: Apache-2.0
// The CUDA side of norm_relu_max_pool between the checks and the kernels.  Knows a stream, but not where it comes from:
// built under FASTDENSE_EMULATE, the same code runs on CPU tensors.
#pragma once

#include <vector>

#include "cuda/block_backward.h"
#include "norm_relu_max_pool/norm_relu_max_pool.h"
#include "norm_relu_max_pool/norm_relu_max_pool_launch.h"

namespace fastdense {

template <typename T>
class NormPoolCuda : CudaBlockForward<T> {
  using Base = CudaBlockForward<T>;
  using Base::cuda, Base::sync;
  using typename Base::A, typename Base::Partials;

 public:
  NormPoolCuda(const NormPoolArgs& args, const at::TensorOptions& options, const CudaContext& cuda)
      : Base(options, cuda, args.process_group),
        args_(args),
        shape_{args.g, args.channels, args.layout.channels_last},
        c_(args.channels),
        splits_(norm_pool_splits(shape_, args.batch, cuda.blocks)) {
    check_image_pixels("norm_relu_max_pool", c_ * args.g.padded_pixels());
  }

  void forward(const at::Tensor& input, const NormPoolOutputs& o) {
    const at::Tensor x = args_.layout.arrange(input);
    if (!args_.norm.frozen()) statistics(this->const_data(x), {this->sums(o.mean), this->sums(o.var)});
    uint8_t* indices = o.indices.dim() > 1 ? o.indices.mutable_data_ptr<uint8_t>() : nullptr;
    check_launch(launch_norm_pool<T>({shape_, this->norm_params(args_.norm, this->sums(o.mean), this->sums(o.var)),
                                      this->const_data(x), this->data(o.y), indices},
                                     args_.batch, splits_, cuda.stream));
  }

  std::vector<at::Tensor> backward(const NormPoolSaved& saved, const at::Tensor& grad_output,
                                   const std::vector<bool>& needs, at::TensorList weights) {
    CudaBlockBackward<T> gradients(*this, needs, weights);
    const at::Tensor x = args_.layout.arrange(saved.input), grad = args_.layout.arrange(grad_output);
    const at::Tensor indices = args_.layout.arrange(saved.indices);
    const NormParams<A> norm =
        this->norm_params(args_.norm, saved.mean.const_data_ptr<A>(), saved.var.const_data_ptr<A>());
    const auto s = gradients.sums(c_);
    const bool frozen = args_.norm.frozen();
    if (!frozen || needs[1] || needs[2]) {
      const PartialSums<A> partial = this->reused_partials(args_.empty() ? 0 : splits_.count(), c_);
      check_launch(launch_norm_pool_sums<T>({shape_, this->const_data(x), this->const_data(grad),
                                             indices.const_data_ptr<uint8_t>(), norm.mean, partial.data},
                                            args_.batch, splits_, cuda.stream));
      gradients.finalise(args_.norm, norm, partial, args_.values(), {}, s);
      gradients.set_norm(args_.norm, s);
    }
    const bool others = sync.enabled() && !frozen;
    const at::Tensor terms = others ? at::stack({s.dbias, s.dweight}) : at::Tensor();
    if (others) sync.sums(terms, args_.values());
    if (!needs[0]) return gradients.take();
    const at::Tensor dx = args_.layout.empty(saved.input.sizes(), saved.input.options());
    check_launch(launch_norm_pool_backward<T>(
        {shape_, norm, this->const_data(x), this->const_data(grad), indices.const_data_ptr<uint8_t>(), this->data(dx),
         this->sums(others ? terms[0] : s.dbias), this->sums(others ? terms[1] : s.dweight),
         frozen ? A(0) : A(1.0 / double(args_.values()))},
        args_.batch, splits_, cuda.stream));
    gradients.set_input(dx);
    return gradients.take();
  }

 private:
  void statistics(const T* x, const BatchStatistics<A>& to) {
    const int64_t rows = args_.values();
    if (shape_.channels_last) return Base::statistics({x, c_}, rows, c_, to);
    // A block takes one channel.
    constexpr int64_t kBlockColumns = 256;
    const int64_t splits = this->splits(rows, kBlockColumns * c_);
    const Partials partial{this->numbers({rows > 0 ? splits : 0, 2, c_}), rows, splits, splits * 2 * c_};
    const at::Tensor pivot = at::empty({c_}, this->options);
    check_launch(launch_plane_moments<T>({x, args_.g.pixels(), this->sums(partial.tensor), this->data(pivot)}, rows, c_,
                                         partial.splits, cuda.stream));
    this->finalise_moments(partial, this->const_data(pivot), rows, to);
  }

  const NormPoolArgs& args_;
  const NormPoolShape shape_;
  const int64_t c_;
  const NormPoolSplits splits_;
};

}  // namespace fastdense
