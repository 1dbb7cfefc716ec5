// SPDX-License-Identifier: Apache-2.0
// Reads the flat list of weights that an op takes, in order, and checks each.  A tensor without elements stands for an
// absent one.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

#include "core/checks.h"

namespace fastdense {

// A batch norm.  Running statistics are given when it normalises with them (eval mode, frozen), else undefined.
struct NormArgs {
  at::Tensor weight, bias, running_mean, running_var;
  double eps = 0;
  int64_t at = 0;  // position of `weight` in the list of weights
  bool frozen() const { return running_mean.defined(); }
};

// A convolution's weight, or its bias, and its position in the list.
struct ConvArgs {
  at::Tensor weight;
  int64_t at = 0;
};

// Shape of a 1x1 convolution.
inline std::vector<int64_t> conv1x1_shape(int64_t out, int64_t in, size_t spatial_dims) {
  std::vector<int64_t> shape{out, in};
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
    const std::vector<int64_t> shape{channels};
    n.weight = take(name + ".weight", shape, true);
    n.bias = take(name + ".bias", shape, true);
    n.running_mean = take(name + ".running_mean", shape, true);
    n.running_var = take(name + ".running_var", shape, true);
    n.eps = eps_[next_eps_++];
    TORCH_CHECK_VALUE(n.running_mean.defined() == n.running_var.defined(), op_, ": expected ", name,
                      ".running_mean and running_var to be given together, got one of them");
    return n;
  }

  ConvArgs conv(const std::string& name, at::IntArrayRef shape) {
    const int64_t at = next_;
    return {take(name + ".weight", shape, false), at};
  }

  // Undefined where there is none.
  ConvArgs bias(const std::string& name, int64_t channels) {
    const int64_t at = next_;
    return {take(name + ".bias", {channels}, true), at};
  }

  // The tensor `ahead` places behind the current one, given or not.
  const at::Tensor& at(int64_t ahead) const { return weights_[size_t(next_ + ahead)]; }

  // The same, to learn a shape from.
  const at::Tensor& peek(int64_t ahead, const std::string& name) const {
    const at::Tensor& t = at(ahead);
    TORCH_CHECK_VALUE(t.numel() > 0, op_, ": expected ", name, ".weight to be given, got an empty tensor");
    return t;
  }

 private:
  at::Tensor take(const std::string& name, at::IntArrayRef shape, bool optional) {
    const at::Tensor& t = weights_[size_t(next_++)];
    if (optional && t.numel() == 0) return {};
    check_floating(op_, name.c_str(), t);
    TORCH_CHECK_VALUE(t.device() == options_.device(), op_, ": expected ", name, " to be on ", options_.device(),
                      " like input, got ", t.device());
    check_shape(op_, name.c_str(), t, shape);
    return t;
  }

  const char* op_;
  at::TensorList weights_;
  at::ArrayRef<double> eps_;
  const at::TensorOptions& options_;
  int64_t next_ = 0;
  size_t next_eps_ = 0;
};

// Spatial sizes as three dimensions, the missing ones trailing with size 1: work is shared out along the first.
inline void fill_three(at::IntArrayRef from, int64_t (&to)[3]) {
  for (size_t d = 0; d < 3; ++d) to[d] = d < from.size() ? from[d] : 1;
}

}  // namespace fastdense
