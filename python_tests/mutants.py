"""One-line faults of the package, and a command that shows which test catches each of them.

    python python_tests/mutants.py                   all of them, one after another (hours)
    python python_tests/mutants.py nodes.py dropout  those with a word in their file or description
    python python_tests/mutants.py --tenth 1237      every tenth one, from the eighth on, because
                                                     1237 ends in 7. CI passes a count of commits.
    python python_tests/mutants.py --list            only checks that each text occurs once

The faults are data: python_tests/data/mutants/*.yaml, items with `file`, `fault`, `old` (a text
that occurs once in the file) and `new`. Each is written into a copy of the repository, and the
tests of its file run until one fails, slow ones too. A fault that survives is a missing test, or a
line that is not needed. The fault of ZeRO-3 survives unless DeepSpeed is installed (make
frameworks).
`python_tests/kernels/test_planted.py` does the same for the sources of the kernels.

Exit code 1: a fault survived, or its text is stale.
"""

import argparse
import math
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

# Slow imports come before the forks, which then have them.
import hypothesis.stateful  # noqa: F401
import pytest
import torch
import torch._dynamo
import torch.testing
import transformers  # noqa: F401
import yaml

ROOT = Path(__file__).resolve().parents[1]
FAULTS = ROOT / "python_tests" / "data" / "mutants"
COPIED = ("lotr_ext", "python_tests", "csrc")
COPIED_FILES = ("pyproject.toml", "CMakeLists.txt", "setup.py", "README.md", "LICENSE")
TIME_LIMIT = 1200  # seconds for one file of tests
# Tests that start the suite again (instruction, libraries), and one that takes many minutes.
DESELECTED = "not instruction and not libraries and not ManyPrograms"

# The tests of a file, test_<name>.py, in the order in which they run. The first prefix that matches
# counts.
TESTS = {
    "lotr_ext/core/call.py": ("experts", "operators"),
    "lotr_ext/core/dispatch.py": ("layers", "programs", "tasks", "compile", "frames", "experts"),
    "lotr_ext/core/request.py": ("layers", "tasks", "experts"),
    "lotr_ext/core/fallback.py": ("operators", "layers", "merging", "bad_input", "experts"),
    "lotr_ext/core/operators.py": ("operators", "layers", "compile", "bad_input"),
    "lotr_ext/core/kernel_support.py": ("operators", "info"),
    "lotr_ext/core/grouped.py": ("experts", "bad_input"),
    "lotr_ext/core/": ("layers", "programs", "tasks", "compile", "frames"),
    "lotr_ext/functional.py": ("bad_input", "layers"),
    "lotr_ext/checks.py": ("bad_input", "layers"),
    "lotr_ext/factors.py": ("layers", "bad_input", "models", "targets", "merging"),
    "lotr_ext/layers.py": ("merging", "layers", "bad_input", "models", "targets"),
    "lotr_ext/wrapped.py": ("merging", "quantized", "models", "targets", "bad_input"),
    "lotr_ext/init.py": ("init", "merging", "models", "bad_input", "distributed"),
    "lotr_ext/cores.py": ("cores", "bad_input", "models", "targets", "files"),
    "lotr_ext/config.py": ("bad_input", "targets", "models"),
    "lotr_ext/targets.py": ("targets", "training", "models", "bad_input"),
    "lotr_ext/model.py": ("models", "targets", "training", "init", "files", "bad_input", "merging"),
    "lotr_ext/merging.py": ("models", "merging", "training", "targets", "bad_input"),
    "lotr_ext/reports.py": ("training", "targets", "models", "bad_input"),
    "lotr_ext/adapted.py": ("models", "targets", "training", "tasks", "bad_input"),
    "lotr_ext/bypasses.py": ("models", "targets", "peft", "bad_input"),
    "lotr_ext/choosing.py": ("training", "bad_input"),
    "lotr_ext/first_step.py": ("training", "tasks"),
    "lotr_ext/task_files.py": ("tasks", "vllm_files", "files", "bad_input"),
    "lotr_ext/tasks.py": ("tasks", "models", "bad_input"),
    "lotr_ext/experts.py": ("experts", "bad_input", "models", "convert"),
    "lotr_ext/transformers_experts.py": ("experts", "tasks", "models", "targets", "bad_input"),
    "lotr_ext/saving.py": ("files", "models", "bad_input", "distributed"),
    "lotr_ext/loading.py": ("files", "models", "bad_input", "peft", "distributed"),
    "lotr_ext/adapter_state.py": ("files", "bad_input"),
    "lotr_ext/base_model.py": ("files",),
    "lotr_ext/peft": ("peft", "tasks"),
    "lotr_ext/sharded.py": ("distributed", "bad_input"),
    "lotr_ext/sharded_tensors.py": ("distributed", "bad_input", "frameworks"),
    "lotr_ext/storage.py": ("files", "tasks", "convert"),
    "lotr_ext/old_files.py": ("files", "peft"),
    "lotr_ext/trainer.py": ("trainer",),
    "lotr_ext/convert": ("convert", "bad_input"),
    "lotr_ext/vllm": ("vllm_files", "bad_input"),
    "csrc": ("operators", "layers", "bad_input"),
}


class Mutant(NamedTuple):
    """A fault: in `file`, below the repository's root, the text `old` becomes `new`."""

    file: str
    fault: str
    old: str
    new: str


def read_mutants() -> list[Mutant]:
    """Reads all faults, in the order of their files."""
    mutants = []
    for path in sorted(FAULTS.glob("*.yaml")):
        mutants += [Mutant(**item) for item in yaml.safe_load(path.read_text())]
    return mutants


