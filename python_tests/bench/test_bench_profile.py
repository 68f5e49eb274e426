"""The profile of a layer names each product that it makes, and its parts and the rest are the whole."""

from __future__ import annotations

import pytest
import torch

from bench import profile
from bench.measure.store import Store
from nets import OpCounter

QUICK = ["--device", "cpu", "--allocator", "system", "--threads", "1", "--rounds", "1", "--slice", "0.0001"]
MANY = ["shrink", "fold", "expand_add_", "shrink_grad_", "fold_grad", "expand_add_", "factor_grad_"]


@pytest.mark.parametrize(("tokens", "operators"), [(160, MANY), (8, [])])
def test_its_operators_are_those_that_the_layer_runs(tokens, operators, tmp_path, capsys, monkeypatch):
    from bench.measure.shapes import Case
    from bench.rivals import registry as rivals
    from bench.rivals.base import Tensors

    assert profile.main([*QUICK, "--dtypes", "fp32", "--shapes", f"{tokens}x24x16x3", "--results", str(tmp_path)]) == 0
    cells = Store(tmp_path / "profile.jsonl").read()
    named = [cell["rival"].split(":")[0] for cell in cells]
    assert named == ["frozen", "lotr_ext", *operators, "rest"]
    _, ours, *parts, rest = (cell["step"] for cell in cells)
    assert rest["seconds"][1] + sum(p["alone_s"] for p in parts) == pytest.approx(ours["seconds"][1])

    case, made = Case(tokens, 24, 16, 3, "fp32", 1), OpCounter(monkeypatch)
    layer = rivals.RIVALS["lotr_ext"](Tensors.random(case, torch.device("cpu")), case)
    layer.layer(torch.randn(tokens, 24, requires_grad=True)).sum().backward()
    assert sorted(made.elements()) == sorted(operators or ["small_backward", "small_forward"])


def test_a_case_that_fails_is_named_and_what_is_kept_is_shown(tmp_path, capsys, monkeypatch):
    arguments = [*QUICK, "--dtypes", "fp32", "--shapes", "8x16x16x2,9x16x16x2", "--results", str(tmp_path)]
    right = profile.measure

    def fails(case, session):
        if case.m == 8:
            raise RuntimeError("no\nmore")
        return right(case, session)

    monkeypatch.setattr(profile, "measure", fails)
    assert profile.main(arguments) == 1
    assert "not measured: 8x16x16 r2 fp32 t1: RuntimeError: no\n" in capsys.readouterr().out
    assert {cell["case"]["m"] for cell in Store(tmp_path / "profile.jsonl").read()} == {9}
    assert profile.main(arguments) == 1
    assert "9x16x16 r2 fp32 t1: extra FLOPs" in capsys.readouterr().out
