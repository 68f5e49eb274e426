"""The operands of the operators, by the names that the arguments have in the schemas.

    case = Case((6, 5, 7, 3), torch.bfloat16, torch.float32)
    arguments = case.arguments("expand_add_", p=0.0, seed=None)  # {"y": .., "u": .., "F": .., ..}
    operator("expand_add_")(**arguments)

A test names only what it changes. `good_arguments` lists the forms of each operator.
"""

import torch
from helpers import laid_out, sums_dtype
from torch import Tensor

from lotr_ext import reference

SCHEMAS = {
    schema.name.removeprefix("lotr::"): schema
    for schema in torch._C._jit_get_all_schemas()
    if schema.name.startswith("lotr::")
}
# These report on the build, the driver, plans and refusals. They compute nothing.
NO_NUMBERS = {"info", "cuda_versions", "cuda_plans", "gemm_lotr_refusal"}
# Without `linear`, which compilers decompose.
OPERATORS = sorted(set(SCHEMAS) - NO_NUMBERS - {"linear"})
# These are written in Python. Users do not call them.
PYTHON_OPERATORS = {"dropout_mask", "grouped_mm", "grouped_outer"}
KERNELS = [name for name in OPERATORS if name not in PYTHON_OPERATORS]

# Strategies of the layers' operators on a CPU: BETA, and 0, which is two_pass.
BETA = 1
SEED = -(2**61) + 12345678901
S = 0.37  # the scaling
DEFAULTS = {
    "scaling": S,
    "strategy": 0,
    **dict.fromkeys(("need_B", "need_core", "need_h", "need_u", "need_cores"), True),
}


def operator(name: str) -> torch._ops.OpOverload:
    return getattr(torch.ops.lotr, name).default


def results_by_name(name: str, returned: object) -> dict[str, Tensor]:
    """Returns the tensors that a call of an operator returned, by their names in the schema."""
    tensors = returned if isinstance(returned, tuple) else (returned,)
    declared = zip(SCHEMAS[name].returns, tensors)
    return {result.name: tensor for result, tensor in declared if tensor is not None}


