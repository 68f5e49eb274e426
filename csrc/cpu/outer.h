// D = x^T v, a sum over tokens: dA = x^T du, Q = g^T u, dG = Q^T B. Indices: i a row of x and v, c
// a column of x, j a column of v. A tile of rows of v stays in cache as units while all columns of
// x are multiplied with it. The sums have two forms (OuterSums):
//
//   S[j][c]   if x is bfloat16 in place, for 32 columns at a time: v is broadcast, and two
//             rows of x become pairs in registers
//   P[c][j]   for other columns: x is broadcast (block.h), in place or as a copy in units. With
//             pairs the copying takes a quarter of the time, which S saves
//
// Example: x [300, 100] in bfloat16, r = 20. The tiles have 64, 64 and 22 pairs of rows. Columns 0
// to 95 of x are added to S [20][96], columns 96 to 99 to P [4][32]: 20 is padded to two vectors.
#pragma once

#include "cpu/products.h"

namespace lotr::cpu::LOTR_ISA {

constexpr int64_t kTileUnits = 64;              // units of a tile of rows
constexpr int64_t kDeepUnits = 2 * kTileUnits;  // of a tall one: x in place, or AMX
constexpr int64_t kTileColumns = 96;            // columns of x in P that are multiplied at a time

// Columns of x that one block takes: a row of two vectors of pairs.
template <typename K>
constexpr int kPairColumns = 2 * K::kLanes;
constexpr int kPairRows = 8;  // of S: 16 sums and what they are made from stay in registers

// Rows of x in place, two of which make a row of pairs.
struct RowPairs {
  const uint16_t* low;        // the first row of the first pair
  const uint16_t* last_high;  // the second row of the last pair, or zeros for an odd number of rows
  int64_t step;               // elements between pairs
};

// S[MR][32] (+)= sum over n units, which are summed by themselves first, as in sum_block (block.h),
// so that no bit depends on where the sum is kept. The first block of these columns stores its
// units in `x_units`, and the others read them there: rows of x that are a power of two apart share
// the same few places of L1 and would not stay in it. The last block prefetches the next tile.
template <typename K, int MR, bool kFirst, bool kLast>
inline void outer_block(Sums<K> S, RowPairs x, typename K::Unit* x_units, const typename K::Unit* v,
                        int64_t ldv, int64_t n, Ahead& ahead) {
  typename K::Vec acc[MR][2] = {};
  Piece piece;
  if constexpr (kLast) piece = ahead.take();
#pragma GCC unroll 2
  for (int64_t t = 0; t < n; ++t) {
    typename K::Unit* units = x_units + t * kPairColumns<K>;
    vi left, right;
    if constexpr (kFirst) {
      const uint16_t* low = x.low + t * x.step;
      const auto a = load(low);
      const auto b = load(t + 1 < n ? low + x.step / 2 : x.last_high);
      left = pairs_of<0>(a, b);
      right = pairs_of<1>(a, b);
      store(units, left);
      store(units + K::kLanes, right);
    } else {
      left = load(units);
      right = load(units + K::kLanes);
    }
    if constexpr (kLast) {
      piece.next();
      piece.next();
    }
#pragma GCC unroll 8
    for (int j = 0; j < MR; ++j) {
      const typename K::Unit s = v[t * ldv + j];
      acc[j][0] = K::madd(acc[j][0], left, s);
      acc[j][1] = K::madd(acc[j][1], right, s);
    }
  }
  if constexpr (kLast) ahead.now = piece;
#pragma GCC unroll 8
  for (int j = 0; j < MR; ++j) {
    for (int h = 0; h < 2; ++h) {
      typename K::Acc* at = S.data + j * S.ld + h * K::kLanes;
      store(at, S.fresh ? acc[j][h] : load(at) + acc[j][h]);
    }
  }
}

// S[r][32] (+)= v^T x for 32 columns of a tile of x. v: the same rows of v as units, [units][ldv].
// x_units: room for the units of these columns. S's columns are in the order of pairs_of (vec.h).
template <typename K>
inline void outer_columns(const Sums<K>& S, const Rectangle& x, const typename K::Unit* v,
                          int64_t ldv, int64_t r, typename K::Unit* x_units, Ahead& ahead) {
  [[maybe_unused]] static const uint16_t kZeros[kPairColumns<K>] = {};
  const int64_t row = x.a.row_stride;
  const auto* low = static_cast<const uint16_t*>(x.a.data) + x.i0 * row + x.c0;
  const RowPairs pairs_of_x{low, x.rows % 2 ? kZeros : low + (x.rows - 1) * row, 2 * row};
  const int64_t units = (x.rows + 1) / 2;
  row_blocks<kPairRows>(r, [&](auto mr, int64_t j) {
    constexpr int MR = decltype(mr)::value;
    using Block = decltype(&outer_block<K, MR, true, true>);
    static constexpr Block kBlocks[2][2] = {
        // [first][last]
        {&outer_block<K, MR, false, false>, &outer_block<K, MR, false, true>},
        {&outer_block<K, MR, true, false>, &outer_block<K, MR, true, true>}};
    const Block block = kBlocks[j == 0][j + MR == r];
    block({S.data + j * S.ld, S.ld, S.fresh}, pairs_of_x, x_units, v + j, ldv, units, ahead);
  });
}

// Where x^T v is summed: S[r][S_cols] for the first columns of x, P[..][ld] for the others.
template <typename K>
struct OuterSums {
  typename K::Acc* S;
  int64_t S_cols;  // columns of x in S
  typename K::Acc* P;
  int64_t ld;  // full vectors

