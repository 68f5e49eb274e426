"""lotr_ext: LoTR (Low Tensor Rank adaptation, arXiv 2402.01376) as PyTorch layers with kernels of their own.

    y = x W^T + bias + s ((x A) G_l) B^T

A stack of frozen linear layers is adapted by a Tucker-2 tensor: two factors A and B shared by all layers of a group, and a
small core G_l a layer. Start at `LoTRLinear` for a model of your own and at `apply_lotr` for an existing one.
"""

try:
    from . import ops as ops  # loads the compiled extension
except OSError as error:
    raise ImportError(
        f"lotr_ext: expected a compiled extension that loads, got {error.__cause__ or error}; build it again with "
        "`pip install --no-build-isolation -e .` (or `make setup`) in the project's folder",
        name=__name__,  # python -m lotr_ext.info prints one line on it, and no traceback
    ) from error

from .autograd.one_node import LoTRFunction
from .autograd.two_nodes import LoTRExpand as LoTRExpand  # inner nodes, which a printed graph shows
from .autograd.two_nodes import LoTRShrink as LoTRShrink
from .layers.experts import LoTRExperts, lotr_grouped_linear
from .layers.factors import LoTRFactor, LoTRFactors
from .layers.functional import explain, lotr_linear
from .layers.linear import LoTRConv1D, LoTRLinear, LoTRWrapped, adapt
from .layers.tuning import tune
from .model.adapters import active_adapter, adapter_names, add_adapter, delete_adapter, mixed, set_adapter
from .model.apply import apply_lotr, disabled, lotr_parameters, merge, unload, unmerge
from .model.checkpoint import load_adapter, save_adapter
from .model.config import LoTRConfig
from .model.gradient import init_from_gradient
from .model.groups import parameter_groups
from .model.pretrained import from_pretrained
from .model.summary import trainable_summary
from .model.tasks import TaskBank
from .version import __version__ as __version__

__all__ = [
    "LoTRConfig",
    "LoTRConv1D",
    "LoTRExperts",
    "LoTRFactor",
    "LoTRFactors",
    "LoTRFunction",
    "LoTRLinear",
    "LoTRWrapped",
    "TaskBank",
    "active_adapter",
    "adapt",
    "adapter_names",
    "add_adapter",
    "apply_lotr",
    "delete_adapter",
    "disabled",
    "explain",
    "from_pretrained",
    "init_from_gradient",
    "load_adapter",
    "lotr_grouped_linear",
    "lotr_linear",
    "lotr_parameters",
    "merge",
    "mixed",
    "parameter_groups",
    "save_adapter",
    "set_adapter",
    "trainable_summary",
    "tune",
    "unload",
    "unmerge",
]
