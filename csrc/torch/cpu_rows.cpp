// A core a row, for mixtures of experts and batches of many tasks: schemas and the CPU front end.
//
//   row_core            h_i = scaling u_t(i) G_c(i)
//   row_core_backward   du_t = scaling sum over the rows of t of g_i G_c(i)^T
//                       dG_c = scaling sum over the rows of c of u_t(i)^T g_i, float32 (float64 for float64)
//
// index [rows]: c(i), or -1 for a row without a core; or offs [c]: where the rows of each core end, the rows
// behind the last having none. tokens [rows]: t(i), else i. h is zero for a row without a core, which has no
// gradient.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <tuple>
#include <vector>

#include "check_rows.h"
#include "cpu_args.h"

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
  // By the ends of their rows.
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

Grouping by_core(const char* op, const RowArgs& by, const RowSizes& s) {
  return by.index ? Grouping(values(op, *by.index, "cores", -1, s.cores), s.cores)
                  : Grouping(op, *by.offs, s.rows);
}

std::vector<int64_t> tokens_of(const char* op, const RowArgs& by, const RowSizes& s) {
  return by.tokens ? values(op, *by.tokens, "rows of u", 0, s.m) : std::vector<int64_t>();
}

// Zeros in what no group writes.
void clear(const Tensor& t, const Arg& a, bool needed) {
  if (!needed) return;
  int64_t bytes = item_size(a.dtype);
  for (int64_t i = 0; i < a.dim; ++i) bytes *= a.size[i];
  if (bytes) std::memset(t.mutable_data_ptr(), 0, size_t(bytes));
}

Tensor row_core(const Tensor& u, const Tensor& cores, const OptionalTensor& index, const OptionalTensor& offs,
                const OptionalTensor& tokens, double scaling) {
  constexpr const char* op = "lotr::row_core";
  const Arg au("u", u), acores("cores", cores);
  const RowArgs by(index, offs, tokens);
  const RowSizes s = check_row_core(op, nullptr, au, acores, by, scaling);
  const Grouping groups = by_core(op, by, s);
  const std::vector<int64_t> token = tokens_of(op, by, s);
  Tensor h = empty<2>({s.rows, s.r_out}, au.dtype);
  const Arg ah("h", h);
  clear(h, ah, groups.rows() < s.rows);
  cpu::row_core(written(ah), read(au), by.tokens ? token.data() : nullptr, read(acores), acores.stride[0],
                groups.groups(), scaling);
  return h;
}

std::tuple<Tensor, Tensor> row_core_backward(const Tensor& g, const Tensor& u, const Tensor& cores,
                                             const OptionalTensor& index, const OptionalTensor& offs,
                                             const OptionalTensor& tokens, double scaling, bool need_u,
                                             bool need_cores) {
  constexpr const char* op = "lotr::row_core_backward";
  const Arg ag("g", g), au("u", u), acores("cores", cores);
  const RowArgs by(index, offs, tokens);
  const RowSizes s = check_row_core(op, &ag, au, acores, by, scaling);
  const ScalarType acc = acc_dtype(au.dtype);
  const Grouping groups = by_core(op, by, s);
  const std::vector<int64_t> token = tokens_of(op, by, s);
  Tensor du = need_u ? empty<2>({s.m, s.r_in}, au.dtype) : empty<2>({0, 0}, au.dtype);
  Tensor dcores = need_cores ? empty<3>({s.cores, s.r_in, s.r_out}, acc) : empty<3>({0, 0, 0}, acc);
  const Arg adu("du", du), adcores("dcores", dcores);
  if (need_u) {
    cpu::Mat transposed = read(acores);
    std::swap(transposed.rows, transposed.cols), std::swap(transposed.rs, transposed.cs);
    const auto product = [&](const Arg& out) {
      cpu::row_core(written(out), read(ag), nullptr, transposed, acores.stride[0], groups.groups(), scaling);
    };
    if (!by.tokens) {
      clear(du, adu, groups.rows() < s.rows);
      product(adu);
    } else {
      const Grouping by_token(token, s.m);
      Tensor k = empty<2>({s.rows, s.r_in}, acc);  // not rounded before it is summed
      const Arg ak("k", k);
      clear(k, ak, groups.rows() < s.rows), clear(du, adu, !by_token.all_keys());
      product(ak);
      cpu::sum_rows(written(adu), read(ak), by_token.groups());
    }
  }
  if (need_cores) {
    clear(dcores, adcores, !groups.all_keys());
    cpu::row_core_grad(written(adcores), adcores.stride[0], read(ag), read(au),
                       by.tokens ? token.data() : nullptr, groups.groups(), scaling);
  }
  return {du, dcores};
}

}  // namespace
}  // namespace lotr

STABLE_TORCH_LIBRARY_FRAGMENT(lotr, m) {
  m.def(
      "row_core(Tensor u, Tensor cores, Tensor? index, Tensor? offs, Tensor? tokens, float scaling) -> "
      "Tensor");
  m.def(
      "row_core_backward(Tensor g, Tensor u, Tensor cores, Tensor? index, Tensor? offs, Tensor? tokens, "
      "float scaling, bool need_u, bool need_cores) -> (Tensor du, Tensor dcores)");
}

STABLE_TORCH_LIBRARY_IMPL(lotr, CPU, m)
{
  m.impl("row_core", TORCH_BOX(&lotr::row_core));
  m.impl("row_core_backward", TORCH_BOX(&lotr::row_core_backward));
}
