// row_core and its backward (schema.cpp) on CPU tensors: rows are grouped by their core, and by
// their token.
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <tuple>
#include <vector>

#include "products_cpu.h"

namespace lotr {
namespace {

// The values of an index, each in [least, bound).
std::vector<int64_t> checked_values(const char* op, const Arg& a, const char* what, int64_t least,
                                    int64_t bound) {
  const auto* data = static_cast<const int64_t*>(read_data(a));
  std::vector<int64_t> out(size_t(a.size[0]));
  for (size_t i = 0; i < out.size(); ++i) {
    out[i] = data[int64_t(i) * a.stride[0]];
    if (out[i] < least || out[i] >= bound)
      fail(op, ": ", a.name, ": expected ", what, " in [", least, ", ", bound, "), got ", out[i],
           " in row ", i);
  }
  return out;
}

// Rows grouped by a key from -1 (no group) to bound - 1: a stable sort by digits, so that it costs
// the same for many keys as for few.
class Grouping {
 public:
  Grouping(const std::vector<int64_t>& key, int64_t bound) : bound_(bound) {
    bool sorted = true;
    for (size_t i = 0; i < key.size(); ++i) {
      if (key[i] < 0) continue;
      sorted &= row_.empty() || key[size_t(row_.back())] <= key[i];
      row_.push_back(int64_t(i));
    }
    if (!sorted) sort(key);
    for (size_t i = 0; i < row_.size(); ++i)
      if (i == 0 || key[size_t(row_[i])] != key_.back()) add(key[size_t(row_[i])], int64_t(i));
    first_.push_back(int64_t(row_.size()));
  }
  // Rows grouped by the ends of each core's rows.
  Grouping(const char* op, const Arg& offs, int64_t rows) : bound_(offs.size[0]) {
    const auto* data = static_cast<const int32_t*>(read_data(offs));
    int64_t begin = 0;
    for (int64_t c = 0; c < bound_; ++c) {
      const int64_t end = data[c * offs.stride[0]];
      if (end < begin || end > rows)
        fail(op, ": offs: expected ascending ends in [0, ", rows, "], got ", end, " after ", begin);
      if (end > begin) add(c, begin);
      begin = end;
    }
    first_.push_back(begin);
    for (int64_t i = 0; i < begin; ++i) row_.push_back(i);
  }
  cpu::Groups groups() const {
    return {row_.data(), key_.data(), first_.data(), int64_t(key_.size())};
  }
  int64_t rows() const { return int64_t(row_.size()); }
  bool all_keys() const { return int64_t(key_.size()) == bound_; }

 private:
  void add(int64_t key, int64_t first) {
    key_.push_back(key);
    first_.push_back(first);
  }
  void sort(const std::vector<int64_t>& key) {
    constexpr int kBits = 11;
    std::vector<int64_t> other(row_.size());
    for (int shift = 0; (bound_ - 1) >> shift; shift += kBits) {
      const auto digit = [&](int64_t row) {
        return size_t(key[size_t(row)] >> shift) & ((1 << kBits) - 1);
      };
      std::vector<int64_t> next((1 << kBits) + 1, 0);
      for (const int64_t row : row_) ++next[digit(row) + 1];
      for (size_t d = 1; d < next.size(); ++d) next[d] += next[d - 1];
      for (const int64_t row : row_) other[size_t(next[digit(row)]++)] = row;
      row_.swap(other);
    }
  }

  int64_t bound_;
  std::vector<int64_t> row_, key_, first_;
};

Grouping by_core(const char* op, const RowArgs& a, int64_t rows, int64_t cores) {
  return a.index ? Grouping(checked_values(op, a.index, "cores", -1, cores), cores)
                 : Grouping(op, a.offs, rows);
}

std::vector<int64_t> tokens_of(const char* op, const RowArgs& a, int64_t m) {
  return a.tokens ? checked_values(op, a.tokens, "rows of u", 0, m) : std::vector<int64_t>();
}

// A new tensor. It is zeroed if some of its elements are not written.
template <size_t dim>
Tensor new_tensor(const Arg& like, const std::array<int64_t, dim>& size, ScalarType dtype,
                  bool all_written) {
  const DtypeInfo info = dtype_info(dtype);
  Tensor t = empty<dim>(like, size, info.code);
  int64_t bytes = info.bytes;
  for (const int64_t n : size) bytes *= n;
  if (!all_written && bytes) std::memset(t.mutable_data_ptr(), 0, size_t(bytes));
  return t;
}
// A matrix, or the first matrix of [cores, rows, cols].
TensorView last_matrix(const Arg& a, void* data) {
  const int64_t* size = a.size + a.dim - 2;
  const int64_t* stride = a.stride + a.dim - 2;
  return {data, size[0], size[1], stride[0], stride[1], kernel_dtype(a.dtype)};
}
TensorView written(const Tensor& t) {
  const Arg a("", t);
  return last_matrix(a, written_data(a));
}

}  // namespace

Tensor CpuProducts::row_core(const RowArgs& a, const Sizes& s, double scaling) const {
  const int64_t rows = s[a.tokens ? ROWS : M];
  const Grouping groups = by_core(op_, a, rows, s[L]);
  const std::vector<int64_t> token = tokens_of(op_, a, s[M]);
  const Tensor h = new_tensor<2>(like_, {rows, s[R_OUT]}, like_.dtype, groups.rows() == rows);
  cpu::row_core(written(h), read(a.u), a.tokens ? token.data() : nullptr,
                last_matrix(a.cores, read_data(a.cores)), a.cores.stride[0], groups.groups(),
                scaling);
  return h;
}

std::tuple<Tensor, Tensor> CpuProducts::row_core_backward(const RowArgs& a, const Sizes& s,
                                                          double scaling, bool need_u,
                                                          bool need_cores) const {
  const int64_t rows = s[a.tokens ? ROWS : M];
  const Grouping groups = by_core(op_, a, rows, s[L]);
  const std::vector<int64_t> token = tokens_of(op_, a, s[M]);
  const ScalarType sums = acc_dtype(like_.dtype);
  Tensor du;
  Tensor dcores;
  if (need_u) {
    TensorView transposed = last_matrix(a.cores, read_data(a.cores));
    std::swap(transposed.rows, transposed.cols);
    std::swap(transposed.row_stride, transposed.col_stride);
    const auto product = [&](const Tensor& out) {
      cpu::row_core(written(out), read(a.g), nullptr, transposed, a.cores.stride[0],
                    groups.groups(), scaling);
    };
    const bool all_rows = groups.rows() == rows;
    if (!a.tokens) {
      du = new_tensor<2>(like_, {s[M], s[R_IN]}, like_.dtype, all_rows);
      product(du);
    } else {
      const Grouping by_token(token, s[M]);
      // Not rounded before it is summed.
      const Tensor k = new_tensor<2>(like_, {rows, s[R_IN]}, sums, all_rows);
      product(k);
      du = new_tensor<2>(like_, {s[M], s[R_IN]}, like_.dtype, by_token.all_keys());
      cpu::sum_rows(written(du), written(k), by_token.groups());
    }
  }
  if (need_cores) {
    dcores = new_tensor<3>(like_, {s[L], s[R_IN], s[R_OUT]}, sums, groups.all_keys());
    cpu::row_core_grad(written(dcores), s[R_IN] * s[R_OUT], read(a.g), read(a.u),
                       a.tokens ? token.data() : nullptr, groups.groups(), scaling);
  }
  return {du, dcores};
}

}  // namespace lotr
