// The products of layer.h on CUDA tensors: the base product by the library, the others by the
// launchers of cuda/. All run on the current stream of the operands' device. Nothing
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

  // The device of `like` is current as long as this object exists.
  CudaProducts(const Check& check, const Arg& like, double p = 0.0, const Arg& seed = Arg("seed"))
      : op_(check.op), like_(like), guard_(like.device_index) {
    const DType type = cuda_dtype(op_, like.name, like.dtype);
    const Device& device = device_of(op_, like.device_index);
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(
        TorchCuda::functions().current_stream(like.device_index, &stream));
    call_ = {type, device.card, stream, device.early};
    if (p == 0.0) return;
    dropout_.seed = static_cast<const int64_t*>(read_data(seed));
    dropout_.threshold = uint32_t(p * 0x1p32);
    dropout_.scale = float(1.0 / (1.0 - p));
  }
  static Strategy strategy_of(const Check& check, int64_t strategy_code) {
    const auto strategy = Strategy(strategy_code);
    if (strategy == Strategy::two_pass || strategy == Strategy::beta) return strategy;
    if (strategy == Strategy::fused && has_fused) return strategy;
    fail(check.op, ": strategy: expected 0 (two_pass) or 1 (beta)",
         has_fused ? " or 2 (fused)" : " in a build without sm_90a", ", got ", strategy_code);
  }

  Matrix matrix(const TensorView& v) const {
    return {v.data, v.row_stride, v.col_stride,
            cuda::access_of(v.data, v.row_stride, v.col_stride, v.rows, v.dtype, call_.type)};
  }
  static FloatSum float_sum(const Sum& sum) {
    return {static_cast<float*>(sum.view.data), sum.view.row_stride, sum.view.col_stride, sum.add};
  }
  // A new matrix, to be written: contiguous, except that rows start at multiples of `pad` elements.
  TensorView make(OptionalTensor& owner, int64_t rows, int64_t cols, ScalarType dtype,
                  int64_t pad = 1) const {
    owner = empty<2>(like_, {rows, cols}, dtype_info(dtype).code, pad);
    return {owner->mutable_data_ptr(), rows, cols, owner->stride(0), 1, kernel_dtype(dtype)};
  }
  // Rows start at multiples of 16 bytes, so kernels copy 16 bytes at a time whatever the rank is.
  TensorView make_padded(OptionalTensor& owner, int64_t rows, int64_t cols,
                         ScalarType dtype) const {
    return make(owner, rows, cols, dtype, 16 / dtype_info(dtype).bytes);
  }
  // Runs an operator of cuda/launch.h.
  template <class Problem>
  void run(const Problem& problem) const {
    OptionalTensor memory;  // freed in stream order
    if (const size_t bytes = cuda::workspace(call_, problem))
      memory = empty<1>(like_, {int64_t(bytes)}, aoti_torch_dtype_uint8());
    cuda::run(call_, problem, memory ? memory->mutable_data_ptr() : nullptr);
  }

  // A sum in float32. A new one is cast to its dtype after all launches are queued.
  Sum sum(const Arg& given, OptionalTensor& owner, int64_t rows, int64_t cols, ScalarType) const {
    if (given) return {write_view(given), /*add=*/true};
    return {make(owner, rows, cols, ScalarType::Float), /*add=*/false};
  }

  // Adds x weight to `out`, which starts from its bias if it is fresh.
  void base(Output& out, const Arg& x, const Tensor& weight) const {
    const TorchCuda& torch = TorchCuda::functions();
    const Tensor left = matrix_view(x);
    const AtenTensorHandle y = out.matrix.get();
    AtenTensorHandle start = y;
    if (out.fresh) start = out.bias ? out.bias->handle : nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(
        start ? torch.addmm_out(y, start, left.get(), weight.get(), 1.0, 1.0)
              : torch.mm_out(y, left.get(), weight.get()));
    out.fresh = false;
  }
