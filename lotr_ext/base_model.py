"""Recognizes the base model on which an adapter was trained, by a few values of frozen parameters.

A checksum would differ after a cast. The values of one base agree up to the rounding to bfloat16,
the coarsest dtype of base weights. Quantized parameters are skipped.

    save      BaseModel.of(model)         samples VALUES elements of each of PARAMETERS parameters
    load      state.base.check(model)     compares them with those of the model
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from .adapted import layers_in
from .sharded_tensors import full_shape, is_sharded
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
    def from_json(values: Mapping[str, Any]) -> "BaseModel":
        """Returns the base that `dataclasses.asdict` wrote as a JSON object.

        Raises:
            AttributeError, OverflowError, TypeError, ValueError: If a field is unknown, `values` is
                not an object, or a value in it is not a number or is too large for a float.
        """
        base = BaseModel(**values)
        # float raises here, and not at the comparison, when the model is adapted already.
        return replace(base, values={name: list(map(float, v)) for name, v in base.values.items()})

    @staticmethod
    def of(model: nn.Module, gather: Gather) -> "BaseModel":
        """Returns the base of an adapted model.

        Args:
            model: The model.
            gather: Returns the full tensor of one that may be sharded.
        """
        in_file = parameters_in_file(model)
        frozen = {
            name: parameter
            for name, parameter in _comparable(model).items()
            if not parameter.requires_grad and parameter not in in_file
        }
        # Biases and norms may be zeros and ones in every model. Matrices tell models apart.
        matrices = [name for name, parameter in frozen.items() if len(full_shape(parameter)) > 1]
        names = matrices or list(frozen)
        # Spread over the depth: models often share their first layers, such as embeddings.
        step = max(1, math.ceil(len(names) / PARAMETERS))
        values = {name: _sample(gather(frozen[name])) for name in names[::step]}
        # JSON has no NaN and no infinity.
        finite = {name: v for name, v in values.items() if all(map(math.isfinite, v))}
        return BaseModel(_name_of(model), finite)

    def check(self, model: nn.Module, gather: Gather, refuse: bool) -> None:
        """Checks that a model has this base. Otherwise raises or warns.

        Parameters that the model lacks, or has in a quantized format, are skipped.

        Args:
            model: An adapted model.
            gather: Returns the full tensor of one that may be sharded.
            refuse: Whether to raise instead of warning.

        Raises:
            ValueError: If the base is another one and refuse is set.
        """
        parameters = _comparable(model)
        # In the file's order, because all processes must gather their shards in the same order.
        shared = [name for name in self.values if name in parameters]
        for name in shared:
            actual = _sample(gather(parameters[name]))
            expected = self.values[name]
            if not _agree(actual, expected):
                message = (
                    f"base: expected the model that the adapter was trained on "
                    f"({self.name or 'its name is not known'}), got "
                    f"{_name_of(model) or type(model).__name__}, in which {name} has "
                    f"{_short(actual)} in place of {_short(expected)}. Load the adapter into its "
                    f"base model."
                )
                refuse_or_warn(message, refuse, stacklevel=6)
                return


def parameters_in_file(model: nn.Module) -> set[nn.Parameter]:
    """Returns the parameters of an adapted model that an adapter's file has."""
    parameters: set[nn.Parameter] = set()
    for layer in layers_in(model).values():
        parameters.update(layer.adapter_parameters())
    for module in saved_in(model).values():
        parameters.update(module.parameters())
    return parameters


def refuse_or_warn(message: str, refuse: bool, *, stacklevel: int) -> None:
    """Raises a ValueError with the message, or warns.

    Args:
        message: What is wrong, and what to do.
        refuse: Whether to raise.
        stacklevel: As for warnings.warn: the number of calls from here up to the user's code.
            torch.no_grad, which decorates `load_state`, counts as one.
    """
    if refuse:
        raise ValueError(message)
    warnings.warn(f"lotr_ext: {message}", stacklevel=stacklevel)


def _name_of(model: nn.Module) -> str | None:
    """Returns where a transformers model was loaded from."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    return name if isinstance(name, str) and name else None


def _sample(tensor: Tensor) -> list[float]:
    """Returns values at fixed positions of a full tensor."""
    positions = sorted({(tensor.numel() - 1) * i // (VALUES - 1) for i in range(VALUES)})
    return tensor.detach().reshape(-1)[positions].double().tolist()


def _agree(actual: Sequence[float], expected: Sequence[float]) -> bool:
    """Whether two samples differ by no more than the rounding to bfloat16 or float16."""
    # abs_tol is for float16, which is coarser than bfloat16 for values below about 1e-5.
    return len(actual) == len(expected) and all(
        math.isclose(value, other, rel_tol=2.0**-7, abs_tol=1e-6)
        for value, other in zip(actual, expected)
    )


def _short(numbers: Sequence[float]) -> str:
    return ", ".join(f"{number:.4g}" for number in numbers)


def _comparable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the parameters that still have the base model's values, in a plain format."""
    changed: set[nn.Parameter] = set()
    for layer in layers_in(model).values():
        # A merge and init "svd" change the weight. The experts' weight belongs to their host.
        if layer.merged or layer.start_core is not None:
            changed.update(layer.parameters())
            changed.update(getattr(layer, "host", layer).parameters())
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter not in changed and _has_plain_values(parameter)
    }


def _has_plain_values(parameter: Tensor) -> bool:
    """Whether the elements of a parameter can be read, and are not the codes of a quantizer."""
    # The elements of a subclass, of torchao for example, may depend on its format.
    is_plain = type(parameter) is nn.Parameter or is_sharded(parameter)
    # A float8 weight is multiplied by a scale, which is another tensor.
    is_float = parameter.is_floating_point() and parameter.dtype.itemsize >= 2
    return is_plain and is_float and not parameter.is_meta and math.prod(full_shape(parameter)) > 0
