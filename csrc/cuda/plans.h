// The plan of a launch: from plan.h, or from the environment variable LOTR_CUDA_PLAN.
#pragma once
#include <string>

#include "launch.h"

namespace lotr::cuda {

// LOTR_CUDA_PLAN, for experiments, is read once: parts separated by semicolons, each a kernel and
// words NAME=NUMBER that replace the numbers of its plans. shrink, expand_add, factor_grad and
// shrink_grad have rows, cols (of a tile that the kernel is compiled for), m_blocks and n_blocks;
// fold_grad and row_core_grad have splits. The part "early=0", which names no kernel, makes every
// launch wait until the previous one has ended.
//
//   LOTR_CUDA_PLAN="shrink rows=128 m_blocks=64 n_blocks=2; early=0"
enum class Kernel { shrink, expand_add, factor_grad, shrink_grad, fold_grad, row_core_grad };

// The plan of one launch of the first four kernels, with a large matrix [M, N] and rank r. Throws
// std::invalid_argument if LOTR_CUDA_PLAN has numbers for which the kernel is not compiled.
plan::Plan plan_of(const Call& call, Kernel kernel, int64_t M, int64_t N, int32_t r);
plan::Split fold_grad_plan(const Call& call, int64_t N, int32_t r_in, int32_t r_out);
plan::Split row_core_grad_plan(const Call& call, int64_t rows, int64_t cores, int32_t r_in,
                               int32_t r_out);

// Whether launches may start early on cards that support it.
bool early_launches();

// A plan in one line: the words of LOTR_CUDA_PLAN, and the number of blocks.
//
//   first four       large matrix [M, N], rank r; r_out is not used
//   fold_grad        B [N, r_out], core [r, r_out]; M is not used
//   row_core_grad    M rows, N cores [r, r_out]
std::string plan_text(const Call& call, const std::string& kernel, int64_t M, int64_t N, int32_t r,
                      int32_t r_out);

}  // namespace lotr::cuda
