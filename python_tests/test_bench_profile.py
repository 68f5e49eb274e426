"""The profile of a layer names each product that it makes, and its parts and the rest are the whole."""

from __future__ import annotations

import pytest
import torch

from bench import profile
from bench.store import Store
from nets import OpCounter

QUICK = ["--device", "cpu", "--allocator", "system", "--threads", "1", "--rounds", "1", "--slice", "0.0001"]
MANY = ["shrink", "fold", "expand_add_", "shrink_grad_", "fold_grad", "expand_add_", "factor_grad_"]


@pytest.mark.parametrize(("tokens", "operators"), [(160, MANY), (8, ["small_forward_", "small_backward_"])])
def test_its_operators_are_those_that_the_layer_runs(tokens, operators, tmp_path, capsys, monkeypatch):
    from bench import rivals
    from bench.rivals_base import Tensors
    from bench.shapes import Case

    assert profile.main([*QUICK, "--dtypes", "fp32", "--shapes", f"{tokens}x24x16x3", "--results", str(tmp_path)]) == 0
    cells = Store(tmp_path / "profile.jsonl").read()
    named = [cell["rival"].split(":")[0] for cell in cells]
    assert named == ["frozen", "lotr_ext", *operators, "rest"]
    _, ours, *parts, rest = (cell["step"] for cell in cells)
    assert rest["seconds"][1] + sum(p["alone_s"] for p in parts) == pytest.approx(ours["seconds"][1])

    case, made = Case(tokens, 24, 16, 3, "fp32", 1), OpCounter(monkeypatch)
    layer = rivals.RIVALS["lotr_ext"](Tensors.random(case, torch.device("cpu")), case)
    layer.forward(torch.randn(tokens, 24, requires_grad=True)).sum().backward()
    assert sorted(made.elements()) == sorted(operators)


def test_it_refuses_a_slice_of_nothing():
    with pytest.raises(ValueError, match="slice: expected a positive number, got 0"):
        profile.arguments([*QUICK, "--slice", "0"])
