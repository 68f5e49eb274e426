// The operators of one instruction set, as function pointers.
#pragma once

#include "cpu/kernels.h"

namespace lotr::cpu {

struct Table {
  const char* name;
  decltype(&cpu::shrink) shrink;
  decltype(&cpu::expand_add) expand_add;
  decltype(&cpu::factor_grad) factor_grad;
  decltype(&cpu::shrink_grad) shrink_grad;
  decltype(&cpu::fold) fold;
  decltype(&cpu::fold_grad) fold_grad;
  decltype(&cpu::add) add;
  decltype(&cpu::small_forward) small_forward;
  decltype(&cpu::small_backward) small_backward;
  decltype(&cpu::row_core) row_core;
  decltype(&cpu::row_core_grad) row_core_grad;
  decltype(&cpu::sum_rows) sum_rows;
};

}  // namespace lotr::cpu
