// SPDX-License-Identifier: Apache-2.0
// Tiles of matrices in shared memory, as kernels on tensor cores read them; included by .cu files only.
//
// A tile is rows of numbers of type T.  Copies write chunks of 16 bytes, and fragments are loaded from eight rows of
// them at a time, which must lie in different banks: chunks are swizzled by the row number where a row is a multiple of
// eight chunks, else rows are an odd number of chunks apart.
#pragma once

#include <cstdint>

#include "cuda/mma.h"
#include "cuda/norm_relu/column_reduce.h"
#include "cuda/norm_relu/norm_relu_launch.h"

namespace fastdense {

constexpr int kChunkBytes = 16;

// A right factor of two fragments beside each other: 16 columns.
struct RightPair {
  uint32_t words[2][2];
};

template <typename T, int kColumns>
class SmemTile {
  static constexpr int kChunks = kColumns * int(sizeof(T)) / kChunkBytes;  // of a row
  static constexpr bool kSwizzled = kChunks % 8 == 0;
  static constexpr int kPitch = (kSwizzled ? kChunks : kChunks | 1) * kChunkBytes;  // bytes from row to row
  static constexpr int kPerChunk = kChunkBytes / int(sizeof(T)), kPerWord = 4 / int(sizeof(T));
  static constexpr bool kTransposes = sizeof(T) == 2;  // ldmatrix does

 public:
  static constexpr int kDepth = 32 / int(sizeof(T));  // numbers that one multiply_add() runs over
  static constexpr int bytes(int rows) { return rows * kPitch; }

  __device__ explicit SmemTile(unsigned char* data) : data_(data) {}

  __device__ unsigned char* chunk(int row, int chunk) const {
    return data_ + row * kPitch + (kSwizzled ? chunk ^ (row & 7) : chunk) * kChunkBytes;
  }
  // The word that holds a number, the first of it.
  __device__ uint32_t* word(int row, int column) const {
    return reinterpret_cast<uint32_t*>(chunk(row, column / kPerChunk)) + column % kPerChunk / kPerWord;
  }

  // Fragments for a lane.  Left factor [16][kDepth] from rows [row, row + 16), columns [column, column + kDepth), as
  // it stands: TF32 still needs operand().
  __device__ void left_as_stored(uint32_t (&a)[4], int row, int column, int lane) const {
    load_matrices(a, chunk(row + lane % 16, column / kPerChunk + lane / 16));
  }
  __device__ void left(uint32_t (&a)[4], int row, int column, int lane) const {
    left_as_stored(a, row, column, lane);
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = operand(a[i]);
  }
  // The same from rows [row, row + kDepth), columns [column, column + 16), transposed.
  __device__ void left_transposed(uint32_t (&a)[4], int row, int column, int lane) const {
    if constexpr (kTransposes) {
      load_matrices_transposed(a, chunk(row + lane % 8 + lane / 16 * 8, column / kPerChunk + lane / 8 % 2));
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = operand(*word(row + lane % 4 + i / 2 * 4, column + lane / 4 + i % 2 * 8));
    }
  }
  // Right factor [kDepth][16] whose columns are the rows [row, row + 16).
  __device__ RightPair right_of_rows(int row, int column, int lane) const {
    uint32_t b[4];
    load_matrices(b, chunk(row + lane % 8 + lane / 16 * 8, column / kPerChunk + lane / 8 % 2));
    return {{{operand(b[0]), operand(b[1])}, {operand(b[2]), operand(b[3])}}};
  }
  // Right factor [kDepth][16] as it lies: rows [row, row + kDepth), columns [column, column + 16).
  __device__ RightPair right(int row, int column, int lane) const {
    uint32_t b[4];
    if constexpr (kTransposes) {
      load_matrices_transposed(b, chunk(row + lane % 16, column / kPerChunk + lane / 16));
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) b[i] = operand(*word(row + lane % 4 + i % 2 * 4, column + lane / 4 + i / 2 * 8));
    }
    return {{{b[0], b[1]}, {b[2], b[3]}}};
  }

  // A word as a product wants it.
  static __device__ uint32_t operand(uint32_t word) {
    if constexpr (sizeof(T) == 2) {
      return word;
    } else {
      return tf32_bits(bit_cast<float>(word));
    }
  }

