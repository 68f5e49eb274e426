"""The model of gemm_lotr against the executor's tickets and sums by hand; the program that measures it, its kernel by torch."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

from bench import fused as program
from bench import layer
from bench.measure import shapes
from bench.measure.as_cuda import as_cuda
from bench.measure.bounds import Work
from bench.projection import fused
from bench.projection.assumptions import LEVELS
from bench.projection.cards import CARDS
from bench.projection.layer import Step
from bench.projection.layer_time import library_seconds
from bench.rivals import registry
from bench.rivals.base import LOTR, Tensors
from lotr_ext import explain


def test_tickets_are_the_kernels() -> None:
    from bench.projection.counts import executor

    lib = executor()
    for bands, columns, scouts, group in [(5, 3, 2, 2), (1, 1, 1, 8), (14, 4, 14, 3), (9, 2, 4, 8)]:
        mine = list(fused.Tickets(bands, columns, scouts, group, 1).each())
        flat = [(ticket, *piece) for ticket, pieces in enumerate(mine) for piece in pieces]
        assert flat == lib.gemm_lotr_tickets(bands, columns, scouts, group)
    for m, outer, r, sms in [
        (8192, 4096, 16, 132),
        (2048, 4096, 16, 132),
        (100, 520, 100, 132),
        (700, 1000, 64, 20),
        (1, 1, 1, 2),
    ]:
        t = fused.Tickets.planned(m, outer, r, sms)
        assert (t.cluster, t.scouts, t.band_group) == lib.gemm_lotr_plan(m, outer, r, sms)


def test_makespan_by_hand() -> None:
    """Two workers, two bands of two columns, ten k-steps a tile."""
    tickets = fused.Tickets(2, 2, 1, 8, 1)
    assert fused.makespan(tickets, 2, 10, 0.0, None) == (24.0, 0.0)  # two tiles each
    # the scout's ticket takes 2 (10 / 5 + 1/2) = 5 k-steps, then three tiles beside one: 5 + 2 (10 + 1 + 2) and 26
    assert fused.makespan(tickets, 2, 10, 1.0, 0.2) == (31.0, 0.0)
    # a scout that takes 2 (10 + 1/2) = 21: the first tiles wait for their bands' from 10 to 10.5 and to 21
    end, waits = fused.makespan(tickets, 3, 10, 1.0, 1.0)
    assert waits == pytest.approx(0.5 + 11.0) and end == pytest.approx(34.0)
    assert fused.makespan(tickets, 2, 10, 0.0, None, main_loop=0.5) == (44.0, 0.0)  # twenty k-steps of the library's


def test_what_the_model_says() -> None:
    """Few per cent over the base product at best, and 80 to 93 % of the library's speed needed."""
    for m, k, n, r in fused.SHAPES:
        for inner, outer in ((k, n), (n, k)):
            low, found, high = (
                fused.model(m, inner, outer, r, "h100", backward=outer == k, assumed=assumed) for assumed in LEVELS.values()
            )
            assert 0 < low.adds < found.adds < high.adds < found.beta and low.adds < 0.025 and 0.8 < found.may_stay < 0.93
            assert found.seconds == pytest.approx((1 + found.adds) * found.base_seconds) and found.waves > 1
            assert 3000 < found.l2_bytes_a_clock < fused.L2_ALL
    plain = dataclasses.replace(LEVELS["low"], bandwidth=0.9, fences=0.0)
    beta = fused.beta_adds(8192, 4096, 4096, 16, CARDS["h100"], plain)
    assert beta == pytest.approx(2 * (67.1e6 / (0.9 * 3.35e12) + plain.launch), rel=0.01)  # and u, and the factor
    shown = fused.beta_adds(8192, 4096, 4096, 16, CARDS["h100"], dataclasses.replace(plain, exposed=0.5, fences=1e-6))
    assert shown - beta == pytest.approx(1e-6 + 0.5 * 67.1e6 / (0.9 * 3.35e12), rel=0.01)
    assert fused.hopper() == ["h100", "h200"]
    with pytest.raises(ValueError, match=r"gpu: expected one of compute capability 9\.0 .*got 'a100'"):
        fused.model(8, 8, 8, 8, "a100")
    with pytest.raises(ValueError, match="r: expected 1 to 128, got 129"):
        fused.model(8, 8, 8, 129, "h100")


def test_sums_of_Q_come_last() -> None:
    """In the model as in the kernel: a ticket for each cluster's k-steps, after the tiles and all scouts."""
    from bench.projection.counts import executor

    mine = list(fused.Tickets(3, 2, 2, 8, 1, sums=4).each())
    flat = [(ticket, *piece) for ticket, pieces in enumerate(mine) for piece in pieces]
    assert flat == executor().gemm_lotr_tickets(3, 2, 2, 8, 4)
    tickets = dataclasses.replace(fused.Tickets(2, 2, 1, 8, 1), sums=1)
    assert fused.Tickets.planned(8192, 4096, 16, 132, 65).sums == 33
    # as by hand above, and then the sums' half a k-step by the worker that is free at 26, until 26.5; not the last to end
    assert fused.makespan(tickets, 2, 10, 1.0, 0.2, 0.5) == (31.0, 0.0)
    assert fused.makespan(tickets, 2, 10, 1.0, 0.2, 9.0) == (35.0, 0.0)


