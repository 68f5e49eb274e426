// The single products and row_core as operators, written once over the products of layer.h, and the
// registration of all operators. Equations: schema.cpp.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "layer.h"

namespace lotr {

inline Arg none(const char* name) {
  return Arg(name, OptionalTensor());
}

template <class Products>
Tensor shrink(const Tensor& x, const Tensor& A, double p, const OptionalTensor& seed) {
  const Check c{"lotr::shrink", Products::max_rank};
  const Arg ax("x", x), aA("A", A), aseed("seed", seed);
  check_shrink(c, ax, aA, p, aseed);
  const Products products(c, ax, p, aseed);
  OptionalTensor u;
  products.shrink(u, products.read(ax), aA, true);
  return *u;
}

template <class Products>
void expand_add_(const Tensor& y, const Tensor& u, const Tensor& F, double p, const OptionalTensor& seed) {
  const Check c{"lotr::expand_add_", Products::max_rank};
  const Arg ay("y", y), au("u", u), aF("F", F), aseed("seed", seed);
  check_expand(c, ay, au, aF, true, p, aseed);
  const Products products(c, ay, p, aseed);
  auto out = products.gradient(ay, ay, 0);
  products.expand(out, products.read(au), products.read(aF), false, true);
}

// expand_add_ onto a copy of y: the operator that made y may have saved it for its backward, and users may
// write into a result.
template <class Products>
Tensor expand(const Tensor& y, const Tensor& u, const Tensor& F) {
  const Check c{"lotr::expand", Products::max_rank};
  const Arg au("u", u), aF("F", F), seed = none("seed");
  check_expand(c, Arg("y", y), au, aF, false, 0.0, seed);
  Tensor copy = torch::stable::empty_like(torch::stable::contiguous(y));
  torch::stable::copy_(copy, y);
  const Arg ay("y", copy);
  const Products products(c, ay, 0.0, seed);
  auto out = products.gradient(ay, ay, 0);
  products.expand(out, products.read(au), products.read(aF), false, false);
  return copy;
}

template <class Products>
void factor_grad_(const Tensor& acc, const Tensor& x, const Tensor& k, double p, const OptionalTensor& seed) {
  const Check c{"lotr::factor_grad_", Products::max_rank};
  const Arg aacc("acc", acc), ax("x", x), ak("k", k), aseed("seed", seed);
  check_factor_grad(c, aacc, ax, ak, p, aseed);
  const Products products(c, ax, p, aseed);
  OptionalTensor no_new;
  products.factor_grad(no_new, aacc, 0, 0, aacc.dtype, ax, products.read(ak));
}

template <class Products>
Tensor shrink_grad_(const Tensor& Q, const Tensor& g, const Tensor& F, const Tensor& u) {
  const Check c{"lotr::shrink_grad_", Products::max_rank};
  const Arg aQ("Q", Q), ag("g", g), aF("F", F), au("u", u), seed = none("seed");
  const Sizes s = check_shrink_grad(c, aQ, ag, aF, au);
  const Products products(c, ag, 0.0, seed);
  OptionalTensor k;
  products.shrink_grad(k, typename Products::Sum(products, aQ, false, s[N], s[R_IN]), products.read(ag), aF,
                       au);
  return *k;
}

template <class Products>
Tensor fold(const Tensor& B, const Tensor& cores, double scaling, ScalarType dtype) {
  const Check c{"lotr::fold", Products::max_rank};
  const Arg aB("B", B), acores("cores", cores), seed = none("seed");
  check_fold(c, aB, acores, scaling, dtype);
  const Products products(c, aB, 0.0, seed);
  OptionalTensor F;
  products.fold(F, aB, acores, scaling, dtype);
  return *F;
}

template <class Products>
Tensor fold_grad(const Tensor& Q, const Tensor& B, const Tensor& cores, double scaling,
                 const OptionalTensor& dB) {
  const Check c{"lotr::fold_grad", Products::max_rank};
  const Arg aQ("Q", Q), aB("B", B), acores("cores", cores), adB("dB", dB), seed = none("seed");
  check_fold_grad(c, aQ, aB, acores, scaling, adB);
  const Products products(c, aQ, 0.0, seed);
  Made made;
  products.fold_grad(made, products.first(aQ), aQ.stride[0], aB, acores, scaling, adB, false, true, aQ.dtype);
  return *made.dcore;
}

template <class Products>
Tensor row_core(const Tensor& u, const Tensor& cores, const OptionalTensor& index, const OptionalTensor& offs,
                const OptionalTensor& tokens, double scaling) {
  const Check c{"lotr::row_core", Products::max_rank};
  const RowArgs a{none("g"),        {"u", u},       {"cores", cores},
                  {"index", index}, {"offs", offs}, {"tokens", tokens}};
  const Sizes s = a.check(c, scaling);
  return Products(c, a.u, 0.0, none("seed")).row_core(a, s, scaling);
}

template <class Products>
std::tuple<Tensor, Tensor> row_core_backward(const Tensor& g, const Tensor& u, const Tensor& cores,
                                             const OptionalTensor& index, const OptionalTensor& offs,
                                             const OptionalTensor& tokens, double scaling, bool need_u,
                                             bool need_cores) {
  const Check c{"lotr::row_core_backward", Products::max_rank};
  const RowArgs a{{"g", g}, {"u", u}, {"cores", cores}, {"index", index}, {"offs", offs}, {"tokens", tokens}};
  const Sizes s = a.check(c, scaling);
  return Products(c, a.u, 0.0, none("seed")).row_core_backward(a, s, scaling, need_u, need_cores);
}

// Every operator that a CPU and CUDA both have, for one kind of Products.
template <class Products, class Library>
void implement_operators(Library& m) {
  m.impl("shrink", TORCH_BOX(&shrink<Products>));
  m.impl("expand_add_", TORCH_BOX(&expand_add_<Products>));
  m.impl("expand", TORCH_BOX(&expand<Products>));
  m.impl("factor_grad_", TORCH_BOX(&factor_grad_<Products>));
  m.impl("shrink_grad_", TORCH_BOX(&shrink_grad_<Products>));
  m.impl("fold", TORCH_BOX(&fold<Products>));
  m.impl("fold_grad", TORCH_BOX(&fold_grad<Products>));
  m.impl("layer_forward", TORCH_BOX(&layer_forward<Products>));
  m.impl("layer_backward_", TORCH_BOX(&layer_backward<Products>));
  m.impl("shrink_backward_", TORCH_BOX(&shrink_backward<Products>));
  m.impl("row_core", TORCH_BOX(&row_core<Products>));
  m.impl("row_core_backward", TORCH_BOX(&row_core_backward<Products>));
}

}  // namespace lotr
