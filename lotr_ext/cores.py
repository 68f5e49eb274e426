"""Cores that are computed from fewer parameters, which layers share.

    class           core of layer l, kind k      parameters (L layers, K kinds,   relatives
                    (place p)                    P places)
    DiagonalCores   diag(d[p])                   P r                              d of VeRA
    CPCores         diag(a[l] * b[k])            (L + K) r                        LoRTA, CaRA
    TuckerCores     sum_j W[p, j] C[j]           P r + r^3                        FacT-TK
    TrainCores      G2[l] G3[k]                  (L + K) r^2                      MetaTT-4D
    FewCores        sum_j v[p, j] R[j], with     P c, or c if tied                TinyLoRA
                    c fixed random R

Many published relatives of LoTR are LoTR with one of these forms (docs/relatives.md). A place
identifies the core of a layer: (layer, kind), or any name for the forms that use neither. All forms
start at G = 0, so the model starts unchanged, and with a nonzero gradient.

Not here: how a layer uses a form (`LoTRLayer.use_core`).
"""

import math
from collections.abc import Callable, Hashable, Iterator, Sequence

import torch
from torch import Tensor, nn

from .checks import check_dimension, check_rank
from .factors import set_unregistered


class CoreAt(nn.Module):
    """The core [r_in, r_out] of one place.

    Args:
        cores: The cores of all places.
        index: The index of the place.
        owned: Whether this module registers `cores`. False if another module does, such as the
            model of `apply_lotr`.
    """

    def __init__(self, cores: "Cores", index: int, owned: bool = True):
        super().__init__()
        self.index = index
        # If every layer registered `cores`, state_dict would have them once per layer.
        if owned:
            self.cores = cores
        else:
            set_unregistered(self, "cores", cores)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Yields the parameters of all places, whether they are registered here or not."""
        return self.cores.parameters(recurse)

    def forward(self) -> Tensor:
        return self.cores(self.index)


class Cores(nn.Module):
    """Base class: the cores of all places.

    A subclass defines `make`, and parameters that start with values for which G = 0.

    Args:
        places: One per core, each once.
        rank: The rank of the factors: r, or (r_in, r_out).

    Raises:
        TypeError, ValueError: If an argument has the wrong type or value.
    """

    def __init__(self, places: Sequence[Hashable], rank: int | tuple[int, int]):
        super().__init__()
        self.r_in, self.r_out = check_rank(rank)
        self.places = list(places)
        # A place that occurs twice would give one core to two layers.
        if not self.places or len(set(self.places)) != len(self.places):
            raise ValueError(f"places: expected at least one, each once, got {self.places!r:.200}")

    def make(self, index: int) -> Tensor:
        """Returns G [r_in, r_out] of the place with that index."""
        raise TypeError(f"{type(self).__name__} must define make")

    def forward(self, index: int) -> Tensor:
        """Returns make(index). Sharded training gathers the parameters around this call."""
        return self.make(index)

    def at(self, place: Hashable, owned: bool = True) -> CoreAt:
        """Returns the module that computes the core of one place, for `LoTRLayer.use_core`.

        Args:
            place: One of the places.
            owned: See `CoreAt`.

        Raises:
            ValueError: If the place is unknown.
        """
        if place not in self.places:
            raise ValueError(f"place: expected one of {self.places!r:.200}, got {place!r}")
        return CoreAt(self, self.places.index(place), owned)

    def begin_as_identity(self) -> None:
        """Sets G = I, for core_init="identity".

        Raises:
            ValueError: If the form cannot represent it.
        """
        raise ValueError(f'core_init: expected "zero" with {type(self).__name__}, got "identity"')

    def extra_repr(self) -> str:
        return f"places={len(self.places)}, rank={(self.r_in, self.r_out)}"

    def _single_rank(self) -> int:
        if self.r_in != self.r_out:
            raise ValueError(
                f"rank: expected one rank for {type(self).__name__}, got {(self.r_in, self.r_out)}"
            )
        return self.r_in


class LayersAndKinds(Cores):
    """Base class of forms over a grid: each layer and each kind has a parameter.

    Places are pairs (layer, kind). The grid has all pairs of their layers and kinds, row by row, so
    that layer and kind of a place are divmod(index, number of kinds).
    """

    def __init__(self, places: Sequence[tuple[Hashable, Hashable]], rank: int | tuple[int, int]):
        super().__init__(places, rank)
        # In order of appearance. A file has one row for each of them, in this order.
        self.layers = list(dict.fromkeys(layer for layer, _ in self.places))
        self.kinds = list(dict.fromkeys(kind for _, kind in self.places))
        self.places = [(layer, kind) for layer in self.layers for kind in self.kinds]


class DiagonalCores(Cores):
    """G_p = diag(d[p]): r parameters per layer. State: `diagonal` [places, r]."""

    def __init__(self, places: Sequence[Hashable], rank: int):
        super().__init__(places, rank)
        self.diagonal = nn.Parameter(torch.zeros(len(self.places), self._single_rank()))

    def make(self, index: int) -> Tensor:
        return torch.diag_embed(self.diagonal[index])

    @torch.no_grad()
    def begin_as_identity(self) -> None:
        self.diagonal.fill_(1.0)


class CPCores(LayersAndKinds):
    """G_lk = diag(a[l] * b[k]): the canonical polyadic form, with A and B as the other two modes.

    LoRTA (arXiv 2410.04060) and CaRA, without their modes for attention heads. State: `layer`
    [layers, r], `kind` [kinds, r].
    """

    def __init__(self, places: Sequence[tuple[Hashable, Hashable]], rank: int):
        super().__init__(places, rank)
        r = self._single_rank()
        # Zeros times ones: G = 0, and `layer` has a gradient. With two zeros, neither would.
        self.layer = nn.Parameter(torch.zeros(len(self.layers), r))
        self.kind = nn.Parameter(torch.ones(len(self.kinds), r))

    def make(self, index: int) -> Tensor:
        layer, kind = divmod(index, len(self.kinds))
        return torch.diag_embed(self.layer[layer] * self.kind[kind])

    @torch.no_grad()
    def begin_as_identity(self) -> None:
        self.layer.fill_(1.0)


class TuckerCores(Cores):
    """G_p = sum_j W[p, j] C[j]: Tucker-3, with A and B as the other two modes.

    FacT-TK (arXiv 2212.03145). State: `weights` [places, slices], `slices` [slices, r_in, r_out].

    Args:
        places: See `Cores`, also for rank.
        slices: How many C[j], r_in if None.
    """

    def __init__(
        self, places: Sequence[Hashable], rank: int | tuple[int, int], slices: int | None = None
    ):
        super().__init__(places, rank)
        count = self.r_in if slices is None else check_dimension("slices", slices)
        # Random weights give each of the slices, which start at zero, a different gradient.
        self.weights = nn.Parameter(torch.randn(len(self.places), count) / math.sqrt(count))
        self.slices = nn.Parameter(torch.zeros(count, self.r_in, self.r_out))

    def make(self, index: int) -> Tensor:
        return (self.weights[index] @ self.slices.flatten(1)).unflatten(-1, (self.r_in, self.r_out))

    @torch.no_grad()
    def begin_as_identity(self) -> None:
        # The other weights stay: their slices are zero.
        self.weights[:, 0] = 1.0
        self.slices[0].diagonal().fill_(1.0)


class TrainCores(LayersAndKinds):
    """G_lk = G2[l] G3[k]: the tensor train, with A and B as its ends (MetaTT-4D, arXiv 2506.09105).

    State: `layer` [layers, r_in, inner], `kind` [kinds, inner, r_out].

    Args:
        places: See `LayersAndKinds`, also for rank.
        inner: The rank between G2 and G3, r_out if None. If it is below r_in and r_out,
            core_init="identity" sets only the first `inner` elements of the diagonal to 1.
    """

    def __init__(
        self,
        places: Sequence[tuple[Hashable, Hashable]],
        rank: int | tuple[int, int],
        inner: int | None = None,
    ):
        super().__init__(places, rank)
        inner = self.r_out if inner is None else check_dimension("inner", inner)
        # As in `CPCores`, with an identity in place of ones.
        self.layer = nn.Parameter(torch.zeros(len(self.layers), self.r_in, inner))
        self.kind = nn.Parameter(torch.eye(inner, self.r_out).repeat(len(self.kinds), 1, 1))

    def make(self, index: int) -> Tensor:
        layer, kind = divmod(index, len(self.kinds))
        return self.layer[layer] @ self.kind[kind]

    @torch.no_grad()
    def begin_as_identity(self) -> None:
        self.layer.diagonal(dim1=-2, dim2=-1).fill_(1.0)


class FewCores(Cores):
    """G_p = sum_j v[p, j] R[j] with fixed random R: few parameters per layer, or for all layers.

    TinyLoRA (arXiv 2602.04118) has this form over frozen factors from the SVD of each layer. State:
    `numbers` [places or 1, numbers], and the buffer `random` [numbers, r_in, r_out].

    Args:
        places: See `Cores`, also for rank.
        numbers: How many parameters a place has.
        tied: Whether all places share them.
        seed: The seed from which R ~ N(0, 1 / r_in) is drawn.
    """

    def __init__(
        self,
        places: Sequence[Hashable],
        rank: int | tuple[int, int],
        numbers: int = 13,
        tied: bool = False,
        seed: int = 0,
    ):
        super().__init__(places, rank)
        count = check_dimension("numbers", numbers)
        self.numbers = nn.Parameter(torch.zeros(1 if tied else len(self.places), count))
        # On the CPU, so that a seed gives the same R on every device and in every process.
        generator = torch.Generator("cpu").manual_seed(seed)
        random = self.numbers.new_empty(
            count, self.r_in, self.r_out, device="meta" if self.numbers.is_meta else "cpu"
        )
        random.normal_(generator=generator).div_(math.sqrt(self.r_in))
        self.register_buffer("random", random)

    def make(self, index: int) -> Tensor:
        numbers = self.numbers[index % len(self.numbers)]  # one row serves all places if tied
        random = self.random.to(numbers.dtype)  # FSDP2 casts parameters, not buffers
        return (numbers @ random.flatten(1)).unflatten(-1, (self.r_in, self.r_out))


FORMS: dict[str, Callable[..., Cores]] = {
    "diagonal": DiagonalCores,
    "cp": CPCores,
    "tucker": TuckerCores,
    "train": TrainCores,
    "few": FewCores,
}
