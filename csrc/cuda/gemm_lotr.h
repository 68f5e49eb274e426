// The base product with the adapter inside, for sm_90a (kernels/gemm_lotr.cuh), without torch: raw pointers,
// a stream and a workspace that outlives the call.
//
//   forward   y = x W^T + bias + u F^T,  u = x A        backward   dx = g W + k A^T,  k = g F
#pragma once
#include <string>

#include "launch.h"
#include "plan/gemm_lotr.h"

namespace lotr::cuda {

constexpr int GEMM_LOTR_MAX_RANK = 128, GEMM_LOTR_FACTOR_RANK = 16;

// One direction; in the backward pass read x, W, A, F, y, u as g, W, F, A, dx, k.  N and K are the extents of
// y's and x's rows, so in the backward pass N is in and K is out.
struct GemmLotr {
  bool backward;
  MutableMatrix y;   // [M, N]
  Matrix x;          // [M, K]
  Matrix W;          // [N, K]; backward: [K, N], so the same matrix in memory
  const void* bias;  // [N], or null
  Matrix At;         // [r, K], the transpose of A
  Matrix F;          // [N, r]
  MutableMatrix u;   // [M, r], rows at least r rounded up to 8 apart; the ranks up to there become zero
  int64_t M, N, K;
  int32_t r;
  // Backward and up to rank GEMM_LOTR_FACTOR_RANK, data null: not wanted.  Q (+)= g^T u from the same launch.
  Matrix u_forward;  // [M, r], the u that goes with g
  MutableMatrix Q;   // [K, r] float32
  bool accumulate;   // else Q = instead of Q +=; then Q is contiguous
};

using GemmLotrPlan = plan::GemmLotr;

// Why the kernel cannot run it (name, expected, got), or nothing.
inline std::string gemm_lotr_refusal(const Call& call, const GemmLotr& q) {
  if (call.type == DType::float32) return "dtype: expected bfloat16 or float16, got float32";
  if (q.r < 1 || q.r > GEMM_LOTR_MAX_RANK)
    return "r: expected 1 to " + std::to_string(GEMM_LOTR_MAX_RANK) + ", got " + std::to_string(q.r);
  const auto extent = [](const char* name, int64_t least, int64_t n) {
    const std::string range = std::to_string(least) + " to 2^30";
    return n < least || n > 1 << 30 ? name + (": expected " + range) + ", got " + std::to_string(n) : "";
  };
  for (const auto& text : {extent("M", 0, q.M), extent("N", 1, q.N), extent("K", 1, q.K)})
    if (!text.empty()) return text;
  if (q.M * q.N > int64_t(1) << 44) return "M x N: expected at most 2^44, got " + std::to_string(q.M * q.N);
  // The requirements of tensor maps: rows start at multiples of 16 bytes, less than 2^32 elements apart.
  const auto rows = [](const char* name, const void* data, int64_t row, int64_t col, int64_t least) {
    const std::string what = std::string(name) + ": expected ";
    if (col != 1) return what + "a column stride of 1, got " + std::to_string(col);
    if (reinterpret_cast<uintptr_t>(data) % 16) return what + "an address divisible by 16";
    if (row % 8 || row < least || row >= int64_t(1) << 31)
      return what + "a row stride that is a multiple of 8 and at least " + std::to_string(least) + ", got " +
             std::to_string(row);
    return std::string();
  };
  const int64_t r_padded = (q.r + 7) / 8 * 8;
  for (const auto& text :
       {rows("x", q.x.data, q.x.row, q.x.col, q.K),
        rows("W", q.W.data, q.W.row, q.W.col, q.backward ? q.N : q.K),
        rows("At", q.At.data, q.At.row, q.At.col, q.K), rows("F", q.F.data, q.F.row, q.F.col, q.r),
        rows("u", q.u.data, q.u.row, q.u.col, r_padded)})
    if (!text.empty()) return text;
  if (q.Q.data && !q.backward) return "Q: expected none in the forward pass, got one";
  if (q.Q.data && q.r > GEMM_LOTR_FACTOR_RANK)
    return "Q: expected a rank up to " + std::to_string(GEMM_LOTR_FACTOR_RANK) + ", got " +
           std::to_string(q.r);
  if (q.Q.data && q.u_forward.col != 1)
    return "u of the forward pass: expected a column stride of 1, got " + std::to_string(q.u_forward.col);
  if (q.y.col != 1) return "y: expected a column stride of 1, got " + std::to_string(q.y.col);
  return {};
}

// Why the current device cannot run it (architecture, room for a cluster), or nothing.  Call it after
// gemm_lotr_refusal and before the launch; it queries the driver once per device and kernel instance.
std::string gemm_lotr_obstacle(const Call& call, const GemmLotr& q, const GemmLotrPlan& plan);

// Bytes of the workspace of calls with up to M tokens.  Fill it with zeros before the first call; then only
// the calls of one stream may use it, of any shapes: each leaves state that the next one reads.
inline size_t gemm_lotr_workspace(int64_t M) {
  return size_t(2 + 2 * ((M + 127) / 128 + 1)) * sizeof(int32_t);
}

// A workspace on the current device, used only by launches of `stream`, or during a capture only by those of
// its graph; zeros before the first.  Null if all are taken, for cudaStreamPerThread, or if `bytes` is too
// large (counters.cu).
void* gemm_lotr_workspace_of(void* stream, size_t bytes);

// Bytes of `partial`, which holds Q's partial sums for one call; 0 without Q.  Its contents do not matter.
inline size_t gemm_lotr_partial(const GemmLotr& q, const GemmLotrPlan& plan) {
  if (!q.Q.data) return 0;
  const int64_t height = 128 * plan.cluster, bands = (q.M + height - 1) / height,
                scouts = plan.scouts < bands ? plan.scouts : bands;
  return size_t(scouts * plan.cluster * ((q.K + 63) / 64) * 64 * GEMM_LOTR_FACTOR_RANK) * sizeof(float);
}

// Throws std::invalid_argument where gemm_lotr_refusal gives a reason, and for a plan out of range or too
// small a workspace or partial.
void gemm_lotr(const Call& call, const GemmLotr& q, const GemmLotrPlan& plan, void* workspace, size_t bytes,
               void* partial = nullptr, size_t partial_bytes = 0);

}  // namespace lotr::cuda
