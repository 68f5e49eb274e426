// csrc/cuda/plans.h
#include "plans.h"

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <mutex>
#include <sstream>
#include <stdexcept>
#include <utility>

#include "plan/expand_add.h"
#include "plan/factor_grad.h"
#include "plan/shrink.h"
#include "plan/shrink_grad.h"
#include "sm90.h"

namespace lotr::cuda {
namespace {

struct Word {
  const char* name;
  int64_t value;
};
struct Problem {
  Operator op;
  int64_t M, N;
  int32_t r;
  int element, multiprocessors;
};
// M rounded up to four values per octave, as in lotr_ext.tune: a measured rule applies to all M in between.
int64_t rounded(int64_t M) {
  int64_t step = 1;
  while (M > 8 * step) step *= 2;
  return plan::ceil_div(M, step) * step;
}
constexpr size_t PROBLEM_WORDS = 6, PLAN_WORDS = 7;
std::array<Word, PROBLEM_WORDS> words_of(const Problem& p) {
  return {{{"M", p.M},
           {"tokens", rounded(p.M)},
           {"N", p.N},
           {"r", p.r},
           {"element", p.element},
           {"multiprocessors", p.multiprocessors}}};
}
std::array<Word, PLAN_WORDS> words_of(const plan::Plan& p) {
  return {{{"wgmma", p.wgmma},
           {"rows", p.rows},
           {"cols", p.cols},
           {"m_blocks", p.m_blocks},
           {"n_blocks", p.n_blocks},
           {"of_row", p.of_row},
           {"cluster", p.cluster}}};
}
std::vector<Word> words_of(const plan::GemmLotr& p) {
  return {{"cluster", p.cluster}, {"scouts", p.scouts}, {"band_group", p.band_group}};
}
std::vector<Word> words_of_splits(int64_t splits) {
  return {{"splits", splits}};
}
// The words of an operator's plan.
std::vector<Word> plan_words(Operator op) {
  if (op == Operator::gemm_lotr) return words_of(plan::GemmLotr{});
  if (size_t(op) >= WITH_CANDIDATES) return words_of_splits(0);
  const auto words = words_of(plan::Plan{});
  return {words.begin(), words.end()};
}
template <class Words>
std::string joined(const Words& words) {
  std::ostringstream text;
  for (const Word& word : words) text << (&word == &words[0] ? "" : " ") << word.name << '=' << word.value;
  return text.str();
}

template <class Words>
std::string names_of(const Words& words) {
  std::string text;
  for (const Word& word : words) text += (text.empty() ? "" : ", ") + std::string(word.name);
  return text;
}

struct Rule {
  std::string text;  // as it was given
  Operator op;
  std::vector<std::pair<std::string, int64_t>> problem, plan;
};

// Whether the words contain all that is required.
template <class Words>
bool fits(const std::vector<std::pair<std::string, int64_t>>& asked, const Words& words) {
  return std::all_of(asked.begin(), asked.end(), [&](const auto& one) {
    return std::any_of(words.begin(), words.end(),
                       [&](const Word& word) { return word.name == one.first && word.value == one.second; });
  });
}
template <class Words>
bool has(const Words& words, const std::string& name) {
  return std::any_of(words.begin(), words.end(), [&](const Word& word) { return word.name == name; });
}

[[noreturn]] void refuse(const char* kind, const std::string& expected, const std::string& got) {
  throw std::invalid_argument(std::string(kind) + ": expected " + expected + ", got " + got);
}
const char* name_of(Rules kind) {
  return kind == Rules::forced ? "LOTR_CUDA_PLAN" : "measured plans";
}

Operator operator_of(const char* kind, const std::string& name, size_t count = std::size(OPERATOR_NAMES)) {
  std::string known;
  for (uint32_t i = 0; i < count; ++i) {
    if (name == OPERATOR_NAMES[i]) return Operator(i);
    known += (i ? ", " : "") + std::string(OPERATOR_NAMES[i]);
  }
  refuse(kind, "one of " + known, name.empty() ? "nothing" : name);
}

Rule rule_of(const char* kind, const std::string& text) {
  std::istringstream words(text);
  std::string word;
  words >> word;
  Rule rule{text, operator_of(kind, word), {}, {}};
  const std::vector<Word> plan_names = plan_words(rule.op);
  while (words >> word) {
    const size_t equals = word.find('=');
    const std::string name = word.substr(0, equals),
                      number = equals == std::string::npos ? "" : word.substr(equals + 1);
    const bool of_problem = has(words_of(Problem{}), name), of_plan = has(plan_names, name);
    if ((!of_problem && !of_plan) || number.empty() || number.size() > 12 ||
        number.find_first_not_of("0123456789") != std::string::npos)
      refuse(kind,
             "NAME=NUMBER with a name of " + names_of(words_of(Problem{})) + ", " + names_of(plan_names),
             word);
    int64_t value = 0;  // not by stoll, which would need the newest glibc
    std::from_chars(number.data(), number.data() + number.size(), value);
    (of_problem ? rule.problem : rule.plan).emplace_back(name, value);
  }
  return rule;
}

std::vector<Rule> rules_of(const char* kind, const std::string& text) {
  std::vector<Rule> rules;
  std::istringstream parts(text);
  for (std::string part; std::getline(parts, part, ';');)
    if (part.find_first_not_of(" \t\n") != std::string::npos) rules.push_back(rule_of(kind, part));
  return rules;
}

// The rules of both kinds, with the texts that they were made of.
struct AllRules {
  std::mutex mutex;
  std::string texts[2];
  std::vector<Rule> rules[2];

