// Picks the instruction set once, when an operator first runs: the best one of this build that this
// machine runs, or a lower one that LOTR_CPU_ISA names (generic, avx2, avx512, avx512_bf16,
// amx_bf16; for tests).
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"
#include "cpu/supported.h"

namespace lotr::cpu {

// CMakeLists.txt writes cpu_sets.def: LOTR_CPU_NOTE, a hint that ends errors, and for each set of
// this build, ascending, LOTR_SET with the set that each element type's table is compiled for.
#define LOTR_SET(set, f32, f64, bf16, f16) \
  extern const Table table_##f32##_f32, table_##f64##_f64, table_##bf16##_bf16, table_##f16##_f16;
#include "cpu_sets.def"
#undef LOTR_SET

namespace {

struct Set {
  const char* name;
  bool (*runs)();
  const Table* tables[4];  // in the order of DType
};
const Set kSets[] = {
#define LOTR_SET(set, f32, f64, bf16, f16) \
  {#set,                                   \
   &runs_##set,                            \
   {&table_##f32##_f32, &table_##bf16##_bf16, &table_##f16##_f16, &table_##f64##_f64}},
#include "cpu_sets.def"
#undef LOTR_SET
};
static_assert(int(DType::float32) == 0 && int(DType::bfloat16) == 1 && int(DType::float16) == 2 &&
              int(DType::float64) == 3);

const Set* choose() {
  const char* forced = std::getenv("LOTR_CPU_ISA");
  const Set* best = nullptr;
  std::string names;
  for (const Set& set : kSets) {
    if (!set.runs()) continue;
    if (forced && std::string(forced) == set.name) return &set;
    best = &set;
    names += (names.empty() ? "" : ", ") + std::string(set.name);
  }
  if (forced && *forced)
    throw std::runtime_error("LOTR_CPU_ISA: expected one of " + names +
                             " (what this CPU runs), got " + forced + LOTR_CPU_NOTE);
  if (!best)
    throw std::runtime_error(
        "lotr_ext: expected a build for this CPU, got one for newer CPUs" LOTR_CPU_NOTE);
  return best;
}

const Set& set() {
  static const Set* chosen = choose();
  return *chosen;
}

// The dtype that fold multiplies in: what all operands share, or the dtype of sums (fold_as).
DType fold_dtype(const TensorView& F, const TensorView& B, const TensorView& core) {
  const bool alike = B.dtype == F.dtype && core.dtype == F.dtype;
  return alike || F.dtype == DType::float64 ? F.dtype : DType::float32;
}

}  // namespace

#define LOTR_OPERATOR(name, code, dtype, parameters, arguments) \
  void name parameters {                                        \
    set().tables[int(dtype)]->name arguments;                   \
  }
#include "cpu/operators.def"
#undef LOTR_OPERATOR

const char* isa_name() {
  return set().name;
}

}  // namespace lotr::cpu
