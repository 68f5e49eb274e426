// A matrix tile in shared memory, swizzled so that no access of the kernels has bank conflicts.
//
// A row consists of 16-byte chunks. Chunk c of row i is stored at chunk c ^ rev3(i), where rev3 is
// the three low bits of i reversed:
//
//   eight rows, one chunk     -> eight different bank groups    ldmatrix, plain and transposed
//   four rows, two chunks     -> eight different bank groups    32-bit reads down a column
//   one row, all its chunks   -> a permutation of them          cp.async, 16-byte loads and stores
//
// Rows shorter than 128 bytes share a 128-byte line with their neighbors. Then swizzle() masks out
// the bits of rev3(i) that the position in the line already provides.
#pragma once
#include "../params.h"
#include "../ptx/sm80.cuh"

namespace lotr::tile {

// The order in memory of a product's operand. along_k: neighbors in memory are neighbors along the
// sum. across_k: they are neighbors along the rows of the first operand, the columns of the second.
enum class Order { along_k, across_k };

// 16 bytes of elements, as one value.
template <class T>
struct alignas(16) Chunk {
  T v[16 / sizeof(T)];
};

template <class T_, int ROWS_, int COLS_>
struct Shared {
  using T = T_;
  static constexpr int ROWS = ROWS_, COLS = COLS_;
  static constexpr int CHUNK = 16 / sizeof(T);  // elements
  static constexpr int CHUNKS = COLS / CHUNK;   // in a row
  static_assert(COLS % CHUNK == 0 && (CHUNKS & (CHUNKS - 1)) == 0,
                "a row must be a power of two of 16-byte chunks");

  alignas(128) T data[ROWS * COLS];

  static LOTR_DEVICE int swizzle(int row) {
    const int reversed = (row & 1) << 2 | (row & 2) | (row >> 2 & 1);
    return reversed & (CHUNKS < 8 ? CHUNKS - 1 : 7);
  }
  static LOTR_DEVICE int offset(int row, int c) { return row * COLS + (c ^ swizzle(row)) * CHUNK; }
  LOTR_DEVICE T* chunk(int row, int c) { return data + offset(row, c); }
  // Chunk c + k / CHUNK. The swizzle is an XOR, so if c and k / CHUNK have no bit in common, adding
  // k is an XOR as well: a product needs one offset for all its steps along k.
  LOTR_DEVICE T* chunk(int row, int c, int k) { return data + (offset(row, c) ^ k); }
  LOTR_DEVICE Chunk<T>* as_chunk(int row, int c) {
    return reinterpret_cast<Chunk<T>*>(chunk(row, c));
  }
  LOTR_DEVICE T* at(int row, int col) { return chunk(row, col / CHUNK) + col % CHUNK; }
};

}  // namespace lotr::tile
