// Which plan a kernel takes: the one with the least estimated time, unless a rule names another.
#pragma once
#include <string>
#include <vector>

#include "launch.h"
#include "plan/gemm_lotr.h"
#include "plan/row_core.h"

namespace lotr::cuda {

// The first four choose among candidates by their estimated times; each of the others has one plan, a struct
// of its own.
enum class Operator : uint32_t {
  shrink,
  expand_add,
  factor_grad,
  shrink_grad,
  gemm_lotr,
  fold_grad,
  scale_backward,
  row_core_grad
};
constexpr const char* OPERATOR_NAMES[] = {"shrink",    "expand_add", "factor_grad",    "shrink_grad",
                                          "gemm_lotr", "fold_grad",  "scale_backward", "row_core_grad"};
constexpr size_t WITH_CANDIDATES = 4;

// The plans of one launch with a large matrix [M, N] and rank r: the chosen one, then the others, the fastest
// first.  wgmma: whether the wgmma kernel may run.
plan::Plans plans_of(const Call& call, Operator op, int64_t M, int64_t N, int32_t r, bool wgmma);
// The same for matrices with aligned rows and no dropout, named as in OPERATOR_NAMES.
plan::Plans plans_of(const Call& call, const std::string& op, int64_t M, int64_t N, int32_t r);

// The plans of plan/*.h that are not chosen among candidates, with the numbers that forced rules set.
plan::GemmLotr gemm_lotr_plan(const Call& call, int64_t M, int64_t N, int32_t r);  // y [M, N]
plan::FoldGrad fold_grad_plan(const Call& call, int64_t L, int64_t N, int32_t r_in, int32_t r_out, bool dB);
plan::ScaleBackward scale_backward_plan(const Call& call, int64_t M, int64_t N);
plan::RowCoreGrad row_core_grad_plan(const Call& call, int64_t rows, int64_t cores, int32_t r_in,
                                     int32_t r_out);

// A plan as it is printed, in the words of a rule.  microseconds: the estimate, 0 for a plan without one.
struct PrintedPlan {
  std::string text;
  int64_t blocks;
  double microseconds;
};
// The plan of an operator that is named as in OPERATOR_NAMES, then the other candidates.  r_out: of fold_grad
// and row_core_grad.
std::vector<PrintedPlan> printed_plans(const Call& call, const std::string& op, int64_t M, int64_t N,
                                       int32_t r, int32_t r_out);

// Rules, separated by semicolons: an operator, then words NAME=NUMBER.  M, tokens (M rounded up to
// four numbers an octave), N, r, element (bytes) and multiprocessors say which problems a rule is for; wgmma,
// rows, cols, m_blocks, n_blocks, of_row and cluster say which plan it takes, the fastest of those that fit.
// "shrink M=8192 m_blocks=64; factor_grad wgmma=0"
//
// The operators without candidates have other words.  gemm_lotr: y [M, N] takes cluster, scouts, band_group.
// fold_grad (M layers, N rows of B, r_in; element 4), scale_backward (r 0) and row_core_grad (M rows, N
// cores, r_in) take splits.
//
// forced: from LOTR_CUDA_PLAN or a benchmark; if no plan fits, the call that the rule matches fails.
// measured: from lotr_ext.tune; a rule that no plan fits is ignored.  Forced rules come first.
enum class Rules { forced, measured };
// Replaces the rules of a kind and forgets all choices; returns the old ones.  Throws std::invalid_argument.
std::string set_rules(Rules kind, const std::string& text);

// A plan in the words of a rule.
std::string text_of(const plan::Plan& plan);

}  // namespace lotr::cuda
