// Kernel parameters: the problem and its plan, in structs that are passed by value.
#pragma once
#include "problem.h"

namespace lotr {

// Partial sums of the blocks that share an output tile. The last block to arrive adds them in a fixed order;
// where the blocks run at the same time, each adds a share of the tile.
struct Reduction {
  float* partial;    // kernel's own layout, see its file
  int32_t* arrived;  // [tiles], zero before the launch and after it
};

// On GPUs with clusters the blocks may form one and sum through each other's shared memory. Every such GPU
// takes 2, 4 or 8 blocks, but those that are too small for 8, as a MIG slice may be: largest_cluster().
constexpr int MOST_OF_CLUSTER = 8;

// A row of tiles cut into pieces of `whole` tiles, the first `longer` of them one tile longer.
struct Pieces {
  int32_t whole, longer;
};

struct ShrinkParams : ShrinkProblem {
  Pieces m_pieces, k_pieces;  // of the row tiles and of the steps along K
  int32_t splits;             // blocks that share their rows of u
  Reduction sum;              // partial [m blocks, splits, row tiles of a block, ROWS, R]
};

struct ExpandParams : ExpandOperands {
  Pieces n_pieces;  // of the column tiles
};
struct ScaledExpandParams : ExpandParams {
  RowScale of_rows;
};

struct ScaleBackwardParams : ScaleBackwardProblem {
  Pieces m_pieces;  // of the row tiles
  int32_t splits;   // blocks along M that share a column tile
  Reduction sum;    // partial [column tiles, splits, COLS]
};

struct FactorGradParams : FactorGradProblem {
  Pieces m_pieces, k_pieces;  // of the row and column tiles
  int32_t splits;             // blocks along M that share a tile of D
  int32_t cluster;            // 1: they are one cluster
  int32_t together;           // 1: all blocks run at the same time, and those may wait for one another
  Reduction sum;              // partial [k blocks, splits, column tiles of a block, COLS, R]
};

struct ShrinkGradParams : ShrinkGradProblem {
  Pieces m_pieces, n_pieces;  // of the row and column tiles
  int32_t m_splits, n_splits;
  int32_t cluster;   // 1: the m_splits blocks of a column are one cluster; by wgmma: so many blocks of a row
  int32_t together;  // 1: all blocks run at the same time, and those of a column may wait for one another
  Reduction sum_k;   // partial [row tiles, n_splits, ROWS, R]; by wgmma: n_splits clusters of blocks
  Reduction sum_Q;   // partial [n blocks, m_splits, column tiles of a block, COLS, R]
};

struct FoldGradParams : FoldGradProblem {
  int64_t n_per_split;  // rows of Q and B that one block of dG reads
  int32_t splits;
  Reduction sum;  // partial [L, tiles of a core, splits, tile]
};

// The kernel's parameters of a problem, without its plan.
template <class Params, class Problem>
Params params_of(const Problem& problem) {
  Params params{};
  static_cast<Problem&>(params) = problem;
  return params;
}

// A copy with rows of whole 16 bytes, in the kernel's type.
struct PackParams {
  Matrix from;  // [rows, cols]
  void* to;     // [rows, to_row], zero from column `cols` on
  int64_t rows, cols, to_row;
};

}  // namespace lotr