  AllRules() {
    const char* text = std::getenv("LOTR_CUDA_PLAN");
    rules[0] = rules_of(name_of(Rules::forced), text ? text : "");
    texts[0] = text ? text : "";
  }
};
AllRules& all_rules() {
  static AllRules rules;
  return rules;
}

// Moves the plan that the rules choose to the front.
void apply_rules(const Problem& problem, plan::Plans& plans) {
  AllRules& all = all_rules();
  const std::lock_guard<std::mutex> lock(all.mutex);
  for (const Rules kind : {Rules::forced, Rules::measured})
    for (const Rule& rule : all.rules[int(kind)]) {
      if (rule.op != problem.op || !fits(rule.problem, words_of(problem))) continue;
      const auto found = std::find_if(plans.begin(), plans.end(), [&](const plan::Plan& plan) {
        return fits(rule.plan, words_of(plan));
      });
      if (found != plans.end()) return void(std::rotate(plans.begin(), found, found + 1));
      if (kind == Rules::measured) continue;
      std::string known;
      for (size_t i = 0; i < std::min<size_t>(plans.size(), 4); ++i)
        known += (i ? "; " : "") + joined(words_of(plans[i]));
      refuse(name_of(kind),
             "a plan of " + std::string(OPERATOR_NAMES[int(problem.op)]) + " for " +
                 joined(words_of(problem)) + ", one of " + std::to_string(plans.size()) + ", as " + known,
             rule.text);
    }
}

// A number of a plan that is not chosen among candidates: the first rule's for the problem, else the usual
// one.
int64_t forced_or(const Problem& problem, const char* name, int64_t usual, int64_t most) {
  AllRules& all = all_rules();
  const std::lock_guard<std::mutex> lock(all.mutex);
  for (const Rule& rule : all.rules[int(Rules::forced)]) {
    if (rule.op != problem.op || !fits(rule.problem, words_of(problem))) continue;
    for (const auto& [word, value] : rule.plan) {
      if (word != name) continue;
      if (value >= 1 && value <= most) return value;
      refuse(name_of(Rules::forced),
             "a plan of " + std::string(OPERATOR_NAMES[int(problem.op)]) + " for " +
                 joined(words_of(problem)) + ", with " + name + " from 1 to " + std::to_string(most),
             rule.text);
    }
    break;
  }
  return usual;
}

plan::Machine machine_of(const Call& call) {
  plan::Machine machine;
  machine.card = call.card;
  machine.has_clusters = call.early, machine.clusters = call.in_clusters();
  machine.most_of_cluster = call.most_of_cluster;
  machine.cooperative = !call.off.together;
  return machine;
}

}  // namespace

plan::Plans plans_of(const Call& call, Operator op, int64_t M, int64_t N, int32_t r, bool wgmma) {
  const int element = element_size(call.type);
  const plan::Machine machine = machine_of(call);
  plan::Plans plans = op == Operator::shrink        ? plan::shrink(M, N, r, element, machine, wgmma)
                      : op == Operator::expand_add  ? plan::expand_add(M, N, r, element, machine)
                      : op == Operator::factor_grad ? plan::factor_grad(M, N, r, element, machine, wgmma)
                                                    : plan::shrink_grad(M, N, r, element, machine, wgmma);
  // Of few tokens shrink's blocks share one tile of rows, and the sum over them takes longer than x.
  const bool few_tokens = op == Operator::shrink && M <= kernels::SHRINK_LOW;
  plan::sort(plans, machine, few_tokens ? 0 : int64_t(machine.card.multiprocessors) * 8 / 10);
  apply_rules({op, M, N, r, element, call.card.multiprocessors}, plans);
  return plans;
}

plan::Plans plans_of(const Call& call, const std::string& op, int64_t M, int64_t N, int32_t r) {
  const Operator which = operator_of("operator", op, WITH_CANDIDATES);
  const bool grad = which == Operator::shrink_grad;
  return plans_of(
      call, which, M, N, r,
      grad ? wgmma_takes(call, r, kernels::SHRINK_GRAD_WGMMA_RANK, M, kernels::SHRINK_GRAD_WGMMA_ROWS)
           : wgmma_takes(call, r, kernels::ONE_PRODUCT_WGMMA_RANK, M, kernels::ONE_PRODUCT_WGMMA_ROWS));
}

plan::GemmLotr gemm_lotr_plan(const Call& call, int64_t M, int64_t N, int32_t r) {
  const int multiprocessors = call.card.multiprocessors;
  const Problem problem{Operator::gemm_lotr, M, N, r, element_size(call.type), multiprocessors};
  const int cluster = int(forced_or(problem, "cluster", M > 128 && !call.off.cluster ? 2 : 1,
                                    call.off.cluster || multiprocessors < 2 ? 1 : 2));
  plan::GemmLotr plan = plan::gemm_lotr(M, N, r, cluster, multiprocessors);
  const int64_t bands = std::max<int64_t>(1, plan::gemm_lotr_bands(M, cluster));
  plan.scouts = int(forced_or(problem, "scouts", plan.scouts, bands));
  plan.band_group = int(forced_or(problem, "band_group", plan.band_group, bands));
  return plan;
}

plan::FoldGrad fold_grad_plan(const Call& call, int64_t L, int64_t N, int32_t r_in, int32_t r_out, bool dB) {
  const int multiprocessors = call.card.multiprocessors;
  plan::FoldGrad plan = plan::fold_grad(N, L, r_in, r_out, dB, multiprocessors);
  const Problem problem{Operator::fold_grad, L, N, r_in, 4, multiprocessors};
  const int64_t splits = forced_or(problem, "splits", plan.splits, plan::ceil_div(N, 32));
  if (splits != plan.splits) plan.splits = int(splits), plan.n_per_split = plan::ceil_div(N, splits);
  return plan;
}

plan::ScaleBackward scale_backward_plan(const Call& call, int64_t M, int64_t N) {
  const int element = element_size(call.type), multiprocessors = call.card.multiprocessors;
  plan::ScaleBackward plan = plan::scale_backward(M, N, size_t(element), multiprocessors);
  plan.splits = forced_or({Operator::scale_backward, M, N, 0, element, multiprocessors}, "splits",
                          plan.splits, plan.m_tiles);
  return plan;
}

plan::RowCoreGrad row_core_grad_plan(const Call& call, int64_t rows, int64_t cores, int32_t r_in,
                                     int32_t r_out) {
  const int multiprocessors = call.card.multiprocessors;
  plan::RowCoreGrad plan = plan::row_core_grad(rows, cores, r_in, r_out, multiprocessors);
  const Problem problem{Operator::row_core_grad, rows, cores, r_in, element_size(call.type), multiprocessors};
  plan.splits =
      int(forced_or(problem, "splits", plan.splits, std::max<int64_t>(1, plan::ceil_div(rows, 32))));
  return plan;
}

std::vector<PrintedPlan> printed_plans(const Call& call, const std::string& op, int64_t M, int64_t N,
                                       int32_t r, int32_t r_out) {
  const Operator which = operator_of("operator", op);
  if (which == Operator::gemm_lotr) {
    const plan::GemmLotr plan = gemm_lotr_plan(call, M, N, r);
    const int64_t held = call.card.multiprocessors / plan.cluster * plan.cluster;
    return {{joined(words_of(plan)), held, 0}};
  }
  const auto split = [](int64_t splits, int64_t blocks) {
    return std::vector<PrintedPlan>{{joined(words_of_splits(splits)), blocks, 0}};
  };
  if (which == Operator::fold_grad) {
    const plan::FoldGrad plan = fold_grad_plan(call, M, N, r, r_out, true);
    return split(plan.splits, plan.dB_blocks + plan.core_tiles * plan.splits);
  }
  if (which == Operator::scale_backward) {
    const plan::ScaleBackward plan = scale_backward_plan(call, M, N);
    return split(plan.splits, plan.n_tiles * plan.splits);
  }
  if (which == Operator::row_core_grad) {
    const plan::RowCoreGrad plan = row_core_grad_plan(call, M, N, r, r_out);
    return split(plan.splits, plan.core_tiles * plan.splits);
  }
  std::vector<PrintedPlan> printed;
  for (const plan::Plan& plan : plans_of(call, op, M, N, r))
    printed.push_back({text_of(plan), plan.m_blocks * plan.n_blocks, plan.microseconds});
  return printed;
}

std::string set_rules(Rules kind, const std::string& text) {
  std::vector<Rule> rules = rules_of(name_of(kind), text);
  AllRules& all = all_rules();
  std::string old = text;
  {
    const std::lock_guard<std::mutex> lock(all.mutex);
    std::swap(all.rules[int(kind)], rules);
    std::swap(all.texts[int(kind)], old);
  }
  remembered().forget();
  return old;
}

std::string text_of(const plan::Plan& plan) {
  return joined(words_of(plan));
}

}  // namespace lotr::cuda
