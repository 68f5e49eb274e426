// Per-row cores: h_i = s u_t(i) G_c(i) and its gradients, by groups of rows that have the same
// core, or the same token.
//
// A group is one dense product of operators.h. It reads the group's rows in place if they are
// consecutive, as the rows of an expert are, and a copy otherwise. A group of a few rows, as with
// many tasks, is multiplied with the core in place. A long group is divided every kRowsOfGroup rows
// from its first one, and each sum runs in the order of its rows, so the number of threads changes
// no bit. (Another kRowsOfGroup could: compilers fuse multiply and add for some block sizes only.)
#pragma once

#include "cpu/core_products.h"

namespace lotr::cpu::LOTR_ISA {

// Rows of a group that one thread copies and multiplies at a time.
constexpr int64_t kRowsOfGroup = 2 * kTileRows;
// Up to this many rows of a group, a product's preparations cost more than the product.
constexpr int64_t kShortGroup = 4;

// The row of u or g that row i of a group reads.
inline int64_t source(const int64_t* row, const int64_t* token, int64_t i) {
  return token ? token[row[i]] : row[i];
}
inline bool consecutive(const int64_t* row, const int64_t* token, int64_t n) {
  for (int64_t i = 1; i < n; ++i)
    if (source(row, token, i) != source(row, token, i - 1) + 1) return false;
  return true;
}

// Rows of `a` as one matrix, whose row i is row source(row, token, i) of `a`.
template <typename T>
struct Gathered {
  TensorView matrix;
  Scratch memory;

  Gathered(const TensorView& a, const int64_t* row, const int64_t* token, int64_t n)
      : matrix(a), memory(consecutive(row, token, n) ? 0 : size_t(n * a.cols) * sizeof(T)) {
    matrix.rows = n;
    if (consecutive(row, token, n)) {
      matrix.data = static_cast<T*>(a.data) + source(row, token, 0) * a.row_stride;
      return;
    }
    T* to = memory.template get<T>();
    matrix.data = to;
    matrix.row_stride = a.cols;
    matrix.col_stride = 1;
    for (int64_t i = 0; i < n; ++i, to += a.cols) {
      const T* from = static_cast<const T*>(a.data) + source(row, token, i) * a.row_stride;
      for (int64_t j = 0; j < a.cols; ++j) to[j] = from[j * a.col_stride];
    }
  }
};

template <typename T>
struct RowProducts {
  using Ops = Operators<T>;
  using K = typename KindOf<T>::type;
  using Acc = typename K::Acc;
  using Wide = Plain<Acc>;  // single elements in the type of sums
  static constexpr int64_t kLanes = Wide::kLanes;

  // Rows of `a`, packed and widened.
  static void widen(Acc* to, const TensorView& a, const int64_t* row, const int64_t* token,
                    int64_t n) {
    for (int64_t i = 0; i < n; ++i, to += a.cols) {
      const T* from = static_cast<const T*>(a.data) + source(row, token, i) * a.row_stride;
      parts<Wide, T>(to, from, a.col_stride, a.cols, /*keep=*/nullptr);
    }
  }

