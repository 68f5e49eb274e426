// The forward and the backward of a layer as one operator each, written once over the products that
// they consist of:
//
//   folded        u = drop(x) A,  F = s B G^T,  y = x W^T + bias + u F^T
//                 du = g F,  dx = g W + drop(du A^T),  dA += drop(x)^T du
//                 Q = g^T u,  dB += s Q G,  dG = s Q^T B
//   few tokens    u = x A,  h = s u G,  y = x W^T + bias + h B^T
//                 v = s g B,  du = v G^T,  dx = g W + du A^T,  dA += x^T du
//                 dB += s g^T (u G),  dG = u^T v
//
// CpuProducts (products_cpu.h) and CudaProducts (products_cuda.h) have these products. Those that
// make a tensor give it to `owner`, and return a view of it:
//
//   base                out += x weight, by the library
//   fused               base and expand in one launch; false if there is no kernel for it
//   shrink, fold        u = drop(x) A, and F = s B G^T
//   expand              out += drop(u F^T), with Output's bias; expand_from: out = from + u F^T
//   factor_grad         D (+)= drop(x)^T v
//   shrink_grad         du = g F and Q (+)= g^T u, from one read of g where possible
//   fold_grad           dB (+)= s Q G, and dG = s Q^T B
//   few_tokens_*        all of the few-token form but the base product
//   make, sum, add      a new matrix; a given or a new sum over tokens; sum += given
//
// Three operators per direction are folded, and differ in where they start: layer_* at x,
// layer_*_projected at u = x A, layer_*_rows at h = s u G, with B in place of F.
//
// A direction is one operator, because a base product of a few milliseconds evicts the code and
// data of Python, the dispatcher and autograd from the caches: each further operator would take
// tens of microseconds, and not the 2 us of warm caches.
//
// Strategies:
//
//   two_pass  the base product, then the adapter's product is added to it. On a CPU this pass also
//             adds the bias, at no cost. The library's bfloat16 product takes up to 7 % longer with
//             a bias than without.
//   beta      the adapter's product, then the base product accumulates onto it (its beta is 1).
//             torch's own linear accumulates onto a copy of the bias. The expand's pass over y
//             replaces that copy, and nothing runs with cold caches after the product.
//   fused     both in one launch, on Hopper GPUs. beta for operands that gemm_lotr refuses, and for
//             a backward with dropout.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <string>
#include <tuple>

#include "check.h"
#include "matrix_view.h"

