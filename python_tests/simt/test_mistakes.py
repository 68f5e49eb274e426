"""Common mistakes in kernels, one per kernel of programs/mistakes.cpp.

The check that is named here finds each of them, and a correct kernel raises no error. Bugs in our
kernels are in python_tests/kernels/test_planted.py.
"""

import re
from pathlib import Path

import pytest

from csrc.simt import build

SOURCE = Path(__file__).parent / "programs" / "mistakes.cpp"
AT = r"at \S*mistakes.cpp:\d+"
EARLIER = "thread 0 of an earlier block"
REFUSED = "a GPU would refuse this launch: "

# mistake: by mode, what must be reported
MISTAKES: dict[str, dict[str, str]] = {
    "deadlock": {
        "plain": r"deadlock: .*64 threads from 0 on are at __syncthreads, "
        r".*64 threads from 64 on have exited"
    },
    "divergent_barrier": {"plain": rf"divergent barrier: thread 96 .* {AT} while others wait {AT}"},
    "named_barrier_alone": {
        "plain": "deadlock: .*32 threads from 0 on are at bar.sync, .*__syncthreads"
    },
    "named_barrier_counts": {"plain": "gives 128 threads, .* gave 64"},
    "half_warps_at_a_barrier": {
        "plain": r"divergent warp: lane 0 is at bar.sync.*lane 16 is at its start"
    },
    "divergent_warp": {"plain": r"divergent warp: lane 16 is at __syncwarp .*__shfl_xor_sync"},
    "shuffle_outside_mask": {"plain": "reads lane 16, which is not in mask 0000ffff"},
    "product_of_half_a_warp": {"plain": "divergent warp: lane 16 .* is at mma"},
    "throws": {"plain": "exception in a kernel: from a kernel"},
    "shared_store_outside": {
        "plain": rf"st.shared {AT}: address is outside the block's shared memory"
    },
    "copy_outside": {"plain": rf"cp.async {AT}: address is outside the block's shared memory"},
    "misaligned_copy": {"plain": rf"cp.async {AT}: global address .* is not aligned to 16"},
    "misaligned_load": {"plain": rf"ld.global {AT}: global address .* is not aligned to 16"},
    "exits_with_a_copy_in_flight": {"plain": "thread exits with cp.async in flight"},
    "reads_a_copy_in_flight": {"asan": "use-after-poison"},
    "copy_beyond_an_array": {"asan": "heap-buffer-overflow"},
    "store_beyond_an_array": {"asan": "heap-buffer-overflow"},
    "no_barrier": {
        "race": r"read after write\) on shared memory.* mistakes.cpp:\d+ .* of the same block"
    },
    "no_syncwarp": {"race": "data race .*shared memory"},
    "plain_sum": {"race": "data race .*shared memory"},
    "one_output": {"race": rf"write after write\) on global memory y \+ 0: .*{EARLIER}"},
    "reads_its_neighbor": {"race": rf"read after write\) on global memory y \+ 0: .*{EARLIER}"},
    "loads_what_another_block_stores": {
        "race": rf"read after write\) on global memory.*bulk.tensor.*{EARLIER}.*bulk.tensor"
    },
    "syncwarp_of_other_lanes": {"race": r"read after write\) on shared memory"},
    "barrier_of_other_threads": {"race": r"read after write\) on shared memory"},
    "waits_for_the_phase_before": {"race": r"read after write\) on shared memory"},
    "no_barrier_after_init": {"race": r"mbarrier.arrive.*thread 0 .* written at .*mbarrier.init"},
    "mbarrier_without_init": {"plain": "was never initialized"},
    "mbarrier_of_a_block_without_init": {"plain": "at shared offset 8704 was never initialized"},
    "every_thread_inits": {"plain": rf"mbarrier.init {AT}: there is an mbarrier here already"},
    "no_init_fence": {"plain": rf"mbarrier.arrive.cluster {AT}: no fence.mbarrier_init"},
    "too_many_arrivals": {"plain": r"more arrivals than the mbarrier expects \(2\)"},
    "arrivals_beyond_20_bits": {"plain": r"1048576 arrivals, expected 1 to 2\^20 - 1"},
    "bytes_beyond_20_bits": {"plain": r"1048576 bytes are announced, expected at most 2\^20 - 1"},
    "reaches_a_block_too_early": {
        "plain": rf"{AT}: no barrier of the cluster yet: block 1 may not"
    },
    "reaches_a_block_that_has_exited": {"plain": "block 0 of the cluster has exited"},
    "divergent_cluster_barrier": {
        "plain": "divergent warp: lane 1 is at barrier.cluster.*mbarrier"
    },
    "misaligned_tile": {"plain": "multiple of 1024 bytes, got offset 128"},
    "multicast_outside": {"plain": "blocks 0x7 of a cluster of 2"},
    "exits_with_a_bulk_copy_in_flight": {
        "plain": "the block exits while 1 bulk copies to or from its shared memory are in flight"
    },
    "no_proxy_fence": {
        "plain": "has not called fence.proxy.async since its store to shared offset"
    },
    "no_proxy_fence_nor_mbarrier": {
        "plain": rf"bulk.tensor {AT}: thread 0 has not called fence.proxy.async"
    },
    "no_proxy_fence_before_a_load": {
        "plain": rf"bulk.tensor {AT}: thread 0 has not called fence.proxy.async"
    },
    "no_proxy_fence_before_wgmma": {
        "plain": rf"wgmma.mma_async {AT}: thread 0 has not called fence.proxy.async"
    },
    "product_of_one_warp": {"plain": "only 32 of a warpgroup's 128 threads multiply"},
    "descriptor_per_warp": {"plain": "the warps of the warpgroup give different descriptors"},
    "no_wgmma_fence": {"plain": rf"wgmma {AT}: no wgmma.fence"},
    "stores_early": {
        "plain": rf"st.global {AT}: global memory in an early launch before griddepcontrol.wait"
    },
    "copies_early": {
        "plain": rf"cp.async {AT}: global memory in an early launch before griddepcontrol.wait"
    },
    "lets_the_next_begin_early": {
        "plain": rf"griddepcontrol.launch_dependents {AT}: before griddepcontrol.wait"
    },
    "exits_early": {
        "plain": "exits from an early launch without griddepcontrol.wait .*thread 100:"
    },
    "no_grid": {"plain": f"{REFUSED}gridDim.x is 0, expected 1 to 2147483647"},
    "too_many_threads": {"plain": f"{REFUSED}threads in a block is 1056, expected 1 to 1024"},
    "too_large_a_cluster": {"plain": f"{REFUSED}blocks in a cluster is 16, expected 1 to 8"},
    "too_much_shared_memory": {
        "plain": f"{REFUSED}shared memory in bytes is 300000, expected 0 to 232448"
    },
    "too_little_shared_memory": {"plain": "shared struct has 9216 bytes, the launch gave 4608"},
    "empty_tensor_map": {"plain": "tensor map: expected at least one row and column"},
}
UCONTEXT = "-DLOTR_SIMT_UCONTEXT=1"  # the fibers of a machine without a switch in assembly


