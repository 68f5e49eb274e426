// The forward and backward of a layer as operators that a dispatch mode sees: layer.h over products_traced.h.
// lotr_ext/ops/layer.py calls them through OpOverload.decompose.
#include <torch/csrc/stable/library.h>

#include "products_traced.h"

STABLE_TORCH_LIBRARY_IMPL(lotr, CompositeImplicitAutograd, m)
{
  using Products = lotr::TracedProducts;
  m.impl("layer_forward.products", TORCH_BOX(&lotr::layer_forward<Products>));
  m.impl("layer_backward_.products", TORCH_BOX(&lotr::layer_backward<Products>));
  m.impl("shrink_backward_.products", TORCH_BOX(&lotr::shrink_backward<Products>));
}
