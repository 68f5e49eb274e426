// sm_90a: wgmma.mma_async m64nNk16, both operands in shared memory with 128-byte swizzle, a
// K-major, b K-major or MN-major. Layouts: PTX ISA, "Asynchronous warpgroup-level matrix
// instructions", D fragment and matrix descriptor.
//
// A product reads its operands and writes its accumulators only when the thread waits for it; until
// then the accumulators are NaN, and the first product in flight holds their values. Each thread
// computes its elements. For two products P and Q, each a group, that add to the same d = 1:
//
//   call              d     held by P   held by Q
//   P issued          NaN   1           -
//   Q issued          NaN   1           -            Q continues with what P will leave
//   wait, keep 1      NaN   (gone)      1 + P        P is computed, then d is hidden again for Q
//   wait, keep 0      1 + P + Q
#include <algorithm>
#include <cstring>

#include "hopper.h"
#include "state.h"

namespace lotr::simt {
namespace {

constexpr int WARPGROUP = 128, K = 16;
constexpr uint32_t ROW = 128;                 // bytes of a swizzled row
constexpr uint64_t SWIZZLE_OF_128_BYTES = 1;  // bits 62 and 63 of a descriptor

struct Operand {
  // Bytes; group: from 8 rows (K-major) or 8 k (MN-major) to the next 8.
  uint32_t start, leading, group_stride;
  bool mn_major;
  Operand(uint64_t descriptor, bool mn_major)
      : start(uint32_t(descriptor & 0x3fff) << 4),
        leading(uint32_t(descriptor >> 16 & 0x3fff) << 4),
        group_stride(uint32_t(descriptor >> 32 & 0x3fff) << 4),
        mn_major(mn_major) {}

