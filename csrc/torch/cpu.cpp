// The operators on CPU tensors: operators.h and layer.h over products_cpu.h.
#include <torch/csrc/stable/library.h>

#include "operators.h"
#include "products_cpu.h"

STABLE_TORCH_LIBRARY_IMPL(lotr, CPU, m)
{
  using Products = lotr::CpuProducts;
  m.impl("shrink", TORCH_BOX(&lotr::shrink<Products>));
  m.impl("expand_add_", TORCH_BOX(&lotr::expand_add_<Products>));
  m.impl("expand", TORCH_BOX(&lotr::expand<Products>));
  m.impl("factor_grad_", TORCH_BOX(&lotr::factor_grad_<Products>));
  m.impl("shrink_grad", TORCH_BOX(&lotr::shrink_grad<Products>));
  m.impl("shrink_grad_", TORCH_BOX(&lotr::shrink_grad_<Products>));
  m.impl("fold", TORCH_BOX(&lotr::fold<Products>));
  m.impl("fold_grad", TORCH_BOX(&lotr::fold_grad<Products>));
  m.impl("small_forward_", TORCH_BOX(&lotr::small_forward_<Products>));
  m.impl("small_backward_", TORCH_BOX(&lotr::small_backward_<Products>));
  m.impl("layer_forward", TORCH_BOX(&lotr::layer_forward<Products>));
  m.impl("layer_backward_", TORCH_BOX(&lotr::layer_backward_<Products>));
  m.impl("layer_backward_owned_", TORCH_BOX(&lotr::layer_backward<Products>));
  m.impl("shrink_backward_", TORCH_BOX(&lotr::shrink_backward_<Products>));
  m.impl("shrink_backward_owned_", TORCH_BOX(&lotr::shrink_backward<Products>));
}
