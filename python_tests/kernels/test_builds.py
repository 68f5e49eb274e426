"""The kernels in the executor's other builds, and with one synchronization skipped at a time.

The builds: race detector and sanitizers.
"""

from pathlib import Path
from types import ModuleType

import pytest
from cases import KERNELS
from sweep import failures, in_process, problems

from csrc.simt import build


def sweep(mode: str, *arguments: str, kind: str | None = None) -> None:
    """Runs sweep.py in a build of the executor. kind: the only element type that runs, or all."""
    done = in_process(mode, build.module(mode, kind), *arguments)
    assert done.returncode == 0, f"{mode}: {done.stdout[-2000:]}{done.stderr[-4000:]}"


def test_no_race() -> None:
    """Without few_tokens_forward and few_tokens_backward, which consist of the other kernels."""
    kernels = ",".join(kernel for kernel in KERNELS if not kernel.startswith("few_tokens"))
    sweep("race", "--schedules", "forward", "--kernels", kernels, "--kinds", "bf16", kind="bf16")


@pytest.mark.full
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("mode", "schedules"), [("race", "reverse,1,102"), ("asan", "forward,2,103")]
)
def test_no_race_and_no_bad_access_anywhere(mode: str, schedules: str, kernel: str) -> None:
    """All shapes and element types. `make test` relies on the executor and NaN around arrays."""
    sweep(mode, "--shapes", "all", "--kernels", kernel, "--schedules", schedules)


# ---- each barrier, commit and wait skipped: the executor skips calls at one source line ----

Site = tuple[str, str, int]  # operation, file, line
FOLDERS = ("csrc/cuda/kernels/", "csrc/cuda/tile/", "csrc/cuda/sm90/")
# These must be among the sites: an operation that nothing reports would never be skipped.
OPERATIONS = {
    "__syncthreads",
    "__syncwarp",
    "cp.async.commit_group",
    "cp.async.wait_group",
    "griddepcontrol.wait",
    "mbarrier.try_wait",
    "mbarrier.arrive.cluster",
    "barrier.cluster",
    "fence.proxy.async",
}


def synchronization_sites(lib: ModuleType) -> dict[Site, list[str]]:
    """Each place where the kernels synchronize, and the kernels that reach it."""
    sites: dict[Site, list[str]] = {}
    for kernel in KERNELS:
        lib.reset_counters()
        assert not list(failures(lib, problems("pipeline", ["bf16"], [kernel]), ["forward"]))
        for op, file, line, calls in lib.synchronization_sites():
            path = Path(file).resolve().as_posix()
            if calls and any(folder in path for folder in FOLDERS):
                name = path.rpartition("csrc/cuda/")[2]
                sites.setdefault((op, name, line), []).append(kernel)
    return sites


def test_each_synchronization_left_out_is_noticed(lib: ModuleType) -> None:
    """Without it, a schedule has wrong values or an error, or else there is a data race."""
    sites = synchronization_sites(lib)
    unnoticed = []
    assert {op for op, _, _ in sites} >= OPERATIONS
    try:
        for (_, file, line), kernels in sites.items():
            lib.skip_synchronization(file, line)
            cases = problems("pipeline", ["bf16"], kernels)
            if not any(failures(lib, cases, ["forward", "reverse", "101"])):  # until the first
                unnoticed.append((f"{file}:{line}", kernels))
    finally:
        lib.skip_synchronization("", 0)
    for place, kernels in unnoticed:
        skipped = ["--skip", place, "--kernels", ",".join(kernels)]
        with pytest.raises(AssertionError, match="data race"):
            sweep("race", *skipped, "--kinds", "bf16", "--schedules", "forward", kind="bf16")
