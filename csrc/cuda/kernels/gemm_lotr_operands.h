// What kernels/gemm_lotr_operands.cuh takes.
#pragma once
#include "../params.h"

namespace lotr {

// The factors as gemm_lotr reads them, all of one type with contiguous rows of 16-byte strides:
// F = s B G^T, and the transposes of F and A.
struct GemmLotrOperands {
  Matrix B;          // [N, r_out]
  Matrix core;       // [r_in, r_out]
  Matrix A;          // [K, r_in]
  MutableMatrix F;   // [N, r_in]
  MutableMatrix Ft;  // [r_in, N]
  MutableMatrix At;  // [r_in, K]
  DType B_type, core_type, A_type, type;
  int64_t N, K;
  int32_t r_in, r_out;
  float scale;
};

}  // namespace lotr
