// A direction of a layer, written once over the products that it is made of:
//
//   CpuProducts   products_cpu.h   the library's base product, the kernels of cpu/
//   CudaProducts  products_cuda.h  the same with the launchers of cuda/
//
//   layer_forward    u = drop(x) A,  F = s B G^T;   y = x W^T + bias + u F^T
//   layer_backward_  k = g F + k',   Q = g^T u;     dx = dx' + g W + drop(k A^T),  dA += drop(x)^T
//   k,
//                                                   dB += s Q G,  dG = s Q^T B
//   unfolded, for few tokens: h = s u G,  y = x W^T + bias + h B^T;   h = s g B,  k = h G^T,
//                             dx = g W + k A^T,  dA += x^T k,  dB += s g^T (u G),  dG = u^T h
//
// A direction is one operator, because a base product of a few milliseconds evicts the code and
// data of Python, the dispatcher and autograd from the caches: each further operator costs tens of
// microseconds instead of two.
//
// BETA: the adapter's part is written first, and the base product accumulates onto it (its beta is
// 1). torch's own linear starts in this way from a copy of the bias, so the expand's pass over y
// replaces that copy, and nothing runs with cold caches after the product. TWO_PASS: the product
// first, then the adapter's part is added to it. On a CPU that pass adds the bias too, at no cost,
// where the library's bfloat16 product with a bias takes up to 7 % longer than without. FUSED: both
// in one launch, on Hopper GPUs.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <string>
#include <tuple>

#include "check.h"
#include "matrix_view.h"

namespace lotr {

using Forward =
    std::tuple<Tensor, OptionalTensor, OptionalTensor>;  // y, and u and F where they are new
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;  // dx, k, dA, dB, dcore

// y or dx: the tensor, the same as a matrix for the library and for the kernels, and y's bias.
template <class Value>
struct Output {
  Tensor tensor, matrix;
  Value value, bias;
};

// A sum over tokens: a given one, which is added to, or a new one, which is written. Without data
// it is not wanted.
template <class Value>
struct Sum {
  Value value;
  bool add = false;
  explicit operator bool() const { return value.data; }
};

// What a backward writes: dx where the weight is given, and the wanted gradients.
template <class Value>
struct BackwardOutputs {
  Output<Value> dx;
  Sum<Value> dA, dB, dcore;
};

// t in `dtype`, or an undefined tensor.
inline Tensor defined(const OptionalTensor& t, ScalarType dtype) {
  if (!t) return Tensor();
  return t->scalar_type() == dtype ? *t : torch::stable::to(*t, dtype);
}

// The base product x weight and the adapter's part, which add(fresh) computes, into `out` (fresh:
// =, else
// +=).
template <class Products, class Out, class Add>
void base_and_adapter(const Products& products, Out& out, const Arg& x, const Tensor& weight,
                      bool fresh, bool adapter_first, Add add) {
  if (adapter_first) add(fresh);
  products.base(out, x, weight, fresh && !adapter_first);
  if (!adapter_first) add(false);
}

template <class Products>
Forward layer_forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                      const OptionalTensor& A, const Tensor& B, const Tensor& core, double scaling,
                      int64_t strategy, const OptionalTensor& u, const OptionalTensor& F, double p,
                      const OptionalTensor& seed) {
  const Check c{"lotr::layer_forward", Products::max_rank};
  const int64_t order = Products::order_of(c, strategy);
  const bool unfolded = strategy & UNFOLDED;
  const ForwardArgs a{{"x", x},       {"weight", weight}, {"bias", bias}, {"A", A},      {"B", B},
                      {"core", core}, {"u", u},           {"F", F},       {"seed", seed}};
  const Sizes s = a.check(c, scaling, p, unfolded);
  const Products products(c, a.x, p, a.seed);
  const Tensor weight_t = transposed_view(a.weight);
  OptionalTensor new_u, new_F;
  auto y = products.output(a.x, s[N], a.bias);
  if (unfolded) {
    base_and_adapter(products, y, a.x, weight_t, true, order == BETA && Products::unfolded_first,
                     [&](bool fresh) { products.small_forward(new_u, y, a, s, scaling, fresh); });
    return {y.tensor, new_u, new_F};
  }
  const auto u_in =
      a.u ? products.read(a.u) : products.shrink(new_u, products.read(a.x), a.A, true);
  const auto F_in =
      a.F ? products.read(a.F) : products.fold(new_F, a.B, a.core, scaling, a.x.dtype);
  if (order != FUSED) {
    base_and_adapter(products, y, a.x, weight_t, true, order == BETA,
                     [&](bool fresh) { products.expand(y, u_in, F_in, fresh, false); });
  } else if (const std::string refusal = products.fused(y, a.x, a.weight, u_in, F_in, false);
             !refusal.empty()) {
    fail(c.op, ": ", refusal, ". Strategies 0 (two_pass) and 1 (beta) take every layout.");
  }
  return {y.tensor, new_u, new_F};
}

