// csrc/cuda/launch.h: choice of the element type, ranks beyond one launch, workspaces; and fold, which needs
// no choice.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "dispatch.h"
#include "kernels/fold.cuh"
#include "launchers.h"
#include "plan.h"

namespace lotr::cuda {
namespace {

int element_size(DType type) {
  return type == DType::float32 ? 4 : 2;
}

template <class F>
void dispatch_policy(const Call& call, F f) {
  dispatch_type(call.type, [&](auto type) {
    if constexpr (decltype(type)::value == int(DType::bfloat16))
      f(Launchers<tile::Half<__nv_bfloat16>>{});
    else if constexpr (decltype(type)::value == int(DType::float16))
      f(Launchers<tile::Half<__half>>{});
    else if (call.float32 == Float32::tf32)
      f(Launchers<tile::Tf32>{});
    else
      f(Launchers<tile::Exact>{});
  });
}

void check_rank(const char* kernel, const char* name, int64_t r) {
  if (r < 1 || r > MAX_RANK)
    throw std::invalid_argument(std::string(kernel) + ": " + name + ": expected a rank from 1 to " +
                                std::to_string(MAX_RANK) + ", got " + std::to_string(r));
}

// Columns first .. of a matrix.
template <class M>
M columns(M m, int64_t first, DType type) {
  const int64_t size = m.access == Access::float32_element ? 4 : element_size(type);
  auto* data = static_cast<const char*>(m.data) + first * m.col * size;
  if constexpr (std::is_same_v<M, Matrix>)
    m.data = data;
  else
    m.data = const_cast<char*>(data);
  return m;
}

Matrix read_only(const MutableMatrix& m) {
  return {m.data, m.row, m.col, m.access};
}

// f(first, ranks) for pieces of at most `most` ranks
template <class F>
void rank_pieces(int64_t r, int64_t most, F f) {
  for (int64_t first = 0; first < r; first += most) f(first, int32_t(std::min(most, r - first)));
}

// Workspace of a reduction: a counter for each tile, `floats` of partial sums for each block of the tile.
size_t reduction_bytes(int64_t tiles, int64_t splits, int64_t floats) {
  return splits > 1 ? aligned(size_t(tiles) * 4) + aligned(size_t(tiles * splits * floats) * 4) : 0;
}

}  // namespace

void clear(void* data, size_t bytes, void* stream) {
#ifdef __CUDACC__
  const cudaError_t error = cudaMemsetAsync(data, 0, bytes, static_cast<cudaStream_t>(stream));
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("clearing the workspace: ") + cudaGetErrorString(error));
#else
  (void)stream;
  std::memset(data, 0, bytes);
#endif
}

size_t shrink_workspace(const Call& call, const ShrinkParams& p) {
  check_rank("shrink", "A", p.r);
  if (p.M == 0) return 0;
  size_t bytes = 0;
  const auto add = [&](int64_t K, int64_t r) {
    rank_pieces(r, max_rank(call.type), [&](int64_t, int32_t ranks) {
      const auto plan = plan::shrink(p.M, K, ranks, element_size(call.type), call.multiprocessors);
      bytes = std::max(
          bytes, reduction_bytes(plan.m_tiles, plan.splits, int64_t(plan.rows) * plan::padded_rank(ranks)));
    });
  };
  add(p.K, p.r);
  if (p.core.data && p.r > max_rank(call.type)) add(p.r, p.r_core);
  return bytes;
}

void shrink(const Call& call, const ShrinkParams& p, void* workspace) {
  check_rank("shrink", "A", p.r);
  if (p.core.data) check_rank("shrink", "core", p.r_core);
  if (p.M == 0) return;
  const bool whole = p.r <= max_rank(call.type);
  rank_pieces(p.r, max_rank(call.type), [&](int64_t first, int32_t ranks) {
    ShrinkParams piece = p;
    piece.r = ranks;
    piece.A = columns(p.A, first, call.type);
    piece.u = columns(p.u, first, call.type);
    if (!whole) piece.core.data = nullptr;
    dispatch_policy(call, [&](auto launchers) { launchers.shrink(call, piece, workspace); });
  });
  if (p.core.data && !whole) {  // a block had only a part of u: h is a product of its own
    ShrinkParams second{};
    second.x = read_only(p.u);
    second.A = p.core;
    second.u = p.h;
    second.M = p.M;
    second.K = p.r;
    second.r = p.r_core;
    second.scale = p.core_scale;
    second.dropout.scale = 1.f;
    shrink(call, second, workspace);
  }
}

size_t expand_add_workspace(const Call&, const ExpandParams& p) {
  check_rank("expand_add", "F", p.r);
  return 0;
}

void expand_add(const Call& call, const ExpandParams& p, void*) {
  check_rank("expand_add", "F", p.r);
  if (p.M == 0) return;
  rank_pieces(p.r, max_rank(call.type), [&](int64_t first, int32_t ranks) {
    ExpandParams piece = p;
    piece.r = ranks;
    piece.u = columns(p.u, first, call.type);
    piece.F = columns(p.F, first, call.type);
    dispatch_policy(call, [&](auto launchers) { launchers.expand_add(call, piece); });
  });
}

size_t factor_grad_workspace(const Call& call, const FactorGradParams& p) {
  check_rank("factor_grad", "k", p.r);
  if (p.M == 0) return 0;
  size_t bytes = 0;
  rank_pieces(p.r, max_rank(call.type), [&](int64_t, int32_t ranks) {
    const auto plan = plan::factor_grad(p.M, p.K, ranks, element_size(call.type), call.multiprocessors);
    const int R = plan::padded_rank(ranks);
    bytes = std::max(
        bytes, reduction_bytes(plan.n_blocks, plan.m_blocks, int64_t(kernels::factor_grad_subs(R)) * 64 * R));
  });
  return bytes;
}

