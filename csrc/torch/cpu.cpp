// The operators on CPU tensors: operators.h and layer.h over products_cpu.h.
#include "operators.h"
#include "products_cpu.h"

STABLE_TORCH_LIBRARY_IMPL(lotr, CPU, m)
{
  lotr::implement_operators<lotr::CpuProducts>(m);
}
