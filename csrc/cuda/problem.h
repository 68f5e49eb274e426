// The problems that operators compute: POD structs without a plan and without CUDA or torch types.
//
// m tokens, k in_features, n out_features, r rank. Strides count elements, not bytes. A problem
// has the extents of its matrices; a matrix without data (null) is an operand or a result that the
// call does not have.
#pragma once
#include <cstdint>

#include "tensor_view.h"

namespace lotr {

// Bytes.
constexpr int element_size(DType type) {
  return type == DType::float32 ? 4 : 2;
}

// How a kernel accesses a matrix: 16 bytes at a time, one element at a time, or one float32 at a
// time, which is rounded to the kernel's type.
enum class Access : int32_t { vector = 0, element = 1, float32_element = 2 };

// A matrix on the device, read or written.
struct Matrix {
  void* data;
  int64_t row, col;  // strides
  Access access;
};

// A float32 matrix that receives a sum over tokens.
struct FloatSum {
  float* data;
  int64_t row, col;  // strides
  bool add;          // += to what it holds; else =
};

// Element e = i * cols + j of a matrix is kept iff its Philox word is >= threshold (see
// tile/philox.cuh).
struct Dropout {
  const int64_t* seed;  // [1] on the device, or null: no dropout
  uint32_t threshold;   // p * 2^32
  float scale;          // of the product: 1 / (1 - p); without dropout 1, or a scaling applied last
};

// h = scale * u core for few tokens, by the launches that compute u. Without h, core is null.
struct CoreProduct {
  Matrix core;  // [r, r_core]
  Matrix h;     // [M, r_core]
  int32_t r_core;
  float scale;
};

// u = scale * drop(x) A
struct ShrinkProblem {
  Matrix x;  // [M, K]
  Matrix A;  // [K, r]
  Matrix u;  // [M, r]
  int64_t M, K;
  int32_t r;
  float scale;
  Dropout dropout;
  CoreProduct core_product;  // of u
};

// y = start + drop(u F^T). start: y itself, another matrix, or null for the bias.
struct ExpandProblem {
  Matrix y;      // [M, N]
  Matrix start;  // [M, N] of y's type, or null; it is y, or does not overlap y
  Matrix u;      // [M, r]
  Matrix F;      // [N, r]
  int64_t M, N;
  int32_t r;
  const void* bias;  // [N] of y's type, or null for zeros; only without start
  int64_t bias_stride;
  Dropout dropout;
};

// D (+)= drop(x)^T v
struct FactorGradProblem {
  Matrix x;    // [M, K]
  Matrix v;    // [M, r]
  FloatSum D;  // [K, r]
  int64_t M, K;
  int32_t r;
  Dropout dropout;
};

// du = g F and Q (+)= g^T u from one read of g
struct ShrinkGradProblem {
  Matrix g;    // [M, N]
  Matrix F;    // [N, r]
  Matrix u;    // [M, r_u]
  Matrix du;   // [M, r]
  FloatSum Q;  // [N, r_u]
  int64_t M, N;
  int32_t r, r_u;
  CoreProduct core_product;  // of du
};

// F = s B G^T
struct FoldProblem {
  Matrix B;     // [N, r_out]
  Matrix core;  // [r_in, r_out]
  Matrix F;     // [N, r_in]
  DType B_type, core_type, F_type;
  int64_t N;
  int32_t r_in, r_out;
  float scale;
};

// dB (+)= s Q G and dG = s Q^T B
struct FoldGradProblem {
  Matrix Q;      // [N, r_in] float32
  Matrix B;      // [N, r_out]
  Matrix core;   // [r_in, r_out]
  FloatSum dB;   // [N, r_out], or null
  float* dcore;  // [r_in, r_out], contiguous, or null
  DType B_type, core_type;
  int64_t N;
  int32_t r_in, r_out;
  float scale;
};

// u = x A, y += scale ((u core) B^T). Scaled last: scale u core may overflow float16, y does not.
struct FewTokensForwardProblem {
  Matrix y;     // [M, N]
  Matrix x;     // [M, K]
  Matrix A;     // [K, r_in]
  Matrix core;  // [r_in, r_out]
  Matrix B;     // [N, r_out]
  Matrix u;     // [M, r_in]
  int64_t M, K, N;
  int32_t r_in, r_out;
  float scale;
};

// h = g B, du = scale h core^T, dx += du A^T, dA (+)= x^T du, dB (+)= scale g^T (u core),
// dcore = scale u^T h
struct FewTokensBackwardProblem {
  Matrix dx;     // [M, K], or null
  Matrix g;      // [M, N]
  Matrix x;      // [M, K], read only for dA
  Matrix u;      // [M, r_in], read only for dB and dcore
  Matrix A;      // [K, r_in]
  Matrix core;   // [r_in, r_out]
  Matrix B;      // [N, r_out]
  FloatSum dA;   // [K, r_in], or null
  FloatSum dB;   // [N, r_out], or null
  float* dcore;  // [r_in, r_out], contiguous, or null
  int64_t M, K, N;
  int32_t r_in, r_out;
  float scale;
};

// ---- per-row cores ----

// The core of each row: given by an index, or by the ends of each core's rows. Any value of an
// index or a token is safe (kernels/row_core.cuh), but row_core_grad reads the rows up to the ends.
struct RowIndex {
  const int64_t* core;   // [rows], -1 for none, or null
  const int32_t* ends;   // [cores], ascending in [0, rows], if core is null
  const int64_t* token;  // [rows], or null: row i reads token i
  int64_t rows, tokens, cores;
};

// h_i = scale a_t(i) G_c(i), where row i has token t(i) and core c(i). The backward pass computes
// row_du_i = scale g_i G_c(i)^T as the same problem: a is g, h is row_du, and the strides of a core
// are exchanged.
struct RowCoreProblem {
  RowIndex index;
  Matrix a;             // [tokens, r_in]
  Matrix cores;         // [cores, r_in, r_out], row and col strides of one core
  int64_t core_stride;  // from core to core
  Matrix h;             // [rows, r_out]
  DType a_type, core_type, h_type;
  int32_t r_in, r_out;
  float scale;
  float missing;  // the value of a row if its core or token does not exist
};

// ends[c + 1] = the number of keys <= c, for c = -1 .. bound - 1
struct RowEndsProblem {
  const int64_t* keys;  // [rows], ascending
  int32_t* ends;        // [bound + 1]
  int64_t rows, bound;
};

// Rows sorted by a key, and where each key's rows are among them.
struct Segments {
  const int64_t* order;  // [rows]: the row at each place, or null: place i has row i
  const int32_t* ends;   // the place after the last row of each key
  int32_t from_zero;     // 1: ends starts with key 0; 0: with key -1, as RowEndsProblem writes it
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

// du_t = sum of row_du_i over the rows of t, in their order
struct SumRowsProblem {
  Segments of_token;
  const float* row_du;  // [rows, r], contiguous
  Matrix du;            // [tokens, r]
  DType du_type;
  int64_t tokens;
  int32_t r;
};

// to = from in the kernels' type. The rows of `to` start at multiples of 16 bytes; their padding
// is not written.
struct PackProblem {
  Matrix from, to;  // [rows, cols]
  int64_t rows, cols;
};

}  // namespace lotr
