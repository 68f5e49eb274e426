// The operators on CUDA tensors: operators.h and layer.h over products_cuda.h.
#include "fused_cuda.h"
#include "operators.h"
#include "products_cuda.h"

STABLE_TORCH_LIBRARY_IMPL(lotr, CUDA, m)
{
  lotr::implement_operators<lotr::CudaProducts>(m);
#ifdef LOTR_SM90A
  m.impl("gemm_lotr", TORCH_BOX(&lotr::gemm_lotr));
  m.impl("gemm_lotr_refusal", TORCH_BOX(&lotr::gemm_lotr_refusal));
#endif
}
