// sm_90a: setmaxnreg. A warpgroup that only loads gives registers to the warpgroups that multiply.
//
// A kernel that uses it is compiled with __launch_bounds__(threads, 1), so each thread starts with an equal
// part of the multiprocessor's 65,536 registers.  setmaxnreg.dec returns registers to the block;
// setmaxnreg.inc waits until the block has enough.
#include "hopper.h"
#include "state.h"

namespace lotr::simt {
namespace {

constexpr uint32_t REGISTERS = 65536, WARP = 32, WARPS_OF_GROUP = 4;

void nothing(Warp&, uint32_t, void*) {}

}  // namespace

uint32_t registers_at_launch(uint32_t threads) {
  const uint32_t share = REGISTERS / threads / 8 * 8;
  return share > 255 ? 255 : share;
}

void check_registers(const Block& block) {
  for (const Warp& warp : block.warps) {
    const Warp& first = block.warps[warp.index / WARPS_OF_GROUP * WARPS_OF_GROUP];
    if (warp.registers != first.registers)
      fail("setmaxnreg is for whole warpgroups: warp %u has %u registers a thread, warp %u has %u",
           warp.index, warp.registers, first.index, first.registers);
  }
}

void set_registers(int n, bool more, Site site) {
  race::ExecutorScope scope;
  const char* op = more ? "setmaxnreg.inc" : "setmaxnreg.dec";
  enter(op, site);
  warp_collective(op, ~0u, site, nullptr, nothing, nullptr, false);
  Warp& warp = *self().warp;
  Block& block = *self().block;
  const uint32_t wanted = uint32_t(n);
  if (more ? wanted < warp.registers : wanted > warp.registers)
    fail("%s at %s:%d: to %d registers, the warp has %u", op, site.file, site.line, n, warp.registers);
  if (!more) {  // the first lane that runs does it for its warp
    block.registers_free += (warp.registers - wanted) * WARP;
    warp.registers = wanted;
    progress();
    wake_spinners();
    return;
  }
  while (warp.registers != wanted) {
    const uint32_t missing = (wanted - warp.registers) * WARP;
    if (block.registers_free < missing) {
      wait_here(State::spinning, op, site);
      continue;
    }
    block.registers_free -= missing;
    warp.registers = wanted;
  }
  progress();
}

}  // namespace lotr::simt
