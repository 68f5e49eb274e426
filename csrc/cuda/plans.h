// Which plan a kernel takes: the one with the least estimated time, unless a rule names another.
#pragma once
#include <string>

#include "launch.h"

namespace lotr::cuda {

enum class Operator : uint32_t { shrink, expand_add, factor_grad, shrink_grad };
constexpr const char* OPERATOR_NAMES[] = {"shrink", "expand_add", "factor_grad", "shrink_grad"};

// The plans of one launch with a large matrix [M, N] and rank r: the chosen one, then the others, the fastest
// first.  wgmma: whether the wgmma kernel may run.
plan::Plans plans_of(const Call& call, Operator op, int64_t M, int64_t N, int32_t r, bool wgmma);
// The same for matrices with aligned rows and no dropout, named as in OPERATOR_NAMES.
plan::Plans plans_of(const Call& call, const std::string& op, int64_t M, int64_t N, int32_t r);

// Rules, separated by semicolons: an operator, then words NAME=NUMBER.  M, tokens (M rounded up to
// four numbers an octave), N, r, element (bytes) and multiprocessors say which problems a rule is for; wgmma,
// rows, cols, m_blocks, n_blocks, of_row and cluster say which plan it takes, the fastest of those that fit.
// "shrink M=8192 m_blocks=64; factor_grad wgmma=0"
//
// forced: from LOTR_CUDA_PLAN or a benchmark; if no plan fits, the call that the rule matches fails.
// measured: from lotr_ext.tune; a rule that no plan fits is ignored.  Forced rules come first.
enum class Rules { forced, measured };
// Replaces the rules of a kind and forgets all choices; returns the old ones.  Throws std::invalid_argument.
std::string set_rules(Rules kind, const std::string& text);

// A plan in the words of a rule.
std::string text_of(const plan::Plan& plan);

}  // namespace lotr::cuda
