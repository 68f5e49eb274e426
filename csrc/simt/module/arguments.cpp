// Implements arguments.h.
#include "arguments.h"

#include <sstream>

namespace lotr::simt {

Arguments::Arguments(const Kernel& kernel, const py::dict& arrays, const py::dict& numbers)
    : kernel_(kernel) {
  for (const auto& [name, value] : arrays)
    if (!value.is_none()) arrays_[py::str(name)] = py::array::ensure(value);
  size_t accepted = 0;
  bool required = true;
  std::istringstream words(kernel.arrays);
  for (std::string word; words >> word;) {
    if (word == "[") {
      required = false;
    } else if (arrays_.count(word)) {
      ++accepted;
    } else if (required) {
      fail("arrays", kernel.arrays, "no " + word);
    }
  }
  if (accepted != arrays_.size())
    fail("arrays", kernel.arrays, py::str(py::list(arrays.attr("keys")())));
  words = std::istringstream(kernel.numbers);
  for (std::string word; words >> word;) {
    const size_t equals = word.find('=');
    numbers_[word.substr(0, equals)] = std::stod(word.substr(equals + 1));
  }
  for (const auto& [name, value] : numbers) {
    const auto number = numbers_.find(py::str(name));
    if (number == numbers_.end()) fail("numbers", kernel.numbers, py::str(name));
    number->second = value.cast<double>();
  }
}

void Arguments::fail(const char* name, const std::string& expected, const std::string& got) const {
  throw py::value_error(std::string(kernel_.name) + ": " + name + ": expected " + expected +
                        ", got " + got);
}

const py::array& Arguments::array(const char* name) const {
  return arrays_.at(name);
}

DType Arguments::type(const char* name) const {
  const py::array& a = array(name);
  const char kind = a.dtype().kind();
  if (a.itemsize() == 4 && kind == 'f') return DType::float32;
  if (a.itemsize() == 2 && (kind == 'f' || kind == 'u'))
    return kind == 'f' ? DType::float16 : DType::bfloat16;
  fail(name, "float32, float16 or uint16 (bfloat16)", py::str(a.dtype()));
}

void Arguments::expect_shape(const char* name, const std::vector<int64_t>& shape) const {
  const py::array& a = array(name);
  const std::vector<int64_t> got(a.shape(), a.shape() + a.ndim());
  const auto text = [](const std::vector<int64_t>& extents) {
    std::string all;
    for (const int64_t extent : extents) all += (all.empty() ? "[" : ", ") + std::to_string(extent);
    return "shape " + all + "]";
  };
  if (got != shape) fail(name, text(shape), text(got));
}

void Arguments::register_traffic(const char* name) const {
  const py::array& a = array(name);
  if (!options().count_memory || a.size() == 0) return;
  size_t bytes = size_t(a.itemsize());
  for (int i = 0; i < a.ndim(); ++i) bytes += size_t(a.shape(i) - 1) * size_t(a.strides(i));
  register_array(name, a.data(), bytes);
}

int64_t Arguments::stride(const char* name, int dim) const {
  return has(name) ? array(name).strides(dim) / array(name).itemsize() : 0;
}

Matrix Arguments::input(const char* name, DType as, int64_t rows, int64_t cols) const {
  if (!has(name)) return {};
  expect_shape(name, {rows, cols});
  register_traffic(name);
  const int64_t row = stride(name, 0);
  const int64_t col = stride(name, 1);
  void* const data = const_cast<void*>(array(name).data());
  return {data, row, col, cuda::access_of(data, row, col, rows, type(name), as)};
}

Matrix Arguments::output(const char* name, DType as, int64_t rows, int64_t cols) const {
  if (!has(name)) return {};
  if (type(name) != as) fail(name, "the element type of the input", py::str(array(name).dtype()));
  return input(name, as, rows, cols);
}

FloatSum Arguments::sum(const char* name, int64_t rows, int64_t cols, bool add) const {
  return {floats(name, {rows, cols}), stride(name, 0), stride(name, 1), add};
}

Arguments::Stack Arguments::stack(const char* name, int64_t count, int64_t rows,
                                  int64_t cols) const {
  expect_shape(name, {count, rows, cols});
  register_traffic(name);
  void* const data = const_cast<void*>(array(name).data());
  return {{data, stride(name, 1), stride(name, 2), Access::element}, stride(name, 0)};
}

const void* Arguments::vector(const char* name, DType as, int64_t size) const {
  if (!has(name)) return nullptr;
  if (type(name) != as) fail(name, "the element type of the output", py::str(array(name).dtype()));
  expect_shape(name, {size});
  register_traffic(name);
  return array(name).data();
}

float* Arguments::floats(const char* name, std::vector<int64_t> shape) const {
  if (!has(name)) return nullptr;
  if (type(name) != DType::float32) fail(name, "float32", py::str(array(name).dtype()));
  expect_shape(name, shape);
  register_traffic(name);
  return static_cast<float*>(const_cast<void*>(array(name).data()));
}

Dropout Arguments::dropout() const {
  const double p = number("p");
  if (p == 0) return {nullptr, 0, 1.f};
  if (!has("seed")) fail("seed", "an array, because p is not 0", "none");
  return {integers<int64_t>("seed"), uint32_t(p * 4294967296.0), float(1 / (1 - p))};
}

Memory::Memory(const char* name, size_t bytes) : words_(bytes / 4 + 1024, 0xFFFFFFFFu) {
  const auto address = reinterpret_cast<uintptr_t>(words_.data());
  base_ = reinterpret_cast<uint32_t*>((address + 255) / 256 * 256);
  end_ = base_ + (bytes + 3) / 4;
  if (name && options().count_memory && bytes) register_array(name, base_, bytes);
}

void Memory::check() const {
  for (const uint32_t* word = end_; word < words_.data() + words_.size(); ++word)
    if (*word != 0xFFFFFFFFu) throw std::runtime_error("workspace: a kernel wrote past its end");
}

}  // namespace lotr::simt
