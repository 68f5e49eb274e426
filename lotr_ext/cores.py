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
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor, nn

from .functional import check_dimension, check_rank

__all__ = [
    "FORMS",
    "CPCores",
    "CoreAt",
    "Cores",
    "DiagonalCores",
    "FewCores",
    "TrainCores",
    "TuckerCores",
]


class CoreAt(nn.Module):
    """The core [r_in, r_out] of one place. owned: whether this module registers `cores`, rather than the model that shares
    them."""

    def __init__(self, cores: Cores, index: int, owned: bool = True):
        super().__init__()
        self.index = index
        if owned:
            self.cores = cores
        else:
            self.__dict__["cores"] = cores

    def parameters(self, recurse: bool = True):
        return self.cores.parameters(recurse)

    def forward(self) -> Tensor:
        return self.cores(self.index)


class Cores(nn.Module):
    """Base class: the cores of all places. A subclass has its parameters, at G = 0, and defines `make`.

    places: the places of the layers' cores, each once. rank: the factors' rank, r or (r_in, r_out).
    """

    def __init__(self, places: Sequence[Hashable], rank: int | tuple[int, int]):
        super().__init__()
        self.r_in, self.r_out = check_rank(rank)
        self.places = list(places)
        if not self.places or len(set(self.places)) != len(self.places):
            raise ValueError(f"places: expected at least one, each once, got {self.places!r:.200}")

    def make(self, index: int) -> Tensor:
        """G [r_in, r_out] of the place with that index."""
        raise TypeError(f"{type(self).__name__} must define make")

    def forward(self, index: int | Tensor) -> Tensor:
        """make(index). Returns a tensor unchanged, because nn.Sequential calls all modules registered in it."""
        return index if isinstance(index, Tensor) else self.make(index)

    def index(self, place: Hashable) -> int:
        """A place's index. Raises ValueError for an unknown place."""
        if place not in self.places:
            raise ValueError(f"place: expected one of {self.places!r:.200}, got {place!r}")
        return self.places.index(place)

    def at(self, place: Hashable, owned: bool = True) -> CoreAt:
        """The module that returns the core of one place, for a layer's `use_core`. Raises ValueError for an unknown place.

        owned: whether it registers these cores; False where another module does, as `apply_lotr`'s model.
        """
        return CoreAt(self, self.index(place), owned)

    def begin_as_identity(self) -> None:
        """Sets G = I, for core_init="identity". Raises ValueError if the form cannot represent it."""
        raise ValueError(f'core_init: expected "zero" with {type(self).__name__}, got "identity"')

    def extra_repr(self) -> str:
        return f"places={len(self.places)}, rank={(self.r_in, self.r_out)}"

    def _one_rank(self) -> int:
        if self.r_in != self.r_out:
            raise ValueError(
                f"rank: expected one rank for {type(self).__name__}, got {(self.r_in, self.r_out)}"
            )
        return self.r_in


class LayersAndKinds(Cores):
    """Cores of a grid: the layers times the kinds that occur in places, [(layer, kind), ..]."""

    def __init__(self, places: Sequence[tuple[Hashable, Hashable]], rank: int | tuple[int, int]):
        super().__init__(places, rank)
        for place in self.places:
            if not (isinstance(place, tuple) and len(place) == 2):
                raise TypeError(f"places: expected pairs (layer, kind), got {place!r}")
        self.layers, self.kinds = (
            list(dict.fromkeys(place[axis] for place in self.places)) for axis in (0, 1)
        )
        self.places = [(layer, kind) for layer in self.layers for kind in self.kinds]


class DiagonalCores(Cores):
    """G_p = diag(d[p]): r numbers per layer. State: `diagonal` [places, r]."""

    def __init__(self, places: Sequence[Hashable], rank: int):
        super().__init__(places, rank)
        self.diagonal = nn.Parameter(torch.zeros(len(self.places), self._one_rank()))

    def make(self, index: int) -> Tensor:
        return torch.diag_embed(self.diagonal[index])

    @torch.no_grad()
    def begin_as_identity(self) -> None:
        self.diagonal.fill_(1.0)


