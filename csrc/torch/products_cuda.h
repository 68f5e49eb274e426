// The products of a layer on CUDA tensors (layer.h): the base product by the library, the others by
// the launchers of cuda/. All run on the current stream of the operands' device. Nothing
// synchronizes, and all memory comes from torch's allocator on that stream, so a CUDA graph may
// capture a call.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <string>
#include <tuple>

#include "cuda/sm90/gemm_lotr.h"
#include "cuda_device.h"
#include "layer.h"

namespace lotr {

class CudaProducts {
 public:
  // The launches for few tokens add to y and dx, so the base product comes first.
  static constexpr bool few_tokens_first = false;
  static constexpr int64_t max_rank = cuda::MAX_RANK;
#ifdef LOTR_SM90A
  static constexpr bool has_fused = true;
#else
  static constexpr bool has_fused = false;
#endif

  // like's device is current during the lifetime.
  CudaProducts(const Check& c, const Arg& like, double p = 0.0, const Arg& seed = Arg("seed"))
      : op_(c.op), like_(like), guard_(like.device_index) {
    const DType type = cuda_dtype(op_, like.name, like.dtype);
    const Device& device = device_of(op_, like.device_index);
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(
        TorchCuda::functions().current_stream(like.device_index, &stream));
    call_ = {type, device.card, stream, device.early};
    if (p == 0.0) return;
    dropout_.seed = static_cast<const int64_t*>(read_data(seed));
    dropout_.threshold = uint32_t(p * 4294967296.0);
    dropout_.scale = float(1.0 / (1.0 - p));
  }
  static Strategy strategy_of(const Check& c, int64_t strategy) {
    const auto order = Strategy(strategy);
    if (order == Strategy::two_pass || order == Strategy::beta) return order;
    if (order == Strategy::fused && has_fused) return order;
    fail(c.op, ": strategy: expected 0 (two_pass) or 1 (beta)",
         has_fused ? " or 2 (fused)" : " in a build without sm_90a", ", got ", strategy);
  }

  Matrix matrix(const TensorView& v) const {
    return {v.data, v.row_stride, v.col_stride,
            cuda::access_of(v.data, v.row_stride, v.col_stride, v.rows, v.dtype, call_.type)};
  }
  static FloatSum float_sum(const Sum& sum) {
    return {static_cast<float*>(sum.view.data), sum.view.row_stride, sum.view.col_stride, sum.add};
  }
  // A new matrix, not initialized. padded: its rows start at multiples of 16 bytes, so that kernels
  // copy 16 bytes at a time whatever the rank is.
  TensorView make(OptionalTensor& owner, int64_t rows, int64_t cols, ScalarType dtype,
                  bool padded) const {
    const DtypeInfo info = dtype_info(dtype);
    owner = empty<2>(like_, {rows, cols}, info.code, padded ? 16 / info.bytes : 1);
    return {owner->mutable_data_ptr(), rows, cols, owner->stride(0), 1, kernel_dtype(dtype)};
  }
  // Runs an operator of cuda/launch.h.
  template <class Problem>
  void run(const Problem& problem) const {
    OptionalTensor memory;  // freed in stream order
    if (const size_t bytes = cuda::workspace(call_, problem))
      memory = empty<1>(like_, {int64_t(bytes)}, aoti_torch_dtype_uint8());
    cuda::run(call_, problem, memory ? memory->mutable_data_ptr() : nullptr);
  }

  // y or dx, new, with like's leading dimensions.
  Output output(const Arg& like, int64_t cols) const {
    OptionalTensor owner;
    const TensorView view = make(owner, like.matrix.rows, cols, like_.dtype, false);
    return {with_leading(*owner, like, cols), *owner, view, true};
  }
  Output onto(const Arg& given) const {
    return {*given.tensor, matrix_view(given), written(given)};
  }
  // A sum in float32. A new one is cast to its dtype after all launches are queued.
  Sum sum(const Arg& given, OptionalTensor& owner, int64_t rows, int64_t cols, ScalarType) const {
    if (given) return {written(given), true};
    return {make(owner, rows, cols, ScalarType::Float, false), false};
  }

