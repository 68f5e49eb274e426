// The tiles of a block, and a ring of stages.
#pragma once
#include "../params.h"
#include "../ptx/base.cuh"

namespace lotr::tile {

// The first tile of a piece, and how many it has.
LOTR_DEVICE int begin_of(const Pieces& p, int piece) {
  return piece * p.tiles + (piece < p.longer ? piece : p.longer);
}
LOTR_DEVICE int count_of(const Pieces& p, int piece) {
  return p.tiles + (piece < p.longer);
}

// The stage after `stage` in a ring of STAGES. A comparison is cheaper than a remainder.
template <int STAGES>
LOTR_DEVICE int stage_after(int stage) {
  return stage == STAGES - 1 ? 0 : stage + 1;
}

}  // namespace lotr::tile
