// Calls a lambda with a compile-time constant for a rank, or with a value of an element type. A
// rank without a kernel throws.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <stdexcept>
#include <string>
#include <type_traits>

#include "params.h"

namespace lotr {

template <int N>
using Int = std::integral_constant<int, N>;

// Calls f(Int<R>{}) with the smallest compiled rank R >= r. r is at most MAX.
template <int MAX, class F>
void dispatch_rank(int64_t r, F f) {
  static_assert(MAX == 64 || MAX == 128 || MAX == 256);
  if (r < 1 || r > MAX)
    throw std::invalid_argument("rank: expected 1 to " + std::to_string(MAX) + ", got " +
                                std::to_string(r));
  if (r <= 16) return f(Int<16>{});
  if (r <= 32) return f(Int<32>{});
  if (r <= 64) return f(Int<64>{});
  if constexpr (MAX >= 128)
    if (r <= 128) return f(Int<128>{});
  if constexpr (MAX >= 256) f(Int<256>{});
}

// Calls f with a value of the element type: float, __nv_bfloat16 or __half.
template <class F>
void dispatch_type(DType type, F f) {
  if (type == DType::float32)
    f(float{});
  else if (type == DType::bfloat16)
    f(__nv_bfloat16{});
  else
    f(__half{});
}

// The same for a half type. A type other than bfloat16 counts as float16.
template <class F>
void dispatch_half(DType type, F f) {
  if (type == DType::bfloat16)
    f(__nv_bfloat16{});
  else
    f(__half{});
}

}  // namespace lotr
