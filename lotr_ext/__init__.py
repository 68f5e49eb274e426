"""lotr_ext: LoTR (Low Tensor Rank adaptation, arXiv 2402.01376) as PyTorch layers with kernels of their own.

    y = x W^T + bias + s ((x A) G_l) B^T

A stack of frozen linear layers is adapted by a Tucker-2 tensor: two factors A and B shared by all layers of a group, and a
small core G_l per layer. Start at `LoTRLinear` for a model of your own and at `apply_lotr` for an existing one.
"""

import sys
import warnings
from importlib import import_module
from types import ModuleType

__version__ = "0.1.0"  # before the imports below, which read it

try:
    from . import ops as ops  # loads the compiled extension
except ValueError as error:  # of a variable in the environment; with a name python -m lotr_ext.info prints one line on it
    raise ImportError(f"lotr_ext: {error}", name=__name__) from None

from .autograd.one_node import LoTRFunction
from .autograd.two_nodes import LoTRExpand as LoTRExpand  # inner nodes, which a printed graph shows
from .autograd.two_nodes import LoTRShrink as LoTRShrink
from .layers.experts import LoTRExperts, lotr_grouped_linear
from .layers.factors import LoTRFactor, LoTRFactors
from .layers.functional import explain, lotr_linear
from .layers.linear import LoTRConv1D, LoTRLinear
from .layers.tuning import tune
from .layers.wrapped import LoTRWrapped, adapt
from .model import holders as holders  # adds itself to what saving calls
from .model.activated import activated
from .model.adapted import lotr_parameters
from .model.adapters import active_adapter, adapter_names, add_adapter, delete_adapter, mixed, set_adapter
from .model.apply import apply_lotr, disabled
from .model.combine import combine
from .model.config import LoTRConfig
from .model.evolution import CoreES
from .model.gradient import init_from_gradient
from .model.groups import parameter_groups
from .model.influence import influence
from .model.loading import load_adapter
from .model.merging import merge, unload, unmerge
from .model.per_example import per_example
from .model.pipeline import PipelineStages
from .model.pretrained import from_pretrained
from .model.saving import save_adapter
from .model.summary import trainable_summary
from .model.tasks import TaskBank

__all__ = [
    "CoreES",
    "LoTRConfig",
    "LoTRConv1D",
    "LoTRExperts",
    "LoTRFactor",
    "LoTRFactors",
    "LoTRFunction",
    "LoTRLinear",
    "LoTRWrapped",
    "PipelineStages",
    "TaskBank",
    "activated",
    "active_adapter",
    "adapt",
    "adapter_names",
    "add_adapter",
    "apply_lotr",
    "combine",
    "delete_adapter",
    "disabled",
    "explain",
    "from_pretrained",
    "influence",
    "init_from_gradient",
    "load_adapter",
    "lotr_grouped_linear",
    "lotr_linear",
    "lotr_parameters",
    "merge",
    "mixed",
    "parameter_groups",
    "per_example",
    "save_adapter",
    "set_adapter",
    "trainable_summary",
    "tune",
    "unload",
    "unmerge",
]


class _OldPath(ModuleType):
    """A module of 0.1.0 whose names have another home: each use warns. To be removed after the next version."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__") and name not in ("__all__", "__version__"):  # inspect asks all modules for some
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        home = _OLD_PATHS[self.__name__]
        found = getattr(import_module(home), name)
        warnings.warn(f"{self.__name__}.{name}: import it from {home} instead", DeprecationWarning, stacklevel=2)
        return found


_OLD_PATHS = {
    "lotr_ext.adapters": "lotr_ext.model.adapters",
    "lotr_ext.planner": "lotr_ext.ops.planner",
    "lotr_ext.trainer": "lotr_ext.interop.trainer",
    "lotr_ext.version": "lotr_ext",
}
for _path in _OLD_PATHS:
    globals()[_path.rpartition(".")[2]] = sys.modules[_path] = _OldPath(_path)
