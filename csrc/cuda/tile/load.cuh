// Global memory to a shared tile, and the dropout of a tile. A thread has the same chunks in both,
// so it can mask what it copied as soon as its copies have landed, before the block's barrier.
//
// The rows of a Loader's matrix start at multiples of 16 bytes (operators.cu packs others), so
// every copy is asynchronous. A tile inside the matrix takes a path without bounds checks: it needs
// only the thread's address, and steps that are the same for all threads.
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

// How many of the CHUNK elements from [row, col] on are inside [rows, cols].
template <int CHUNK>
LOTR_DEVICE int valid_elements(int64_t row, int64_t rows, int64_t col, int64_t cols) {
  const int64_t left = row < rows ? cols - col : 0;
  if (left <= 0) return 0;
  return left < CHUNK ? int(left) : CHUNK;
}

// Copies tiles of one matrix [rows, cols]: tile (i, j) of its grid of tiles, zero outside the
// matrix.
template <int THREADS, class Tile>
class Loader {
  using T = typename Tile::T;
  static constexpr int TOTAL = Tile::ROWS * Tile::CHUNKS;
  static constexpr int STEP = THREADS / Tile::CHUNKS;  // rows from a thread's chunk to its next one
  static constexpr int COUNT = (TOTAL + THREADS - 1) / THREADS;  // chunks of a thread
  static_assert(THREADS % Tile::CHUNKS == 0 && STEP % 8 == 0,
                "the same swizzle in all rows of a thread");

  const char* data_;
  int64_t rows_, cols_, row_bytes_, first_;  // first_: bytes to the thread's first chunk
  int r_, c_;                                // that chunk's row and column in a tile
  int full_row_tiles_, full_col_tiles_;      // tiles entirely inside the matrix

 public:
  LOTR_DEVICE Loader(const Matrix& m, int64_t rows, int64_t cols)
      : data_(static_cast<const char*>(m.data)),
        rows_(rows),
        cols_(cols),
        row_bytes_(m.row * int64_t(sizeof(T))),
        r_(int(threadIdx.x) / Tile::CHUNKS),
        c_(int(threadIdx.x) % Tile::CHUNKS),
        full_row_tiles_(int(rows / Tile::ROWS)),
        full_col_tiles_(int(cols / Tile::COLS)) {
    first_ = r_ * row_bytes_ + c_ * 16;
  }

  LOTR_DEVICE void operator()(Tile& tile, int tile_row, int tile_col) const {
    if (TOTAL % THREADS != 0 && r_ >= Tile::ROWS) return;  // fewer chunks than threads
    const char* from = data_ + first_ + tile_row * (Tile::ROWS * row_bytes_) +
                       tile_col * int64_t(Tile::COLS * sizeof(T));
    T* to = tile.chunk(r_, c_);
    if (tile_row < full_row_tiles_ && tile_col < full_col_tiles_) {
#pragma unroll
      for (int i = 0; i < COUNT; ++i)
        ptx::cp_async16(to + i * (STEP * Tile::COLS), from + i * STEP * row_bytes_);
    } else {
#pragma unroll 1
      for (int i = 0; i < COUNT; ++i) {
        const int valid =
            valid_elements<Tile::CHUNK>(int64_t(tile_row) * Tile::ROWS + r_ + i * STEP, rows_,
                                        int64_t(tile_col) * Tile::COLS + c_ * Tile::CHUNK, cols_);
        ptx::cp_async16(to + i * (STEP * Tile::COLS), valid ? from + i * STEP * row_bytes_ : data_,
                        valid * int(sizeof(T)));
      }
    }
  }
};

// A chunk without its dropped elements. Bit j of `keep` is for element j.
template <int CHUNK>
LOTR_DEVICE uint4 kept(uint4 value, uint32_t keep) {
  uint32_t* word = &value.x;
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    if constexpr (CHUNK == 4) {
      word[w] = keep >> w & 1 ? word[w] : 0;
    } else {
      const uint32_t low = keep >> (2 * w) & 1 ? 0xffffu : 0u;
      const uint32_t high = keep >> (2 * w + 1) & 1 ? 0xffff0000u : 0u;
      word[w] &= low | high;
    }
  }
  return value;
}

// Calls f with std::true_type or std::false_type, so that a kernel's loop is compiled with and
// without dropout. A test in every step would cost the loop without dropout up to 30 % more
// instructions, because the masks take registers from addresses.
template <class F>
LOTR_DEVICE void with_dropout(const Dropout& dropout, F f) {
  if (dropout.seed)
    f(std::true_type{});
  else
    f(std::false_type{});
}

// Zeroes the dropped elements of the chunks that this thread loaded. cols: of the matrix.
template <int THREADS, class Tile>
LOTR_DEVICE void drop(Tile& tile, const Dropout& dropout, int64_t row0, int64_t col0,
                      int64_t cols) {
  const uint64_t seed = uint64_t(ptx::load(dropout.seed));
#pragma unroll 1
  for (int index = threadIdx.x; index < Tile::ROWS * Tile::CHUNKS; index += THREADS) {
    const int r = index / Tile::CHUNKS;
    const int c = index % Tile::CHUNKS;
    const uint64_t first = uint64_t(row0 + r) * uint64_t(cols) + uint64_t(col0 + c * Tile::CHUNK);
    const uint32_t keep = philox_keep<Tile::CHUNK>(seed, first, dropout.threshold);
    uint4* chunk = reinterpret_cast<uint4*>(tile.chunk(r, c));
    ptx::store_shared(chunk, kept<Tile::CHUNK>(ptx::load_shared(chunk), keep));
  }
}

}  // namespace lotr::tile
