"""The adapters of a model that are not active: `model.lotr_parked`, by name."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..layers.core import made
from ..layers.cores import Cores
from ..layers.factors import LoTRFactors
from ..layers.sharded import holds_parts, in_parts, is_tensor_parallel
from .adapted import adapted_layers
from .config import LoTRConfig
from .saved import adapter_slots
from .shared_factors import Owner, SharedFactors, counterpart

__all__ = ["DEFAULT", "ParkedAdapter", "ParkedAdapters", "find_name", "parked_adapter", "parked_layers", "parked_of"]

DEFAULT = "default"  # the name of the adapter that apply_lotr made


class ParkedAdapter(nn.Module):
    """An adapter that is not active.

    held, magnitudes, settings: for each layer, in the model's order, the core or the module that makes it, the magnitudes (or
    None), and (scaling, dropout). made: the Cores that make the cores of all layers, None for dense ones. saved: the tensors of
    its modules_to_save.
    """

    def __init__(
        self,
        config: LoTRConfig,
        factors: dict[str, Owner],
        held: Sequence[nn.Parameter | nn.Module],
        magnitudes: Sequence[nn.Parameter] | None,
        made: Cores | None,
        settings: Sequence[tuple[float, float]],
        saved: Sequence[Tensor],
    ):
        super().__init__()
        self.config, self.settings = config, list(settings)
        self.__dict__["factors"] = factors  # `_register_once` registers them, here or in an adapter that shares them
        self.cores = nn.ParameterList(one for one in held if isinstance(one, nn.Parameter))
        self.forms = nn.ModuleList(one for one in held if not isinstance(one, nn.Parameter))
        self.magnitudes = None if magnitudes is None else nn.ParameterList(magnitudes)
        self.dense, self.made = [isinstance(one, nn.Parameter) for one in held], made
        self.saved = nn.ParameterList(nn.Parameter(t.detach(), requires_grad=False) for t in saved)
        self.requires_grad_(False)

    @property
    def held(self) -> list[nn.Parameter | nn.Module]:
        cores, forms = iter(self.cores), iter(self.forms)
        return [next(cores if dense else forms) for dense in self.dense]

    @property
    def values(self) -> list[Tensor]:
        """The cores [r_in, r_out] by layer."""
        return [one if isinstance(one, nn.Parameter) else made(one) for one in self.held]


class ParkedAdapters(nn.ModuleDict):
    """The parked adapters by name. Its forward returns the input, since nn.Sequential calls all its children."""

    active = DEFAULT

    def forward(self, x: Tensor) -> Tensor:
        return x


def parked_of(model: nn.Module, name: str, *, in_parts_too: bool = False) -> ParkedAdapters:
    """The model's parked adapters. name: the caller, for messages. in_parts_too: allows a model whose experts' cores are in
    parts."""
    adapted_layers(model)
    if not isinstance(getattr(model, "lotr_factors", None), SharedFactors):
        if any(isinstance(getattr(module, "lotr_factors", None), SharedFactors) for module in model.modules()):
            got = f"{type(model).__name__} around one; pass the model inside"
        else:
            got = "one whose layers were built by hand"
        raise RuntimeError(f"{name}: expected a model from apply_lotr, got {got}")
    if holds_parts(model):
        whole = in_parts_too or not any(in_parts(slot.tensor) for slot in adapter_slots(model))
        if not (whole and is_tensor_parallel(model)):
            raise RuntimeError(f"{name}: expected whole tensors, got a model held in parts; shard it with one adapter")
    parked = getattr(model, "lotr_parked", None)
    return parked if isinstance(parked, ParkedAdapters) else ParkedAdapters()


def find_name(parked: ParkedAdapters, name: object, argument: str) -> str:
    """Returns name if there is an adapter of that name, else raises. argument: for messages."""
    if not isinstance(name, str):
        raise TypeError(f"{argument}: expected the name of an adapter, got {type(name).__name__} {name!r}")
    if name != parked.active and name not in parked:
        raise ValueError(f"{argument}: expected one of {', '.join([parked.active, *parked])}, got {name!r}")
    return name


def parked_adapter(model: nn.Module, name: str) -> ParkedAdapter:
    """The parked adapter of that name. Raises as `set_adapter`."""
    parked = parked_of(model, "name")
    return parked[find_name(parked, name, "name")]


def parked_layers(model: nn.Module, parked: ParkedAdapter) -> list[tuple[LoTRFactors, Tensor, Tensor | None, float, float]]:
    """(factors, core, magnitude, scaling, dropout) of a parked adapter for each layer, in the model's order."""
    layers = adapted_layers(model).values()
    magnitudes = parked.magnitudes or [None] * len(layers)
    return [
        (counterpart(layer.factors, model.lotr_factors, parked.factors), core, magnitude, *settings)
        for layer, core, magnitude, settings in zip(layers, parked.values, magnitudes, parked.settings, strict=True)
    ]
