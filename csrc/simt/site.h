// Where in a kernel something happened, and the executor's error.
#pragma once
#include <stdexcept>

namespace lotr::simt {

struct Site {
  const char* file;
  int line;
  // As the default argument `Site site = Site::here()` this is the caller's place.  (gcc 12 gives a
  // wrong line to builtins inside a braced default argument, so they are default arguments of a
  // function.)
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

// Deadlock, divergence, bad address, race, refused launch: the message names the kernel, the
// thread, file and line.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace lotr::simt
