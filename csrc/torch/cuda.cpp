// The operators on CUDA tensors: operators.h and layer.h over products_cuda.h.
#include <torch/csrc/stable/library.h>

#include "operators.h"
#include "products_cuda.h"
#ifdef LOTR_SM90A
#include "fused_cuda.h"
#endif

STABLE_TORCH_LIBRARY_IMPL(lotr, CUDA, m)
{
  using Products = lotr::CudaProducts;
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
  m.impl("shrink_backward_", TORCH_BOX(&lotr::shrink_backward_<Products>));
#ifdef LOTR_SM90A
  m.impl("gemm_lotr", TORCH_BOX(&lotr::gemm_lotr));
  m.impl("gemm_lotr_refusal", TORCH_BOX(&lotr::gemm_lotr_refusal));
#endif
}
