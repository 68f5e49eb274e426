"""What an adapted model trains, and what runs in its layers.

    lotr_parameters, parameter_groups       for an optimizer
    trainable_summary                       counts, and what was left out
    explain                                 kernels or the PyTorch fallback, and why

Not here: the rule by which a call falls back (core/dispatch.py).
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from .adapted import adapted_layers, attached_parameters
from .core import dispatch
from .core.call import LayerCall
from .core.request import ADAPTER_OFF, state_of
from .core.strategy import strategy_note
from .layers import LoTRLayer

# ---- for an optimizer ----------------------------------------------------------------------------


def lotr_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Returns the trained parameters of the adapter, for an optimizer.

    They are A, B, the cores (or the parameters from which cores are computed) and the tasks of a
    `TaskBank`, if they require grad. modules_to_save are not among them:
    `[p for p in model.parameters() if p.requires_grad]` has both.

    Raises:
        RuntimeError: If the model has no adapter.
    """
    return iter([p for p in _adapter_groups(model) if p.requires_grad])


def _adapter_groups(model: nn.Module) -> dict[nn.Parameter, str]:
    """Returns the group of each parameter of the adapter: "cores" or "factors"."""
    groups = {
        parameter: "cores" if part == "core" else "factors"
        for layer in adapted_layers(model).values()
        for part, parameter in layer.parts()
    }
    return groups | dict.fromkeys(attached_parameters(model), "cores")


def parameter_groups(
    model: nn.Module, lr: float | None = None, *, other_lr: float | None = None
) -> list[dict[str, Any]]:
    """Returns all trained parameters of an adapted model in up to three groups for an optimizer.

    The groups are named "cores" (with the tasks of a bank), "factors" (A and B), and "other"
    (modules_to_save, such as a new head, and everything else that requires grad). For transformers'
    Trainer and TRL:
    `Trainer(..., optimizers=(torch.optim.AdamW(parameter_groups(model, 1e-3)), None))`.

    Args:
        model: An adapted model.
        lr: The learning rate of all groups, the optimizer's if None. You may change a group's "lr".
        other_lr: The learning rate of "other" if it differs.

    Raises:
        RuntimeError: If the model has no adapter.
    """
    adapter_groups = _adapter_groups(model)
    rates = {"cores": lr, "factors": lr, "other": lr if other_lr is None else other_lr}
    groups: dict[str, dict[str, Any]] = {}
    for name, rate in rates.items():
        groups[name] = {"params": [], "name": name}
        if rate is not None:  # without "lr", the optimizer's rate is used
            groups[name]["lr"] = rate
    for p in model.parameters():
        if p.requires_grad:
            groups[adapter_groups.get(p, "other")]["params"].append(p)
    return [group for group in groups.values() if group["params"]]


# ---- counts --------------------------------------------------------------------------------------


class TrainableSummary(NamedTuple):
    """Counts of a model's parameters. str() gives a readable report.

    Attributes:
        adapter: Parameters of A, B and the cores.
        trained: Parameters that require grad.
        total: Parameters of the model with its adapter.
        layers: Adapted layers.
        groups: Pairs of factors.
        parts: What is trained: "A", "B", "core", and the names of other modules.
        left_out: The names of layers that target_modules matches and that have no adapter, by
            reason.
    """

    adapter: int
    trained: int
    total: int
    layers: int
    groups: int
    parts: tuple[str, ...]
    left_out: dict[str, list[str]]

    def __str__(self) -> str:
        pairs = "pair" if self.groups == 1 else "pairs"
        lines = [
            f"LoTR: {self.layers} layers, {self.groups} {pairs} of factors, {self.adapter:,} "
            f"adapter parameters; trained {self.trained:,} of {self.total:,} "
            f"({self.trained / self.total:.4%})",
            f"trained: {_shortened(self.parts, 5) or 'nothing'}; all else is frozen",
        ]
        lines += [
            f"left out: {_shortened(names, 3)} ({reason})"
            for reason, names in self.left_out.items()
        ]
        return "\n".join(lines)


