// Definitions of launchers.h: plan, workspace, grid.
#pragma once
#include "dispatch.h"
#include "kernels/expand_add.cuh"
#include "kernels/factor_grad.cuh"
#include "kernels/shrink.cuh"
#include "kernels/shrink_grad.cuh"
#include "launchers.h"
#include "plan.h"

namespace lotr::cuda {

template <class P>
constexpr int MAX = max_rank(sizeof(typename P::T) == 4 ? DType::float32 : DType::bfloat16);

inline dim3 grid_of(int64_t x, int64_t y) {
  return dim3(unsigned(x), unsigned(y));
}

template <class Traits, class Params>
void launch(const Call& call, void (*kernel)(Params), dim3 grid, const Params& p, const char* name) {
  ptx::launch({grid, dim3(Traits::THREADS), sizeof(typename Traits::Smem),
               static_cast<ptx::stream_t>(call.stream), dim3(1, 1, 1), name},
              kernel, p);
}

// Cuts a piece off the workspace for the blocks' sums: `tiles` counters, then the floats.
inline Reduction take(char*& workspace, char*& floats, int64_t tiles, size_t count) {
  const Reduction sum{reinterpret_cast<float*>(floats), reinterpret_cast<int32_t*>(workspace)};
  workspace += tiles * sizeof(int32_t);
  floats += aligned(count * sizeof(float));
  return sum;
}

template <class P>
void Launchers<P>::shrink(const Call& call, ShrinkParams p, void* workspace) {
  dispatch_rank<MAX<P>>(p.r, [&](auto rank) {
    constexpr int R = decltype(rank)::value;
    const auto plan = plan::shrink(p.M, p.K, p.r, sizeof(typename P::T), call.multiprocessors);
    p.k_per_split = plan.k_per_split;
    p.splits = plan.splits;
    if (plan.splits > 1) {
      char *counters = static_cast<char*>(workspace),
           *floats = counters + aligned(plan.m_tiles * sizeof(int32_t));
      clear(counters, size_t(floats - counters), call.stream);
      p.sum = take(counters, floats, plan.m_tiles, 0);
    }
    const dim3 grid = grid_of(plan.m_tiles, plan.splits);
    using Tall = kernels::ShrinkTraits<P, R, kernels::shrink_tall(R)>;
    using Low = kernels::ShrinkTraits<P, R, kernels::SHRINK_LOW>;
    if (plan.rows == Tall::ROWS)
      launch<Tall>(call, kernels::shrink<Tall>, grid, p, "shrink");
    else
      launch<Low>(call, kernels::shrink<Low>, grid, p, "shrink");
  });
}

template <class P>
void Launchers<P>::expand_add(const Call& call, ExpandParams p) {
  dispatch_rank<MAX<P>>(p.r, [&](auto rank) {
    using Traits = kernels::ExpandTraits<P, decltype(rank)::value>;
    const auto plan = plan::expand_add(p.M, p.N, p.r, sizeof(typename P::T), call.multiprocessors);
    p.m_per_block = plan.m_per_block;
    p.n_per_block = plan.n_per_block;
    launch<Traits>(call, kernels::expand_add<Traits>, grid_of(plan.n_blocks, plan.m_blocks), p, "expand_add");
  });
}

template <class P>
void Launchers<P>::factor_grad(const Call& call, FactorGradParams p, void* workspace) {
  dispatch_rank<MAX<P>>(p.r, [&](auto rank) {
    using Traits = kernels::FactorGradTraits<P, decltype(rank)::value>;
    const auto plan = plan::factor_grad(p.M, p.K, p.r, sizeof(typename P::T), call.multiprocessors);
    p.m_per_block = plan.m_per_block;
    p.k_per_block = plan.n_per_block;
    p.splits = int(plan.m_blocks);
    if (p.splits > 1) {
      char *counters = static_cast<char*>(workspace),
           *floats = counters + aligned(plan.n_blocks * sizeof(int32_t));
      clear(counters, size_t(floats - counters), call.stream);
      p.sum = take(counters, floats, plan.n_blocks, 0);
    }
    launch<Traits>(call, kernels::factor_grad<Traits>, grid_of(plan.n_blocks, plan.m_blocks), p,
                   "factor_grad");
  });
}

template <class P>
void Launchers<P>::shrink_grad(const Call& call, ShrinkGradParams p, void* workspace) {
  dispatch_rank<SHRINK_GRAD_MAX_RANK>(p.r, [&](auto rank) {
    using Traits = kernels::ShrinkGradTraits<P, decltype(rank)::value>;
    const auto plan = plan::shrink_grad(p.M, p.N, p.r, sizeof(typename P::T), call.multiprocessors);
    p.m_per_block = plan.m_per_block;
    p.n_per_block = plan.n_per_block;
    p.m_splits = int(plan.m_blocks);
    p.n_splits = int(plan.n_blocks);
    char* counters = static_cast<char*>(workspace);
    char* floats = counters + aligned((plan.m_blocks + plan.n_blocks) * sizeof(int32_t));
    clear(counters, size_t(floats - counters), call.stream);
    p.sum_k = take(counters, floats, plan.m_blocks,
                   size_t(plan.m_blocks * plan.n_blocks * plan.m_per_block) * Traits::R);
    p.sum_Q = take(counters, floats, plan.n_blocks, 0);
    launch<Traits>(call, kernels::shrink_grad<Traits>, grid_of(plan.n_blocks, plan.m_blocks), p,
                   "shrink_grad");
  });
}

}  // namespace lotr::cuda