  // Adds x weight to `out`, which starts from its bias if it is fresh.
  void base(Output& out, const Arg& x, const Tensor& weight) const {
    const TorchCuda& torch = TorchCuda::functions();
    const Tensor a = matrix_view(x);
    const AtenTensorHandle y = out.matrix.get();
    AtenTensorHandle start = y;
    if (out.fresh) start = out.bias ? out.bias->handle : nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(start ? torch.addmm_out(y, start, a.get(), weight.get(), 1.0, 1.0)
                                        : torch.mm_out(y, a.get(), weight.get()));
    out.fresh = false;
  }
#ifdef LOTR_SM90A
  // y = x W^T + bias + u F^T in one launch; backward: dx = g W + du A^T. Returns whether the kernel
  // ran; it refuses some dtypes, ranks and layouts.
  bool fused(Output& y, const Arg& x, const Arg& weight, const TensorView& u, const TensorView& F,
             bool backward) const {
    OptionalTensor u_copy;
    OptionalTensor F_copy;
    cuda::GemmLotr q{};
    q.backward = backward;
    q.x = matrix(read(x));
    q.W = matrix(read(weight));
    q.u = in_rows(u, u_copy);
    q.F = in_rows(F, F_copy);
    q.y = matrix(y.view);
    if (y.bias) {
      const TensorView bias = read(*y.bias);
      q.bias = bias.data;
      q.bias_stride = bias.col_stride;
    }
    q.M = y.view.rows;
    q.N = y.view.cols;
    q.K = x.matrix.cols;
    q.r = int32_t(u.cols);
    if (!cuda::gemm_lotr_refusal(call_, q).empty()) return false;
    cuda::gemm_lotr(call_, q);
    y.fresh = false;
    return true;
  }
#else
  template <class... Any>
  static bool fused(const Any&...) {
    return false;  // strategy_of has refused it
  }
#endif

  TensorView shrink(OptionalTensor& owner, const TensorView& x, const Arg& A, bool dropped) const {
    const TensorView u = make(owner, x.rows, A.size[1], like_.dtype, true);
    ShrinkProblem q{};
    q.x = matrix(x);
    q.A = matrix(read(A));
    q.u = matrix(u);
    q.M = x.rows;
    q.K = x.cols;
    q.r = int32_t(u.cols);
    q.scale = 1.f;
    q.dropout = mask(dropped);
    run(q);
    return u;
  }
  TensorView fold(OptionalTensor& owner, const Arg& B, const Arg& core, double scaling,
                  ScalarType dtype) const {
    const TensorView factor = read(B);
    const TensorView G = read(core);
    const TensorView F = make(owner, factor.rows, G.rows, dtype, true);
    FoldProblem q{};
    q.B = matrix(factor);
    q.core = matrix(G);
    q.F = matrix(F);
    q.B_type = factor.dtype;
    q.core_type = G.dtype;
    q.F_type = F.dtype;
    q.N = factor.rows;
    q.r_in = int32_t(G.rows);
    q.r_out = int32_t(G.cols);
    q.scale = float(scaling);
    run(q);
    return F;
  }
  // Adds drop(u F^T) to `out`, which starts from its bias if it is fresh.
  void expand(Output& out, const TensorView& u, const TensorView& F, bool dropped) const {
    ExpandProblem q = expand_problem(out, u, F);
    q.dropout = mask(dropped);
    if (!out.fresh) {
      q.start = q.y;
    } else if (out.bias) {
      const TensorView bias = read(*out.bias);
      q.bias = bias.data;
      q.bias_stride = bias.col_stride;
    }
    run(q);
    out.fresh = false;
  }
  // out = from + u F^T.
  void expand_from(const Output& out, const TensorView& from, const TensorView& u,
                   const TensorView& F) const {
    ExpandProblem q = expand_problem(out, u, F);
    q.start = matrix(from);
    run(q);
  }
  TensorView shrink_grad(OptionalTensor& owner, const Sum& Q, const TensorView& g, const Arg& F,
                         const Arg& u) const {
    const TensorView du = make(owner, g.rows, F.size[1], like_.dtype, true);
    ShrinkGradProblem q{};
    q.g = matrix(g);
    q.F = matrix(read(F));
    q.u = matrix(read(u));
    q.k = matrix(du);
    q.Q = float_sum(Q);
    q.M = g.rows;
    q.N = g.cols;
    q.r = int32_t(du.cols);
    q.r_u = q.r;
    run(q);
    return du;
  }
  // sum += given, as a tensor with dense rows: the stable interface has no addition in place.
  static void add(OptionalTensor& sum, const Arg& given) {
    sum = torch::stable::subtract(*sum, *given.tensor, -1.0);
  }
  void fold_grad(const Sum& dB, const Sum& dcore, const TensorView& Q, const Arg& B,
                 const Arg& core, double scaling) const {
    const TensorView factor = read(B);
    const TensorView G = read(core);
    FoldGradProblem q{};
    q.Q = matrix(Q);
    q.B = matrix(factor);
    q.core = matrix(G);
    q.B_type = factor.dtype;
    q.core_type = G.dtype;
    q.dB = float_sum(dB);
    q.dcore = static_cast<float*>(dcore.view.data);
    q.N = factor.rows;
    q.r_in = int32_t(G.rows);
    q.r_out = int32_t(G.cols);
    q.scale = float(scaling);
    run(q);
  }
  // D (+)= drop(x)^T v.
  void outer(const Sum& D, const TensorView& x, const TensorView& v, bool dropped) const {
    FactorGradProblem q{};
    q.x = matrix(x);
    q.v = matrix(v);
    q.D = float_sum(D);
    q.M = x.rows;
    q.K = x.cols;
    q.r = int32_t(v.cols);
    q.dropout = mask(dropped);
    run(q);
  }