namespace lotr {

// y or dx, as a tensor, as a matrix for the library, and as kernels see it.
struct Output {
  Tensor tensor;
  Tensor matrix;
  TensorView view;
  bool fresh = false;         // true: the next product is written, and later ones are added
  const Arg* bias = nullptr;  // of y, or null; the first product adds it, on a CPU the adapter's
};

// A sum over tokens. One without data (the default) is not needed.
struct Sum {
  TensorView view;
  bool add = false;  // true: an argument that is added to; false: new memory that is written
  explicit operator bool() const { return view.data; }
};

// Whether a product applies the call's dropout.
enum class Mask { none, dropout };
enum class Direction { forward, backward };

// y or dx, new, with like's leading dimensions.
template <class Products>
Output new_output(const Products& products, const Arg& like, int64_t cols) {
  OptionalTensor matrix;
  const TensorView view = products.make(matrix, like.matrix.rows, cols, like.dtype);
  return {with_leading(*matrix, like, cols), *matrix, view, /*fresh=*/true};
}
// A given y or dx, which is added to.
inline Output onto(const Arg& given) {
  return {*given.tensor, matrix_view(given), write_view(given)};
}

// What an operator returns for t: t in `dtype`, or an undefined tensor, which is None in Python.
inline Tensor as_result(const OptionalTensor& t, ScalarType dtype) {
  if (!t) return Tensor();
  return t->scalar_type() == dtype ? *t : torch::stable::to(*t, dtype);
}

// Adds the base product x weight and the adapter's product, which add() computes, to `out`.
template <class Products, class Add>
void base_and_adapter(const Products& products, Output& out, const Arg& x, const Tensor& weight,
                      bool adapter_first, Add add) {
  if (adapter_first) add();
  products.base(out, x, weight);
  if (!adapter_first) add();
}

// ---- forward ----

// y = x W^T + bias + u F^T.
template <class Products>
Tensor add_to_base(const Products& products, const Arg& x, const Arg& weight, const Arg& bias,
                   const TensorView& u, const TensorView& F, Strategy strategy) {
  Output y = new_output(products, x, F.rows);
  if (bias) y.bias = &bias;
  if (strategy == Strategy::fused && products.fused(y, x, weight, u, F, Direction::forward))
    return y.tensor;
  base_and_adapter(products, y, x, transposed_view(weight), strategy != Strategy::two_pass,
                   [&] { products.expand(y, u, F, Mask::none); });
  return y.tensor;
}

template <class Products>
std::tuple<Tensor, Tensor, Tensor> layer_forward(const Tensor& x, const Tensor& weight,
                                                 const OptionalTensor& bias, const Tensor& A,
                                                 const Tensor& B, const Tensor& core,
                                                 double scaling, int64_t strategy_code, double p,
                                                 const OptionalTensor& seed) {
  const Check check{"lotr::layer_forward", Products::max_rank};
  const Strategy strategy = Products::strategy_of(check, strategy_code);
  ForwardArgs args(x, weight, bias, B, core);
  args.A.set(A);
  args.seed.set(seed);
  args.check(check, scaling, p);
  const Products products(check, args.x, p, args.seed);
  OptionalTensor u;
  OptionalTensor F;
  const TensorView u_view = products.shrink(u, read_view(args.x), args.A, Mask::dropout);
  const TensorView F_view = products.fold(F, args.B, args.core, scaling, args.x.dtype);
  const Tensor y = add_to_base(products, args.x, args.weight, args.bias, u_view, F_view, strategy);
  return {y, *u, *F};
}

template <class Products>
std::tuple<Tensor, Tensor> layer_forward_few_tokens(const Tensor& x, const Tensor& weight,
                                                    const OptionalTensor& bias, const Tensor& A,
                                                    const Tensor& B, const Tensor& core,
                                                    double scaling, int64_t strategy_code) {
  const Check check{"lotr::layer_forward_few_tokens", Products::max_rank};
  const Strategy strategy = Products::strategy_of(check, strategy_code);
  ForwardArgs args(x, weight, bias, B, core);
  args.A.set(A);
  const Sizes sizes = args.check(check, scaling, 0.0);
  const Products products(check, args.x);
  OptionalTensor u;
  Output y = new_output(products, args.x, sizes[N]);
  if (args.bias) y.bias = &args.bias;
  base_and_adapter(products, y, args.x, transposed_view(args.weight),
                   Products::few_tokens_first && strategy != Strategy::two_pass,
                   [&] { products.few_tokens_forward(u, y, args, scaling); });
  return {y.tensor, *u};
}

template <class Products>
std::tuple<Tensor, Tensor> layer_forward_projected(const Tensor& x, const Tensor& weight,
                                                   const OptionalTensor& bias, const Tensor& u,
                                                   const Tensor& B, const Tensor& core,
                                                   double scaling, int64_t strategy_code) {
  const Check check{"lotr::layer_forward_projected", Products::max_rank};
  const Strategy strategy = Products::strategy_of(check, strategy_code);
  ForwardArgs args(x, weight, bias, B, core);
  args.u.set(u);
  args.check(check, scaling, 0.0);
  const Products products(check, args.x);
  OptionalTensor F;
  const TensorView F_view = products.fold(F, args.B, args.core, scaling, args.x.dtype);
  const Tensor y =
      add_to_base(products, args.x, args.weight, args.bias, read_view(args.u), F_view, strategy);
  return {y, *F};
}

template <class Products>
Tensor layer_forward_rows(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                          const Tensor& h, const Tensor& B, int64_t strategy_code) {
  const Check check{"lotr::layer_forward_rows", Products::max_rank};
  const Strategy strategy = Products::strategy_of(check, strategy_code);
  const RowsForwardArgs args{{"x", x}, {"weight", weight}, {"bias", bias}, {"h", h}, {"B", B}};
  args.check(check);
  const Products products(check, args.x);
  return add_to_base(products, args.x, args.weight, args.bias, read_view(args.h), read_view(args.B),
                     strategy);
}

// ---- backward ----

// What a layer's backward writes: dx if the weight is given, and the sums that are needed.
struct LayerGradients {
  Output dx;
  Sum dA, dB, dcore;
  OptionalTensor new_dA, new_dB, new_dcore;
  ScalarType dtype;  // of new sums: the factors' dtype if they share one, else the dtype of sums

