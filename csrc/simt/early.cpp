// Programmatic dependent launches (csrc/cuda/ptx/launch.cuh). Grids run one after another here.
// Errors show what would go wrong if they overlapped: before griddepcontrol.wait, a thread must not
// access global memory, exit, or let the next launch start.
#include "state.h"

namespace lotr::simt {

void check_early(const char* op, Site site) {
  if (!self().may_touch_global)
    fail(
        "%s at %s:%d: global memory in an early launch before griddepcontrol.wait: the previous "
        "kernel may not have ended",
        op, site.file, site.line);
}

void check_early_end(const Thread& t) {
  if (!t.may_touch_global)
    fail(
        "thread exits from an early launch without griddepcontrol.wait (latest: %s at %s:%d): the "
        "next launch would not wait for the previous one",
        t.op, t.site.file, t.site.line);
}

void griddepcontrol_wait(Site site) {
  race::ExecutorScope scope;
  Thread& t = enter("griddepcontrol.wait", site);
  if (counted_and_skipped(t.op, site)) return;
  t.may_touch_global = true;
  maybe_preempt();
}

void griddepcontrol_launch_dependents(Site site) {
  race::ExecutorScope scope;
  Thread& t = enter("griddepcontrol.launch_dependents", site);
  if (!t.may_touch_global)
    fail(
        "%s at %s:%d: before griddepcontrol.wait: the next kernel may start while the previous one "
        "runs",
        t.op, site.file, site.line);
  if (!t.block->launched_dependents) ++totals.launches.back().launched_dependents;
  t.block->launched_dependents = true;
}

}  // namespace lotr::simt
