"""Bugs that people write into kernels, planted one at a time: each is noticed by the means named here, and the same
kernels without a bug raise no alarm. The programs are in programs/, the numbers of the bugs in their `enum Bug`."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from csrc.simt import build

PROGRAMS = Path(__file__).parent / "programs"
WRONG = "wrong"  # the result, in at least one schedule; in this mode nothing else needs to notice
FLIGHT, EARLIER = "bulk copies to its shared memory are in flight", "an earlier block"

# program: bug: by mode, what must be reported (a regular expression on a verdict, or on AddressSanitizer's report)
BUGS: dict[str, dict[str, dict[str, str]]] = {
    "gemm_sm80": {
        "no_barrier": {"plain": WRONG, "asan": "use-after-poison", "race": r"data race.*gemm_sm80.cuh:\d+"},
        "no_wait": {"plain": "cp.async in flight", "asan": "use-after-poison"},
        "wait_off_by_one": {"plain": "cp.async in flight", "asan": "use-after-poison"},
        "no_commit": {"plain": "cp.async in flight", "asan": "use-after-poison"},
        "barrier_in_branch": {"plain": r"divergent barrier: .*gemm_sm80.cuh:\d+ while others wait at"},
        "barrier_skipped": {"plain": r"deadlock: .*96 threads from 0 on are at __syncthreads, .*gemm_sm80.cuh:\d+"},
        "shared_out_of_bounds": {"plain": "outside the block's shared memory"},
        "global_out_of_bounds": {"asan": r"heap-buffer-overflow"},
        "store_out_of_bounds": {"asan": r"heap-buffer-overflow"},
        "uninitialised": {"plain": WRONG},
        "exit_in_flight": {"plain": "thread exits with cp.async in flight"},
        "misaligned_copy": {"plain": r"cp.async at .*gemm_sm80.cuh:\d+: global address .* not aligned to 16"},
        "partial_warp_mma": {"plain": r"divergent warp: lane \d+ is at (mma|ldmatrix)"},
        "shared_too_small": {"plain": "shared struct has 29184 bytes, the launch gave 14592"},
    },
    "block": {
        "uninitialised": {"plain": WRONG},
        "no_barrier": {"plain": WRONG, "race": r"read after write.*block.cuh:\d+; thread \d+ of the same block"},
        "no_syncwarp": {"plain": WRONG, "race": "data race"},
        "shared_bounds": {"plain": r"st.shared at .*block.cuh:\d+: address is outside"},
        "divergent_shuffle": {"plain": r"divergent warp: .*__shfl_xor_sync.*__syncwarp|divergent warp: .*__syncwarp"},
        "shuffle_outside_mask": {"plain": r"reads lane \d+, which is not in mask 0000ffff"},
        "early_return": {"plain": r"deadlock: .*83 threads from 0 on are at __syncthreads.*45 threads from 83 on have exited"},
        "barrier_skipped": {"plain": "deadlock: .*96 threads from 0 on are at __syncthreads"},
        "plain_sum": {"race": "data race .*shared memory"},
        "one_output": {"plain": WRONG, "race": rf"write after write\) on global memory y \+ 0: .*{EARLIER}"},
        "reads_neighbour": {"race": rf"on global memory y \+ .*{EARLIER}"},
        "named_skipped": {"plain": r"deadlock: .*32 threads from 0 on are at bar.sync, .*block.cuh:\d+.*__syncthreads"},
        "named_count": {"plain": "gives 64 threads, .* gave 128|gives 128 threads, .* gave 64"},
        "too_many_threads": {"plain": "a GPU would refuse this launch: threads in a block is 1056, expected 1 to 1024"},
        "misaligned_load": {"plain": "not aligned to 16 bytes"},
    },
    "gemm_sm90": {
        "wrong_parity": {"plain": "deadlock|more arrivals", "asan": "use-after-poison"},
        "no_empty_wait": {"plain": "more arrivals than the mbarrier expects"},
        "few_bytes": {"plain": f"deadlock|{FLIGHT}|{WRONG}"},
        "released_early": {"plain": "more arrivals|" + WRONG, "race": r"shared memory.*wgmma.wait_group"},
        "own_stage_only": {"plain": "more arrivals|deadlock|" + WRONG},
        "no_wgmma_wait": {"plain": WRONG},
        "no_wgmma_fence": {"plain": r"wgmma at .*gemm_sm90.cuh:\d+: no wgmma.fence"},
        "wrong_panel": {"plain": WRONG},
        "wrong_major": {"plain": WRONG},
        "uninitialised": {"plain": "was never initialised"},
        "no_init_fence": {"plain": r"cp.async.bulk.tensor at .*gemm_sm90.cuh:\d+: no fence.mbarrier_init"},
        "fence_too_early": {"plain": r"mbarrier.arrive.cluster at .*gemm_sm90.cuh:\d+: no fence.mbarrier_init"},
        "misaligned_tile": {"plain": "multiple of 1024 bytes, got offset 128"},
        "extra_arrival": {"plain": WRONG + "|more arrivals|deadlock"},
        "multicast_outside": {"plain": "blocks 0x7 of a cluster of 2"},
        "no_cluster_sync": {"plain": "no barrier of the cluster yet"},
        "no_last_cluster_sync": {"plain": r"block \d of the cluster has exited"},
        "divergent_at_the_end": {
            "plain": r"divergent warp: lane \d+ is at .*(barrier.cluster.*mbarrier|mbarrier.*barrier.cluster)"
        },
        "exit_in_flight": {"plain": f"the block exits while 1 {FLIGHT}"},
        "no_proxy_fence": {"plain": r"thread \d+ has not called fence.proxy.async since its store to shared offset"},
        "no_store_wait": {"plain": WRONG},
    },
}
# AddressSanitizer is left to make test-full: most of its bugs are noticed in another mode too, two wild accesses not
MODES = ["plain", "race", pytest.param("asan", marks=pytest.mark.full)]
CHECKS = [(program, bug, mode) for program, bugs in BUGS.items() for bug, modes in bugs.items() for mode in modes]


def names_of(program: str) -> list[str]:
    source = (PROGRAMS / f"{program}.cuh").read_text()
    return re.findall(r"^  (\w+),", re.search(r"enum Bug : int \{(.*?)\};", source, re.S)[1], re.M)


def verdicts(program: str, bug: str, mode: str, schedules: str) -> list[str]:
    """One for each schedule; in the asan mode the first line of the report that ended the process, if any did."""
    command = [build.program(mode, PROGRAMS / f"{program}.cpp"), str(names_of(program).index(bug)), schedules]
    done = subprocess.run(command, capture_output=True, text=True, env=build.environment(mode), timeout=1000)
    reports = [line for line in done.stderr.splitlines() if "ERROR: AddressSanitizer" in line or "runtime error" in line]
    if done.returncode and not reports:
        reports = [f"exit status {done.returncode}"]
    return done.stdout.splitlines() + reports


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("program", BUGS)
def test_no_false_alarm(program: str, mode: str) -> None:
    assert verdicts(program, "none", mode, "all") == ["ok"] * 22


@pytest.mark.parametrize(
    "program, bug, mode",
    [pytest.param(*check, id="-".join(check), marks=[pytest.mark.full] * (check[2] == "asan")) for check in CHECKS],
)
def test_noticed(program: str, bug: str, mode: str) -> None:
    found = verdicts(program, bug, mode, "all" if mode == "plain" else "one")
    assert any(re.search(BUGS[program][bug][mode], verdict) for verdict in found), found


def test_every_planted_bug_has_a_test() -> None:
    assert all(set(bugs) == set(names_of(program)) - {"none"} for program, bugs in BUGS.items())
