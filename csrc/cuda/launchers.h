// The kernels of one element type, as host functions.  Each .cu file beside this compiles them for one type.
#pragma once
#include <stdexcept>
#include <string>

#include "launch.h"
#include "params.h"
#include "tile/mma.cuh"

namespace lotr::cuda {

// Largest rank of one launch.  More is done in pieces of the rank, which reads the large matrix once for each
// piece.
constexpr int max_rank(DType type) {
  return type == DType::float32 ? 128 : 256;
}
// Above this, k and Q are cheaper from two reads of g: their partial sums would outweigh one.
constexpr int SHRINK_GRAD_MAX_RANK = 64;

constexpr size_t ALIGN = 256;
constexpr size_t aligned(size_t bytes) {
  return (bytes + ALIGN - 1) / ALIGN * ALIGN;
}

// These take matrices that can be read 16 bytes at a time, and ranks of one launch.
template <class P>
struct Launchers {
  static void shrink(const Call& call, const ShrinkProblem& problem, const plan::Plan& plan, void* workspace);
  static void expand_add(const Call& call, const ExpandProblem& problem, const plan::Plan& plan);
  static void factor_grad(const Call& call, const FactorGradProblem& problem, const plan::Plan& plan,
                          void* workspace);
  static void shrink_grad(const Call& call, const ShrinkGradProblem& problem, const plan::Plan& plan,
                          void* workspace);
  static void pack(const Call& call, const PackParams& p);
};

// Where the counters and the partial sums of a launch lie.  The counters are those of counters.h; where it
// has no more, the first bytes of the workspace, cleared.
class Workspace {
 public:
  Workspace(const Call& call, void* memory, int64_t tiles);
  // The next `tiles` counters and `floats` partial sums.
  Reduction take(int64_t tiles, int64_t floats);
  static size_t bytes(int64_t tiles, int64_t floats) {
    return aligned(size_t(tiles) * sizeof(int32_t)) + aligned(size_t(floats) * sizeof(float));
  }

 private:
  int32_t* counters_;
  char* floats_;
};

// Bytes of the workspace of `tiles` tiles of so many floats, each summed over `splits` blocks.
inline size_t reduction_bytes(int64_t tiles, int64_t splits, int64_t floats) {
  return splits > 1 ? Workspace::bytes(tiles, tiles * splits * floats) : 0;
}

// Throws std::invalid_argument unless r is from 1 to MAX_RANK.
inline void check_rank(const char* kernel, const char* name, int64_t r) {
  if (r < 1 || r > MAX_RANK)
    throw std::invalid_argument(std::string(kernel) + ": " + name + ": expected a rank from 1 to " +
                                std::to_string(MAX_RANK) + ", got " + std::to_string(r));
}

}  // namespace lotr::cuda
