"""Benchmarks. `python -m bench.layer` times one adapted layer against its rivals (make bench), `python -m bench.shared` the
shared gradient against autograd's own sums; `python -m bench.report` rebuilds README's tables from the results that are
kept, `python -m bench.compare` finds regressions between two result files."""
