// The base product with the adapter inside: kernels/gemm_lotr.cuh.
#pragma once
#include "machine.h"

namespace lotr::plan {

// How a launch is cut. The results have the same bits for every plan.
struct GemmLotr {
  int cluster;     // 1 or 2 blocks: two share W's tiles
  int scouts;      // tickets that the bands' scouts are dealt to
  int band_group;  // bands that the tiles walk together
};

// Clusters of that many blocks hold this many bands of rows.
inline int64_t gemm_lotr_bands(int64_t M, int cluster) {
  return ceil_div(M, 128 * cluster);
}

// y [M, N] at rank r.
inline GemmLotr gemm_lotr(int64_t M, int64_t N, int64_t r, int cluster, int multiprocessors) {
  const int64_t columns = r <= 64 ? 256 : 128;  // of a tile, gemm_lotr_columns
  const int64_t bands = gemm_lotr_bands(M, cluster), held = multiprocessors / cluster;
  // A quarter of the clusters compute u, so that u is ready when the first tiles need it and not all clusters
  // read x at once; fewer if the clusters without a tile in the last wave suffice (a scout takes a third of
  // the time of a tile).  1,024 rows make a band group: its x and the columns of W that it reads stay in L2.
  int64_t scouts = std::min(bands, held / 4);
  const int64_t last = held ? bands * ceil_div(N, columns) % held : 0, idle = last ? held - last : 0;
  if (idle < scouts && bands <= 3 * idle) scouts = idle;
  return {cluster, int(std::max<int64_t>(1, scouts)), 8 / cluster};
}

}  // namespace lotr::plan
