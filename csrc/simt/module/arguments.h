// The arguments of run(): numpy arrays and numbers by name, checked against the kernel's line of
// the table in kernels.cpp. bfloat16 arrays have the dtype uint16.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <map>
#include <string>
#include <vector>

#include "cuda/launch.h"
#include "simt/api.h"

namespace lotr::simt {

namespace py = pybind11;

struct Kernel;

class Arguments {
 public:
  // Throws py::value_error for a name that is missing or that the kernel does not have.
  Arguments(const Kernel& kernel, const py::dict& arrays, const py::dict& numbers);

  bool has(const char* name) const { return arrays_.count(name); }
  int64_t extent(const char* name, int dim) const { return array(name).shape(dim); }
  DType type(const char* name) const;
  double number(const char* name) const { return numbers_.at(name); }

  // Arguments of a kernel of element type `as`. An array that is absent is null.
  Matrix input(const char* name, DType as, int64_t rows, int64_t cols) const;
  Matrix output(const char* name, DType as, int64_t rows, int64_t cols) const;
  FloatSum sum(const char* name, int64_t rows, int64_t cols, bool add) const;
  const void* vector(const char* name, DType as, int64_t size) const;  // [size]
  // float32. Strides are not checked: where the problem has only this pointer, the array must be
  // contiguous.
  float* floats(const char* name, std::vector<int64_t> shape) const;
  // Matrices [count, rows, cols] of any type: the first one, and the stride from one to the next.
  struct Stack {
    Matrix first;
    int64_t stride;
  };
  Stack stack(const char* name, int64_t count, int64_t rows, int64_t cols) const;
  int64_t stride(const char* name, int dim) const;  // in elements, 0 for an absent array
  // One dimension of integers, or null.
  template <class T>
  const T* integers(const char* name) const {
    if (!has(name)) return nullptr;
    const py::array& a = array(name);
    if (a.itemsize() != sizeof(T) || a.dtype().kind() != 'i' || a.ndim() != 1 ||
        (a.size() > 1 && a.strides(0) != py::ssize_t(sizeof(T))))
      fail(name, "contiguous int" + std::to_string(8 * sizeof(T)), py::str(a.dtype()));
    register_traffic(name);
    return static_cast<const T*>(a.data());
  }
  Dropout dropout() const;  // of the number p and the array seed

 private:
  const py::array& array(const char* name) const;
  void expect_shape(const char* name, const std::vector<int64_t>& shape) const;
  void register_traffic(const char* name) const;  // so that the array's traffic is counted
  [[noreturn]] void fail(const char* name, const std::string& expected,
                         const std::string& got) const;

  const Kernel& kernel_;
  std::map<std::string, py::array> arrays_;
  std::map<std::string, double> numbers_;
};

// A kernel that Python can run. arrays: names, of which those after "[" are optional, as in
// "x A u [ seed ]". numbers: names with their defaults, as in "p=0 scale=1".
struct Kernel {
  const char *name, *arrays, *numbers;
  void (*run)(const Arguments& args);
};
const std::vector<Kernel>& kernels();

// The GPU for which plans are made.
struct Device {
  plan::Card card;
  bool early = true;
};
inline Device device;

// Memory as torch's allocator returns it on a GPU: aligned, with any content (here NaN). name: for
// the counts of traffic, null for none.
class Memory {
 public:
  Memory(const char* name, size_t bytes);
  template <class T>
  T* as() {
    return reinterpret_cast<T*>(base_);
  }
  void check() const;  // throws if a kernel wrote past its end

 private:
  std::vector<uint32_t> words_;
  uint32_t *base_, *end_;
};

}  // namespace lotr::simt
