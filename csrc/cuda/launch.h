// The CUDA operators without torch: raw pointers, a stream and a workspace.
// csrc/torch/products_cuda.h calls them with tensors, csrc/simt/module with numpy arrays.  They
// check nothing but ranks, allocate nothing and never synchronise; a launch that fails throws
// std::runtime_error naming the kernel.
#pragma once
#include <cstddef>

#include "plan.h"
#include "problem.h"

namespace lotr::cuda {

using plan::Card;

constexpr int MAX_RANK = 256;

struct Call {
  DType type;    // of the large matrix
  Card card;     // decides how the work is split
  void* stream;  // cudaStream_t
  bool early;    // kernels may be launched early: waits_in_kernels() and early_launches()
};

// Whether the current device runs code of compute capability 9.0 or later, whose kernels call
// griddepcontrol_wait and may be launched early (ptx/launch.cuh).  Code for an older capability,
// which the driver translates for a newer card, does not.
bool waits_in_kernels();

// Elements of 16 bytes.  A matrix whose rows start at a multiple of it, in aligned memory, is read
// 16 bytes at a time; give u, k, h and F such rows whatever their rank is.
constexpr int64_t row_elements(DType type) {
  return 16 / element_size(type);
}

// The workspace of a call, taken piece by piece.  Without memory (null) it only counts: then the
// operators run through without a launch, so that what is counted is what will be taken.
class Workspace {
 public:
  explicit Workspace(void* memory) : start_(static_cast<char*>(memory)), counts_(!memory) {}
  bool counts() const { return counts_; }
  size_t most() const { return most_; }  // bytes

  // 256-byte aligned, as the whole is.
  template <class T>
  T* take(int64_t count) {
    T* const taken = reinterpret_cast<T*>(start_ + used_);
    used_ += (size_t(count) * sizeof(T) + 255) / 256 * 256;
    most_ = std::max(most_, used_);
    return taken;
  }

  // What is taken during its lifetime is free afterwards, for launches that follow in the stream.
  class Scope {
   public:
    explicit Scope(Workspace& of) : of_(of), used_(of.used_) {}
    ~Scope() { of_.used_ = used_; }
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    Workspace& of_;
    size_t used_;
  };

 private:
  char* start_;
  bool counts_;
  size_t used_ = 0, most_ = 0;
};

// An operator is one function for both: how many bytes it takes, and its launches.
//
//   workspace(call, problem)             bytes on the device, 256-byte aligned
//   run(call, problem, workspace)        the workspace's contents do not matter; it may be freed,
//   in stream
//                                        order, when run returns
//
// An input that cannot be read 16 bytes at a time (float32 factors beside half activations, strides
// that are no multiple of 16 bytes, a transposed g) is first cast or packed into the workspace,
// with one more launch per call.  Outputs may have any strides; rows at multiples of 16 bytes are
// faster.
//
// shrink writes u (and h), shrink_grad writes k; Q is written, not added to, where accumulate is 0,
// so it needs no zeros.  expand_add adds to y unless it is fresh, factor_grad to D unless its
// accumulate is 0, and fold_grad adds to dB and writes dcore.  Where M is 0, a Q or D that is
// written must be contiguous.
void run(const Call& call, const ShrinkProblem& p, Workspace& memory);
void run(const Call& call, const ExpandProblem& p, Workspace& memory);
void run(const Call& call, const FactorGradProblem& p, Workspace& memory);
void run(const Call& call, const ShrinkGradProblem& p, Workspace& memory);

// These take the types of their operands in the problem, any strides, and do not use call.type.
void run(const Call& call, const FoldProblem& p, Workspace& memory);
void run(const Call& call, const FoldGradProblem& p, Workspace& memory);

// A core a row.  There must be fewer than 2^31 rows, tokens and cores.
void run(const Call& call, const RowCoreProblem& p, Workspace& memory);
void run(const Call& call, const RowEndsProblem& p, Workspace& memory);
void run(const Call& call, const RowCoreGradProblem& p, Workspace& memory);
void run(const Call& call, const SumRowsProblem& p, Workspace& memory);

// The unfolded form, for few tokens, made of the operators above.
void run(const Call& call, const SmallForwardProblem& p, Workspace& memory);
void run(const Call& call, const SmallBackwardProblem& p, Workspace& memory);

// A copy of a matrix in the call's type, for a product of the library.
void run(const Call& call, const PackProblem& p, Workspace& memory);

template <class Problem>
size_t workspace(const Call& call, const Problem& problem) {
  Workspace counting(nullptr);
  run(call, problem, counting);
  return counting.most();
}
template <class Problem>
void run(const Call& call, const Problem& problem, void* memory) {
  Workspace workspace(
      memory ? memory : reinterpret_cast<void*>(uintptr_t(256)));  // null where none is taken
  run(call, problem, workspace);
}

// How a kernel of element type `type` may read a matrix stored as `stored`.
inline Access access_of(const void* data, int64_t row, int64_t col, int64_t rows, DType stored,
                        DType type) {
  if (stored != type) return Access::float32_element;
  const bool whole = rows <= 1 || row % row_elements(type) == 0;
  const bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0 && whole;
  return col == 1 && aligned ? Access::vector : Access::element;
}

}  // namespace lotr::cuda
