"""Run a LoTR configuration in PEFT's method comparison (MetaMathQA), with PEFT's script.

    python run.py --peft ~/peft                                    all three of experiments/lotr, an hour on one large GPU
    python run.py --peft ~/peft llama-3.2-3B-width-rank16           one of them
    python run.py --peft ~/peft --table                             print PEFT's results and LoTR's, without a run
    python run.py --peft ~/peft --try                               all steps on a CPU: tiny random Llama, ten problems

~/peft is a clone of github.com/huggingface/peft, installed by pip install -e ~/peft. The comparison needs a GPU of 24 GiB and
access to meta-llama/Llama-3.2-3B.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
EXPERIMENTS = HERE / "experiments" / "lotr"
PROBLEMS = 1319  # of GSM8K's test set


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    known = sorted(folder.name for folder in EXPERIMENTS.iterdir())
    parser.add_argument("experiments", nargs="*", metavar="EXPERIMENT", help=f"some of {', '.join(known)} (all)")
    parser.add_argument("--peft", required=True, type=Path, help="a clone of github.com/huggingface/peft")
    parser.add_argument("--out", type=Path, default=Path("peft_comparison"), help="folder for the results (peft_comparison)")
    parser.add_argument("--table", action="store_true", help="only print the table of existing results")
    parser.add_argument("--try", action="store_true", dest="try_out", help="a tiny random model on the CPU (a minute)")
    options = parser.parse_args(argv)
    if unknown := set(options.experiments) - set(known):
        parser.error(f"experiments: expected some of {', '.join(known)}, got {', '.join(sorted(unknown))}")
    options.experiments = options.experiments or known
    options.peft = options.peft.expanduser().resolve()
    if not (options.peft / "method_comparison" / "MetaMathQA" / "run.py").is_file():
        parser.error(
            "peft: expected a clone of github.com/huggingface/peft with method_comparison/MetaMathQA/run.py, got "
            f"{options.peft}; git clone https://github.com/huggingface/peft"
        )
    return options


def run_theirs(peft: Path, experiment: str, out: Path, try_out: bool) -> Path:
    """Runs one experiment in a separate process. Returns the path of PEFT's result file, moved to `out`.

    Raises:
        RuntimeError: PEFT's script failed, or wrote no successful result.
    """
    theirs = peft / "method_comparison" / "MetaMathQA"
    before = set(theirs.glob("*results/lotr--*.json"))
    command = [sys.executable, str(Path(__file__).resolve()), "--peft", str(peft), experiment]
    status = subprocess.run(command, env={**os.environ, "LOTR_COMPARISON": "try" if try_out else "run"}).returncode
    written = sorted(set(theirs.glob("*results/lotr--*.json")) - before, key=lambda path: path.stat().st_mtime)
    if status or not written:
        raise RuntimeError(
            f"{experiment}: PEFT's script ended with status {status} and wrote {len(written)} results (see above)"
        )
    result = json.loads(written[-1].read_text())
    if result["train_info"]["status"] != "success":
        raise RuntimeError(f"{experiment}: {result['train_info']['status']}: {result['run_info']['error_msg']}")
    out.mkdir(parents=True, exist_ok=True)
    part = out / f".{experiment}.json"
    shutil.move(written[-1], part)
    return part.replace(out / f"{'try--' if try_out else ''}lotr--{experiment}.json")


def in_their_process(peft: Path, experiment: str, try_out: bool) -> None:
    """Registers LoTR with PEFT, then runs PEFT's script as the main program. Runs in the experiment's process."""
    theirs = peft / "method_comparison" / "MetaMathQA"
    sys.path.insert(0, str(theirs))
    folder = HERE
    if try_out:
        sys.path.append(str(HERE))
        import try_out as tiny

        folder = tiny.prepare(theirs, experiment)
    import lotr_ext.interop.peft  # noqa: F401  registers LOTR

    os.chdir(folder)  # PEFT's script takes the path experiments/<method>/<name>
    sys.argv = [str(theirs / "run.py"), "-v", "--clean", f"experiments/lotr/{experiment}"]
    runpy.run_path(sys.argv[0], run_name="__main__")


def interval(accuracy: float, problems: int = PROBLEMS) -> float:
    """Half of the 95 % interval of an accuracy over `problems` problems."""
    return 1.96 * math.sqrt(accuracy * (1 - accuracy) / problems)


def row(path: Path) -> tuple[int, float, str] | None:
    """(trained numbers, test accuracy, line of the table) of a result; None without a test accuracy."""
    result = json.loads(path.read_text())
    info, run = result["train_info"], result["run_info"]
    last = info["metrics"][-1]
    if (accuracy := last.get("test accuracy")) is None:
        return None
    numbers, gib = info["num_trainable_params"], info["accelerator_memory_max"] / 2**30
    cells = [run["experiment_name"].replace("/", " "), f"{numbers:,}", f"{100 * accuracy:.1f} ± {100 * interval(accuracy):.1f}"]
    cells += [f"{last['forgetting']:.2f}", f"{gib:.1f}", f"{info['train_time'] / 60:.0f}", run["created_at"][:10]]
    return numbers, accuracy, f"| {' | '.join(cells)} |"


def table(peft: Path, out: Path) -> str:
    """PEFT's results and LoTR's as a Markdown table, sorted by trained numbers, with the date of each run."""
    files = [*(peft / "method_comparison" / "MetaMathQA" / "results").glob("*.json"), *out.glob("lotr--*.json")]
    rows = sorted(found for path in files if (found := row(path)))
    lines = [
        "| method | trained numbers | GSM8K test accuracy, % | forgetting | GiB | minutes | run |",
        "|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *(line for _, _, line in rows)])


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    if way := os.environ.get("LOTR_COMPARISON"):
        in_their_process(options.peft, options.experiments[0], way == "try")
        return 0
    if not options.table:
        for number, experiment in enumerate(options.experiments, 1):
            print(f"[{number}/{len(options.experiments)}] {experiment}", file=sys.stderr)
            try:
                print(f"result in {run_theirs(options.peft, experiment, options.out, options.try_out)}")
            except RuntimeError as error:
                print(f"run.py: {error}", file=sys.stderr)
                return 1
    if not options.try_out:
        print(table(options.peft, options.out))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