#ifdef LOTR_SM90A
  // y = x W^T + bias + u F^T in one launch, or backward dx = g W + du A^T. Returns whether the
  // kernel ran; it refuses some dtypes, ranks and layouts.
  bool fused(Output& y, const Arg& x, const Arg& weight, const TensorView& u, const TensorView& F,
             Direction direction) const {
    OptionalTensor u_copy;
    OptionalTensor F_copy;
    cuda::GemmLotr problem{};
    problem.backward = direction == Direction::backward;
    problem.x = matrix(read_view(x));
    problem.W = matrix(read_view(weight));
    problem.u = in_rows(u, u_copy);
    problem.F = in_rows(F, F_copy);
    problem.y = matrix(y.view);
    if (y.bias) set_bias(problem, *y.bias);
    problem.M = y.view.rows;
    problem.N = y.view.cols;
    problem.K = x.matrix.cols;
    problem.r = int32_t(u.cols);
    if (!cuda::gemm_lotr_refusal(call_, problem).empty()) return false;
    cuda::gemm_lotr(call_, problem);
    y.fresh = false;
    return true;
  }
#else
  template <class... Any>
  static bool fused(const Any&...) {
    return false;  // strategy_of has refused it
  }
#endif

  TensorView shrink(OptionalTensor& owner, const TensorView& x, const Arg& A, Mask mask) const {
    const TensorView u = make_padded(owner, x.rows, A.size[1], like_.dtype);
    ShrinkProblem problem{};
    problem.x = matrix(x);
    problem.A = matrix(read_view(A));
    problem.u = matrix(u);
    problem.M = x.rows;
    problem.K = x.cols;
    problem.r = int32_t(u.cols);
    problem.scale = 1.f;
    problem.dropout = dropout(mask);
    run(problem);
    return u;
  }
  TensorView fold(OptionalTensor& owner, const Arg& B, const Arg& core, double scaling,
                  ScalarType dtype) const {
    const TensorView factor = read_view(B);
    const TensorView G = read_view(core);
    const TensorView F = make_padded(owner, factor.rows, G.rows, dtype);
    FoldProblem problem{};
    problem.B = matrix(factor);
    problem.core = matrix(G);
    problem.F = matrix(F);
    problem.B_type = factor.dtype;
    problem.core_type = G.dtype;
    problem.F_type = F.dtype;
    problem.N = factor.rows;
    problem.r_in = int32_t(G.rows);
    problem.r_out = int32_t(G.cols);
    problem.scale = float(scaling);
    run(problem);
    return F;
  }
  // Adds drop(u F^T) to `out`, which starts from its bias if it is fresh.
  void expand(Output& out, const TensorView& u, const TensorView& F, Mask mask) const {
    ExpandProblem problem = expand_problem(out, u, F);
    problem.dropout = dropout(mask);
    if (!out.fresh)
      problem.start = problem.y;
    else if (out.bias)
      set_bias(problem, *out.bias);
    run(problem);
    out.fresh = false;
  }
  // out = from + u F^T.
  void expand_from(const Output& out, const TensorView& from, const TensorView& u,
                   const TensorView& F) const {
    ExpandProblem problem = expand_problem(out, u, F);
    problem.start = matrix(from);
    run(problem);
  }
  TensorView shrink_grad(OptionalTensor& owner, const Sum& Q, const TensorView& g, const Arg& F,
                         const Arg& u) const {
    const TensorView du = make_padded(owner, g.rows, F.size[1], like_.dtype);
    ShrinkGradProblem problem{};
    problem.g = matrix(g);
    problem.F = matrix(read_view(F));
    problem.u = matrix(read_view(u));
    problem.du = matrix(du);
    problem.Q = float_sum(Q);
    problem.M = g.rows;
    problem.N = g.cols;
    problem.r = int32_t(du.cols);
    problem.r_u = problem.r;
    run(problem);
    return du;
  }
  // sum += given, as a tensor with dense rows: the stable interface has no addition in place.
  static void add(OptionalTensor& sum, const Arg& given) {
    sum = torch::stable::subtract(*sum, *given.tensor, -1.0);
  }
  void fold_grad(const Sum& dB, const Sum& dcore, const TensorView& Q, const Arg& B,
                 const Arg& core, double scaling) const {
    const TensorView factor = read_view(B);
    const TensorView G = read_view(core);
    FoldGradProblem problem{};
    problem.Q = matrix(Q);
    problem.B = matrix(factor);
    problem.core = matrix(G);
    problem.B_type = factor.dtype;
    problem.core_type = G.dtype;
    problem.dB = float_sum(dB);
    problem.dcore = static_cast<float*>(dcore.view.data);
    problem.N = factor.rows;
    problem.r_in = int32_t(G.rows);
    problem.r_out = int32_t(G.cols);
    problem.scale = float(scaling);
    run(problem);
  }
  // D (+)= drop(x)^T v.
  void factor_grad(const Sum& D, const TensorView& x, const TensorView& v, Mask mask) const {
    FactorGradProblem problem{};
    problem.x = matrix(x);
    problem.v = matrix(v);
    problem.D = float_sum(D);
    problem.M = x.rows;
    problem.K = x.cols;
    problem.r = int32_t(v.cols);
    problem.dropout = dropout(mask);
    run(problem);
  }

  void few_tokens_forward(OptionalTensor& owner, Output& y, const ForwardArgs& args,
                          double scaling) const {
    const TensorView x = read_view(args.x);
    const TensorView G = read_view(args.core);
    FewTokensForwardProblem problem{};
    problem.y = matrix(y.view);
    problem.x = matrix(x);
    problem.A = matrix(read_view(args.A));
    problem.core = matrix(G);
    problem.B = matrix(read_view(args.B));
    problem.u = matrix(make_padded(owner, x.rows, G.rows, like_.dtype));
    problem.M = x.rows;
    problem.K = x.cols;
    problem.N = y.view.cols;
    problem.r_in = int32_t(G.rows);
    problem.r_out = int32_t(G.cols);
    problem.scale = float(scaling);
    run(problem);
  }
  void few_tokens_backward(LayerGradients& out, const BackwardArgs& args, double scaling) const {
    const TensorView g = read_view(args.g);
    const TensorView A = read_view(args.A);
    const TensorView G = read_view(args.core);
    FewTokensBackwardProblem problem{};
    problem.dx = matrix(out.dx.view);
    problem.g = matrix(g);
    if (args.x) problem.x = matrix(read_view(args.x));
    problem.u = matrix(read_view(args.u));
    problem.A = matrix(A);
    problem.core = matrix(G);
    problem.B = matrix(read_view(args.B));
    problem.dA = float_sum(out.dA);
    problem.dB = float_sum(out.dB);
    problem.dcore = static_cast<float*>(out.dcore.view.data);
    problem.M = g.rows;
    problem.K = A.rows;
    problem.N = g.cols;
    problem.r_in = int32_t(G.rows);
    problem.r_out = int32_t(G.cols);
    problem.scale = float(scaling);
    run(problem);
  }

  // ---- per-row cores: cuda_rows.cpp ----
  Tensor row_core(const RowArgs& args, const Sizes& sizes, double scaling) const;
  std::tuple<Tensor, Tensor> row_core_backward(const RowArgs& args, const Sizes& sizes,
                                               double scaling, bool need_u, bool need_cores) const;

 private:
