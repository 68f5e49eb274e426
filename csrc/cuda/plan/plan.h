// The plan of a launch: how the problem is cut into blocks.
#pragma once
#include <cstdint>
#include <vector>

#include "../params.h"

namespace lotr::plan {

constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// The rank a kernel is compiled for.
constexpr int padded_rank(int64_t r) {
  return r <= 16 ? 16 : r <= 32 ? 32 : r <= 64 ? 64 : r <= 128 ? 128 : 256;
}

// `tiles` cut into `count` pieces that differ by at most one tile.
inline Pieces pieces(int64_t tiles, int64_t count) {
  return {int32_t(tiles / count), int32_t(tiles % count)};
}

// m_blocks x n_blocks blocks of the large matrix [M, N], and the pieces of its tiles that they own.
struct Plan {
  int rows = 0, cols = 0;  // of a tile; 0: no plan
  int64_t m_tiles = 0, n_tiles = 0, m_blocks = 0, n_blocks = 0;
  double extra_bytes = 0;   // of factors and partial sums, read and written
  double microseconds = 0;  // an estimate: only compared with that of another plan of the same problem
  bool wgmma = false;       // of the kernel by wgmma, else of the one by mma
  bool cluster = false;     // the blocks along M are one cluster
  bool together = false;    // all blocks run at the same time, and those along M wait for one another
  bool at_once = false;     // the GPU holds all blocks at the same time
  int of_row = 1;           // blocks along N that are one cluster: shrink_grad by wgmma

  Pieces m_pieces() const { return pieces(m_tiles, m_blocks); }
  Pieces n_pieces() const { return pieces(n_tiles, n_blocks); }
};

using Plans = std::vector<Plan>;

}  // namespace lotr::plan
