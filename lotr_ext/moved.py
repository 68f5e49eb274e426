"""Where modules were before the package had rooms: pickles of whole models name their classes by these paths."""

import sys
from importlib import import_module

MOVED = {
    "apply": "model.apply",
    "config": "model.config",
    "factors": "layers.factors",
    "hub": "autograd.shared_gradient",
    "layer": "layers.layer",
    "linear": "layers.linear",
    "scope": "model.scope",
    "siblings": "autograd.shared_input",
}

for _old, _new in MOVED.items():
    sys.modules[f"lotr_ext.{_old}"] = import_module(f"lotr_ext.{_new}")
