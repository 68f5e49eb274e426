// Compares the layouts that csrc/cuda/sm90 and the executor use with CuTe's: tiles in shared memory, their
// descriptors, accumulators.  Built with the headers of CUTLASS: test_layouts.py.  Exit status 1 if anything
// differs.
#include <cutlass/bfloat16.h>
#include <cutlass/half.h>

#include <cstdio>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>

using namespace cute;

namespace {

constexpr int K = 64, N = 256, THREADS = 128;
int differences = 0;

void report(const char* what, int bad, int of) {
  printf("%-16s %d of %d differ\n", what, bad, of);
  differences += bad;
}

// The tile's places, and what make_gmma_desc makes of its second 16 k, but for the address.
template <SM90::GMMA::Major MAJOR, class T, class Tile, class Place>
void compare(const char* what, const Tile& tile, Place place) {
  int bad = 0;
  for (int n = 0; n < N; ++n)
    for (int k = 0; k < K; ++k) {
      const unsigned at = place(n, k);
      bad += unsigned(as_position_independent_swizzle_layout(tile)(n, k)) * sizeof(T) !=
             (at ^ (at >> 7 & 7) << 4);
    }
  report(what, bad, N * K);
  alignas(1024) static T memory[N * K];
  const auto whole = make_tensor(make_smem_ptr(memory), tile);
  const auto step = local_tile(whole, Shape<Int<N>, _16>{}, make_coord(0, 1));
  const auto made = SM90::GMMA::make_gmma_desc<MAJOR>(step).bitfield;
  const bool mn = MAJOR == SM90::GMMA::Major::MN;
  report("  descriptor",
         (made.layout_type_ != 1) + (made.stride_byte_offset_ != 1024 / 16) +
             (mn && made.leading_byte_offset_ != K * 128 / 16),
         3);
}

template <class T>
void compare_both() {
  compare<SM90::GMMA::Major::K, T>(
      "K-major", tile_to_shape(SM90::GMMA::Layout_K_SW128_Atom<T>{}, Shape<Int<N>, Int<K>>{}),
      [](int n, int k) { return unsigned(n * 128 + k * 2); });
  compare<SM90::GMMA::Major::MN, T>(
      "MN-major",
      tile_to_shape(SM90::GMMA::Layout_MN_SW128_Atom<T>{}, Shape<Int<N>, Int<K>>{}, Step<_2, _1>{}),
      [](int n, int k) { return unsigned(n / 64 * K * 128 + k * 128 + n % 64 * 2); });
}

}  // namespace

int main() {
  compare_both<cutlass::bfloat16_t>();
  compare_both<cutlass::half_t>();
  int bad = 0;
  for (int t = 0; t < THREADS; ++t)
    for (int i = 0; i < N / 2; ++i)
      bad += int(SM90::GMMA::CLayout_64x256{}(t, i)) !=
             t / 32 * 16 + t % 32 / 4 + 8 * (i / 2 % 2) + 64 * (i / 4 * 8 + t % 4 * 2 + i % 2);
  report("accumulators", bad, THREADS * N / 2);
  return differences != 0;
}
