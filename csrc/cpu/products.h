// The two shapes of product, for a range of rows of one thread:
//
//   shrink_tile   sums[i0 .. i1, r] += x[i0 .. i1, k] b                       b: a packed factor
//   outer_rows    P[c0 .. c1, r]    += x[i0 .. i1, c0 .. c1]^T v[i0 .. i1, r]
//
// Indices: i a row of x, c a column of x, t a unit along the summed dimension, j along the rank.
//
// Both walk x in tiles that stay in cache. They read x in place if its layout allows (native), else
// from a copy of the tile that is converted, masked, paired and padded. Every sum runs over its
// dimension in ascending order in one accumulator, and threads get rows in multiples of run_rows'
// blocks (operators.h), so a result does not depend on how rows are divided among threads.
#pragma once

#include "cpu/outer_pairs.h"
#include "cpu/runtime.h"

namespace lotr::cpu::LOTR_ISA {

constexpr int64_t kTileRows = 96;     // rows of a shrink tile: a multiple of every block's rows
constexpr int64_t kBlockRows = 8;     // rows of a block of a shrink tile, at most
constexpr int64_t kTileUnits = 64;    // units of a factor_grad tile
constexpr int64_t kTileColumns = 96;  // columns of a factor_grad tile
constexpr int64_t kDeepUnits = 2 * kTileUnits;  // units of a factor_grad tile read in place
constexpr int64_t kTileStep = 256;              // units of a shrink tile at most
// Bytes of the packed factor that a shrink tile is multiplied with: half of L1.
constexpr int64_t kTileBytes = 16384;

// Rows of a tile of g [m, n] that shrink_grad reads twice, or 0 where two passes over g cost less.
// The tile, the next tile, the factor [n, r] and the two sums of its size must stay in L2. Factor
// and sums are used again for each tile: if these exceed L2, the taller tiles of two passes
// read them less often.
template <typename K>
inline int64_t shrink_grad_tile_rows(const TensorView& g, int64_t r) {
  if (3 * g.cols * r * int64_t(sizeof(typename K::Acc)) > l2_bytes()) return 0;
  const int64_t unit_bytes = g.cols * element_size(g.dtype) * K::kPair;  // a row, or two rows
  // Sums in AMX tiles are added to the others once for each tile of rows, so tall tiles cost less.
  if (in_tiles<K> && 2 * unit_bytes * kDeepUnits <= l2_bytes()) return kDeepUnits * K::kPair;
  return (2 * unit_bytes * kTileUnits > l2_bytes() ? kTileUnits / 2 : kTileUnits) * K::kPair;
}
// The rank in vectors.
template <typename K>
constexpr int64_t vectors_of(int64_t r) {
  return ceil_div(r, K::kLanes);
}

// A factor [k, r] in units: [packed units of k][vectors of r], zero padded. In place if the
// factor's memory is that already.
template <typename K, typename T>
struct PackedFactor {
  Scratch memory;
  Factor<K> units;

