// Implements plans.h: parses LOTR_CUDA_PLAN, then replaces the numbers of a plan (plan.h) that the
// text has, and refuses a plan that the kernel cannot run.
#include "plans.h"

#include <charconv>
#include <cstdlib>
#include <map>
#include <sstream>
#include <stdexcept>
#include <tuple>

namespace lotr::cuda {
namespace {

using Words = std::map<std::string, int64_t>;  // NAME=NUMBER of one kernel
constexpr const char* NAMES[] = {"shrink",      "expand_add", "factor_grad",  // as in Kernel
                                 "shrink_grad", "fold_grad",  "row_core_grad"};
constexpr size_t TILED_KERNELS = 4;  // the first of them: their plan is a plan::Plan
static_assert(size_t(Kernel::shrink_grad) + 1 == TILED_KERNELS);
constexpr const char* ALL_LAUNCHES = "";  // in place of a kernel, for words without one

// What determines the plan of a tiled kernel.
struct Shape {
  int64_t M, N;  // of the large matrix
  int32_t r;
  int element;  // bytes
  Card card;

  auto key() const { return std::tuple(M, N, r, element, card.multiprocessors, card.shared); }
};

// ---- LOTR_CUDA_PLAN ----

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
  return std::find(NAMES, NAMES + TILED_KERNELS, kernel) != NAMES + TILED_KERNELS;
}

// Whether a kernel's plan has a number of this name.
bool has_word(const std::string& kernel, const std::string& name) {
  if (kernel == ALL_LAUNCHES) return name == "early";
  if (!has_tiles(kernel)) return name == "splits";
  return name == "rows" || name == "cols" || name == "m_blocks" || name == "n_blocks";
}

// The words of each kernel.
std::map<std::string, Words> parse(const std::string& text) {
  std::map<std::string, Words> words_of;
  std::istringstream parts(text);
  for (std::string part; std::getline(parts, part, ';');) {
    std::istringstream words(part);
    std::string kernel = ALL_LAUNCHES;
    std::string word;
    while (words >> word) {
      if (kernel == ALL_LAUNCHES && word.find('=') == std::string::npos) {
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

// The words of a kernel, which is a name or ALL_LAUNCHES.
const Words& overrides(const std::string& kernel) {
  static const std::map<std::string, Words> all = [] {
    const char* text = std::getenv("LOTR_CUDA_PLAN");
    return parse(text ? text : "");
  }();
  static const Words none;
  const auto words = all.find(kernel);
  return words == all.end() ? none : words->second;
}

// If the words have a number of this name, which must be from 1 to `limit`, it replaces `value`.
template <class Integer>
void replace(const Words& words, const char* name, Integer& value, int64_t limit) {
  const auto word = words.find(name);
  if (word == words.end()) return;
  if (word->second < 1 || word->second > limit)
    refuse(std::string(name) + " from 1 to " + std::to_string(limit), std::to_string(word->second));
  value = Integer(word->second);
}

// ---- the kernels with tiles ----

plan::Plan default_plan(Kernel kernel, const Shape& shape) {
  const auto& [M, N, r, element, card] = shape;
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

// Returns whether the kernel is compiled for `tile`. shrink has two heights of tiles, factor_grad
// two widths. That extent decides the other one, which is set unless the words give it.
bool complete_tile(const Words& words, Kernel kernel, const Shape& shape, plan::Plan& tile) {
  const int R = plan::padded_rank(shape.r);
  const auto element = size_t(shape.element);
  if (kernel == Kernel::shrink) {
    const int cols = kernels::shrink_cols(element, R, tile.rows);
    if (!words.count("cols")) tile.cols = cols;
    return tile.cols == cols &&
           (tile.rows == kernels::SHRINK_LOW || tile.rows == kernels::shrink_tall(R));
  }
  if (kernel == Kernel::factor_grad) {
    const int rows = kernels::factor_grad_rows(element, R, tile.cols);
    if (!words.count("rows")) tile.rows = rows;
    return tile.rows == rows && (tile.cols == kernels::factor_grad_narrow(R) ||
                                 tile.cols == kernels::factor_grad_wide(R));
  }
  return false;
}

// Replaces the plan's tile by the one that the words give, if the kernel is compiled for it.
void replace_tile(const Words& words, Kernel kernel, const Shape& shape, plan::Plan& plan) {
  plan::Plan other = plan;
  replace(words, "rows", other.rows, 1 << 20);
  replace(words, "cols", other.cols, 1 << 20);
  if (other.rows == plan.rows && other.cols == plan.cols) return;
  const std::string got = std::to_string(other.rows) + " x " + std::to_string(other.cols);
  if (!complete_tile(words, kernel, shape, other))
    refuse("a tile that the kernel is compiled for, as " + std::to_string(plan.rows) + " x " +
               std::to_string(plan.cols),
           got);
  plan = other;
  plan.m_tiles = plan::ceil_div(shape.M, plan.rows);
  plan.n_tiles = plan::ceil_div(shape.N, plan.cols);
}

// The most tiles of a block: row tiles for shrink, column tiles for the others.
int64_t max_tiles_of_block(Kernel kernel, const Shape& shape, const plan::Plan& plan) {
  const int R = plan::padded_rank(shape.r);
  const auto element = size_t(shape.element);
  switch (kernel) {
    case Kernel::shrink:
      return kernels::shrink_subs(R, plan.rows);
    case Kernel::expand_add:
      return kernels::expand_subs(element, R);
    case Kernel::factor_grad:
      return kernels::factor_grad_subs(R, plan.cols);
    default:
      return kernels::shrink_grad_subs(element, R);
  }
}

// The plan of plan.h with the words of LOTR_CUDA_PLAN.
plan::Plan overridden_plan(Kernel kernel, const Shape& shape) {
  plan::Plan plan = default_plan(kernel, shape);
  const Words& words = overrides(NAMES[int(kernel)]);
  if (words.empty()) return plan;
  replace_tile(words, kernel, shape, plan);
  replace(words, "m_blocks", plan.m_blocks, plan.m_tiles);
  replace(words, "n_blocks", plan.n_blocks, plan.n_tiles);
  // A block of shrink keeps sums for all its row tiles, the others keep sums or rows of F for all
  // their column tiles.
  const bool keeps_rows = kernel == Kernel::shrink;
  const int64_t tiles = keeps_rows ? plan.m_tiles : plan.n_tiles;
  const int64_t blocks = keeps_rows ? plan.m_blocks : plan.n_blocks;
  const int64_t limit = max_tiles_of_block(kernel, shape, plan);
  if (plan::ceil_div(tiles, blocks) > limit)
    refuse("at least " + std::to_string(plan::ceil_div(tiles, limit)) +
               (keeps_rows ? " m_blocks" : " n_blocks") + " of " + NAMES[int(kernel)],
           std::to_string(blocks));
  return plan;
}

// ---- the kernels with splits ----

plan::Split with_splits(const char* kernel, plan::Split plan, int64_t limit) {
  replace(overrides(kernel), "splits", plan.splits, limit);
  return plan;
}

}  // namespace

bool early_launches() {
  const Words& words = overrides(ALL_LAUNCHES);
  const auto word = words.find("early");
  return word == words.end() || word->second != 0;
}

plan::Plan plan_of(const Call& call, Kernel kernel, int64_t M, int64_t N, int32_t r) {
  // Each kernel's latest plan is kept: a call plans twice, for its workspace and for its launches,
  // and consecutive layers often have the same shape.
  struct Latest {
    Shape shape;
    plan::Plan plan;
  };
  static thread_local Latest of_kernel[TILED_KERNELS] = {};
  Latest& latest = of_kernel[int(kernel)];
  const Shape shape{M, N, r, element_size(call.type), call.card};
  if (latest.shape.key() != shape.key()) latest = {shape, overridden_plan(kernel, shape)};
  return latest.plan;
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
