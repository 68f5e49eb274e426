// The problems that operators compute: POD structs without a plan and without CUDA or torch types.
// m tokens, k in, n out, r rank.  Strides count elements, not bytes.
#pragma once
#include <cstdint>

namespace lotr {

// Element types the kernels take.  Products of float32 are exact, whatever torch's matmul precision
// is.
enum class DType : int32_t { float32 = 0, bfloat16 = 1, float16 = 2 };

// Bytes.
constexpr int element_size(DType type) {
  return type == DType::float32 ? 4 : 2;
}

// How a matrix is read: 16 bytes at a time, one element at a time, or one float32 at a time,
// rounded to the kernel's type.
enum class Access : int32_t { vector = 0, element = 1, float32_element = 2 };

struct Matrix {
  const void* data;  // [rows, cols], extents are the kernel's own
  int64_t row, col;  // strides
  Access access;
};

// Output, or a matrix updated in place.  vector: its rows allow 16-byte stores.
struct MutableMatrix {
  void* data;  // [rows, cols]
  int64_t row, col;
  Access access;
};

inline Matrix read_only(const MutableMatrix& m) {
  return {m.data, m.row, m.col, m.access};
}

// Element e = i * cols + j of a matrix is kept iff its Philox word is >= threshold (see
// tile/philox.cuh).
struct Dropout {
  const int64_t* seed;  // [1] on the device, or null: no dropout
  uint32_t threshold;   // p * 2^32
  float scale;  // of the product: 1 / (1 - p), without dropout 1 or a scaling that comes last
};

// u = scale * drop(x) A, and for few tokens h = core_scale * u core in the same launch.
struct ShrinkProblem {
  Matrix x;         // [M, K]
  Matrix A;         // [K, r]
  MutableMatrix u;  // [M, r]
  int64_t M, K;
  int32_t r;
  float scale;
  Dropout dropout;
  Matrix core;      // [r, r_core], data null: no second product
  MutableMatrix h;  // [M, r_core]
  int32_t r_core;
  float core_scale;
};

// y += drop(u F^T); fresh: y = bias + drop(u F^T), whatever y holds
struct ExpandProblem {
  MutableMatrix y;  // [M, N]
  Matrix u;         // [M, r]
  Matrix F;         // [N, r]
  int64_t M, N;
  int32_t r;
  int32_t fresh;     // 1: y is written and not read
  const void* bias;  // [N] of y's type, or null; only of a fresh y
  int64_t bias_stride;
  Dropout dropout;
};

// D += drop(x)^T v
struct FactorGradProblem {
  Matrix x;  // [M, K]
  Matrix v;  // [M, r]
  float* D;  // [K, r]
  int64_t D_row, D_col;
  int64_t M, K;
  int32_t r;
  int32_t accumulate;  // 0: D = instead of D +=
  Dropout dropout;
};

// k = g F and Q = g^T u from one read of g
struct ShrinkGradProblem {
  Matrix g;         // [M, N]
  Matrix F;         // [N, r]
  Matrix u;         // [M, r]
  MutableMatrix k;  // [M, r]
  float* Q;         // [N, r]
  int64_t Q_row, Q_col;
  int64_t M, N;
  int32_t r;
  int32_t accumulate;  // 0: Q = instead of Q +=
};

// F = s B G^T
struct FoldProblem {
  Matrix B;         // [N, r_out]
  Matrix core;      // [r_in, r_out]
  MutableMatrix F;  // [N, r_in]
  DType B_type, core_type, F_type;
  int64_t N;
  int32_t r_in, r_out;
  float scale;
};

// dB += s Q G and dG = s Q^T B
struct FoldGradProblem {
  Matrix Q;     // [N, r_in] float32
  Matrix B;     // [N, r_out]
  Matrix core;  // [r_in, r_out]
  float* dB;    // [N, r_out] or null
  int64_t dB_row, dB_col;
  int32_t add_dB;  // 0: dB = instead of dB +=
  float* dcore;    // [r_in, r_out], contiguous, or null
  DType B_type, core_type;
  int64_t N;
  int32_t r_in, r_out;
  float scale;
};

// u = x A, y += scale (u core) B^T: in float16 scale u core could leave the range where y does not.
struct SmallForwardProblem {
  MutableMatrix y;  // [M, N]
  Matrix x;         // [M, K]
  Matrix A;         // [K, r_in]
  Matrix core;      // [r_in, r_out]
  Matrix B;         // [N, r_out]
  MutableMatrix u;  // [M, r_in]
  int64_t M, K, N;
  int32_t r_in, r_out;
  float scale;
};

// h = g B, k = scale h core^T, dx += k A^T, dA += x^T k, dB += scale g^T (u core), dcore = scale
// u^T h
struct SmallBackwardProblem {
  MutableMatrix dx;  // [M, K], data null: not wanted
  Matrix g;          // [M, N]
  Matrix x;          // [M, K], read for dA only
  Matrix u;          // [M, r_in]
  Matrix A;          // [K, r_in]
  Matrix core;       // [r_in, r_out]
  Matrix B;          // [N, r_out]
  float* dA;         // [K, r_in] or null
  int64_t dA_row, dA_col;
  float* dB;  // [N, r_out] or null
  int64_t dB_row, dB_col;
  int32_t add_dA, add_dB;  // 0: = instead of +=; then contiguous
  float* dcore;            // [r_in, r_out], contiguous, or null
  int64_t M, K, N;
  int32_t r_in, r_out;
  float scale;
};

// ---- a core a row ----

// Which core a row takes: by an index, or by the ends of each core's rows.
struct RowIndex {
  const int64_t* core;   // [rows], -1 for none, or null
  const int32_t* ends;   // [cores], ascending, where core is null
  const int64_t* token;  // [rows] or null: the row itself
  int64_t rows, tokens, cores;
};

// h_i = scale a_t(i) G_c(i); and k_i = scale g_i G_c(i)^T, with the core's strides exchanged
struct RowCoreProblem {
  RowIndex index;
  Matrix a;             // [tokens, r_in]
  Matrix cores;         // [cores, r_in, r_out], row and col strides of one core
  int64_t core_stride;  // from core to core
  MutableMatrix h;      // [rows, r_out]
  DType a_type, core_type, h_type;
  int32_t r_in, r_out;
  float scale;
  float missing;  // the value of a row if its core or token does not exist
};

// ends[c + 1] = the place after the last key <= c, for c = -1 .. bound - 1
struct RowEndsProblem {
  const int64_t* keys;  // [rows], ascending
  int32_t* ends;        // [bound + 1]
  int64_t rows, bound;
};

// The places of the rows that have a key in common.
struct Segments {
  const int64_t* order;  // [rows]: the row at each place, or null: the place itself
  const int32_t* ends;   // [keys + 1] of RowEndsProblem, or [keys] and from_zero
  int32_t from_zero;
};

// dG_c = scale sum of u_t(i)^T g_i over the rows of c, in their order
struct RowCoreGradProblem {
  Segments of_core;
  const int64_t* token;  // [rows] or null
  Matrix u;              // [tokens, r_in]
  Matrix g;              // [rows, r_out]
  float* dcores;         // [cores, r_in, r_out], contiguous
  DType type;            // of u and g
  int64_t rows, tokens, cores;
  int32_t r_in, r_out;
  float scale;
};

// du_t = sum of k_i over the rows of t, in their order
struct SumRowsProblem {
  Segments of_token;
  const float* k;    // [rows, r], contiguous
  MutableMatrix du;  // [tokens, r]
  DType du_type;
  int64_t tokens;
  int32_t r;
};

// A copy with rows of whole 16 bytes, in the kernels' type.
struct PackProblem {
  Matrix from;  // [rows, cols]
  void* to;     // [rows, to_row], zero from column `cols` on
  int64_t rows, cols, to_row;
};

}  // namespace lotr
