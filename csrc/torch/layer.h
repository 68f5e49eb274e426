// A direction of a layer, written once over the products that it is made of:
//
//   CpuProducts   products_cpu.h   the library's base product, the kernels of cpu/
//   CudaProducts  products_cuda.h  the same with the launchers of cuda/
//
//   layer_forward    u = drop(x) A,  F = s B G^T;   y = x W^T + bias + u F^T
//   layer_backward_  k = g F + k',   Q = g^T u;     dx = dx' + g W + drop(k A^T),  dA += drop(x)^T k,
//                                                   dB += s Q G,  dG = s Q^T B
//   unfolded, for few tokens: h = s u G,  y = x W^T + bias + h B^T;   h = s g B,  k = h G^T,
//                             dx = g W + k A^T,  dA += x^T k,  dB += s g^T (u G),  dG = u^T h
//
// A direction is one operator, because a base product of a few milliseconds evicts the code and data of
// Python, the dispatcher and autograd from the caches: each further operator costs tens of microseconds
// instead of two.
//
// BETA: the adapter's part is written first, and the base product accumulates onto it (its beta is 1).
// torch's own linear starts in this way from a copy of the bias, so the expand's pass over y replaces that
// copy, and nothing runs with cold caches after the product. TWO_PASS: the product first, then the adapter's
// part is added to it. On a CPU that pass adds the bias too, at no cost, where the library's bfloat16 product
// with a bias takes up to 7 % longer than without. FUSED: both in one launch, on some GPUs (fused_cuda.h).
#pragma once

#include <tuple>
#include <utility>

#include "check.h"

