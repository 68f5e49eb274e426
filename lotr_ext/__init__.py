"""LoTR (Low Tensor Rank adaptation, arXiv 2402.01376) for PyTorch, with CPU and CUDA kernels.

    y = x W^T + bias + s ((x A) G_l) B^T

A stack of frozen linear layers is adapted by a Tucker-2 tensor: two factors A and B, which all
layers of a group share, and a small core G_l per layer. Start at `apply_lotr` for an existing
model, and at `LoTRLinear` for your own.
"""

__version__ = "0.1.0"

from .choosing import rank_for
from .experts import LoTRExperts, lotr_grouped_linear
from .factors import LoTRFactor, LoTRFactors
from .functional import lotr_linear
from .layers import LoTRConv1D, LoTRLinear
from .loading import load_adapter
from .merging import merge, unmerge
from .model import LoTRConfig, apply_lotr, disabled, init_from_gradient, unload
from .reports import explain, lotr_parameters, parameter_groups, trainable_summary
from .saving import push_to_hub, save_adapter
from .tasks import TaskBank, use_tasks
from .wrapped import LoTRWrapped, adapt

__all__ = [
    "LoTRConfig",
    "LoTRConv1D",
    "LoTRExperts",
    "LoTRFactor",
    "LoTRFactors",
    "LoTRLinear",
    "LoTRWrapped",
    "TaskBank",
    "adapt",
    "apply_lotr",
    "disabled",
    "explain",
    "init_from_gradient",
    "load_adapter",
    "lotr_grouped_linear",
    "lotr_linear",
    "lotr_parameters",
    "merge",
    "parameter_groups",
    "push_to_hub",
    "rank_for",
    "save_adapter",
    "trainable_summary",
    "unload",
    "unmerge",
    "use_tasks",
]
