// What run() was given: numpy arrays and numbers by name, checked against the kernel's line of the
// table in kernels.cpp.  bfloat16 arrays have the dtype uint16.
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

class Given {
 public:
  // Throws py::value_error for a name that is missing or that the kernel does not have.
  Given(const Kernel& kernel, const py::dict& arrays, const py::dict& numbers);

  bool has(const char* name) const { return arrays_.count(name); }
  int64_t extent(const char* name, int dim) const { return array(name).shape(dim); }
  DType type(const char* name) const;
  double number(const char* name) const { return numbers_.at(name); }

  // A matrix [rows, cols] that a kernel of element type `type` reads; null where the array was not
  // given.
  Matrix input(const char* name, DType type, int64_t rows, int64_t cols) const;
  MutableMatrix output(const char* name, DType type, int64_t rows, int64_t cols) const;
  // Matrices [count, rows, cols], in whatever type they are; first: the stride from one to the
  // next.
  struct Stack {
    Matrix matrix;
    int64_t first;
  };
  Stack stack(const char* name, int64_t count, int64_t rows, int64_t cols) const;
  const void* line(const char* name, DType as,
                   int64_t size) const;  // [size], null where it is not given
  // float32 [shape], null where the array was not given.
  float* floats(const char* name, std::vector<int64_t> shape) const;
  int64_t stride(const char* name, int dim) const;  // in elements, 0 where it was not given
  // One dimension of integers, or null.
  template <class T>
  const T* integers(const char* name) const {
    if (!has(name)) return nullptr;
    const py::array& a = array(name);
    if (a.itemsize() != sizeof(T) || a.dtype().kind() != 'i' || a.ndim() != 1 ||
        (a.size() > 1 && a.strides(0) != py::ssize_t(sizeof(T))))
      fail(name, "contiguous int" + std::to_string(8 * sizeof(T)), py::str(a.dtype()));
    count_for(name);
    return static_cast<const T*>(a.data());
  }
  Dropout dropout() const;  // of the number p and the array seed

 private:
  const py::array& array(const char* name) const;
  void expect_shape(const char* name, const std::vector<int64_t>& shape) const;
  void count_for(const char* name) const;  // registers the array, so that its traffic is counted
  [[noreturn]] void fail(const char* name, const std::string& expected,
                         const std::string& got) const;

  const Kernel& kernel_;
  std::map<std::string, py::array> arrays_;
  std::map<std::string, double> numbers_;
};

// A kernel that Python can run.  arrays: names, those in brackets may be missing; numbers: names
// with their defaults.
struct Kernel {
  const char *name, *arrays, *numbers;
  void (*run)(const Given& given);
};
const std::vector<Kernel>& kernels();

// The GPU that plans are made for.
struct Device {
  plan::Card card;
  bool early = true;
};
inline Device device;

// Memory as torch's allocator gives it on a GPU: aligned, of unknown content (here NaN).  name: for
// the counts of traffic, null for none.
class Memory {
 public:
  Memory(const char* name, size_t bytes);
  template <class T>
  T* as() {
    return reinterpret_cast<T*>(base_);
  }
  void check() const;  // throws if a kernel wrote behind it

 private:
  std::vector<uint32_t> words_;
  uint32_t *base_, *behind_;
};

}  // namespace lotr::simt