template <class Products, class Outputs>
void folded_backward(const Products& products, OptionalTensor& new_k, Outputs& out,
                     const BackwardArgs& a, const Sizes& s, double scaling, int64_t order,
                     bool drops) {
  // k = g F and Q (+)= g^T u, from one read of g
  OptionalTensor new_Q;
  Sum<typename Products::Value> Q;
  if (a.Q || out.dB || out.dcore) Q = products.sum(a.Q, new_Q, s[N], s[R_IN], acc_dtype(a.g.dtype));
  const auto g = products.read(a.g);
  typename Products::Value k{};
  if (a.F && Q)
    k = products.shrink_grad(new_k, Q, g, a.F, a.u);
  else if (a.F)
    k = products.shrink(new_k, g, a.F, false);
  else if (Q)
    products.outer(Q, g, products.read(a.u), false);
  if (a.F && a.k) products.add(new_k, k, a.k);
  if (out.dB || out.dcore) products.fold_grad(out.dB, out.dcore, Q.value, a.B, a.core, scaling);
  if (out.dA) products.outer(out.dA, products.read(a.x), k, true);
  if (!a.weight) return;
  const bool expands = a.A && a.F;
  if (order == FUSED && expands && !a.dx && !drops &&
      products.fused(out.dx, a.g, a.weight, k, products.read(a.A), true).empty())
    return;
  base_and_adapter(products, out.dx, a.g, *a.weight.tensor, !a.dx, expands && order != TWO_PASS,
                   [&](bool fresh) {
                     if (expands) products.expand(out.dx, k, products.read(a.A), fresh, true);
                   });
}

template <class Products>
Gradients layer_backward(const Tensor& g, const OptionalTensor& weight, const OptionalTensor& x,
                         const OptionalTensor& u, const OptionalTensor& A, const OptionalTensor& F,
                         const Tensor& B, const Tensor& core, double scaling, int64_t strategy,
                         const OptionalTensor& k, const OptionalTensor& dx, const OptionalTensor& Q,
                         const OptionalTensor& dA, const OptionalTensor& dB, bool need_B,
                         bool need_core, double p, const OptionalTensor& seed) {
  const Check c{"lotr::layer_backward_", Products::max_rank};
  const int64_t order = Products::order_of(c, strategy);
  const bool unfolded = strategy & UNFOLDED;
  const BackwardArgs a{{"g", g}, {"weight", weight}, {"x", x},       {"u", u},      {"A", A},
                       {"F", F}, {"B", B},           {"core", core}, {"k", k},      {"dx", dx},
                       {"Q", Q}, {"dA", dA},         {"dB", dB},     {"seed", seed}};
  const Sizes s = a.check(c, scaling, p, unfolded, need_B || need_core);
  const Products products(c, a.g, p, a.seed);
  // New gradients of the factors have the factors' dtype where they share one, else that of sums.
  const bool alike = a.B.dtype == a.core.dtype && (!a.A || a.A.dtype == a.B.dtype);
  const ScalarType narrow = alike ? a.B.dtype : acc_dtype(a.g.dtype);
  const bool folds = a.u && !a.Q;  // whether the gradients of B and the core are made here
  OptionalTensor new_k, new_dA, new_dB, new_dcore;
  BackwardOutputs<typename Products::Value> out;
  if (a.weight) out.dx = a.dx ? products.onto(a.dx) : products.output(a.g, s[K], Arg("bias"));
  if (a.x) out.dA = products.sum(a.dA, new_dA, s[K], s[R_IN], narrow);
  if (folds && (need_B || a.dB)) out.dB = products.sum(a.dB, new_dB, s[N], s[R_OUT], narrow);
  if (folds && need_core)
    out.dcore = products.sum(Arg("dcore"), new_dcore, s[R_IN], s[R_OUT], narrow);
  const auto small = [&](bool fresh) { products.small_backward(out, a, s, scaling, fresh); };
  if (!unfolded)
    folded_backward(products, new_k, out, a, s, scaling, order, p != 0.0);
  else if (a.weight)
    base_and_adapter(products, out.dx, a.g, *a.weight.tensor, true,
                     order == BETA && Products::unfolded_first, small);
  else
    small(false);
  if (a.A) new_k.reset();  // was used here
  return {a.dx ? Tensor() : out.dx.tensor, defined(new_k, a.g.dtype), defined(new_dA, narrow),
          defined(new_dB, narrow), defined(new_dcore, narrow)};
}

// dx += drop(k A^T); dA += drop(x)^T k, returned where it is new.
template <class Products>
Tensor shrink_backward(const Tensor& k, const OptionalTensor& dx, const OptionalTensor& x,
                       const OptionalTensor& A, const OptionalTensor& dA, double p,
                       const OptionalTensor& seed) {
  const Check c{"lotr::shrink_backward_", Products::max_rank};
  const ShrinkBackwardArgs a{{"k", k}, {"dx", dx}, {"x", x}, {"A", A}, {"dA", dA}, {"seed", seed}};
  const Sizes s = a.check(c, p);
  const Products products(c, a.k, p, a.seed);
  const ScalarType sums = acc_dtype(a.k.dtype);
  OptionalTensor new_dA;
  const auto k_in = products.read(a.k);
  if (a.x)
    products.outer(products.sum(a.dA, new_dA, s[K], s[R], sums), products.read(a.x), k_in, true);
  if (a.dx) {
    auto dx_out = products.onto(a.dx);
    products.expand(dx_out, k_in, products.read(a.A), false, true);
  }
  return defined(new_dA, sums);
}

}  // namespace lotr
