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
std::vector<int64_t> checked_values(const char* op, const Arg& arg, const char* what, int64_t least,
                                    int64_t bound) {
  const auto* data = static_cast<const int64_t*>(read_data(arg));
  std::vector<int64_t> out(size_t(arg.size[0]));
  for (size_t i = 0; i < out.size(); ++i) {
    out[i] = data[int64_t(i) * arg.stride[0]];
    if (out[i] < least || out[i] >= bound)
      fail(op, ": ", arg.name, ": expected ", what, " in [", least, ", ", bound, "), got ", out[i],
           " in row ", i);
  }
  return out;
}

// Rows grouped by a key from -1 (no group) to bound - 1. Keys that are not in order are sorted by a
// stable radix sort, with a pass per 11 bits of the bound. Example: the keys {2, 0, -1, 2} make two
// groups, key 0 with row 1 and key 2 with rows 0 and 3.
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
  cpu::Groups view() const {
    return {row_.data(), key_.data(), first_.data(), int64_t(key_.size())};
  }
  int64_t rows() const { return int64_t(row_.size()); }
  bool has_all_keys() const { return int64_t(key_.size()) == bound_; }

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
  std::vector<int64_t> row_, key_, first_;  // of cpu::Groups (cpu/kernels.h)
};

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
// A matrix, or the first one of [cores, rows, cols].
TensorView first_matrix(const Arg& arg, void* data) {
  const int64_t* size = arg.size + arg.dim - 2;
  const int64_t* stride = arg.stride + arg.dim - 2;
  return {data, size[0], size[1], stride[0], stride[1], kernel_dtype(arg.dtype)};
}
TensorView output_view(const Tensor& t) {
  const Arg arg("", t);
  return first_matrix(arg, write_data(arg));
}

Grouping group_by_core(const char* op, const RowArgs& args, int64_t rows, int64_t cores) {
  if (args.offs) return Grouping(op, args.offs, rows);
  return Grouping(checked_values(op, args.index, "cores", -1, cores), cores);
}

// The rows of a call, checked: grouped by their core, and each row's token.
struct Rows {
  int64_t count;
  Grouping by_core;
  std::vector<int64_t> tokens;  // empty: row i has token i

  Rows(const char* op, const RowArgs& args, const Sizes& sizes)
      : count(sizes[args.tokens ? ROWS : M]), by_core(group_by_core(op, args, count, sizes[L])) {
    if (args.tokens) tokens = checked_values(op, args.tokens, "rows of u", 0, sizes[M]);
  }
  const int64_t* token() const { return tokens.empty() ? nullptr : tokens.data(); }
  bool all_have_cores() const { return by_core.rows() == count; }
};

// du_t = s * the sum over the rows of t of g_i G_c(i)^T. Without tokens, row i is token i.
Tensor gradient_of_u(const RowArgs& args, const Sizes& sizes, const Rows& rows, double scaling) {
  TensorView transposed = first_matrix(args.cores, read_data(args.cores));
  std::swap(transposed.rows, transposed.cols);
  std::swap(transposed.row_stride, transposed.col_stride);
  // Rows that are summed by token are rounded only after the sum.
  const ScalarType dtype = args.tokens ? acc_dtype(args.u.dtype) : args.u.dtype;
  const Tensor row_du =
      new_tensor<2>(args.u, {rows.count, sizes[R_IN]}, dtype, rows.all_have_cores());
  cpu::row_core(output_view(row_du), read_view(args.g), nullptr, transposed, args.cores.stride[0],
                rows.by_core.view(), scaling);
  if (!args.tokens) return row_du;
  const Grouping by_token(rows.tokens, sizes[M]);
  const Tensor du =
      new_tensor<2>(args.u, {sizes[M], sizes[R_IN]}, args.u.dtype, by_token.has_all_keys());
  cpu::sum_rows(output_view(du), output_view(row_du), by_token.view());
  return du;
}

Tensor gradient_of_cores(const RowArgs& args, const Sizes& sizes, const Rows& rows,
                         double scaling) {
  const Tensor dcores = new_tensor<3>(args.u, {sizes[L], sizes[R_IN], sizes[R_OUT]},
                                      acc_dtype(args.u.dtype), rows.by_core.has_all_keys());
  cpu::row_core_grad(output_view(dcores), sizes[R_IN] * sizes[R_OUT], read_view(args.g),
                     read_view(args.u), rows.token(), rows.by_core.view(), scaling);
  return dcores;
}

}  // namespace

Tensor CpuProducts::row_core(const RowArgs& args, const Sizes& sizes, double scaling) const {
  const Rows rows(op_, args, sizes);
  const Tensor h =
      new_tensor<2>(like_, {rows.count, sizes[R_OUT]}, like_.dtype, rows.all_have_cores());
  cpu::row_core(output_view(h), read_view(args.u), rows.token(),
                first_matrix(args.cores, read_data(args.cores)), args.cores.stride[0],
                rows.by_core.view(), scaling);
  return h;
}

std::tuple<Tensor, Tensor> CpuProducts::row_core_backward(const RowArgs& args, const Sizes& sizes,
                                                          double scaling, bool need_u,
                                                          bool need_cores) const {
  const Rows rows(op_, args, sizes);
  return {need_u ? gradient_of_u(args, sizes, rows, scaling) : Tensor(),
          need_cores ? gradient_of_cores(args, sizes, rows, scaling) : Tensor()};
}

}  // namespace lotr
