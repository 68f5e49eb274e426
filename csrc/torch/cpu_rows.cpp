// row_core and its backward (schema.cpp) on CPU tensors: rows are grouped by their core, and by their token.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <tuple>
#include <vector>

#include "products_cpu.h"

namespace lotr {
namespace {

// The values of an index, each in [least, bound).
std::vector<int64_t> values(const char* op, const Arg& a, const char* what, int64_t least, int64_t bound) {
  const auto* data = static_cast<const int64_t*>(read_data(a));
  std::vector<int64_t> out(size_t(a.size[0]));
  for (size_t i = 0; i < out.size(); ++i)
    if (out[i] = data[int64_t(i) * a.stride[0]]; out[i] < least || out[i] >= bound)
      fail(op, ": ", a.name, ": expected ", what, " in [", least, ", ", bound, "), got ", out[i], " in row ",
           i);
  return out;
}

// Rows grouped by a key from -1 (no group) to bound - 1: a stable sort by digits, so that it costs the same
// for many keys as for few.
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
  cpu::Groups groups() const { return {row_.data(), key_.data(), first_.data(), int64_t(key_.size())}; }
  int64_t rows() const { return int64_t(row_.size()); }
  bool all_keys() const { return int64_t(key_.size()) == bound_; }

 private:
  void add(int64_t key, int64_t first) { key_.push_back(key), first_.push_back(first); }
  void sort(const std::vector<int64_t>& key) {
    constexpr int kBits = 11;
    std::vector<int64_t> other(row_.size());
    for (int shift = 0; (bound_ - 1) >> shift; shift += kBits) {
      const auto digit = [&](int64_t row) { return size_t(key[size_t(row)] >> shift) & ((1 << kBits) - 1); };
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

Grouping by_core(const Check& c, const RowArgs& a, const RowSizes& s) {
  return a.index ? Grouping(values(c.op, a.index, "cores", -1, s.cores), s.cores)
                 : Grouping(c.op, a.offs, s.rows);
}

std::vector<int64_t> tokens_of(const Check& c, const RowArgs& a, const RowSizes& s) {
  return a.tokens ? values(c.op, a.tokens, "rows of u", 0, s.m) : std::vector<int64_t>();
}

// A new tensor, of zeros where some of it is not written.
template <size_t dim>
Tensor made(const std::array<int64_t, dim>& size, ScalarType dtype, bool all_written) {
  Tensor t = empty_of<dim>(size, dtype);
  int64_t bytes = item_size(dtype);
  for (const int64_t n : size) bytes *= n;
  if (!all_written && bytes) std::memset(t.mutable_data_ptr(), 0, size_t(bytes));
  return t;
}
cpu::Mat written(const Tensor& t) {
  const Arg a("", t);
  return layer_mat(a, written_data(a));
}

Tensor row_core(const Tensor& u, const Tensor& cores, const OptionalTensor& index, const OptionalTensor& offs,
                const OptionalTensor& tokens, double scaling) {
  const Check c{"lotr::row_core"};
  const RowArgs a{{"g", OptionalTensor()}, {"u", u},       {"cores", cores},
                  {"index", index},        {"offs", offs}, {"tokens", tokens}};
  const RowSizes s = a.check(c, scaling);
  const Grouping groups = by_core(c, a, s);
  const std::vector<int64_t> token = tokens_of(c, a, s);
  const Tensor h = made<2>({s.rows, s.r_out}, a.u.dtype, groups.rows() == s.rows);
  cpu::row_core(written(h), mat_of(a.u, read_data(a.u)), a.tokens ? token.data() : nullptr,
                layer_mat(a.cores, read_data(a.cores)), a.cores.stride[0], groups.groups(), scaling);
  return h;
}

std::tuple<Tensor, Tensor> row_core_backward(const Tensor& g, const Tensor& u, const Tensor& cores,
                                             const OptionalTensor& index, const OptionalTensor& offs,
                                             const OptionalTensor& tokens, double scaling, bool need_u,
                                             bool need_cores) {
  const Check c{"lotr::row_core_backward"};
  const RowArgs a{{"g", g}, {"u", u}, {"cores", cores}, {"index", index}, {"offs", offs}, {"tokens", tokens}};
  const RowSizes s = a.check(c, scaling);
  const ScalarType sums = acc_dtype(a.u.dtype);
  const Grouping groups = by_core(c, a, s);
  const std::vector<int64_t> token = tokens_of(c, a, s);
  const cpu::Mat g_mat = mat_of(a.g, read_data(a.g));
  Tensor du = empty_of<2>({0, 0}, a.u.dtype), dcores = empty_of<3>({0, 0, 0}, sums);
  if (need_u) {
    cpu::Mat transposed = layer_mat(a.cores, read_data(a.cores));
    std::swap(transposed.rows, transposed.cols), std::swap(transposed.rs, transposed.cs);
    const auto product = [&](const Tensor& out) {
      cpu::row_core(written(out), g_mat, nullptr, transposed, a.cores.stride[0], groups.groups(), scaling);
    };
    const bool all_rows = groups.rows() == s.rows;
    if (!a.tokens) {
      du = made<2>({s.m, s.r_in}, a.u.dtype, all_rows);
      product(du);
    } else {
      const Grouping by_token(token, s.m);
      const Tensor k = made<2>({s.rows, s.r_in}, sums, all_rows);  // not rounded before it is summed
      product(k);
      du = made<2>({s.m, s.r_in}, a.u.dtype, by_token.all_keys());
      cpu::sum_rows(written(du), written(k), by_token.groups());
    }
  }
  if (need_cores) {
    dcores = made<3>({s.cores, s.r_in, s.r_out}, sums, groups.all_keys());
    cpu::row_core_grad(written(dcores), s.r_in * s.r_out, g_mat, mat_of(a.u, read_data(a.u)),
                       a.tokens ? token.data() : nullptr, groups.groups(), scaling);
  }
  return {du, dcores};
}

}  // namespace
}  // namespace lotr

STABLE_TORCH_LIBRARY_IMPL(lotr, CPU, m)
{
  m.impl("row_core", TORCH_BOX(&lotr::row_core));
  m.impl("row_core_backward", TORCH_BOX(&lotr::row_core_backward));
}
