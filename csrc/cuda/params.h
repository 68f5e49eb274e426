// Kernel parameters: a problem and how it is cut into blocks, passed by value.
//
// Blocks that share an output tile store their sums as float32 matrices, one a block, and the
// kernel sum_parts adds these in order.  So no block waits for another, and no memory outlives a
// launch.
#pragma once
#include "problem.h"

namespace lotr {

// A row of tiles cut into pieces of `whole` tiles, the first `longer` of them one tile longer.
struct Pieces {
  int32_t whole, longer;
};

struct ShrinkParams : ShrinkProblem {
  Pieces m_pieces, k_pieces;  // of the row tiles and of the steps along K
  float* parts;               // [pieces of K, M, parts_row], or null: one piece, which writes u
  int64_t parts_row;
};

struct ExpandParams : ExpandProblem {
  Pieces n_pieces;  // of the column tiles
};

struct FactorGradParams : FactorGradProblem {
  Pieces m_pieces, k_pieces;  // of the row and column tiles
  int64_t D_part;             // elements from one piece of M's D to the next one's
};

struct ShrinkGradParams : ShrinkGradProblem {
  Pieces m_pieces, n_pieces;  // of the row and column tiles
  float* k_parts;             // [pieces of N, M, parts_row], or null: one piece, which writes k
  int64_t parts_row;
  int64_t Q_part;  // elements from one piece of M's Q to the next one's
};

struct FoldGradParams : FoldGradProblem {
  int64_t n_per_split;  // rows of Q and B that one block of dG reads
  int32_t splits;
  int64_t dcore_row, dcore_part;  // elements from row to row, from one split's dG to the next one's
};

struct RowCoreParams : RowCoreProblem {
  int32_t rows_of_block;  // at most kernels::FOLD_ROWS
};

struct RowCoreGradParams : RowCoreGradProblem {
  int32_t splits;  // blocks that share the rows of a core
  int64_t dcores_row, dcores_part;
};

// The columns that a part's rows are apart: whole 32-byte sectors.
constexpr int64_t row_of_parts(int64_t cols) {
  return (cols + 7) / 8 * 8;
}

// out (accumulate: +=, else =) scale times the sum of parts [splits, rows, parts_row], in their
// order.
struct SumPartsParams {
  const float* parts;
  int64_t parts_row;
  MutableMatrix out;  // [rows, cols]
  DType out_type;
  int64_t rows;
  int32_t cols, splits, accumulate;
  float scale;
};

// h = scale * u core, for few tokens
struct CoreOperands {
  Matrix core;      // [r, r_core], data null: no such product
  MutableMatrix h;  // [M, r_core]
  int32_t r_core;
  float scale;
};

// The sums of up to two outputs; of the first one, u of `rows` tokens, also h.
struct SumTwoParams {
  SumPartsParams first, second;  // second.rows 0: there is none
  CoreOperands core;
};

// The kernel's parameters of a problem, without its plan.
template <class Params, class Problem>
Params params_of(const Problem& problem) {
  Params params{};
  static_cast<Problem&>(params) = problem;
  return params;
}

}  // namespace lotr