  // 8 elements from (row, k) on: along k if K-major, along the rows if MN-major.
  const unsigned char* chunk(int row, int k) const {
    uint32_t offset = start;
    const uint32_t i = uint32_t(row);
    const uint32_t width = ROW / 2;
    if (mn_major)  // `width` rows are side by side, the next `width` are `leading` bytes further on
      offset += i / width * leading + i % width * 2 + uint32_t(k / 8) * group_stride +
                uint32_t(k % 8) * ROW;
    else
      offset += i / 8 * group_stride + i % 8 * ROW + uint32_t(k) * 2;
    offset ^= (offset >> 7 & 7) << 4;
    const unsigned char* p = self().block->shared + offset;
    check_shared(p, 16, 16, self().op, self().site);
    return p;
  }
  template <class F>
  void each_chunk(int rows, int first, int step, F f) const {
    const int along_k = mn_major ? 1 : 8;  // elements of a chunk
    const int along_rows = mn_major ? 8 : 1;
    const int per_row = K / along_k;
    for (int i = first; i < rows / along_rows * per_row; i += step)
      f(i / per_row * along_rows, i % per_row * along_k);
  }
  // value = [rows][16], unless the bytes are still equal to `raw`.
  void decode(int first_row, int rows, bool is_bf16, std::vector<unsigned char>& raw,
              std::vector<float>& value) const {
    bool is_unchanged = !raw.empty();
    size_t offset = 0;
    each_chunk(rows, 0, 1, [&](int row, int k) {
      is_unchanged = is_unchanged && !memcmp(raw.data() + offset, chunk(first_row + row, k), 16);
      offset += 16;
    });
    if (is_unchanged) return;
    raw.resize(offset);
    value.resize(size_t(rows) * K);
    offset = 0;
    each_chunk(rows, 0, 1, [&](int row, int k) {
      const unsigned char* p = chunk(first_row + row, k);
      memcpy(raw.data() + offset, p, 16);
      offset += 16;
      for (int e = 0; e < 8; ++e) {
        uint16_t bits;
        memcpy(&bits, p + 2 * e, 2);
        const int element_row = row + (mn_major ? e : 0);
        const int element_k = k + (mn_major ? 0 : e);
        value[size_t(element_row) * K + size_t(element_k)] = half_to_float(bits, is_bf16);
      }
    });
  }
};

uint64_t key_of(const Thread& t, const WarpgroupProduct& w) {
  return w.number * 8 + t.linear / WARPGROUP;
}

// The operands at the thread's wait, decoded again only if they have changed since another thread's
// wait. For the race detector each lane of a warp performs a 32nd of the reads, so that a warp may
// release a stage after a warp collective that follows the wait.
DecodedProduct& operands(const Thread& t, const WarpgroupProduct& w) {
  DecodedProduct& decoded = t.block->products[key_of(t, w)];
  const uint32_t warp = t.linear % WARPGROUP / 32;
  const Operand a(w.a, false), b(w.b, w.b_mn_major);
#if LOTR_SIMT_RACE || LOTR_SIMT_ASAN
  b.each_chunk(w.n, int(t.lane), 32, [&](int row, int k) { touch_read(b.chunk(row, k), 16); });
  a.each_chunk(16, int(t.lane), 32,
               [&](int row, int k) { touch_read(a.chunk(int(warp) * 16 + row, k), 16); });
#endif
  b.decode(0, w.n, w.is_bf16, decoded.raw_b, decoded.b);
  a.decode(int(warp) * 16, 16, w.is_bf16, decoded.raw_a[warp], decoded.a[warp]);
  return decoded;
}

void multiply(Thread& t, const WarpgroupProduct& w) {
  const int row = int(t.lane) / 4;
  const int col = int(t.lane) % 4 * 2;
  DecodedProduct& decoded = operands(t, w);
  const float* A = decoded.a[t.linear % WARPGROUP / 32].data() + row * K;
  for (int j = 0; j < w.n / 8; ++j)
    for (int e = 0; e < 2; ++e) {
      const float* B = decoded.b.data() + (j * 8 + col + e) * K;
      for (int h = 0; h < 2; ++h) {
        float& d = w.d[j * 4 + h * 2 + e];
        float sum = w.overwrite ? 0.f : d;
        for (int k = 0; k < K; ++k) sum += A[8 * h * K + k] * B[k];
        d = sum;
      }
    }
  if (++decoded.users == WARPGROUP) t.block->products.erase(key_of(t, w));
}

}  // namespace

void wgmma_fence(Site site) {
  race::ExecutorScope scope;
  if (left_out("wgmma.fence", site)) return;
  enter("wgmma.fence", site).wgmma_fenced = true;
}

void wgmma(float* d, int n, uint64_t a, uint64_t b, bool mn_major, bool accumulate, bool is_bf16,
           Site site) {
  race::ExecutorScope scope;
  Thread& t = enter("wgmma.mma_async", site);
  if (t.block->thread_count % WARPGROUP &&
      t.linear / WARPGROUP == t.block->thread_count / WARPGROUP)
    fail("wgmma at %s:%d: the warpgroup has fewer than %d threads", site.file, site.line,
         WARPGROUP);
  if (!t.wgmma_fenced)
    fail("wgmma at %s:%d: no wgmma.fence since the accumulators could be touched", site.file,
         site.line);
  if (n < 8 || n > 256 || n % 8)
    fail("wgmma at %s:%d: n is %d, expected 8, 16, .. 256", site.file, site.line, n);
  for (const uint64_t descriptor : {a, b})
    if (descriptor >> 62 != SWIZZLE_OF_128_BYTES)
      fail("wgmma at %s:%d: descriptor %#zx, expected a swizzle of 128 bytes", site.file, site.line,
           size_t(descriptor));
  if (mn_major && n % 64)  // the PTX manual's canonical layouts have complete rows of the swizzle
    fail(
        "wgmma at %s:%d: no canonical layout: %d elements of a MN-major operand with 128-byte "
        "swizzle",
        site.file, site.line, n);
  warp_collective("wgmma.mma_async", ~0u, site, nullptr, nullptr, nullptr, false);
  if (t.linear % WARPGROUP == 0) ++totals.wgmma;
  const bool continues = std::any_of(t.products.begin(), t.products.end(),
                                     [&](const WarpgroupProduct& other) { return other.d == d; });
  WarpgroupProduct product{d, a, b, n, !accumulate, is_bf16, mn_major, false, t.products_issued++,
                           {}};
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
  const size_t done = covered_by_wait(
      t.products, keep, [](const WarpgroupProduct& product) { return product.commit; });
  warp_collective(t.op, ~0u, site, nullptr, nullptr, nullptr, false);
  for (size_t i = 0; i < done; ++i) {
    const WarpgroupProduct& product = t.products[i];
    if (product.commit) continue;
    if (!product.held.empty())
      memcpy(product.d, product.held.data(), product.held.size() * sizeof(float));
    multiply(t, product);
  }
  t.products.erase(t.products.begin(), t.products.begin() + std::ptrdiff_t(done));
  // Accumulators that a product in flight continues with are hidden again: the first such product
  // holds the values, and d is NaN.
  for (size_t i = 0; i < t.products.size() && done; ++i) {
    WarpgroupProduct& product = t.products[i];
    const bool first =
        std::none_of(t.products.begin(), t.products.begin() + std::ptrdiff_t(i),
                     [&](const WarpgroupProduct& other) { return other.d == product.d; });
    if (product.commit || !first || !product.held.empty()) continue;
    product.held.assign(product.d, product.d + product.n / 2);
    memset(product.d, 0xFF, size_t(product.n / 2) * sizeof(float));
  }
  t.wgmma_fenced = false;
  maybe_preempt();
}

}  // namespace lotr::simt
