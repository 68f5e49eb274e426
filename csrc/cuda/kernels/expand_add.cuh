// expand_add:  y += drop(u F^T)          y [M, N], u [M, r], F [N, r];   also dx += drop(k A^T)
//
// Grid     x: pieces of N (up to SUBS tiles of COLS columns), y: blocks along tokens.
//          A warp takes strips of 16 tokens, from the last to the first, since what the base product has
//          written last is still in L2, and walks each tile by tile.  The piece's rows of F stay in shared
//          memory.
// Bytes    y once in and once out; F once for each block along tokens, u once for each piece of N.  plan.h
//          balances them.
// Sums     float32, y added last, rounded once.
//
// A lane owns what it copies: of a tile it holds the accumulators (g, 2q), (g, 2q + 1), (g + 8, ..) of each
// of the 8-column products, and the columns of F are dealt to the products so that those are 16 bytes in a
// row of y. So a warp shares nothing but its strip of u, and no warp waits for another:
//
// Timeline of a warp (tile t = strip i, column tile n; L copies in flight, P product, sum and store):
//   y  stage t % STAGES   L L P |           a __syncwarp at |, for u
//   u  slot  i % STAGES   L L P P P P |
#pragma once
#include "rectangle.cuh"

namespace lotr::kernels {

template <class P, int R_, bool DROPOUT_>
struct ExpandTraits {
  using Policy = P;
  using T = typename P::T;
  static constexpr int R = R_, THREADS = expand_threads(sizeof(T), R), WARPS = THREADS / 32;
  static constexpr bool DROPOUT = DROPOUT_;
  static constexpr int STRIP = 16, COLS = 128 / sizeof(T), SUBS = expand_subs(sizeof(T), R);
  static constexpr int NJ = COLS / 8, BLOCKS = blocks_together(R);
  static constexpr int CHUNK = 16 / sizeof(T), GROUP = 4 * CHUNK, GROUPS = COLS / GROUP;  // of four lanes

  using Factor = tile::Shared<T, COLS, R>;
  struct Stage {
    tile::Shared<T, STRIP, R> u;
    tile::Chunk<T> y[2 * GROUPS][32];  // rows g and g + 8 of each group; by lane
  };
  static constexpr int STAGES =
      stages_that_fit(WARPS * sizeof(Stage), SUBS * sizeof(Factor), 3, shared_budget(BLOCKS));
  struct Smem {
    Factor F[SUBS];
    Stage stage[WARPS][STAGES];
  };
  static_assert(STAGES >= 2 && sizeof(Smem) <= shared_budget(BLOCKS));

