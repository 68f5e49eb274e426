// csrc/cuda/launch.h: choice of the element type, ranks beyond one launch, inputs that have to be packed,
// workspaces; and fold, which needs no choice.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "counters.h"
#include "dispatch.h"
#include "kernels/fold.cuh"
#include "launchers.h"
#include "one_product_sm90.h"
#include "plan.h"
#include "shrink_grad_sm90.h"

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

// Takes packed copies of inputs off the front of the workspace, where they are needed.  Without one (null) it
// only counts their bytes.
class Packer {
 public:
  Packer(const Call& call, void* workspace) : call_(call), start_(static_cast<char*>(workspace)) {}

  void operator()(Matrix& m, int64_t rows, int64_t cols) {
    if (m.access == Access::vector) return;
    const int64_t chunk = row_elements(call_.type), row = plan::ceil_div(cols, chunk) * chunk;
    const Matrix packed{start_ + bytes_, row, 1, Access::vector};
    bytes_ += aligned(size_t(rows * row) * size_t(element_size(call_.type)));
    if (start_) {
      const PackParams p{m, const_cast<void*>(packed.data), rows, cols, row};
      dispatch_policy(call_, [&](auto launchers) { launchers.pack(call_, p); });
    }
    m = packed;
  }
  size_t bytes() const { return bytes_; }
  void* rest() const { return start_ + bytes_; }

 private:
  const Call& call_;
  char* start_;
  size_t bytes_ = 0;
};

size_t reduction_bytes(int64_t tiles, int64_t splits, int64_t floats) {
  return splits > 1 ? Workspace::bytes(tiles, tiles * splits * floats) : 0;
}

// h = core_scale * u core as a product of its own, where no block has the whole rank of u.  In exact float32,
// as within shrink.
ShrinkParams core_product(const ShrinkParams& p) {
  ShrinkParams h{};
  h.x = read_only(p.u);
  h.A = p.core;
  h.u = p.h;
  h.M = p.M;
  h.K = p.r;
  h.r = p.r_core;
  h.scale = p.core_scale;
  h.dropout.scale = 1.f;
  return h;
}
Call exactly(Call call) {
  call.float32 = Float32::exact;
  return call;
}

}  // namespace

#ifndef LOTR_SM90A  // then shrink_grad_sm90.cu has it
bool runs_wgmma() {
  return false;
}
#endif

Workspace::Workspace(const Call& call, void* memory, int64_t tiles)
    : counters_(counters(call.stream, tiles)), floats_(static_cast<char*>(memory)) {
  const size_t bytes = aligned(size_t(tiles) * sizeof(int32_t));
  if (!counters_) {
    counters_ = static_cast<int32_t*>(memory);
    clear(memory, bytes, call.stream);
  }
  floats_ += bytes;
}

Reduction Workspace::take(int64_t tiles, int64_t floats) {
  const Reduction sum{reinterpret_cast<float*>(floats_), counters_};
  counters_ += tiles;
  floats_ += aligned(size_t(floats) * sizeof(float));
  return sum;
}

size_t shrink_workspace(const Call& call, const ShrinkParams& problem) {
  ShrinkParams p = problem;
  check_rank("shrink", "A", p.r);
  if (p.M == 0) return 0;
  Packer pack(call, nullptr);
  pack(p.x, p.M, p.K), pack(p.A, p.K, p.r);
#ifdef LOTR_SM90A
  if (shrink_wgmma_plan(call, p).rows) return pack.bytes();
#endif
  size_t bytes = 0;
  rank_pieces(p.r, max_rank(call.type), [&](int64_t, int32_t ranks) {
    const auto plan = plan::shrink(p.M, p.K, ranks, element_size(call.type), machine_of(call));
    const int R = plan::padded_rank(ranks);
    const int64_t floats = int64_t(kernels::shrink_subs(R, plan.rows)) * plan.rows * R;
    bytes = std::max(bytes, reduction_bytes(plan.m_blocks, plan.n_blocks, floats));
  });
  if (p.core.data && p.r > max_rank(call.type))
    bytes = std::max(bytes, shrink_workspace(exactly(call), core_product(p)));
  return pack.bytes() + bytes;
}

