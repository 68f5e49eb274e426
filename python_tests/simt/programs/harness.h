// A test program runs one kernel, with or without a planted bug, under several schedules and prints a verdict
// for each:
//   program [bug] [schedules]
// schedules: "one" (forward; for the sanitizers) or "all" (forward, reverse, 20 random ones with preemption).
// A verdict is "ok", "wrong" or "caught: <message>"; the program goes on after it.
#pragma once
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "simt/api.h"

namespace harness {

using lotr::simt::Options;
using lotr::simt::Order;

// run(bug) launches and returns whether the result is right.  resident: clusters that run at the same time,
// in three schedules of four; in the fourth one after another.
template <class Run>
int main(int argc, char** argv, Run run, unsigned resident = 1) {
  setvbuf(stdout, nullptr, _IOLBF, 0);
  const int bug = argc > 1 ? atoi(argv[1]) : 0;
  const bool all = argc > 2 && !strcmp(argv[2], "all");
  std::vector<Options> schedules(1);
  if (all) {
    schedules.resize(22);
    schedules[1].order = Order::reverse;
    for (size_t i = 2; i < schedules.size(); ++i) {
      schedules[i].order = Order::random;
      schedules[i].seed = i;
      schedules[i].preempt = 16;
    }
  }
  for (size_t i = 0; i < schedules.size(); ++i) {
    schedules[i].resident = i % 4 == 3 ? 1 : resident;
    lotr::simt::set_options(schedules[i]);
    try {
      printf("%s\n", run(bug) ? "ok" : "wrong");
    } catch (const lotr::simt::Error& error) {
      printf("caught: ");
      for (const char* c = error.what(); *c; ++c) putchar(*c == '\n' ? ';' : *c);
      putchar('\n');
    }
  }
  return 0;
}

// Numbers that need few bits, the same on every run.
struct Numbers {
  unsigned state;
  float operator()() {
    state = state * 1664525u + 1013904223u;
    return float(int(state >> 24) - 128) / 64.f;
  }
};

}  // namespace harness
