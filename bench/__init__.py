"""Benchmarks: what LoTR costs, compared with the frozen layer and with what is used today.

python -m bench            the next five programs, and on a GPU bench.kernels (make bench)
python -m bench --quick    the same with few rounds, in minutes
python -m bench.layer      one adapted layer against its rivals
python -m bench.model      a transformer trained with each method
python -m bench.host       a stack of layers: host overhead, and the shared gradient
python -m bench.experts    the experts of a mixture against LoRA
python -m bench.tasks      a batch with a task per row, trained and served
python -m bench.kernels    each CUDA kernel against the library's product
python -m bench.bytes      bytes that the CUDA kernels move, counted without a GPU
python -m bench.accuracy   held-out loss against trained parameters, with intervals (hours)
python -m bench.transfer   the same for a new task that trains only its cores (hours)
python -m bench.plot       pictures of the recorded results
python -m bench.smoke      every operator in every form against float64, in processes that may crash
python -m bench.gpu        on a machine with a GPU: all of it within a time (make gpu)
python -m bench.summary    the page about a run of bench.gpu

Run them in the folder of the repository, after `pip install -r requirements/bench.txt`. They
measure the lotr_ext of this folder if it was built in place (`make bench`, or an editable install),
else the installed one. Times are measured in interleaved rounds, and their rows are JSON Lines in
bench/results/<machine>/<program>.jsonl.
"""

import os
import sys
from pathlib import Path

# timing.py counts allocations by torch's profiler, which would print when it starts, and warn of
# blocks that were allocated before.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models are random, or in data/


def _prefer_installed() -> None:
    """Moves the repository to the end of sys.path if its lotr_ext has not been built in place.

    `python -m bench.layer` puts the current folder first. There the sources of lotr_ext would hide
    the installed package, which has the compiled extension.
    """
    root = Path(__file__).resolve().parents[1]
    if list((root / "lotr_ext").glob("_C*.so")):
        return
    sys.path[:] = [*(entry for entry in sys.path if Path(entry).resolve() != root), str(root)]


_prefer_installed()