namespace lotr {

using Forward = std::tuple<Tensor, OptionalTensor, OptionalTensor>;    // y, and u and F where they are new
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;  // of Made

// t, or an undefined tensor.
inline Tensor defined(OptionalTensor& t) {
  return t ? std::move(*t) : Tensor();
}

// What is new of dx, k and the gradients of A, B and the core.
struct Made {
  OptionalTensor dx, k, dA, dB, dcore;
  Gradients all() { return {defined(dx), defined(k), defined(dA), defined(dB), defined(dcore)}; }
};

// The dtype of new gradients of the factors: the factors' own where they have one, else that of sums.
inline ScalarType gradient_dtype(const Arg& A, const Arg& B, const Arg& core) {
  const bool one = B.dtype == core.dtype && (!A || A.dtype == B.dtype);
  return one ? B.dtype : acc_dtype(B.dtype);
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
  Products products(c, a.x, p, a.seed);
  OptionalTensor new_u, new_F;
  auto y = products.output(a.x, s[N], a.bias);
  // add(fresh) adds the adapter's part to y, or starts y with it and the bias.
  const auto with_base = [&](bool adapter_first, auto add) {
    if (adapter_first) {
      add(true);
      products.base_onto(y, a.x, a.weight);
    } else {
      products.base(y, a.x, a.weight);
      add(false);
    }
  };
  if (unfolded) {
    with_base(order == BETA && Products::unfolded_first,
              [&](bool fresh) { products.small_forward(new_u, y, a, s, scaling, fresh); });
    return {products.result(y), std::move(new_u), std::move(new_F)};
  }
  const auto u_in = a.u ? products.read(a.u) : products.shrink(new_u, products.read(a.x), a.A, true);
  const auto F_in = a.F ? products.read(a.F) : products.fold(new_F, a.B, a.core, scaling, a.x.dtype);
  if (order == FUSED)
    products.fused(y, a.x, a.weight, u_in, F_in, false);
  else
    with_base(order == BETA, [&](bool fresh) { products.expand(y, u_in, F_in, fresh, false); });
  return {products.result(y), std::move(new_u), std::move(new_F)};
}

template <class Products>
void unfolded_backward(Products& products, Made& made, const BackwardArgs& a, const Sizes& s, double scaling,
                       bool adapter_first, bool need_B, bool need_core, ScalarType narrow) {
  if (!a.weight)
    return products.small_backward(made, nullptr, a, s, scaling, false, need_B, need_core, narrow);
  auto dx = products.gradient(a.dx, a.g, s[K]);
  if (!adapter_first) products.base_gradient(dx, a.g, a.weight, true);
  products.small_backward(made, &dx, a, s, scaling, adapter_first, need_B, need_core, narrow);
  if (adapter_first) products.base_gradient(dx, a.g, a.weight, false);
  made.dx = products.result(dx);
}

template <class Products>
Gradients layer_backward(const Tensor& g, const OptionalTensor& weight, const OptionalTensor& x,
                         const OptionalTensor& u, const OptionalTensor& A, const OptionalTensor& F,
                         const Tensor& B, const Tensor& core, double scaling, int64_t strategy,
                         const OptionalTensor& k, const OptionalTensor& dx, const OptionalTensor& Q,
                         const OptionalTensor& dA, const OptionalTensor& dB, bool need_B, bool need_core,
                         double p, const OptionalTensor& seed) {
  const Check c{"lotr::layer_backward_", Products::max_rank};
  const int64_t order = Products::order_of(c, strategy);
  const bool unfolded = strategy & UNFOLDED;
  const BackwardArgs a{{"g", g}, {"weight", weight}, {"x", x},       {"u", u},      {"A", A},
                       {"F", F}, {"B", B},           {"core", core}, {"k", k},      {"dx", dx},
                       {"Q", Q}, {"dA", dA},         {"dB", dB},     {"seed", seed}};
  const Sizes s = a.check(c, scaling, p, unfolded, need_B || need_core);
  const ScalarType narrow = gradient_dtype(a.A, a.B, a.core);
  Products products(c, a.g, p, a.seed);
  Made made;
  if (unfolded) {
    unfolded_backward(products, made, a, s, scaling, order == BETA && Products::unfolded_first, need_B,
                      need_core, narrow);
    return made.all();
  }
  // k = g F and Q (+)= g^T u, from one read of g
  const bool folds = a.u && !a.Q && (need_B || need_core || a.dB);
  typename Products::Sum Q_sum(products, a.Q, folds, s[N], s[R_IN]);
  auto k_in = typename Products::Value{};
  const auto g_in = products.read(a.g);
  if (a.F && Q_sum)
    k_in = products.shrink_grad(made.k, Q_sum, g_in, a.F, a.u);
  else if (a.F)
    k_in = products.shrink(made.k, g_in, a.F, false);
  else if (Q_sum)
    products.add_outer(Q_sum, g_in, a.u);
  if (a.F && a.k) products.add(made.k, k_in, a.k);
  if (folds) products.fold_grad(made, Q_sum.value, 0, a.B, a.core, scaling, a.dB, need_B, need_core, narrow);
  if (a.x) products.factor_grad(made.dA, a.dA, s[K], s[R_IN], narrow, a.x, k_in);
  if (a.weight) {
    auto dx_out = products.gradient(a.dx, a.g, s[K]);
    const bool expands = a.A && a.F, expand_first = expands && order != TWO_PASS;
    if (order == FUSED && expands && !a.dx && p == 0.0 &&
        products.fuses(dx_out, a.g, a.weight, k_in, products.read(a.A), true)) {
      products.fused(dx_out, a.g, a.weight, k_in, products.read(a.A), true);
    } else {
      if (expand_first) products.expand(dx_out, k_in, products.read(a.A), !a.dx, true);
      products.base_gradient(dx_out, a.g, a.weight, !a.dx && !expand_first);
      if (expands && !expand_first) products.expand(dx_out, k_in, products.read(a.A), false, true);
    }
    if (!a.dx) made.dx = products.result(dx_out);
  }
  if (a.A) made.k.reset();  // was used here
  return made.all();
}

// dx += drop(k A^T); dA += drop(x)^T k, returned where it is new.
template <class Products>
Tensor shrink_backward(const Tensor& k, const OptionalTensor& dx, const OptionalTensor& x,
                       const OptionalTensor& A, const OptionalTensor& dA, double p,
                       const OptionalTensor& seed) {
  const Check c{"lotr::shrink_backward_", Products::max_rank};
  const ShrinkBackwardArgs a{{"k", k}, {"dx", dx}, {"x", x}, {"A", A}, {"dA", dA}, {"seed", seed}};
  const Sizes s = a.check(c, p);
  Products products(c, a.k, p, a.seed);
  OptionalTensor made;
  const auto k_in = products.read(a.k);
  if (a.x) products.factor_grad(made, a.dA, s[K], s[R], acc_dtype(a.k.dtype), a.x, k_in);
  if (a.dx) {
    auto dx_out = products.gradient(a.dx, a.k, s[K]);
    products.expand(dx_out, k_in, products.read(a.A), false, true);
  }
  return defined(made);
}

}  // namespace lotr
