// pack:  to = from, in the kernels' type        from [rows, cols] of any strides; the rows of `to`
//                                               start at multiples of 16 bytes
//
// For matrices that cannot be copied 16 bytes at a time: float32 factors with half activations, odd
// row strides, transposed matrices. One pass before the pipelined kernels, which then need only
// one way to read.
//
// Grid     x: tiles of ROWS x COLS, one below the other. y would allow only 65,535 tiles in a
//          row, or 4,194,240 columns. A tile passes through shared memory, so that both matrices
//          are accessed along their neighbors in memory, whatever the order of `from` is.
// Bytes    from once, to once. Nothing past the last column of a row is written: the memory of the
//          last row may end there.
#pragma once
#include "../tile/load.cuh"

namespace lotr::kernels {

template <class T_>
struct PackTraits {
  using T = T_;
  static constexpr int THREADS = 256, ROWS = 64, COLS = 64, CHUNK = 16 / sizeof(T);
  struct Smem {
    T tile[ROWS][COLS + 4 / sizeof(T)];  // a word more: no bank conflicts down a column
  };
};

template <class Traits>
__global__ void __launch_bounds__(Traits::THREADS) pack(const PackProblem p) {
  using T = typename Traits::T;
  constexpr int THREADS = Traits::THREADS, ROWS = Traits::ROWS;
  constexpr int COLS = Traits::COLS, CHUNK = Traits::CHUNK;
  auto& sm = ptx::shared_storage<typename Traits::Smem>();
  const unsigned row_tiles = unsigned((p.rows + ROWS - 1) / ROWS);
  const int64_t row0 = int64_t(blockIdx.x % row_tiles) * ROWS;
  const int64_t col0 = int64_t(blockIdx.x / row_tiles) * COLS;
  const bool down = p.from.row == 1 && p.from.col != 1;  // neighbors in memory are in a column
  ptx::griddepcontrol_wait();
#pragma unroll 4
  for (int index = threadIdx.x; index < ROWS * COLS; index += THREADS) {
    const int r = down ? index % ROWS : index / COLS;
    const int c = down ? index / ROWS : index % COLS;
    if (row0 + r < p.rows && col0 + c < p.cols)
      ptx::store_shared(&sm.tile[r][c], tile::read_element<T>(p.from, row0 + r, col0 + c));
  }
  __syncthreads();
  for (int index = threadIdx.x; index < ROWS * COLS / CHUNK; index += THREADS) {
    const int r = index / (COLS / CHUNK);
    const int c = index % (COLS / CHUNK) * CHUNK;
    const int valid = tile::valid_elements<CHUNK>(row0 + r, p.rows, col0 + c, p.cols);
    T* const to = static_cast<T*>(p.to.data) + (row0 + r) * p.to.row + col0 + c;
    if (valid == CHUNK) {
      tile::Chunk<T> value;
#pragma unroll
      for (int e = 0; e < CHUNK; ++e) value.v[e] = ptx::load_shared(&sm.tile[r][c + e]);
      ptx::store(reinterpret_cast<tile::Chunk<T>*>(to), value);
    } else {
      for (int e = 0; e < valid; ++e) ptx::store(to + e, ptx::load_shared(&sm.tile[r][c + e]));
    }
  }
  ptx::griddepcontrol_launch_dependents();
}

}  // namespace lotr::kernels
