"""Arguments the CPU operators refuse: the message names the operator, the argument, what was expected and what was got."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lotr_ext.ops import UNFOLDED

ops = torch.ops.lotr


def t(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(*size, dtype=dtype)


ERRORS: list[tuple[str, Callable[[Tensor], object], list[str]]] = [
    ("rows of A", lambda w: ops.shrink(t(4, 7), t(6, 3)), ["shrink", "A", "7", "[6, 3]"]),
    ("dims of x", lambda w: ops.shrink(t(2, 4, 7), t(7, 3)), ["shrink", "x", "2-D", "[2, 4, 7]"]),
    ("dtype of x", lambda w: ops.shrink(t(4, 7).int(), t(7, 3)), ["x", "torch.float32", "torch.int32"]),
    ("dtype of A", lambda w: ops.shrink(t(4, 7), t(7, 3).half()), ["A", "torch.float32", "torch.float16"]),
    ("rank 0", lambda w: ops.shrink(t(4, 7), t(7, 0)), ["A", "at least 1", "[7, 0]"]),
    ("no seed", lambda w: ops.shrink(t(4, 7), t(7, 3), 0.5), ["seed", "int64", "None"]),
    ("seed dtype", lambda w: ops.shrink(t(4, 7), t(7, 3), 0.5, t(1)), ["seed", "torch.int64", "torch.float32"]),
    ("seed size", lambda w: ops.shrink(t(4, 7), t(7, 3), 0.5, t(2).long()), ["seed", "one element", "[2]"]),
    ("p = 1", lambda w: ops.shrink(t(4, 7), t(7, 3), 1.0, t(1).long()), ["p", "[0, 1)", "1"]),
    ("p = NaN", lambda w: ops.shrink(t(4, 7), t(7, 3), float("nan"), t(1).long()), ["p", "[0, 1)", "nan"]),
    ("y against u", lambda w: ops.expand_add_(w, t(5, 3), t(6, 3)), ["expand_add_", "u", "4", "[5, 3]"]),
    ("y against F", lambda w: ops.expand_add_(w, t(4, 3), t(5, 3)), ["expand_add_", "F", "6", "[5, 3]"]),
    ("expand no seed", lambda w: ops.expand_add_(w, t(4, 3), t(6, 3), 0.5), ["expand_add_", "seed", "None"]),
    ("repeated y", lambda w: ops.expand_add_(w[:, :1].expand(4, 6), t(4, 3), t(6, 3)), ["y", "repeated", "stride 0"]),
    ("dtype of u", lambda w: ops.expand_add_(w, t(4, 3).double(), t(6, 3)), ["u", "torch.float32", "torch.float64"]),
    ("acc shape", lambda w: ops.factor_grad_(w, t(9, 4), t(9, 5)), ["factor_grad_", "acc", "5", "[4, 6]"]),
    ("acc dtype", lambda w: ops.factor_grad_(w, t(9, 4).double(), t(9, 6).double()), ["acc", "torch.float64"]),
    ("rows of k", lambda w: ops.factor_grad_(w, t(9, 4), t(8, 6)), ["k", "9", "[8, 6]"]),
    ("g against F", lambda w: ops.shrink_grad_(w, t(9, 4), t(5, 3), t(9, 3)), ["shrink_grad_", "F", "4", "[5, 3]"]),
    ("g against u", lambda w: ops.shrink_grad_(w, t(9, 4), t(4, 3), t(9, 2)), ["shrink_grad_", "u", "3", "[9, 2]"]),
    ("Q shape", lambda w: ops.shrink_grad_(w, t(9, 4), t(4, 3), t(9, 3)), ["shrink_grad_", "Q", "3", "[4, 6]"]),
    ("cores dims", lambda w: ops.fold(t(5, 3), t(3, 3), 1.0, torch.float32), ["fold", "cores", "3-D", "[3, 3]"]),
    ("fold dtype", lambda w: ops.fold(t(5, 3), t(1, 3, 3), 1.0, torch.int32), ["fold", "dtype", "torch.int32"]),
    ("fold scaling", lambda w: ops.fold(t(5, 3), t(1, 3, 3), float("inf"), torch.float32), ["scaling", "finite", "inf"]),
    ("fold r_out", lambda w: ops.fold(t(5, 3), t(1, 2, 4), 1.0, torch.float32), ["cores", "3", "[1, 2, 4]"]),
    ("dB shape", lambda w: ops.fold_grad(t(1, 4, 2), t(4, 3), t(1, 2, 3), 1.0, w), ["fold_grad", "dB", "3", "[4, 6]"]),
    ("Q dtype", lambda w: ops.fold_grad(t(1, 4, 2).half(), t(4, 6), t(1, 2, 6), 1.0, w), ["Q", "torch.float16"]),
    ("layers", lambda w: ops.fold_grad(t(2, 4, 2), t(4, 6), t(1, 2, 6), 1.0, w), ["cores", "2", "[1, 2, 6]"]),
    (
        "dA without x",
        lambda w: ops.layer_backward_(t(3, 5), None, None, t(3, 6), t(4, 6), None, t(5, 2), t(6, 2), 1.0, UNFOLDED, None, None,
                                      None, w, None, False, True),
        ["layer_backward_", "x", "dA", "None"],
    ),
    (
        "dB dtype",
        lambda w: ops.layer_backward_(t(3, 4).double(), None, None, t(3, 2).double(), t(7, 2).double(), None, t(4, 6).double(),
                                      t(2, 6).double(), 1.0, UNFOLDED, None, None, None, None, w, True, True),
        ["layer_backward_", "dB", "torch.float64", "torch.float32"],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("call", "words"), [e[1:] for e in ERRORS], ids=[e[0] for e in ERRORS])
def test_errors_name_expected_and_got_and_change_nothing(call: Callable[[Tensor], object], words: list[str]) -> None:
    written = torch.arange(24.0).reshape(4, 6)
    before = written.clone()
    with pytest.raises(RuntimeError) as error:
        call(written)
    message = str(error.value)
    assert "expected" in message and "got" in message
    assert all(word in message for word in words), message
    assert torch.equal(written, before)
