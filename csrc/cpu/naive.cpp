// Plain loops in double, one element at a time: every operator, any dtype, any strides.
#include <cstring>
#include <vector>

#include "cpu/kernels.h"

namespace lotr::cpu {
namespace {

float bits_to_float(uint32_t b) {
  float f;
  std::memcpy(&f, &b, 4);
  return f;
}
uint32_t float_to_bits(float f) {
  uint32_t b;
  std::memcpy(&b, &f, 4);
  return b;
}
uint16_t to_bf16(float f) {
  uint32_t b = float_to_bits(f);
  if ((b & 0x7fffffff) > 0x7f800000) return (b >> 16) | 0x40;
  return (b + 0x7fff + ((b >> 16) & 1)) >> 16;
}
double load(const Mat& a, int64_t i, int64_t j) {
  const int64_t at = i * a.rs + j * a.cs;
  switch (a.dtype) {
    case Dtype::f32:
      return static_cast<const float*>(a.data)[at];
    case Dtype::f64:
      return static_cast<const double*>(a.data)[at];
    case Dtype::bf16:
      return bits_to_float(uint32_t(static_cast<const uint16_t*>(a.data)[at]) << 16);
    case Dtype::f16:
      return static_cast<const _Float16*>(a.data)[at];
  }
  return 0;
}
double round_to(Dtype t, double v) {
  switch (t) {
    case Dtype::f32:
      return float(v);
    case Dtype::f64:
      return v;
    case Dtype::bf16:
      return bits_to_float(uint32_t(to_bf16(float(v))) << 16);
    case Dtype::f16:
      return _Float16(float(v));
  }
  return 0;
}
void store(const Mat& a, int64_t i, int64_t j, double v) {
  const int64_t at = i * a.rs + j * a.cs;
  switch (a.dtype) {
    case Dtype::f32:
      static_cast<float*>(a.data)[at] = float(v);
      break;
    case Dtype::f64:
      static_cast<double*>(a.data)[at] = v;
      break;
    case Dtype::bf16:
      static_cast<uint16_t*>(a.data)[at] = to_bf16(float(v));
      break;
    case Dtype::f16:
      static_cast<_Float16*>(a.data)[at] = _Float16(float(v));
      break;
  }
}
void add(const Mat& a, int64_t i, int64_t j, double v) {
  store(a, i, j, load(a, i, j) + v);
}

double keep(const Drop& d, int64_t i, int64_t j, int64_t cols) {
  if (!d.on) return 1.0;
  const uint64_t e = uint64_t(i) * uint64_t(cols) + uint64_t(j), q = e / 4;
  uint32_t c[4] = {uint32_t(q), uint32_t(q >> 32), 0, 0}, k0 = uint32_t(d.seed), k1 = uint32_t(d.seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(0xD2511F53u) * c[0], p1 = uint64_t(0xCD9E8D57u) * c[2];
    const uint32_t next[4] = {uint32_t(p1 >> 32) ^ c[1] ^ k0, uint32_t(p1), uint32_t(p0 >> 32) ^ c[3] ^ k1,
                              uint32_t(p0)};
    std::memcpy(c, next, sizeof c);
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  return c[e % 4] >= d.threshold ? d.scale : 0.0;
}
double dropped(const Mat& a, int64_t i, int64_t j, const Drop& d) {
  const double kept = keep(d, i, j, a.cols);
  return kept == 0.0 ? 0.0 : load(a, i, j) * kept;
}
Mat layer(const Mat& a, int64_t stride, int64_t l) {
  Mat b = a;
  const int64_t size = a.dtype == Dtype::f64 ? 8 : a.dtype == Dtype::f32 ? 4 : 2;
  b.data = static_cast<char*>(a.data) + l * stride * size;
  return b;
}

}  // namespace

void shrink(const Mat& u, const Mat& x, const Mat& A, const Drop& drop) {
  std::vector<double> row(u.cols);
  for (int64_t i = 0; i < x.rows; ++i) {
    for (auto& v : row) v = 0;
    for (int64_t k = 0; k < x.cols; ++k) {
      const double xv = dropped(x, i, k, drop);
      for (int64_t j = 0; j < u.cols; ++j) row[j] += xv * round_to(x.dtype, load(A, k, j));
    }
    for (int64_t j = 0; j < u.cols; ++j) store(u, i, j, row[j]);
  }
}

void expand_add(const Mat& y, const Mat& u, const Mat& F, const Drop& drop) {
  for (int64_t i = 0; i < y.rows; ++i) {
    for (int64_t n = 0; n < y.cols; ++n) {
      double sum = 0;
      for (int64_t j = 0; j < u.cols; ++j) sum += load(u, i, j) * round_to(y.dtype, load(F, n, j));
      const double kept = keep(drop, i, n, y.cols);
      if (kept != 0.0) add(y, i, n, sum * kept);
    }
  }
}

void factor_grad(const Mat& acc, const Mat& x, const Mat& k, const Drop& drop) {
  std::vector<double> sum(acc.rows * acc.cols);
  for (int64_t i = 0; i < x.rows; ++i) {
    for (int64_t c = 0; c < x.cols; ++c) {
      const double xv = dropped(x, i, c, drop);
      for (int64_t j = 0; j < k.cols; ++j) sum[c * k.cols + j] += xv * load(k, i, j);
    }
  }
  for (int64_t c = 0; c < acc.rows; ++c)
    for (int64_t j = 0; j < acc.cols; ++j) add(acc, c, j, sum[c * acc.cols + j]);
}

void shrink_grad(const Mat& k, const Mat& Q, const Mat& g, const Mat& F, const Mat& u) {
  shrink(k, g, F, Drop{});
  for (int64_t n = 0; n < Q.rows; ++n)
    for (int64_t j = 0; j < Q.cols; ++j) store(Q, n, j, 0.0);
  factor_grad(Q, g, u, Drop{});
}

void fold(const Mat& F, int64_t F_ls, const Mat& B, const Mat& cores, int64_t cores_ls, int64_t l,
          double scaling) {
  for (int64_t layer_index = 0; layer_index < l; ++layer_index) {
    const Mat out = layer(F, F_ls, layer_index), core = layer(cores, cores_ls, layer_index);
    for (int64_t n = 0; n < B.rows; ++n)
      for (int64_t a = 0; a < core.rows; ++a) {
        double sum = 0;
        for (int64_t b = 0; b < B.cols; ++b) sum += load(B, n, b) * load(core, a, b);
        store(out, n, a, scaling * sum);
      }
  }
}

void fold_grad(const Mat& dB, const Mat& dcores, int64_t dcores_ls, const Mat& Q, int64_t Q_ls, const Mat& B,
               const Mat& cores, int64_t cores_ls, int64_t l, double scaling) {
  for (int64_t layer_index = 0; layer_index < l; ++layer_index) {
    const Mat core = layer(cores, cores_ls, layer_index), q = layer(Q, Q_ls, layer_index);
    const Mat dcore = layer(dcores, dcores_ls, layer_index);
    for (int64_t a = 0; a < core.rows; ++a)
      for (int64_t b = 0; b < core.cols; ++b) {
        double sum = 0;
        for (int64_t n = 0; n < B.rows; ++n) sum += load(q, n, a) * load(B, n, b);
        store(dcore, a, b, scaling * sum);
      }
    if (!dB.data) continue;
    for (int64_t n = 0; n < B.rows; ++n)
      for (int64_t b = 0; b < B.cols; ++b) {
        double sum = 0;
        for (int64_t a = 0; a < core.rows; ++a) sum += load(q, n, a) * load(core, a, b);
        add(dB, n, b, scaling * sum);
      }
  }
}

void small_forward(const Mat& u, const Mat& y, const Mat& x, const Mat& A, const Mat& core, const Mat& B,
                   double scaling) {
  shrink(u, x, A, Drop{});
  std::vector<double> h(B.cols);
  for (int64_t i = 0; i < x.rows; ++i) {
    for (int64_t b = 0; b < B.cols; ++b) {
      h[b] = 0;
      for (int64_t a = 0; a < u.cols; ++a) h[b] += load(u, i, a) * round_to(x.dtype, load(core, a, b));
      h[b] *= scaling;
    }
    for (int64_t n = 0; n < y.cols; ++n) {
      double sum = 0;
      for (int64_t b = 0; b < B.cols; ++b) sum += h[b] * round_to(x.dtype, load(B, n, b));
      add(y, i, n, sum);
    }
  }
}

void small_backward(const SmallBackward& s) {
  const int64_t r_in = s.core.rows, r_out = s.core.cols;
  const Dtype t = s.g.dtype;
  std::vector<double> h(r_out), k(r_in), uc(r_out), dcore(r_in * r_out), dA(s.A.rows * r_in),
      dB(s.B.rows * r_out);
  for (int64_t i = 0; i < s.g.rows; ++i) {
    for (int64_t b = 0; b < r_out; ++b) {
      h[b] = uc[b] = 0;
      for (int64_t n = 0; n < s.g.cols; ++n) h[b] += load(s.g, i, n) * round_to(t, load(s.B, n, b));
      h[b] *= s.scaling;
      for (int64_t a = 0; a < r_in; ++a) uc[b] += load(s.u, i, a) * round_to(t, load(s.core, a, b));
      for (int64_t a = 0; a < r_in; ++a) dcore[a * r_out + b] += load(s.u, i, a) * h[b];
    }
    for (int64_t a = 0; a < r_in; ++a) {
      k[a] = 0;
      for (int64_t b = 0; b < r_out; ++b) k[a] += h[b] * round_to(t, load(s.core, a, b));
    }
    for (int64_t c = 0; c < s.A.rows; ++c)
      for (int64_t a = 0; a < r_in; ++a) {
        if (s.dA.data) dA[c * r_in + a] += load(s.x, i, c) * k[a];
      }
    if (s.dx.data)
      for (int64_t c = 0; c < s.A.rows; ++c) {
        double sum = 0;
        for (int64_t a = 0; a < r_in; ++a) sum += k[a] * round_to(t, load(s.A, c, a));
        add(s.dx, i, c, sum);
      }
    if (s.dB.data)
      for (int64_t n = 0; n < s.B.rows; ++n)
        for (int64_t b = 0; b < r_out; ++b) dB[n * r_out + b] += s.scaling * load(s.g, i, n) * uc[b];
  }
  if (s.dA.data)
    for (int64_t c = 0; c < s.A.rows; ++c)
      for (int64_t a = 0; a < r_in; ++a) add(s.dA, c, a, dA[c * r_in + a]);
  if (s.dB.data)
    for (int64_t n = 0; n < s.B.rows; ++n)
      for (int64_t b = 0; b < r_out; ++b) add(s.dB, n, b, dB[n * r_out + b]);
  if (s.dcore.data)
    for (int64_t a = 0; a < r_in; ++a)
      for (int64_t b = 0; b < r_out; ++b) store(s.dcore, a, b, dcore[a * r_out + b]);
}

const char* isa_name() {
  return "generic";
}

}  // namespace lotr::cpu
