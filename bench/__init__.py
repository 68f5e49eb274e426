"""Benchmarks: what does LoTR cost over the frozen layer, and against what is used today?

python -m bench            all of it, sized to this machine (make bench); --quick in two minutes
python -m bench.layer      one adapted layer against its rivals
python -m bench.block      a transformer's block, where siblings share
python -m bench.shared     the shared gradient against autograd's own sums
python -m bench.model      a transformer trained with each method
python -m bench.host       host time of a layer, and its counts of calls and operators
python -m bench.experts    the experts of a mixture against PEFT's LoRA
python -m bench.tasks      a training step of many tasks at once
python -m bench.kernels    each CUDA kernel alone against the library's product (needs a GPU)
python -m bench.serving    adapters in servers: throughput kept, memory a task, time of a new version (needs vLLM)
python -m bench.gpu        all that a GPU is for, within minutes (make gpu)
python -m bench.traffic    bytes counted without a GPU, and what they would cost on one
python -m bench.profile    where an adapted layer's time over the frozen layer goes
python -m bench.report     the tables of README and docs/benchmarks.md, and pictures, from the results that are kept
python -m bench.targets    which of the targets on a CPU the kept results meet
python -m bench.compare    regressions between two result files
"""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler counts allocations for us and would print as it starts
