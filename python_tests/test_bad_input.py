"""Bad arguments: each argument x bad value is refused, in every entry point that has it.

The rows are in bad_calls.py. The arguments of operators need none: a walk over the schemas makes
their tests.
"""

import re
from collections.abc import Callable

import bad_calls
import pytest
import torch
from helpers import DTYPES, HALVES, OPERATORS, SCHEMAS, arguments, operator, refused
from models import unchanged
from torch import Tensor, nn

from lotr_ext import LoTRFactors, LoTRLinear, LoTRWrapped, adapt


@pytest.mark.parametrize(
    "name, action",
    [row[1:] for row in bad_calls.ROWS],
    ids=[row[0] for row in bad_calls.ROWS],
)
@pytest.mark.filterwarnings("ignore")
def test_bad_argument(name: str, action: Callable[[], object]) -> None:
    with refused(name):
        action()


@pytest.mark.parametrize("make", [lambda: LoTRLinear(6, 4, 2), bad_calls.adapted_inside])
@pytest.mark.parametrize("adapt_again", [adapt, LoTRWrapped.from_linear])
def test_a_refused_layer_keeps_its_trained_parameters(
    make: Callable[[], nn.Module], adapt_again: Callable
) -> None:
    """Adapting a layer freezes it. A layer that is refused must stay as it was."""
    module = make()
    with unchanged(module), refused("linear"):
        adapt_again(module, LoTRFactors(6, 4, 2))


# ---- operators: a walk over the schemas ----------------------------------------------------------

# Written in Python. Users do not call them.
PYTHON_OPERATORS = {"linear", "dropout_mask", "grouped_mm", "grouped_outer"}
KERNELS = [name for name in OPERATORS if name not in PYTHON_OPERATORS]
ALL_DTYPES = {
    *DTYPES,
    torch.bool,
    torch.uint8,
    torch.int32,
    torch.int64,
    torch.complex64,
    torch.float8_e4m3fn,
}
# Operands that may be in half precision with float32 factors. test_operators.py has their numbers.
MIXED = {("shrink", "x"), ("row_core", "u")}


def places(written: bool = False) -> list[object]:
    """Returns (operator, which of its good arguments, place) of each tensor with elements.

    Args:
        written: Only arguments that the operator writes.
    """
    torch.manual_seed(0)
    params = []
    for name in KERNELS:
        for sample, values in enumerate(arguments(name)):
            for i, (argument, value) in enumerate(zip(SCHEMAS[name].arguments, values)):
                is_written = argument.alias_info is not None and argument.alias_info.is_write
                has_elements = isinstance(value, Tensor) and value.numel() > 0
                if has_elements and (is_written or not written):
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
@pytest.mark.parametrize("is_freed", [True, False], ids=["freed", "short"])
def test_operator_refuses_freed_and_short_memory(
    name: str, sample: int, i: int, is_freed: bool
) -> None:
    values = list(arguments(name)[sample])
    # A view that does not start at the beginning of its storage.
    elements = values[i].flatten()
    values[i] = torch.cat([elements[:1], elements])[1:].view_as(values[i])
    storage = values[i].untyped_storage()
    storage.resize_(0 if is_freed else storage.nbytes() - values[i].element_size())
    refused_operator(name, values, start_of_message(name, i))


@EACH
def test_operator_refuses_other_dtypes(name: str, sample: int, i: int) -> None:
    good = arguments(name)[sample]
    allowed = {good[i].dtype}
    if (name, SCHEMAS[name].arguments[i].name) in MIXED:
        allowed |= {*HALVES}
    for dtype in ALL_DTYPES - allowed:
        values = [*good[:i], torch.zeros_like(good[i]).to(dtype), *good[i + 1 :]]
        refused_operator(name, values, r"lotr::\w+: \w+: expected .*dtype")


@EACH
def test_operator_refuses_none_and_another_device(name: str, sample: int, i: int) -> None:
    values = list(arguments(name)[sample])
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