class Case:
    """Operands of one shape, dtype and layout, with elements of about 1.

    An attribute that is an operand has the name of the argument, for `arguments` to find it.

    Args:
        shape: m tokens, k in_features, n out_features, and r_in. r_out is r_in + 1.
        dtype: The dtype of x.
        factors_dtype: The dtype of A, B, F and the cores.
        layout: One of `helpers.LAYOUTS`.
        p: The probability of dropout. Without dropout, 0, the seed is None.
    """

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        factors_dtype: torch.dtype,
        layout: str = "contiguous",
        p: float = 0.0,
    ):
        self.m, self.k, self.n, self.r = shape
        self.r_out = self.r + 1
        self.dtype = dtype
        self.factors_dtype = factors_dtype
        self.layout = layout
        self.p = p
        self.seed = torch.tensor([SEED]) if p else None
        self.generator = torch.Generator().manual_seed(sum(shape))
        self.x = self.make(self.m, self.k)
        self.y = self.make(self.m, self.n)
        self.g = self.make(self.m, self.n)
        self.u = self.make(self.m, self.r)
        self.h = self.make(self.m, self.r_out)
        self.weight = self.make(self.n, self.k)
        self.bias = self.make(1, self.n)[0]
        self.A = self.make(self.k, self.r, dtype=factors_dtype)
        self.F = self.make(self.n, self.r, dtype=factors_dtype)
        self.B = self.make(self.n, self.r_out, dtype=factors_dtype)
        self.cores = self.make(2, self.r, self.r_out, dtype=factors_dtype)
        self.core = self.cores[0]

    def make(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        """Returns a new operand, in x's dtype unless another one is passed."""
        values = torch.randn(*size, generator=self.generator, dtype=torch.float64)
        values /= size[-1] ** 0.25
        return laid_out(values.to(dtype or self.dtype), self.layout)

    def sums(self, *size: int) -> Tensor:
        """Returns a new operand in the dtype of sums over tokens, such as dA."""
        return self.make(*size, dtype=sums_dtype(self.dtype))

    def arguments(self, name: str, **changed: object) -> dict[str, object]:
        """Returns an operator's arguments in their order: from `changed`, or else from the case."""
        values = {**DEFAULTS, **vars(self), **changed}
        arguments = {argument.name: values[argument.name] for argument in SCHEMAS[name].arguments}
        if self.dtype == torch.bfloat16 and arguments.get("weight") is not None:
            # On a CPU with AMX, torch 2.13 also multiplies the memory between bfloat16 rows: NaN.
            for operand in arguments.keys() & {"x", "weight", "g", "dx"}:
                if arguments[operand] is not None:
                    arguments[operand] = arguments[operand].contiguous()
        return arguments

    def drop(self, t: Tensor) -> Tensor:
        """Returns t [m, columns] in float64 after the dropout of the case."""
        return t * reference.dropout_mask(*t.shape, self.p, SEED) if self.p else t


def good_arguments(
    name: str, dtype: torch.dtype = torch.float32, rank: int = 3
) -> list[dict[str, object]]:
    """Returns good arguments of an operator, once for each form that it has.

    An operator without an entry here fails every test that walks over the schemas.

    Args:
        name: The operator.
        dtype: The dtype of x and the factors.
        rank: r_in.
    """
    c = Case((6, 5, 7, rank), dtype, dtype, p=0.5)
    with_sums = {  # sums that the gradients are added to, and the other strategy
        "dA": c.sums(c.k, c.r),
        "dB": c.sums(c.n, c.r_out),
        "dx": c.make(c.m, c.k),
        "du": c.make(c.m, c.r),
        "strategy": BETA,
    }
    no_options = {**dict.fromkeys(("bias", "seed", "dA", "dB", "dx", "du")), "p": 0.0}
    # Tokens may have leading dimensions.
    leading = {"x": c.x.view(3, 2, -1), "y": c.y.view(3, 2, -1)}
    forwards = [{}, {**no_options, **leading, "strategy": BETA}]
    new_gradients = {**no_options, "g": c.g.view(3, 2, -1)}
    offs = torch.tensor([2, c.m], dtype=torch.int32)
    index = torch.tensor([0, 1, -1, 1, 0, 1])
    tokens = torch.tensor([5, 4, 3, 2, 1, 0])
    forms = {
        "shrink": [{}, {**no_options, "x": c.x[:0]}],
        "expand_add_": [{}],
        "expand": [{}, leading],
        "fold": [{}],
        "layer_forward": forwards,
        "layer_forward_few_tokens": forwards,
        "layer_forward_projected": forwards,
        "layer_forward_rows": forwards,
        "layer_backward_": [
            with_sums,
            new_gradients,
            {**no_options, "weight": None, "x": None, "need_B": False},
        ],
        "layer_backward_few_tokens_": [with_sums, new_gradients],
        "layer_backward_projected_": [
            with_sums,
            new_gradients,
            {**no_options, "weight": None, "F": None, "need_core": False},
        ],
        "layer_backward_rows_": [
            with_sums,
            new_gradients,
            {**no_options, "weight": None, "need_h": False},
        ],
        "shrink_backward_": [with_sums, {**no_options, "A": None, "du": c.u}],
        "row_core": [
            {"index": index, "offs": None, "tokens": tokens},
            {"index": None, "offs": offs, "tokens": None},
        ],
        "row_core_backward": [{"g": c.h, "index": None, "offs": offs, "tokens": tokens}],
        # Only these two are differentiable. opcheck then checks their gradients, too.
        "grouped_mm": [
            {
                "x": c.make(c.m, c.k).requires_grad_(),
                "weight": c.make(2, c.n, c.k).requires_grad_(),
                "offs": offs,
            }
        ],
        "grouped_outer": [
            {
                "g": c.make(c.m, c.n).requires_grad_(),
                "x": c.make(c.m, c.k).requires_grad_(),
                "offs": offs,
            }
        ],
        "dropout_mask": [{"rows": c.m, "cols": c.n}],
    }
    return [c.arguments(name, **form) for form in forms[name]]