  // In a block of size(..) numbers: S, then P.
  static OuterSums in_block(typename K::Acc* block, int64_t S_cols, int64_t r) {
    return {block, S_cols, block + r * S_cols, padded_rank<K>(r)};
  }
  static int64_t size(int64_t cols, int64_t S_cols, int64_t r) {
    return r * S_cols + (cols - S_cols) * padded_rank<K>(r);
  }
};

// The rows and columns of x that are multiplied.
struct OuterRange {
  int64_t i0, i1;      // rows [i0, i1)
  int64_t c0, c1;      // columns [c0, c1)
  int64_t tile_rows;   // that are multiplied at a time
  bool fresh = false;  // the sums start at zero, instead of being added to
  bool warm = false;   // these rows are in cache already
};

template <typename T>
class Outer {
  using K = typename KindOf<T>::type;
  using Unit = typename K::Unit;
  using Acc = typename K::Acc;
  static constexpr int64_t kCopiesOfV = in_tiles<K> ? 2 : 1;  // a second one is transposed for AMX

 public:
  static int64_t bytes(int64_t r) {
    const int64_t units = kDeepUnits * (kTileColumns + kCopiesOfV * padded_rank<K>(r));
    const int64_t words = kTileColumns + kMaskSlack + larger(kTileColumns, r);
    return units * int64_t(sizeof(Unit)) + words * int64_t(sizeof(uint32_t));
  }
  // memory: bytes(r).
  Outer(char* memory, int64_t r) {
    x_ = reinterpret_cast<Unit*>(memory);
    v_ = x_ + kDeepUnits * kTileColumns;
    transposed_v_ = v_ + kDeepUnits * padded_rank<K>(r);
    mask_ = reinterpret_cast<uint32_t*>(v_ + kCopiesOfV * kDeepUnits * padded_rank<K>(r));
    two_rows_ = reinterpret_cast<uint16_t*>(mask_ + kTileColumns + kMaskSlack);
  }

  // Whether x can be broadcast from its memory.
  static bool in_place(const TensorView& x, const Drop& drop) {
    return !pairs<K> && native<K, T>(x) && !drop.on;
  }
  // Rows of a tile: more if x is read in place, as long as their rows of v stay in L1. Not for
  // pairs, because the units made from x must fit in L1 as well.
  static int64_t tile_rows(const TensorView& x, const Drop& drop, int64_t r) {
    const int64_t v_bytes = kTileUnits * padded_rank<K>(r) * int64_t(sizeof(Unit));
    return (in_place(x, drop) && 2 * v_bytes <= kHalfL1 ? kDeepUnits : kTileUnits) * K::kPair;
  }
  // How many columns of x are summed in S: full blocks, if x is bfloat16 in place.
  static int64_t transposed_columns(const TensorView& x, const Drop& drop) {
    if (!pairs<K> || !native<K, T>(x) || drop.on) return 0;
    return x.cols / kPairColumns<K> * kPairColumns<K>;
  }