void shrink(const Call& call, const ShrinkParams& problem, void* workspace) {
  ShrinkParams p = problem;
  check_rank("shrink", "A", p.r);
  if (p.core.data) check_rank("shrink", "core", p.r_core);
  if (p.M == 0) return;
  Packer pack(call, workspace);
  pack(p.x, p.M, p.K), pack(p.A, p.K, p.r);
#ifdef LOTR_SM90A  // the build has code of sm_90a
  const plan::Plan wgmma = shrink_wgmma_plan(call, p);
  if (wgmma.rows) return shrink_wgmma(call, p, wgmma);
#endif
  const bool whole = p.r <= max_rank(call.type);
  rank_pieces(p.r, max_rank(call.type), [&](int64_t first, int32_t ranks) {
    ShrinkParams piece = p;
    piece.r = ranks;
    piece.A = columns(p.A, first, call.type);
    piece.u = columns(p.u, first, call.type);
    if (!whole) piece.core.data = nullptr;
    dispatch_policy(call, [&](auto launchers) { launchers.shrink(call, piece, pack.rest()); });
  });
  if (p.core.data && !whole) shrink(exactly(call), core_product(p), pack.rest());
}

size_t expand_add_workspace(const Call& call, const ExpandParams& problem) {
  ExpandParams p = problem;
  check_rank("expand_add", "F", p.r);
  if (p.M == 0) return 0;
  Packer pack(call, nullptr);
  pack(p.u, p.M, p.r), pack(p.F, p.N, p.r);
  return pack.bytes();
}

void expand_add(const Call& call, const ExpandParams& problem, void* workspace) {
  ExpandParams p = problem;
  check_rank("expand_add", "F", p.r);
  if (p.M == 0) return;
  Packer pack(call, workspace);
  pack(p.u, p.M, p.r), pack(p.F, p.N, p.r);
  rank_pieces(p.r, max_rank(call.type), [&](int64_t first, int32_t ranks) {
    ExpandParams piece = p;
    piece.r = ranks;
    piece.u = columns(p.u, first, call.type);
    piece.F = columns(p.F, first, call.type);
    dispatch_policy(call, [&](auto launchers) { launchers.expand_add(call, piece); });
  });
}

size_t factor_grad_workspace(const Call& call, const FactorGradParams& problem) {
  FactorGradParams p = problem;
  check_rank("factor_grad", "k", p.r);
  if (p.M == 0) return 0;
  Packer pack(call, nullptr);
  pack(p.x, p.M, p.K), pack(p.v, p.M, p.r);
#ifdef LOTR_SM90A
  if (factor_grad_wgmma_plan(call, p).rows) return pack.bytes();
#endif
  size_t bytes = 0;
  rank_pieces(p.r, max_rank(call.type), [&](int64_t, int32_t ranks) {
    const auto plan = plan::factor_grad(p.M, p.K, ranks, element_size(call.type), machine_of(call));
    const int R = plan::padded_rank(ranks);
    const int64_t floats = int64_t(kernels::factor_grad_subs(R, plan.cols)) * plan.cols * R;
    bytes = std::max(bytes, reduction_bytes(plan.n_blocks, plan.cluster ? 1 : plan.m_blocks, floats));
  });
  return pack.bytes() + bytes;
}

