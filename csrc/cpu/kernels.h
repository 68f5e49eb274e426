// The interface of the CPU kernels: plain pointers and sizes, without torch headers. table.cpp is
// compiled for several instruction sets. If it shared an inline function with other files, the
// linker could keep the copy for a newer CPU, which an older one cannot run.
//
// m tokens, k in_features, n out_features, r rank. Strides count elements. T is the activations'
// type; sums are float (double for f64).
#pragma once

#include <cstdint>

#include "tensor_view.h"

namespace lotr::cpu {

// Dropout of a matrix: element e = i * cols + j is kept iff philox(seed, e / 4)[e % 4] >=
// threshold, and scaled.
struct Drop {
  bool on = false;
  uint32_t threshold = 0;  // p * 2^32
  double scale = 1.0;      // 1 / (1 - p), or without dropout any factor (scaled_by)
  uint64_t seed = 0;
};

// What an expand starts from: a matrix [m, n] of y's dtype, which is y itself, does not overlap y,
// or is absent (zeros); and a bias [1, n] that is added to each row, unless it is absent.
struct Start {
  TensorView matrix;
  TensorView bias;
};

// Rows grouped by a key. Group j has the key key[j], and the rows row[first[j]] ..
// row[first[j + 1] - 1], in ascending order.
struct Groups {
  const int64_t* row;
  const int64_t* key;
  const int64_t* first;
  int64_t count;
};

// The few-token form of a layer's backward. Absent gradients are not needed.
struct FewTokensBackward {
  TensorView dx, g, x, u, A, core, B, dA, dB, dcore;
  double scaling = 1.0;
  bool fresh_dx = false, fresh_dA = false, fresh_dB = false;  // written, not added to
};

#define LOTR_OPERATOR(name, code, dtype, parameters, arguments) void name parameters;
#include "cpu/operators.def"
#undef LOTR_OPERATOR

// The operators of one element type, compiled for one instruction set.
struct Table {
#define LOTR_OPERATOR(name, code, dtype, parameters, arguments) void(*name) parameters;
#include "cpu/operators.def"
#undef LOTR_OPERATOR
};

// The instruction set that runs.
const char* isa_name();

}  // namespace lotr::cpu
