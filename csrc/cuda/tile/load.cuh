// Global memory to a shared tile, and the dropout of a tile.  A thread owns the same chunks in both, so that
// it may mask what it copied as soon as its own copies have landed, before the block's barrier.
#pragma once
#include "philox.cuh"
#include "shared.cuh"

namespace lotr::tile {

template <class T>
LOTR_DEVICE T read_element(const Matrix& m, int64_t row, int64_t col) {
  const int64_t i = row * m.row + col * m.col;
  if (m.access == Access::float32_element)
    return ptx::from_float<T>(ptx::load(static_cast<const float*>(m.data) + i));
  return ptx::load(static_cast<const T*>(m.data) + i);
}

// How many of the CHUNK elements from [row, col] on lie inside [rows, cols].
template <int CHUNK>
LOTR_DEVICE int valid_elements(int64_t row, int64_t rows, int64_t col, int64_t cols) {
  const int64_t left = row < rows ? cols - col : 0;
  return left <= 0 ? 0 : left < CHUNK ? int(left) : CHUNK;
}

// tile[i][j] = m[row0 + i][col0 + j], zero outside [rows, cols].  Asynchronous where m allows 16-byte reads.
template <int THREADS, class Tile>
LOTR_DEVICE void load(Tile& tile, const Matrix& m, int64_t row0, int64_t rows, int64_t col0, int64_t cols) {
  using T = typename Tile::T;
  constexpr int TOTAL = Tile::ROWS * Tile::CHUNKS, CHUNK = Tile::CHUNK;
  if (m.access == Access::vector) {
    const T* from = static_cast<const T*>(m.data) + row0 * m.row + col0;
#pragma unroll
    for (int i = 0; i < (TOTAL + THREADS - 1) / THREADS; ++i) {
      const int index = i * THREADS + int(threadIdx.x);
      if (TOTAL % THREADS != 0 && index >= TOTAL) break;
      const int r = index / Tile::CHUNKS, c = index % Tile::CHUNKS;
      const int valid = valid_elements<CHUNK>(row0 + r, rows, col0 + c * CHUNK, cols);
      ptx::cp_async16(tile.chunk(r, c), valid ? from + r * m.row + c * CHUNK : m.data,
                      valid * int(sizeof(T)));
    }
  } else {
#pragma unroll 1
    for (int index = threadIdx.x; index < TOTAL; index += THREADS) {
      const int r = index / Tile::CHUNKS, c = index % Tile::CHUNKS;
      const int64_t row = row0 + r, col = col0 + c * CHUNK;
      const int valid = valid_elements<CHUNK>(row, rows, col, cols);
      Chunk<T> value;
#pragma unroll
      for (int j = 0; j < CHUNK; ++j)
        value.v[j] = j < valid ? read_element<T>(m, row, col + j) : ptx::from_float<T>(0.f);
      ptx::store_shared(tile.whole(r, c), value);
    }
  }
}

// Zeroes the dropped elements of the chunks this thread loaded; cols is the width of the whole matrix.
template <int THREADS, class Tile>
LOTR_DEVICE void drop(Tile& tile, const Dropout& dropout, uint64_t seed, int64_t row0, int64_t col0,
                      int64_t cols) {
  constexpr int TOTAL = Tile::ROWS * Tile::CHUNKS, PER_WORD = 4 / int(sizeof(typename Tile::T));
#pragma unroll 1
  for (int index = threadIdx.x; index < TOTAL; index += THREADS) {
    const int r = index / Tile::CHUNKS, c = index % Tile::CHUNKS;
    const uint64_t first = uint64_t(row0 + r) * uint64_t(cols) + uint64_t(col0 + c * Tile::CHUNK);
    const uint32_t keep = philox_keep<Tile::CHUNK>(seed, first, dropout.threshold);
    uint4* chunk = reinterpret_cast<uint4*>(tile.chunk(r, c));
    uint4 value = ptx::load_shared(chunk);
    uint32_t* word = &value.x;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      if constexpr (PER_WORD == 1) {
        word[w] = keep >> w & 1 ? word[w] : 0;
      } else {
        const uint32_t low = keep >> (2 * w) & 1 ? 0xffffu : 0u,
                       high = keep >> (2 * w + 1) & 1 ? 0xffff0000u : 0u;
        word[w] &= low | high;
      }
    }
    ptx::store_shared(chunk, value);
  }
}

}  // namespace lotr::tile
