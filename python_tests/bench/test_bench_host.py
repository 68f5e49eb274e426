"""The benchmark of host time: its stacks compute the same, its counts count, its targets are those of the issue."""

from __future__ import annotations

import pytest
import torch

from bench import host, targets
from bench.measure import host_calls
from bench.measure.as_cuda import META, as_cuda
from bench.measure.store import Store
from bench.measure.timing import Timed
from bench.report import host_table
from bench.rivals import host as rh
from lotr_ext import explain
from lotr_ext.ops import planner

QUICK = ["--device", "cpu", "--allocator", "system", "--rounds", "2", "--layers", "3", "--tokens", "2"]


def test_it_measures_every_way_of_ours(tmp_path, capsys):
    arguments = [*QUICK, "--results", str(tmp_path)]
    assert host.main(arguments) == 0
    cells = Store(tmp_path / "host.jsonl").read()
    found = {(c["case"]["form"], c["rival"]): c for c in cells}
    for form in rh.FORMS:
        assert {rival for where, rival in found if where == form} == {n for n in rh.RIVALS if form in rh.RIVALS[n].forms}
    for (_, rival), cell in found.items():
        both = cell["forward"]["seconds"][1] + cell["backward"]["seconds"][1]
        assert both == pytest.approx(cell["step"]["seconds"][1], rel=0.5)  # medians of two rounds
        assert (cell["error"] is not None) == rh.RIVALS[rival].is_lotr and (cell["error"] or 0) < 1e-4
        own = cell["counts"]["forward"]["own"] + cell["counts"]["backward"]["own"]
        assert (own > 0) == rival.startswith("lotr_ext")
    for rival, like in ((rh.ALONE, rh.LOTR_OWN), (rh.SHARED, rh.LOTR), (rh.LOTR, rh.LOTR), (rh.LOTR_OWN, rh.LOTR_OWN)):
        assert rh.RIVALS[rival].like == like
    assert found["chained", rh.LOTR]["step"]["of_lotr"] == [1, 1, 1] == found["chained", rh.LORA]["step"]["of_lora_excess"]
    frozen = found["chained", "frozen"]["counts"]
    assert frozen["forward"]["operators"] == 2 and frozen["backward"]["operators"] == pytest.approx(2 + 1 / 3)  # t, mm; x.grad
    capsys.readouterr()
    assert host.main(arguments) == 0
    assert "2 of 2 cases are in" in capsys.readouterr().out
    assert (tmp_path / "host.png").stat().st_size > 10000
    heads, rows = host_table.host_rows(cells)
    assert heads == ["", "2 tokens, chained", "2 tokens, q, k, v"]
    assert [row[0] for row in rows] == [
        f"**{r.label}**" if name.startswith("lotr_ext") else r.label for name, r in rh.RIVALS.items()
    ]
    heads, rows = host_table.count_rows(cells)
    assert heads[0] == "2 tokens, chained" and rows[0][:3] == ["frozen", "0 + 0", "1 + 2"]
    assert rows[0][3:] == (["0 + 0", "1 + 2"] if planner.build_info()["cuda"]["built"] else ["-", "-"])
    text = host_table.host_table(cells, {"host": "a.png"})
    assert text.startswith("`python -m bench.host --tokens 2 --layers 3 --rounds 2") and "](a.png)" in text
    assert "medians of 2 interleaved rounds" in text and text.count("\n| **lotr_ext, one pair** |") == 1


def test_a_wrong_layer_loses_its_case(tmp_path, monkeypatch, capsys):
    right = rh._set_values

    def wrong(layers, tensors):
        right(layers, tensors)
        layers[0].core.data.mul_(1.01)

    monkeypatch.setattr(rh, "_set_values", wrong)
    assert host.main([*QUICK, "--forms", "chained", "--results", str(tmp_path)]) == 1
    assert "ArithmeticError: lotr_ext: y, dx: relative error expected <= 0.0001" in capsys.readouterr().out


