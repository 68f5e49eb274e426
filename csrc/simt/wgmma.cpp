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

// An operand in shared memory, as its descriptor describes it: 8 rows (K-major) or 8 k (MN-major)
// of 128 bytes are a group.
struct Operand {
  uint32_t start;         // bytes
  uint32_t panel_stride;  // bytes from 64 rows to the next 64, if MN-major
  uint32_t group_stride;  // bytes from a group to the next one
  bool mn_major;
  Operand(uint64_t descriptor, bool mn_major)
      : start(uint32_t(descriptor & 0x3fff) << 4),
        panel_stride(uint32_t(descriptor >> 16 & 0x3fff) << 4),
        group_stride(uint32_t(descriptor >> 32 & 0x3fff) << 4),
        mn_major(mn_major) {}

  // 8 elements from (row, k) on: along k if K-major, along the rows if MN-major.
  const unsigned char* chunk(int row, int k) const {
    uint32_t offset = start;
    const uint32_t i = uint32_t(row);
    const uint32_t width = ROW / 2;  // elements
    if (mn_major)
      offset += i / width * panel_stride + i % width * 2 + uint32_t(k / 8) * group_stride +
                uint32_t(k % 8) * ROW;
    else
      offset += i / 8 * group_stride + i % 8 * ROW + uint32_t(k) * 2;
    offset ^= (offset >> 7 & 7) << 4;  // the swizzle
    const unsigned char* p = self().block->shared + offset;
    check_shared(p, 16, 16, self().op, self().site);
    return p;
  }
  // f(row, k) for each chunk of `rows` rows: chunks first, first + step, ..
  template <class F>
  void each_chunk(int rows, int first, int step, F f) const {
    const int along_k = mn_major ? 1 : 8;  // elements of a chunk
    const int along_rows = mn_major ? 8 : 1;
    const int per_row = K / along_k;
    for (int i = first; i < rows / along_rows * per_row; i += step)
      f(i / per_row * along_rows, i % per_row * along_k);
  }
  // Sets value to the rows [rows][16] as floats, and raw to their bytes. Does nothing if the bytes
  // still equal raw: value is then up to date.
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

// f(chunk) for a 32nd of the chunks that the thread's warp reads: all its lanes together have each.
template <class F>
void each_chunk_of_lane(const Thread& t, const Operand& a, const Operand& b, int n, F f) {
  const int first_row = int(t.linear % WARPGROUP / 32) * 16;
  b.each_chunk(n, int(t.lane), 32, [&](int row, int k) { f(b.chunk(row, k)); });
  a.each_chunk(16, int(t.lane), 32, [&](int row, int k) { f(a.chunk(first_row + row, k)); });
}

// The key of the product in Block::products: the same in all threads of the warpgroup.
uint64_t key_of(const Thread& t, const WarpgroupProduct& w) {
  return w.number * 8 + t.linear / WARPGROUP;
}

// The operands at the thread's wait, decoded again only if they have changed since another thread's
// wait. For the race detector each lane of a warp performs a 32nd of the reads: a warp that
// releases the stage after a __syncwarp has then read it as a whole.
DecodedProduct& operands(const Thread& t, const WarpgroupProduct& w) {
  DecodedProduct& decoded = t.block->products[key_of(t, w)];
  if (decoded.users && (decoded.descriptor_a != w.a || decoded.descriptor_b != w.b))
    fail("%s at %s:%d: the warps of the warpgroup give different descriptors", t.op, t.site.file,
         t.site.line);
  decoded.descriptor_a = w.a;
  decoded.descriptor_b = w.b;
  const uint32_t warp = t.linear % WARPGROUP / 32;
  const Operand a(w.a, false), b(w.b, w.b_mn_major);
#if LOTR_SIMT_RACE
  each_chunk_of_lane(t, a, b, w.n, [](const unsigned char* chunk) { touch_read(chunk, 16); });
#endif
  b.decode(0, w.n, w.is_bf16, decoded.raw_b, decoded.b);
  a.decode(int(warp) * 16, 16, w.is_bf16, decoded.raw_a[warp], decoded.a[warp]);
  return decoded;
}

// Makes the accumulators of the thread's product `index` NaN. It holds their values, unless an
// earlier product in flight adds to the same accumulators and holds them already.
void hide_accumulators(Thread& t, size_t index) {
  WarpgroupProduct& product = t.products[index];
  const bool are_held =
      std::any_of(t.products.begin(), t.products.begin() + std::ptrdiff_t(index),
                  [&](const WarpgroupProduct& earlier) { return earlier.d == product.d; });
  const size_t count = size_t(product.n / 2);
  if (!are_held) product.held.assign(product.d, product.d + count);
  memset(product.d, 0xFF, count * sizeof(float));
}

// Adds the thread's elements of the product to its accumulators, or sets them if !w.accumulate.
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
        float sum = w.accumulate ? d : 0.f;
        for (int k = 0; k < K; ++k) sum += A[8 * h * K + k] * B[k];
        d = sum;
      }
    }
  if (++decoded.users == WARPGROUP) t.block->products.erase(key_of(t, w));
}

}  // namespace

void wgmma_fence(Site site) {
  race::ExecutorScope scope;
  if (counted_and_skipped("wgmma.fence", site)) return;
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
        "wgmma at %s:%d: no canonical layout: %d elements of an MN-major operand with 128-byte "
        "swizzle",
        site.file, site.line, n);
  each_chunk_of_lane(t, {a, false}, {b, mn_major}, n, [&](const unsigned char* chunk) {
    check_proxy_fence(*t.block, shared_offset(chunk), 16);
  });
  warp_collective("wgmma.mma_async", ~0u, site, nullptr, nullptr, nullptr, false);
  if (t.linear % WARPGROUP == 0) ++totals.wgmma;
  WarpgroupProduct product;
  product.d = d;
  product.a = a;
  product.b = b;
  product.n = n;
  product.accumulate = accumulate;
  product.is_bf16 = is_bf16;
  product.b_mn_major = mn_major;
  product.number = t.products_issued++;
  t.products.push_back(product);
  hide_accumulators(t, t.products.size() - 1);
}

void wgmma_commit(Site site) {
  race::ExecutorScope scope;
  if (counted_and_skipped("wgmma.commit_group", site)) return;
  WarpgroupProduct end{};
  end.ends_group = true;
  enter("wgmma.commit_group", site).products.push_back(end);
}

void wgmma_wait(int keep, Site site) {
  race::ExecutorScope scope;
  Thread& t = enter("wgmma.wait_group", site);
  if (counted_and_skipped(t.op, site)) return;
  const size_t done = covered_by_wait(t.products, keep);
  warp_collective(t.op, ~0u, site, nullptr, nullptr, nullptr, false);
  for (size_t i = 0; i < done; ++i) {
    const WarpgroupProduct& product = t.products[i];
    if (product.ends_group) continue;
    if (!product.held.empty())
      memcpy(product.d, product.held.data(), product.held.size() * sizeof(float));
    multiply(t, product);
  }
  t.products.erase(t.products.begin(), t.products.begin() + std::ptrdiff_t(done));
  // A product that stays in flight may add to accumulators that are now computed.
  for (size_t i = 0; i < t.products.size(); ++i)
    if (!t.products[i].ends_group && t.products[i].held.empty()) hide_accumulators(t, i);
  t.wgmma_fenced = false;
  maybe_preempt();
}

}  // namespace lotr::simt
