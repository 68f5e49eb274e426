// Implements Launchers of launchers.h: each function chooses the kernel's instance for the rank and
// the plan's tile, and its grid.
#pragma once
#include "dispatch.h"
#include "kernels/expand_add.cuh"
#include "kernels/factor_grad.cuh"
#include "kernels/shrink.cuh"
#include "kernels/shrink_grad.cuh"
#include "launchers.h"

namespace lotr::cuda {

template <class P>
constexpr int MAX_RANK_OF_LAUNCH =
    max_rank_of_launch(sizeof(typename P::T) == 4 ? DType::float32 : DType::bfloat16);

inline dim3 grid_of(int64_t x, int64_t y) {
  return dim3(unsigned(x), unsigned(y));
}

template <class P>
void Launchers<P>::shrink(const Call& call, const ShrinkParams& params, const plan::Plan& plan) {
  dispatch_rank<MAX_RANK_OF_LAUNCH<P>>(params.r, [&](auto rank) {
    constexpr int R = decltype(rank)::value;
    ShrinkParams p = params;
    p.m_pieces = plan.m_pieces();
    p.k_pieces = plan.n_pieces();
    const dim3 grid = grid_of(plan.m_blocks, plan.n_blocks);
    using Tall = kernels::ShrinkTraits<P, R, kernels::shrink_tall(R)>;
    using Low = kernels::ShrinkTraits<P, R, kernels::SHRINK_LOW>;
    if (plan.rows == Tall::ROWS)
      launch<Tall, kernels::shrink<Tall>>(call, grid, p, "shrink");
    else
      launch<Low, kernels::shrink<Low>>(call, grid, p, "shrink");
  });
}

template <class P>
void Launchers<P>::expand_add(const Call& call, const ExpandParams& params,
                              const plan::Plan& plan) {
  dispatch_rank<MAX_RANK_OF_LAUNCH<P>>(params.r, [&](auto rank) {
    ExpandParams p = params;
    p.n_pieces = plan.n_pieces();
    const dim3 grid = grid_of(plan.n_blocks, plan.m_blocks);
    using FromStart = kernels::ExpandTraits<P, decltype(rank)::value, false>;
    using FromBias = kernels::ExpandTraits<P, decltype(rank)::value, true>;
    if (p.start.data)
      launch<FromStart, kernels::expand_add<FromStart>>(call, grid, p, "expand_add");
    else
      launch<FromBias, kernels::expand_add<FromBias>>(call, grid, p, "expand_add");
  });
}

template <class P>
void Launchers<P>::factor_grad(const Call& call, const FactorGradParams& params,
                               const plan::Plan& plan) {
  dispatch_rank<MAX_RANK_OF_LAUNCH<P>>(params.r, [&](auto rank) {
    constexpr int R = decltype(rank)::value;
    FactorGradParams p = params;
    p.m_pieces = plan.m_pieces();
    p.k_pieces = plan.n_pieces();
    const dim3 grid = grid_of(plan.n_blocks, plan.m_blocks);
    using Wide = kernels::FactorGradTraits<P, R, kernels::factor_grad_wide(R)>;
    using Narrow = kernels::FactorGradTraits<P, R, kernels::factor_grad_narrow(R)>;
    if (plan.cols == Wide::COLS)
      launch<Wide, kernels::factor_grad<Wide>>(call, grid, p, "factor_grad");
    else
      launch<Narrow, kernels::factor_grad<Narrow>>(call, grid, p, "factor_grad");
  });
}

template <class P>
void Launchers<P>::shrink_grad(const Call& call, const ShrinkGradParams& params,
                               const plan::Plan& plan) {
  dispatch_rank<SHRINK_GRAD_MAX_RANK>(std::max(params.r, params.r_u), [&](auto rank) {
    using Traits = kernels::ShrinkGradTraits<P, decltype(rank)::value>;
    ShrinkGradParams p = params;
    p.m_pieces = plan.m_pieces();
    p.n_pieces = plan.n_pieces();
    launch<Traits, kernels::shrink_grad<Traits>>(call, grid_of(plan.n_blocks, plan.m_blocks), p,
                                                 "shrink_grad");
  });
}

}  // namespace lotr::cuda