  // sums[c][j] (+)= sum over the range's rows i of drop(x)[i, c] v[i, j]. For each tile of rows:
  // the transposed columns into S, in AMX tiles or as pairs in registers, then the others into P.
  void add(const OuterSums<K>& sums, const TensorView& x, const Drop& drop, const TensorView& v,
           const OuterRange& range) const {
    for (int64_t i = range.i0; i < range.i1; i += range.tile_rows) {
      const int64_t rows = smaller(range.tile_rows, range.i1 - i);
      const int64_t units = units_of<K>(rows);
      const bool fresh = range.fresh && i == range.i0;
      const Factor<K> tile_of_v = rows_of_v(v, i, rows);
      int64_t c = range.c0;
      // A warm tile prefetches the rows below while all its columns are multiplied. A cold one
      // prefetches the columns to the right, and with its last columns the first ones below.
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
      const int64_t S_end = smaller(range.c1, sums.S_cols);
      if constexpr (in_tiles<K>) {
        if (c < S_end) transpose_units<K>(transposed_v_, v_, tile_of_v.ld, units, v.cols);
        for (; c < S_end; c += kPairColumns<K>) {
          const bool right = !range.warm && c + kPairColumns<K> < range.c1;
          outer_in_tiles<K>({sums.S + c, sums.S_cols, fresh}, {x, i, rows, c, kPairColumns<K>},
                            transposed_v_, v.cols, x_, right);
        }
      } else if constexpr (pairs<K>) {
        for (; c < S_end; c += kPairColumns<K>) {
          prefetch_next(kPairColumns<K>);
          outer_columns<K>({sums.S + c, sums.S_cols, fresh}, {x, i, rows, c, kPairColumns<K>},
                           tile_of_v.data, tile_of_v.ld, v.cols, x_, ahead);
        }
      }
      for (; c < range.c1; c += kTileColumns) {
        const int64_t cols = smaller(kTileColumns, range.c1 - c);
        prefetch_next(kTileColumns);
        const Broadcast a = columns_of_x({x, i, rows, c, cols}, drop);
        Acc* const P = sums.P + (c - sums.S_cols) * sums.ld;
        sum_tile<K, Layout::down_columns>({P, sums.ld, fresh}, a, cols, tile_of_v, units, ahead);
      }
    }
  }

 private:
  // Rows [i, i + rows) of v as units, in place or copied.
  Factor<K> rows_of_v(const TensorView& v, int64_t i, int64_t rows) const {
    const int64_t vectors = vectors_of<K>(v.cols);
    if (PackedFactor<K, T>::in_place(v))
      return {static_cast<const Unit*>(v.data) + i * v.row_stride, v.row_stride, vectors};
    tile_down_columns<K, T>(v_, padded_rank<K>(v.cols), {v, i, rows, 0, v.cols}, two_rows_);
    return {v_, padded_rank<K>(v.cols), vectors};
  }
  // A part of x with units down its columns, in place or copied.
  Broadcast columns_of_x(const Rectangle& part, const Drop& drop) const {
    const TensorView& x = part.a;
    const auto* data = static_cast<const Unit*>(x.data) + part.i0 * x.row_stride + part.c0;
    if (in_place(x, drop)) return Broadcast::of(data, x.row_stride);
    tile_down_columns<K, T>(x_, kTileColumns, part, two_rows_, drop, mask_);
    return Broadcast::of(x_, kTileColumns);
  }

  Unit *x_, *v_, *transposed_v_;  // a part of x, a tile of v, and its tiles of A (amx.h)
  uint32_t* mask_;
  uint16_t* two_rows_;
};

}  // namespace lotr::cpu::LOTR_ISA