 private:
  unsigned char* data_;
};

// A matrix of `rows` rows and `columns` columns that tiles are copied from, and to, by accesses of 16, 8 or 4 bytes.
template <typename T>
struct TileMatrix {
  Matrix<T> matrix;
  int rows, columns, access;
};

template <int kBytes>
__device__ __forceinline__ void copy_chunk(unsigned char* to, const unsigned char* from, int valid) {
#pragma unroll
  for (int at = 0; at < kChunkBytes; at += kBytes) {
    const int left = valid - at < kBytes ? valid - at : kBytes;
    copy_async<kBytes>(to + at, from + (left > 0 ? at : 0), left > 0 ? left : 0);
  }
}

// Calls body(bytes that exist, where they lie in the matrix, in the tile) for a thread's chunks of columns
// [column, column + kColumns).
template <int kRows, int kThreads, typename T, typename Stored, int kColumns, typename Body>
__device__ __forceinline__ void for_each_chunk(const SmemTile<Stored, kColumns>& tile, const TileMatrix<T>& m,
                                               int column, const Body& body) {
  constexpr int kChunks = kColumns * int(sizeof(T)) / kChunkBytes, kPerChunk = kChunkBytes / int(sizeof(T));
#pragma unroll 1  // the addresses of many chunks at once would take registers from products
  for (int first = 0; first < kRows * kChunks; first += kThreads) {
    const int i = first + int(threadIdx.x), r = i / kChunks, chunk = i % kChunks;
    if (kRows * kChunks % kThreads != 0 && i >= kRows * kChunks) break;
    const int left = (m.columns - column - chunk * kPerChunk) * int(sizeof(T));
    const int valid = r < m.rows && left > 0 ? (left < kChunkBytes ? left : kChunkBytes) : 0;
    // Where nothing exists, the address is not used, but aligned.
    T* at = m.matrix.data + (valid > 0 ? r * m.matrix.ld + column + chunk * kPerChunk : 0);
    body(valid, at, tile.chunk(r, chunk));
  }
}

// Starts copies of columns [column, column + kColumns) into kRows rows; what does not exist becomes zero.
template <int kRows, int kThreads, typename T, int kColumns>
__device__ __forceinline__ void copy_tile(const SmemTile<T, kColumns>& tile, const TileMatrix<const T>& m, int column) {
  for_each_chunk<kRows, kThreads>(tile, m, column, [&](int valid, const T* at, unsigned char* to) {
    const auto* from = reinterpret_cast<const unsigned char*>(at);
    if (m.access == 16) {
      copy_chunk<16>(to, from, valid);
    } else if (m.access == 8) {
      copy_chunk<8>(to, from, valid);
    } else {
      copy_chunk<4>(to, from, valid);
    }
  });
}

template <int kBytes>
__device__ __forceinline__ void write_chunk(unsigned char* to, const unsigned char* from, int valid) {
  constexpr int kWords = kBytes / 4;
#pragma unroll
  for (int at = 0; at < kChunkBytes; at += kBytes) {
    const int left = (valid - at) / 4;
    write(reinterpret_cast<uint32_t*>(to + at), read<kWords>(reinterpret_cast<const uint32_t*>(from + at), kWords),
          left < 0        ? 0
          : left < kWords ? left
                          : kWords);
  }
}

// The way back.
template <int kRows, int kThreads, typename T, int kColumns>
__device__ __forceinline__ void write_tile(const SmemTile<T, kColumns>& tile, const TileMatrix<T>& m, int column) {
  for_each_chunk<kRows, kThreads>(tile, m, column, [&](int valid, T* at, const unsigned char* from) {
    auto* to = reinterpret_cast<unsigned char*>(at);
    if (valid == 0) return;
    if (m.access == 16) {
      write_chunk<16>(to, from, valid);
    } else if (m.access == 8) {
      write_chunk<8>(to, from, valid);
    } else {
      write_chunk<4>(to, from, valid);
    }
  });
}

// The widest access to a matrix of words.
template <typename T>
int access_bytes(const Matrix<T>& m) {
  const uintptr_t bits = address_bits(m.data, m.ld);
  return bits % 16 == 0 ? 16 : bits % 8 == 0 ? 8 : 4;
}

}  // namespace fastdense
