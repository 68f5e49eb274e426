"""Rows of BAD (test_bad_input.py) for experts and for computed cores."""

from collections.abc import Callable

import torch
from torch import nn

from lotr_ext import LoTRExperts, LoTRFactors, LoTRLinear, lotr_grouped_linear
from lotr_ext.cores import FORMS

Row = tuple[str, str, Callable[[], object]]
E = 5  # experts
M = 30  # tokens
K = 16
N = 20
R = (3, 4)
OFFS = torch.tensor([7, 7, 21, 40, 44], dtype=torch.int32)
PLACES = [("0", "q"), ("0", "v"), ("1", "q")]


def _grouped(**changed: object) -> Callable[[], object]:
    """Returns a call of lotr_grouped_linear with some arguments replaced."""
    good = {
        "x": torch.zeros(M, K),
        "weight": torch.zeros(E, N, K),
        "offs": OFFS,
        "A": torch.zeros(K, R[0]),
        "B": torch.zeros(N, R[1]),
        "cores": torch.zeros(E, *R),
        "scaling": 0.7,
        "tokens": torch.zeros(50, dtype=torch.int64),
    }
    return lambda: lotr_grouped_linear(**{**good, **changed})


def _tasks(core_index: torch.Tensor) -> Callable[[], object]:
    return _grouped(cores=torch.zeros(2, E, *R), core_index=core_index)


def _module(**settings: object) -> Callable[[], object]:
    return lambda: LoTRExperts(
        **{"num_experts": E, "in_features": K, "out_features": N, **settings}
    )


def _call(offs: torch.Tensor, *tokens: torch.Tensor) -> Callable[[], object]:
    return lambda: LoTRExperts(E, K, N, R)(torch.zeros(M, K), offs, *tokens)


def _use(core: nn.Module) -> Callable[[], object]:
    return lambda: LoTRLinear(K, K, 4).use_core(core)


BAD_EXPERTS: list[Row] = [
    ("experts 0", "num_experts", _module(num_experts=0)),
    ("experts a float", "num_experts", _module(num_experts=2.0)),
    ("experts, other factors", "factors", _module(factors=LoTRFactors(N, K, 2))),
    ("experts, dropout 1", "dropout", _module(dropout=1.0)),
    ("experts, too few tokens", "tokens", _call(torch.zeros(E).int(), torch.tensor([M]))),
    ("experts, too many offs", "offs", _call(torch.zeros(E + 1).int())),
    ("grouped x too wide", "x", _grouped(x=torch.zeros(M, K + 1))),
    ("grouped offs int64", "offs", _grouped(offs=OFFS.long())),
    ("grouped offs too short", "offs", _grouped(offs=OFFS[:-1])),
    ("grouped offs descending", "offs", _grouped(offs=OFFS.flip(0))),
    ("grouped bias in float64", "bias", _grouped(bias=torch.zeros(E, N).double())),
    ("grouped tokens int32", "tokens", _grouped(tokens=torch.zeros(50, dtype=torch.int32))),
    ("grouped tokens too large", "tokens", _grouped(tokens=torch.full((50,), M))),
    ("grouped tokens -1", "tokens", _grouped(tokens=torch.full((50,), -1))),
    ("grouped weight a matrix", "weight", _grouped(weight=torch.zeros(E, N))),
    ("grouped bias too wide", "bias", _grouped(bias=torch.zeros(E, N + 1))),
    ("grouped A too long", "A", _grouped(A=torch.zeros(K + 1, R[0]))),
    ("grouped cores of another expert", "cores", _grouped(cores=torch.zeros(E + 1, *R))),
    ("grouped core_index of floats", "core_index", _tasks(torch.zeros(M))),
    ("grouped core_index too long", "core_index", _tasks(torch.zeros(M + 1, dtype=torch.int64))),
    ("grouped scaling NaN", "scaling", _grouped(scaling=float("nan"))),
]
BAD_CORES: list[Row] = [
    ("diagonal of two ranks", "rank", lambda: FORMS["diagonal"](PLACES, (3, 4))),
    ("cores of no places", "places", lambda: FORMS["diagonal"]([], 4)),
    ("cores of a place twice", "places", lambda: FORMS["diagonal"]([("0", "q")] * 2, 4)),
    ("no slices", "slices", lambda: FORMS["tucker"](PLACES, 4, slices=0)),
    ("few as identity", "core_init", lambda: FORMS["few"](PLACES, 4).begin_as_identity()),
    ("a core of another rank", "core", _use(FORMS["diagonal"](PLACES, 5).at(PLACES[0]))),
    ("a core in float64", "core", _use(FORMS["diagonal"](PLACES, 4).double().at(PLACES[0]))),
]
