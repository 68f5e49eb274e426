"""BAD: argument x bad value, in every entry point that has the argument.

A row is (id, the argument that the message names, a call that must be refused before anything
changes). The files bad_*.py have more rows. The arguments of operators need no rows: a walk over
the schemas makes their tests.
"""

import importlib
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from helpers import DTYPES, OPERATORS, SCHEMAS, arguments, operator, refused
from models import unchanged
from torch import Tensor, nn

from lotr_ext import (
    LoTRConv1D,
    LoTRFactor,
    LoTRFactors,
    LoTRLinear,
    LoTRWrapped,
    adapt,
    lotr_linear,
)
from lotr_ext.init import fill_core_, fill_factor_

Row = tuple[str, str, Callable[[], object]]
NAN = math.nan
HUGE = 10**400


def call(**changed: object) -> Callable[[], object]:
    """Returns a call of lotr_linear with some arguments replaced."""
    good = {
        "x": torch.randn(5, 6),
        "weight": torch.randn(4, 6),
        "bias": torch.randn(4),
        "A": torch.randn(6, 2),
        "B": torch.randn(4, 2),
        "core": torch.randn(2, 2),
        "scaling": 1.0,
    }
    return lambda: lotr_linear(**{**good, **changed})


def rows_call(index: object) -> Callable[[], object]:
    return call(core=torch.randn(3, 2, 2), core_index=index)


def layer(**settings: object) -> Callable[[], object]:
    return lambda: LoTRLinear(6, 4, **{"rank": 2, **settings})


def call_layer(x: object, **settings: object) -> Callable[[], object]:
    """Returns a call of a float32 layer."""
    return lambda: LoTRLinear(6, 4, 2, **settings)(x)


def factors(*args: object, **settings: object) -> Callable[[], object]:
    return lambda: LoTRFactors(*args, **settings)


