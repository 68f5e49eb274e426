// Shared by the module's files: the simulated device, and numpy arrays as the launchers' matrices. bfloat16
// arrays have the dtype uint16.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <vector>

#include "cuda/launch.h"
#include "simt/api.h"

namespace lotr::simt {

namespace py = pybind11;

// Bytes of shared memory per block: on the smallest supported GPU (sm_86), and where kernels use wgmma.
constexpr size_t SHARED_LIMIT = 101376, SHARED_LIMIT_SM90 = 232448;

struct Settings {
  plan::Card card;
  Float32 float32 = Float32::exact;
  bool wgmma = false, early = true;
  lotr::cuda::Switches off{};
  int most_of_cluster = MOST_OF_CLUSTER;
  size_t shared_limit() const { return wgmma ? SHARED_LIMIT_SM90 : SHARED_LIMIT; }
};
inline Settings settings;

inline DType dtype_of(const char* name, const py::array& a) {
  if (a.itemsize() == 4 && a.dtype().kind() == 'f') return DType::float32;
  if (a.itemsize() == 2) return a.dtype().kind() == 'f' ? DType::float16 : DType::bfloat16;
  throw py::type_error(std::string(name) + ": expected float32, float16 or uint16 (bfloat16), got " +
                       std::string(py::str(a.dtype())));
}

// Registers the array under its name, so that traffic is counted for it.
inline void name_array(const char* name, const py::array& a) {
  if (!options().count_memory || a.size() == 0) return;
  size_t bytes = a.itemsize();
  for (int i = 0; i < a.ndim(); ++i) bytes += size_t(a.shape(i) - 1) * size_t(a.strides(i));
  register_array(name, a.data(), bytes);
}

inline void expect_shape(const char* name, const py::array& a, std::vector<int64_t> shape) {
  std::vector<int64_t> got(a.shape(), a.shape() + a.ndim());
  if (got != shape)
    throw py::value_error(std::string(name) + ": expected shape " + std::string(py::str(py::cast(shape))) +
                          ", got " + std::string(py::str(py::cast(got))));
}

inline int64_t stride(const py::array& a, int dim) {
  return a.strides(dim) / a.itemsize();
}

inline Matrix input(const char* name, const py::array& a, DType type, int64_t rows, int64_t cols) {
  expect_shape(name, a, {rows, cols});
  name_array(name, a);
  const int64_t row = stride(a, 0), col = stride(a, 1);
  return {a.data(), row, col, cuda::access_of(a.data(), row, col, rows, dtype_of(name, a), type)};
}

inline MutableMatrix output(const char* name, py::array& a, DType type, int64_t rows, int64_t cols) {
  if (dtype_of(name, a) != type)
    throw py::type_error(std::string(name) + ": expected the element type of the input");
  const Matrix m = input(name, a, type, rows, cols);
  return {a.mutable_data(), m.row, m.col, m.access};
}

inline float* floats(const char* name, py::array& a) {
  if (dtype_of(name, a) != DType::float32) throw py::type_error(std::string(name) + ": expected float32");
  name_array(name, a);
  return static_cast<float*>(a.mutable_data());
}

inline Dropout dropout(double p, const std::optional<py::array_t<int64_t>>& seed) {
  if (p == 0) return {nullptr, 0, 1.f};
  return {seed.value().data(), uint32_t(p * 4294967296.0), float(1 / (1 - p))};
}

inline cuda::Call call(DType type) {
  return {type,           settings.float32, settings.card, nullptr,
          settings.early, settings.wgmma,   settings.off,  settings.most_of_cluster};
}

void define_operators(py::module_& m);
void define_gemm_lotr(py::module_& m);
void define_rows(py::module_& m);

}  // namespace lotr::simt
