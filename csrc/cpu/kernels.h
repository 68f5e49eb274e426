// The CPU kernels' interface: plain pointers and sizes. It includes no torch header: an inline
// function that table.cpp, compiled once for each instruction set, shared with other files could be
// linked in its version for a newer CPU.
//
// m tokens, k in, n out, r rank, l layer. Strides count elements. T is the activations' type; sums
// are float (double for f64).
#pragma once

#include <cstdint>

namespace lotr::cpu {

enum class Dtype : uint8_t { f32, f64, bf16, f16 };

// A matrix [rows, cols] with any strides. Kernels that only read one do not write it.
struct Mat {
  void* data = nullptr;  // null: the optional argument is not given
  int64_t rows = 0, cols = 0;
  int64_t rs = 0, cs = 0;  // row and column stride
  Dtype dtype = Dtype::f32;
};

// Dropout of a matrix: element e = i * cols + j is kept iff philox(seed, e / 4)[e % 4] >=
// threshold, and scaled.
struct Drop {
  bool on = false;
  uint32_t threshold = 0;  // p * 2^32
  double scale = 1.0;      // 1 / (1 - p)
  uint64_t seed = 0;
};

// What an expand adds to: y as it lies there, or (fresh) nothing, whatever y holds; and bias [1, n]
// in every row, where there is one.
struct Start {
  bool fresh = false;
  Mat bias;
};

// Rows by what they have in common: group j, of key[j], has the rows row[first[j]] .. row[first[j +
// 1] - 1], in ascending order.
struct Groups {
  const int64_t *row, *key, *first;
  int64_t count;
};

struct SmallBackward {
  Mat dx, g, x, u, A, core, B, dA, dB, dcore;
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
