// csrc/cuda/launch.h: the gradients of a scale of y's columns, in one launch.
#include "counters.h"
#include "dispatch.h"
#include "kernels/scale_backward.cuh"
#include "launchers.h"
#include "plans.h"

namespace lotr::cuda {

PreparedScaleBackward prepare(const Call& call, const ScaleBackwardProblem& p) {
  PreparedScaleBackward made;
  if (p.M == 0) return made;
  const size_t element = size_t(element_size(call.type));
  const auto plan = made.plan = scale_backward_plan(call, p.M, p.N);
  made.workspace = reduction_bytes(plan.n_tiles, plan.splits, kernels::scale_backward_cols(element));
  return made;
}

void run(const Call& call, const ScaleBackwardProblem& problem, const PreparedScaleBackward& prepared,
         void* workspace) {
  if (problem.M == 0) return clear(problem.dscale, size_t(problem.N) * sizeof(float), call.stream);
  const plan::ScaleBackward& plan = prepared.plan;
  auto p = params_of<ScaleBackwardParams>(problem);
  p.m_pieces = plan::pieces(plan.m_tiles, plan.splits);
  p.splits = int(plan.splits);
  if (p.splits > 1) p.sum = Workspace(call, workspace, plan.n_tiles).take(plan.n_tiles, 0);
  const auto launch = [&](auto element) {
    using Traits = kernels::ScaleBackwardTraits<decltype(element)>;
    ptx::launch({dim3(unsigned(plan.n_tiles), unsigned(plan.splits)), dim3(Traits::THREADS),
                 sizeof(typename Traits::Smem), static_cast<ptx::stream_t>(call.stream), dim3(1, 1, 1),
                 "scale_backward", call.begins_early()},
                kernels::scale_backward<Traits>, p);
  };
  if (call.type == DType::float32)
    launch(float{});
  else
    dispatch_half(call.type, launch);
}

}  // namespace lotr::cuda
