// sm_90a: wgmma.mma_async m64nNk16 with both operands K-major in shared memory, 128-byte swizzle.  Layouts:
// PTX ISA, "Asynchronous warpgroup-level matrix instructions", D fragment and matrix descriptor.
//
// A product reads its operands and writes its accumulators only when the thread waits for it; until then the
// accumulators are NaN.  Each thread computes its own elements.
#include <algorithm>
#include <cstring>

#include "hopper.h"
#include "state.h"

namespace lotr::simt {
namespace {

constexpr int WARPGROUP = 128, K = 16;
constexpr uint64_t SWIZZLE_128 = 1;  // bits 62 and 63 of a descriptor

struct Operand {
  uint32_t start, group_stride;  // bytes; from 8 rows to the next 8
  explicit Operand(uint64_t descriptor)
      : start(uint32_t(descriptor & 0x3fff) << 4), group_stride(uint32_t(descriptor >> 32 & 0x3fff) << 4) {}
};

float element(const Operand& operand, int row, int k, bool is_bf16) {
  uint32_t at =
      operand.start + uint32_t(row / 8) * operand.group_stride + uint32_t(row % 8) * 128 + uint32_t(k) * 2;
  at ^= (at >> 7 & 7) << 4;
  const unsigned char* p = self().block->shared + at;
  check_shared(p, 2, 2, self().op, self().site);
  touch_read(p, 2);
  uint16_t bits;
  memcpy(&bits, p, 2);
  return half_to_float(bits, is_bf16);
}

void multiply(const Thread& t, const WarpgroupProduct& w) {
  const int row = int(t.linear % WARPGROUP) / 32 * 16 + int(t.lane) / 4, col = int(t.lane) % 4 * 2;
  const Operand a(w.a), b(w.b);
  float A[2][K], B[K];
  for (int h = 0; h < 2; ++h)
    for (int k = 0; k < K; ++k) A[h][k] = element(a, row + 8 * h, k, w.is_bf16);
  for (int j = 0; j < w.n / 8; ++j)
    for (int e = 0; e < 2; ++e) {
      for (int k = 0; k < K; ++k) B[k] = element(b, j * 8 + col + e, k, w.is_bf16);
      for (int h = 0; h < 2; ++h) {
        float& d = w.d[j * 4 + h * 2 + e];
        float sum = w.overwrite ? 0.f : d;
        for (int k = 0; k < K; ++k) sum += A[h][k] * B[k];
        d = sum;
      }
    }
}

void nothing(Warp&, uint32_t, void*) {}

}  // namespace

void wgmma_fence(Site site) {
  race::ExecutorScope scope;
  if (left_out("wgmma.fence", site)) return;
  enter("wgmma.fence", site).wgmma_fenced = true;
}

void wgmma(float* d, int n, uint64_t a, uint64_t b, bool accumulate, bool is_bf16, Site site) {
  race::ExecutorScope scope;
  Thread& t = enter("wgmma.mma_async", site);
  if (t.block->thread_count % WARPGROUP && t.linear / WARPGROUP == t.block->thread_count / WARPGROUP)
    fail("wgmma at %s:%d: the warpgroup has fewer than %d threads", site.file, site.line, WARPGROUP);
  if (!t.wgmma_fenced)
    fail("wgmma at %s:%d: no wgmma.fence since the accumulators could be touched", site.file, site.line);
  for (uint64_t descriptor : {a, b})
    if (descriptor >> 62 != SWIZZLE_128)
      fail("wgmma at %s:%d: descriptor %#zx, expected 128-byte swizzle (the only one known here)", site.file,
           site.line, size_t(descriptor));
  warp_collective("wgmma.mma_async", ~0u, site, nullptr, nothing, nullptr, false);
  if (t.linear % WARPGROUP == 0) ++totals.wgmma;
  const bool continues = std::any_of(t.products.begin(), t.products.end(),
                                     [&](const WarpgroupProduct& other) { return other.d == d; });
  WarpgroupProduct product{d, a, b, n, !accumulate, is_bf16, false, {}};
  if (!continues) product.held.assign(d, d + n / 2);
  memset(d, 0xFF, size_t(n / 2) * sizeof(float));
  t.products.push_back(std::move(product));
}

void wgmma_commit(Site site) {
  race::ExecutorScope scope;
  if (left_out("wgmma.commit_group", site)) return;
  WarpgroupProduct end{};
  end.commit = true;
  enter("wgmma.commit_group", site).products.push_back(end);
}

void wgmma_wait(int keep, Site site) {
  race::ExecutorScope scope;
  Thread& t = enter("wgmma.wait_group", site);
  if (left_out(t.op, site)) return;
  size_t done = 0;
  int groups = 0;
  for (size_t i = t.products.size(); i-- > 0;)
    if (t.products[i].commit && ++groups > keep) {
      done = i + 1;
      break;
    }
  for (size_t i = 0; i < done; ++i) {
    const WarpgroupProduct& product = t.products[i];
    if (product.commit) continue;
    if (!product.held.empty()) memcpy(product.d, product.held.data(), product.held.size() * sizeof(float));
    multiply(t, product);
  }
  t.products.erase(t.products.begin(), t.products.begin() + std::ptrdiff_t(done));
  t.wgmma_fenced = false;
  maybe_preempt();
}

}  // namespace lotr::simt
