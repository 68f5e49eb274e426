// Compares the layouts that csrc/cuda/ptx and the executor go by with CuTe's: tiles in shared memory of each width
// and swizzle, the descriptors of all of them, accumulators, an operand in registers.  Built with the headers of
// CUTLASS: test_layouts.py, docs/hopper.md.  Exit status 1 if anything differs.
#include <cutlass/bfloat16.h>
#include <cutlass/half.h>

#include <cstdio>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>
#include <vector>

using namespace cute;

namespace {

constexpr int K = 64, THREADS = 128;
int differences = 0;

void report(const char* what, int n, int bad, int of) {
  printf("%-28s n = %-4d %d of %d differ\n", what, n, bad, of);
  differences += bad;
}

// Rows of so many bytes, with a swizzle as long.
unsigned swizzled(unsigned at, unsigned row) {
  return at ^ (at >> 7 & (row / 16 - 1)) << 4;
}

template <class T, int N, class Tile, class Place>
void compare_tile(const char* what, const Tile& tile, unsigned row, Place place) {
  int bad = 0;
  for (int n = 0; n < N; ++n)
    for (int k = 0; k < K; ++k)
      bad += unsigned(as_position_independent_swizzle_layout(tile)(n, k)) * sizeof(T) !=
             swizzled(place(n, k), row);
  report(what, N, bad, N * K);
}

// An operand of N, MN-major, in panels of WIDTH: swizzled_descriptor_mn<WIDTH>.
template <class T, int N, int WIDTH, class Atom>
void mn_major(const char* what, Atom atom) {
  const auto tile = tile_to_shape(atom, Shape<Int<N>, Int<K>>{}, Step<_2, _1>{});
  compare_tile<T, N>(what, tile, 2 * WIDTH, [](int n, int k) {
    return unsigned(n / WIDTH * K * WIDTH * 2 + k * WIDTH * 2 + n % WIDTH * 2);
  });
  // what make_gmma_desc<Major::MN> makes of 16 k, but for the address; it accepts canonical layouts alone
  alignas(1024) static T memory[N * K];
  const auto whole = make_tensor(make_smem_ptr(memory), tile);
  const auto step = local_tile(whole, Shape<Int<N>, _16>{}, make_coord(0, 1));
  const auto made = SM90::GMMA::make_gmma_desc<SM90::GMMA::Major::MN>(step).bitfield;
  const unsigned panel = N > WIDTH ? K * WIDTH * 2 / 16 : made.leading_byte_offset_;  // of one: anything
  report(what, N,
         (made.layout_type_ != (WIDTH == 64 ? 1 : WIDTH == 32 ? 2 : 3)) +
             (made.stride_byte_offset_ != 16 * WIDTH / 16) + (made.leading_byte_offset_ != panel),
         3);
}

template <class T, int N>
void k_major() {
  const auto tile = tile_to_shape(SM90::GMMA::Layout_K_SW128_Atom<T>{}, Shape<Int<N>, Int<K>>{});
  compare_tile<T, N>("K-major", tile, 128, [](int n, int k) { return unsigned(n * 128 + k * 2); });
  alignas(1024) static T memory[N * K];
  const auto step =
      local_tile(make_tensor(make_smem_ptr(memory), tile), Shape<Int<N>, _16>{}, make_coord(0, 1));
  const auto made = SM90::GMMA::make_gmma_desc<SM90::GMMA::Major::K>(step).bitfield;
  report("K-major", N, (made.layout_type_ != 1) + (made.stride_byte_offset_ != 1024 / 16), 2);
}

// Of each element type: what test_layouts.py lists as in use.
template <class T>
void compare() {
  mn_major<T, 16, 16>("MN-major, 32 bytes", SM90::GMMA::Layout_MN_SW32_Atom<T>{});
  mn_major<T, 32, 32>("MN-major, 64 bytes", SM90::GMMA::Layout_MN_SW64_Atom<T>{});
  mn_major<T, 64, 64>("MN-major, 128 bytes", SM90::GMMA::Layout_MN_SW128_Atom<T>{});
  mn_major<T, 128, 64>("MN-major, 128 bytes", SM90::GMMA::Layout_MN_SW128_Atom<T>{});
  mn_major<T, 256, 64>("MN-major, 128 bytes", SM90::GMMA::Layout_MN_SW128_Atom<T>{});
  k_major<T, 16>();
  k_major<T, 32>();
  k_major<T, 64>();
  k_major<T, 128>();
  k_major<T, 256>();
}

}  // namespace

int main() {
  compare<cutlass::bfloat16_t>();
  compare<cutlass::half_t>();

  constexpr int N = 256;
  const auto row_of = [](int t, int lower) { return t / 32 * 16 + t % 32 / 4 + 8 * lower; };
  int bad = 0;
  for (int t = 0; t < THREADS; ++t)
    for (int i = 0; i < N / 2; ++i)
      bad += int(SM90::GMMA::CLayout_64x256{}(t, i)) !=
             row_of(t, i / 2 % 2) + 64 * (i / 4 * 8 + t % 4 * 2 + i % 2);
  report("accumulators", N, bad, THREADS * N / 2);
  bad = 0;
  for (int t = 0; t < THREADS; ++t)
    for (int i = 0; i < 8; ++i)  // word i / 2
      bad += int(SM90::GMMA::ALayout_64x16{}(t, i)) !=
             row_of(t, i / 2 % 2) + 64 * (t % 4 * 2 + i / 4 * 8 + i % 2);
  report("first operand in registers", N, bad, THREADS * 8);
  return differences != 0;
}