#ifdef LOTR_SM90A
  // v in the call's type, with rows that start at multiples of 16 bytes, as tensor maps need them.
  // float32 needs no copy, because gemm_lotr refuses it.
  Matrix in_rows(const TensorView& v, OptionalTensor& copy) const {
    const bool aligned = reinterpret_cast<uintptr_t>(v.data) % 16 == 0;
    const bool fits = v.dtype == call_.type && v.col_stride == 1 && v.row_stride % 8 == 0 &&
                      v.row_stride >= v.cols && aligned;
    if (fits || call_.type == DType::float32) return matrix(v);
    const TensorView rows = make_padded(copy, v.rows, v.cols, like_.dtype);
    run(PackProblem{matrix(v), matrix(rows), v.rows, v.cols});
    return matrix(rows);
  }
#endif
  ExpandProblem expand_problem(const Output& out, const TensorView& u, const TensorView& F) const {
    ExpandProblem problem{};
    problem.y = matrix(out.view);
    problem.u = matrix(u);
    problem.F = matrix(F);
    problem.M = out.view.rows;
    problem.N = out.view.cols;
    problem.r = int32_t(u.cols);
    problem.dropout = dropout(Mask::none);
    return problem;
  }
  template <class Problem>
  static void set_bias(Problem& problem, const Arg& bias) {
    problem.bias = read_data(bias);
    problem.bias_stride = bias.stride[0];
  }
  Dropout dropout(Mask mask) const {
    return mask == Mask::dropout ? dropout_ : Dropout{nullptr, 0, 1.f};
  }

  const char* op_;
  const Arg& like_;
  torch::stable::accelerator::DeviceGuard guard_;
  cuda::Call call_{};
  Dropout dropout_{nullptr, 0, 1.f};
};

}  // namespace lotr
