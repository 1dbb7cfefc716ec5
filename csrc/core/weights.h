// SPDX-License-Identifier: Apache-2.0
// Reads the flat list of weights that an op takes, in order, and checks each.  A tensor without elements stands for an
// absent one.
#pragma once

#include <ATen/core/DimVector.h>
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros_like.h>

#include <string>
#include <vector>

#include "core/checks.h"

namespace fastdense {

// A norm.  Running statistics are given when it normalises with them (eval mode, frozen), else undefined.
struct NormArgs {
  at::Tensor weight, bias, running_mean, running_var;
  double eps = 0;
  int64_t groups = 0;  // of channels that share the statistics of one sample; 0: each has those of the batch
  int64_t at = 0;      // position of `weight` in the list of weights
  bool frozen() const { return running_mean.defined(); }
};

// A convolution's weight, or its bias, or another parameter, and its position in the list.
struct ConvArgs {
  at::Tensor weight;
  int64_t at = 0;
};

// Shape of a 1x1 convolution.
inline at::DimVector conv1x1_shape(int64_t out, int64_t in, size_t spatial_dims) {
  at::DimVector shape{out, in};
  shape.resize(2 + spatial_dims, 1);
  return shape;
}

class WeightReader {
 public:
  WeightReader(const char* op, at::TensorList weights, at::ArrayRef<double> eps, const at::TensorOptions& options)
      : op_(op), weights_(weights), eps_(eps), options_(options) {}

  NormArgs norm(const std::string& name, int64_t channels) {
    NormArgs n;
    n.at = next_;
    n.weight = take({name.c_str(), ".weight"}, {channels}, true);
    n.bias = take({name.c_str(), ".bias"}, {channels}, true);
    n.running_mean = take({name.c_str(), ".running_mean"}, {channels}, true);
    n.running_var = take({name.c_str(), ".running_var"}, {channels}, true);
    n.eps = eps_[next_eps_++];
    check_eps(op_, n.eps);
    constants_.insert(constants_.end(), {n.at + 2, n.at + 3});
    TORCH_CHECK_VALUE(n.running_mean.defined() == n.running_var.defined(), op_, ": expected ", name,
                      ".running_mean and running_var to be given together, got one of them");
    return n;
  }

  ConvArgs conv(const std::string& name, at::IntArrayRef shape) {
    const int64_t at = next_;
    return {take({name.c_str(), ".weight"}, shape, false), at};
  }

  // Undefined where there is none.
  ConvArgs bias(const std::string& name, int64_t channels) {
    const int64_t at = next_;
    return {take({name.c_str(), ".bias"}, {channels}, true), at};
  }

  // One number, or one for each channel; undefined where there is none.
  ConvArgs one_or(const std::string& name, int64_t channels) {
    const int64_t at = next_;
    return {take(name.c_str(), {weights_[size_t(at)].numel() == 1 ? 1 : channels}, true), at};
  }

  // The tensor `ahead` places behind the current one, given or not.
  const at::Tensor& at(int64_t ahead) const { return weights_[size_t(next_ + ahead)]; }

  // The same, to learn a shape of so many dimensions from.
  const at::Tensor& peek(int64_t ahead, const std::string& name, size_t rank) const {
    const at::Tensor& t = at(ahead);
    TORCH_CHECK_VALUE(t.numel() > 0, op_, ": expected ", name, ".weight to be given, got an empty tensor");
    check_rank(op_, (name + ".weight").c_str(), t, int64_t(rank));
    return t;
  }

  // Positions of what has no gradient: running statistics.
  const std::vector<int64_t>& constants() const { return constants_; }

 private:
  at::Tensor take(const ArgName& name, at::IntArrayRef shape, bool optional) {
    const at::Tensor& t = weights_[size_t(next_++)];
    if (optional && t.numel() == 0) return {};
    check_floating(op_, name, t);
    TORCH_CHECK_VALUE(t.device() == options_.device(), op_, ": expected ", name, " to be on ", options_.device(),
                      " like input, got ", t.device());
    check_shape(op_, name, t, shape);
    return t;
  }

  const char* op_;
  at::TensorList weights_;
  at::ArrayRef<double> eps_;
  const at::TensorOptions& options_;
  int64_t next_ = 0;
  size_t next_eps_ = 0;
  std::vector<int64_t> constants_;
};

// Whether the gradients of the input and of every weight are wanted.  Absent weights have none, nor have `constants`.
inline std::vector<bool> read_needs(const char* op, const c10::List<bool>& needs_grad, at::TensorList weights,
                                    const std::vector<int64_t>& constants) {
  check_entries(op, "needs_grad", needs_grad.size(), int64_t(weights.size()) + 1);
  std::vector<bool> needs(needs_grad.begin(), needs_grad.end());
  for (size_t i = 0; i < weights.size(); ++i)
    if (weights[i].numel() == 0) needs[i + 1] = false;
  for (const int64_t at : constants) needs[size_t(at) + 1] = false;
  return needs;
}

// What a backward op returns where there is nothing to compute: zeros for what is wanted.
inline std::vector<at::Tensor> zero_gradients(const at::Tensor& input_gradient, at::TensorList weights,
                                              const std::vector<bool>& needs) {
  const auto none = [&] { return at::empty({0}, input_gradient.options()); };  // results do not share memory
  std::vector<at::Tensor> gradients{needs[0] ? input_gradient.zero_() : none()};
  for (size_t i = 0; i < weights.size(); ++i) gradients.push_back(needs[i + 1] ? at::zeros_like(weights[i]) : none());
  return gradients;
}

// A tensor that forward keeps in some modes only is without elements in the others.
inline bool is_absent(const at::Tensor& t) { return t.dim() > 0 && t.size(0) == 0; }

// Rows that forward kept, checked and contiguous; themselves where they are absent.
inline at::Tensor kept_rows(const char* op, const char* arg, const at::Tensor& t, at::IntArrayRef shape,
                            const char* like_arg, const at::Tensor& like) {
  check_like(op, arg, t, like_arg, like);
  if (is_absent(t)) return t;
  check_shape(op, arg, t, shape);
  return t.contiguous();
}

// Spatial sizes as three dimensions, the missing ones trailing with size 1: work is shared out along the first.
inline void fill_three(at::IntArrayRef from, int64_t (&to)[3]) {
  for (size_t d = 0; d < 3; ++d) to[d] = d < from.size() ? from[d] : 1;
}

}  // namespace fastdense