def run(mistake: str, mode: str, **settings: object) -> tuple[list[str], str]:
    """Returns the printed lines and AddressSanitizer's report. `settings` go to run_program."""
    done = build.run_program(mode, SOURCE, mistake, **settings)
    return done.stdout.splitlines(), done.stderr


CASES = [
    pytest.param(mistake, mode, (), marks=[pytest.mark.full] * (mode == "asan"))
    for mistake, modes in MISTAKES.items()
    for mode in modes
]
CASES += [
    pytest.param(mistake, "plain", (UCONTEXT,), marks=pytest.mark.full)
    for mistake, modes in MISTAKES.items()
    if "plain" in modes
]


@pytest.mark.parametrize(("mistake", "mode", "defines"), CASES)
def test_noticed(mistake: str, mode: str, defines: tuple[str, ...]) -> None:
    """If the process continues, a failed launch has no effect on the next one."""
    printed, errors = run(mistake, mode, defines=defines)
    if mode == "asan":
        assert re.search(MISTAKES[mistake][mode], errors), errors
    else:
        assert re.search(MISTAKES[mistake][mode], printed[0]) and printed[1] == "right", printed


@pytest.mark.parametrize("kernel", ["right", "right_halves"])
@pytest.mark.parametrize("mode", ["plain", "race", pytest.param("asan", marks=pytest.mark.full)])
def test_no_false_alarm(mode: str, kernel: str) -> None:
    schedules = [
        {"order": "forward"},
        {"order": "reverse"},
        *({"order": "random", "seed": seed, "preempt": 16} for seed in range(1, 10)),
    ]
    for schedule in schedules:
        assert run(kernel, mode, **schedule) == (["nothing", "right"], ""), schedule
