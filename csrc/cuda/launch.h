// The CUDA operators without torch: raw pointers, a stream and a workspace.
// csrc/torch/products_cuda.h calls them with tensors, csrc/simt/module with numpy arrays. They
// check only ranks, do not allocate and never synchronize. A launch that fails throws
// std::runtime_error with the kernel's name.
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

// Whether the current device runs code of compute capability 9.0 or later. Its kernels call
// griddepcontrol_wait and may be launched early (ptx/launch.cuh). Code for an older capability,
// which the driver translates for a newer card, does not call it.
bool waits_in_kernels();

// Elements of 16 bytes. A matrix with rows at multiples of it, in aligned memory, is read 16 bytes
// at a time. Give u, du, h and F such rows, whatever their rank is.
constexpr int64_t row_elements(DType type) {
  return 16 / element_size(type);
}

// The workspace of a call, taken piece by piece. Without memory (null) it only counts: the
// operators then run without a launch, so the bytes that are counted are the bytes that will be
// taken.
class Workspace {
 public:
  explicit Workspace(void* memory) : start_(static_cast<char*>(memory)), counts_(!memory) {}
  bool counts() const { return counts_; }
  size_t most() const { return most_; }  // bytes, to the end of the last piece

  // Aligned to 256 bytes, as the workspace is.
  template <class T>
  T* take(int64_t count) {
    T* const taken = reinterpret_cast<T*>(start_ + used_);
    const size_t end = used_ + size_t(count) * sizeof(T);
    most_ = std::max(most_, end);
    used_ = (end + 255) / 256 * 256;
    return taken;
  }

  // Releases at its end what was taken during its lifetime, for launches that follow in the stream.
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

// An operator is one function that counts the workspace, and that launches:
//
//   workspace(call, problem)         bytes on the device, aligned to 256 bytes
//   run(call, problem, workspace)    The workspace may hold anything. It may be freed, in stream
//                                    order, when run returns.
//
// An input that cannot be read 16 bytes at a time (float32 factors with half activations, strides
// that are not multiples of 16 bytes, a transposed g) is first cast or packed into the workspace,
// with one more launch. Outputs may have any strides; rows at multiples of 16 bytes are faster.
//
// A FloatSum that is written, not added to, needs no zeros. It must be contiguous if M is 0.
void run(const Call& call, const ShrinkProblem& p, Workspace& memory);
void run(const Call& call, const ExpandProblem& p, Workspace& memory);
void run(const Call& call, const FactorGradProblem& p, Workspace& memory);
void run(const Call& call, const ShrinkGradProblem& p, Workspace& memory);

// The problem has the types of these operands, which may have any strides; call.type is not used.
void run(const Call& call, const FoldProblem& p, Workspace& memory);
void run(const Call& call, const FoldGradProblem& p, Workspace& memory);

// Per-row cores. There must be fewer than 2^31 rows, tokens and cores.
void run(const Call& call, const RowCoreProblem& p, Workspace& memory);
void run(const Call& call, const RowEndsProblem& p, Workspace& memory);
void run(const Call& call, const RowCoreGradProblem& p, Workspace& memory);
void run(const Call& call, const SumRowsProblem& p, Workspace& memory);

// The few-token form, composed of the operators above.
void run(const Call& call, const FewTokensForwardProblem& p, Workspace& memory);
void run(const Call& call, const FewTokensBackwardProblem& p, Workspace& memory);

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
  // A call without a workspace passes null, which would only count.
  Workspace workspace(memory ? memory : reinterpret_cast<void*>(uintptr_t(256)));
  run(call, problem, workspace);
}

// How a kernel of element type `type` may access a matrix stored as `stored`.
inline Access access_of(const void* data, int64_t row, int64_t col, int64_t rows, DType stored,
                        DType type) {
  if (stored != type) return Access::float32_element;
  const bool has_aligned_rows = rows <= 1 || row % row_elements(type) == 0;
  const bool is_aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0 && has_aligned_rows;
  return col == 1 && is_aligned ? Access::vector : Access::element;
}

}  // namespace lotr::cuda
