// The functions that -fsanitize=thread makes a compiler call for every load and store of a kernel.
#include "race.h"

#if LOTR_SIMT_RACE

#include <cstring>

namespace {

using lotr::simt::race::Use;

inline void report_access(const volatile void* p, size_t bytes, Use use, void* pc) {
  if (lotr::simt::race::kernel_code)
    lotr::simt::race::access_by_code(reinterpret_cast<uintptr_t>(p), bytes, use, pc);
}

}  // namespace

#define HOOK __attribute__((used, visibility("default")))
#define CALLER __builtin_return_address(0)

#define PLAIN(N)                                 \
  HOOK void __tsan_read##N(void* p) {            \
    report_access(p, N, Use::read, CALLER);      \
  }                                              \
  HOOK void __tsan_write##N(void* p) {           \
    report_access(p, N, Use::write, CALLER);     \
  }                                              \
  HOOK void __tsan_unaligned_read##N(void* p) {  \
    report_access(p, N, Use::read, CALLER);      \
  }                                              \
  HOOK void __tsan_unaligned_write##N(void* p) { \
    report_access(p, N, Use::write, CALLER);     \
  }                                              \
  HOOK void __tsan_volatile_read##N(void* p) {   \
    report_access(p, N, Use::read, CALLER);      \
  }                                              \
  HOOK void __tsan_volatile_write##N(void* p) {  \
    report_access(p, N, Use::write, CALLER);     \
  }                                              \
  HOOK void __tsan_read_write##N(void* p) {      \
    report_access(p, N, Use::write, CALLER);     \
  }

// Used only by the launchers: guards of static variables, std::atomic. One process thread runs
// everything.
#define ATOMIC(BITS, T)                                                                            \
  HOOK T __tsan_atomic##BITS##_load(const volatile T* p, int) {                                    \
    return *p;                                                                                     \
  }                                                                                                \
  HOOK void __tsan_atomic##BITS##_store(volatile T* p, T value, int) {                             \
    *p = value;                                                                                    \
  }                                                                                                \
  HOOK T __tsan_atomic##BITS##_exchange(volatile T* p, T value, int) {                             \
    const T old = *p;                                                                              \
    *p = value;                                                                                    \
    return old;                                                                                    \
  }                                                                                                \
  HOOK T __tsan_atomic##BITS##_fetch_or(volatile T* p, T value, int) {                             \
    const T old = *p;                                                                              \
    *p = T(old | value);                                                                           \
    return old;                                                                                    \
  }                                                                                                \
  HOOK int __tsan_atomic##BITS##_compare_exchange_strong(volatile T* p, T* expected, T value, int, \
                                                         int) {                                    \
    const bool is_equal = *p == *expected;                                                         \
    if (is_equal)                                                                                  \
      *p = value;                                                                                  \
    else                                                                                           \
      *expected = *p;                                                                              \
    return is_equal;                                                                               \
  }

extern "C" {
ATOMIC(8, uint8_t)
ATOMIC(32, uint32_t)
ATOMIC(64, uint64_t)
PLAIN(1)
PLAIN(2)
PLAIN(4)
PLAIN(8)
PLAIN(16)
HOOK void __tsan_init() {}
HOOK void __tsan_func_entry(void*) {}
HOOK void __tsan_func_exit() {}
HOOK void __tsan_vptr_update(void**, void*) {}
HOOK void __tsan_vptr_read(void**) {}
HOOK void __tsan_read_range(void* p, unsigned long bytes) {
  report_access(p, bytes, Use::read, CALLER);
}
HOOK void __tsan_write_range(void* p, unsigned long bytes) {
  report_access(p, bytes, Use::write, CALLER);
}
HOOK void* __tsan_memset(void* to, int value, size_t bytes) {
  report_access(to, bytes, Use::write, CALLER);
  return memset(to, value, bytes);
}
HOOK void* __tsan_memcpy(void* to, const void* from, size_t bytes) {
  report_access(from, bytes, Use::read, CALLER);
  report_access(to, bytes, Use::write, CALLER);
  return memcpy(to, from, bytes);
}
HOOK void* __tsan_memmove(void* to, const void* from, size_t bytes) {
  report_access(from, bytes, Use::read, CALLER);
  report_access(to, bytes, Use::write, CALLER);
  return memmove(to, from, bytes);
}
}

#endif
