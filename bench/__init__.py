"""Benchmarks: what does LoTR cost over the frozen layer, and against what is used today?

python -m bench            every program that this machine can run (make bench); --quick in two minutes
python -m bench.layer      one adapted layer against its rivals
python -m bench.model      a transformer trained with each method
python -m bench.host       host overhead of a layer, and its Python frames and operators
python -m bench.shared     layers on one pair of factors: one sum in place against autograd's own sums
python -m bench.experts    the experts of a mixture against LoRA
python -m bench.tasks      a batch whose rows have tasks of their own, trained and served
python -m bench.kernels    each CUDA kernel against the library's product (needs a GPU; --device cpu: the CPU kernels)
python -m bench.bytes      bytes that the CUDA kernels move, counted without a GPU
python -m bench.accuracy   held-out loss against trained numbers, with intervals (hours)
python -m bench.plot       pictures of the kept results
python -m bench.gpu        on a machine with a GPU: build, tests and benchmarks within a time (make gpu)

Times are measured in interleaved rounds. Results are JSON Lines in bench/results/<machine>/<program>.jsonl.
"""

import os

os.environ.setdefault(
    "KINETO_LOG_LEVEL", "99"
)  # torch's profiler counts allocations for us and would print as it starts
os.environ.setdefault(
    "TORCH_CPP_LOG_LEVEL", "ERROR"
)  # and would warn of blocks that are older than it