  // Neighboring elements of a core, rounded to T.
  template <typename S>
  static LOTR_INLINE typename Wide::Vec vector_of(const S* core) {
    if constexpr (std::is_same_v<S, T>) return load(core);
    Acc values[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) values[i] = part<Wide, T>(core[i]);
    return load(values);
  }
  // out[b] = scaling * sum over a of in[a] core(a, b), for a core with contiguous rows.
  template <typename S>
  static void times_rows_of_core(Acc* out, const Acc* in, const S* core, const TensorView& shape,
                                 Acc scaling) {
    int64_t b = 0;
    for (; b + kLanes <= shape.cols; b += kLanes) {
      typename Wide::Vec sum{};
      for (int64_t a = 0; a < shape.rows; ++a)
        sum = Wide::madd(sum, vector_of(core + a * shape.row_stride + b), in[a]);
      store(out + b, sum * scaling);
    }
    for (; b < shape.cols; ++b) {
      Acc sum = 0;
      for (int64_t a = 0; a < shape.rows; ++a)
        sum += in[a] * part<Wide, T>(core[a * shape.row_stride + b]);
      out[b] = sum * scaling;
    }
  }
  // The same for a core with contiguous columns, kLanes at a time, each with one sum per lane.
  template <typename S>
  static void times_columns_of_core(Acc* out, const Acc* in, const S* core, const TensorView& shape,
                                    Acc scaling) {
    const int64_t in_vectors = shape.rows / kLanes * kLanes;
    for (int64_t b0 = 0; b0 < shape.cols; b0 += kLanes) {
      typename Wide::Vec square[kLanes] = {};  // [b]: column b's sums, one per lane
      typename Wide::Vec sum{};
      const int64_t cols = smaller(kLanes, shape.cols - b0);
      for (int64_t b = 0; b < cols; ++b)
        for (int64_t a = 0; a < in_vectors; a += kLanes)
          square[b] += load(in + a) * vector_of(core + (b0 + b) * shape.col_stride + a);
      transpose<kLanes>(square);  // its rows then add up to the columns' sums
      for (int64_t i = 0; i < kLanes; ++i) sum += square[i];
      Acc sums[kLanes];
      store(sums, sum);
      for (int64_t b = 0; b < cols; ++b) {
        for (int64_t a = in_vectors; a < shape.rows; ++a)
          sums[b] += in[a] * part<Wide, T>(core[(b0 + b) * shape.col_stride + a]);
        out[b0 + b] = sums[b] * scaling;
      }
    }
  }
  static void times_core(Acc* out, const Acc* in, const TensorView& core, Acc scaling) {
    by_dtype(core.dtype, [&](auto stored) {
      const auto* data = static_cast<const typename decltype(stored)::type*>(core.data);
      if (core.col_stride == 1)
        times_rows_of_core(out, in, data, core, scaling);
      else
        times_columns_of_core(out, in, data, core, scaling);
    });
  }
  // out [r_in, r_out] = scaling * the sum over n rows of left^T right, both packed.
  static void outer_of_few(const TensorView& out, const Acc* left, const Acc* right, int64_t n,
                           Acc scaling) {
    Acc* to = static_cast<Acc*>(out.data);
    for (int64_t a = 0; a < out.rows; ++a, to += out.cols) {
      for (int64_t i = 0; i < n; ++i) {
        const Acc v = left[i * out.rows + a] * scaling;
        const Acc* row = right + i * out.cols;
        for (int64_t b = 0; b < out.cols; ++b) to[b] = i == 0 ? v * row[b] : to[b] + v * row[b];
      }
    }
  }

  // The rows of a short group: h[row[j]] = scaling u[..] core, without copies of the core.
  static void row_core_of_few(const TensorView& h, const TensorView& u, const int64_t* row,
                              const int64_t* token, int64_t n, const TensorView& core,
                              Acc scaling) {
    Scratch memory(size_t(n * (core.rows + core.cols)) * sizeof(Acc));
    Acc* wide = memory.get<Acc>();
    Acc* sums = wide + n * core.rows;
    widen(wide, u, row, token, n);
    if (core.row_stride == 1 || core.col_stride == 1) {
      for (int64_t j = 0; j < n; ++j)
        times_core(sums + j * core.cols, wide + j * core.rows, core, scaling);
    } else {
      FewTokens<T>::times_core(sums, wide, n, core, scaling);
    }
    for (int64_t j = 0; j < n; ++j)
      write_rows<K>(h, row[j], 1, sums + j * core.cols, core.cols, /*scale=*/1.0, /*add=*/false);
  }

