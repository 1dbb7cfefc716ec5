// SPDX-License-Identifier: Apache-2.0
// Tensors [N, C, spatial] with the channels innermost in memory, in any number of spatial dimensions.
#pragma once

#include <ATen/core/DimVector.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>

namespace fastdense {

// Strides with the channels innermost.
inline at::DimVector channels_last_strides(at::IntArrayRef sizes) {
  at::DimVector strides(sizes.size());
  strides[1] = 1;
  int64_t stride = sizes[1];
  for (size_t d = sizes.size(); d-- > 2; stride *= sizes[d]) strides[d] = stride;
  strides[0] = stride;
  return strides;
}

// Uninitialised.
inline at::Tensor empty_channels_last(at::IntArrayRef sizes, const at::TensorOptions& options) {
  return at::empty_strided(sizes, channels_last_strides(sizes), options);
}

// Whether the channels are innermost, pixel behind pixel.  That of a dimension of size 1 may be any stride.
inline bool has_channels_innermost(const at::Tensor& t) {
  if (t.numel() == 0) return true;
  int64_t stride = 1;
  const auto follows = [&](int64_t d) {
    const bool good = t.size(d) == 1 || t.stride(d) == stride;
    stride *= t.size(d);
    return good;
  };
  bool good = follows(1);
  for (int64_t d = t.dim() - 1; good && d > 1; --d) good = follows(d);
  return good && follows(0);
}

// `t` with the channels innermost: itself if it is so already, else a copy.
inline at::Tensor to_channels_last(const at::Tensor& t) {
  return has_channels_innermost(t) ? t : t.movedim(1, -1).contiguous().movedim(-1, 1);
}

// Whether the channels are innermost and could be nowhere else.
inline bool is_channels_last(const at::Tensor& t) { return !t.is_contiguous() && has_channels_innermost(t); }

// Whether there is anything to compute: not on the meta device, where an op only checks and allocates.
inline bool has_values(const at::Tensor& t) { return t.numel() > 0 && !t.is_meta(); }

// `value`, which the caller owns, in the shape, type and layout of a parameter: autograd then takes a gradient without
// copying it, and DDP does not warn about its strides.
inline at::Tensor laid_out_like(const at::Tensor& value, const at::Tensor& parameter) {
  if (value.scalar_type() == parameter.scalar_type() && value.sizes() == parameter.sizes() &&
      value.strides() == parameter.strides() && value.is_non_overlapping_and_dense())
    return value;  // as a rule
  const at::Tensor shaped = value.reshape(parameter.sizes());
  bool same = shaped.scalar_type() == parameter.scalar_type() && shaped.is_non_overlapping_and_dense();
  for (int64_t d = 0; d < shaped.dim(); ++d) same &= shaped.size(d) == 1 || shaped.stride(d) == parameter.stride(d);
  if (same) return shaped.as_strided(parameter.sizes(), parameter.strides());  // those of single elements may differ
  return at::empty_like(parameter).copy_(shaped);
}

// How the tensors of an elementwise op lie in memory: with channels innermost if those of `like` are, else contiguous.
struct Layout {
  bool channels_last;

  explicit Layout(const at::Tensor& like) : channels_last(is_channels_last(like)) {}

  at::Tensor arrange(const at::Tensor& t) const { return channels_last ? to_channels_last(t) : t.contiguous(); }

  at::Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options) const {
    return channels_last ? empty_channels_last(sizes, options) : at::empty(sizes, options);
  }
};

}  // namespace fastdense
