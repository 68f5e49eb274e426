// Launches kernels/one_product_wgmma.cuh: tensor maps and grid.
#include "one_product_sm90.h"

#include "dispatch.h"
#include "kernels/one_product_wgmma.cuh"
#include "tensor_map.cuh"

namespace lotr::cuda {
namespace {

// The walk: shrink's along the rows of x, factor_grad's down them.
constexpr bool ALONG = false, DOWN = true;

// f(the traits of the type and rank)
template <bool WALK, class F>
void with_traits(const Call& call, int64_t r, F f) {
  dispatch_rank<kernels::ONE_PRODUCT_WGMMA_RANK>(r, [&](auto rank) {
    dispatch_half(call.type, [&](auto element) {
      f(kernels::OneProductTraits<decltype(element), decltype(rank)::value, WALK>{});
    });
  });
}

template <class Traits, class Kernel, class Params>
void launch(const Call& call, const plan::Plan& plan, const char* name, Kernel* kernel, const Params& p,
            const Matrix& factor) {
  using T = typename Traits::T;
  ptx::launch(
      {dim3(unsigned(plan.m_blocks * plan.n_blocks)), dim3(Traits::THREADS), sizeof(typename Traits::Smem),
       static_cast<ptx::stream_t>(call.stream), dim3(unsigned(Traits::CLUSTER)), name, call.begins_early()},
      kernel, tensor_map<T>(p.x, p.M, p.K, Traits::ROWS),
      tensor_map<T>(factor, Traits::DOWN ? p.M : p.K, p.r, Traits::SHARE, Traits::PANEL), p);
}

}  // namespace

void shrink_wgmma(const Call& call, const ShrinkProblem& problem, const plan::Plan& plan) {
  const auto p = params_of<ShrinkParams>(problem);
  with_traits<ALONG>(call, p.r, [&](auto traits) {
    using Traits = decltype(traits);
    launch<Traits>(call, plan, "shrink", kernels::shrink_wgmma<Traits>, p, p.A);
  });
}

void factor_grad_wgmma(const Call& call, const FactorGradProblem& problem, const plan::Plan& plan) {
  const auto p = params_of<FactorGradParams>(problem);
  with_traits<DOWN>(call, p.r, [&](auto traits) {
    using Traits = decltype(traits);
    launch<Traits>(call, plan, "factor_grad", kernels::factor_grad_wgmma<Traits>, p, p.v);
  });
}

}  // namespace lotr::cuda
