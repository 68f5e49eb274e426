// ldmatrix and mma.sync. Layouts: PTX ISA, "Warp-level matrix instructions", figures of ldmatrix
// and of the fragments of m16n8k16.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "state.h"

namespace lotr::simt {
namespace {

constexpr uint32_t WARP = ~0u;

struct LaneRow {
  alignas(16) unsigned char row[16];
  uint32_t offset;
  uint32_t out[4];
};
struct TileLoad {
  int tiles;
  bool trans;
};

// Eight rows of 16 bytes over eight groups of four banks; the same row twice is one access.
int wavefronts(LaneRow* const* rows) {
  int in_group[8] = {}, worst = 0;
  for (int i = 0; i < 8; ++i) {
    bool seen = false;
    for (int j = 0; j < i; ++j) seen |= rows[j]->offset == rows[i]->offset;
    if (!seen) worst = std::max(worst, ++in_group[rows[i]->offset / 16 % 8]);
  }
  return worst;
}

void load_tiles(Warp& warp, uint32_t, void* context) {
  const auto& load = *static_cast<const TileLoad*>(context);
  LaneRow* rows[32];
  for (int lane = 0; lane < 32; ++lane)
    rows[lane] = static_cast<LaneRow*>(warp.thread[lane].operand);
  ++totals.ldmatrix;
  for (int tile = 0; tile < load.tiles; ++tile) {
    LaneRow* const* const of_tile = rows + 8 * tile;
    count_shared_phase(wavefronts(of_tile));
    for (int lane = 0; lane < 32; ++lane) {
      uint32_t& out = rows[lane]->out[tile];
      const int i = lane / 4;
      const int j = 2 * (lane % 4);
      if (!load.trans) {
        memcpy(&out, of_tile[i]->row + 2 * j, 4);
      } else {
        memcpy(&out, of_tile[j]->row + 2 * i, 2);
        memcpy(reinterpret_cast<char*>(&out) + 2, of_tile[j + 1]->row + 2 * i, 2);
      }
    }
  }
}

float from_bf16(uint32_t half) {
  const uint32_t bits = half << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

float from_fp16(uint32_t half) {
  uint32_t bits = (half & 0x7fffu) << 13;
  float f;
  memcpy(&f, &bits, 4);
  f *= 0x1p112f;  // exponent bias 127 - 15; exact for subnormals too
  if ((half & 0x7c00u) == 0x7c00u) f = f * INFINITY + (half & 0x3ffu ? NAN : 0.f);
  memcpy(&bits, &f, 4);
  bits |= (half & 0x8000u) << 16;
  memcpy(&f, &bits, 4);
  return f;
}

struct Fragments {
  float* d;
  const uint32_t *a, *b;
};

// Sums in float along k. The hardware's order and truncation are not specified.
template <float (*Convert)(uint32_t)>
void multiply(Warp& warp, uint32_t, void*) {
  float A[16][16], B[16][8], D[16][8];
  Fragments* f[32];
  const auto of_lane = [&](int lane, int e) -> float& {
    return D[lane / 4 + e / 2 * 8][lane % 4 * 2 + e % 2];
  };
  for (int lane = 0; lane < 32; ++lane) {
    f[lane] = static_cast<Fragments*>(warp.thread[lane].operand);
    const int g = lane / 4;
    const int q = 2 * (lane % 4);
    for (int h = 0; h < 2; ++h) {  // the low half is the lower k
      const auto half = [&](uint32_t word) { return Convert(word >> 16 * h & 0xffffu); };
      A[g][q + h] = half(f[lane]->a[0]);
      A[g + 8][q + h] = half(f[lane]->a[1]);
      A[g][q + 8 + h] = half(f[lane]->a[2]);
      A[g + 8][q + 8 + h] = half(f[lane]->a[3]);
      B[q + h][g] = half(f[lane]->b[0]);
      B[q + 8 + h][g] = half(f[lane]->b[1]);
    }
    for (int e = 0; e < 4; ++e) of_lane(lane, e) = f[lane]->d[e];
  }
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < 16; ++k)
      for (int j = 0; j < 8; ++j) D[i][j] += A[i][k] * B[k][j];
  for (int lane = 0; lane < 32; ++lane)
    for (int e = 0; e < 4; ++e) f[lane]->d[e] = of_lane(lane, e);
  ++totals.mma;
}

void check_full_warp(const char* op, Site site) {
  if (self().warp->present != WARP)
    fail("%s at %s:%d: the warp has fewer than 32 threads", op, site.file, site.line);
}

}  // namespace

float half_to_float(uint32_t bits, bool is_bf16) {
  return is_bf16 ? from_bf16(bits) : from_fp16(bits);
}

void ldmatrix(uint32_t* r, const void* row, int tiles, bool trans, Site site) {
  race::ExecutorScope scope;
  Thread& t = enter(trans ? "ldmatrix.trans" : "ldmatrix", site);
  check_full_warp(t.op, site);
  LaneRow rows{};
  if (t.lane < uint32_t(8 * tiles)) {  // the other lanes' addresses are ignored
    check_shared(row, 16, 16, t.op, site);
    rows.offset = shared_offset(row);
    touch_read(row, 16);
    memcpy(rows.row, row, 16);
  }
  maybe_preempt();
  TileLoad load{tiles, trans};
  warp_collective(trans ? "ldmatrix.trans" : "ldmatrix", WARP, site, &rows, load_tiles, &load,
                  false);
  for (int i = 0; i < tiles; ++i) r[i] = rows.out[i];
}

void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b, bool is_bf16, Site site) {
  race::ExecutorScope scope;
  const char* op = is_bf16 ? "mma.m16n8k16.bf16" : "mma.m16n8k16.f16";
  check_full_warp(op, site);
  Fragments f{d, a, b};
  warp_collective(op, WARP, site, &f, is_bf16 ? multiply<from_bf16> : multiply<from_fp16>, nullptr,
                  false);
}

}  // namespace lotr::simt
