// SPDX-License-Identifier: Apache-2.0
// Every native op of fastdense, one schema a line. Kernels register themselves in csrc/<op>/<op>_{cpu,cuda}.cpp.
#include <torch/library.h>

namespace {

void define(torch::Library& m) {
  m.def(
      "dense_block(Tensor input, Tensor[] weights, float[] eps, int num_layers, bool bottleneck, str tail, "
      "float drop_rate, Tensor? seed, bool keep_bottleneck, str process_group, bool contiguous=False, "
      "str activations=\"\", float[] activation_parameters=[], int[] groups=[], bool recompute=False) -> (Tensor, "
      "Tensor, Tensor, Tensor, "
      "Tensor)");
  m.def(
      "_dense_block_backward(Tensor grad_output, Tensor buffer, Tensor mean, Tensor var, Tensor z, Tensor[] weights, "
      "float[] eps, int num_layers, bool bottleneck, str tail, float drop_rate, Tensor? seed, SymInt in_channels, "
      "bool[] needs_grad, str process_group, str activations=\"\", float[] activation_parameters=[], int[] groups=[]) "
      "-> Tensor[]");
  m.def(
      "pack_dense_block(Tensor[] weights, float[] eps, int in_channels, int num_layers, bool bottleneck, str tail) "
      "-> Tensor[]");
  m.def(
      "dense_block_inference(Tensor input, Tensor[] weights, float[] eps, int num_layers, bool bottleneck, str tail, "
      "Tensor[] packed, bool contiguous=False) -> Tensor");
  m.def(
      "dual_path_stage(Tensor input, Tensor[] weights, float[] eps, int num_blocks, bool projection, "
      "int residual_channels, int stride, str memory, str process_group, bool contiguous=False) -> (Tensor, Tensor, "
      "Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "_dual_path_stage_backward(Tensor grad_output, Tensor input, Tensor out, Tensor residuals, Tensor a, Tensor b, "
      "Tensor mean, Tensor var, Tensor[] weights, float[] eps, int num_blocks, bool projection, "
      "int residual_channels, int stride, bool[] needs_grad, str process_group) -> Tensor[]");
  m.def(
      "pack_dual_path_stage(Tensor[] weights, float[] eps, int in_channels, int num_blocks, bool projection, "
      "int residual_channels, int stride) -> Tensor[]");
  m.def(
      "dual_path_stage_inference(Tensor input, Tensor[] weights, float[] eps, int num_blocks, bool projection, "
      "int residual_channels, int stride, Tensor[] packed, bool contiguous=False) -> Tensor");
  m.def("dual_path_merge(Tensor input, Tensor features, int residual_channels) -> Tensor");
  m.def("dual_path_split(Tensor input, SymInt channels, int residual_channels) -> (Tensor, Tensor)");
  m.def(
      "update_running_stats_(Tensor(a!)[] running_mean, Tensor(b!)[] running_var, Tensor(c!)[] num_batches_tracked, "
      "Tensor mean, Tensor var, int[] offsets, float[] momentum, SymInt count, Tensor? total_count) -> ()");
  m.def(
      "bicubic(Tensor input, SymInt[] size, float[] step, float a, bool antialias, str border, bool align_corners, "
      "Tensor? residual, float low, float high) -> Tensor");
  m.def(
      "_bicubic_backward(Tensor grad_output, SymInt[] size, float[] step, float a, bool antialias, str border, "
      "bool align_corners) -> Tensor");
  m.def(
      "bicubic_uint8(Tensor input, SymInt[] size, float[] step, float a, bool antialias, str border, "
      "bool align_corners, str rounding) -> Tensor");
  m.def("highway_gate(Tensor input, Tensor projection, str activation) -> Tensor");
  m.def(
      "_highway_gate_backward(Tensor grad_output, Tensor input, Tensor projection, str activation) "
      "-> (Tensor, Tensor)");
  m.def("mean_join(Tensor[] inputs) -> Tensor");
  m.def(
      "residual_dense_block(Tensor input, Tensor[] weights, int[] first_channels, bool fusion, float negative_slope, "
      "float scale, Tensor? outer, float outer_scale, bool contiguous=False, bool recompute=False) -> (Tensor, "
      "Tensor)");
  m.def(
      "_residual_dense_block_backward(Tensor grad_output, Tensor buffer, Tensor[] weights, int[] first_channels, "
      "bool fusion, float negative_slope, float scale, float outer_scale, SymInt in_channels, bool[] needs_grad) "
      "-> Tensor[]");
  m.def(
      "norm_relu_max_pool(Tensor input, Tensor[] norm, float eps, int[] kernel_size, int[] stride, int[] padding, "
      "bool keep_winners, str process_group) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "_norm_relu_max_pool_backward(Tensor grad_output, Tensor input, Tensor winners, Tensor mean, Tensor var, "
      "Tensor[] norm, float eps, int[] kernel_size, int[] stride, int[] padding, bool[] needs_grad, "
      "str process_group) -> Tensor[]");
  m.def("dropout_mask(Tensor seed, int layer, int rows, int channels, float drop_rate) -> Tensor");
}

}  // namespace

TORCH_LIBRARY(fastdense, m) { define(m); }

// The same without arithmetic, on the meta device: fastdense/ops/fakes.py calls them where all sizes are numbers.
TORCH_LIBRARY(fastdense_meta, m) { define(m); }
