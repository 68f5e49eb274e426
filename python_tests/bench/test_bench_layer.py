"""The layer benchmark: rivals equal to float64, counted memory, results kept and gone on with, errors of one line."""

from __future__ import annotations

import json
import types

import pytest
import torch

from bench import compare, layer
from bench.measure import bounds, counted, session, shapes, store, timing
from bench.rivals import library as rivals_library
from bench.rivals import registry as rivals
from bench.rivals import truth
from bench.rivals.base import LORA, LOTR, VERA, Rival, Tensors

CPU = torch.device("cpu")
CASE = shapes.Case(24, 16, 12, 3, "fp32", 1)
NO_BIAS = CASE._replace(k=576, n=192)
QUICK = "--shapes 8x16x16x2 --dtypes fp32 --threads 1 --rounds 2 --slice 0.0005 --device cpu --allocator system".split()


def made(name: str, case: shapes.Case) -> tuple[Rival, truth.Truth]:
    tensors = Tensors.random(case, CPU)
    x, g = torch.randn(case.m, case.k).to(tensors.A.dtype), torch.randn(case.m, case.n).to(tensors.A.dtype)
    return rivals.RIVALS[name](tensors, case), truth.Truth(tensors, case, x, g)


@pytest.mark.parametrize("case", [CASE, CASE._replace(dtype="bf16"), NO_BIAS], ids=lambda case: case.name())
@pytest.mark.parametrize("name", rivals.DEFAULT)
def test_every_rival_equals_the_formula(name, case):
    rival, expected = made(name, case)
    assert set(rival.parameters) in (set(), set(LORA), set(LOTR), set(VERA))
    assert 0 < truth.check(rival, expected) <= truth.TOLERANCE[case.dtype]
    wrong = Rival("wrong", lambda x: rival.layer(x) * 1.1, rival.parameters)
    with pytest.raises(ValueError, match=r"wrong, .*relative error expected"):
        truth.check(wrong, expected)


@pytest.mark.parametrize("case", [CASE, NO_BIAS], ids=lambda case: case.name())
@pytest.mark.parametrize("name", rivals.MAGNITUDES)
def test_rivals_with_magnitudes_equal_the_formula(name, case):
    rival, expected = made(name, case)
    assert "magnitude" in rival.parameters and 0 < truth.check(rival, expected) <= truth.TOLERANCE["fp32"]
    rival.parameters["magnitude"][0].register_hook(lambda grad: grad * 1.01)
    with pytest.raises(ValueError, match="dmagnitude: relative error"):
        truth.check(rival, expected)


def test_a_wrong_gradient_alone_is_noticed():
    rival, expected = made("lora-in-place", CASE)
    rival.parameters["B"][0].register_hook(lambda grad: grad * 1.01)
    with pytest.raises(ValueError, match="dB: relative error"):
        truth.check(rival, expected)


def test_the_truth_is_the_specification():
    from lotr_ext import reference

    tensors = Tensors.random(CASE._replace(dtype="fp32"), CPU)
    x, g = torch.randn(CASE.m, CASE.k), torch.randn(CASE.m, CASE.n)
    expected = truth.Truth(tensors, CASE, x, g).of(rivals.RIVALS["lotr-eager"](tensors, CASE))
    t = {name: value.double() for name, value in vars(tensors).items() if value is not None}
    y = reference.forward(x.double(), t["weight"], t["bias"], t["A"], t["B"], t["core"], 2.0)
    grads = reference.backward(g.double(), x.double(), t["weight"], t["A"], t["B"], t["core"], 2.0)
    for name, value in {"y": y, "dx": grads.dx, "dA": grads.dA, "dB": grads.dB, "dcore": grads.dcore}.items():
        torch.testing.assert_close(expected[name], value)


def test_it_measures_keeps_and_resumes(tmp_path, capsys):
    names = "lora-eager,lora-in-place,lora-in-place-beta,lora-peft,vera-peft,lotr_ext"
    arguments = [*QUICK, "--results", str(tmp_path), "--rivals", names]
    assert layer.main(arguments) == 0
    assert "8x16x16 r2 fp32 t1" in capsys.readouterr().out
    path = tmp_path / "layer.jsonl"
    lines = path.read_text().splitlines()
    cells = [json.loads(line) for line in lines]
    assert [cell["rival"] for cell in cells] == [name for name in rivals.RIVALS if name in ["frozen", *names.split(",")]]
    for cell in cells:
        middle = {d: cell[d]["seconds"][1] for d in bounds.DIRECTIONS}
        assert max(middle["forward"], middle["backward"]) < middle["step"]
        assert cell["peak_bytes"] >= 4 * 8 * 16 * 2  # y and dx
        assert cell["step"]["of_bound"] > 0 and cell["ceilings"]["bytes_per_s"] > 0
        work = bounds.work(shapes.Case(**cell["case"]), "step", cell["rival"] != "frozen", cell["rival"] != "vera-peft")
        assert cell["step"]["flops_per_s"] * middle["step"] == pytest.approx(work.flops)
    assert all(cell["step"]["excess"] == [0, 0, 0] for cell in cells if cell["rival"] == "frozen")
    assert not (tmp_path / "excess.png").exists()  # drawn from 128 tokens on

    path.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:40])  # killed in the middle of the last line
    assert layer.main(arguments) == 0
    assert len(store.Store(path).read()) == 2 * len(lines) - 1
    capsys.readouterr()
    assert layer.main(arguments) == 0
    out = capsys.readouterr().out
    assert "1 of 1 cases are in" in out and "8x16x16 r2 fp32 t1" in out and "LoRA in-place, beta" in out  # kept and shown
    assert len(store.Store(path).read()) == 2 * len(lines) - 1


