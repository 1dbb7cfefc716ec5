// SPDX-License-Identifier: Apache-2.0
// 1x1 convolutions of a chunk of pixel rows as matrix products, forward and backward: what the kernels of
// cpu/conv1x1/conv1x1_kernels.h and of the ops are made of.
#pragma once

#include "cpu/gemm/gemm.h"
#ifdef FASTDENSE_TARGET_PAIRS
#include "cpu/gemm/gemm_bf16.h"
#ifdef FASTDENSE_TARGET_AMX
#include "cpu/gemm/gemm_amx.h"
#else
#include "cpu/gemm/gemm_avx512_bf16.h"
#endif
#endif
#include "cpu/conv1x1/norm_relu.h"

namespace fastdense::FASTDENSE_TARGET {

// Columns of a backward product that are worked on at once, a multiple of every panel width.
constexpr int64_t kColumnBlock = 256;
// Bytes of activated rows that a forward chunk keeps in L2.
constexpr int64_t kForwardBytes = 192 * 1024;
// Rows of a backward chunk: more where factors have 16 bits.
template <typename T>
constexpr int64_t kBackwardRows = sizeof(typename Gemm<T>::Operand) == 2 ? 384 : 192;

// Rows of a tile of a product.
template <typename T>
constexpr int64_t kRowMultiple = Gemm<T>::kAlign > 1 ? Gemm<T>::kAlign : kTileRows;

template <typename T>
constexpr int64_t chunk_rows(int64_t channels) {
  const int64_t fit = kForwardBytes / int64_t(sizeof(typename Gemm<T>::Operand)) / (channels > 0 ? channels : 1);
  const int64_t rows = fit < 48 ? 48 : fit > 384 ? 384 : fit;
  return rows / kRowMultiple<T> * kRowMultiple<T>;
}

template <typename T, typename A = accumulate_t<T>>
void pack(const A* w, int64_t depth, int64_t n, int64_t depth_stride, int64_t column_stride, int64_t first_panel,
          int64_t last_panel, void* panels) {
  using G = Gemm<T>;
  auto* out = static_cast<typename G::Operand*>(panels);
  for (int64_t p = first_panel; p < last_panel; ++p) {
    const A* from = w + p * G::kPanel * column_stride;
    if constexpr (std::is_same_v<typename G::Operand, A>)
      if (depth_stride == 1) {
        G::transpose_panel(from, column_stride, depth, n - p * G::kPanel, out + p * G::kPanel * depth);
        continue;
      }
    G::fill_panel(
        depth, n - p * G::kPanel, [=](int64_t k, int64_t i) { return from[k * depth_stride + i * column_stride]; },
        out + p * G::kPanel * round_up(depth, G::kAlign));
  }
}

template <typename T>
const typename Gemm<T>::Operand* unpacked(const void* panels) {
  return static_cast<const typename Gemm<T>::Operand*>(panels);
}

template <typename T, typename A = accumulate_t<T>>
void conv1x1(const Sources<T>& sources, const PoolGeometry* pool, int64_t row, int64_t rows, const void* panels,
             const Targets<T>& targets, void* memory) {
  using G = Gemm<T>;
  Workspace workspace(memory);
  const int64_t depth = sources.channels(), n = targets.columns();
  const LeftFactor<T> y(workspace, rows, depth);
  const int64_t ldc = round_up(n, G::kPanel);
  A* c = workspace.take<A>(round_up(rows, G::kAlign) * ldc);
  A* pooled = workspace.take<A>(depth);
  int64_t column = 0;
  for (const Source<T>& s : {sources.first, sources.second}) {
    if (pool)
      activate_pooled(s, *pool, row, rows, pooled, y, column);
    else
      activate(s, row, rows, y, column);
    column += s.channels;
  }
  G::multiply(rows, depth, n, y, unpacked<T>(panels), {c, ldc});
  add_bias(c, ldc, rows, targets.first.columns, targets.first.bias);
  store_rows(c, ldc, row, rows, targets.first);
  store_rows(c + targets.first.columns, ldc, row, rows, targets.second);
}

// The backward of a product, block by block of its columns, so that everything stays in cache:
// dweight += left^T * source with `fill(begin, end, memory, panels)` for the source's columns as panels, unless dweight
// is nullptr, and dy = left * weight, handed to `consume(begin, n, dy, row stride)`, unless `panels` of the weight are.
template <typename T, typename Fill, typename Consume>
void backward_blocks(int64_t rows, int64_t channels, const LeftFactor<T>& left, const void* panels,
                     accumulate_t<T>* dweight, Workspace workspace, const Fill& fill, const Consume& consume) {
  using G = Gemm<T>;
  using A = accumulate_t<T>;
  using Operand = typename G::Operand;
  const int64_t depth = left.depth, padded_rows = round_up(rows, G::kAlign);
  Operand* act = workspace.take<Operand>(padded_rows * kColumnBlock);
  A* dy = workspace.take<A>(padded_rows * kColumnBlock);
  Operand* memory = workspace.take<Operand>(G::transposed_size(rows, depth));
  typename G::Transposed transposed{};
  if (dweight) transposed = G::transpose(rows, depth, left, memory);
  for (int64_t begin = 0; begin < channels; begin += kColumnBlock) {
    const int64_t end = channels - begin < kColumnBlock ? channels : begin + kColumnBlock;
    const int64_t n = end - begin, ldd = round_up(n, G::kPanel);
    if (dweight) {
      fill(begin, end, dy, act);
      G::multiply_transposed(rows, depth, n, transposed, act, {dweight + begin, round_up(channels, G::kPanel)});
    }
    if (!panels) continue;
    G::multiply(rows, depth, n, left, unpacked<T>(panels) + begin * round_up(depth, G::kAlign), {dy, ldd});
    consume(begin, n, dy, ldd);
  }
}

// sum[depth] += rows of a left factor
template <typename T>
inline void add_rows(const LeftFactor<T>& left, int64_t rows, double* __restrict sum) {
  for (int64_t r = 0; r < rows; ++r) {
    const auto* row = left.row(r);
    for (int64_t j = 0; j < left.depth; ++j) sum[j] += double(load(row[j]));
  }
}

// The same for a product that reads act(source): `epilogue` takes dy through the activation.
template <typename T, typename A = accumulate_t<T>>
void backward(const Source<T>& s, const PoolGeometry* pool, int64_t row, int64_t rows, const LeftFactor<T>& left,
              const void* panels, const BackwardEpilogue<T>& epilogue, Workspace workspace) {
  const int64_t volume = pool ? pool->volume() : 1;
  const auto epilogue_pixel = epilogue_of(s, epilogue);
  if (epilogue.bias) add_rows(left, rows, epilogue.bias);
  backward_blocks<T>(
      rows, s.channels, left, epilogue.gradient ? panels : nullptr, epilogue.dweight, workspace,
      [&](int64_t begin, int64_t end, A* memory, typename Gemm<T>::Operand* act) {
        if (pool)
          activate_pooled_panels(s, *pool, row, rows, begin, end, memory, act);
        else
          activate_panels(s, row, rows, begin, end, memory, act);
      },
      [&](int64_t begin, int64_t n, const A* dy, int64_t ldd) {
        A sum[kColumnBlock], weighted[kColumnBlock];
        double *total = epilogue.sum + begin, *total_weighted = epilogue.weighted + begin;
        sum_in_groups(rows, volume, n, sum, weighted, total, total_weighted, [&](int64_t r) {
          const int64_t first = pool ? window_origin(*pool, row + r) : row + r;
          for (int64_t w = 0; w < volume; ++w)
            epilogue_pixel(s, epilogue, first + (pool ? window_offset(*pool, w) : 0), {begin, n}, dy + r * ldd,
                           A(1) / A(volume), sum, weighted);
        });
      });
}

}  // namespace fastdense::FASTDENSE_TARGET
