// The problems that operators compute: POD structs without a plan and without CUDA or torch types.
// m tokens, k in, n out, r rank, l layer.  Strides count elements, not bytes.
#pragma once
#include <cstdint>

namespace lotr {

// Element types the kernels take, and how products of float32 are formed.
enum class DType : int32_t { float32 = 0, bfloat16 = 1, float16 = 2 };
enum class Float32 : int32_t { exact = 0, tf32 = 1 };  // torch's float32 matmul precision

// Bytes.
constexpr int element_size(DType type) {
  return type == DType::float32 ? 4 : 2;
}

// How a matrix is read: 16 bytes at a time, one element at a time, or one float32 at a time, rounded to the
// kernel's type.
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

// Element e = i * cols + j of a matrix is kept iff its Philox word is >= threshold (see tile/philox.cuh).
struct Dropout {
  const int64_t* seed;  // [1] on the device, or null: no dropout
  uint32_t threshold;   // p * 2^32
  float scale;          // of the product: 1 / (1 - p), without dropout 1 or a scaling that comes last
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

// Factors of the rows of a weight (a magnitude each, DoRA) are factors of y's columns.
struct RowScale {
  const float* scale;  // [N], null: no scale and no bias
  int64_t scale_stride;
  const void* bias;  // [N] of y's type, or null
  int64_t bias_stride;
};

// y += drop(u F^T)
struct ExpandOperands {
  MutableMatrix y;  // [M, N]
  Matrix u;         // [M, r]
  Matrix F;         // [N, r]
  int64_t M, N;
  int32_t r;
  Dropout dropout;
};
// The same, or with a scale y = bias + scale (y + u F^T), without dropout.
struct ExpandProblem : ExpandOperands {
  RowScale of_rows;
};

// g0 = scale g and dscale = sum over the rows of g (y - bias) / scale, 0 where the scale is 0
struct ScaleBackwardProblem {
  Matrix g;          // [M, N]
  Matrix y;          // [M, N], in the same type
  MutableMatrix g0;  // [M, N]
  RowScale of_rows;  // its scale is not null
  float* dscale;     // [N]
  int64_t M, N;
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

// F_l = s B G_l^T for every layer; of one layer also the transposes that gemm_lotr reads
struct FoldProblem {
  Matrix B;             // [N, r_out]
  Matrix cores;         // [L, r_in, r_out], row and col strides of one core
  int64_t core_stride;  // from layer to layer
  void* F;              // [L, N, r_in], last dimension contiguous
  int64_t F_layer, F_row;
  DType B_type, core_type, F_type;
  int64_t N;
  int32_t L, r_in, r_out;
  float scale;
  MutableMatrix Ft;  // [r_in, N] in F_type, data null: no transposes
  MutableMatrix At;  // [r_in, K] in F_type
  Matrix A;          // [K, r_in]
  DType A_type;
  int64_t K;  // 0: no transposes
};

// dB += s sum_l Q_l G_l (l = 0 .. L-1) and dG_l = s Q_l^T B
struct FoldGradProblem {
  Matrix Q;  // [L, N, r_in] float32, strides of one layer's
  int64_t Q_stride;
  Matrix B;      // [N, r_out]
  Matrix cores;  // [L, r_in, r_out]
  int64_t core_stride;
  float* dB;  // [N, r_out] or null
  int64_t dB_row, dB_col;
  float* dcores;  // [L, r_in, r_out], contiguous
  DType B_type, core_type;
  int64_t N;
  int32_t L, r_in, r_out;
  float scale;
};

// u = x A, y += scale (u core) B^T: in float16 scale u core could leave the range where y does not.  With a
// scale of the rows, y = bias + that scale times this sum.
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
  RowScale of_rows;
};

// h = g B, k = scale h core^T, dx += k A^T, dA += x^T k, dB += scale g^T (u core), dcore = scale u^T h
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
  float* dcore;  // [r_in, r_out], contiguous, or null
  int64_t M, K, N;
  int32_t r_in, r_out;
  float scale;
};

}  // namespace lotr
