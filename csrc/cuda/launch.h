// The CUDA operators without torch: raw pointers, a stream and a workspace. They check only ranks,
// do not allocate and never synchronize. A launch that fails throws std::runtime_error with the
// kernel's name. csrc/torch/products_cuda.h calls them with tensors, csrc/simt/module with numpy
// arrays.
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
  bool early;    // kernels may start early; requires waits_in_kernels() and early_launches()
};

// Whether the current device runs code of compute capability 9.0 or later. Its kernels call
// griddepcontrol_wait and may be launched early (ptx/launch.cuh). Code for an older capability,
// which the driver translates for a newer card, does not call it.
bool waits_in_kernels();

// The number of elements in 16 bytes. A matrix in aligned memory whose row stride is a multiple of
// it is read 16 bytes at a time. Give u, du, h and F such rows, whatever their rank is.
constexpr int64_t row_elements(DType type) {
  return 16 / element_size(type);
}

// The workspace of a call, from which an operator takes its buffers one after another.
//
// A measuring workspace has no memory: an operator then takes its buffers and launches nothing. So
// one function states the size and uses it, and the two cannot differ.
class Workspace {
 public:
  // memory: aligned to 256 bytes; null for an operator that takes nothing.
  explicit Workspace(void* memory) : start_(static_cast<char*>(memory)), is_measuring_(false) {}
  static Workspace measuring() {
    Workspace workspace(nullptr);
    workspace.is_measuring_ = true;
    return workspace;
  }
  bool is_measuring() const { return is_measuring_; }
  size_t peak_bytes() const { return peak_bytes_; }

  // Returns memory for `count` elements, aligned to 256 bytes.
  template <class T>
  T* take(int64_t count) {
    T* const buffer = reinterpret_cast<T*>(start_ + used_bytes_);
    const size_t end = used_bytes_ + size_t(count) * sizeof(T);
    peak_bytes_ = std::max(peak_bytes_, end);
    used_bytes_ = (end + 255) / 256 * 256;
    return buffer;
  }

  // Returns the buffers that were taken during its lifetime. Later launches of the stream may reuse
  // them.
  class Scope {
   public:
    explicit Scope(Workspace& workspace)
        : workspace_(workspace), used_bytes_(workspace.used_bytes_) {}
    ~Scope() { workspace_.used_bytes_ = used_bytes_; }
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    Workspace& workspace_;
    size_t used_bytes_;
  };

 private:
  char* start_;
  bool is_measuring_;
  size_t used_bytes_ = 0, peak_bytes_ = 0;
};

// ---- the operators: one function per problem, called in two ways ----
//
//   workspace(call, problem)      returns the bytes of workspace on the device
//   run(call, problem, memory)    launches. The memory is aligned to 256 bytes, may hold anything,
//                                 and may be freed, in stream order, when run returns.
//
// An input that cannot be read 16 bytes at a time (float32 factors with half activations, strides
// that are not multiples of 16 bytes, a transposed g) is first cast or packed into the workspace,
// with one more launch. Outputs may have any strides; rows at multiples of 16 bytes are faster.
//
// A FloatSum that is written, not added to, need not be zeroed. It must be contiguous if M is 0.
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
  Workspace measuring = Workspace::measuring();
  run(call, problem, measuring);
  return measuring.peak_bytes();
}
template <class Problem>
void run(const Call& call, const Problem& problem, void* memory) {
  Workspace workspace(memory);
  run(call, problem, workspace);
}

// How a kernel of element type `type` may access a matrix [rows, ..] stored as `stored`, with
// strides row and col. The row stride of a single row is never used, so it may be anything.
inline Access access_of(const void* data, int64_t row, int64_t col, int64_t rows, DType stored,
                        DType type) {
  if (stored != type) return Access::float32_element;
  const bool has_aligned_rows = rows <= 1 || row % row_elements(type) == 0;
  const bool is_aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0 && has_aligned_rows;
  return col == 1 && is_aligned ? Access::vector : Access::element;
}

}  // namespace lotr::cuda
