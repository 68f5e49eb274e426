// Launches kernels/shrink_grad_wgmma.cuh: tensor maps, grid, workspace.
#include "shrink_grad_sm90.h"

#include "dispatch.h"
#include "kernels/shrink_grad_wgmma.cuh"
#include "launchers.h"
#include "tensor_map.cuh"

namespace lotr::cuda {
namespace {

// Counters and partial sums: of k for each slice of rows and cluster along N, where there are several; of Q
// for each strip, and for each block.
struct Sums {
  int64_t clusters, k_counters, k, Q;
  Sums(const plan::Plan& plan, int64_t r) {
    const int64_t R = plan::padded_rank(r), rows = plan.m_tiles * plan.rows;
    clusters = plan.n_blocks / plan.of_row;
    k_counters = clusters > 1 ? rows / kernels::SHRINK_GRAD_WGMMA_SLICE : 0;
    k = clusters > 1 ? rows * clusters * R : 0;
    Q = plan.m_blocks * plan.n_blocks * kernels::SHRINK_GRAD_WGMMA_SUBS * plan.cols * R;
  }
};

template <class T, int R>
void run(const Call& call, ShrinkGradParams p, dim3 grid) {
  using Traits = kernels::ShrinkGradWgmmaTraits<T, R>;
  // Early or cooperative: CUDA does not document that a launch may be both.
  const auto launch = [&](bool together) {
    p.together = together;
    return ptx::launch(
        {grid, dim3(Traits::THREADS), sizeof(typename Traits::Smem), static_cast<ptx::stream_t>(call.stream),
         dim3(unsigned(p.cluster)), "shrink_grad", call.begins_early() && !together, together},
        kernels::shrink_grad_wgmma<Traits>, tensor_map<T>(p.g, p.M, p.N, Traits::ROWS),
        tensor_map<T>(p.F, p.N, p.r, Traits::COLS, R), tensor_map<T>(p.u, p.M, p.r, Traits::ROWS), p);
  };
  if (!p.together || !launch(true)) launch(false);
}

}  // namespace

bool runs_wgmma() {
  if (ptx::capability_of_device("shrink_grad") != 90) return false;
  using Traits = kernels::ShrinkGradWgmmaTraits<__nv_bfloat16, kernels::SHRINK_GRAD_WGMMA_RANK>;
  constexpr unsigned MOST = MOST_OF_CLUSTER;
  return ptx::resident_clusters(
             {dim3(MOST), dim3(Traits::THREADS), sizeof(typename Traits::Smem), nullptr, dim3(MOST)},
             reinterpret_cast<const void*>(&kernels::shrink_grad_wgmma<Traits>)) > 0;
}

size_t shrink_grad_wgmma_workspace(const plan::Plan& plan, int64_t r) {
  const Sums sums(plan, r);
  return Workspace::bytes(sums.k_counters + plan.n_blocks, sums.k) + Workspace::bytes(0, sums.Q);
}

void shrink_grad_wgmma(const Call& call, const ShrinkGradProblem& problem, const plan::Plan& plan,
                       void* workspace) {
  auto p = params_of<ShrinkGradParams>(problem);
  const Sums sums(plan, p.r);
  p.m_pieces = plan.m_pieces();
  p.n_pieces = plan.n_pieces();
  p.m_splits = int(plan.m_blocks);
  p.n_splits = int(sums.clusters);
  p.cluster = plan.of_row, p.together = plan.together;
  Workspace memory(call, workspace, sums.k_counters + plan.n_blocks);
  p.sum_k = memory.take(sums.k_counters, sums.k);
  p.sum_Q = memory.take(plan.n_blocks, sums.Q);
  const dim3 grid(unsigned(plan.n_blocks), unsigned(plan.m_blocks));
  dispatch_rank<kernels::SHRINK_GRAD_WGMMA_RANK>(p.r, [&](auto rank) {
    dispatch_half(call.type,
                  [&](auto element) { run<decltype(element), decltype(rank)::value>(call, p, grid); });
  });
}

}  // namespace lotr::cuda
