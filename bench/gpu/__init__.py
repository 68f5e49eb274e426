"""One run on a machine with a GPU: `python -m bench.gpu` (make gpu)."""
