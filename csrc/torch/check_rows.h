// The checks of row_core and its backward, shared by the CPU and the CUDA front ends. What the indices hold
// only the CPU looks at: on a GPU that would wait for it.
#pragma once

#include "check.h"

namespace lotr {

// Rows that have a core: by index or by the ends of each core's rows, of a token or each of its own.
struct RowArgs {
  std::optional<Arg> index, offs, tokens;

  RowArgs(const OptionalTensor& index, const OptionalTensor& offs, const OptionalTensor& tokens)
      : index(optional_arg("index", index)),
        offs(optional_arg("offs", offs)),
        tokens(optional_arg("tokens", tokens)) {}
};

struct RowSizes {
  int64_t rows, m, cores, r_in, r_out;
};

// g: that of the backward.
inline RowSizes check_row_core(const char* op, const Arg* g, const Arg& u, const Arg& cores,
                               const RowArgs& by, double scaling) {
  const Check c{op};
  c.arguments({g, &u, &cores, pointer(by.index), pointer(by.offs), pointer(by.tokens)});
  c.dims(u, 2, "[m, r_in]"), c.dims(cores, 3, "[c, r_in, r_out]");
  c.supported(u), c.factor(cores, u.dtype);
  c.positive(u, 1, "r_in"), c.positive(cores, 0, "c"), c.positive(cores, 2, "r_out");
  c.size(cores, 1, u.size[1], "r_in, as in u"), c.finite("scaling", scaling);
  if (by.index.has_value() == by.offs.has_value())
    fail(op, ": index, offs: expected exactly one of them, got ", by.index ? "both" : "none");
  const RowSizes s{by.tokens && by.tokens->dim == 1 ? by.tokens->size[0] : u.size[0], u.size[0],
                   cores.size[0], cores.size[1], cores.size[2]};
  const auto integers = [&](const std::optional<Arg>& a, ScalarType dtype, int64_t size, const char* what) {
    if (a) c.dims(*a, 1, what), c.dtype(*a, dtype), c.size(*a, 0, size, what);
  };
  integers(by.tokens, ScalarType::Long, s.rows, "rows");
  integers(by.index, ScalarType::Long, s.rows, by.tokens ? "rows, as in tokens" : "rows, as in u");
  integers(by.offs, ScalarType::Int, s.cores, "one end a core");
  if (g) {
    c.dims(*g, 2, "[rows, r_out]"), c.dtype(*g, u.dtype);
    c.size(*g, 0, s.rows, "rows"), c.size(*g, 1, s.r_out, "r_out, as in cores");
  }
  return s;
}

}  // namespace lotr
