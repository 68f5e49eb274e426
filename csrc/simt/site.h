// Where in a kernel something happened, and the executor's error.
#pragma once
#include <stdexcept>

namespace lotr::simt {

struct Site {
  const char* file;
  int line;
  // As the default argument `Site site = Site::here()` this is the caller's place. (Inside a
  // braced default argument, gcc 12 gives the builtins a wrong line. So they are default arguments
  // of a function.)
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

// Deadlock, divergence, bad address, race, refused launch. The message names the kernel, the
// thread, file and line.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace lotr::simt
