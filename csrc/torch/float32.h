// How torch rounds the operands of float32 products on CUDA: torch.backends.cuda.matmul.fp32_precision.
#pragma once
#include <Python.h>
#include <dlfcn.h>

#include <string>

#include "cuda/problem.h"

namespace lotr {

// The setting in torch's C++ library, read without the GIL: at::Context::float32Precision.  The stable ABI
// does not have it, so its symbols and the values of its enums are looked up by name.  Without these symbols
// float32_products reads it through Python.
class Float32Setting {
 public:
  static const Float32Setting& of_torch() {
    static const Float32Setting found;
    return found;
  }
  bool found() const { return context_ && precision_; }
  bool tf32() const { return precision_(context_(), cuda_, matmul_) == tf32_; }

 private:
  Float32Setting() {
    void* library = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
    if (!library) return;
    const std::string of_string = "ERKNSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEE";
    using OfName = int (*)(const std::string&);
    const auto of_name = [&](const std::string& function) {
      return reinterpret_cast<OfName>(dlsym(library, ("_ZN2at" + function + of_string).c_str()));
    };
    const OfName backend = of_name("11str2backend"), op = of_name("6str2op"),
                 precision = of_name("13str2precision");
    if (!backend || !op || !precision) return;
    cuda_ = backend("cuda"), matmul_ = op("matmul"), tf32_ = precision("tf32");
    context_ = reinterpret_cast<Context>(dlsym(library, "_ZN2at13globalContextEv"));
    precision_ = reinterpret_cast<Precision>(
        dlsym(library, "_ZNK2at7Context16float32PrecisionENS_14Float32BackendENS_9Float32OpE"));
  }
  using Context = void* (*)();
  using Precision = int (*)(const void*, int, int);
  Context context_ = nullptr;
  Precision precision_ = nullptr;
  int cuda_ = 0, matmul_ = 0, tf32_ = 0;
};

// The same through Python, which takes the GIL and some microseconds.
inline Float32 float32_from_python() {
  if (!Py_IsInitialized()) return Float32::exact;
  const PyGILState_STATE gil = PyGILState_Ensure();
  PyObject* object = PyImport_ImportModule("torch");
  for (const char* name : {"backends", "cuda", "matmul", "fp32_precision"}) {
    PyObject* next = object ? PyObject_GetAttrString(object, name) : nullptr;
    Py_XDECREF(object);
    object = next;
  }
  const bool tf32 = object && PyUnicode_CompareWithASCIIString(object, "tf32") == 0;
  Py_XDECREF(object);
  PyErr_Clear();
  PyGILState_Release(gil);
  return tf32 ? Float32::tf32 : Float32::exact;
}

inline Float32 float32_products() {
  const Float32Setting& setting = Float32Setting::of_torch();
  if (!setting.found()) return float32_from_python();
  return setting.tf32() ? Float32::tf32 : Float32::exact;
}

}  // namespace lotr
