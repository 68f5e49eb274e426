// The operators that a CPU and CUDA both have, registered for one kind of Products.
#pragma once
#include <torch/csrc/stable/library.h>

#include "operators.h"

namespace lotr {

template <class Products, class Library>
void implement_operators(Library& m) {
  m.impl("shrink", TORCH_BOX(&shrink<Products>));
  m.impl("expand_add_", TORCH_BOX(&expand_add_<Products>));
  m.impl("expand", TORCH_BOX(&expand<Products>));
  m.impl("factor_grad_", TORCH_BOX(&factor_grad_<Products>));
  m.impl("shrink_grad_", TORCH_BOX(&shrink_grad_<Products>));
  m.impl("fold", TORCH_BOX(&fold<Products>));
  m.impl("fold_grad", TORCH_BOX(&fold_grad<Products>));
  m.impl("scale_backward", TORCH_BOX(&scale_backward<Products>));
  m.impl("layer_forward", TORCH_BOX(&layer_forward<Products>));
  m.impl("layer_backward_", TORCH_BOX(&layer_backward<Products>));
  m.impl("shrink_backward_", TORCH_BOX(&shrink_backward<Products>));
}

}  // namespace lotr