def suite_of(file: str) -> tuple[str, ...]:
    """Returns the names of the tests that run for a file."""
    return next(tests for prefix, tests in TESTS.items() if file.startswith(prefix))


def stale_reason(mutant: Mutant, root: Path) -> str | None:
    """Returns why a fault cannot be written into its file, None if it can."""
    path = root / mutant.file
    if not path.is_file():
        return "its file does not exist"
    occurrences = path.read_text().count(mutant.old)
    return None if occurrences == 1 else f"its text occurs {occurrences} times"


def run(mutant: Mutant, folder: Path) -> str:
    """Writes a fault into the copy and runs its tests. Returns the outcome.

    That is which test catches it, "SURVIVES", or "STALE" and a reason.
    """
    reason = stale_reason(mutant, folder)
    if reason is not None:
        return f"STALE: {reason}"
    path = folder / mutant.file
    source = path.read_text()
    path.write_text(source.replace(mutant.old, mutant.new))
    is_compiled = mutant.file.startswith("csrc/")
    try:
        if is_compiled and not build(folder):
            return "caught by the compiler"
        for name in suite_of(mutant.file):
            failure = first_failure(folder, f"test_{name}.py")
            if failure is not None:
                return f"caught by {failure}"
    finally:
        path.write_text(source)
        if is_compiled:
            build(folder)
    return "SURVIVES"


def build(folder: Path) -> bool:
    """Compiles the extension of the copy, only the CPU's part. Returns whether that worked."""
    settings = {"LOTR_CUDA": "OFF", "LOTR_CPU_ISAS": "native", "LOTR_BUILD_DIR": f"{folder}/build"}
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    process = subprocess.run(command, cwd=folder, env=os.environ | settings, capture_output=True)
    return process.returncode == 0


def first_failure(folder: Path, tests: str) -> str | None:
    """Runs a file of tests until one fails.

    They run in a fork of this process, which has imported torch, but no module of the copy.

    Returns:
        The name of the test that failed, None if all passed.
    """
    output = folder / "output"
    arguments = (folder, tests, output)
    process = multiprocessing.get_context("fork").Process(target=run_tests, args=arguments)
    process.start()
    process.join(TIME_LIMIT)
    if process.is_alive():
        process.kill()
        return f"{tests}, which hangs"
    # A file of only slow or deselected tests has none that fail.
    if process.exitcode in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        return None
    name_of_failure = r"^(?:FAILED|ERROR) (?:python_tests/)?(.*?)(?: - |$)"
    failure = re.search(name_of_failure, output.read_text(), re.M)
    return failure[1] if failure else tests


def run_tests(folder: Path, tests: str, output: Path) -> None:
    """Runs a file of tests in this process, which is the fork, and ends the process."""
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(folder)
    sys.path[:0] = [str(folder), str(folder / "python_tests")]
    options = ["-x", "-q", "-n", "0", "--tb=no", "-p", "no:cacheprovider", "-m", "not full"]
    sys.exit(pytest.main([*options, "-k", DESELECTED, f"python_tests/{tests}"]))


def copy_repository(folder: Path) -> None:
    """Copies what the tests need into a folder."""
    for name in COPIED:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in COPIED_FILES:
        shutil.copy(ROOT / name, folder)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", help="part of a file's name or of a description")
    parser.add_argument("--tenth", type=int, help="a number: its last digit chooses a tenth")
    parser.add_argument("--list", action="store_true", help="check the texts without a run")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="start no further fault after this time"
    )
    return parser.parse_args()


def selected(arguments: argparse.Namespace) -> list[Mutant]:
    """Returns the faults that the command line names."""
    words = arguments.words or [""]
    mutants = [m for m in read_mutants() if any(word in f"{m.file} {m.fault}" for word in words)]
    return mutants if arguments.tenth is None else mutants[arguments.tenth % 10 :: 10]


def run_all(mutants: list[Mutant], seconds: float) -> int:
    """Runs faults in a copy of the repository. Returns how many of them are not caught."""
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = True
    torch.set_num_threads(1)
    # The copy is imported, not this repository.
    repository_folders = (ROOT, ROOT / "python_tests")
    sys.path[:] = [path for path in sys.path if Path(path).resolve() not in repository_folders]
    outcomes = []
    deadline = time.time() + seconds
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "mutated")
        copy_repository(folder)
        for mutant in mutants:
            start = time.time()
            if start > deadline:
                break
            outcomes.append(run(mutant, folder))
            duration = f"({time.time() - start:.0f} s)"
            print(f"{mutant.file}: {mutant.fault}: {outcomes[-1]} {duration}", flush=True)
    caught = sum(outcome.startswith("caught") for outcome in outcomes)
    print(f"{caught} of {len(outcomes)} caught")
    return len(outcomes) - caught


def main() -> int:
    arguments = parse_arguments()
    mutants = selected(arguments)
    if not mutants:
        print("mutants: expected words of a file's name or of a fault, got none that match.")
        return 1
    if not arguments.list:
        return int(run_all(mutants, arguments.seconds) > 0)
    stale = [mutant for mutant in mutants if stale_reason(mutant, ROOT) is not None]
    for mutant in stale:
        print(f"{mutant.file}: {mutant.fault}: STALE: {stale_reason(mutant, ROOT)}")
    print(f"{len(mutants)} faults, {len(stale)} of them stale")
    return int(bool(stale))


if __name__ == "__main__":
    sys.exit(main())
