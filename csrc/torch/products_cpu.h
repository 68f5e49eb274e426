// The products of layer.h on CPU tensors: the base product by the library, the others by the
// kernels of cpu/.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <tuple>

#include "cpu/kernels.h"
#include "layer.h"

namespace lotr {

class CpuProducts {
 public:
  // Whether the adapter's product for few tokens may precede the base product.
  static constexpr bool few_tokens_first = true;
  static constexpr int64_t max_rank = 0;

  CpuProducts(const Check& check, const Arg& like, double p = 0.0, const Arg& seed = Arg("seed"))
      : op_(check.op), like_(like) {
    if (p == 0.0) return;
    drop_.on = true;
    drop_.threshold = uint32_t(p * 0x1p32);
    drop_.scale = 1.0 / (1.0 - p);
    drop_.seed = uint64_t(*static_cast<const int64_t*>(read_data(seed)));
  }
  static Strategy strategy_of(const Check& check, int64_t strategy_code) {
    const auto strategy = Strategy(strategy_code);
    if (strategy != Strategy::two_pass && strategy != Strategy::beta)
      fail(check.op, ": strategy: expected 0 (two_pass) or 1 (beta) on a CPU, got ", strategy_code);
    return strategy;
  }

  // A new contiguous matrix, to be written.
  TensorView make(OptionalTensor& owner, int64_t rows, int64_t cols, ScalarType dtype) const {
    owner = empty<2>(like_, {rows, cols}, dtype_info(dtype).code);
    return {owner->mutable_data_ptr(), rows, cols, cols, 1, kernel_dtype(dtype)};
  }
  Sum sum(const Arg& given, OptionalTensor& owner, int64_t rows, int64_t cols,
          ScalarType dtype) const {
    if (given) return {write_view(given), /*add=*/true};
    return {make(owner, rows, cols, dtype), /*add=*/false};
  }

  // Adds x weight to `out`, by the library that torch's own linear layers use. The adapter's
  // product adds the bias.
  void base(Output& out, const Arg& x, const Tensor& weight) const {
    const Tensor left = matrix_view(x);
    const AtenTensorHandle y = out.matrix.get();
    const int32_t error = out.fresh
                              ? aoti_torch_cpu_mm_out(y, left.get(), weight.get())
                              : aoti_torch_cpu_addmm_out(y, y, left.get(), weight.get(), 1.0, 1.0);
    STABLE_TORCH_ERROR_CODE_CHECK(error);
    out.fresh = false;
  }
  // A CPU has no such kernel, and strategy_of refuses the strategy.
  template <class... Any>
  static bool fused(const Any&...) {
    return false;
  }

  TensorView shrink(OptionalTensor& owner, const TensorView& x, const Arg& A, Mask mask) const {
    const TensorView u = make(owner, x.rows, A.size[1], like_.dtype);
    cpu::shrink(u, x, read_view(A), drop(mask));
    return u;
  }
  TensorView fold(OptionalTensor& owner, const Arg& B, const Arg& core, double scaling,
                  ScalarType dtype) const {
    const TensorView F = make(owner, B.size[0], core.size[0], dtype);
    cpu::fold(F, read_view(B), read_view(core), scaling);
    return F;
  }
  // Adds drop(u F^T) and the bias to `out`.
  void expand(Output& out, const TensorView& u, const TensorView& F, Mask mask) const {
    cpu::expand(out.view, u, F, drop(mask), start_of(out));
  }
  // out = from + u F^T.
  void expand_from(const Output& out, const TensorView& from, const TensorView& u,
                   const TensorView& F) const {
    cpu::expand(out.view, u, F, cpu::Drop{}, {from, /*bias=*/{}});
  }
  TensorView shrink_grad(OptionalTensor& owner, const Sum& Q, const TensorView& g, const Arg& F,
                         const Arg& u) const {
    const TensorView du = make(owner, g.rows, F.size[1], like_.dtype);
    cpu::shrink_grad(du, Q.view, g, read_view(F), read_view(u), Q.add);
    return du;
  }
  // sum += given, in the dtype of both.
  static void add(OptionalTensor& sum, const Arg& given) {
    cpu::add(write_view(Arg("du", *sum)), read_view(given));
  }
  static void fold_grad(const Sum& dB, const Sum& dcore, const TensorView& Q, const Arg& B,
                        const Arg& core, double scaling) {
    cpu::fold_grad(dB.view, dcore.view, Q, read_view(B), read_view(core), scaling, dB.add);
  }
  // D (+)= drop(x)^T v.
  void factor_grad(const Sum& D, const TensorView& x, const TensorView& v, Mask mask) const {
    cpu::factor_grad(D.view, x, v, drop(mask), D.add);
  }

  void few_tokens_forward(OptionalTensor& owner, Output& y, const ForwardArgs& args,
                          double scaling) const {
    const TensorView u = make(owner, args.x.matrix.rows, args.core.size[0], like_.dtype);
    cpu::few_tokens_forward(u, y.view, read_view(args.x), read_view(args.A), read_view(args.core),
                            read_view(args.B), scaling, start_of(y));
  }
  static void few_tokens_backward(LayerGradients& out, const BackwardArgs& args, double scaling) {
    cpu::FewTokensBackward problem;
    problem.g = read_view(args.g);
    problem.u = read_view(args.u);
    problem.A = read_view(args.A);
    problem.core = read_view(args.core);
    problem.B = read_view(args.B);
    problem.scaling = scaling;
    if (args.x) problem.x = read_view(args.x);
    problem.dx = out.dx.view;
    problem.fresh_dx = out.dx.fresh;
    out.dx.fresh = false;
    problem.dA = out.dA.view;
    problem.fresh_dA = !out.dA.add;
    problem.dB = out.dB.view;
    problem.fresh_dB = !out.dB.add;
    problem.dcore = out.dcore.view;
    cpu::few_tokens_backward(problem);
  }

  // ---- per-row cores: cpu_rows.cpp ----
  Tensor row_core(const RowArgs& args, const Sizes& sizes, double scaling) const;
  std::tuple<Tensor, Tensor> row_core_backward(const RowArgs& args, const Sizes& sizes,
                                               double scaling, bool need_u, bool need_cores) const;

 private:
  // What the adapter's product is added to, after which `out` is not fresh.
  static cpu::Start start_of(Output& out) {
    cpu::Start start;
    if (!out.fresh) start.matrix = out.view;
    if (out.bias) start.bias = read_view(*out.bias);
    out.fresh = false;
    return start;
  }
  cpu::Drop drop(Mask mask) const { return mask == Mask::dropout ? drop_ : cpu::Drop{}; }

  const char* op_;
  const Arg& like_;
  cpu::Drop drop_;
};

}  // namespace lotr
