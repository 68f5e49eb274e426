// The CPU kernels' interface: plain pointers and sizes, no torch types, so that the files compiled once for
// each instruction set include nothing that could be shared (and miscompiled for an older CPU) between them.
//
// m tokens, k in, n out, r rank, l layer. Strides count elements. T is the activations' type; sums are float
// (double for f64).
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

// Dropout of a matrix: element e = i * cols + j is kept iff philox(seed, e / 4)[e % 4] >= threshold, and
// scaled.
struct Drop {
  bool on = false;
  uint32_t threshold = 0;  // p * 2^32
  double scale = 1.0;      // 1 / (1 - p)
  uint64_t seed = 0;
};

// What an expand adds to: y as it lies there, or (fresh) nothing, whatever y holds; and bias [1, n] in every
// row, where there is one.
struct Start {
  bool fresh = false;
  Mat bias;
};

// Rows by what they have in common: group j, of key[j], has the rows row[first[j]] .. row[first[j + 1] - 1],
// in ascending order.
struct Groups {
  const int64_t *row, *key, *first;
  int64_t count;
};

struct SmallBackward {
  Mat dx, g, x, u, A, core, B, dA, dB, dcore;
  double scaling = 1.0;
  bool fresh_dx = false, fresh_dA = false, fresh_dB = false;  // written, not added to
};

// The operators. Equations and shapes are those of the schemas in torch/cpu_operators.cpp. A factor's or
// core's gradient that is not added to (fresh, or without `add`) may have any dtype, and is rounded to it
// once.
void shrink(const Mat& u, const Mat& x, const Mat& A, const Drop& drop);
void expand_add(const Mat& y, const Mat& u, const Mat& F, const Drop& drop, const Start& start);
void factor_grad(const Mat& acc, const Mat& x, const Mat& k, const Drop& drop, bool add);
void shrink_grad(const Mat& k, const Mat& Q, const Mat& g, const Mat& F, const Mat& u, bool add);
// F, cores, Q and dcores hold l matrices, each at `data` plus its index times the layer stride.
void fold(const Mat& F, int64_t F_ls, const Mat& B, const Mat& cores, int64_t cores_ls, int64_t l,
          double scaling);
void fold_grad(const Mat& dB, const Mat& dcores, int64_t dcores_ls, const Mat& Q, int64_t Q_ls, const Mat& B,
               const Mat& cores, int64_t cores_ls, int64_t l, double scaling, bool add);
// out += a, of one dtype.
void add(const Mat& out, const Mat& a);
void small_forward(const Mat& u, const Mat& y, const Mat& x, const Mat& A, const Mat& core, const Mat& B,
                   double scaling, const Start& start);
void small_backward(const SmallBackward& s);
// h_i = scaling u_t(i) G_c(i) for the rows of each group, whose key is their core; t(i) = token[i], or i
// where that is null. h [rows, r_out] and k have contiguous rows; cores and dcores are as in fold.
void row_core(const Mat& h, const Mat& u, const int64_t* token, const Mat& cores, int64_t cores_ls,
              const Groups& by_core, double scaling);
// dG_c = scaling sum of u_t(i)^T g_i over the rows of c, of the cores that have rows.
void row_core_grad(const Mat& dcores, int64_t dcores_ls, const Mat& g, const Mat& u, const int64_t* token,
                   const Groups& by_core, double scaling);
// du_t = sum of k_i over the rows of each group, whose key is their token; k is in the type of sums.
void sum_rows(const Mat& du, const Mat& k, const Groups& by_token);

const char* isa_name();

}  // namespace lotr::cpu
