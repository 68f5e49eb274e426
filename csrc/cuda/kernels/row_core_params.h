// The parameters of the kernels of row_core.cuh.
#pragma once
#include "../params.h"

namespace lotr {

// Which core a row takes: by an index, or by the ends of each core's rows.
struct RowIndex {
  const int64_t* core;   // [rows], -1 for none, or null
  const int32_t* ends;   // [cores], ascending, where core is null
  const int64_t* token;  // [rows] or null: the row itself
  int64_t rows, tokens, cores;
};

// h_i = scale a_t(i) G_c(i); and k_i = scale g_i G_c(i)^T, with the core's strides exchanged
struct RowCoreParams {
  RowIndex index;
  Matrix a;             // [tokens, r_in]
  Matrix cores;         // [cores, r_in, r_out], row and col strides of one core
  int64_t core_stride;  // from core to core
  MutableMatrix h;      // [rows, r_out]
  DType a_type, core_type, h_type;
  int32_t r_in, r_out;
  int32_t rows_of_block;  // at most kernels::FOLD_ROWS
  float scale;
  float missing;  // the value of a row if its core or token does not exist
};

// ends[c + 1] = the place after the last key <= c, for c = -1 .. bound - 1
struct RowEndsParams {
  const int64_t* keys;  // [rows], ascending
  int32_t* ends;        // [bound + 1]
  int64_t rows, bound;
};

// The places of the rows that have a key in common.
struct Segments {
  const int64_t* order;  // [rows]: the row at each place, or null: the place itself
  const int32_t* ends;   // [keys + 1] of RowEndsParams, or [keys] and from_zero
  int32_t from_zero;
};

// dG_c = scale sum of u_t(i)^T g_i over the rows of c, in their order
struct RowCoreGradParams {
  Segments of_core;
  const int64_t* token;  // [rows] or null
  Matrix u;              // [tokens, r_in]
  Matrix g;              // [rows, r_out]
  float* dcores;         // [cores, r_in, r_out], contiguous
  DType type;            // of u and g
  int64_t tokens, cores;
  int32_t r_in, r_out;
  int32_t splits;  // blocks that share the rows of a core
  float scale;
  Reduction sum;  // partial [cores, tiles of a core, splits, tile]
};

// du_t = sum of k_i over the rows of t, in their order
struct SumRowsParams {
  Segments of_token;
  const float* k;    // [rows, r], contiguous
  MutableMatrix du;  // [tokens, r]
  DType du_type;
  int64_t tokens;
  int32_t r;
};

}  // namespace lotr