def test_gradients_are_dropped_between_steps():
    tensors = rh.values(host.HostCase("chained", 3, 2, 8, 2, "fp32", 1).layer(), 3, torch.device("cpu"))
    for name, rival in rh.RIVALS.items():
        stack = rh.stack(name, tensors, host.HostCase("chained", 3, 2, 8, 2, "fp32", 1).layer(), "chained")
        x = torch.randn(2, 8, requires_grad=True)
        step = host.step_of(stack, x, torch.randn(2, 8))
        step.stages[1](step.stages[0](None))
        trained = [p for p in stack.parameters() if p.requires_grad]
        shared = name in (rh.LOTR, rh.SHARED, rh.IN_MODEL)
        expected = 0 if name == rh.FLOOR else 2 + 3 if shared else 3 * (3 if rival.is_lotr else 2)
        assert len(trained) == expected and all(p.grad is not None for p in trained), name
        step.prepare()
        assert x.grad is None and all(p.grad is None for p in trained), name


def test_calls_are_counted():
    def inner() -> None:
        pass

    def stage(state):
        inner()
        inner()
        return torch.ones(2) + 1 if state is None else None

    counts = host_calls.count_step(Timed((stage, stage)), 2)
    assert counts["forward"] == {"calls": 1.5, "own": 0, "operators": 1, "dispatched": 1}  # stage, inner, inner; ones, add
    assert counts["backward"] == {"calls": 1.5, "own": 0, "operators": 0, "dispatched": 0}


@pytest.mark.skipif(not planner.build_info()["cuda"]["built"], reason="lotr_ext was built without CUDA kernels")
def test_what_looks_like_cuda_takes_the_path_on_cuda():
    case = host.HostCase("chained", 3, 160, 32, 8, "fp32", 1)
    found = host.counts_on_cuda(case, list(rh.RIVALS))
    for name, rival in rh.RIVALS.items():
        assert (found[name]["forward"]["own"] > 0) == name.startswith("lotr_ext"), rival.label
    assert found["frozen"]["forward"]["dispatched"] == 1 and found[rh.LOTR]["forward"]["dispatched"] == 7
    x, meta = torch.empty(160, 32, device="meta"), rh.values(case.layer(), 3, META)
    layer = rh.stack(rh.SHARED, meta, case.layer(), "chained").layers[0]
    assert not explain(layer, x).kernels
    with as_cuda():
        assert x.device == torch.device("cuda", 0) and x.is_cuda and not x.is_meta and not x.is_cpu
        assert torch.zeros(2, device=x.device).is_cuda and torch.zeros(2).device.type == "cpu"
        assert explain(layer, x).kernels and "cuda" in explain(layer, x).reason
    assert x.device == META and not explain(layer, x).kernels
    with as_cuda((7, 5)):
        assert not explain(layer, x).kernels and "got 7.5" in explain(layer, x).reason


def test_backward_runs_on_what_looks_like_cuda():
    seen = []

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, g):
            seen.append((g.device, torch.zeros(1, device=g.device).is_cuda))
            return g

    x = torch.empty(2, device="meta", requires_grad=True)
    with as_cuda():
        Node.apply(x).backward(torch.empty(2, device="meta"))
        assert x.grad.is_cuda
    assert seen == [(torch.device("cuda", 0), True)]


def _cell(rival: str, m: int, of_lotr: float, of_lora: float) -> dict:
    case = {"form": "chained", "layers": 24, "m": m, "k": 32, "r": 8, "dtype": "fp32", "threads": 1}
    step = {"of_lotr": [of_lotr] * 3, "of_lora_excess": [of_lora] * 3}
    return {"case": case, "rival": rival, "label": rh.RIVALS[rival].label, "step": step}


@pytest.mark.parametrize(
    ("rival", "m", "of_lotr", "of_lora", "met"),
    [
        (rh.SHARED, 160, 1.0, 2.0, ["yes"]),
        (rh.SHARED, 160, 1.01, 0.1, ["no"]),
        (rh.IN_MODEL, 16, 1.0, 0.9, ["yes", "yes"]),
        (rh.IN_MODEL, 1, 0.5, 0.91, ["yes", "no"]),
        (rh.ALONE, 160, 0.7, 2.0, ["yes"]),
        (rh.ALONE, 160, 0.71, 0.1, ["no"]),
        (rh.LORA, 1, 9.0, 9.0, []),
    ],
)
def test_the_targets(rival, m, of_lotr, of_lora, met):
    assert [verdict.met for verdict in targets.host_verdicts([_cell(rival, m, of_lotr, of_lora)])] == met