  // The column, in its tile, of row s of Factor: product j's columns 2q and 2q + 1 are elements 2j and 2j + 1
  // of lane q's chunk.
  static LOTR_DEVICE int column(int s) {
    const int group = s / GROUP, j = s % GROUP / 8, c = s % 8;
    return group * GROUP + c / 2 * CHUNK + 2 * j + c % 2;
  }
};

// The strip's rows of u, by one warp.
template <class Tile>
LOTR_DEVICE void load_strip(Tile& tile, const Matrix& u, int64_t row0, int64_t rows, int r) {
  using T = typename Tile::T;
#pragma unroll
  for (int i = 0; i < Tile::ROWS * Tile::CHUNKS / 32; ++i) {
    const int index = i * 32 + int(threadIdx.x) % 32, row = index / Tile::CHUNKS, c = index % Tile::CHUNKS;
    const int valid = tile::valid_elements<Tile::CHUNK>(row0 + row, rows, c * Tile::CHUNK, r);
    const T* from = static_cast<const T*>(u.data);
    ptx::cp_async16(tile.chunk(row, c), valid ? from + (row0 + row) * u.row + c * Tile::CHUNK : from,
                    valid * int(sizeof(T)));
  }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::THREADS, Traits::BLOCKS) expand_add(const ExpandParams p) {
  using P = typename Traits::Policy;
  using T = typename Traits::T;
  using Chunk = tile::Chunk<T>;
  constexpr int STAGES = Traits::STAGES, COLS = Traits::COLS, CHUNK = Traits::CHUNK, GROUP = Traits::GROUP;
  constexpr int STRIP = Traits::STRIP, GROUPS = Traits::GROUPS;
  auto& sm = ptx::shared_storage<typename Traits::Smem>();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int n_tiles = tile::count_of(p.n_pieces, int(blockIdx.x));
  const int64_t n_begin = int64_t(tile::begin_of(p.n_pieces, int(blockIdx.x))) * COLS;
  const int64_t strips = (p.M + STRIP - 1) / STRIP;
  const int64_t strip_step = int64_t(gridDim.y) * Traits::WARPS;
  const uint64_t seed = Traits::DROPOUT ? uint64_t(ptx::load(p.dropout.seed)) : 0;
  auto* stages = sm.stage[warp];

  struct Place {
    int tile, i, n;
    int64_t strip;
  };
  const auto advance = [&](Place& a) {
    ++a.tile;
    if (++a.n == n_tiles) a.n = 0, ++a.i, a.strip -= strip_step;
  };
  const int64_t first_strip = strips - 1 - (int64_t(blockIdx.y) * Traits::WARPS + warp);
  Place ahead{0, 0, 0, first_strip}, here = ahead;

  // of this lane, in its first row and group
  const int row_of_lane = lane / 4, col_of_lane = lane % 4 * CHUNK;
  const bool rows_of_chunks = p.y.access == Access::vector;
  T* const y_of_lane = static_cast<T*>(p.y.data) + row_of_lane * p.y.row + (n_begin + col_of_lane) * p.y.col;
  const auto y_at = [&](const Place& a) {
    return y_of_lane + a.strip * STRIP * p.y.row + int64_t(a.n) * COLS * p.y.col;
  };
  const auto inside = [&](const Place& a) {
    return rows_of_chunks && (a.strip + 1) * STRIP <= p.M && n_begin + int64_t(a.n + 1) * COLS <= p.N;
  };
  const auto valid_at = [&](const Place& a, int c) {
    return tile::valid_elements<CHUNK>(a.strip * STRIP + row_of_lane + c % 2 * 8, p.M,
                                       n_begin + int64_t(a.n) * COLS + c / 2 * GROUP + col_of_lane, p.N);
  };

  const auto fetch = [&] {
    if (ahead.strip >= 0) {
      auto& to = stages[ahead.tile % STAGES].y;
      const T* from = y_at(ahead);
      if (inside(ahead)) {
#pragma unroll
        for (int c = 0; c < 2 * GROUPS; ++c)
          ptx::cp_async16(&to[c][lane], from + c % 2 * 8 * p.y.row + c / 2 * GROUP);
      } else {
#pragma unroll 1
        for (int c = 0; c < 2 * GROUPS; ++c) {
          const T* chunk = from + c % 2 * 8 * p.y.row + c / 2 * GROUP * p.y.col;
          const int valid = valid_at(ahead, c);
          if (rows_of_chunks) {
            ptx::cp_async16(&to[c][lane], valid ? chunk : static_cast<const T*>(p.y.data),
                            valid * int(sizeof(T)));
          } else {
            Chunk value{};
#pragma unroll
            for (int e = 0; e < CHUNK; ++e)
              if (e < valid) value.v[e] = ptx::load(chunk + e * p.y.col);
            ptx::store_shared(&to[c][lane], value);
          }
        }
      }
      if (ahead.n == 0) load_strip(stages[ahead.i % STAGES].u, p.u, ahead.strip * STRIP, p.M, p.r);
      advance(ahead);
    }
    ptx::cp_async_commit();
  };

  for (int n = 0; n < n_tiles; ++n)
    tile::load_rows<Traits::THREADS>(sm.F[n], p.F, n_begin + int64_t(n) * COLS, p.N, p.r,
                                     [](int s) { return Traits::column(s); });
  ptx::cp_async_commit();
  for (int i = 0; i < STAGES - 1; ++i) fetch();
  ptx::cp_async_wait<STAGES - 1>();
  __syncthreads();  // F is there

  for (; here.strip >= 0; advance(here)) {
    ptx::cp_async_wait<STAGES - 2>();
    __syncwarp();
    fetch();
    float d[1][Traits::NJ][4] = {};
    tile::warp_product<P, Traits::R, false, false>(d, stages[here.i % STAGES].u, 0, 0, sm.F[here.n], 0);
    const auto& y = stages[here.tile % STAGES].y;
    T* const to = y_at(here);
    const bool whole = inside(here);
#pragma unroll
    for (int c = 0; c < 2 * GROUPS; ++c) {
      const int h = c % 2, group = c / 2;
      [[maybe_unused]] uint32_t keep = 0;
      if constexpr (Traits::DROPOUT) {
        const uint64_t row = uint64_t(here.strip) * STRIP + row_of_lane + 8 * h;
        const uint64_t col = uint64_t(n_begin) + uint64_t(here.n) * COLS + group * GROUP + col_of_lane;
        keep = tile::philox_keep<CHUNK>(seed, row * uint64_t(p.N) + col, p.dropout.threshold);
      }
      Chunk value = ptx::load_shared(&y[c][lane]);
#pragma unroll
      for (int e = 0; e < CHUNK; e += 2) {
        float a = d[0][group * (CHUNK / 2) + e / 2][2 * h], b = d[0][group * (CHUNK / 2) + e / 2][2 * h + 1];
        if constexpr (Traits::DROPOUT) {
          a = keep >> e & 1 ? a * p.dropout.scale : 0.f;
          b = keep >> e & 2 ? b * p.dropout.scale : 0.f;
        }
        ptx::from_floats(value.v + e, ptx::to_float(value.v[e]) + a, ptx::to_float(value.v[e + 1]) + b);
      }
      if (whole) {
        ptx::store(reinterpret_cast<Chunk*>(to + h * 8 * p.y.row + group * GROUP), value);
      } else {
        const int valid = valid_at(here, c);
        T* const out = to + h * 8 * p.y.row + group * GROUP * p.y.col;
#pragma unroll
        for (int e = 0; e < CHUNK; ++e)
          if (e < valid) ptx::store(out + e * p.y.col, value.v[e]);
      }
    }
  }
}

}  // namespace lotr::kernels