def under_autocast(action: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return action()

    return run


def wrong_form(form: object) -> Callable[[], object]:
    return lambda: LoTRLinear(6, 4, 2).use_core(form)


class Returns(nn.Module):
    def __init__(self, value: object):
        super().__init__()
        self.value = value

    def forward(self) -> object:
        return self.value


PAIR = LoTRFactors(6, 4, 2)
META = LoTRFactors(6, 4, 2, device="meta")
CORE: list[Row] = [
    ("rank 0", "rank", layer(rank=0)),
    ("rank negative", "rank", factors(6, 4, -1)),
    ("rank a float", "rank", factors(6, 4, 4.0)),
    ("rank a bool", "rank", factors(6, 4, True)),
    ("rank of three", "rank", factors(6, 4, (1, 2, 3))),
    ("rank of one", "rank", factors(6, 4, (3,))),
    ("rank a string", "rank", factors(6, 4, "4")),
    ("rank huge", "rank", factors(6, 4, HUGE)),
    ("rank of one factor", "rank", lambda: LoTRFactor(6, 0)),
    ("rank unlike that of factors", "rank", layer(rank=3, factors=PAIR)),
    ("in_features 0", "in_features", factors(0, 4, 2)),
    ("out_features a float", "out_features", factors(6, 4.5, 2)),
    ("features a bool", "features", lambda: LoTRFactor(True, 2)),
    ("factors of another shape", "factors", layer(rank=None, factors=LoTRFactors(4, 6, 2))),
    (
        "factors of another shape, from_linear",
        "factors",
        lambda: LoTRLinear.from_linear(nn.Linear(6, 4), LoTRFactors(6, 5, 2)),
    ),
    ("factors a string", "factors", layer(rank=None, factors="A")),
    (
        "factors another module",
        "factors",
        lambda: LoTRLinear.from_linear(nn.Linear(6, 4), nn.Linear(6, 2)),
    ),
    ("factors on meta", "factors", lambda: LoTRLinear.from_linear(nn.Linear(6, 4), META)),
    ("factors on meta, new layer", "factors", layer(rank=None, factors=META)),
    ("factors on meta, wrapped", "factors", lambda: LoTRWrapped.from_linear(nn.Linear(6, 4), META)),
    ("a pair of a module", "A", lambda: LoTRFactors.of(nn.Linear(6, 2), PAIR.B)),
    ("a pair of one factor", "B", lambda: LoTRFactors.of(PAIR.A, PAIR.A)),
    (
        "a pair of two dtypes",
        "B",
        lambda: LoTRFactors.of(PAIR.A, LoTRFactor(4, 2, dtype=torch.float64)),
    ),
    (
        "linear a conv",
        "linear",
        lambda: LoTRLinear.from_linear(nn.Conv2d(1, 1, 1), LoTRFactors(1, 1, 1)),
    ),
    ("linear adapted", "linear", lambda: LoTRLinear.from_linear(LoTRLinear(6, 4, 2), PAIR)),
    (
        "linear adapted, wrapped",
        "linear",
        lambda: LoTRWrapped.from_linear(LoTRLinear(6, 4, 2), PAIR),
    ),
    (
        "linear with an adapted one inside",
        "linear",
        lambda: LoTRWrapped.from_linear(Nested(), PAIR),
    ),
    ("linear a pair", "linear", lambda: adapt(PAIR, PAIR)),
    ("linear a norm", "linear", lambda: adapt(nn.LayerNorm(4), LoTRFactors(4, 4, 2))),
    ("linear a string", "module", lambda: adapt("linear", PAIR)),
    (
        "linear as Conv1D",
        "linear",
        lambda: LoTRConv1D.from_linear(nn.Linear(6, 6), LoTRFactors(6, 6, 2)),
    ),
    ("linear without sizes", "linear", lambda: LoTRWrapped.from_linear(nn.ReLU(), PAIR)),
    ("dtype integer", "dtype", factors(6, 4, 2, dtype=torch.int32)),
    ("dtype a string", "dtype", factors(6, 4, 2, dtype="float32")),
    ("dtype integer, layer", "dtype", layer(dtype=torch.int64)),
    ("dtype complex", "dtype", layer(dtype=torch.complex64)),
    ("dtype float8", "dtype", layer(dtype=torch.float8_e4m3fn)),
    ("scaling NaN", "scaling", layer(scaling=NAN)),
    ("scaling infinite", "scaling", layer(scaling=math.inf)),
    ("scaling with alpha", "scaling", layer(scaling=2, alpha=8)),
    ("scaling with rslora", "scaling", layer(scaling=2, rslora=True)),
    ("scaling a string", "scaling", layer(scaling="1")),
    ("scaling a bool", "scaling", layer(scaling=True)),
    ("alpha infinite", "alpha", layer(alpha=math.inf)),
    ("alpha NaN", "alpha", layer(alpha=NAN)),
    ("alpha a string", "alpha", layer(alpha="8")),
    ("rslora a number", "rslora", layer(rslora=1)),
    ("dropout 1", "dropout", layer(dropout=1.0)),
    ("dropout negative", "dropout", layer(dropout=-0.1)),
    ("dropout NaN", "dropout", layer(dropout=NAN)),
    ("dropout None", "dropout", layer(dropout=None)),
    ("init unknown", "init", factors(6, 4, 2, init="ones")),
    ("train unknown", "train", lambda: LoTRLinear(6, 4, 2).set_trained(("A", "G"))),
    ("core of another shape", "core", wrong_form(Returns(torch.zeros(3, 2)))),
    ("core of another dtype", "core", wrong_form(Returns(torch.zeros(2, 2).double()))),
    ("core None", "core", wrong_form(Returns(None))),
    ("fill a vector", "tensor", lambda: fill_factor_(torch.empty(3), "normal")),
    (
        "fill integers",
        "tensor",
        lambda: fill_factor_(torch.empty(3, 2, dtype=torch.int64), "normal"),
    ),
    ("fill a core by an unknown init", "core_init", lambda: fill_core_(torch.empty(3, 2), "ones")),
    # calls
    ("x too narrow", "x", call(x=torch.randn(5, 5))),
    ("x a list", "x", call(x=[1.0] * 6)),
    ("x of integers", "x", call(x=torch.ones(5, 6, dtype=torch.int64))),
    ("x a number", "x", call(x=torch.tensor(1.0))),
    ("x too narrow, layer", "x", call_layer(torch.randn(5, 5))),
    ("x a list, layer", "x", call_layer([1.0] * 6)),
    ("x a number, layer", "x", call_layer(torch.tensor(1.0))),
    ("x of integers, layer", "x", call_layer(torch.ones(5, 6, dtype=torch.int64))),
    ("x of bools, layer", "x", call_layer(torch.ones(5, 6, dtype=torch.bool))),
    ("x in float64, layer", "x", call_layer(torch.ones(5, 6, dtype=torch.float64))),
    ("x in float64, dropout", "x", call_layer(torch.ones(5, 6, dtype=torch.float64), dropout=0.5)),
    (
        "x of integers, autocast",
        "x",
        under_autocast(call_layer(torch.ones(5, 6, dtype=torch.int64))),
    ),
    ("x on meta, layer", "x", call_layer(torch.ones(3, 6, device="meta"))),
    ("x on meta, dropout", "x", call_layer(torch.ones(200, 6, device="meta"), dropout=0.5)),
    ("x with values, layer on meta", "x", call_layer(torch.ones(3, 6), device="meta")),
    ("weight a vector", "weight", call(weight=torch.randn(6))),
    ("weight in float64", "x", call(weight=torch.randn(4, 6).double())),
    ("weight None", "weight", call(weight=None)),
    ("bias of another shape", "bias", call(bias=torch.randn(3))),
    ("bias a list", "bias", call(bias=[0.0] * 4)),
    ("A of another shape", "A", call(A=torch.randn(5, 2))),
    ("A of integers", "A", call(A=torch.ones(6, 2, dtype=torch.int64))),
    ("A on meta", "A", call(A=torch.randn(6, 2, device="meta"))),
    ("A and B on meta", "A", call(A=META.A.value, B=META.B.value)),
    ("B of another shape", "B", call(B=torch.randn(5, 2))),
    ("core of another shape in a call", "core", call(core=torch.randn(3, 2))),
    ("core of tasks without an index", "core", call(core=torch.randn(3, 2, 2))),
    ("one core with an index", "core", call(core_index=torch.zeros(5, dtype=torch.int64))),
    ("scaling NaN in a call", "scaling", call(scaling=NAN)),
    ("scaling a tensor in a call", "scaling", call(scaling=torch.ones(2))),
    ("dropout_p 1", "dropout_p", call(dropout_p=1.0, training=True)),
    ("dropout_p None", "dropout_p", call(dropout_p=None)),
    ("core_index int32", "core_index", rows_call(torch.zeros(5, dtype=torch.int32))),
    ("core_index a list", "core_index", rows_call([0] * 5)),
    ("core_index too short", "core_index", rows_call(torch.zeros(4, dtype=torch.int64))),
    ("core_index a number", "core_index", rows_call(torch.tensor(0))),
    (
        "core_index of too many dimensions",
        "core_index",
        rows_call(torch.zeros(5, 6, dtype=torch.int64)),
    ),
    ("core_index too large", "core_index", rows_call(torch.tensor([0, 1, 2, 3, 0]))),
    ("core_index -2", "core_index", rows_call(torch.tensor([0, 1, -2, 1, 0]))),
]


class Nested(nn.Module):
    """A linear layer that is adapted inside."""

    in_features, out_features = 6, 4

    def __init__(self) -> None:
        super().__init__()
        self.inner = LoTRLinear(6, 4, 2)


def rows() -> Iterator[Row]:
    yield from CORE
    for file in sorted(Path(__file__).parent.glob("bad_*.py")):
        for name, value in vars(importlib.import_module(file.stem)).items():
            if name.startswith("BAD"):
                yield from value


ROWS = list(rows())


@pytest.mark.parametrize("name, action", [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
@pytest.mark.filterwarnings("ignore")
def test_bad_argument(name: str, action: Callable[[], object]) -> None:
    with refused(name):
        action()


def test_a_refused_layer_keeps_its_trained_parameters() -> None:
    """Adapting a layer freezes it. A layer that is refused must stay as it was."""
    for make in (lambda: LoTRLinear(6, 4, 2), Nested):
        module = make()
        for adapt_again in (adapt, LoTRWrapped.from_linear):
            with unchanged(module), refused("linear"):
                adapt_again(module, LoTRFactors(6, 4, 2))


# ---- operators: a walk over the schemas ----------------------------------------------------------

# Written in Python. Users do not call them.
PYTHON_OPERATORS = {"linear", "dropout_mask", "grouped_mm", "grouped_outer"}
KERNELS = [name for name in OPERATORS if name not in PYTHON_OPERATORS]


def places(written: bool = False) -> list[object]:
    """Returns (operator, which of its good arguments, place) of each tensor argument.

    Args:
        written: Only arguments that the operator writes.
    """
    torch.manual_seed(0)
    params = []
    for name in KERNELS:
        for sample, values in enumerate(arguments(name)):
            for i, (argument, value) in enumerate(zip(SCHEMAS[name].arguments, values)):
                is_written = argument.alias_info is not None and argument.alias_info.is_write
                if isinstance(value, Tensor) and (is_written or not written):
                    test_id = f"{name}-{sample}-{argument.name}"
                    params.append(pytest.param(name, sample, i, id=test_id))
    return params


EACH = pytest.mark.parametrize("name, sample, i", places())
WRITTEN = pytest.mark.parametrize("name, sample, i", places(written=True))


def has_its_memory(t: Tensor) -> bool:
    """Whether the storage of a tensor reaches to its last element."""
    offsets = [(n - 1) * stride for n, stride in zip(t.shape, t.stride())]
    elements = t.storage_offset() + sum(offsets) + 1
    return not t.is_meta and t.untyped_storage().nbytes() >= elements * t.element_size()


def bits_of(t: Tensor) -> Tensor:
    return t.resolve_neg().contiguous().view(torch.uint8)


def refused_operator(name: str, values: list, words: str) -> None:
    """Expects that an operator raises an error with these words, and changes nothing."""
    before = [
        value.clone() if isinstance(value, Tensor) and has_its_memory(value) else None
        for value in values
    ]
    with pytest.raises((RuntimeError, TypeError)) as raised:
        operator(name)(*values)
    assert re.search(words, str(raised.value)), raised.value
    for value, copy in zip(values, before):
        assert copy is None or torch.equal(bits_of(value), bits_of(copy))


def start_of_message(name: str, i: int) -> str:
    return rf"lotr::\w+: {SCHEMAS[name].arguments[i].name}: expected"


@EACH
def test_operator_refuses_freed_and_short_memory(name: str, sample: int, i: int) -> None:
    for elements_are_freed in (True, False):
        values = list(arguments(name)[sample])
        if values[i].numel() == 0:
            return
        # A view that does not start at the beginning of its storage.
        elements = values[i].flatten()
        values[i] = torch.cat([elements[:1], elements])[1:].view_as(values[i])
        storage = values[i].untyped_storage()
        one_too_few = storage.nbytes() - values[i].element_size()
        storage.resize_(0 if elements_are_freed else one_too_few)
        refused_operator(name, values, start_of_message(name, i))


@EACH
def test_operator_refuses_other_dtypes(name: str, sample: int, i: int) -> None:
    """Only another of the four dtypes may pass, where an operator converts its factors."""
    all_dtypes = {value for value in vars(torch).values() if isinstance(value, torch.dtype)}
    for dtype in sorted(all_dtypes, key=str):
        values = list(arguments(name)[sample])
        if dtype == values[i].dtype:
            continue
        try:
            values[i] = torch.zeros_like(values[i]).to(dtype)
        except (RuntimeError, NotImplementedError):  # quantized, or without a conversion
            continue
        if dtype not in DTYPES:
            refused_operator(name, values, r"lotr::\w+: \w+: expected .*dtype")
            continue
        try:
            operator(name)(*values)
        except RuntimeError as error:
            assert re.search(r"lotr::\w+: \w+: expected", str(error)), error


@EACH
def test_operator_refuses_none_and_another_device(name: str, sample: int, i: int) -> None:
    values = list(arguments(name)[sample])
    tensors = [value for value in values if isinstance(value, Tensor)]
    if len(tensors) < 2:  # without another tensor, the dispatcher finds no device
        return
    values[i] = values[i].to("meta")
    refused_operator(name, values, r"lotr::\w+: .*expected .* device\b.*, got (meta|cpu)")
    is_optional = str(SCHEMAS[name].arguments[i].type) != "Tensor"
    if not is_optional:
        values[i] = None
        refused_operator(name, values, start_of_message(name, i) + " a tensor, got None")


@WRITTEN
def test_operator_refuses_outputs_that_it_cannot_write(name: str, sample: int, i: int) -> None:
    """Refuses repeated elements, and memory that another argument shares."""
    good = list(arguments(name)[sample])
    values = [*good[:i], good[i][:1].expand_as(good[i]), *good[i + 1 :]]
    expected = start_of_message(name, i) + " a tensor without repeated elements"
    refused_operator(name, values, expected)
    for j, other in enumerate(good):
        if j == i or not isinstance(other, Tensor):
            continue
        memory = torch.empty(4096, dtype=torch.uint8).untyped_storage()
        values = list(good)
        values[j] = torch.empty(0, dtype=other.dtype).set_(memory, 0, other.shape).copy_(other)
        values[i] = torch.empty(0).set_(memory, 0, good[i].shape)
        either = rf"({SCHEMAS[name].arguments[i].name}|{SCHEMAS[name].arguments[j].name})"
        refused_operator(name, values, rf"lotr::\w+: {either}: expected memory of its own")


BAD_ROWS = {
    "index too large": ({"index": [0, 1, 2, 0]}, "index"),
    "index -2": ({"index": [0, 1, -2, 0]}, "index"),
    "index too short": ({"index": [0, 1, 0]}, "index"),
    "tokens too large": ({"index": [0, 1], "tokens": [0, 4]}, "tokens"),
    "offs descending": ({"offs": [3, 2]}, "offs"),
    "offs too large": ({"offs": [3, 5]}, "offs"),
    "offs of other cores": ({"offs": [1, 2, 4]}, "offs"),
}


@pytest.mark.parametrize("maps, name", BAD_ROWS.values(), ids=BAD_ROWS)
def test_row_core_refuses_bad_rows(maps: dict[str, list[int]], name: str) -> None:
    dtypes = {"index": torch.int64, "offs": torch.int32, "tokens": torch.int64}
    tensors = {part: torch.tensor(maps[part], dtype=dtypes[part]) for part in maps}
    choice = [tensors.get(part) for part in dtypes]
    with pytest.raises(RuntimeError, match=rf"lotr::row_core: {name}: expected"):
        torch.ops.lotr.row_core(torch.ones(4, 3), torch.ones(2, 3, 5), *choice, 1.0)