  template <class Products>
  LayerGradients(const Products& products, const BackwardArgs& args, const Sizes& sizes,
                 bool need_B, bool need_core) {
    const bool one_dtype =
        args.B.dtype == args.core.dtype && (!args.A || args.A.dtype == args.B.dtype);
    dtype = one_dtype ? args.B.dtype : acc_dtype(args.g.dtype);
    if (args.weight) dx = args.dx ? onto(args.dx) : new_output(products, args.g, sizes[K]);
    if (args.x) dA = products.sum(args.dA, new_dA, sizes[K], sizes[R_IN], dtype);
    if (need_B) dB = products.sum(args.dB, new_dB, sizes[N], sizes[R_OUT], dtype);
    if (need_core) dcore = products.sum(Arg("dcore"), new_dcore, sizes[R_IN], sizes[R_OUT], dtype);
  }
  // dx, dA, dB, dcore: undefined if they are not needed, or were added to an argument.
  std::tuple<Tensor, Tensor, Tensor, Tensor> results(const BackwardArgs& args) const {
    return {args.dx ? Tensor() : dx.tensor, as_result(new_dA, dtype), as_result(new_dB, dtype),
            as_result(new_dcore, dtype)};
  }
};

// du = g F if F is given, and Q (+)= g^T u if Q is needed. Both together read g once if possible.
template <class Products>
TensorView du_and_Q(const Products& products, OptionalTensor& du, const Sum& Q, const Arg& g,
                    const Arg& F, const Arg& u) {
  if (F && Q) return products.shrink_grad(du, Q, read_view(g), F, u);
  if (F) return products.shrink(du, read_view(g), F, Mask::none);
  if (Q) products.factor_grad(Q, read_view(g), read_view(u), Mask::none);
  return {};
}

// du, and the gradients of B and the core from Q.
template <class Products>
TensorView folded_gradients(const Products& products, OptionalTensor& du, const LayerGradients& out,
                            const BackwardArgs& args, const Sizes& sizes, double scaling) {
  const bool need_Q = out.dB || out.dcore;
  OptionalTensor new_Q;
  Sum Q;
  if (need_Q) Q = products.sum(Arg("Q"), new_Q, sizes[N], sizes[R_IN], acc_dtype(args.g.dtype));
  const TensorView du_view = du_and_Q(products, du, Q, args.g, args.F, args.u);
  if (need_Q) products.fold_grad(out.dB, out.dcore, Q.view, args.B, args.core, scaling);
  return du_view;
}

template <class Products>
std::tuple<Tensor, Tensor, Tensor, Tensor> layer_backward(
    const Tensor& g, const OptionalTensor& weight, const OptionalTensor& x, const Tensor& u,
    const Tensor& A, const Tensor& F, const Tensor& B, const Tensor& core, double scaling,
    int64_t strategy_code, const OptionalTensor& dA, const OptionalTensor& dB, bool need_B,
    bool need_core, double p, const OptionalTensor& seed) {
  const Check check{"lotr::layer_backward_", Products::max_rank};
  const Strategy strategy = Products::strategy_of(check, strategy_code);
  BackwardArgs args(g, weight, u, B, core, dB);
  args.x.set(x);
  args.A.set(A);
  args.F.set(F);
  args.dA.set(dA);
  args.seed.set(seed);
  const Sizes sizes = args.check(check, scaling, p, need_B);
  const Products products(check, args.g, p, args.seed);
  LayerGradients out(products, args, sizes, need_B, need_core);
  OptionalTensor du;
  const TensorView du_view = folded_gradients(products, du, out, args, sizes, scaling);
  if (out.dA) products.factor_grad(out.dA, read_view(args.x), du_view, Mask::dropout);
  if (!args.weight) return out.results(args);
  const TensorView A_view = read_view(args.A);
  const bool fused =
      strategy == Strategy::fused && p == 0.0 &&
      products.fused(out.dx, args.g, args.weight, du_view, A_view, Direction::backward);
  if (!fused)
    base_and_adapter(products, out.dx, args.g, *args.weight.tensor, strategy != Strategy::two_pass,
                     [&] { products.expand(out.dx, du_view, A_view, Mask::dropout); });
  return out.results(args);
}

template <class Products>
std::tuple<Tensor, Tensor, Tensor, Tensor> layer_backward_few_tokens(
    const Tensor& g, const OptionalTensor& weight, const OptionalTensor& x, const Tensor& u,
    const Tensor& A, const Tensor& B, const Tensor& core, double scaling, int64_t strategy_code,
    const OptionalTensor& dA, const OptionalTensor& dB, bool need_B, bool need_core) {
  const Check check{"lotr::layer_backward_few_tokens_", Products::max_rank};
  const Strategy strategy = Products::strategy_of(check, strategy_code);
  BackwardArgs args(g, weight, u, B, core, dB);
  args.x.set(x);
  args.A.set(A);
  args.dA.set(dA);
  const Sizes sizes = args.check(check, scaling, 0.0, need_B);
  const Products products(check, args.g);
  LayerGradients out(products, args, sizes, need_B, need_core);
  const auto add = [&] { products.few_tokens_backward(out, args, scaling); };
  if (args.weight)
    base_and_adapter(products, out.dx, args.g, *args.weight.tensor,
                     Products::few_tokens_first && strategy != Strategy::two_pass, add);
  else
    add();
  return out.results(args);
}

template <class Products>
std::tuple<Tensor, Tensor, Tensor, Tensor> layer_backward_projected(
    const Tensor& g, const OptionalTensor& weight, const Tensor& u, const OptionalTensor& F,
    const Tensor& B, const Tensor& core, double scaling, const OptionalTensor& du,
    const OptionalTensor& dx, const OptionalTensor& dB, bool need_B, bool need_core) {
  const Check check{"lotr::layer_backward_projected_", Products::max_rank};
  BackwardArgs args(g, weight, u, B, core, dB);
  args.F.set(F);
  args.du.set(du);
  args.dx.set(dx);
  const Sizes sizes = args.check(check, scaling, 0.0, need_B);
  const Products products(check, args.g);
  LayerGradients out(products, args, sizes, need_B, need_core);
  OptionalTensor new_du;
  folded_gradients(products, new_du, out, args, sizes, scaling);
  if (args.du) products.add(new_du, args.du);
  if (args.weight) products.base(out.dx, args.g, *args.weight.tensor);
  const auto [new_dx, new_dA, new_dB, new_dcore] = out.results(args);
  return {new_dx, as_result(new_du, args.g.dtype), new_dB, new_dcore};
}

template <class Products>
std::tuple<Tensor, Tensor, Tensor> layer_backward_rows(
    const Tensor& g, const OptionalTensor& weight, const Tensor& h, const Tensor& B,
    const OptionalTensor& dx, const OptionalTensor& dB, bool need_h, bool need_B) {
  const Check check{"lotr::layer_backward_rows_", Products::max_rank};
  const RowsBackwardArgs args{{"g", g}, {"weight", weight}, {"h", h},
                              {"B", B}, {"dx", dx},         {"dB", dB}};
  const Sizes sizes = args.check(check, need_B);
  const Products products(check, args.g);
  const ScalarType sum_dtype = acc_dtype(args.g.dtype);
  OptionalTensor new_dh;
  OptionalTensor new_dB;
  Sum dB_sum;
  if (need_B) dB_sum = products.sum(args.dB, new_dB, sizes[N], sizes[R], sum_dtype);
  // dh = g B and dB = g^T h are du and Q with B for F and h for u. Without need_h, B is left out.
  du_and_Q(products, new_dh, dB_sum, args.g, need_h ? args.B : Arg("B"), args.h);
  Output dx_out;
  if (args.weight) {
    dx_out = args.dx ? onto(args.dx) : new_output(products, args.g, sizes[K]);
    products.base(dx_out, args.g, *args.weight.tensor);
  }
  return {args.dx ? Tensor() : dx_out.tensor, as_result(new_dh, args.g.dtype),
          as_result(new_dB, sum_dtype)};
}

// dx += drop(du A^T); dA += drop(x)^T du, returned if it is new.
template <class Products>
Tensor shrink_backward(const Tensor& du, const OptionalTensor& dx, const OptionalTensor& x,
                       const OptionalTensor& A, const OptionalTensor& dA, double p,
                       const OptionalTensor& seed) {
  const Check check{"lotr::shrink_backward_", Products::max_rank};
  const ShrinkBackwardArgs args{{"du", du}, {"dx", dx}, {"x", x},
                                {"A", A},   {"dA", dA}, {"seed", seed}};
  const Sizes sizes = args.check(check, p);
  const Products products(check, args.du, p, args.seed);
  const ScalarType sum_dtype = acc_dtype(args.du.dtype);
  OptionalTensor new_dA;
  const TensorView du_view = read_view(args.du);
  if (args.x) {
    const Sum dA_sum = products.sum(args.dA, new_dA, sizes[K], sizes[R], sum_dtype);
    products.factor_grad(dA_sum, read_view(args.x), du_view, Mask::dropout);
  }
  if (args.dx) {
    Output dx_out = onto(args.dx);
    products.expand(dx_out, du_view, read_view(args.A), Mask::dropout);
  }
  return as_result(new_dA, sum_dtype);
}

}  // namespace lotr
