// The individual products and row_core as operators, written once over the products of layer.h, and
// the registration of all operators. Equations: schema.cpp.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "layer.h"

namespace lotr {

template <class Products>
Tensor shrink(const Tensor& x, const Tensor& A, double p, const OptionalTensor& seed) {
  const Check check{"lotr::shrink", Products::max_rank};
  const Arg x_arg("x", x);
  const Arg A_arg("A", A);
  const Arg seed_arg("seed", seed);
  const Sizes sizes(check, x_arg,
                    {{x_arg, Type::activation, {M, K}}, {A_arg, Type::factor, {K, R}}, {seed_arg}});
  check.dropout(p, seed_arg);
  const Products products(check, x_arg, p, seed_arg);
  OptionalTensor u;
  products.shrink(u, read_view(x_arg), A_arg, Mask::dropout);
  return *u;
}

template <class Products>
void expand_add_(const Tensor& y, const Tensor& u, const Tensor& F, double p,
                 const OptionalTensor& seed) {
  const Check check{"lotr::expand_add_", Products::max_rank};
  const Arg y_arg("y", y);
  const Arg u_arg("u", u);
  const Arg F_arg("F", F);
  const Arg seed_arg("seed", seed);
  const Sizes sizes(check, y_arg,
                    {{y_arg, Type::activation, {M, N}, WRITTEN},
                     {u_arg, Type::activation, {M, R}},
                     {F_arg, Type::factor, {N, R}},
                     {seed_arg}});
  check.dropout(p, seed_arg);
  const Products products(check, y_arg, p, seed_arg);
  Output out = onto(y_arg);
  products.expand(out, read_view(u_arg), read_view(F_arg), Mask::dropout);
}

// y + u F^T as a new tensor. y is not written, because the operator that made it may have saved it.
// The result shares no memory with y, because users may write into it.
template <class Products>
Tensor expand(const Tensor& y, const Tensor& u, const Tensor& F) {
  const Check check{"lotr::expand", Products::max_rank};
  const Arg y_arg("y", y);
  const Arg u_arg("u", u);
  const Arg F_arg("F", F);
  const Sizes sizes(check, y_arg,
                    {{y_arg, Type::activation, {LEADING, N}},
                     {u_arg, Type::activation, {M, R}},
                     {F_arg, Type::factor, {N, R}}});
  const Products products(check, y_arg);
  const Output sum = new_output(products, y_arg, sizes[N]);
  products.expand_from(sum, read_view(y_arg), read_view(u_arg), read_view(F_arg));
  return sum.tensor;
}

template <class Products>
Tensor fold(const Tensor& B, const Tensor& core, double scaling, ScalarType dtype) {
  const Check check{"lotr::fold", Products::max_rank};
  const Arg B_arg("B", B);
  const Arg core_arg("core", core);
  const Sizes sizes(check, "dtype", dtype,
                    {{B_arg, Type::factor, {N, R_OUT}}, {core_arg, Type::factor, {R_IN, R_OUT}}});
  check.finite("scaling", scaling);
  OptionalTensor F;
  Products(check, B_arg).fold(F, B_arg, core_arg, scaling, dtype);
  return *F;
}

template <class Products>
Tensor row_core(const Tensor& u, const Tensor& cores, const OptionalTensor& index,
                const OptionalTensor& offs, const OptionalTensor& tokens, double scaling) {
  const Check check{"lotr::row_core", Products::max_rank};
  const RowArgs args(u, cores, index, offs, tokens);
  const Sizes sizes = args.check(check, scaling);
  return Products(check, args.u).row_core(args, sizes, scaling);
}

template <class Products>
std::tuple<Tensor, Tensor> row_core_backward(const Tensor& g, const Tensor& u, const Tensor& cores,
                                             const OptionalTensor& index,
                                             const OptionalTensor& offs,
                                             const OptionalTensor& tokens, double scaling,
                                             bool need_u, bool need_cores) {
  const Check check{"lotr::row_core_backward", Products::max_rank};
  RowArgs args(u, cores, index, offs, tokens);
  args.g.set(g);
  const Sizes sizes = args.check(check, scaling);
  return Products(check, args.u).row_core_backward(args, sizes, scaling, need_u, need_cores);
}

// The operators that the CPU and CUDA both have, for one of the two kinds of Products.
template <class Products, class Library>
void implement_operators(Library& m) {
  m.impl("shrink", TORCH_BOX(&shrink<Products>));
  m.impl("expand_add_", TORCH_BOX(&expand_add_<Products>));
  m.impl("expand", TORCH_BOX(&expand<Products>));
  m.impl("fold", TORCH_BOX(&fold<Products>));
  m.impl("layer_forward", TORCH_BOX(&layer_forward<Products>));
  m.impl("layer_forward_few_tokens", TORCH_BOX(&layer_forward_few_tokens<Products>));
  m.impl("layer_forward_projected", TORCH_BOX(&layer_forward_projected<Products>));
  m.impl("layer_forward_rows", TORCH_BOX(&layer_forward_rows<Products>));
  m.impl("layer_backward_", TORCH_BOX(&layer_backward<Products>));
  m.impl("layer_backward_few_tokens_", TORCH_BOX(&layer_backward_few_tokens<Products>));
  m.impl("layer_backward_projected_", TORCH_BOX(&layer_backward_projected<Products>));
  m.impl("layer_backward_rows_", TORCH_BOX(&layer_backward_rows<Products>));
  m.impl("shrink_backward_", TORCH_BOX(&shrink_backward<Products>));
  m.impl("row_core", TORCH_BOX(&row_core<Products>));
  m.impl("row_core_backward", TORCH_BOX(&row_core_backward<Products>));
}

}  // namespace lotr