  static bool in_place(const TensorView& A) {
    return !pairs<K> && native<K, T>(A) && A.cols % K::kLanes == 0;
  }
  static size_t packed_bytes(const TensorView& A) {
    return size_t(packed_units<K>(A.rows) * vectors_of<K>(A.cols) * K::kLanes) *
           sizeof(typename K::Unit);
  }
  explicit PackedFactor(const TensorView& A)
      : memory(in_place(A) ? 0 : packed_bytes(A) + 2 * size_t(A.cols) * sizeof(uint16_t)) {
    const int64_t vectors = vectors_of<K>(A.cols);
    if (in_place(A)) {
      units = {static_cast<const typename K::Unit*>(A.data), A.row_stride, vectors};
      return;
    }
    const int64_t ld = vectors * K::kLanes;
    auto* packed = memory.template get<typename K::Unit>();
    auto* two_rows = reinterpret_cast<uint16_t*>(memory.template get<char>() + packed_bytes(A));
    tile_down_columns<K, T>(packed, ld, {A, 0, A.rows, 0, A.cols}, two_rows);
    for (int64_t i = units_of<K>(A.rows) * ld; i < packed_units<K>(A.rows) * ld; ++i) packed[i] = 0;
    units = {packed, ld, vectors};
  }
};

// A run of n neighboring elements: out (= or +=) scale * c.
template <int n, typename T>
LOTR_INLINE void write_run(T* out, const T* c, T scale, bool add) {
  typedef T Run __attribute__((vector_size(n * sizeof(T)), aligned(sizeof(T)), may_alias));
  Run* const to = reinterpret_cast<Run*>(out);
  const Run sum = scale * *reinterpret_cast<const Run*>(c);
  *to = add ? *to + sum : sum;
}

// out[i0 + i, j] (= or +=) scale * sums[i][j], rounded once.
template <typename K>
inline void write_rows(const TensorView& out, int64_t i0, int64_t rows, const typename K::Acc* sums,
                       int64_t ld, double scale, bool add) {
  using Acc = typename K::Acc;
  by_dtype(out.dtype, [&](auto stored) {
    using T = typename decltype(stored)::type;
    const Acc s = Acc(scale);
    for (int64_t i = 0; i < rows; ++i, sums += ld) {
      T* row = static_cast<T*>(out.data) + (i0 + i) * out.row_stride;
      int64_t j = 0;
      if constexpr (std::is_same_v<Acc, double> == std::is_same_v<T, double>) {
        for (; out.col_stride == 1 && j + K::kLanes <= out.cols; j += K::kLanes) {
          const auto sum = s * load(sums + j);
          store(row + j, add ? load(row + j) + sum : sum);
        }
      }
      // The rest of a rank that is not a multiple of the vector, by halves and quarters: a masked
      // store would make the next row's load wait.
      if constexpr (std::is_same_v<Acc, T>) {
        for (; out.col_stride == 1 && j + 8 <= out.cols; j += 8)
          write_run<8>(row + j, sums + j, s, add);
        for (; out.col_stride == 1 && j + 4 <= out.cols; j += 4)
          write_run<4>(row + j, sums + j, s, add);
      }
      for (; j < out.cols; ++j) {
        T* to = row + j * out.col_stride;
        *to = Narrow<T>::from((add ? to_float(*to) : 0) + s * sums[j]);
      }
    }
  });
}

// Rows of a factor_grad tile: more if x is read in place, as long as their rows of v stay in L1.
// Not for pairs, because the units made from x must fit in L1 as well.
template <typename K, typename T>
inline int64_t factor_grad_tile_rows(const TensorView& x, const Drop& drop, int64_t r) {
  const int64_t v_bytes =
      kTileUnits * vectors_of<K>(r) * K::kLanes * int64_t(sizeof(typename K::Unit));
  const bool deep = !pairs<K> && native<K, T>(x) && !drop.on && 2 * v_bytes <= kTileBytes;
  return (deep ? kDeepUnits : kTileUnits) * K::kPair;
}

// A factor_grad tile's part of v in units, and for tiles turned as well.
template <typename K>
constexpr int64_t v_copies = in_tiles<K> ? 2 : 1;

// Bytes of [x | mask] in shrink_tile, or [x | v | v turned | mask | two rows] in outer_rows.
template <typename K>
inline size_t tile_space(int64_t r) {
  const int64_t shrink = kTileRows * kTileStep;
  const int64_t outer = kDeepUnits * (kTileColumns + v_copies<K> * vectors_of<K>(r) * K::kLanes);
  return size_t(larger(shrink, outer)) * sizeof(typename K::Unit) +
         size_t(kTileStep * K::kPair + kMaskSlack + larger(kTileColumns, r)) * sizeof(uint32_t);
}

// The rows of x that shrink_tile multiplies.
struct ShrinkRows {
  int64_t i0;
  int64_t count;
  bool cold;   // they were not prefetched
  bool below;  // prefetch the rows below
};

// Sums of a tile of rows, unscaled: sums[rows][ld] = drop(x)[rows, :] b.
template <typename K, typename T>
inline void shrink_tile(typename K::Acc* sums, int64_t ld, const TensorView& x, const Drop& drop,
                        const Factor<K>& b, const ShrinkRows& rows, char* space) {
  using Unit = typename K::Unit;
  const int64_t group = smaller(b.vectors, kMaxVectors);
  // Units summed at a time, so that their part of b stays in L1.
  const int64_t step =
      smaller(kTileStep, larger(64, kTileBytes / int64_t(sizeof(Unit)) / (group * K::kLanes)));
  const bool in_place = native<K, T>(x) && !drop.on;
  auto* tile = reinterpret_cast<Unit*>(space);
  if constexpr (in_tiles<K>) {
    if (in_place)
      return shrink_in_tiles<K, T>(sums, ld, x, b, rows.i0, rows.count, rows.below, tile);
  }
  auto* mask = reinterpret_cast<uint32_t*>(tile + kTileRows * step);
  const int64_t units = units_of<K>(x.cols);
  for (int64_t t = 0; t < units; t += step) {
    const int64_t n = smaller(step, units - t);
    const int64_t c0 = t * K::kPair;
    // Prefetched: this tile if it is cold, the next one of these rows, the first of those below.
    const int64_t width = step * K::kPair;
    const bool last = t + step >= units;
    Piece next;
    if (!last && (rows.cold || rows.below))
      next = Rectangle{x, rows.i0, rows.count, c0 + width, width};
    if (last && rows.below) next = Rectangle{x, rows.i0 + rows.count, kTileRows, 0, width};
    Ahead ahead{next, {}};
    if (rows.cold && t == 0) {
      ahead.now = Rectangle{x, rows.i0 + kBlockRows, rows.count - kBlockRows, c0, n * K::kPair};
      ahead.later = next;
    }
    // Units in place, then a copy of the others. The last half pair is copied as well, because its
    // other half would be past the end of the row.
    const int64_t read = in_place ? smaller(n, (x.cols - c0) / K::kPair) : 0;
    if (read > 0) {
      const auto* a = static_cast<const Part<K>*>(x.data) + rows.i0 * x.row_stride + c0;
      sum_tile<K, true>({sums, ld, t == 0},
                        {reinterpret_cast<const char*>(a), x.row_stride * int64_t(sizeof(*a))},
                        rows.count, {b.data + t * b.ld, b.ld, b.vectors}, read, ahead);
    }
    if (read < n) {
      const int64_t first = c0 + read * K::kPair;
      const int64_t copied = n - read;
      const int64_t cols = smaller(x.cols - first, copied * K::kPair);
      tile_along_row<K, T>(tile, copied, {x, rows.i0, rows.count, first, cols}, drop, mask);
      sum_tile<K, true>({sums, ld, t + read == 0},
                        {reinterpret_cast<const char*>(tile), copied * int64_t(sizeof(Unit))},
                        rows.count, {b.data + (t + read) * b.ld, b.ld, b.vectors}, copied, ahead);
    }
  }
}

// How many columns of x are summed transposed (outer_pairs.h): those that are pairs in place.
template <typename K, typename T>
inline int64_t transposed_columns(const TensorView& x, const Drop& drop) {
  if (!pairs<K> || !native<K, T>(x) || drop.on) return 0;
  return x.cols / kPairColumns<K> * kPairColumns<K>;
}

// Where outer_rows sums: S[r][transposed] is for the first columns of x, P[the others][ld] for the
// others. A row of P has full vectors.
template <typename K>
struct OuterSums {
  using Acc = typename K::Acc;
  Acc* S;
  int64_t transposed;
  Acc* P;
  int64_t ld;

