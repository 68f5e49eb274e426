// Compares the layouts that csrc/cuda/ptx and the executor go by with CuTe's: tiles in shared memory, the
// descriptor of an MN-major tile, accumulators, an operand in registers.  Built by hand, with the headers of
// CUTLASS: docs/hopper.md says how.  Exit status 1 if anything differs.
#include <cutlass/bfloat16.h>

#include <cstdio>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>
#include <vector>

using namespace cute;
using T = cutlass::bfloat16_t;

namespace {

constexpr int N = 256, K = 64, THREADS = 128;
int differences = 0;

void report(const char* what, int bad, int of) {
  printf("%-28s %d of %d differ\n", what, bad, of);
  differences += bad;
}

unsigned swizzled(unsigned at) {
  return at ^ (at >> 7 & 7) << 4;
}

template <class Tile, class Place>
void compare_tile(const char* what, const Tile& tile, Place place) {
  int bad = 0;
  for (int n = 0; n < N; ++n)
    for (int k = 0; k < K; ++k)
      bad +=
          unsigned(as_position_independent_swizzle_layout(tile)(n, k)) * sizeof(T) != swizzled(place(n, k));
  report(what, bad, N * K);
}

}  // namespace

int main() {
  // panels of 64 n one after the other, in each k after k
  const auto mn = tile_to_shape(SM90::GMMA::Layout_MN_SW128_Atom<T>{}, Shape<_256, _64>{}, Step<_2, _1>{});
  compare_tile("MN-major tile", mn,
               [](int n, int k) { return unsigned(n / 64 * 8192 + k * 128 + n % 64 * 2); });
  const auto major_k = tile_to_shape(SM90::GMMA::Layout_K_SW128_Atom<T>{}, Shape<_256, _64>{});
  compare_tile("K-major tile", major_k, [](int n, int k) { return unsigned(n * 128 + k * 2); });

  // the two offsets that make_gmma_desc<Major::MN> would put into the descriptor, in units of 16 bytes
  std::vector<T> memory(N * K);
  const Tensor whole = make_tensor(make_smem_ptr(memory.data()), mn);
  const Tensor words = recast<uint128_t const>(local_tile(whole, Shape<_256, _16>{}, make_coord(0, 0)));
  const auto canonical = logical_divide(layout(words), Tile<Layout<Int<8>, _1>, Layout<Int<8>, _1>>{});
  report("MN-major descriptor",
         (int(stride<0, 1>(canonical)) != 8192 / 16) + (int(stride<1, 1>(canonical)) != 1024 / 16), 2);

  const auto row_of = [](int t, int lower) { return t / 32 * 16 + t % 32 / 4 + 8 * lower; };
  int bad = 0;
  for (int t = 0; t < THREADS; ++t)
    for (int i = 0; i < N / 2; ++i)
      bad += int(SM90::GMMA::CLayout_64x256{}(t, i)) !=
             row_of(t, i / 2 % 2) + 64 * (i / 4 * 8 + t % 4 * 2 + i % 2);
  report("accumulators", bad, THREADS * N / 2);
  bad = 0;
  for (int t = 0; t < THREADS; ++t)
    for (int i = 0; i < 8; ++i)  // word i / 2
      bad += int(SM90::GMMA::ALayout_64x16{}(t, i)) !=
             row_of(t, i / 2 % 2) + 64 * (t % 4 * 2 + i / 4 * 8 + i % 2);
  report("first operand in registers", bad, THREADS * 8);
  return differences != 0;
}
