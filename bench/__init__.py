"""Benchmarks. `python -m bench.layer` times one adapted layer against its rivals (make bench); `python -m bench.report`
rebuilds README's table from its results; `python -m bench.compare` finds regressions between two result files."""
