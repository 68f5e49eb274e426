"""What holds for the tensors of every operator, by a walk over the library's schemas: a new operator is covered, or fails here.

Each tensor is there, on one device, with memory for all its elements and of a dtype that the operator takes; one that is
written shares no memory with another. Else the operator raises, names the argument and changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lotr_ext.ops import UNFOLDED

M, K, N, R, Q = 6, 5, 4, 3, 2  # tokens, in, out, r_in, r_out
SCHEMAS = {
    f"{s.name.removeprefix('lotr::')}{'.' if s.overload_name else ''}{s.overload_name}": s
    for s in torch._C._jit_get_all_schemas()
    if s.name.startswith("lotr::")
}
DTYPES = sorted({t for t in vars(torch).values() if isinstance(t, torch.dtype)}, key=str)
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ON_CUDA_ALONE = {"gemm_lotr", "gemm_lotr_refusal"}
DTYPES_OF_TORCH = {"adapted"}  # which only compilers call, of layers that have looked at the dtypes


def t(*size: int) -> Tensor:
    return torch.randn(*size)


def arguments(operator: str) -> list[tuple]:
    """Good ones, with as many of the optional ones as go together."""
    seed, offs = torch.tensor([7]), torch.tensor([2, M], dtype=torch.int32)
    index, tokens = torch.tensor([0, 1, -1, 1, 0, 1]), torch.tensor([5, 4, 3, 2, 1, 0])
    layer = (t(M, K), t(N, K), t(N))
    return {
        "shrink": [(t(M, K), t(K, R), 0.5, seed)],
        "expand_add_": [(t(M, N), t(M, R), t(N, R), 0.5, seed)],
        "factor_grad_": [(t(K, R), t(M, K), t(M, R), 0.5, seed)],
        "shrink_grad_": [(t(N, R), t(M, N), t(N, R), t(M, R))],
        "fold": [(t(N, Q), t(2, R, Q), 0.7, torch.float32)],
        "fold_grad": [(t(2, N, R), t(N, Q), t(2, R, Q), 0.7, t(N, Q))],
        "expand": [(t(M, N), t(M, R), t(N, R))],
        "layer_forward": [
            (*layer, t(K, R), t(N, Q), t(R, Q), 0.7, 0, None, t(N, R), 0.5, seed),
            (*layer, None, t(N, Q), t(R, Q), 0.7, 0, t(M, R), None, 0.0, None),
            (*layer, t(K, R), t(N, Q), t(R, Q), 0.7, UNFOLDED, None, None, 0.0, None),
        ],
        "layer_backward_": [
            (
                *(t(M, N), t(N, K), t(M, K), t(M, R), t(K, R), t(N, R), t(N, Q), t(R, Q), 0.7, 0),
                *(t(M, R), t(M, K), t(N, R), t(K, R), t(N, Q), False, False, 0.5, seed),
            ),
            (
                *(t(M, N), t(N, K), t(M, K), t(M, R), t(K, R), None, t(N, Q), t(R, Q), 0.7, UNFOLDED),
                *(None, None, None, t(K, R), t(N, Q), True, True, 0.0, None),
            ),
        ],
        "shrink_backward_": [(t(M, R), t(M, K), t(M, K), t(K, R), t(K, R), 0.5, seed)],
        "row_core": [(t(M, R), t(2, R, Q), index, None, tokens, 0.7), (t(M, R), t(2, R, Q), None, offs, None, 0.7)],
        "row_core_backward": [(t(M, Q), t(M, R), t(2, R, Q), None, offs, tokens, 0.7, True, True)],
        "grouped_mm": [(t(M, K), t(2, N, K), offs)],
        "grouped_outer": [(t(M, N), t(M, K), offs)],
        "dropout_mask": [(M, N, 0.5, seed, torch.float32)],
        "adapted": [(t(M, K), None, t(N, K), t(N), t(K, R), t(N, Q), t(R, Q), 0.7, None, 0.0, None, "")],
        "gemm_lotr": [(t(M, K), t(N, K), t(N), t(M, R), t(N, R), False)],
        "gemm_lotr_refusal": [(t(M, K), t(N, K), R, False)],
    }[operator.partition(".")[0]]


def overload(operator: str) -> torch._ops.OpOverload:
    name, _, which = operator.partition(".")
    return getattr(getattr(torch.ops.lotr, name), which or "default")


def places(*, on_cpu: bool, written: bool = False) -> Iterator[object]:
    """(operator, which of its good arguments, place) of each tensor argument."""
    torch.manual_seed(0)
    for operator, schema in sorted(SCHEMAS.items()):
        if not any("Tensor" in str(a.type) for a in schema.arguments) or (on_cpu and operator in ON_CUDA_ALONE):
            continue
        for sample, given in enumerate(arguments(operator)):
            for i, a in enumerate(schema.arguments[: len(given)]):
                if isinstance(given[i], Tensor) and (not written or (a.alias_info is not None and a.alias_info.is_write)):
                    yield pytest.param(operator, sample, i, id=f"{operator}-{sample}-{a.name}")


TENSORS = pytest.mark.parametrize("operator, sample, i", list(places(on_cpu=True)))
WRITTEN = pytest.mark.parametrize("operator, sample, i", list(places(on_cpu=True, written=True)))


def refused(operator: str, given: list, words: str) -> str:
    """Calls an operator that has to raise, and change nothing; the message."""
    before = [a.clone() if isinstance(a, Tensor) and not a.is_meta and _whole(a) else None for a in given]
    with pytest.raises((RuntimeError, TypeError)) as raised:
        overload(operator)(*given)
    message = str(raised.value)
    assert re.search(words, message), message
    for a, b in zip(given, before):
        assert b is None or torch.equal(*(v.resolve_neg().contiguous().view(torch.uint8) for v in (a, b)))
    return message


def _whole(a: Tensor) -> bool:
    reach = a.storage_offset() + sum((n - 1) * s for n, s in zip(a.shape, a.stride())) + 1
    return a.untyped_storage().nbytes() >= reach * a.element_size()


def named(operator: str, i: int) -> str:
    return rf"lotr::\w+: {SCHEMAS[operator].arguments[i].name}: expected"


@pytest.mark.parametrize("operator", sorted(set(SCHEMAS) - ON_CUDA_ALONE))
def test_good_arguments_are_taken(operator: str) -> None:
    """And the shape function gives the layout of the results."""
    if not any("Tensor" in str(a.type) for a in SCHEMAS[operator].arguments):
        return
    for given in arguments(operator):
        real = overload(operator)(*given)
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in given]
            fake = overload(operator)(*fakes)
        assert layouts(real) == layouts(fake)


def layouts(results: object) -> list[object]:
    """Shape, dtype and strides of each result."""
    together = results if isinstance(results, tuple) else (results,)
    return [None if t is None else (t.shape, t.dtype, t.stride()) for t in together]


@pytest.mark.parametrize("operator, sample, i", list(places(on_cpu=False)))
def test_one_argument_on_meta(operator: str, sample: int, i: int) -> None:
    given = list(arguments(operator)[sample])
    if sum(isinstance(a, Tensor) for a in given) > 1:
        given[i] = given[i].to("meta")
        refused(operator, given, r"lotr::\w+: \w+: expected (the device of|values|tensors with values).* got .*(meta|cpu)")


@TENSORS
@pytest.mark.parametrize("left", ["nothing", "all but one"])
def test_memory_that_was_freed_or_is_too_short(operator: str, sample: int, i: int, left: str) -> None:
    given = list(arguments(operator)[sample])
    given[i] = given[i].clone()
    storage = given[i].untyped_storage()
    storage.resize_(0 if left == "nothing" else storage.nbytes() - given[i].element_size())
    refused(operator, given, named(operator, i))


@TENSORS
def test_every_dtype(operator: str, sample: int, i: int) -> None:
    """Integers and exotic floats never pass; another of the four may, where an operator widens or rounds its factors."""
    for dtype in DTYPES:
        given = list(arguments(operator)[sample])
        if dtype == given[i].dtype or operator in DTYPES_OF_TORCH:
            continue
        try:
            given[i] = torch.zeros_like(given[i]).to(dtype)
        except (RuntimeError, NotImplementedError):  # quantised ones, and those without a conversion
            continue
        if dtype in FLOATING:
            try:
                overload(operator)(*given)
            except RuntimeError as error:
                assert re.search(r"lotr::\w+: \w+: expected", str(error)), error
        else:
            refused(operator, given, r"lotr::\w+: \w+: expected .*dtype")


@TENSORS
def test_none_for_a_tensor(operator: str, sample: int, i: int) -> None:
    given = list(arguments(operator)[sample])
    others = sum(isinstance(a, Tensor) for a in given) - 1  # without another tensor, the dispatcher finds no device
    if others and str(SCHEMAS[operator].arguments[i].type) == "Tensor":
        given[i] = None
        refused(operator, given, named(operator, i) + " a tensor, got None")


@WRITTEN
def test_output_that_is_negative_by_a_mark(operator: str, sample: int, i: int) -> None:
    given = list(arguments(operator)[sample])
    given[i] = torch._neg_view(given[i])
    refused(operator, given, named(operator, i))


@WRITTEN
def test_output_with_repeated_elements(operator: str, sample: int, i: int) -> None:
    given = list(arguments(operator)[sample])
    given[i] = given[i][:1].expand_as(given[i])
    refused(operator, given, named(operator, i) + " a tensor without repeated elements")


@WRITTEN
def test_output_that_shares_memory_with_another_argument(operator: str, sample: int, i: int) -> None:
    good = arguments(operator)[sample]
    for j, other in enumerate(good):
        if j == i or not isinstance(other, Tensor):
            continue
        given = list(good)
        memory = torch.empty(4096, dtype=torch.uint8).untyped_storage()
        given[j] = torch.empty(0, dtype=other.dtype).set_(memory, 0, other.shape).copy_(other)
        given[i] = torch.empty(0).set_(memory, 0, good[i].shape)
        either = rf"({SCHEMAS[operator].arguments[i].name}|{SCHEMAS[operator].arguments[j].name})"
        refused(operator, given, rf"lotr::\w+: {either}: expected memory of its own")


@pytest.mark.parametrize("split", ["columns", "leading", "middle"])
def test_parts_of_one_buffer_are_apart(split: str) -> None:
    x, A, k, own = t(2, 3, K), t(K, R), t(6, R), t(2, 3, K)
    both = {"columns": t(2, 3, 2 * K), "leading": t(4, 3, K), "middle": t(2, 6, K)}[split]
    axis = {"columns": 2, "leading": 0, "middle": 1}[split]
    dx, read = both.chunk(2, axis)
    dx.copy_(own), read.copy_(x)
    if split == "middle":  # its leading dimensions do not lie as one, which the operators need
        dx, read, own, x = dx[:1], read[:1], own[:1], x[:1]
        k = k[:3]
    expected, dA = own.clone(), torch.zeros(K, R)
    torch.ops.lotr.shrink_backward_(k, expected, x, A, dA)
    sums = torch.zeros(K, R)
    torch.ops.lotr.shrink_backward_(k, dx, read, A, sums)
    assert torch.equal(dx, expected) and torch.equal(sums, dA)