void factor_grad(const Call& call, const FactorGradParams& p, void* workspace) {
  check_rank("factor_grad", "k", p.r);
  if (p.M == 0) {
    if (!p.accumulate) clear(p.D, size_t(p.K * p.r) * sizeof(float), call.stream);  // then D is contiguous
    return;
  }
  rank_pieces(p.r, max_rank(call.type), [&](int64_t first, int32_t ranks) {
    FactorGradParams piece = p;
    piece.r = ranks;
    piece.v = columns(p.v, first, call.type);
    piece.D = p.D + first * p.D_col;
    dispatch_policy(call, [&](auto launchers) { launchers.factor_grad(call, piece, workspace); });
  });
}

namespace {

// k and Q from two reads of g, for ranks whose partial sums would cost more than the second read.
void two_reads(const ShrinkGradParams& p, ShrinkParams& k, FactorGradParams& Q) {
  k = ShrinkParams{};
  k.x = p.g;
  k.A = p.F;
  k.u = p.k;
  k.M = p.M;
  k.K = p.N;
  k.r = p.r;
  k.scale = k.dropout.scale = 1.f;
  Q = FactorGradParams{};
  Q.x = p.g;
  Q.v = p.u;
  Q.D = p.Q;
  Q.D_row = p.Q_row;
  Q.D_col = p.Q_col;
  Q.accumulate = p.accumulate;
  Q.M = p.M;
  Q.K = p.N;
  Q.r = p.r;
  Q.dropout.scale = 1.f;
}

}  // namespace

size_t shrink_grad_workspace(const Call& call, const ShrinkGradParams& p) {
  check_rank("shrink_grad", "F", p.r);
  if (p.M == 0) return 0;
  if (p.r > SHRINK_GRAD_MAX_RANK) {
    ShrinkParams k;
    FactorGradParams Q;
    two_reads(p, k, Q);
    return std::max(shrink_workspace(call, k), factor_grad_workspace(call, Q));
  }
  const int element = element_size(call.type), R = plan::padded_rank(p.r);
  const auto plan = plan::shrink_grad(p.M, p.N, p.r, element, call.multiprocessors);
  const int64_t blocks = plan.m_blocks * plan.n_blocks;
  return aligned(size_t(plan.m_blocks + plan.n_blocks) * 4) +
         aligned(size_t(blocks * plan.m_per_block * R) * 4) +
         aligned(size_t(blocks * kernels::shrink_grad_subs(size_t(element), R) * 64 * R) * 4);
}

void shrink_grad(const Call& call, const ShrinkGradParams& p, void* workspace) {
  check_rank("shrink_grad", "F", p.r);
  if (p.M == 0 && p.accumulate) return;
  if (p.M == 0) return clear(p.Q, size_t(p.N * p.r) * sizeof(float), call.stream);
  if (p.r > SHRINK_GRAD_MAX_RANK) {
    ShrinkParams k;
    FactorGradParams Q;
    two_reads(p, k, Q);
    shrink(call, k, workspace);
    return factor_grad(call, Q, workspace);
  }
  dispatch_policy(call, [&](auto launchers) { launchers.shrink_grad(call, p, workspace); });
}

void fold(const Call& call, const FoldParams& p) {
  check_rank("fold", "cores", p.r_in);
  check_rank("fold", "B", p.r_out);
  if (p.L == 0) return;
  const dim3 grid(unsigned(plan::ceil_div(p.N, kernels::FOLD_ROWS)),
                  unsigned(plan::ceil_div(p.r_in, kernels::FOLD_COLS)), unsigned(p.L));
  ptx::launch({grid, dim3(kernels::FoldTraits::THREADS), sizeof(kernels::FoldTraits::Smem),
               static_cast<ptx::stream_t>(call.stream), dim3(1, 1, 1), "fold"},
              kernels::fold, p);
}

size_t fold_grad_workspace(const Call& call, const FoldGradParams& p) {
  const auto plan = plan::fold_grad(p.N, p.L, p.r_in, p.r_out, p.dB, call.multiprocessors);
  return reduction_bytes(plan.core_tiles, plan.splits, kernels::FOLD_ROWS * kernels::FOLD_COLS);
}

void fold_grad(const Call& call, const FoldGradParams& problem, void* workspace) {
  check_rank("fold_grad", "cores", problem.r_in);
  check_rank("fold_grad", "B", problem.r_out);
  if (problem.L == 0) return;
  FoldGradParams p = problem;
  const auto plan = plan::fold_grad(p.N, p.L, p.r_in, p.r_out, p.dB, call.multiprocessors);
  p.n_per_split = plan.n_per_split;
  p.splits = plan.splits;
  if (plan.splits > 1) {
    const size_t counters = aligned(size_t(plan.core_tiles) * 4);
    clear(workspace, counters, call.stream);
    p.sum = {reinterpret_cast<float*>(static_cast<char*>(workspace) + counters),
             static_cast<int32_t*>(workspace)};
  }
  ptx::launch({dim3(unsigned(plan.dB_blocks + plan.core_tiles * plan.splits)),
               dim3(kernels::FoldTraits::THREADS), sizeof(kernels::FoldTraits::Smem),
               static_cast<ptx::stream_t>(call.stream), dim3(1, 1, 1), "fold_grad"},
              kernels::fold_grad, p);
}

}  // namespace lotr::cuda
