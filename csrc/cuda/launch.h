// The CUDA operators without torch: raw pointers, a stream and a workspace.  csrc/torch/products_cuda.h calls
// them with tensors, csrc/simt/module/module.cpp with numpy arrays.  They check nothing but
// ranks, allocate nothing and never synchronise; a launch that fails throws std::runtime_error naming the
// kernel.
#pragma once
#include <cstddef>

#include "params.h"
#include "plan/fold_grad.h"
#include "plan/scale_backward.h"
#include "prepared.h"
#include "problem.h"
#include "switches.h"

namespace lotr::cuda {

constexpr int MAX_RANK = 256;

struct Call {
  DType type;          // of the large matrix
  Float32 float32;     // how float32 is multiplied
  plan::Card card;     // decides how the work is split
  void* stream;        // cudaStream_t
  bool early;          // waits_in_kernels(): kernels may be launched early, and in clusters
  bool wgmma = false;  // runs_wgmma(): kernels may use wgmma
  Switches off{};      // what LOTR_CUDA_WITHOUT turns off
  int most_of_cluster = MOST_OF_CLUSTER;  // largest_cluster(): blocks

  bool begins_early() const { return early && !off.early; }
  bool in_clusters() const { return early && !off.cluster; }
};

// Whether the current device has compute capability 9.0, this build has code for it (sm_90a), and the
// kernels' largest cluster fits, which a MIG slice may not have room for.
bool runs_wgmma();

// Elements of 16 bytes.  A matrix whose rows start at a multiple of it, in aligned memory, is read 16 bytes
// at a time; give u, k, h and F such rows whatever their rank is.
constexpr int64_t row_elements(DType type) {
  return 16 / element_size(type);
}

// Each operator is two calls.  prepare() chooses the kernel, how the problem is cut into blocks (a plan) and
// the bytes of the workspace; it remembers the choice for the next call with the same sizes, strides, types
// and GPU (prepared.h).  run() launches what was chosen.
//
//   const auto prepared = prepare(call, problem);
//   run(call, problem, prepared, workspace);  // of prepared.workspace bytes on the device, 256-byte aligned
//
// The contents of the workspace do not matter. It may be freed, in stream order, when run() returns.
//
// An input that cannot be read 16 bytes at a time (float32 factors beside half activations, strides that are
// no multiple of 16 bytes, a transposed g) is first cast or packed into the workspace, with one more launch
// per call.  Outputs may have any strides; rows at multiples of 16 bytes are faster.
//
// expand_add and SmallForwardProblem's operator take a scale of y's columns with a bias (of_rows).
//
// shrink writes u (and h), shrink_grad writes k; Q is written, not added to, where accumulate is 0, so it
// needs no zeros.  expand_add adds to y, factor_grad to D unless its accumulate is 0, and fold_grad adds to
// dB and writes dcores.  No launch clears anything.
Prepared prepare(const Call& call, const ShrinkProblem& p);
void run(const Call& call, const ShrinkProblem& p, const Prepared& prepared, void* workspace);

Prepared prepare(const Call& call, const ExpandProblem& p);
void run(const Call& call, const ExpandProblem& p, const Prepared& prepared, void* workspace);

Prepared prepare(const Call& call, const FactorGradProblem& p);
void run(const Call& call, const FactorGradProblem& p, const Prepared& prepared, void* workspace);

Prepared prepare(const Call& call, const ShrinkGradProblem& p);
void run(const Call& call, const ShrinkGradProblem& p, const Prepared& prepared, void* workspace);

// These two take the types of their operands in the problem, any strides, and use neither call.type nor
// call.float32.  F [L, N, r_in]: F_layer and F_row are its strides, rows padded to row_elements(F_type).
Prepared prepare(const Call& call, const FoldProblem& p);
void run(const Call& call, const FoldProblem& p, const Prepared& prepared, void* workspace);

using PreparedFoldGrad = PreparedOne<plan::FoldGrad>;
PreparedFoldGrad prepare(const Call& call, const FoldGradProblem& p);
void run(const Call& call, const FoldGradProblem& p, const PreparedFoldGrad& prepared, void* workspace);

// What a scale of y's columns has as gradients.  g and y in the call's type, of any strides.
using PreparedScaleBackward = PreparedOne<plan::ScaleBackward>;
PreparedScaleBackward prepare(const Call& call, const ScaleBackwardProblem& p);
void run(const Call& call, const ScaleBackwardProblem& p, const PreparedScaleBackward& prepared,
         void* workspace);

// The unfolded form, for few tokens, made of the operators above: their choices in the order in which they
// run.
struct PreparedSmall {
  size_t workspace = 0;
  std::array<Prepared, 6> products{};
};
PreparedSmall prepare(const Call& call, const SmallForwardProblem& p);
void run(const Call& call, const SmallForwardProblem& p, const PreparedSmall& prepared, void* workspace);

PreparedSmall prepare(const Call& call, const SmallBackwardProblem& p);
void run(const Call& call, const SmallBackwardProblem& p, const PreparedSmall& prepared, void* workspace);

// A copy of a matrix in the call's type, for a product of the library.
void pack(const Call& call, const PackParams& p);

// How a kernel of element type `type` may read a matrix stored as `stored`.
inline Access access_of(const void* data, int64_t row, int64_t col, int64_t rows, DType stored, DType type) {
  if (stored != type) return Access::float32_element;
  const bool whole = rows <= 1 || row % row_elements(type) == 0;
  const bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0 && whole;
  return col == 1 && aligned ? Access::vector : Access::element;
}

}  // namespace lotr::cuda
