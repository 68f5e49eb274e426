// Accumulators to global memory: through a shared tile in the output's type, so that rows leave in
// 16-byte chunks (put, store), or directly, two neighbors at a time (store_rounded, SumTiles). In
// float32, four lanes with two neighbors each fill a 32-byte sector.
#pragma once
#include "shared.cuh"

namespace lotr::tile {

// The four values of a 16 x 8 accumulator tile to tile[i0 ..][j0 ..], scaled and rounded.
template <class Tile>
LOTR_DEVICE void put(Tile& tile, int i0, int j0, const float (&d)[4], float scale) {
  using T = typename Tile::T;
  const int lane = threadIdx.x % 32;
  const int i = i0 + lane / 4;
  const int j = j0 + lane % 4 * 2;
  ptx::store_shared2(tile.at(i, j), ptx::from_float<T>(d[0] * scale),
                     ptx::from_float<T>(d[1] * scale));
  ptx::store_shared2(tile.at(i + 8, j), ptx::from_float<T>(d[2] * scale),
                     ptx::from_float<T>(d[3] * scale));
}

// to[row0 + i][col0 + j] = tile[i][j] inside [rows, cols], by THREADS threads of the block.
template <int THREADS, class Tile>
LOTR_DEVICE void store(const Matrix& to, Tile& tile, int64_t row0, int64_t rows, int64_t col0,
                       int64_t cols) {
  using T = typename Tile::T;
  for (int index = int(threadIdx.x) % THREADS; index < Tile::ROWS * Tile::CHUNKS;
       index += THREADS) {
    const int r = index / Tile::CHUNKS;
    const int c = index % Tile::CHUNKS;
    const int64_t row = row0 + r;
    const int64_t col = col0 + c * Tile::CHUNK;
    if (row >= rows || col >= cols) continue;
    T* out = static_cast<T*>(to.data) + row * to.row + col * to.col;
    const Chunk<T> value = ptx::load_shared(tile.as_chunk(r, c));
    if (to.access == Access::vector && cols - col >= Tile::CHUNK) {
      ptx::store(reinterpret_cast<Chunk<T>*>(out), value);
    } else {
#pragma unroll
      for (int j = 0; j < Tile::CHUNK; ++j)
        if (col + j < cols) ptx::store(out + j * to.col, value.v[j]);
    }
  }
}

// to[i][j] = d rounded, for the lane's part of a 16 x 8 tile at [i0, j0] inside [rows, cols]: two
// neighbors in one store where they are aligned.
template <class T>
LOTR_DEVICE void store_rounded(const Matrix& to, int64_t i0, int64_t rows, int j0, int cols,
                               const float (&d)[4]) {
  struct alignas(2 * sizeof(T)) Pair {
    T a, b;
  };
  const int lane = threadIdx.x % 32;
  const int j = j0 + lane % 4 * 2;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int64_t i = i0 + lane / 4 + 8 * h;
    if (i >= rows || j >= cols) continue;
    const Pair value{ptx::from_float<T>(d[2 * h]), ptx::from_float<T>(d[2 * h + 1])};
    T* out = static_cast<T*>(to.data) + i * to.row + j * to.col;
    if (to.access == Access::vector && j + 1 < cols) {
      ptx::store(reinterpret_cast<Pair*>(out), value);
    } else {
      ptx::store(out, value.a);
      if (j + 1 < cols) ptx::store(out + to.col, value.b);
    }
  }
}

// Writes a FloatSum [rows, cols] in tiles of 16 x 8. A lane writes the four elements of a tile that
// its accumulators belong to.
struct SumTiles {
  FloatSum sum;
  int64_t rows;
  int cols;

  // The tile at [i0, j0] inside the matrix: += d * scale if the sum is added to, else =. All loads
  // start before the first addition, which waits for its load.
  LOTR_DEVICE void accumulate(int64_t i0, int j0, const float (&d)[4], float scale) const {
    float v[4] = {};
    if (sum.add) load(v, i0, j0);
#pragma unroll
    for (int e = 0; e < 4; ++e) v[e] += d[e] * scale;
    store(i0, j0, v);
  }
  // the tile at [i0, j0] = v
  LOTR_DEVICE void store(int64_t i0, int j0, const float (&v)[4]) const {
    const int lane = threadIdx.x % 32;
    const int j = j0 + lane % 4 * 2;
    const int64_t i = i0 + lane / 4;
    float* to = sum.data + i * sum.row + j * sum.col;
    if (in_pairs(j)) {
#pragma unroll
      for (int h = 0; h < 2; ++h)
        if (i + 8 * h < rows)
          ptx::store(reinterpret_cast<float2*>(to + 8 * h * sum.row),
                     float2{v[2 * h], v[2 * h + 1]});
      return;
    }
#pragma unroll
    for (int e = 0; e < 4; ++e)
      if (i + e / 2 * 8 < rows && j + e % 2 < cols)
        ptx::store(to + e / 2 * 8 * sum.row + e % 2 * sum.col, v[e]);
  }

 private:
  LOTR_DEVICE bool in_pairs(int j) const {
    return sum.col == 1 && sum.row % 2 == 0 && reinterpret_cast<uintptr_t>(sum.data) % 8 == 0 &&
           j + 1 < cols;
  }
  // v = the tile at [i0, j0], 0 outside the matrix
  LOTR_DEVICE void load(float (&v)[4], int64_t i0, int j0) const {
    const int lane = threadIdx.x % 32;
    const int j = j0 + lane % 4 * 2;
    const int64_t i = i0 + lane / 4;
    const float* from = sum.data + i * sum.row + j * sum.col;
    if (in_pairs(j)) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float2 pair{0.f, 0.f};
        if (i + 8 * h < rows)
          pair = ptx::load(reinterpret_cast<const float2*>(from + 8 * h * sum.row));
        v[2 * h] = pair.x;
        v[2 * h + 1] = pair.y;
      }
      return;
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const bool inside = i + e / 2 * 8 < rows && j + e % 2 < cols;
      v[e] = inside ? ptx::load(from + e / 2 * 8 * sum.row + e % 2 * sum.col) : 0.f;
    }
  }
};

}  // namespace lotr::tile
