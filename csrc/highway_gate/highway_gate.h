// SPDX-License-Identifier: Apache-2.0
// Front half of highway_gate and its backward, shared by the CPU and the CUDA files: checks, layout, allocation,
// parameters. Everything lies in memory like the projection: channels innermost if that is so there, else contiguous.
// Either way the halves of an element lie `block` apart: C * spatial elements contiguously, C with channels innermost.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>

#include <string_view>
#include <vector>

#include "core/checks.h"
#include "core/layout.h"
#include "core/storage.h"
#include "highway_gate/highway_gate_math.h"

namespace fastdense {

inline void check_highway_activation(const char* op, std::string_view name) {
  TORCH_CHECK_VALUE(name == "relu" || name == "tanh" || name == "identity", op,
                    ": expected activation to be one of relu, tanh, identity, got ", std::string(name));
}

// body(T{}, Activation{}) with our storage type of `dtype` and the activation of that name.
template <typename Body>
void dispatch_highway_gate(at::ScalarType dtype, std::string_view name, const Body& body) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, "highway_gate", [&] {
    using T = typename Storage<scalar_t>::type;
    if (name == "relu")
      body(T{}, HighwayRelu{});
    else if (name == "tanh")
      body(T{}, HighwayTanh{});
    else
      body(T{}, HighwayIdentity{});
  });
}

inline void check_highway_gate(const char* op, const at::Tensor& input, const at::Tensor& projection,
                               std::string_view activation) {
  check_highway_activation(op, activation);
  check_floating(op, "input", input);
  check_like(op, "projection", projection, "input", input);
  TORCH_CHECK_VALUE(input.dim() >= 2, op, ": expected input to have at least 2 dimensions, got shape ", input.sizes());
  std::vector<int64_t> sizes = input.sizes().vec();
  sizes[1] *= 2;
  check_shape(op, "projection", projection, sizes);
}

struct HighwayLayout : Layout {
  int64_t block = 1;

  explicit HighwayLayout(const at::Tensor& projection) : Layout(projection) {
    const int64_t dims = channels_last ? 2 : projection.dim();
    for (int64_t d = 1; d < dims; ++d) block *= projection.size(d);
    block /= 2;
  }
};

// input [N, C, spatial], projection [N, 2C, spatial] -> output [N, C, spatial]
struct HighwayForwardCall {
  HighwayLayout layout;
  at::Tensor input, projection, output;

  HighwayForwardCall(const char* op, const at::Tensor& x, const at::Tensor& projected, std::string_view activation)
      : layout((check_highway_gate(op, x, projected, activation), projected)) {
    output = layout.empty(x.sizes(), x.options());
    input = layout.arrange(x);
    projection = layout.arrange(projected);
  }

  template <typename T, typename Activation>
  HighwayForward<T, Activation> functor(T, Activation) const {
    return {static_cast<const T*>(input.const_data_ptr()), static_cast<const T*>(projection.const_data_ptr()),
            static_cast<T*>(output.mutable_data_ptr()), layout.block};
  }
};

// grad_output [N, C, spatial] -> grad_input [N, C, spatial], grad_projection [N, 2C, spatial]
struct HighwayBackwardCall {
  HighwayLayout layout;
  at::Tensor grad_output, input, projection, grad_input, grad_projection;

  HighwayBackwardCall(const char* op, const at::Tensor& grad, const at::Tensor& x, const at::Tensor& projected,
                      std::string_view activation)
      : layout((check_highway_gate(op, x, projected, activation), projected)) {
    check_like(op, "grad_output", grad, "input", x);
    check_shape(op, "grad_output", grad, x.sizes());
    grad_input = layout.empty(x.sizes(), x.options());
    grad_projection = layout.empty(projected.sizes(), projected.options());
    grad_output = layout.arrange(grad);
    input = layout.arrange(x);
    projection = layout.arrange(projected);
  }

  template <typename T, typename Activation>
  HighwayBackward<T, Activation> functor(T, Activation) const {
    return {static_cast<const T*>(grad_output.const_data_ptr()), static_cast<const T*>(input.const_data_ptr()),
            static_cast<const T*>(projection.const_data_ptr()),  static_cast<T*>(grad_input.mutable_data_ptr()),
            static_cast<T*>(grad_projection.mutable_data_ptr()), layout.block};
  }
};

}  // namespace fastdense
