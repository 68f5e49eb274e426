// The functions that -fsanitize=thread makes a compiler call for every load and store of a kernel.
#include "race.h"

#if LOTR_SIMT_RACE

#include <cstring>

namespace {

using lotr::simt::race::Use;

inline void seen(const volatile void* p, size_t bytes, Use use, void* pc) {
  if (lotr::simt::race::kernel_code)
    lotr::simt::race::access_by_code(reinterpret_cast<uintptr_t>(p), bytes, use, pc);
}

}  // namespace

#define HOOK __attribute__((used, visibility("default")))
#define CALLER __builtin_return_address(0)

#define PLAIN(N)                                 \
  HOOK void __tsan_read##N(void* p) {            \
    seen(p, N, Use::read, CALLER);               \
  }                                              \
  HOOK void __tsan_write##N(void* p) {           \
    seen(p, N, Use::write, CALLER);              \
  }                                              \
  HOOK void __tsan_unaligned_read##N(void* p) {  \
    seen(p, N, Use::read, CALLER);               \
  }                                              \
  HOOK void __tsan_unaligned_write##N(void* p) { \
    seen(p, N, Use::write, CALLER);              \
  }                                              \
  HOOK void __tsan_volatile_read##N(void* p) {   \
    seen(p, N, Use::read, CALLER);               \
  }                                              \
  HOOK void __tsan_volatile_write##N(void* p) {  \
    seen(p, N, Use::write, CALLER);              \
  }                                              \
  HOOK void __tsan_read_write##N(void* p) {      \
    seen(p, N, Use::write, CALLER);              \
  }

extern "C" {
PLAIN(1)
PLAIN(2)
PLAIN(4)
PLAIN(8)
PLAIN(16)
// Of the guards of static variables in the launchers.
HOOK uint8_t __tsan_atomic8_load(const volatile uint8_t* p, int) {
  return *p;
}
HOOK void __tsan_init() {}
HOOK void __tsan_func_entry(void*) {}
HOOK void __tsan_func_exit() {}
HOOK void __tsan_vptr_update(void**, void*) {}
HOOK void __tsan_vptr_read(void**) {}
HOOK void __tsan_read_range(void* p, unsigned long bytes) {
  seen(p, bytes, Use::read, CALLER);
}
HOOK void __tsan_write_range(void* p, unsigned long bytes) {
  seen(p, bytes, Use::write, CALLER);
}
HOOK void* __tsan_memset(void* to, int value, size_t bytes) {
  seen(to, bytes, Use::write, CALLER);
  return memset(to, value, bytes);
}
HOOK void* __tsan_memcpy(void* to, const void* from, size_t bytes) {
  seen(from, bytes, Use::read, CALLER);
  seen(to, bytes, Use::write, CALLER);
  return memcpy(to, from, bytes);
}
HOOK void* __tsan_memmove(void* to, const void* from, size_t bytes) {
  seen(from, bytes, Use::read, CALLER);
  seen(to, bytes, Use::write, CALLER);
  return memmove(to, from, bytes);
}
}

#endif
