// GEMMs of CUTLASS for sm_80, d [m, n] = a [m, k] b [k, n] in float32: cp.async, ldmatrix and mma.sync.
#include "cutlass/gemm/device/gemm.h"

namespace {

using Bf16 = cutlass::bfloat16_t;
using Half = cutlass::half_t;
using Tf32 = cutlass::tfloat32_t;
using Row = cutlass::layout::RowMajor;
using Column = cutlass::layout::ColumnMajor;
template <int M, int N, int K>
using Shape = cutlass::gemm::GemmShape<M, N, K>;

// SPLIT_K: the blocks of a tile add their sums in a fixed order, which a semaphore in the workspace enforces.
template <class T, class LayoutA, class LayoutB, class Block, class Warp, class Instruction,
          bool SPLIT_K = false>
int gemm(int m, int n, int k, const void* a, const void* b, void* d, int slices, void* workspace) {
  constexpr int ALIGN = 128 / cutlass::sizeof_bits<T>::value;
  using Epilogue = cutlass::epilogue::thread::LinearCombination<float, 4, float, float>;
  using Gemm =
      cutlass::gemm::device::Gemm<T, LayoutA, T, LayoutB, float, Row, float, cutlass::arch::OpClassTensorOp,
                                  cutlass::arch::Sm80, Block, Warp, Instruction, Epilogue,
                                  cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<>, 3, ALIGN,
                                  ALIGN, SPLIT_K>;
  const int lda = std::is_same<LayoutA, Row>::value ? k : m, ldb = std::is_same<LayoutB, Row>::value ? n : k;
  float* out = static_cast<float*>(d);
  typename Gemm::Arguments arguments({m, n, k}, {static_cast<const T*>(a), lda},
                                     {static_cast<const T*>(b), ldb}, {out, n}, {out, n}, {1.f, 0.f}, slices);
  return int(Gemm()(arguments, workspace));
}

}  // namespace

#define PROGRAM(NAME, ...)                                                                    \
  extern "C" int NAME(int m, int n, int k, const void* a, const void* b, void* d, int slices, \
                      void* workspace) {                                                      \
    return gemm<__VA_ARGS__>(m, n, k, a, b, d, slices, workspace);                            \
  }

PROGRAM(sm80_bf16_tn, Bf16, Row, Column, Shape<64, 64, 32>, Shape<32, 32, 32>, Shape<16, 8, 16>)
PROGRAM(sm80_bf16_nt, Bf16, Column, Row, Shape<64, 64, 32>, Shape<32, 32, 32>, Shape<16, 8, 16>)
PROGRAM(sm80_f16_tt_split_k, Half, Row, Row, Shape<64, 64, 32>, Shape<32, 32, 32>, Shape<16, 8, 16>, true)
PROGRAM(sm80_tf32_tn, Tf32, Row, Column, Shape<64, 64, 16>, Shape<32, 32, 16>, Shape<16, 8, 8>)
PROGRAM(sm80_tf32_nt, Tf32, Column, Row, Shape<64, 64, 16>, Shape<32, 32, 16>, Shape<16, 8, 8>)