  static void row_core(const TensorView& h, const TensorView& u, const int64_t* token,
                       const TensorView& cores, int64_t core_stride, const Groups& by_core,
                       double scaling) {
    const int64_t total = by_core.first[by_core.count];
    const int64_t row_bytes = h.cols * element_size(h.dtype);
    run_rows(total, total * cores.rows * cores.cols, [&](int64_t begin, int64_t end) {
      int64_t group = 0;
      while (by_core.first[group + 1] <= begin) ++group;
      // A group is divided from its first row: a thread computes the parts that start in its rows.
      const int64_t first = by_core.first[group];
      int64_t i = smaller(first + round_up(begin - first, kRowsOfGroup), by_core.first[group + 1]);
      for (int64_t n = 0; i < end; i += n) {
        while (by_core.first[group + 1] <= i) ++group;
        n = smaller(by_core.first[group + 1] - i, kRowsOfGroup);
        const int64_t* row = by_core.row + i;
        const TensorView core = core_of(cores, core_stride, by_core.key[group]);
        // Decided by the size of the group, not of its last part.
        if (by_core.first[group + 1] - by_core.first[group] <= kShortGroup) {
          row_core_of_few(h, u, row, token, n, core, Acc(scaling));
          continue;
        }
        const Gathered<T> in(u, row, token, n);
        const bool in_place = consecutive(row, nullptr, n);
        Scratch memory(in_place ? 0 : size_t(n * row_bytes));
        TensorView out = h;
        out.rows = n;
        out.data = in_place ? static_cast<char*>(h.data) + row[0] * row_bytes : memory.get<char>();
        Ops::shrink(out, in.matrix, core, scaled_by(scaling));
        for (int64_t j = 0; !in_place && j < n; ++j)
          std::memcpy(static_cast<char*>(h.data) + row[j] * row_bytes,
                      memory.get<char>() + j * row_bytes, size_t(row_bytes));
      }
    });
  }

  // dG_c = scaling * the sum over the rows of c of u_t(i)^T g_i, for the cores that have rows.
  static void row_core_grad(const TensorView& dcores, int64_t core_stride, const TensorView& g,
                            const TensorView& u, const int64_t* token, const Groups& by_core,
                            double scaling) {
    auto run_groups = [&](int64_t begin, int64_t end) {
      for (int64_t group = begin; group < end; ++group) {
        const int64_t first = by_core.first[group];
        const int64_t n = by_core.first[group + 1] - first;
        const TensorView out = core_of(dcores, core_stride, by_core.key[group]);
        if (n <= kShortGroup) {
          Scratch memory(size_t(n * (u.cols + g.cols)) * sizeof(Acc));
          Acc* wide_u = memory.get<Acc>();
          Acc* wide_g = wide_u + n * u.cols;
          widen(wide_u, u, by_core.row + first, token, n);
          widen(wide_g, g, by_core.row + first, nullptr, n);
          outer_of_few(out, wide_u, wide_g, n, Acc(scaling));
          continue;
        }
        const Gathered<T> left(u, by_core.row + first, token, n);
        const Gathered<T> right(g, by_core.row + first, nullptr, n);
        Ops::factor_grad(out, left.matrix, right.matrix, scaled_by(scaling), /*add=*/false);
      }
    };
    // With few groups each product is divided among the threads: inside a task, calls of the pool
    // run in the calling thread.
    if (by_core.count < 2 * threads()) return run_groups(0, by_core.count);
    run_tasks(by_core.count, by_core.first[by_core.count] * u.cols * g.cols, run_groups);
  }

  // du_t = the sum of a token's rows of row_du, in their order, rounded once.
  static void sum_rows(const TensorView& du, const TensorView& row_du, const Groups& by_token) {
    const int64_t r = row_du.cols;
    run_tasks(by_token.count, by_token.first[by_token.count] * r, [&](int64_t begin, int64_t end) {
      Scratch memory(size_t(r) * sizeof(Acc));
      Acc* sum = memory.get<Acc>();
      for (int64_t group = begin; group < end; ++group) {
        for (int64_t j = 0; j < r; ++j) sum[j] = 0;
        for (int64_t i = by_token.first[group]; i < by_token.first[group + 1]; ++i) {
          const Acc* row = static_cast<const Acc*>(row_du.data) + by_token.row[i] * r;
          for (int64_t j = 0; j < r; ++j) sum[j] += row[j];
        }
        write_rows<K>(du, by_token.key[group], 1, sum, r, /*scale=*/1.0, /*add=*/false);
      }
    });
  }
};

}  // namespace lotr::cpu::LOTR_ISA
