// Kernel parameters: a problem and how it is divided into blocks, passed by value.
//
// Blocks that share an output tile store partial sums. A "part" is a float32 matrix with all rows
// of the output, and there are as many parts as blocks that share a tile. The kernel sum_parts adds
// them in order. So no block waits for another, and no memory outlives a launch. A part has
// `parts_row` columns, all of them written: complete 32-byte sectors.
#pragma once
#include "problem.h"

namespace lotr {

// Columns of a part for a sum of `cols` columns.
constexpr int64_t row_of_parts(int64_t cols) {
  return (cols + 7) / 8 * 8;
}

// A row of tiles divided into pieces of `tiles` tiles, the first `longer` of them one tile longer.
struct Pieces {
  int32_t tiles, longer;
};

struct ShrinkParams : ShrinkProblem {
  Pieces m_pieces, k_pieces;  // of the row tiles and of the steps along K
  float* parts;               // [pieces of K, M, parts_row], or null: one piece, which writes u
  int64_t parts_row;
};

struct ExpandParams : ExpandProblem {
  Pieces n_pieces;  // of the column tiles
};

// D is the sum itself, or the parts.
struct FactorGradParams : FactorGradProblem {
  Pieces m_pieces, k_pieces;  // of the row and column tiles
  int32_t D_cols;             // columns that are written: r, or a part's
  int64_t D_part;             // elements from one part of D to the next
};

// Q is the sum itself, or the parts.
struct ShrinkGradParams : ShrinkGradProblem {
  Pieces m_pieces, n_pieces;  // of the row and column tiles
  float* du_parts;            // [pieces of N, M, du_parts_row], or null: one piece, which writes du
  int64_t du_parts_row;
  int32_t Q_cols;  // columns that are written: r_u, or a part's
  int64_t Q_part;  // elements from one part of Q to the next
};

// dcore is the gradient itself, or the parts.
struct FoldGradParams : FoldGradProblem {
  int64_t n_per_split;  // rows of Q and B that one block of dG reads
  int32_t splits;
  int64_t dcore_row;   // columns that are written: r_out, or a part's
  int64_t dcore_part;  // elements from one part to the next
};

struct RowCoreParams : RowCoreProblem {
  int32_t rows_of_block;  // at most kernels::SMALL_ROWS
};

// dcores are the gradients themselves, or the parts.
struct RowCoreGradParams : RowCoreGradProblem {
  int32_t splits;       // blocks that share the rows of a core
  int64_t dcores_row;   // columns that are written: r_out, or a part's
  int64_t dcores_part;  // elements from one part to the next
};

// out (+)= scale times the sum of parts [splits, rows, parts_row], in their order
struct SumPartsParams {
  const float* parts;
  int64_t parts_row;
  Matrix out;  // [rows, cols]
  DType out_type;
  bool add;  // += to what a float32 `out` holds; else =
  int64_t rows;
  int32_t cols, splits;
  float scale;
};

// The sums of up to two outputs, and a product of the first one with a core.
struct SumTwoParams {
  SumPartsParams first, second;  // rows is 0 in a sum that is absent
  CoreProduct core_product;      // of the first output
};

// The kernel's parameters for a problem, without its plan.
template <class Params, class Problem>
Params params_of(const Problem& problem) {
  Params params{};
  static_cast<Problem&>(params) = problem;
  return params;
}

}  // namespace lotr
