// The operators on CPU tensors: operators.h and layer.h over products_cpu.h.
#include "products_cpu.h"
#include "registration.h"

STABLE_TORCH_LIBRARY_IMPL(lotr, CPU, m)
{
  using Products = lotr::CpuProducts;
  lotr::implement_operators<Products>(m);
  m.impl("row_norms", TORCH_BOX(&lotr::row_norms<Products>));
}