def test_a_rival_that_fails_is_named_and_the_others_are_measured(tmp_path, monkeypatch, capsys):
    def broken(tensors, case):
        rival = rivals.RIVALS["lora-eager"](tensors, case)
        return Rival("broken", lambda x: rival.layer(x) + 1, rival.parameters)

    monkeypatch.setitem(rivals.RIVALS, "broken", broken)
    assert layer.main([*QUICK, "--results", str(tmp_path), "--rivals", "broken,lotr_ext"]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "not measured: broken, 8x16x16 r2 fp32 t1: ValueError: broken" in out
    assert [cell["rival"] for cell in store.Store(tmp_path / "layer.jsonl").read()] == ["frozen", "lotr_ext"]


def test_it_refuses_what_is_not_here(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device: expected a GPU for cuda, found none"):
        layer.arguments(["--device", "cuda"])
    monkeypatch.setattr(rivals_library.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="lora-peft needs the package peft, which is not installed"):
        rivals.available(["lora-peft"])
    there, lines = rivals.installed(list(rivals.RIVALS))
    assert {"lora-peft", "dora-peft", "vera-peft", "lora-unsloth", "lora-lorafusion"} == set(rivals.RIVALS) - set(there)
    assert "vera-peft: left out, the package peft is not installed" in lines


def test_an_error_is_one_line(monkeypatch, capsys):
    def raises(error: BaseException):
        def main() -> int:
            raise error

        return main

    with pytest.raises(SystemExit, match=r"^bench.x: shapes: no$"):
        session.start("bench.x", raises(ValueError("shapes: no")))
    with pytest.raises(SystemExit, match=r"^bench.x: needs the package zzz, which is not installed \(pip install zzz\)$"):
        session.start("bench.x", raises(ModuleNotFoundError("No module", name="zzz")))
    with pytest.raises(SystemExit, match="interrupted; what was measured is kept"):
        session.start("bench.x", raises(KeyboardInterrupt()))


def test_unwritable_results_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="results: cannot write"):
        layer.main([*QUICK, "--results", str(tmp_path / "file" / "folder")])


def test_kernels_that_need_a_gpu_are_left_out_with_a_reason():
    assert rivals_library.obstacle("lora-unsloth", CASE, CPU) == "its kernels need a GPU"
    gpu = torch.device("cuda")
    assert rivals_library.obstacle("lora-unsloth", CASE, gpu) == "its kernel has no bias"
    assert rivals_library.obstacle("lora-unsloth", NO_BIAS, gpu) is None
    assert rivals_library.obstacle("lora-lorafusion", CASE, gpu) == "its kernels take bf16 and fp16"
    options = layer.arguments(["--device", "cpu", "--threads", "1"])
    found = layer.rivals_of(shapes.Case(*shapes.TARGETS[0], "fp32", 1), options)
    assert set(found) == {*rivals.DEFAULT, "lora-compiled", *rivals.MAGNITUDES} and len(found) == len(set(found))
    assert layer.rivals_of(CASE, options) == rivals.DEFAULT


@pytest.mark.parametrize("settle", [False, True])
def test_interleaving_draws_the_order_and_counts_rounds(settle):
    seen = []
    calls = [timing.Timed([lambda _, i=i: seen.append(i)]) for i in range(3)]
    clock = timing.Clock(CPU, "wall")
    times = timing.interleave(calls, clock, rounds=8, slice_s=0.0, settle=settle)
    assert [[len(stage) for stage in stages] for stages in times] == [[8], [8], [8]]
    seen = seen[6:]  # after one call to warm up and one to size each
    if settle:
        assert seen[::2] == seen[1::2]
        seen = seen[::2]
    rounds = [tuple(seen[3 * i : 3 * i + 3]) for i in range(8)]
    assert all(set(order) == {0, 1, 2} for order in rounds) and len(set(rounds)) > 3
    followers = {order[order.index(0) + 1] for order in rounds if order[-1] != 0}
    assert followers == {1, 2}


def test_stages_hand_over_and_are_timed_apart(monkeypatch):
    now = iter([0.0, 1.0, 4.0, 10.0, 12.0, 15.0])
    clock, seen = timing.Clock(CPU, "wall"), []
    monkeypatch.setattr(clock, "read", lambda: next(now))
    timed = timing.Timed((lambda state: seen.append(state) or "y", seen.append), lambda: seen.append("prepare"))
    assert clock.seconds(timed, 2) == [1.5, 3.0]
    assert seen == ["prepare", None, "y"] * 2


def test_events_are_recorded_without_synchronising_between_stages(monkeypatch):
    """The GPU clock against a GPU that only writes down what it is told."""
    log: list[str] = []

    class Event:
        made = 0

        def __init__(self, enable_timing: bool):
            assert enable_timing
            Event.made += 1
            self.number = Event.made

        def record(self) -> None:
            log.append("event")

        def elapsed_time(self, other: Event) -> float:
            return 1000.0 * (other.number - self.number) * (2 if self.number % 3 == 2 else 1)

    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("queue"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("synchronise"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(L2_cache_size=1 << 20))
    monkeypatch.setattr(torch, "zeros", lambda *size, **options: None)
    monkeypatch.setattr(timing.Clock, "cool", lambda self: log.append("flush"))
    clock = timing.Clock(gpu, "events")
    timed = timing.Timed((lambda _: log.append("forward"), lambda _: log.append("backward")), lambda: log.append("prepare"))
    assert clock.seconds(timed, 2) == [1.0, 2.0]
    once = ["prepare", "flush", "queue", "event", "forward", "event", "backward", "event"]
    assert log == [*once, *once, "synchronise"]
    log.clear()
    timing.Clock(gpu, "wall").seconds(timed, 1)
    assert log == ["prepare", "flush", "synchronise", "forward", "synchronise", "backward", "synchronise"]


def test_an_interrupted_run_keeps_what_it_has_and_goes_on(tmp_path, monkeypatch, capsys):
    arguments = [*QUICK, "--rivals", "lotr_ext", "--results", str(tmp_path)]
    arguments[1] = "8x16x16x2,9x16x16x2,10x16x16x2"
    measure, begun = layer.measure, []

    def interrupted(case, names, session):
        begun.append(case.m)
        if case.m == 9:
            raise KeyboardInterrupt
        return measure(case, names, session)

    monkeypatch.setattr(layer, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        layer.main(arguments)
    assert [cell["case"]["m"] for cell in store.Store(tmp_path / "layer.jsonl").read()] == [8, 8]
    monkeypatch.setattr(layer, "measure", lambda case, names, session: begun.append(case.m) or measure(case, names, session))
    assert layer.main(arguments) == 0 and begun == [8, 9, 9, 10]
    assert "1 of 3 cases are in" in capsys.readouterr().out


def test_memory_that_is_not_there(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(layer, "free_bytes", lambda device: 60000)
    arguments = [*QUICK, "--rivals", "lotr_ext", "--results", str(tmp_path)]
    arguments[1] = "8x16x16x2,9999x16x16x2"
    assert layer.main(arguments) == 1
    assert "not measured: 9999x16x16 r2 fp32 t1: needs about" in capsys.readouterr().out
    assert {cell["case"]["m"] for cell in store.Store(tmp_path / "layer.jsonl").read()} == {8}

    def exhausted(case, names, session):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried\nmuch")

    monkeypatch.setattr(layer, "measure", exhausted)
    assert layer.main([*arguments, "--fresh"]) == 1
    assert "8x16x16 r2 fp32 t1: OutOfMemoryError: CUDA out of memory. Tried\n" in capsys.readouterr().out


@pytest.mark.full
@pytest.mark.parametrize("name", ["lora-compiled", *rivals.COMPILED])
def test_the_compiled_rivals_equal_the_formula(name):
    rival, expected = made(name, CASE)
    assert truth.check(rival, expected) <= truth.TOLERANCE["fp32"]


def test_peak_memory_is_counted():
    def call() -> None:
        a = torch.empty(1000)
        b = torch.empty(500)
        del a
        c = torch.empty(200)
        del b, c

    call()
    assert counted.peak_bytes(call, CPU) == pytest.approx(6000, abs=256)  # the allocator rounds up
    assert counted.allocated_bytes(call, CPU) == pytest.approx(6800, abs=384)


def test_bytes_kept_for_backward_leave_out_parameters():
    for name, kept in (("lora-eager", 24 * (16 + 3)), ("lotr_ext-composite", None), ("vera-peft", None)):
        rival, expected = made(name, CASE)
        got = truth.saved_bytes(rival, expected.t, expected.x)
        assert got == 4 * kept if kept else got >= 4 * 24 * 3


def test_least_work():
    case = shapes.Case(4, 8, 6, 2, "bf16", 1)
    assert bounds.work(case, "forward", False) == (2 * 4 * 8 * 6, 2 * (4 * 8 + 8 * 6 + 4 * 6))
    assert bounds.work(case, "backward", True) == (2 * 4 * 8 * 6 + 4 * 4 * 2 * 14, 2 * (4 * 6 + 8 * 6 + 4 * 8 + 4 * 8 + 4 * 14))
    step, frozen = bounds.work(case, "step", True), bounds.work(case, "step", False)
    assert step.flops / frozen.flops == pytest.approx(1 + case.extra_flops())
    assert step.least_seconds({"flops_per_s": 1.0, "bytes_per_s": 1e9}) == step.flops
    # A and B frozen: no dA and dB, and u instead of x
    assert bounds.work(case, "forward", True, trained=False) == bounds.work(case, "forward", True)
    frozen = bounds.work(case, "backward", True, trained=False)
    assert frozen == (2 * 4 * 8 * 6 + 2 * 4 * 2 * 14, 2 * (4 * 6 + 8 * 6 + 4 * 8 + 2 * 14 + 4 * 2))
    assert bounds.work(case, "step", True, trained=False) == frozen + bounds.work(case, "forward", True)
    with pytest.raises(ValueError, match="direction: expected one of"):
        bounds.work(case, "sideways", True)


def test_extra_flops_are_three_r_over_k():
    assert shapes.Case(2048, 768, 768, 16, "fp32", 1).extra_flops() == pytest.approx(3 * 16 / 768)


def test_default_shapes_are_those_that_fit():
    everything = shapes.candidates("cpu")
    assert everything[:4] == shapes.TARGETS and len(set(everything)) == len(everything)
    assert {(m, k, n, r) for m in shapes.TOKENS for _, _, k, n, _ in shapes.LAYERS for r in shapes.RANKS} <= set(everything)
    cases = [shapes.Case(m, 8, 8, 1, "fp32", 1) for m in (50, 5, 50, 7)]
    assert [case.m for case in shapes.within(cases, 65, lambda case: case.m)] == [50, 5, 7]
    assert [case.m for case in shapes.within(cases, 1, lambda case: case.m)] == [50]


def test_compare_flags_what_left_the_spread():
    def cell(rival: str, low: float, middle: float, high: float) -> dict:
        return {"case": CASE._asdict(), "rival": rival, "step": {"excess": [low, middle, high]}}

    old = [cell("lotr_ext", 0.10, 0.11, 0.12), cell("lora-eager", 0.20, 0.21, 0.22), cell("frozen", 0, 0, 0)]
    new = [cell("lotr_ext", 0.13, 0.14, 0.15), cell("lora-eager", 0.21, 0.23, 0.24), cell("frozen", 0, 0, 0)]
    assert [row[-1] for row in compare.compare(old, new)] == ["slower", ""]
    assert [row[-1] for row in compare.compare(new, old)] == ["faster", ""]


def test_compare_as_a_program(tmp_path, capsys):
    old, new = tmp_path / "old.jsonl", tmp_path / "new.jsonl"
    for path, excess in ((old, 0.1), (new, 0.2)):
        cell = {"case": CASE._asdict(), "rival": "lotr_ext", "step": {"excess": [excess, excess, excess]}}
        path.write_text(json.dumps(cell) + "\n")
    assert compare.main([str(old), str(new)]) == 1 and "1 of 1 measurements of lotr_ext are slower" in capsys.readouterr().out
    assert compare.main([str(new), str(old)]) == 0
    with pytest.raises(FileNotFoundError, match="expected a result file"):
        compare.main([str(old), str(tmp_path / "none")])
    with pytest.raises(ValueError, match="expected two result files, got 1"):
        compare.main([str(old)])
    step = {"step": {"excess": [0, 0, 0]}}
    cells = [{"case": CASE._asdict() | {"m": m}, "rival": r} | step for m in (1, 2) for r in ("lora-eager", "lotr_ext-beta")]
    with open(old, "a") as file:
        file.writelines(json.dumps(cell) + "\n" for cell in cells)
    capsys.readouterr()
    assert compare.main([str(new), str(old)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert f"only in {new}: 0 cells, 0 of lotr_ext; only in {old}: 4 cells, 2 of lotr_ext" in out
    for other in ([], cells[:1]):  # none at all, and one of eager LoRA alone
        new.write_text("".join(json.dumps(cell) + "\n" for cell in other))
        with pytest.raises(ValueError, match=r"new\.jsonl: expected a case of lotr_ext that both have, found none"):
            compare.main([str(old), str(new)])