class CPCores(LayersAndKinds):
    """G_lk = diag(a[l] * b[k]), the canonical polyadic form with A and B as its other two modes (LoRTA, arXiv 2410.04060, and
    CaRA, without their modes of heads). State: `layer` [layers, r], `kind` [kinds, r]."""

    def __init__(self, places: Sequence[tuple[Hashable, Hashable]], rank: int):
        super().__init__(places, rank)
        r = self._one_rank()
        self.layer, self.kind = (
            nn.Parameter(torch.zeros(len(self.layers), r)),
            nn.Parameter(torch.ones(len(self.kinds), r)),
        )

    def make(self, index: int) -> Tensor:
        l, k = divmod(index, len(self.kinds))
        return torch.diag_embed(self.layer[l] * self.kind[k])

    @torch.no_grad()
    def begin_as_identity(self) -> None:
        self.layer.fill_(1.0)


class TuckerCores(Cores):
    """G_p = sum_j W[p, j] C[j], Tucker-3 with A and B as its other two modes (FacT-TK, arXiv 2212.03145).

    slices: how many C[j], r_in by default. State: `weights` [places, slices], `slices` [slices, r_in, r_out].
    """

    def __init__(
        self, places: Sequence[Hashable], rank: int | tuple[int, int], slices: int | None = None
    ):
        super().__init__(places, rank)
        n = self.r_in if slices is None else check_dimension("slices", slices)
        self.weights = nn.Parameter(torch.randn(len(self.places), n) / math.sqrt(n))
        self.slices = nn.Parameter(torch.zeros(n, self.r_in, self.r_out))

    def make(self, index: int) -> Tensor:
        return (self.weights[index] @ self.slices.flatten(1)).unflatten(-1, (self.r_in, self.r_out))

    @torch.no_grad()
    def begin_as_identity(self) -> None:
        self.weights[:, 0] = 1.0
        self.slices[0].diagonal().fill_(1.0)


class TrainCores(LayersAndKinds):
    """G_lk = G2[l] G3[k], the tensor train with A and B as its ends (MetaTT-4D, arXiv 2506.09105).

    inner: the rank between G2 and G3, r_out by default. State: `layer` [layers, r_in, inner], `kind` [kinds, inner, r_out].
    """

    def __init__(
        self,
        places: Sequence[tuple[Hashable, Hashable]],
        rank: int | tuple[int, int],
        inner: int | None = None,
    ):
        super().__init__(places, rank)
        r = self.r_out if inner is None else check_dimension("inner", inner)
        self.layer = nn.Parameter(torch.zeros(len(self.layers), self.r_in, r))
        self.kind = nn.Parameter(torch.eye(r, self.r_out).repeat(len(self.kinds), 1, 1))

    def make(self, index: int) -> Tensor:
        l, k = divmod(index, len(self.kinds))
        return self.layer[l] @ self.kind[k]

    @torch.no_grad()
    def begin_as_identity(self) -> None:
        self.layer.diagonal(dim1=-2, dim2=-1).fill_(1.0)


class FewCores(Cores):
    """G_p = sum_j v[p, j] R[j] with R fixed and random: few numbers per layer or in all
    (TinyLoRA, arXiv 2602.04118, with frozen factors from each layer's own SVD).

    numbers: how many per place; tied: whether all places share them. seed: of R ~ N(0, 1 / r). State: `numbers` [places or 1,
    numbers], and the buffer `random` [numbers, r_in, r_out].
    """

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
        values = self.numbers.new_empty(
            n, self.r_in, self.r_out, device="meta" if self.numbers.is_meta else "cpu"
        )
        self.register_buffer(
            "random", values.normal_(generator=generator).div_(math.sqrt(self.r_in))
        )

    def make(self, index: int) -> Tensor:
        numbers = self.numbers[index if len(self.numbers) > 1 else 0]
        random = self.random.to(numbers.dtype)  # FSDP2 casts parameters, not buffers
        return (numbers @ random.flatten(1)).unflatten(-1, (self.r_in, self.r_out))


FORMS: dict[str, Callable[..., Cores]] = {
    "diagonal": DiagonalCores,
    "cp": CPCores,
    "tucker": TuckerCores,
    "train": TrainCores,
    "few": FewCores,
}
