// Implements plans.h.
#include "plans.h"

#include <charconv>
#include <cstdlib>
#include <map>
#include <sstream>
#include <stdexcept>
#include <tuple>

namespace lotr::cuda {
namespace {

using Words = std::map<std::string, int64_t>;
constexpr const char* NAMES[] = {"shrink",      "expand_add", "factor_grad",
                                 "shrink_grad", "fold_grad",  "row_core_grad"};
constexpr size_t WITH_TILES = 4;  // kernels whose plan is a plan::Plan

[[noreturn]] void refuse(const std::string& expected, const std::string& got) {
  throw std::invalid_argument("LOTR_CUDA_PLAN: expected " + expected + ", got " + got);
}

// The name and the number of NAME=NUMBER.
std::pair<std::string, int64_t> word_of(const std::string& text) {
  const size_t equals = text.find('=');
  int64_t value = -1;  // by from_chars, because stoll would need the newest glibc
  if (equals != std::string::npos) {
    const char* end = text.data() + text.size();
    if (std::from_chars(text.data() + equals + 1, end, value).ptr != end) value = -1;
  }
  if (value < 0) refuse("a kernel, then words NAME=NUMBER", text);
  return {text.substr(0, equals), value};
}

bool has_tiles(const std::string& kernel) {
  return std::find(NAMES, NAMES + WITH_TILES, kernel) != NAMES + WITH_TILES;
}

// Whether a kernel's plan has this number. The kernel "" stands for all launches.
bool has_word(const std::string& kernel, const std::string& name) {
  if (kernel.empty()) return name == "early";
  if (!has_tiles(kernel)) return name == "splits";
  return name == "rows" || name == "cols" || name == "m_blocks" || name == "n_blocks";
}

// The words of each kernel. The words of "" belong to all launches.
std::map<std::string, Words> parse(const std::string& text) {
  std::map<std::string, Words> words_of;
  std::istringstream parts(text);
  for (std::string part; std::getline(parts, part, ';');) {
    std::istringstream words(part);
    std::string kernel, word;
    while (words >> word) {
      if (kernel.empty() && word.find('=') == std::string::npos) {
        if (std::find(std::begin(NAMES), std::end(NAMES), word) == std::end(NAMES))
          refuse("shrink, expand_add, factor_grad, shrink_grad, fold_grad or row_core_grad", word);
        kernel = word;
        continue;
      }
      const auto [name, value] = word_of(word);
      if (!has_word(kernel, name))
        refuse("rows, cols, m_blocks, n_blocks, splits or early, as the kernel has them", word);
      words_of[kernel][name] = value;
    }
  }
  return words_of;
}

const Words& overrides(const std::string& kernel) {
  static const std::map<std::string, Words> all = [] {
    const char* text = std::getenv("LOTR_CUDA_PLAN");
    return parse(text ? text : "");
  }();
  static const Words none;
  const auto words = all.find(kernel);
  return words == all.end() ? none : words->second;
}

// Replaces `value` by the word `name`, which is from 1 to most.
template <class Integer>
void replace(const Words& words, const char* name, Integer& value, int64_t most) {
  const auto word = words.find(name);
  if (word == words.end()) return;
  if (word->second < 1 || word->second > most)
    refuse(std::string(name) + " from 1 to " + std::to_string(most), std::to_string(word->second));
  value = Integer(word->second);
}

// Replaces the tile by another one that the kernel is compiled for.
void replace_tile(const Words& words, Kernel kernel, int R, int element, int64_t M, int64_t N,
                  plan::Plan& plan) {
  if (!words.count("rows") && !words.count("cols")) return;
  plan::Plan other = plan;
  replace(words, "rows", other.rows, 1 << 20);
  replace(words, "cols", other.cols, 1 << 20);
  bool is_compiled = other.rows == plan.rows && other.cols == plan.cols;
  if (kernel == Kernel::shrink && !words.count("cols")) {
    is_compiled |= other.rows == kernels::SHRINK_LOW || other.rows == kernels::shrink_tall(R);
    if (is_compiled) other.cols = kernels::shrink_cols(size_t(element), R, other.rows);
  }
  if (kernel == Kernel::factor_grad && !words.count("rows")) {
    is_compiled |=
        other.cols == kernels::factor_grad_narrow(R) || other.cols == kernels::factor_grad_wide(R);
    if (is_compiled) other.rows = kernels::factor_grad_rows(size_t(element), R, other.cols);
  }
  if (!is_compiled)
    refuse("a tile that the kernel is compiled for, as " + std::to_string(plan.rows) + " x " +
               std::to_string(plan.cols),
           std::to_string(other.rows) + " x " + std::to_string(other.cols));
  plan = other;
  plan.m_tiles = plan::ceil_div(M, plan.rows);
  plan.n_tiles = plan::ceil_div(N, plan.cols);
}

// The most column tiles that a block can have; of shrink, row tiles.
int64_t most_tiles(Kernel kernel, int R, int element, const plan::Plan& plan) {
  switch (kernel) {
    case Kernel::shrink:
      return kernels::shrink_subs(R, plan.rows);
    case Kernel::expand_add:
      return kernels::expand_subs(size_t(element), R);
    case Kernel::factor_grad:
      return kernels::factor_grad_subs(R, plan.cols);
    default:
      return kernels::shrink_grad_subs(size_t(element), R);
  }
}

plan::Split with_splits(const char* kernel, plan::Split plan, int64_t most) {
  replace(overrides(kernel), "splits", plan.splits, most);
  return plan;
}

plan::Plan default_plan(const Card& card, Kernel kernel, int64_t M, int64_t N, int32_t r,
                        int element) {
  switch (kernel) {
    case Kernel::shrink:
      return plan::shrink(card, M, N, r, element);
    case Kernel::expand_add:
      return plan::expand_add(card, M, N, r, element);
    case Kernel::factor_grad:
      return plan::factor_grad(card, M, N, r, element);
    default:
      return plan::shrink_grad(card, M, N, r, element);
  }
}

// The plan of plan.h with the words of LOTR_CUDA_PLAN.
plan::Plan overridden_plan(const Call& call, Kernel kernel, int64_t M, int64_t N, int32_t r) {
  const int element = element_size(call.type);
  const int R = plan::padded_rank(r);
  plan::Plan plan = default_plan(call.card, kernel, M, N, r, element);
  const Words& words = overrides(NAMES[int(kernel)]);
  if (words.empty()) return plan;
  replace_tile(words, kernel, R, element, M, N, plan);
  replace(words, "m_blocks", plan.m_blocks, plan.m_tiles);
  replace(words, "n_blocks", plan.n_blocks, plan.n_tiles);
  const bool along_m = kernel == Kernel::shrink;
  const int64_t tiles = along_m ? plan.m_tiles : plan.n_tiles;
  const int64_t blocks = along_m ? plan.m_blocks : plan.n_blocks;
  const int64_t most = most_tiles(kernel, R, element, plan);
  if (plan::ceil_div(tiles, blocks) > most)
    refuse("at least " + std::to_string(plan::ceil_div(tiles, most)) +
               (along_m ? " m_blocks" : " n_blocks") + " of " + NAMES[int(kernel)],
           std::to_string(blocks));
  return plan;
}

}  // namespace

bool early_launches() {
  const auto word = overrides("").find("early");
  return word == overrides("").end() || word->second != 0;
}

plan::Plan plan_of(const Call& call, Kernel kernel, int64_t M, int64_t N, int32_t r) {
  // The last plan of each kernel is kept: a call plans twice, for its workspace and for its
  // launches, and consecutive layers often have one shape.
  struct Last {
    int64_t M, N;
    int32_t r, element;
    Card card;
    plan::Plan plan;
  };
  static thread_local Last plans[WITH_TILES] = {};
  Last& last = plans[int(kernel)];
  const int element = element_size(call.type);
  const auto key = [](int64_t m, int64_t n, int32_t rank, int32_t bytes, const Card& card) {
    return std::tuple(m, n, rank, bytes, card.multiprocessors, card.shared);
  };
  if (key(last.M, last.N, last.r, last.element, last.card) != key(M, N, r, element, call.card))
    last = {M, N, r, element, call.card, overridden_plan(call, kernel, M, N, r)};
  return last.plan;
}

plan::Split fold_grad_plan(const Call& call, int64_t N, int32_t r_in, int32_t r_out) {
  return with_splits("fold_grad", plan::fold_grad(call.card, N, r_in, r_out),
                     plan::ceil_div(N, 32));
}

plan::Split row_core_grad_plan(const Call& call, int64_t rows, int64_t cores, int32_t r_in,
                               int32_t r_out) {
  return with_splits("row_core_grad", plan::row_core_grad(call.card, rows, cores, r_in, r_out),
                     std::max<int64_t>(1, plan::ceil_div(rows, 32)));
}

std::string plan_text(const Call& call, const std::string& kernel, int64_t M, int64_t N, int32_t r,
                      int32_t r_out) {
  const auto* name = std::find(std::begin(NAMES), std::end(NAMES), kernel);
  std::ostringstream text;
  if (has_tiles(kernel)) {
    const plan::Plan plan = plan_of(call, Kernel(name - NAMES), M, N, r);
    text << kernel << " rows=" << plan.rows << " cols=" << plan.cols
         << " m_blocks=" << plan.m_blocks << " n_blocks=" << plan.n_blocks << ": "
         << plan.m_blocks * plan.n_blocks << " blocks";
    return text.str();
  }
  if (name == std::end(NAMES))
    throw std::invalid_argument(
        "op: expected shrink, expand_add, factor_grad, shrink_grad, fold_grad or "
        "row_core_grad, got " +
        kernel);
  const plan::Split plan = kernel == "fold_grad" ? fold_grad_plan(call, N, r, r_out)
                                                 : row_core_grad_plan(call, M, N, r, r_out);
  text << kernel << " splits=" << plan.splits << ": " << plan.tiles * plan.splits
       << " blocks for the gradient of the cores";
  return text.str();
}

}  // namespace lotr::cuda
