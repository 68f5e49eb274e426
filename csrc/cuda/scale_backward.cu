// csrc/cuda/launch.h: the gradients of a scale of y's columns, in one launch.
#include <algorithm>

#include "dispatch.h"
#include "kernels/scale_backward.cuh"
#include "launchers.h"
#include "ptx/stream.cuh"

namespace lotr::cuda {
namespace {

struct Grid {
  int64_t n_tiles, m_tiles, splits;
};

// Tokens are split until there are four blocks a multiprocessor, but not below 256 tokens a block, whose rows
// then take several times as long as its sums.
Grid grid_of(const Call& call, const ScaleBackwardProblem& p) {
  const size_t element = call.type == DType::float32 ? 4 : 2;
  const int64_t n_tiles = plan::ceil_div(p.N, kernels::scale_backward_cols(element)),
                m_tiles = plan::ceil_div(p.M, kernels::SCALE_BACKWARD_ROWS);
  const int64_t wanted = plan::ceil_div(4 * int64_t(call.card.multiprocessors), n_tiles),
                sensible = std::max<int64_t>(1, m_tiles * kernels::SCALE_BACKWARD_ROWS / 256);
  return {n_tiles, m_tiles, std::min(wanted, sensible)};
}

}  // namespace

// Its plan takes a few divisions, so nothing is remembered.
Prepared prepare(const Call& call, const ScaleBackwardProblem& p) {
  if (p.M == 0) return {};
  const Grid grid = grid_of(call, p);
  const size_t element = call.type == DType::float32 ? 4 : 2;
  Prepared made;
  if (grid.splits > 1)
    made.workspace =
        Workspace::bytes(grid.n_tiles, grid.n_tiles * grid.splits * kernels::scale_backward_cols(element));
  return made;
}

void run(const Call& call, const ScaleBackwardProblem& problem, const Prepared&, void* workspace) {
  if (problem.M == 0) return ptx::clear(problem.dscale, size_t(problem.N) * sizeof(float), call.stream);
  const Grid grid = grid_of(call, problem);
  auto p = params_of<ScaleBackwardParams>(problem);
  p.m_pieces = plan::pieces(grid.m_tiles, grid.splits);
  p.splits = int(grid.splits);
  if (p.splits > 1) p.sum = Workspace(call, workspace, grid.n_tiles).take(grid.n_tiles, 0);
  const auto launch = [&](auto element) {
    using Traits = kernels::ScaleBackwardTraits<decltype(element)>;
    ptx::launch({dim3(unsigned(grid.n_tiles), unsigned(grid.splits)), dim3(Traits::THREADS),
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