def test_Q_pays_up_to_rank_32() -> None:
    """What the scouts' sums add at low assumptions, against one more read of g in its own launch. At 32 the kernel has no
    registers for it."""
    low = LEVELS["low"]
    for m, k, n, r in [*fused.SHAPES, (8192, 4096, 4096, 32)]:
        alone, both = (fused.model(m, n, k, r, "h100", True, with_Q, low).seconds for with_Q in (False, True))
        read = library_seconds(Step("read of g", Work(0, 2 * m * n)), CARDS["h100"], low) + low.launch
        assert (both - alone < read / 2) == (r <= 32), (m, k, n, r, both - alone, read)
        kernels = fused.model(m, n, k, r, "h100", backward=True, assumed=low).seconds
        assert kernels == (both if r <= 16 else alone)


def test_scouts_fit_the_last_wave() -> None:
    """At 2,048 tokens, two waves with four idle places of clusters: as many scouts cost next to nothing, eight a third wave."""
    planned = fused.Tickets.planned(2048, 4096, 16, 132)
    assert planned.scouts == 4 and fused.model(2048, 4096, 4096, 16, "h100", assumed=LEVELS["low"]).adds < 0.015
    more = dataclasses.replace(planned, scouts=8)
    plain, (four, _), (eight, _) = (
        fused.makespan(planned, 66, 64, 0.0, None)[0],
        *(fused.makespan(t, 66, 64, 0.35, 0.3) for t in (planned, more)),
    )
    assert four / plain < 1.02 and eight / plain > 1.15


def test_the_plan(capsys) -> None:
    assert program.main(["--dry-run"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "not measured" in out and out.count("y, bf16") == out.count("dx, bf16") == 4 and "8192 x 4096 x 14336, 16" in out


def fake(x, weight, bias, At, F, backward, wrong: float = 0.0):
    y = (x @ (weight if backward else weight.T)).float() + (x @ At.T).float() @ F.float().T
    return y.to(x.dtype) + wrong, None


@pytest.fixture
def on_a_cpu(monkeypatch, tmp_path):
    """The program with the kernel's sums by torch, on small shapes."""
    monkeypatch.setattr(torch.ops.lotr, "gemm_lotr", fake, raising=False)
    options = program.arguments(["--dry-run", "--shapes", "64x32x48x8"])
    options.device, options.clock, options.rounds, options.dry_run = "cpu", "wall", 2, False
    options.results, options.dtypes = str(tmp_path), ["bf16"]
    monkeypatch.setattr(program, "arguments", lambda argv: options)
    return tmp_path


def test_it_measures(on_a_cpu, capsys) -> None:
    assert program.main([]) == 0
    cells = [json.loads(line) for line in (on_a_cpu / "fused.jsonl").read_text().splitlines()]
    assert [c["rival"] for c in cells] == 2 * [program.FLOOR, program.BARE, program.FUSED, program.BETA]
    assert {c["case"]["direction"] for c in cells} == {"y", "dx"} and all(c["error"] < 0.02 for c in cells)
    assert (
        cells[0]["must_reach"] is None and program.must_reach(program.FusedCase(*fused.SHAPES[0], "y", "bf16", 1), "H100") < 1
    )
    assert "64 x 32 x 48, 8" in capsys.readouterr().out
    assert program.main([]) == 0 and "are in" in capsys.readouterr().out  # and not again


def test_a_wrong_kernel_is_not_timed(on_a_cpu, monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.ops.lotr, "gemm_lotr", lambda *a: fake(*a, wrong=0.1))
    assert program.main([]) == 1 and "relative error expected" in capsys.readouterr().out


def test_the_rival_of_bench_layer(monkeypatch) -> None:
    """lotr_ext-fused among the rivals of a Hopper GPU and of none before it; its layer takes it in both directions."""
    case = shapes.Case(256, 64, 48, 8, "bf16", 1)
    options = SimpleNamespace(rivals=["frozen"], chosen=False, quick=False, device="cuda", autotune=False)
    monkeypatch.setattr(torch.ops.lotr, "gemm_lotr", None, raising=False)  # of a build for 90a
    monkeypatch.setattr(torch.ops.lotr, "gemm_lotr_refusal", lambda x, weight, r, backward: "", raising=False)
    with as_cuda((8, 0)):
        assert "lotr_ext-fused" not in layer.rivals_of(case, options)
    with as_cuda() as device:
        assert "lotr_ext-fused" in layer.rivals_of(case, options)
        assert "lotr_ext-fused" not in layer.rivals_of(case._replace(dtype="fp32"), options)
        rival = registry.RIVALS["lotr_ext-fused"](Tensors.random(case, device), case)
        x = torch.empty(case.m, case.k, device=device, dtype=torch.bfloat16, requires_grad=True)
        assert rival.name == "lotr_ext fused" and explain(rival.layer, x).strategy == "fused"
        y = rival.layer(x)
        y.backward(gradient=torch.empty_like(y))
        assert x.grad.shape == x.shape and {n for n, (p, _) in rival.parameters.items() if p.grad is not None} == {*LOTR}
