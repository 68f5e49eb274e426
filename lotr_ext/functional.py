"""lotr_linear, the functional form of an adapted layer."""

from torch import Tensor

from .checks import (
    check_index,
    check_input,
    check_number,
    check_probability,
    check_tensor,
    check_values,
)
from .core import dispatch
from .core.call import LayerCall, RowChoice


def lotr_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    core: Tensor,
    scaling: float,
    *,
    dropout_p: float = 0.0,
    training: bool = False,
    core_index: Tensor | None = None,
) -> Tensor:
    """Computes y = x W^T + bias + scaling ((drop(x) A) core) B^T (arXiv 2402.01376).

    Differentiable in every tensor but core_index.

    Args:
        x: [.., k].
        weight: W [n, k]. Like bias, it has x's dtype unless autocast is on.
        bias: [n].
        A: [k, r_in]. Like B and core, it has x's dtype or float32.
        B: [n, r_out].
        core: G [r_in, r_out], or [t, r_in, r_out] with core_index.
        scaling: s.
        dropout_p: In [0, 1). The probability of dropping an element of the adapter's x in training.
        training: Whether dropout is applied.
        core_index: Which core each row of x uses, int64: [b] for x [b, .., k], or [b, tokens] for
            x [b, tokens, .., k]. Where it is -1, y is x W^T + bias. One batch then serves several
            tasks, with one product with A and one with B. On a GPU its values are not checked.

    Returns:
        y [.., n] in x's dtype, or in autocast's.

    Raises:
        TypeError, ValueError: If an argument has the wrong type, shape or value. The message names
            it.
        RuntimeError: If PyTorch cannot compute with the dtypes or devices of the arguments.
    """
    check_tensor("weight", weight, "out_features", "in_features")
    n, k = weight.shape
    check_input(x, k)
    if bias is not None:
        check_tensor("bias", bias, n)
    check_tensor("A", A, k, "r_in")
    check_tensor("B", B, n, "r_out")
    lead = () if core_index is None else ("t",)
    check_tensor("core", core, *lead, A.shape[1], B.shape[1])
    choice = None
    if core_index is not None:
        check_index("core_index", core_index, len(core), x)
        choice = RowChoice.of_index(core_index.to(x.device), x)
    check_values(x, {"weight": weight, "A": A, "B": B, "core": core})
    check_number("scaling", scaling)
    check_probability("dropout_p", dropout_p)
    p = dropout_p if training else 0.0
    call = LayerCall(x, weight, bias, A, B, core, float(scaling), p, choice=choice)
    return dispatch.linear(call)
