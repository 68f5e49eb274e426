// ldmatrix and mma.sync. Layouts: PTX ISA, "Warp-level matrix instructions", figures of ldmatrix
// and of the fragments of m16n8k16.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "state.h"

namespace lotr::simt {
namespace {

constexpr uint32_t WARP = ~0u;

// ---- ldmatrix ----

// A lane's operand: the row that it passes, and the words that it receives.
struct LaneRow {
  alignas(16) unsigned char row[16];
  uint32_t offset;  // of the row in shared memory
  uint32_t received[4];
};
struct TileLoad {
  int tiles;
  bool trans;
};

// How many cycles eight rows of 16 bytes take. Different rows in the same group of four banks need
// separate cycles; the same row twice is one access.
int wavefronts(LaneRow* const* rows) {
  int rows_in_group[8] = {}, worst = 0;
  for (int i = 0; i < 8; ++i) {
    bool is_repeated = false;
    for (int j = 0; j < i; ++j) is_repeated |= rows[j]->offset == rows[i]->offset;
    if (!is_repeated) worst = std::max(worst, ++rows_in_group[rows[i]->offset / 16 % 8]);
  }
  return worst;
}

// The leader of ldmatrix. context: a TileLoad.
void load_tiles(Warp& warp, uint32_t, void* context) {
  const auto& load = *static_cast<const TileLoad*>(context);
  LaneRow* lanes[32];
  for (int lane = 0; lane < 32; ++lane)
    lanes[lane] = static_cast<LaneRow*>(warp.thread[lane].operand);
  ++totals.ldmatrix;
  for (int tile = 0; tile < load.tiles; ++tile) {
    LaneRow* const* const rows = lanes + 8 * tile;
    count_shared_phase(wavefronts(rows));
    for (int lane = 0; lane < 32; ++lane) {
      uint32_t& word = lanes[lane]->received[tile];
      const int i = lane / 4;
      const int j = 2 * (lane % 4);
      if (!load.trans) {
        memcpy(&word, rows[i]->row + 2 * j, 4);
      } else {
        memcpy(&word, rows[j]->row + 2 * i, 2);
        memcpy(reinterpret_cast<char*>(&word) + 2, rows[j + 1]->row + 2 * i, 2);
      }
    }
  }
}

// ---- mma.sync ----

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

// A lane's operand.
struct Fragments {
  float* d;
  const uint32_t *a, *b;
};

// The leader of mma. Sums in float along k: the hardware's order and truncation are not specified.
template <float (*Convert)(uint32_t)>
void multiply(Warp& warp, uint32_t, void*) {
  float A[16][16], B[16][8], D[16][8];
  Fragments* fragments[32];
  const auto of_lane = [&](int lane, int e) -> float& {
    return D[lane / 4 + e / 2 * 8][lane % 4 * 2 + e % 2];
  };
  for (int lane = 0; lane < 32; ++lane) {
    fragments[lane] = static_cast<Fragments*>(warp.thread[lane].operand);
    const int g = lane / 4;
    const int k = 2 * (lane % 4);
    for (int h = 0; h < 2; ++h) {  // the low half is the lower k
      const auto half = [&](uint32_t word) { return Convert(word >> 16 * h & 0xffffu); };
      A[g][k + h] = half(fragments[lane]->a[0]);
      A[g + 8][k + h] = half(fragments[lane]->a[1]);
      A[g][k + 8 + h] = half(fragments[lane]->a[2]);
      A[g + 8][k + 8 + h] = half(fragments[lane]->a[3]);
      B[k + h][g] = half(fragments[lane]->b[0]);
      B[k + 8 + h][g] = half(fragments[lane]->b[1]);
    }
    for (int e = 0; e < 4; ++e) of_lane(lane, e) = fragments[lane]->d[e];
  }
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < 16; ++k)
      for (int j = 0; j < 8; ++j) D[i][j] += A[i][k] * B[k][j];
  for (int lane = 0; lane < 32; ++lane)
    for (int e = 0; e < 4; ++e) fragments[lane]->d[e] = of_lane(lane, e);
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
  LaneRow operand{};
  if (t.lane < uint32_t(8 * tiles)) {  // the other lanes' addresses are ignored
    check_shared(row, 16, 16, t.op, site);
    operand.offset = shared_offset(row);
    touch_read(row, 16);
    memcpy(operand.row, row, 16);
  }
  maybe_preempt();
  TileLoad load{tiles, trans};
  warp_collective(trans ? "ldmatrix.trans" : "ldmatrix", WARP, site, &operand, load_tiles, &load,
                  false);
  for (int i = 0; i < tiles; ++i) r[i] = operand.received[i];
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
