"""Cores that are computed from fewer numbers, shared over layers. Most methods related to LoTR differ in this.

    class           G of place p, in layer l and of kind k     parameters (L layers, K kinds, P places)   relatives
    DiagonalCores   diag(d[p])                                 P r                                        VeRA's d
    CPCores         diag(a[l] * b[k])                          (L + K) r                                  LoRTA, CaRA
    TuckerCores     sum_j W[p, j] C[j]                         P r + r^3                                  FacT-TK
    TrainCores      G2[l] G3[k]                                (L + K) r^2                                MetaTT-4D
    FewCores        sum_j v[p, j] R[j], R fixed and random     P u, or u if tied                          TinyLoRA

All of them start at G = 0 with a nonzero gradient, so the model's function starts unchanged. A place identifies a layer's core:
(layer, kind), or any name for the forms that use neither. docs/relatives.md has the sources.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..autograd.bank import open_scope
from ..compat import is_compiling
from .checks import check_dimension, check_rank
from .core import made
from .sharded import StaysWhole

__all__ = ["FORMS", "CPCores", "CoreAt", "Cores", "DiagonalCores", "FewCores", "TrainCores", "TuckerCores"]


class CoreAt(nn.Module):
    """The core [r_in, r_out] of one place. A forward of a model from `apply_lotr` computes those of all places at once.

    They then share one graph: if one forward has several backwards, all but the last need `retain_graph=True`.
    """

    def __init__(self, cores: Cores, index: int):
        super().__init__()
        self.cores, self.index = cores, index

    def leave_cores_to_owner(self) -> None:
        """Keeps a plain reference to the Cores, which another module registers."""
        self.__dict__["cores"] = self._modules.pop("cores")

    def forward(self) -> Tensor:
        shared = None if is_compiling() else self._lotr_shared()
        return self.cores(self.index) if shared is None else shared

    def _lotr_shared(self) -> Tensor | None:
        """The core, if the running forward has computed those of all places at once; None outside a forward, and for random
        cores."""
        scope = open_scope()
        all_cores = None if scope is None else scope.made(self.cores, made)
        return None if all_cores is None else all_cores[self.index]

    def extra_repr(self) -> str:
        return f"index={self.index}"


class Cores(StaysWhole):
    """Base class: the cores of all places. A subclass has its parameters, at G = 0, and defines `make`.

    places: the places of the layers' cores, each once. rank: the factors' rank, r or (r_in, r_out).
    rows: the tensors with a row for each entry of an axis, and the axis: "places", and of a grid "layers" and "kinds".
    """

    rows: tuple[tuple[str, str], ...] = ()

    def __init__(self, places: Sequence[Hashable], rank: int | tuple[int, int]):
        super().__init__()
        self.r_in, self.r_out = check_rank(rank)
        self.places = list(places)
        if not self.places or len(set(self.places)) != len(self.places):
            raise ValueError(f"places: expected at least one, each once, got {self.places!r:.200}")

    def make(self, index: int | None = None) -> Tensor:
        """G [r_in, r_out] of the place with that index; None: [places, r_in, r_out] of all places."""
        raise TypeError(f"{type(self).__name__} must define make")

    def forward(self, index: int | Tensor | None = None) -> Tensor:
        """Returns make(index). Returns a tensor unchanged, because nn.Sequential calls all modules registered in it."""
        return index if isinstance(index, Tensor) else self.make(index)

    def index(self, place: Hashable) -> int:
        """A place's index. Raises ValueError for an unknown place."""
        if place not in self.places:
            raise ValueError(f"place: expected one of {self.places!r:.200}, got {place!r}")
        return self.places.index(place)

    def at(self, place: Hashable) -> CoreAt:
        """The module that returns the core of one place, for a layer's `use_core`. Raises ValueError for an unknown place."""
        return CoreAt(self, self.index(place))

    def in_order_of(self, places: Sequence[Hashable], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state of Cores that were made for `places`, a permutation of this one's, with its rows in this one's order."""
        of, own, found = self._axes(places), self._axes(self.places), dict(state)
        for key, axis in self.rows:
            if key in found and len(found[key]) == len(of[axis]):  # tied numbers have one row
                found[key] = found[key][[of[axis].index(one) for one in own[axis]]]
        return found

    def _axes(self, places: Sequence[Hashable]) -> dict[str, list[Hashable]]:
        """What the rows of tensors are for, in the order of places."""
        return {"places": list(places)}

    def begin_as_identity(self) -> None:
        """Sets G = I, for core_init="identity". Raises ValueError if the form cannot represent it."""
        raise ValueError(f'core_init: expected "zero" with {type(self).__name__}, got "identity"')

    def extra_repr(self) -> str:
        return f"places={len(self.places)}, rank={(self.r_in, self.r_out)}"

    def _one_rank(self) -> int:
        if self.r_in != self.r_out:
            raise ValueError(f"rank: expected one rank for {type(self).__name__}, got {(self.r_in, self.r_out)}")
        return self.r_in


class LayersAndKinds(Cores):
    """Cores of a grid: the layers times the kinds that occur in places, [(layer, kind), ..]."""

    rows = (("layer", "layers"), ("kind", "kinds"))

    def __init__(self, places: Sequence[tuple[Hashable, Hashable]], rank: int | tuple[int, int]):
        super().__init__(places, rank)
        for place in self.places:
            if not (isinstance(place, tuple) and len(place) == 2):
                raise TypeError(f"places: expected pairs (layer, kind), got {place!r}")
        axes = self._axes(self.places)
        self.layers, self.kinds = axes["layers"], axes["kinds"]

    def _axes(self, places: Sequence[tuple[Hashable, Hashable]]) -> dict[str, list[Hashable]]:
        own = {axis: list(dict.fromkeys(place[i] for place in places)) for i, axis in enumerate(("layers", "kinds"))}
        return super()._axes(places) | own

    def index(self, place: Hashable) -> int:
        if not (isinstance(place, tuple) and len(place) == 2):
            raise TypeError(f"place: expected a pair (layer, kind), got {place!r}")
        for what, known, got in (("layer", self.layers, place[0]), ("kind", self.kinds, place[1])):
            if got not in known:
                raise ValueError(f"place: expected a {what} among {known!r:.200}, got {got!r}")
        return self.layers.index(place[0]) * len(self.kinds) + self.kinds.index(place[1])


class DiagonalCores(Cores):
    """G_p = diag(d[p]): r numbers per layer. State: `diagonal` [places, r]."""

    rows = (("diagonal", "places"),)

    def __init__(self, places: Sequence[Hashable], rank: int):
        super().__init__(places, rank)
        self.diagonal = nn.Parameter(torch.zeros(len(self.places), self._one_rank()))

    def make(self, index: int | None = None) -> Tensor:
        return torch.diag_embed(self.diagonal if index is None else self.diagonal[index])

    @torch.no_grad()
    def begin_as_identity(self) -> None:
        self.diagonal.fill_(1.0)


class CPCores(LayersAndKinds):
    """G_lk = diag(a[l] * b[k]), the canonical polyadic form with A and B as its other two modes (LoRTA, arXiv 2410.04060, and
    CaRA, without their modes of heads). State: `layer` [layers, r], `kind` [kinds, r]."""

    def __init__(self, places: Sequence[tuple[Hashable, Hashable]], rank: int):
        super().__init__(places, rank)
        r = self._one_rank()
        self.layer, self.kind = nn.Parameter(torch.zeros(len(self.layers), r)), nn.Parameter(torch.ones(len(self.kinds), r))

    def make(self, index: int | None = None) -> Tensor:
        if index is not None:
            l, k = divmod(index, len(self.kinds))
            return torch.diag_embed(self.layer[l] * self.kind[k])
        return torch.diag_embed((self.layer.unsqueeze(1) * self.kind).flatten(0, 1))

    @torch.no_grad()
    def begin_as_identity(self) -> None:
        self.layer.fill_(1.0)


class TuckerCores(Cores):
    """G_p = sum_j W[p, j] C[j], Tucker-3 with A and B as its other two modes (FacT-TK, arXiv 2212.03145).

    slices: how many C[j], r_in by default. State: `weights` [places, slices], `slices` [slices, r_in, r_out].
    """

    rows = (("weights", "places"),)

    def __init__(self, places: Sequence[Hashable], rank: int | tuple[int, int], slices: int | None = None):
        super().__init__(places, rank)
        n = self.r_in if slices is None else check_dimension("slices", slices)
        self.weights = nn.Parameter(torch.randn(len(self.places), n) / math.sqrt(n))
        self.slices = nn.Parameter(torch.zeros(n, self.r_in, self.r_out))

    def make(self, index: int | None = None) -> Tensor:
        weights = self.weights if index is None else self.weights[index]
        return (weights @ self.slices.flatten(1)).unflatten(-1, (self.r_in, self.r_out))

    @torch.no_grad()
    def begin_as_identity(self) -> None:
        self.weights[:, 0] = 1.0
        self.slices[0].diagonal().fill_(1.0)


class TrainCores(LayersAndKinds):
    """G_lk = G2[l] G3[k], the tensor train with A and B as its ends (MetaTT-4D, arXiv 2506.09105).

    inner: the rank between G2 and G3, r_out by default. State: `layer` [layers, r_in, inner], `kind` [kinds, inner, r_out].
    """

    def __init__(self, places: Sequence[tuple[Hashable, Hashable]], rank: int | tuple[int, int], inner: int | None = None):
        super().__init__(places, rank)
        r = self.r_out if inner is None else check_dimension("inner", inner)
        self.layer = nn.Parameter(torch.zeros(len(self.layers), self.r_in, r))
        self.kind = nn.Parameter(torch.eye(r, self.r_out).repeat(len(self.kinds), 1, 1))

    def make(self, index: int | None = None) -> Tensor:
        if index is not None:
            l, k = divmod(index, len(self.kinds))
            return self.layer[l] @ self.kind[k]
        # one product per kind: a product over both axes would save copies, which a change of the parameters does not reach
        return torch.stack([self.layer @ kind for kind in self.kind], 1).flatten(0, 1)

    @torch.no_grad()
    def begin_as_identity(self) -> None:
        self.layer.diagonal(dim1=-2, dim2=-1).fill_(1.0)


class FewCores(Cores):
    """G_p = sum_j v[p, j] R[j] with R fixed and random: few numbers per layer or in all
    (TinyLoRA, arXiv 2602.04118, with frozen factors from each layer's own SVD).

    numbers: how many per place; tied: whether all places share them. seed: of R ~ N(0, 1 / r). State: `numbers` [places or 1,
    numbers], and the buffer `random` [numbers, r_in, r_out].
    """

    rows = (("numbers", "places"),)
    random: Tensor

    def __init__(
        self,
        places: Sequence[Hashable],
        rank: int | tuple[int, int],
        numbers: int = 13,
        tied: bool = False,
        seed: int = 0,
    ):
        super().__init__(places, rank)
        n, generator = check_dimension("numbers", numbers), torch.Generator("cpu").manual_seed(seed)
        self.numbers = nn.Parameter(torch.zeros(1 if tied else len(self.places), n))
        values = self.numbers.new_empty(n, self.r_in, self.r_out, device="meta" if self.numbers.is_meta else "cpu")
        self.register_buffer("random", values.normal_(generator=generator).div_(math.sqrt(self.r_in)))

    def make(self, index: int | None = None) -> Tensor:
        v = self.numbers.expand(len(self.places), -1)
        return ((v if index is None else v[index]) @ self.random.flatten(1)).unflatten(-1, (self.r_in, self.r_out))


FORMS: dict[str, Callable[..., Cores]] = {
    "diagonal": DiagonalCores,
    "cp": CPCores,
    "tucker": TuckerCores,
    "train": TrainCores,
    "few": FewCores,
}
