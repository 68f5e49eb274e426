"""Output layers and heads: "all-linear" leaves them out, a task_type trains them, and a frozen head causes a warning."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from .config import HEADED_TASKS, LoTRConfig
from .names import name_ends_with

__all__ = ["heads", "output_layers", "warn_of_frozen_heads", "with_head"]

# of transformers models without an output layer
_HEADS = (
    *("score", "classifier", "pre_classifier", "qa_outputs", "classification_head", "logits_proj"),
    *("cls_classifier", "distillation_classifier"),
)
_IS_OUTPUT = "the output layer: name it to adapt it"
_IS_HEAD = "a head: name it to adapt it, or train it whole (modules_to_save)"


def _outputs_of(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """The output layer of a transformers model, or its heads if it has none; a timm model's classifier."""
    if callable(classifier := getattr(module, "get_classifier", None)):
        try:
            found = classifier()
        except (NotImplementedError, AttributeError, TypeError):  # a method of that name with another meaning
            found = None
        yield from ((one, _IS_HEAD) for one in (found if isinstance(found, tuple | list) else (found,)))
    if callable(own := getattr(module, "get_output_embeddings", None)):
        try:
            output = own()
        except (NotImplementedError, AttributeError):  # a model without an output layer
            output = None
        if isinstance(output, nn.Module):
            yield output, _IS_OUTPUT
        else:
            yield from ((head, _IS_HEAD) for name in _HEADS if (head := getattr(module, name, None)) is not None)


def output_layers(model: nn.Module) -> dict[int, str]:
    """The layers that "all-linear" leaves out, as in PEFT, by id(module), each with a description."""
    found: dict[int, str] = {}
    for module in model.modules():
        for head, what in _outputs_of(module):
            found |= {id(m): what for m in (head.modules() if isinstance(head, nn.Module) else ())}
    return found


def heads(model: nn.Module) -> dict[str, nn.Module]:
    """The heads of a model that have parameters, by name."""
    found = {id(head) for module in model.modules() for head, what in _outputs_of(module) if what is _IS_HEAD}
    return {n: m for n, m in model.named_modules() if n and id(m) in found and next(m.parameters(), None) is not None}


def with_head(model: nn.Module, config: LoTRConfig) -> LoTRConfig:
    """config with the model's heads in modules_to_save, if its task_type has a head.

    Raises:
        ValueError: such a task_type, and a model without a known head.
    """
    if not isinstance(model, nn.Module) or not isinstance(config, LoTRConfig) or config.task_type not in HEADED_TASKS:
        return config  # `select` raises for wrong types
    found, saved = heads(model), config.modules_to_save or ()
    if not found and not saved:
        raise ValueError(
            f"task_type: expected a model with a head for {config.task_type!r}, got {type(model).__name__} without one of the "
            f"known names ({', '.join(_HEADS)}); name its head in modules_to_save"
        )
    new = [name for name in found if not any(name_ends_with(name, ending) for ending in saved)]
    return replace(config, modules_to_save=(*saved, *new))


def warn_of_frozen_heads(model: nn.Module) -> None:
    """Warns once about heads of an adapted model that are neither trained nor adapted."""
    frozen = [name for name, head in heads(model).items() if not any(p.requires_grad for p in head.parameters())]
    if frozen:
        warnings.warn(
            f"lotr_ext: {', '.join(frozen)} stays frozen, so a new head keeps its initial values; train it with "
            f"modules_to_save={frozen}",
            stacklevel=3,
        )