  void small_forward(OptionalTensor& owner, Output& y, const ForwardArgs& a, double scaling) const {
    const TensorView x = read(a.x);
    const TensorView G = read(a.core);
    SmallForwardProblem q{};
    q.y = matrix(y.view);
    q.x = matrix(x);
    q.A = matrix(read(a.A));
    q.core = matrix(G);
    q.B = matrix(read(a.B));
    q.u = matrix(make(owner, x.rows, G.rows, like_.dtype, true));
    q.M = x.rows;
    q.K = x.cols;
    q.N = y.view.cols;
    q.r_in = int32_t(G.rows);
    q.r_out = int32_t(G.cols);
    q.scale = float(scaling);
    run(q);
  }
  void small_backward(LayerGradients& out, const BackwardArgs& a, double scaling) const {
    const TensorView g = read(a.g);
    const TensorView A = read(a.A);
    const TensorView G = read(a.core);
    SmallBackwardProblem q{};
    q.dx = matrix(out.dx.view);
    q.g = matrix(g);
    if (a.x) q.x = matrix(read(a.x));
    q.u = matrix(read(a.u));
    q.A = matrix(A);
    q.core = matrix(G);
    q.B = matrix(read(a.B));
    q.dA = float_sum(out.dA);
    q.dB = float_sum(out.dB);
    q.dcore = static_cast<float*>(out.dcore.view.data);
    q.M = g.rows;
    q.K = A.rows;
    q.N = g.cols;
    q.r_in = int32_t(G.rows);
    q.r_out = int32_t(G.cols);
    q.scale = float(scaling);
    run(q);
  }

  // ---- per-row cores: cuda_rows.cpp ----
  Tensor row_core(const RowArgs& a, const Sizes& s, double scaling) const;
  std::tuple<Tensor, Tensor> row_core_backward(const RowArgs& a, const Sizes& s, double scaling,
                                               bool need_u, bool need_cores) const;

 private:
#ifdef LOTR_SM90A
  // v in the call's type, with rows that start at multiples of 16 bytes, as tensor maps need them.
  Matrix in_rows(const TensorView& v, OptionalTensor& copy) const {
    const bool aligned = reinterpret_cast<uintptr_t>(v.data) % 16 == 0;
    const bool fits = v.dtype == call_.type && v.col_stride == 1 && v.row_stride % 8 == 0 &&
                      v.row_stride >= v.cols && aligned;
    if (fits || call_.type == DType::float32) return matrix(v);
    const TensorView rows = make(copy, v.rows, v.cols, like_.dtype, true);
    run(PackProblem{matrix(v), matrix(rows), v.rows, v.cols});
    return matrix(rows);
  }
#endif
  ExpandProblem expand_problem(const Output& out, const TensorView& u, const TensorView& F) const {
    ExpandProblem q{};
    q.y = matrix(out.view);
    q.u = matrix(u);
    q.F = matrix(F);
    q.M = out.view.rows;
    q.N = out.view.cols;
    q.r = int32_t(u.cols);
    q.dropout = mask(false);
    return q;
  }
  Dropout mask(bool dropped) const { return dropped ? dropout_ : Dropout{nullptr, 0, 1.f}; }

  const char* op_;
  const Arg& like_;
  torch::stable::accelerator::DeviceGuard guard_;
  cuda::Call call_{};
  Dropout dropout_{nullptr, 0, 1.f};
};

}  // namespace lotr