  // In a block of size(..) numbers: S, then P.
  static OuterSums in_block(Acc* block, int64_t transposed, int64_t r) {
    return {block, transposed, block + r * transposed, vectors_of<K>(r) * K::kLanes};
  }
  static int64_t size(int64_t cols, int64_t transposed, int64_t r) {
    return r * transposed + (cols - transposed) * vectors_of<K>(r) * K::kLanes;
  }
  // In an output [cols, r].
  static OuterSums in_output(Acc* out, int64_t ld) { return {nullptr, 0, out, ld}; }
};

// The rows and columns of x that outer_rows multiplies.
struct OuterRange {
  int64_t i0;  // rows [i0, i1)
  int64_t i1;
  int64_t c0;  // columns [c0, c1)
  int64_t c1;
  int64_t tile_rows;   // that are multiplied at a time
  bool fresh = false;  // the sums start at zero, instead of being added to
  bool warm = false;   // these rows are in cache already
};

// sums[c][j] (+)= sum over the range's rows i of drop(x)[i, c] v[i, j].
template <typename K, typename T>
inline void outer_rows(const OuterSums<K>& sums, const TensorView& x, const Drop& drop,
                       const TensorView& v, const OuterRange& range, char* space) {
  using Unit = typename K::Unit;
  const int64_t vectors = vectors_of<K>(v.cols);
  const bool v_in_place = !pairs<K> && native<K, T>(v) && v.cols % K::kLanes == 0;
  const bool x_in_place = !pairs<K> && native<K, T>(x) && !drop.on;
  auto* x_tile = reinterpret_cast<Unit*>(space);
  auto* v_tile = x_tile + kDeepUnits * kTileColumns;
  [[maybe_unused]] auto* turned = v_tile + kDeepUnits * vectors * K::kLanes;
  auto* mask = reinterpret_cast<uint32_t*>(v_tile + v_copies<K> * kDeepUnits * vectors * K::kLanes);
  auto* two_rows = reinterpret_cast<uint16_t*>(mask + kTileColumns + kMaskSlack);
  for (int64_t i = range.i0; i < range.i1; i += range.tile_rows) {
    const int64_t rows = smaller(range.tile_rows, range.i1 - i);
    const int64_t units = units_of<K>(rows);
    const bool fresh = range.fresh && i == range.i0;
    Factor<K> b{v_tile, vectors * K::kLanes, vectors};  // the rows of v
    if (v_in_place) {
      b.data = static_cast<const Unit*>(v.data) + i * v.row_stride;
      b.ld = v.row_stride;
    } else {
      tile_down_columns<K, T>(v_tile, b.ld, {v, i, rows, 0, v.cols}, two_rows);
    }
    if constexpr (in_tiles<K>) {
      if (range.c0 < sums.transposed) turn_units<K>(turned, v_tile, b.ld, units, vectors);
    }
    int64_t c = range.c0;
    // A warm tile prefetches the rows below. Another one the columns to the right, and from its
    // last columns the first ones of the rows below.
    const int64_t below = i + range.tile_rows;
    Ahead ahead{Rectangle{x, below, range.tile_rows, range.c0, range.c1 - range.c0}, {}};
    const auto prefetch_next = [&](int64_t width) {
      if (range.warm) return;
      if (c + width < range.c1) {
        ahead.now = Rectangle{x, i, rows, c + width, width};
      } else {
        ahead.now = Rectangle{x, below, range.tile_rows, range.c0, width};
      }
    };
    if constexpr (pairs<K>) {
      for (; c < smaller(range.c1, sums.transposed); c += kPairColumns<K>) {
        const Sums<K> S{sums.S + c, sums.transposed, fresh};
        const Rectangle columns{x, i, rows, c, kPairColumns<K>};
        if constexpr (in_tiles<K>) {
          const bool ahead_right = !range.warm && c + kPairColumns<K> < range.c1;
          outer_in_tiles<K>(S, columns, turned, v.cols, x_tile, ahead_right);
        } else {
          prefetch_next(kPairColumns<K>);
          outer_columns<K>(S, columns, b.data, b.ld, v.cols, x_tile, ahead);
        }
      }
    }
    for (; c < range.c1; c += kTileColumns) {
      const int64_t cols = smaller(kTileColumns, range.c1 - c);
      prefetch_next(kTileColumns);
      Broadcast a{reinterpret_cast<const char*>(x_tile), kTileColumns * int64_t(sizeof(Unit))};
      if (x_in_place) {
        const Unit* from = static_cast<const Unit*>(x.data) + i * x.row_stride + c;
        a = {reinterpret_cast<const char*>(from), x.row_stride * int64_t(sizeof(Unit))};
      } else {
        tile_down_columns<K, T>(x_tile, kTileColumns, {x, i, rows, c, cols}, two_rows, drop, mask);
      }
      sum_tile<K, false>({sums.P + (c - sums.transposed) * sums.ld, sums.ld, fresh}, a, cols, b,
                         units, ahead);
    }
  }
}

// Columns of a panel: a block keeps their sums in registers.
template <typename K>
constexpr int64_t kPanel = kMaxVectors * K::kLanes;
// Few rows where there are registers to spare: out-of-order execution then sees the next block's
// loads and this one's stores during the multiplications, and rows a power of two apart do not push
// each other out of L1.
constexpr int64_t kExpandRows = LOTR_VB == 64 ? 2 : kRows[kMaxVectors];

// y = from + bias + u F^T in one panel of F, for `rows` rows from `y` on. All columns of the panel
// exist, are contiguous, and none is masked.
template <typename K, typename T, Form form>
inline void expand_full_rows(T* y, int64_t ldy, const T* from, int64_t ldfrom, int64_t rows,
                             const Broadcast& u, const typename K::Unit* panel, int64_t units,
                             const typename K::Acc* bias) {
  // Blocks of about 1000 cycles together, which is what memory takes to answer.
  const int64_t blocks_ahead = larger(1, smaller(16, 1024 / (kExpandRows * kMaxVectors * units)));
  row_blocks<kExpandRows>(rows, [&](auto mr, int64_t i) {
    constexpr int MR = decltype(mr)::value;
    // Prefetches down this panel, then from the top of the next one.
    int64_t row = i + kExpandRows * blocks_ahead;
    int64_t column = 0;
    if (row >= rows) {
      row -= rows;
      column = kPanel<K>;
    }
    const T* y_ahead = y == from ? nullptr : y + row * ldy + column;
    expand_full_block<K, T, MR, kMaxVectors, form>(y + i * ldy, ldy, from + i * ldfrom, ldfrom,
                                                   {u.data + i * u.step, u.step}, panel, units,
                                                   from + row * ldfrom + column, y_ahead, bias);
  });
}

// The part of a bias for one panel, widened: zeros past the end of y, or if there is none.
template <typename K, typename T>
inline void widen_bias(typename K::Acc* to, const TensorView& bias, int64_t n0, int64_t cols) {
  const T* from = static_cast<const T*>(bias.data);
  if (from && bias.col_stride == 1 && cols == kPanel<K>) {
    for (int64_t j = 0; j < kPanel<K>; j += K::kLanes) store(to + j, load(from + n0 + j));
    return;
  }
  for (int64_t j = 0; j < kPanel<K>; ++j) to[j] = 0;
  if (!from) return;
  for (int64_t j = 0; j < cols; ++j) to[j] = to_float(from[(n0 + j) * bias.col_stride]);
}

// y_panel = start + scale * drop(u F^T). `panel`: F transposed, for these columns of y. `mask`: a
// buffer for the rows of a block.
template <typename K, typename T>
inline void expand_panel(const Rectangle& y_panel, const Broadcast& u, int64_t units,
                         const typename K::Unit* panel, const Drop& drop, const Start& start,
                         uint32_t* mask) {
  const TensorView& y = y_panel.a;
  const int64_t cols = smaller(kPanel<K>, y.cols - y_panel.c0);
  const bool has_matrix = start.matrix.data;
  const bool add_bias = start.bias.data || !has_matrix;
  typename K::Acc bias[kPanel<K>];
  if (add_bias) widen_bias<K, T>(bias, start.bias, y_panel.c0, cols);
  const TensorView& origin = has_matrix ? start.matrix : y;  // without a matrix: only prefetched
  const T* const from = static_cast<const T*>(origin.data) + y_panel.i0 * origin.row_stride +
                        y_panel.c0 * origin.col_stride;
  T* const top = static_cast<T*>(y.data) + y_panel.i0 * y.row_stride + y_panel.c0 * y.col_stride;
  if (y.col_stride == 1 && origin.col_stride == 1 && cols == kPanel<K> && !drop.on &&
      drop.scale == 1.0) {
    const auto run = [&](auto form) {
      constexpr Form kForm = decltype(form)::value;
      if constexpr (in_tiles<K>)
        expand_in_tiles<K, T, kForm>(top, y.row_stride, from, origin.row_stride, y_panel.rows, u,
                                     panel, units, bias);
      else
        expand_full_rows<K, T, kForm>(top, y.row_stride, from, origin.row_stride, y_panel.rows, u,
                                      panel, units, bias);
    };
    if (!has_matrix) return run(std::integral_constant<Form, Form::bias>{});
    if (!add_bias) return run(std::integral_constant<Form, Form::matrix>{});
    return run(std::integral_constant<Form, Form::matrix_and_bias>{});
  }
  row_blocks<kExpandRows>(y_panel.rows, [&](auto mr, int64_t i) {
    constexpr int MR = decltype(mr)::value;
    const uint32_t* keep = nullptr;
    if (drop.on) {
      uint32_t* buffer = mask + kExpandRows * kPanel<K>;
      for (int64_t row = 0; row < MR; ++row) {
        const uint64_t e = uint64_t(y_panel.i0 + i + row) * uint64_t(y.cols) + uint64_t(y_panel.c0);
        const uint32_t* row_mask = keep_mask(buffer, e, cols, drop.seed, drop.threshold);
        std::memcpy(mask + row * kPanel<K>, row_mask, size_t(cols) * sizeof(uint32_t));
      }
      keep = mask;
    }
    expand_ragged_block<K, T, MR, kMaxVectors>(
        top + i * y.row_stride, y.row_stride, y.col_stride,
        has_matrix ? from + i * origin.row_stride : nullptr, origin.row_stride, origin.col_stride,
        cols, {u.data + i * u.step, u.step}, panel, units, keep, typename K::Acc(drop.scale),
        add_bias ? bias : nullptr);
  });
}

}  // namespace lotr::cpu::LOTR_ISA
