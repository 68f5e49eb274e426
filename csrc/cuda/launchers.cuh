// Definitions of launchers.h: workspace, grid.
#pragma once
#include "dispatch.h"
#include "kernels/expand_add.cuh"
#include "kernels/factor_grad.cuh"
#include "kernels/pack.cuh"
#include "kernels/shrink.cuh"
#include "kernels/shrink_grad.cuh"
#include "launchers.h"

namespace lotr::cuda {

template <class P>
constexpr int MAX = max_rank(sizeof(typename P::T) == 4 ? DType::float32 : DType::bfloat16);

inline dim3 grid_of(int64_t x, int64_t y) {
  return dim3(unsigned(x), unsigned(y));
}

inline dim3 cluster_of(const plan::Plan& plan) {
  return plan.cluster ? dim3(1, unsigned(plan.m_blocks), 1) : dim3(1, 1, 1);
}

template <class Traits, class Params>
void launch(const Call& call, void (*kernel)(Params), dim3 grid, const Params& p, const char* name,
            dim3 cluster = dim3(1, 1, 1)) {
  ptx::launch({grid, dim3(Traits::THREADS), sizeof(typename Traits::Smem),
               static_cast<ptx::stream_t>(call.stream), cluster, name, call.begins_early()},
              kernel, p);
}

// The same with all blocks at the same time, if p.together is set and there is room; else without it, to the
// same bits.
template <class Traits, class Params>
void launch_together(const Call& call, void (*kernel)(Params), dim3 grid, Params p, const char* name,
                     dim3 cluster) {
  if (p.together &&
      ptx::launch({grid, dim3(Traits::THREADS), sizeof(typename Traits::Smem),
                   static_cast<ptx::stream_t>(call.stream), cluster, name, call.begins_early(), true},
                  kernel, p))
    return;
  p.together = 0;
  launch<Traits>(call, kernel, grid, p, name, cluster);
}

template <class P>
void Launchers<P>::shrink(const Call& call, const ShrinkProblem& problem, const plan::Plan& plan,
                          void* workspace) {
  auto p = params_of<ShrinkParams>(problem);
  dispatch_rank<MAX<P>>(p.r, [&](auto rank) {
    constexpr int R = decltype(rank)::value;
    p.m_pieces = plan.m_pieces();
    p.k_pieces = plan.n_pieces();
    p.splits = int(plan.n_blocks);
    if (p.splits > 1) p.sum = Workspace(call, workspace, plan.m_blocks).take(plan.m_blocks, 0);
    const dim3 grid = grid_of(plan.m_blocks, plan.n_blocks);
    using Tall = kernels::ShrinkTraits<P, R, kernels::shrink_tall(R)>;
    using Low = kernels::ShrinkTraits<P, R, kernels::SHRINK_LOW>;
    if (plan.rows == Tall::ROWS)
      launch<Tall>(call, kernels::shrink<Tall>, grid, p, "shrink");
    else
      launch<Low>(call, kernels::shrink<Low>, grid, p, "shrink");
  });
}

template <class P>
void Launchers<P>::expand_add(const Call& call, const ExpandProblem& problem, const plan::Plan& plan) {
  ScaledExpandParams scaled{};
  ExpandParams& p = scaled;
  static_cast<ExpandOperands&>(p) = problem;
  p.n_pieces = plan.n_pieces();
  scaled.of_rows = problem.of_rows;
  const dim3 grid = grid_of(plan.n_blocks, plan.m_blocks);
  dispatch_rank<MAX<P>>(p.r, [&](auto rank) {
    using Traits = kernels::ExpandTraits<P, decltype(rank)::value>;
    using Scaled = kernels::ScaledExpandTraits<P, decltype(rank)::value>;
    if (problem.of_rows.scale)
      launch<Scaled>(call, kernels::expand_add<Scaled>, grid, scaled, "expand_add");
    else
      launch<Traits>(call, kernels::expand_add<Traits>, grid, p, "expand_add");
  });
}

template <class P>
void Launchers<P>::factor_grad(const Call& call, const FactorGradProblem& problem, const plan::Plan& plan,
                               void* workspace) {
  auto p = params_of<FactorGradParams>(problem);
  dispatch_rank<MAX<P>>(p.r, [&](auto rank) {
    constexpr int R = decltype(rank)::value;
    p.m_pieces = plan.m_pieces();
    p.k_pieces = plan.n_pieces();
    p.splits = int(plan.m_blocks);
    p.cluster = plan.cluster, p.together = plan.together;
    if (p.splits > 1 && !p.cluster) p.sum = Workspace(call, workspace, plan.n_blocks).take(plan.n_blocks, 0);
    const dim3 grid = grid_of(plan.n_blocks, plan.m_blocks), cluster = cluster_of(plan);
    using Wide = kernels::FactorGradTraits<P, R, kernels::factor_grad_wide(R)>;
    using Narrow = kernels::FactorGradTraits<P, R, kernels::factor_grad_narrow(R)>;
    if (plan.cols == Wide::COLS)
      launch_together<Wide>(call, kernels::factor_grad<Wide>, grid, p, "factor_grad", cluster);
    else
      launch_together<Narrow>(call, kernels::factor_grad<Narrow>, grid, p, "factor_grad", cluster);
  });
}

template <class P>
void Launchers<P>::shrink_grad(const Call& call, const ShrinkGradProblem& problem, const plan::Plan& plan,
                               void* workspace) {
  auto p = params_of<ShrinkGradParams>(problem);
  dispatch_rank<SHRINK_GRAD_MAX_RANK>(p.r, [&](auto rank) {
    using Traits = kernels::ShrinkGradTraits<P, decltype(rank)::value>;
    p.m_pieces = plan.m_pieces();
    p.n_pieces = plan.n_pieces();
    p.m_splits = int(plan.m_blocks);
    p.n_splits = int(plan.n_blocks);
    p.cluster = plan.cluster, p.together = plan.together;
    Workspace memory(call, workspace, plan.m_tiles + plan.n_tiles);
    p.sum_k = memory.take(plan.m_tiles, plan.m_tiles * plan.n_blocks * plan.rows * Traits::R);
    p.sum_Q = memory.take(plan.n_tiles, 0);
    launch_together<Traits>(call, kernels::shrink_grad<Traits>, grid_of(plan.n_blocks, plan.m_blocks), p,
                            "shrink_grad", cluster_of(plan));
  });
}

template <class P>
void Launchers<P>::pack(const Call& call, const PackParams& p) {
  using Traits = kernels::PackTraits<typename P::T>;
  const int64_t tiles = plan::ceil_div(p.rows, Traits::ROWS) * plan::ceil_div(p.to_row, Traits::COLS);
  launch<Traits>(call, kernels::pack<Traits>, grid_of(tiles, 1), p, "pack");
}

}  // namespace lotr::cuda
