// The table of operators of one element type, compiled for one instruction set. CMakeLists.txt
// compiles this file once for each pair of them and defines LOTR_TYPE (f32, f64, bf16, f16),
// LOTR_ISA (the set's name) and LOTR_VB (bytes of a vector).
#include "cpu/rows.h"

#define LOTR_TABLE_(isa, type) table_##isa##_##type
#define LOTR_TABLE(isa, type) LOTR_TABLE_(isa, type)

namespace lotr::cpu {
namespace LOTR_ISA {

using f32 = float;
using f64 = double;
using T = LOTR_TYPE;

}  // namespace LOTR_ISA

extern const Table LOTR_TABLE(LOTR_ISA, LOTR_TYPE);
const Table LOTR_TABLE(LOTR_ISA, LOTR_TYPE) = [] {
  using namespace LOTR_ISA;
  return Table{
#define LOTR_OPERATOR(name, code, dtype, parameters, arguments) code,
#include "cpu/operators.def"
#undef LOTR_OPERATOR
  };
}();

}  // namespace lotr::cpu
