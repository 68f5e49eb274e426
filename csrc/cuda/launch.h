// The CUDA operators without torch: raw pointers, a stream and a workspace.  csrc/torch/cuda_operators.cpp
// calls them with tensors, python_tests/simt/executor/module.cpp with numpy arrays.  They check nothing but
// ranks, allocate nothing and never synchronise; a launch that fails throws std::runtime_error naming the
// kernel.
#pragma once
#include <cstddef>

#include "params.h"

namespace lotr::cuda {

constexpr int MAX_RANK = 256;

struct Call {
  DType type;           // of the large matrix
  Float32 float32;      // how float32 is multiplied
  int multiprocessors;  // of the device: decides how the work is split
  void* stream;         // cudaStream_t
};

// Each operator takes the problem (the plan's fields are its own business) and a workspace of at least
// *_workspace bytes on the device, 16-byte aligned, whose contents do not matter.
size_t shrink_workspace(const Call& call, const ShrinkParams& p);
void shrink(const Call& call, const ShrinkParams& p, void* workspace);

void expand_add(const Call& call, const ExpandParams& p);

size_t factor_grad_workspace(const Call& call, const FactorGradParams& p);
void factor_grad(const Call& call, const FactorGradParams& p, void* workspace);

size_t shrink_grad_workspace(const Call& call, const ShrinkGradParams& p);
void shrink_grad(const Call& call, const ShrinkGradParams& p, void* workspace);

// These two take the types of their operands in p, and use neither call.type nor call.float32.
void fold(const Call& call, const FoldParams& p);

size_t fold_grad_workspace(const Call& call, const FoldGradParams& p);
void fold_grad(const Call& call, const FoldGradParams& p, void* workspace);

// The unfolded form, for few tokens, made of the operators above.
size_t small_forward_workspace(const Call& call, const SmallForwardParams& p);
void small_forward(const Call& call, const SmallForwardParams& p, void* workspace);

size_t small_backward_workspace(const Call& call, const SmallBackwardParams& p);
void small_backward(const Call& call, const SmallBackwardParams& p, void* workspace);

// How a kernel of element type `type` may read a matrix stored as `stored`.
inline Access access_of(const void* data, int64_t row, int64_t col, int64_t rows, DType stored, DType type) {
  if (stored != type) return Access::float32_element;
  const int64_t size = type == DType::float32 ? 4 : 2;
  const bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0 && (rows <= 1 || row * size % 16 == 0);
  return col == 1 && aligned ? Access::vector : Access::element;
}

}  // namespace lotr::cuda
