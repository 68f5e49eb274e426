// torch's own operators, called by name, and what is made of them where no kernel of ours is.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <array>
#include <string>

#include "arg.h"

namespace lotr {

// Calls an operator, "aten::mul.Tensor" by its overload; returns its results as they lie on the stack.
template <size_t results, typename... Args>
std::array<StableIValue, (sizeof...(Args) > results ? sizeof...(Args) : results)> dispatch(
    const std::string& op, const Args&... args) {
  using torch::stable::detail::from;
  std::array<StableIValue, (sizeof...(Args) > results ? sizeof...(Args) : results)> stack{from(args)...};
  const size_t name = std::min(op.find('.'), op.size());
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op.substr(0, name).c_str(),
                                                      name < op.size() ? op.c_str() + name + 1 : "",
                                                      stack.data(), TORCH_ABI_VERSION));
  return stack;
}
template <typename... Args>
Tensor one(const std::string& op, const Args&... args) {
  return torch::stable::detail::to<Tensor>(dispatch<1>(op, args...)[0]);
}

inline Tensor in_dtype(const Tensor& t, ScalarType dtype) {
  return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
}

// bias + scale y, in sums' dtype and rounded to y's once.
inline Tensor scaled(const Tensor& y, const Tensor& scale, const OptionalTensor& bias) {
  Tensor out = one("aten::mul.Tensor", y, scale);
  if (bias) out = torch::stable::subtract(out, *bias, -1.0);  // the stable interface has no sum of tensors
  return in_dtype(out, y.scalar_type());
}

}  // namespace lotr
