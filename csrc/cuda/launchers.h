// What the operators (*.cu) share: the launch of a kernel, the launchers of each element type, the
// second launch of a sum, and functions that fill in a problem.
#pragma once
#include <stdexcept>
#include <string>

#include "launch.h"
#include "params.h"
#include "tile/mma.cuh"

namespace lotr::cuda {

// Launches Traits::THREADS threads per block with Traits::Smem as shared memory.
template <class Traits, auto KERNEL, class Params>
void launch(const Call& call, dim3 grid, const Params& p, const char* name,
            size_t shared = sizeof(typename Traits::Smem)) {
  ptx::LaunchArgs args{grid, dim3(Traits::THREADS), shared,
                       static_cast<ptx::stream_t>(call.stream)};
  args.name = name;
  args.early = call.early;
  ptx::launch<KERNEL>(args, p);
}

// Throws std::invalid_argument unless r is from 1 to MAX_RANK.
inline void check_rank(const char* kernel, const char* name, int64_t r) {
  if (r < 1 || r > MAX_RANK)
    throw std::invalid_argument(std::string(kernel) + ": " + name + ": expected a rank from 1 to " +
                                std::to_string(MAX_RANK) + ", got " + std::to_string(r));
}

// ---- the kernels with a large matrix ----

// The largest rank of one launch. A larger rank takes two launches, each of which reads the large
// matrix.
constexpr int max_rank_of_launch(DType type) {
  return type == DType::float32 ? 128 : 256;
}
// Above this rank, du and Q come from two reads of g. One read would need so many parts of du and Q
// that they cost more than the second read.
constexpr int SHRINK_GRAD_MAX_RANK = 64;

// Each kernels_*.cu compiles the launchers of one element type. P: a policy of tile/mma.cuh. The
// matrices can be read 16 bytes at a time, and the rank fits one launch.
template <class P>
struct Launchers {
  static void shrink(const Call& call, const ShrinkParams& p, const plan::Plan& plan);
  static void expand_add(const Call& call, const ExpandParams& p, const plan::Plan& plan);
  static void factor_grad(const Call& call, const FactorGradParams& p, const plan::Plan& plan);
  static void shrink_grad(const Call& call, const ShrinkGradParams& p, const plan::Plan& plan);
};

// ---- the second launch, for sums that are split over blocks ----

// type: of core_product's core and h.
void sum_parts(const Call& call, DType type, const SumTwoParams& p);
// dcores [rows, cols], contiguous, from the parts of fold_grad or row_core_grad.
void sum_cores(const Call& call, const float* parts, float* dcores, int64_t rows, int32_t cols,
               int32_t splits);

// ---- problems and matrices ----

// u = x A, without dropout.
inline ShrinkProblem shrink_of(const Matrix& x, const Matrix& A, const Matrix& u, int64_t M,
                               int64_t K, int32_t r, float scale = 1.f) {
  ShrinkProblem problem{};
  problem.x = x;
  problem.A = A;
  problem.u = u;
  problem.M = M;
  problem.K = K;
  problem.r = r;
  problem.scale = scale;
  problem.dropout.scale = 1.f;
  return problem;
}

// D (+)= x^T v, without dropout.
inline FactorGradProblem factor_grad_of(const FloatSum& D, const Matrix& x, const Matrix& v,
                                        int64_t M, int64_t K, int32_t r) {
  FactorGradProblem problem{};
  problem.D = D;
  problem.x = x;
  problem.v = v;
  problem.M = M;
  problem.K = K;
  problem.r = r;
  problem.dropout.scale = 1.f;
  return problem;
}

// A matrix of the call's type in the workspace, with rows at multiples of 16 bytes.
Matrix take_matrix(const Call& call, Workspace& memory, int64_t rows, int64_t cols);

}  // namespace lotr::cuda
