# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E501
"""Plants mistakes in the native code, one at a time, and checks that the tests notice each.

Run ``make mutants`` (a quarter of an hour): every mistake is built in a copy of the tree and must make
a test of ``FILES`` fail; those in CUDA code with the emulated kernels.
Arguments choose mistakes by a part of the file's name.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Kernels alone first: they say what is wrong in the least time.
FILES = ["tests/emulation/test_conv1x1_kernels.py", "tests/emulation/test_dense_block_conv_kernels.py"]
FILES += ["tests/test_mean_join.py", "tests/test_residual_dense_block.py", "tests/test_norm_relu_max_pool.py"]
FILES += ["tests/test_dual_path.py", "tests/test_dense_block.py", "tests/test_sync_batch_norm.py"]
FILES += ["tests/test_fused_blocks.py"]

# (file below csrc, what stands there, what is planted)
MUTANTS = [
    ("core/batch_norm_math.h", "g - shift_sum - (x - mean) * slope_sum", "g - shift_sum + (x - mean) * slope_sum"),
    ("core/batch_norm_math.h", "g - shift_sum - (x - mean) * slope_sum", "g - (x - mean) * slope_sum"),
    ("core/batch_norm_math.h", "(t1 + xhat * t2) * inv_count", "(xhat * t2) * inv_count"),
    ("core/batch_norm_math.h", "return {scale, bias - mean * scale, mean, rstd}", "return {scale, bias, mean, rstd}"),
    ("core/batch_norm_math.h", "delta * delta * p.count * share", "delta * delta * share"),
    ("core/batch_norm_math.h", "count / (count - 1)", "1.0"),
    ("core/batch_norm_math.h", "relu_passes(mul_add(x, scale, shift)) ? dy : A(0)", "dy"),
    ("cpu/conv1x1/norm_relu.h", "mul_add(scale[i], gradient, A(load(g[i])))", "mul_add(A(1), gradient, A(load(g[i])))"),
    ("cpu/conv1x1/norm_relu.h", "weighted[i] += gradient * (value - mean[i])", "weighted[i] += gradient * value"),
    ("dense_block/dense_block_kernels_impl.h", "g, p, slab.begin, slab.end,", "g, p, slab.begin + 1, slab.end,"),
    ("cpu/conv/conv_taps.h", "g, p, 0, g.size[0],", "g, p, 0, g.size[0] - 1,"),
    ("cpu/conv1x1/norm_relu.h", "A gradient = dy[i] * share;", "A gradient = dy[i];"),
    ("dense_block/dense_block_kernels_impl.h", "apply_dropout(dropout, row, rows, n, d);", ""),
    ("cpu/block_backward.h", "if (norm.frozen()) return;", ""),
    ("cpu/block_backward.h", "norm.frozen() ? A(0) : A(1.0 / double(count))", "A(1.0 / double(count))"),
    ("cpu/block_backward.h", "share * s.weighted[j] * double(c.rstd()[first + j])", "share * s.weighted[j]"),
    ("dense_block/dense_block_forward_cpu.cpp", "layer.norm2, mean_ + at, var_ + at, args_.width", "layer.norm2, mean_, var_, args_.width"),
    ("cpu/gemm/gemm_bf16.h", "w[p + 1] = _mm512_unpackhi_epi32(v[p], v[p + 1]);", "w[p + 1] = _mm512_unpackhi_epi32(v[p + 1], v[p]);"),
    ("cpu/gemm/gemm_bf16.h", "i < round_up(depth, kAlign) / 2 * kPanel", "i < 0"),
    ("cpu/gemm/gemm_avx512_bf16.h", "accumulate || k > 0", "accumulate"),
    ("cpu/gemm/gemm_avx512_bf16.h", "(depth + 1) / 2", "depth / 2"),
    ("cpu/gemm/gemm.h", "i < columns ? value(r, i) : A(0)", "value(r, 0)"),
    ("dual_path/dual_path_forward_cpu.cpp", "mean_ + block.stats_c, var_ + block.stats_c, args_.width_b", "mean_ + block.stats_b, var_ + block.stats_b, args_.width_b"),
    ("dual_path/dual_path_backward_cpu.cpp", "args_.residual, residual_before(i + 1), mean, true, memory[0]", "args_.residual, residual_before(i + 1), mean, false, memory[0]"),
    ("dual_path/dual_path_backward_cpu.cpp", "this->pack_backward(block.conv_a.weight, s.first, s.n)", "this->pack_backward(block.conv_a.weight, 0, s.n)"),
    ("dual_path/dual_path_backward_cpu.cpp", "args_.residual).neg();", "args_.residual);"),
    ("cpu/conv1x1/norm_relu.h", "store<T>(A(load(add[j])) + from[j])", "store<T>(from[j])"),
    ("core/geometry.h", "i1 * g.stride[1]", "i1"),
    ("dense_block/dense_block.cpp", "layer.z_index = args.active_layers();", "layer.z_index = l;"),
    ("dense_block/dense_block.cpp", "o.buffer.narrow(1, layer.channels, args.growth).zero_()", "o.buffer.narrow(1, layer.channels, 1).zero_()"),
    ("mean_join/mean_join_math.h", "sum / A(joined)", "sum / A(2)"),
    ("mean_join/mean_join_kernels_impl.h", "int input = 1; input < join.joined", "int input = 2; input < join.joined"),
    ("mean_join/mean_join_kernels_impl.h", "at += kTile", "at += kTile + 1"),
    ("mean_join/mean_join.h", "layout.arrange(input)", "input.contiguous()"),
    ("core/sync_batch_norm.cpp", "vars + (means - centre).square()", "vars"),
    ("core/sync_batch_norm.cpp", "fill_(double(count))", "fill_(1.0)"),
    ("core/sync_batch_norm.h", "mean_of_all(terms, double(count), count)", "mean_of_all(terms, 1.0, count)"),
    ("cpu/block_backward.h", "if (!norm.frozen()) this->sync.sums(workspace, count);", ""),
    ("cpu/block_backward.h", "this->sync.means(t, count);", ""),
    ("cpu/conv/winograd.h", "v[2] = d[2] - d[1];", "v[2] = d[1] - d[2];"),
    ("cpu/conv/winograd.h", "dm[3] = -dy[1];", "dm[3] = dy[1];"),
    ("cpu/conv/conv2d_tile.h", "reversed ? 8 - t : t", "t"),
    ("cpu/conv/conv2d_tile.h", "winograd_ ? round_up_to_winograd(tile) : tile", "tile"),
    ("residual_dense_block/residual_dense_block_cpu.h", "rows -= 2;", "rows -= 1;"),
    ("residual_dense_block/residual_dense_block_forward_cpu.cpp", "conv({x_ + layer.first, ld_", "conv({x_, ld_"),
    ("residual_dense_block/residual_dense_block_backward_cpu.cpp", "d, {x_ + layer.first, ld_", "d, {x_, ld_"),
    ("residual_dense_block/residual_dense_block_backward_cpu.cpp", "wants_prefix ? g_ + layer.first", "wants_prefix ? g_"),
    ("dense_block/dense_block_kernels_impl.h", "origin + r * tile.columns + q", "origin + q"),
    ("dense_block/dense_block_kernels_impl.h", "out + (pixel - row) * k + j", "out + (pixel - row) * k"),
    ("norm_relu_max_pool/norm_relu_max_pool_math.h", "value > best || value != value", "value >= best || value != value"),
    ("norm_relu_max_pool/norm_relu_max_pool_math.h", "value > best || value != value", "value > best"),
    ("norm_relu_max_pool/norm_relu_max_pool_math.h", "before / g.stride[d] + 1", "before / g.stride[d] + 2"),
    ("norm_relu_max_pool/norm_relu_max_pool_math.h", "line % size1) * g.size[2]", "line % size1) * g.size[1]"),
    ("norm_relu_max_pool/norm_relu_max_pool_kernels_impl.h", "begin = -steps < 0 ? 0 : -steps;", "begin = -steps < 0 ? 0 : 1 - steps;"),
    ("norm_relu_max_pool/norm_relu_max_pool_kernels_impl.h", "weighted += g * deviation;", "weighted += g;"),
    ("norm_relu_max_pool/norm_relu_max_pool_kernels_impl.h", "0 <= i && i < count", "0 <= i && i + 1 < count"),
    ("norm_relu_max_pool/norm_relu_max_pool_cpu.cpp", "add(x + rows * kColumns, 1, count - rows * kColumns);", ""),
    ("norm_relu_max_pool/norm_relu_max_pool_cpu.cpp", "args.layout.arrange(grad_output)", "grad_output.contiguous()"),
    ("norm_relu_max_pool/norm_relu_max_pool_cpu.cpp", "* (args.layout.channels_last ? args.channels : 1)", ""),
]  # fmt: skip

CUDA_MUTANTS = [
    ("cuda/norm_relu/column_reduce.h", "__syncthreads();\n    if (threadIdx.y < half)", "if (threadIdx.y < half)"),
    ("cuda/norm_relu/column_reduce.h", "__syncthreads();  // all have read before anybody writes anew", ""),
    ("cuda/norm_relu/column_reduce.h", "begin + rows_per_block < rows ? begin + rows_per_block : rows", "begin + rows_per_block"),
    ("cuda/norm_relu/column_reduce.h", "row + (kTileRows - 1) * step < end", "row + (kTileRows - 2) * step < end"),
    ("cuda/norm_relu/column_reduce.h", "columns - first < V ? int(columns - first) : V", "V"),
    ("cuda/norm_relu/column_reduce.h", "2 * blockIdx.y * columns + first;", "2 * blockIdx.y * columns + first + 1;"),
    ("cuda/norm_relu/column_reduce.h", "bits % (V * sizeof(T)) != 0 || columns < V", "columns < V"),
    ("cuda/norm_relu/column_reduce.h", "add(i, {A(kRows), mean, m2});", "add(i, {A(1), mean, m2});"),
    ("cuda/norm_relu/columns.h", "norm(first + i)", "norm(first)"),
    ("cuda/norm_relu/columns.h", "if (i == 0 || at % 4 == 0)", "if (i == 0)"),
    ("cuda/norm_relu/columns.h", "at & 2 ? high : low", "low"),
    ("cuda/norm_relu/norm_relu_forward.cu", "+ count * (mean - centre) * (mean - centre)", ""),
    ("cuda/norm_relu/norm_relu_forward.cu", "(p.pivot ? double(load(p.pivot[column])) : 0.0) + centre", "centre"),
    ("cuda/norm_relu/norm_relu_forward.cu", "(left > 0 ? left : 0) : rows_per_split", "rows_per_split : rows_per_split"),
    ("cuda/norm_relu/norm_relu_forward.cu", "__syncthreads();\n  const double centre = *total;", "const double centre = *total;"),
    ("cuda/norm_relu/norm_relu_forward.cu", "__syncthreads();\n  sums = {};", "sums = {};"),
    ("cuda/norm_relu/norm_relu_forward.cu", "p_.first + row", "row"),
    ("cuda/norm_relu/norm_relu_backward.cu", "state_.second(i) += dv * (value - mean_[i])", "state_.second(i) += dv * value"),
    ("cuda/norm_relu/norm_relu_backward.cu", "share * s2 * double(norm.rstd)", "share * s2"),
    ("cuda/norm_relu/norm_relu_backward.cu", "A gradient = load(dy) * share_;", "A gradient = load(dy);"),
    ("cuda/norm_relu/norm_relu_backward.cu", "return -1;", "return pooled_begin_;"),
    ("cuda/norm_relu/norm_relu_backward.cu", "dy = store<T>(norm_relu(x, norm_.scale[i], norm_.shift[i]));", ""),
    ("cuda/block_backward.h", "partial.of_chunk(chunk)", "partial.of_chunk(0)"),
    ("cuda/block_backward.h", "args.frozen() ? A(0) : A(1.0 / double(rows))", "A(1.0 / double(rows))"),
    ("cuda/block_backward.h", "args.frozen() ? CudaCorrections{} : corrections", "corrections"),
    ("cuda/block_forward.h", "source.stride(0), source.stride(1)", "source.stride(1), source.stride(0)"),
    ("cuda/norm_relu/norm_relu_backward.cu", "at - i * stride < g_.window[d]", "true"),
    ("cuda/norm_relu/norm_relu_forward.cu", "if (!p_.add.data) return x;", "return x;"),
    ("cuda/norm_relu/norm_relu_forward.cu", "p_.pivot ? read", "false ? read"),
    ("cuda/norm_relu/norm_relu_forward.cu", "s / splits * p.chunk", "0"),
    ("cuda/block_backward.h", "norm.from_channel(s.first), partial[i]", "norm, partial[i]"),
    ("cuda/block_backward.h", "dy.from_column(s.first)", "dy"),
    ("dual_path/dual_path_cuda.h", "i == 0 ? first_stride_ : ones_", "ones_"),
    ("dual_path/dual_path_cuda.h", "this->matrix(y).from_column(s.first)", "this->matrix(y)"),
    ("dual_path/dual_path_forward_cuda.cpp", "if (i > 0 || !args.projection) copy", "if (i > 0) copy"),
    ("dual_path/dual_path_forward_cuda.cpp", "wanted ? appended.of_chunk(chunk)", "wanted ? appended.of_chunk(0)"),
    ("dual_path/dual_path_backward_cuda.cpp", "return (args.num_blocks() - 1 - i) * r;", "return (args.num_blocks() - 1) * r;"),
    ("dual_path/dual_path_backward_cuda.cpp", "t(), 1, -1);", "t(), 1, 1);"),
    ("dual_path/dual_path_backward_cuda.cpp", "return {input_segment(false)};", "return {input_segment(true)};"),
    ("dual_path/dual_path_backward_cuda.cpp", "corrections(of_dense(dense)), rows", "corrections(of_dense(0)), rows"),
    ("update_running_stats/update_running_stats_kernels.cu", "__syncthreads();  // all have read before one writes", ""),
    ("update_running_stats/update_running_stats_kernels.cu", "n.offset + j], unbias", "n.offset + j], 1.0"),
    ("norm_relu_max_pool/norm_relu_max_pool_kernels.cu", "if (!takes_lead(value, best)) continue;", "if (value < best) continue;"),
    ("norm_relu_max_pool/norm_relu_max_pool_kernels.cu", "(begin > before ? begin - before : 0)", "0"),
    ("norm_relu_max_pool/norm_relu_max_pool_kernels.cu", "if (index == kNoIndex) return;", ""),
    ("norm_relu_max_pool/norm_relu_max_pool_kernels.cu", "s.channels_last ? s.channels : 1", "1"),
    ("norm_relu_max_pool/norm_relu_max_pool_cuda.h", "frozen ? A(0) : A(1.0 / double(args_.values()))", "A(1.0 / double(args_.values()))"),
    ("norm_relu_max_pool/norm_relu_max_pool_cuda.h", "others ? terms[0] : s.dbias", "s.dbias"),
    ("residual_dense_block/residual_dense_block_kernels.cu", "p_.begin <= from && from < p_.end", "true"),
    ("residual_dense_block/residual_dense_block_kernels.cu", "p_.begin <= from && from < p_.end", "p_.begin <= from && from <= p_.end"),
    ("residual_dense_block/residual_dense_block_kernels.cu", "bias && i < count ? bias[first + i]", "bias && i < count ? bias[i]"),
    ("residual_dense_block/residual_dense_block_kernels.cu", "leaky_relu<A>(load(x[r].v[i]) + bias_[i], p_.slope)", "leaky_relu<A>(load(x[r].v[i]), p_.slope)"),
    ("residual_dense_block/residual_dense_block_kernels.cu", "residual_sum<A>(value, p_.outer_scale,", "residual_sum<A>(value, p_.inner_scale,"),
    ("residual_dense_block/residual_dense_block_kernels.cu", "load(y[r].v[i]), p_.factor)", "load(g[r].v[i]), p_.factor)"),
    ("residual_dense_block/residual_dense_block_kernels.cu", "state_.first(i) += d;", "state_.first(i) = d;"),
    ("residual_dense_block/residual_dense_block_kernels.cu", "row + r * step < p_.added", "row < p_.added"),
    ("residual_dense_block/residual_dense_block_kernels.cu", "row + r * step < p_.added", "false"),
    ("residual_dense_block/residual_dense_block_kernels.cu", "address_bits(p.sums) | address_bits(p.y) | address_bits(p.inner)", "address_bits(p.sums) | address_bits(p.y)"),
    ("residual_dense_block/residual_dense_block_cuda.h", "s.first + around - first : 0", "s.first - first : 0"),
    ("residual_dense_block/residual_dense_block_cuda.h", "s.first + around - first : 0", "0 : 0"),
    ("residual_dense_block/residual_dense_block_cuda.h", "add ? end - first : shared", "end - first"),
    ("residual_dense_block/residual_dense_block_cuda.h", "return {half - s.halo, half};", "return {half, half};"),
    ("residual_dense_block/residual_dense_block_cuda.h", "int64_t(i) * splits * 2 * layer.out", "0"),
    ("residual_dense_block/residual_dense_block_cuda.h", "this->const_data(buffer_) + layer.first", "this->const_data(buffer_)"),
    ("residual_dense_block/residual_dense_block_cuda.h", "g_ + layer.first, ld_}.from_row(first)", "g_, ld_}.from_row(first)"),
    ("residual_dense_block/residual_dense_block_cuda.h", "A(args_.scale * args_.outer_scale)", "A(args_.scale)"),
    ("residual_dense_block/residual_dense_block_cuda.h", "if (!args_.fusion) gradient.copy_", "gradient.copy_"),
    ("residual_dense_block/residual_dense_block_cuda.h", "image * area, (image + 1) * area, reach}", "0, args_.pixels(), reach}"),
    ("residual_dense_block/residual_dense_block_cuda.h", "layer.channels == ld_ && s.halo == 0", "layer.channels == ld_"),
    ("cuda/conv1x1/conv1x1_forward.cu", "wait_copies<Shape::kStages - 2>();", "wait_copies<Shape::kStages - 1>();"),
    ("cuda/conv1x1/conv1x1_forward.cu", "__syncthreads();\n      copy_step(step + Shape::kStages - 1, steps);", "copy_step(step + Shape::kStages - 1, steps);\n      __syncthreads();"),
    ("cuda/conv1x1/conv1x1_forward.cu", "wait_copies<Shape::kStages - 2>();\n      __syncthreads();", "wait_copies<Shape::kStages - 2>();"),
    ("cuda/conv1x1/conv1x1_forward.cu", "__syncthreads();  // the result takes the place of the stages", ""),
    ("cuda/conv1x1/conv1x1_forward.cu", "__syncthreads();\n    write_tile", "write_tile"),
    ("cuda/conv1x1/conv1x1_forward.cu", "__syncthreads();  // all have read before anybody writes anew", ""),
    ("cuda/conv1x1/conv1x1_forward.cu", "s[w / 2]", "s[w % 2]"),
    ("cuda/conv1x1/conv1x1_forward.cu", "step % 2 * Shape::kDepth", "0 * Shape::kDepth"),
    ("cuda/conv1x1/conv1x1_forward.cu", "lane_ / 4 < count_)", "lane_ / 4 < Shape::kRows)"),
    ("cuda/conv1x1/conv1x1_forward.cu", "int64_t(blockIdx.x) * Shape::kWidth", "int64_t(blockIdx.x + 1) * Shape::kWidth"),
    ("cuda/conv1x1/conv1x1_backward.cu", "wait_copies<1>();", "wait_copies<2>();"),
    ("cuda/conv1x1/conv1x1_backward.cu", "wait_copies<1>();\n      __syncthreads();", "wait_copies<1>();"),
    ("cuda/conv1x1/conv1x1_backward.cu", "__syncthreads();  // y and the gradient are complete", ""),
    ("cuda/conv1x1/conv1x1_backward.cu", "__syncthreads();  // the next copies go over this stage", ""),
    ("cuda/conv1x1/conv1x1_backward.cu", "copy_stage(tile + gridDim.y, tiles, stage ^ 1);", "copy_stage(tile + gridDim.y, tiles, stage);"),
    ("cuda/conv1x1/conv1x1_backward.cu", "__syncthreads();\n    float* partial", "float* partial"),
    ("cuda/conv1x1/conv1x1_backward.cu", "dym * (vx[i] - n[i].mean)", "dym * vx[i]"),
    ("cuda/conv1x1/conv1x1_backward.cu", "multiply_add<T>(dweight_[i][j], a[i], b.words[0][0], b.words[0][1]);", "multiply_add<T>(dweight_[i][j], a[i], b.words[1][0], b.words[1][1]);"),
    ("cuda/conv1x1/conv1x1_backward.cu", "p_.add ? count : 0", "count"),
    ("cuda/conv1x1/conv1x1_backward.cu", "s < splits && column < count; s += blockDim.y", "s < splits && column < count; s += 2 * blockDim.y"),
    ("cuda/conv1x1/conv1x1_backward.cu", "2 * int64_t(blockIdx.y) * columns_ + first_", "int64_t(blockIdx.y) * columns_ + first_"),
    ("cuda/smem_tile.h", "r < m.rows && left > 0", "left > 0"),
    ("cuda/smem_tile.h", "left < kChunkBytes ? left : kChunkBytes) : 0", "kChunkBytes) : 0"),
    ("cuda/smem_tile.h", "m.access == 8) {\n      copy_chunk<8>", "false) {\n      copy_chunk<8>"),
    ("cuda/smem_tile.h", "m.access == 8) {\n      write_chunk<8>", "false) {\n      write_chunk<8>"),
    ("cuda/smem_tile.h", "lane % 8 + lane / 16 * 8, column / kPerChunk + lane / 8 % 2));\n    } else", "lane % 16, column / kPerChunk + lane / 16));\n    } else"),
    ("cuda/block_forward.h", "pivot, to.mean, to.var, partial.step", "pivot, to.var, to.mean, partial.step"),
    ("cuda/conv1x1/conv1x1.h", "(sizeof(T) == 2 || cuda.tf32)", "true"),
    ("cuda/conv1x1/conv1x1.h", "has_rows_of(4, x, columns)", "true"),
    ("dense_block/dense_block_conv_tiles.h", "__syncthreads();  // the tile is there", ""),
    ("dense_block/dense_block_conv_tiles.h", "__syncthreads();  // the buffer is free", ""),
    ("dense_block/dense_block_conv_forward_kernels.cu", "__syncthreads();  // what was stored is there", ""),
    ("dense_block/dense_block_conv_forward_kernels.cu", "__syncthreads();  // sums and rows are free", ""),
    ("dense_block/dense_block_conv_tiles.h", "wait_copies<1>();", "wait_copies<2>();"),
    ("dense_block/dense_block_conv_tiles.h", "block.load_tile(TilePlace(plan.tiles, next), buffer ^ 1);", "block.load_tile(TilePlace(plan.tiles, next), buffer);"),
    ("dense_block/dense_block_conv_forward_kernels.cu", "if (turn > 0) __syncthreads();", ""),
    ("dense_block/dense_block_conv_forward_kernels.cu", "row * p_.k + first_ + j", "row * p_.k + j"),
    ("dense_block/dense_block_conv_forward_kernels.cu", "p.k - first_ < kColumns ? p.k - first_ : kColumns", "kColumns"),
    ("dense_block/dense_block_conv_forward_kernels.cu", "to[0] = all.mean + moments_.pivot;", "to[0] = all.mean;"),
    ("dense_block/dense_block_conv_forward_kernels.cu", "all = combine_moments(all, m);", "all = m;"),
    ("dense_block/dense_block_conv_forward_kernels.cu", "for (int l = 1; l < kLanes; ++l)", "for (int l = 2; l < kLanes; ++l)"),
    ("dense_block/dense_block_conv_forward_kernels.cu", "return rows()[p] >= 0; }", "return true; }"),
    ("dense_block/dense_block_conv_input_gradient_kernels.cu", "__syncthreads();  // dv is there", ""),
    ("dense_block/dense_block_conv_input_gradient_kernels.cu", "kChunk - tap_distance(", "kChunk + tap_distance("),
    ("dense_block/dense_block_conv_input_gradient_kernels.cu", "if (rows()[pixel] < 0) continue;", ""),
    ("dense_block/dense_block_conv_input_gradient_kernels.cu", "dv * (value - mean.v[i])", "dv * value"),
    ("dense_block/dense_block_conv_input_gradient_kernels.cu", "lanes < 32; lanes *= 2", "lanes < 16; lanes *= 2"),
    ("dense_block/dense_block_conv_input_gradient_kernels.cu", "(left < kChunk ? left : kChunk) : 0", "kChunk : 0"),
    ("dense_block/dense_block_conv_input_gradient_kernels.cu", "group < kPixelGroups; ++group", "group < kPixelGroups - 1; ++group"),
    ("dense_block/dense_block_conv_weight_gradient_kernels.cu", "c < channels_ && column < p_.k", "c < channels_"),
    ("dense_block/dense_block_conv_weight_gradient_kernels.cu", "*far = pixel(first + t + 4)", "*far = pixel(first + t)"),
    ("dense_block/dense_block_conv_weight_gradient_kernels.cu", "WeightLayout<T>::whole_steps(plan_.tiles), kChunks", "plan_.tiles.pixels(), kChunks"),
    ("dense_block/dense_block_conv_weight_gradient_kernels.cu", "i < at_.u_stride / 4", "i < 0"),
    ("dense_block/dense_block_conv_weight_gradient_kernels.cu", "lane_ / 16 * 8 + lane_ % 8) +", "lane_ % 16) +"),
    ("dense_block/dense_block_conv_tiles.h", "(t / 3 - 1) * (columns + 2)", "(t / 3 - 1) * (columns + 1)"),
    ("dense_block/dense_block_conv_tiles.h", "image < t_.batch && 0 <= y", "0 <= y"),
    ("dense_block/dense_block_conv_tiles.h", "0 <= x && x < t_.width", "0 <= x"),
    ("dense_block/dense_block_conv_tiles.h", "if (row_of(p) < 0) return;", ""),
    ("dense_block/dense_block_conv_tiles.h", "bytes % 8 == 0 ? 8 : 4", "8"),
    ("dense_block/dense_block_conv_cuda.h", "(sizeof(T) == 2 || cuda.tf32_convolutions)", "true"),
    ("dense_block/dense_block_conv_cuda.h", "args.growth * sizeof(T) % 4 == 0", "true"),
    ("dense_block/dense_block_conv_cuda.h", "if (plan.splits > 1)\n      check_launch", "if (plan.splits > 2)\n      check_launch"),
    ("dense_block/dense_block_conv_cuda.h", "nullptr, pixels, statistics, count", "nullptr, pixels, statistics"),
    ("cuda/block_backward.h", "has_rows_of(4, segments[0].gradient, segments[0].columns)", "true"),
    ("cuda/block_forward.h", "same && aligned &&", "same &&"),
    ("cuda/block_forward.h", "std::max<int64_t>(1, whole <= most ? whole : even)", "whole <= most ? whole : even"),
    ("cuda/conv1x1/conv1x1_tiles.h", "mean = 0, var = 1;", "mean = 0, var = 0;"),
]  # fmt: skip


def build(folder: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=folder, env=os.environ | {"FORCE_CPU": "1"}, check=True, capture_output=True)


def survives(folder: Path, name: str, before: str, after: str, tests: str) -> bool:
    """Whether the tests of that name pass with the mistake in place."""
    path = folder / "csrc" / name
    text = path.read_text()
    assert before in text, f"{name} no longer contains {before!r}"
    path.write_text(text.replace(before, after))
    try:
        if (name, before, after) not in CUDA_MUTANTS:  # which the tests compile themselves
            build(folder)
        environment = os.environ | {"PYTHONPATH": str(folder)}
        test = [sys.executable, "-m", "pytest", "-q", "-x", "-k", tests, *FILES]
        return subprocess.run(test, cwd=folder, env=environment, capture_output=True).returncode == 0
    finally:
        path.write_text(text)


def main() -> int:
    parts = sys.argv[1:] or [""]
    chosen = [mutant for mutant in CUDA_MUTANTS + MUTANTS if any(part in mutant[0] for part in parts)]
    survivors = 0
    with tempfile.TemporaryDirectory(prefix="fastdense-mutants-") as temporary:
        folder = Path(temporary)
        for part in ("csrc", "fastdense", "tests"):
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        for part in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / part, folder)
        build(folder)
        for name, before, after in chosen:
            emulated = "emulated or fused_blocks" if (name, before, after) in CUDA_MUTANTS else ""
            alive = survives(folder, name, before, after, emulated)
            survivors += alive
            print(f"{'SURVIVED' if alive else 'caught  '} {name}: {before}  ->  {after or '(removed)'}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} mistakes were caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
