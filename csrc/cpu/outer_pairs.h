// factor_grad for pairs, with x read in place: its columns are the vectors here and v is broadcast,
// so that two rows of x become pairs in registers. The general form (products.h) broadcasts x, and
// has to copy each tile into pairs first, which takes a quarter of its time.
//
//   S[j][c] (+)= sum over i of v[i, j] x[i, c]     S = P^T, transposed when chunks are added
//
// The columns of S are in the order of pairs_of (vec.h) within each 32.
#pragma once

#include "cpu/amx.h"

namespace lotr::cpu::LOTR_ISA {

// Columns of x that one block takes: a row of two vectors of pairs.
template <typename K>
constexpr int kPairColumns = 2 * K::kLanes;
constexpr int kPairRows = 8;  // of S: 16 sums and what they are made from stay in registers

// Pairs of rows of x, in place.
struct RowPairs {
  const uint16_t* low;   // the first row of the first pair
  const uint16_t* last;  // the second row of the last pair: zeros if the number of rows is odd
  int64_t step;          // elements between pairs
};

// S[MR][32] (+)= sum over n units, which are summed by themselves first, as in sum_block (block.h):
// what is added at a time must not depend on where the sum is kept. The first block leaves its
// units in `x_units`, and the others (kAgain) read these: rows of x that are a power of two apart
// fall into the same few places of L1 and would not stay there.
template <typename K, int MR, bool kAgain, bool kPrefetch>
inline void outer_block(const Sums<K>& S, const RowPairs& x, typename K::Unit* x_units,
                        const typename K::Unit* v, int64_t ldv, int64_t n, Ahead& ahead) {
  typename K::Vec acc[MR][2] = {};
  Piece piece;
  if constexpr (kPrefetch) piece = ahead.take();
#pragma GCC unroll 2
  for (int64_t t = 0; t < n; ++t) {
    typename K::Unit* units = x_units + t * kPairColumns<K>;
    vi left, right;
    if constexpr (kAgain) {
      left = load(units);
      right = load(units + K::kLanes);
    } else {
      const uint16_t* low = x.low + t * x.step;
      const auto a = load(low);
      const auto b = load(t + 1 < n ? low + x.step / 2 : x.last);
      left = pairs_of<0>(a, b);
      right = pairs_of<1>(a, b);
      store(units, left);
      store(units + K::kLanes, right);
    }
    if constexpr (kPrefetch) {
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
  if constexpr (kPrefetch) ahead.now = piece;
#pragma GCC unroll 8
  for (int j = 0; j < MR; ++j) {
    for (int h = 0; h < 2; ++h) {
      typename K::Acc* at = S.data + j * S.ld + h * K::kLanes;
      store(at, S.fresh ? acc[j][h] : load(at) + acc[j][h]);
    }
  }
}

// S[r][32] (+)= v^T x for 32 columns of a tile of x. v: the tile's units, [units][ldv]; x_units:
// room for the units of these columns. The last block prefetches the next tile, because the blocks
// before it load more themselves.
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
    using Block = decltype(&outer_block<K, MR, false, false>);
    static constexpr Block kBlocks[2][2] = {
        // [again][prefetch]
        {&outer_block<K, MR, false, false>, &outer_block<K, MR, false, true>},
        {&outer_block<K, MR, true, false>, &outer_block<K, MR, true, true>}};
    const Block block = kBlocks[j > 0][j + MR == r];
    block({S.data + j * S.ld, S.ld, S.fresh}, pairs_of_x, x_units, v + j, ldv, units, ahead);
  });
}

}  // namespace lotr::cpu::LOTR_ISA
