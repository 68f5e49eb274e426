"""Every operator with numbers x dtype x shape x layout against its formula in float64.

formulas.py has the formulas, and the forms in which each operator is called. Here are the shapes,
and the comparison: each operand has NaN around it in memory, and `helpers.mismatch` compares each
element of a result. LOTR_CPU_ISA chooses the instruction set; `test_lower_instruction_sets` runs
the table with each.
"""

import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from unittest import mock

import pytest
import torch
from formulas import (
    ENTRIES,
    SUM_ROUNDINGS,
    Entry,
    Results,
    layer_backward_few_tokens_,
    layer_forward_few_tokens,
    row_core,
    row_forms,
)
from helpers import (
    DTYPE_PAIRS,
    DTYPES,
    HALVES,
    LAYOUTS,
    Exact,
    copy64,
    mismatch,
    new_memory_is_nan,
    relative,
    run_python,
    sums_dtype,
    untouched,
    worst,
)
from operands import (
    BETA,
    KERNELS,
    OPERATORS,
    SCHEMAS,
    Case,
    S,
    good_arguments,
    operator,
    results_by_name,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.library import opcheck
from torch.utils._pytree import tree_map_only

from lotr_ext import reference
from lotr_ext.core import fallback, kernel_support
from lotr_ext.core.call import RowChoice

ops = torch.ops.lotr
# M, K, N, r_in: full blocks of each kernel, their remainders, panels that are cut short. r_out is
# r_in + 1, up to 256.
SHAPES = [
    (0, 5, 3, 2),
    (1, 1, 1, 1),
    (1, 64, 48, 16),
    (5, 7, 9, 3),
    (7, 129, 31, 8),
    (16, 64, 64, 16),
    (97, 77, 130, 17),
    (130, 200, 96, 64),
    (257, 65, 67, 33),
    (29, 31, 70, 100),
    (33, 300, 129, 255),
    (3, 600, 5, 5),
]
each_dtype_pair = pytest.mark.parametrize(
    "dtype, factors", DTYPE_PAIRS, ids=lambda t: str(t).removeprefix("torch.")
)

# ---- the comparison ------------------------------------------------------------------------------

Comparison = tuple[str, Tensor, Exact]  # a result's name, the result, and what it must be


def is_number(operand: object) -> bool:
    """Whether an argument is an operand of the mathematics: not an index, not a choice."""
    is_tensor = isinstance(operand, Tensor) and operand.is_floating_point()
    return is_tensor or isinstance(operand, float)


def exact_results(
    formula: Callable[..., Results], c: Case, arguments: dict[str, object]
) -> dict[str, Exact]:
    """Computes a formula for these arguments, in float64.

    Formulas only add and multiply, so the sum of the absolute products is the formula's value for
    the absolute operands. Operators round factors to x's dtype, but fold B and G before that.
    """
    rounded = {"A", "F", "cores"} if "core" in arguments else {"A", "F", "cores", "B"}
    operands = {**arguments, "drop": c.drop}
    for name, operand in arguments.items():
        if operand is None and name in ("dA", "dB", "dx", "du"):
            operands[name] = torch.zeros((), dtype=torch.float64)
        elif isinstance(operand, Tensor) and operand.is_floating_point():
            operands[name] = copy64(operand.to(c.dtype) if name in rounded else operand)
    values = formula(**operands)
    numbers = {name: abs(operand) for name, operand in operands.items() if is_number(operand)}
    sizes = formula(**{**operands, **numbers})
    return {name: Exact(values[name], sizes[name]) for name in values}


def call(name: str, arguments: dict[str, object]) -> Results:
    """Calls an operator. Returns its results by name, also those that it writes in place."""
    written = {
        argument.name: arguments[argument.name]
        for argument in SCHEMAS[name].arguments
        if argument.alias_info is not None and arguments[argument.name] is not None
    }
    results = results_by_name(name, getattr(ops, name)(*arguments.values()))
    assert all(map(untouched, written.values()))
    assert not results.keys() & written.keys()
    return {**results, **written}


def comparisons(entry: Entry, c: Case) -> Iterator[Comparison]:
    """Calls an operator in all forms. Yields each of its results with the exact one."""
    name = entry.formula.__name__
    for number, form in enumerate(entry.forms(c)):
        arguments = c.arguments(name, **form)
        exacts = exact_results(entry.formula, c, arguments)
        results = call(name, arguments)
        assert results.keys() == exacts.keys()
        for key, result in results.items():
            roundings = entry.roundings.get(key, 1)
            if key == "du" and arguments.get("du") is not None:
                roundings = 2  # the product is rounded before it is added
            # A sum of rounded operands is only as accurate as x's dtype, so it is compared in it.
            has_rounded_operands = key in SUM_ROUNDINGS and key in entry.roundings
            compared = rounded_sum(c, result) if has_rounded_operands else result
            yield f"{key} in form {number}", compared, exacts[key]._replace(roundings=roundings)


def rounded_sum(c: Case, result: Tensor) -> Tensor:
    """Rounds a sum of products of rounded operands to x's dtype. It must not be rounded yet."""
    assert result.dtype in (sums_dtype(c.dtype), c.factors_dtype)
    rounded = result.to(c.dtype)
    if result.dtype == torch.float32 and c.dtype in HALVES and result.count_nonzero() > 64:
        assert relative(rounded, result) > 0, f"the sum was rounded to {c.dtype}"
    return rounded


TABLE: dict[str, Callable[[Case], Iterator[Comparison]]] = {
    name: partial(comparisons, entry) for name, entry in ENTRIES.items()
}
DROPS = ("shrink", "expand_add_", "layer_forward", "layer_backward_", "shrink_backward_")


def test_every_kernel_is_in_the_table() -> None:
    """test_layers.py and test_experts.py compare the operators that are written in Python."""
    assert {entry.formula.__name__ for entry in ENTRIES.values()} == set(KERNELS)


def check(name: str, case: Case, where: str) -> None:
    with new_memory_is_nan():
        for what, result, exact in TABLE[name](case):
            error = mismatch(result, exact)
            assert error is None, f"{name}, {where}: {what}: {error}"


@each_dtype_pair
@pytest.mark.parametrize("name", TABLE)
def test_numbers(name: str, dtype: torch.dtype, factors: torch.dtype) -> None:
    """Each shape is contiguous, then in one of the other layouts, then with dropout."""
    for i, shape in enumerate(SHAPES):
        for layout in (LAYOUTS[0], LAYOUTS[1 + i % 3]):
            check(name, Case(shape, dtype, factors, layout), f"{shape} {layout}")
        if name in DROPS:
            p = (0.1, 0.5, 0.93)[i % 3]
            check(name, Case(shape, dtype, factors, LAYOUTS[i % 4], p), f"{shape} p = {p}")


@each_dtype_pair
def test_row_core_of_the_fallback(dtype: torch.dtype, factors: torch.dtype) -> None:
    for shape in SHAPES:
        c = Case(shape, dtype, factors)
        for form in row_forms(c):
            exact = exact_results(row_core, c, c.arguments("row_core", **form))["h"]
            choice = RowChoice(form["index"], form["offs"], form["tokens"])
            assert mismatch(fallback.row_core(c.u, c.cores, S, choice), exact) is None


def test_autograd_notices_that_y_changed() -> None:
    """Otherwise a backward that saved y would use the new values."""
    c = Case(SHAPES[3], torch.float32, torch.float32)
    version = c.y._version
    call("expand_add_", c.arguments("expand_add_"))
    assert c.y._version > version


# ---- bits, NaN, dropout --------------------------------------------------------------------------


def results_of(name: str, case: Case) -> list[Tensor]:
    return [result for _, result, _ in TABLE[name](case)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [n for n in TABLE if not n.startswith("layer_")])
def test_same_bits_at_any_number_of_threads(name: str, dtype: torch.dtype) -> None:
    """With an odd number of tokens, the last pair of rows is incomplete.

    The layers' operators are left out: the library's product in them does not promise equal bits.
    """
    for shape in ((1100, 300, 200, 16), (301, 130, 65, 40), (17000, 40, 65, 4)):
        runs = []
        # The truth's mask takes a second in the larger shapes.
        p = 0.4 if name in DROPS and shape[0] < 1000 else 0.0
        for threads in (3, 2, 1):  # ends with 1, as in all other tests
            torch.set_num_threads(threads)
            runs.append(results_of(name, Case(shape, dtype, dtype, p=p)))
        for run in runs[1:]:
            assert all(map(torch.equal, run, runs[0])), shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_that_no_cache_holds(dtype: torch.dtype) -> None:
    """At rank 3 few rows fit into a CPU's L2. At rank 127 g is read twice: the sums do not fit."""
    for name in ("projected_sums", "rows_sums"):
        for rank in (3, 127):
            check(name, Case((150, 3, 6000, rank), dtype, dtype), f"rank {rank}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_dropped_may_be_nan(dtype: torch.dtype) -> None:
    runs = []
    for value in (0.0, float("nan")):
        c = Case((13, 67, 35, 5), dtype, dtype, p=0.5)
        c.x.masked_fill_(c.drop(torch.ones_like(c.x)) == 0, value)
        runs.append(results_of("shrink", c) + results_of("shrink_backward_", c))
    assert all(map(torch.equal, *runs))
    is_dropped = c.drop(torch.ones_like(c.y)) == 0
    (y,) = results_of("expand_add_", c)
    start = Case((13, 67, 35, 5), dtype, dtype).y
    assert torch.equal(y[is_dropped], start[is_dropped])  # not even rounded again


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_stays_in_its_row_and_column(bad: float, dtype: torch.dtype) -> None:
    """Row 37 is in an incomplete tile. Column 65 is past the last full step."""
    c = Case((41, 67, 130, 18), dtype, dtype)
    c.x[37, 65] = c.u[37, 17] = c.g[37, 129] = bad
    ones = torch.ones_like(c.u)
    y = torch.ones_like(c.g)
    ops.expand_add_(y, c.u, c.F)
    dA = ops.shrink_backward_(ones, None, c.x, None, None)
    name = "layer_backward_rows_"
    rows = call(name, c.arguments(name, weight=None, h=ones, B=c.F, dx=None, dB=None))
    of_tokens = [ops.shrink(c.x, c.A), y, rows["dh"]]
    for result, row in [*((t, 37) for t in of_tokens), (dA, 65), (rows["dB"], 129)]:
        expected = torch.ones_like(result, dtype=torch.bool)
        expected[row] = False
        assert torch.equal(result.isfinite(), expected)


def test_a_number_equal_to_the_threshold_is_kept() -> None:
    number = int(reference.philox_4x32_10(torch.tensor([0]), 5)[0, 1])  # of element 1
    assert ops.shrink(torch.ones(1, 4), torch.eye(4), number / 2**32, torch.tensor([5]))[0, 1] > 0


def test_more_cores_and_tokens_than_int32_counts() -> None:
    many = 2**31 + 9
    u = torch.randn(2, 3)
    cores = torch.randn(1, 3, 5)
    last = torch.tensor([many - 1, 2**31])
    h = ops.row_core(u, cores.expand(many, 3, 5), last, None, None, S)
    assert torch.allclose(h, S * u @ cores[0])
    h = ops.row_core(u[:1].expand(many, 3), cores, torch.tensor([0, 0]), None, last, S)
    assert torch.allclose(h, S * u[:1] @ cores[0])


# ---- edges ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("core", [8.0, -8.0], ids=["positive", "negative"])
def test_few_tokens_past_the_range_of_float16(core: float) -> None:
    """s u G exceeds 65504, but y and the gradients do not. The scaling is then applied last."""
    c = Case((5, 7, 9, 3), torch.float16, torch.float16)
    values = {"x": 1.0, "weight": 0.5, "A": 1 / 7, "B": 0.001, "core": core, "g": 0.001, "u": 1.0}
    for operand, value in values.items():
        getattr(c, operand).fill_(value)
    options = {"scaling": 5000.0, "strategy": BETA, "bias": None, "dA": None, "dB": None}
    for formula in (layer_forward_few_tokens, layer_backward_few_tokens_):
        arguments = c.arguments(formula.__name__, **options)
        exacts = exact_results(formula, c, arguments)
        for name, result in call(formula.__name__, arguments).items():
            assert relative(result, exacts[name].value) < 5e-3, name


@pytest.mark.parametrize("wide", ["A", "B", "core"])
@pytest.mark.parametrize("name", ["layer_backward_", "layer_backward_few_tokens_"])
def test_new_gradients_of_factors_with_two_dtypes(name: str, wide: str) -> None:
    """They have the dtype of sums: a factor in float32 gets a gradient that was not rounded."""
    c = Case((40, 24, 17, 4), torch.bfloat16, torch.bfloat16)
    arguments = c.arguments(name, dA=None, dB=None, **{wide: getattr(c, wide).float()})
    opcheck(operator(name), tuple(arguments.values()), test_utils="test_faketensor")
    for gradient in operator(name)(**arguments)[1:]:
        assert gradient.dtype == torch.float32
        assert relative(gradient.bfloat16(), gradient) > 0


# ---- as torch sees them --------------------------------------------------------------------------

# Results [rows, rank], by name in the schemas. On CUDA each row starts at a multiple of 16 bytes.
PADDED = {"u", "F", "h", "du", "dh"}


def on_fake_cuda(mode: FakeTensorMode, tensor: Tensor) -> FakeTensor:
    meta = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return FakeTensor(mode, meta, torch.device("cuda:0"))


@pytest.mark.parametrize("dtype", [t for t in DTYPES if t != torch.float64], ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_strides_on_cuda(name: str, dtype: torch.dtype) -> None:
    """The fake kernels promise torch.compile the strides that csrc/torch makes on CUDA."""
    for rank in range(1, 18):
        for arguments in good_arguments(name, dtype, rank):
            with FakeTensorMode() as mode:
                on_cuda = partial(on_fake_cuda, mode)
                returned = operator(name)(**tree_map_only(Tensor, on_cuda, arguments))
            for key, result in results_by_name(name, returned).items():
                row_stride = result.shape[-1]
                # torch adds an argument du, and the result of that sum has dense rows.
                is_added = key == "du" and arguments.get("du") is not None
                if key in PADDED and not is_added:
                    row_stride += -row_stride % (16 // result.itemsize)  # to the next 16 bytes
                strides = (row_stride * result.shape[1], row_stride, 1)
                assert result.stride() == strides[-result.dim() :], (key, rank)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    """The fake kernels, which torch.compile calls, have the results' shapes, dtypes and strides.

    `linear` is absent, because compilers decompose it. The tolerance fits decompositions,
    which round in several steps.
    """
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype in HALVES else {}
    for arguments in good_arguments(name, dtype):
        opcheck(operator(name), tuple(arguments.values()), **tolerance)


def test_a_device_is_checked_also_while_a_caller_traces() -> None:
    with FakeTensorMode():
        assert kernel_support.trial_obstacle(torch.device("cpu")) is None
        assert "meta" in kernel_support.trial_obstacle(torch.device("meta"))


def test_a_gpu_on_which_the_first_layer_is_wrong_warns() -> None:
    """Layers then run the PyTorch fallback. That must not happen in silence."""
    package = mock.patch.multiple(
        kernel_support,
        build_info=lambda: {"cuda": {"built": True, "archs": "90a"}},
        trial_obstacle=lambda device: "got 135.0",
    )
    gpu = mock.patch.multiple(
        torch.cuda,
        device_count=lambda: 1,
        get_device_capability=lambda index: (9, 0),
        is_current_stream_capturing=lambda: False,
    )
    check_device = kernel_support.cuda_obstacle.__wrapped__  # without its cache
    with package, gpu, pytest.warns(UserWarning, match=r"fallback.*got 135\.0"):
        assert "got 135.0" in check_device(0)


# ---- the specification ---------------------------------------------------------------------------


def test_reference_by_autograd() -> None:
    """The backward of the specification was derived by hand."""
    shapes = ((4, 6), (5, 6), (5,), (6, 3), (5, 2), (3, 2))
    x, W, bias, A, B, core = (
        torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in shapes
    )
    mask = reference.dropout_mask(4, 6, 0.5, 77)
    y = reference.forward(x, W, bias, A, B, core, 0.7, mask)
    g = torch.randn_like(y)
    expected = torch.autograd.grad(y, (x, A, B, core), g)
    assert worst(reference.backward(g, x, W, A, B, core, 0.7, mask), expected) < 1e-12


def test_philox_known_answers() -> None:
    """Random123's published vector for philox4x32-10 of zeros."""
    words = reference.philox_4x32_10(torch.tensor([0]), 0)
    assert words[0].tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


# ---- instruction sets ----------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512", "avx512_bf16", "amx_bf16"])
def test_lower_instruction_sets(isa: str) -> None:
    """The numbers with each instruction set that this CPU has below its best."""
    if json.loads(ops.info())["cpu"]["isa"] == isa or "LOTR_CPU_ISA" in os.environ:
        pytest.skip("test_numbers has run with it")
    options = ["-q", "-x", "-n", "0", "-p", "no:cacheprovider", "-k", "numbers"]
    environment = {**os.environ, "LOTR_CPU_ISA": isa}
    run = run_python("-m", "pytest", *options, __file__, env=environment)
    if "(what this CPU runs), got " in run.stdout + run.stderr:
        pytest.skip(f"this CPU has no {isa}")
    assert run.returncode == 0, run.stdout[-3000:]
