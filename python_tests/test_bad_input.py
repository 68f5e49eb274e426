"""Bad arguments: each argument x bad value is refused, in every entry point that has it.

The rows are in bad_calls.py. The arguments of operators need none: a walk over the schemas makes
their tests.
"""

import re
from collections.abc import Callable

import bad_calls
import pytest
import torch
from helpers import DTYPES, HALVES, refused
from models import unchanged
from operands import KERNELS, SCHEMAS, good_arguments, operator
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


def tensor_arguments(is_written: bool = False) -> list[object]:
    """Returns (operator, which of its good arguments, argument) of each tensor with elements.

    Args:
        is_written: Only arguments that the operator writes.
    """
    params = []
    for name in KERNELS:
        for form, values in enumerate(good_arguments(name)):
            for argument in SCHEMAS[name].arguments:
                value = values[argument.name]
                has_elements = isinstance(value, Tensor) and value.numel() > 0
                if has_elements and (argument.alias_info is not None or not is_written):
                    test_id = f"{name}-{form}-{argument.name}"
                    params.append(pytest.param(name, form, argument.name, id=test_id))
    return params


each_tensor = pytest.mark.parametrize("name, form, argument", tensor_arguments())
each_written_tensor = pytest.mark.parametrize(
    "name, form, argument", tensor_arguments(is_written=True)
)


def has_its_memory(t: Tensor) -> bool:
    """Whether the storage of a tensor reaches to its last element."""
    offsets = [(n - 1) * stride for n, stride in zip(t.shape, t.stride())]
    elements = t.storage_offset() + sum(offsets) + 1
    return not t.is_meta and t.untyped_storage().nbytes() >= elements * t.element_size()


def bits_of(t: Tensor) -> Tensor:
    return t.resolve_neg().contiguous().view(torch.uint8)


def check_refused(name: str, arguments: dict[str, object], words: str) -> None:
    """Expects an error with the name of an operator and these words, and that nothing changes."""
    before = {
        argument: value.clone()
        for argument, value in arguments.items()
        if isinstance(value, Tensor) and has_its_memory(value)
    }
    with pytest.raises((RuntimeError, TypeError)) as raised:
        operator(name)(*arguments.values())
    assert re.search(rf"lotr::\w+: {words}", str(raised.value)), raised.value
    for argument, copy in before.items():
        assert torch.equal(bits_of(arguments[argument]), bits_of(copy))


@each_tensor
@pytest.mark.parametrize("is_freed", [True, False], ids=["freed", "short"])
def test_operator_refuses_freed_and_short_memory(
    name: str, form: int, argument: str, is_freed: bool
) -> None:
    good = good_arguments(name)[form]
    # A view that does not start at the beginning of its storage.
    elements = good[argument].flatten()
    view = torch.cat([elements[:1], elements])[1:].view_as(good[argument])
    storage = view.untyped_storage()
    storage.resize_(0 if is_freed else storage.nbytes() - view.element_size())
    check_refused(name, {**good, argument: view}, f"{argument}: expected")


@each_tensor
def test_operator_refuses_other_dtypes(name: str, form: int, argument: str) -> None:
    good = good_arguments(name)[form]
    allowed = {good[argument].dtype}
    if (name, argument) in MIXED:
        allowed |= {*HALVES}
    for dtype in ALL_DTYPES - allowed:
        wrong = torch.zeros_like(good[argument]).to(dtype)
        check_refused(name, {**good, argument: wrong}, r"\w+: expected .*dtype")


@each_tensor
def test_operator_refuses_none_and_another_device(name: str, form: int, argument: str) -> None:
    good = good_arguments(name)[form]
    on_meta = {**good, argument: good[argument].to("meta")}
    check_refused(name, on_meta, r".*expected .* device\b.*, got (meta|cpu)")
    types = {declared.name: str(declared.type) for declared in SCHEMAS[name].arguments}
    if types[argument] == "Tensor":  # not optional
        check_refused(name, {**good, argument: None}, f"{argument}: expected a tensor, got None")


@each_written_tensor
def test_operator_refuses_outputs_that_it_cannot_write(name: str, form: int, argument: str) -> None:
    """Refuses repeated elements, and memory that another argument shares."""
    good = good_arguments(name)[form]
    output = good[argument]
    repeated = {**good, argument: output[:1].expand_as(output)}
    check_refused(name, repeated, f"{argument}: expected a tensor without repeated elements")
    for other, value in good.items():
        if other == argument or not isinstance(value, Tensor):
            continue
        memory = torch.empty(4096, dtype=torch.uint8).untyped_storage()
        shared = {
            other: torch.empty(0, dtype=value.dtype).set_(memory, 0, value.shape).copy_(value),
            argument: torch.empty(0).set_(memory, 0, output.shape),
        }
        check_refused(name, {**good, **shared}, f"({argument}|{other}): expected memory of its own")