void factor_grad(const Call& call, const FactorGradParams& problem, void* workspace) {
  FactorGradParams p = problem;
  check_rank("factor_grad", "k", p.r);
  if (p.M == 0) {
    if (!p.accumulate) clear(p.D, size_t(p.K * p.r) * sizeof(float), call.stream);  // then D is contiguous
    return;
  }
  Packer pack(call, workspace);
  pack(p.x, p.M, p.K), pack(p.v, p.M, p.r);
#ifdef LOTR_SM90A
  const plan::Plan wgmma = factor_grad_wgmma_plan(call, p);
  if (wgmma.rows) return factor_grad_wgmma(call, p, wgmma);
#endif
  rank_pieces(p.r, max_rank(call.type), [&](int64_t first, int32_t ranks) {
    FactorGradParams piece = p;
    piece.r = ranks;
    piece.v = columns(p.v, first, call.type);
    piece.D = p.D + first * p.D_col;
    dispatch_policy(call, [&](auto launchers) { launchers.factor_grad(call, piece, pack.rest()); });
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

size_t shrink_grad_workspace(const Call& call, const ShrinkGradParams& problem) {
  ShrinkGradParams p = problem;
  check_rank("shrink_grad", "F", p.r);
  if (p.M == 0) return 0;
  Packer pack(call, nullptr);
  pack(p.g, p.M, p.N), pack(p.F, p.N, p.r), pack(p.u, p.M, p.r);
  if (p.r > SHRINK_GRAD_MAX_RANK) {
    ShrinkParams k;
    FactorGradParams Q;
    two_reads(p, k, Q);
    return pack.bytes() + std::max(shrink_workspace(call, k), factor_grad_workspace(call, Q));
  }
#ifdef LOTR_SM90A
  const plan::Plan wgmma = shrink_grad_wgmma_plan(call, p);
  if (wgmma.rows) return pack.bytes() + shrink_grad_wgmma_workspace(wgmma, p.r);
#endif
  const int element = element_size(call.type), R = plan::padded_rank(p.r);
  const auto plan = plan::shrink_grad(p.M, p.N, p.r, element, machine_of(call));
  const int64_t k_floats = plan.m_tiles * plan.n_blocks * plan.rows * R;
  const int64_t Q_floats = plan.m_blocks * plan.n_blocks * kernels::shrink_grad_subs(size_t(element), R) *
                           kernels::shrink_grad_cols(size_t(element)) * R;
  return pack.bytes() + Workspace::bytes(plan.m_tiles + plan.n_tiles, k_floats) +
         Workspace::bytes(0, Q_floats);
}

void shrink_grad(const Call& call, const ShrinkGradParams& problem, void* workspace) {
  ShrinkGradParams p = problem;
  check_rank("shrink_grad", "F", p.r);
  if (p.M == 0 && p.accumulate) return;
  if (p.M == 0) return clear(p.Q, size_t(p.N * p.r) * sizeof(float), call.stream);
  Packer pack(call, workspace);
  pack(p.g, p.M, p.N), pack(p.F, p.N, p.r), pack(p.u, p.M, p.r);
  if (p.r > SHRINK_GRAD_MAX_RANK) {
    ShrinkParams k;
    FactorGradParams Q;
    two_reads(p, k, Q);
    shrink(call, k, pack.rest());
    return factor_grad(call, Q, pack.rest());
  }
#ifdef LOTR_SM90A
  const plan::Plan wgmma = shrink_grad_wgmma_plan(call, p);
  if (wgmma.rows) return shrink_grad_wgmma(call, p, wgmma, pack.rest());
#endif
  dispatch_policy(call, [&](auto launchers) { launchers.shrink_grad(call, p, pack.rest()); });
}

void fold(const Call& call, const FoldParams& p) {
  check_rank("fold", "cores", p.r_in);
  check_rank("fold", "B", p.r_out);
  if ((p.Ft.data || p.At.data) && p.L != 1)
    throw std::invalid_argument("fold: cores: expected one where transposes are made, got " +
                                std::to_string(p.L));
  if (p.L == 0) return;
  const int64_t row_tiles = plan::ceil_div(p.N, kernels::FOLD_ROWS) + plan::ceil_div(p.K, kernels::FOLD_ROWS);
  const dim3 grid(unsigned(row_tiles), unsigned(plan::ceil_div(p.r_in, kernels::FOLD_COLS)), unsigned(p.L));
  ptx::launch({grid, dim3(kernels::FoldTraits::THREADS), sizeof(kernels::FoldTraits::Smem),
               static_cast<ptx::stream_t>(call.stream), dim3(1, 1, 1), "fold", call.begins_early()},
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
  if (plan.splits > 1) p.sum = Workspace(call, workspace, plan.core_tiles).take(plan.core_tiles, 0);
  ptx::launch({dim3(unsigned(plan.dB_blocks + plan.core_tiles * plan.splits)),
               dim3(kernels::FoldTraits::THREADS), sizeof(kernels::FoldTraits::Smem),
               static_cast<ptx::stream_t>(call.stream), dim3(1, 1, 1), "fold_grad", call.begins_early()},
              kernels::fold_grad, p);
}

}  // namespace lotr::cuda
