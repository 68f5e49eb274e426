"""Whether a model is the base on which an adapter was trained: a few values of frozen parameters.

A checksum would differ after a cast. The values of one base agree up to the rounding to bfloat16,
the coarsest dtype of base weights. Quantized parameters are skipped.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor, nn

from .adapted import layers_in
from .checks import check_number
from .sharded_tensors import full_shape, is_sharded
from .storage import expect_type
from .targets import saved_in

Gather = Callable[[Tensor], Tensor]  # returns the full tensor of one that may be sharded
PARAMETERS = 8  # how many frozen parameters are sampled
VALUES = 4  # of each


@dataclass(frozen=True)
class BaseModel:
    """What identifies the base model: its name if known, and a few values of frozen parameters."""

    name: str | None = None
    values: dict[str, list[float]] = field(default_factory=dict)

    @staticmethod
    def from_json(value: object) -> "BaseModel":
        """Returns what a JSON object has.

        Raises:
            TypeError, ValueError: If a field is unknown, or of a wrong type or value.
        """
        expect_type("base", value, dict)
        if not value.keys() <= {"name", "values"}:
            raise ValueError(f"base: expected name and values, got {sorted(value)!r:.200}")
        base = BaseModel(**value)
        if base.name is not None:
            expect_type("base.name", base.name, str)
        expect_type("base.values", base.values, dict)
        for name, numbers in base.values.items():
            expect_type(f"base.values, {name:.80}", numbers, list)
            for number in numbers:
                check_number(f"base.values, {name:.80}", number)
        return base

    @staticmethod
    def of(model: nn.Module, gather: Gather) -> "BaseModel":
        """Returns the base of an adapted model.

        Args:
            model: The model.
            gather: Returns the full tensor of one that may be sharded.
        """
        skipped = _moved_parameters(model)
        for layer in layers_in(model).values():
            skipped.update(id(p) for p in layer.adapter_parameters())
        for module in saved_in(model).values():
            skipped.update(id(p) for p in module.parameters())
        frozen = [
            (name, p)
            for name, p in model.named_parameters()
            if id(p) not in skipped and not p.requires_grad and _is_sampled(p)
        ]
        # Biases and norms may be zeros and ones in every model. Matrices tell models apart.
        matrices = [(name, p) for name, p in frozen if len(full_shape(p)) > 1]
        candidates = matrices or frozen
        # Spread over the depth: models often share their first layers, such as embeddings.
        step = max(1, math.ceil(len(candidates) / PARAMETERS))
        values = {}
        for name, parameter in candidates[::step]:
            numbers = _sample(gather(parameter))
            if all(map(math.isfinite, numbers)):  # JSON has no others
                values[name] = numbers
        return BaseModel(_name_of(model), values)

    def check(self, model: nn.Module, gather: Gather, refuse: bool) -> None:
        """Refuses a model with another base, or warns of it.

        Values may differ by the rounding to bfloat16. Parameters that the model lacks, or has in a
        quantized format, are skipped.

        Args:
            model: An adapted model.
            gather: Returns the full tensor of one that may be sharded.
            refuse: Whether to raise.

        Raises:
            ValueError: If the base is another one and refuse is set.
        """
        moved = _moved_parameters(model)
        parameters = dict(model.named_parameters())
        for name, expected in self.values.items():
            parameter = parameters.get(name)
            if parameter is None or id(parameter) in moved or not _is_sampled(parameter):
                continue
            difference = _difference(_sample(gather(parameter)), expected)
            if difference is not None:
                message = (
                    f"base: expected the model that the adapter was trained on "
                    f"({self.name or 'its name is not known'}), got "
                    f"{_name_of(model) or type(model).__name__}, in which {name} has "
                    f"{difference}. Load the adapter into its base model."
                )
                refuse_or_warn(message, refuse)
                return


def refuse_or_warn(message: str, refuse: bool) -> None:
    """Raises a ValueError with the message, or warns."""
    if refuse:
        raise ValueError(message)
    warnings.warn(f"lotr_ext: {message}", stacklevel=5)


def _name_of(model: nn.Module) -> str | None:
    """Returns where a transformers model was loaded from."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    return name if isinstance(name, str) and name else None


def _sample(tensor: Tensor) -> list[float]:
    """Returns values at fixed places of a full tensor."""
    last = tensor.numel() - 1
    places = sorted({last * i // (VALUES - 1) for i in range(VALUES)})
    return tensor.detach().reshape(-1)[places].double().tolist()


def _difference(actual: list[float], expected: list[float]) -> str | None:
    """Describes where two samples differ by more than the rounding to bfloat16, None if nowhere."""
    if len(actual) != len(expected):
        return "another size"
    for actual_value, value in zip(actual, expected):
        if not math.isclose(actual_value, value, rel_tol=2.0**-7, abs_tol=1e-6):
            return f"{actual_value:.4g} in place of {value:.4g}"
    return None


def _moved_parameters(model: nn.Module) -> set[int]:
    """Returns the ids of base parameters that a merge or init "svd" has changed."""
    moved: set[int] = set()
    for layer in layers_in(model).values():
        if layer.merged or layer.start_core is not None:
            moved.update(id(p) for p in layer.parameters())
            moved.update(id(p) for p in getattr(layer, "host", layer).parameters())
    return moved


def _is_sampled(parameter: Tensor) -> bool:
    is_plain = type(parameter) is nn.Parameter or is_sharded(parameter)
    is_float = parameter.is_floating_point() and parameter.dtype.itemsize >= 2
    return is_plain and is_float and not parameter.is_meta and math.prod(full_shape(parameter)) > 0