def _shortened(names: Sequence[str], limit: int) -> str:
    """Lists names in at most `limit` entries. If there are more, the last entry counts the rest."""
    if len(names) <= limit:
        return ", ".join(names)
    return ", ".join([*names[: limit - 1], f"{len(names) - limit + 1} more"])


def trainable_summary(model: nn.Module) -> TrainableSummary:
    """Counts adapted and trained parameters, and lists what is trained and what was left out.

    A group of S layers [d, d] has S r^2 + 2 r d parameters in its cores, A and B.

    Raises:
        RuntimeError: If the model has no adapter.
    """
    layers = adapted_layers(model).values()
    # Without the tasks of a bank, which the summary lists as another module that is trained.
    adapter = {parameter: part for layer in layers for part, parameter in layer.parts()}
    other_modules = [
        name.rpartition(".")[0]
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter not in adapter
    ]
    # A part that is frozen only in some layers counts as trained.
    trained_parts = {part for parameter, part in adapter.items() if parameter.requires_grad}
    return TrainableSummary(
        adapter=sum(p.numel() for p in adapter),
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        total=sum(p.numel() for p in model.parameters()),
        layers=len(layers),
        groups=len({(layer.factors.A, layer.factors.B) for layer in layers}),
        parts=(*sorted(trained_parts), *dict.fromkeys(other_modules)),
        left_out=getattr(model, "lotr_left_out", {}),
    )


# ---- explain -------------------------------------------------------------------------------------


def explain(model: nn.Module, x: Tensor) -> str:
    """Describes what runs in adapted layers for an input, and why: one line per kind of layer.

    Call it in the contexts (autocast, `disabled`, torch.func) in which you call the model.

    Args:
        model: An adapted layer, or a model with some.
        x: An input of the model. The layers get its device and dtype, for token ids the dtype of
            the model's first floating parameter.

    Raises:
        RuntimeError: If the model has no adapter.
    """
    layers = adapted_layers(model).values()
    # Token ids go through an embedding, which usually has the first parameter. Not the dtype of a
    # layer's weight, which differs from the input's if the weight is quantized.
    dtype = next(t.dtype for t in (x, *model.parameters()) if t.dtype.is_floating_point)
    lines = Counter(_line(layer, x.new_empty(0, dtype=dtype)) for layer in layers)
    return "\n".join(f"{count} x {line}" for line, count in lines.items())


def _line(layer: LoTRLayer, x: Tensor) -> str:
    """Describes a layer, and what runs in it for an input of the dtype and device of x."""
    # As in the layer: under autocast, it casts its input.
    computed = x.to(dispatch.autocast_dtype(x) or x.dtype)
    return (
        f"{type(layer).__name__} {layer.in_features} -> {layer.out_features} at rank "
        f"{layer.factors.rank}: {_what_runs(layer, computed)} "
        f"({str(computed.dtype).removeprefix('torch.')} on {x.device.type})"
    )


def _what_runs(layer: LoTRLayer, x: Tensor) -> str:
    """Returns what runs in a layer that computes in the dtype and on the device of x."""
    if layer.merged:
        return "only the base, because the adapter is merged into its weight"
    if state_of(layer) is ADAPTER_OFF:
        return "only the base, because the adapter is disabled"

    def reason(A: Tensor, B: Tensor) -> str | None:
        # The rule reads only dtypes and devices, so x can take the place of the base's output.
        call = LayerCall(x, None, None, A, B, layer.core, layer.scaling, base_output=x)
        return dispatch.fallback_reason(call)

    fallback_reason = layer.factors.read(reason)
    if fallback_reason:
        return f"the PyTorch fallback, because {fallback_reason}"
    note = strategy_note(
        layer.in_features, layer.out_features, layer.factors.A.rank, x.dtype, x.device
    )
    return ", ".join(filter(None, ("the kernels of lotr_ext", note)))
