// The kernels of one element type, as host functions.  Each .cu file beside this compiles them for one type.
#pragma once
#include "launch.h"
#include "tile/mma.cuh"

namespace lotr::cuda {

// Largest rank of one launch.  More is done in pieces of the rank, which reads the large matrix once for each
// piece.
constexpr int max_rank(DType type) {
  return type == DType::float32 ? 128 : 256;
}
// Above this, k and Q are cheaper from two reads of g: their partial sums would outweigh one.
constexpr int SHRINK_GRAD_MAX_RANK = 64;

// Of the workspace: the counters of arrival come first, rounded up to CLEAR bytes, then the partial sums.
constexpr size_t ALIGN = 256;
constexpr size_t aligned(size_t bytes) {
  return (bytes + ALIGN - 1) / ALIGN * ALIGN;
}

template <class P>
struct Launchers {
  static void shrink(const Call& call, ShrinkParams p, void* workspace);
  static void expand_add(const Call& call, ExpandParams p);
  static void factor_grad(const Call& call, FactorGradParams p, void* workspace);
  static void shrink_grad(const Call& call, ShrinkGradParams p, void* workspace);
};

void clear(void* data, size_t bytes, void* stream);

}  // namespace lotr::cuda
