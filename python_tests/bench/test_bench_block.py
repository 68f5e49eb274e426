"""The block benchmark: every rival equals the formula in float64, the sums of siblings come out, results are kept and shown."""

from __future__ import annotations

import re

import pytest
import torch

from bench import block
from bench.measure.store import Store
from bench.report.block_table import block_table
from bench.rivals import block as rb

CPU = torch.device("cpu")
QUICK = "--device cpu --allocator system --threads 1 --rounds 1 --dtypes fp32 --ranks 3 --models tiny".split()


@pytest.mark.parametrize("m", [1, 40, 4096])
@pytest.mark.parametrize("rival", rb.RIVALS)
def test_every_rival_equals_the_formula(rival, m):
    if rival == "lora-peft":
        pytest.importorskip("peft")
    error, plain = rb.errors(rival, rb.BlockCase("tiny", m, 3, "fp32", 1), CPU)
    assert 0 < error < 5e-6 and error <= 2 * plain + 2e-7


def test_a_wrong_rival_is_named_and_the_others_are_measured(tmp_path, monkeypatch, capsys):
    label, make = rb.RIVALS["lora-stacked"]

    def wrong(case, values):
        made = make(case, values)
        made.trained["k.B"].register_hook(lambda grad: 1.01 * grad)
        return made

    monkeypatch.setitem(rb.RIVALS, "lora-stacked", (label, wrong))
    arguments = [*QUICK, "--tokens", "8", "--rivals", "lora-stacked,lotr_ext", "--results", str(tmp_path)]
    assert block.main(arguments) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "not measured: lora-stacked, tiny block, 8 tokens r3 fp32 t1: ArithmeticError: relative error expected" in out
    assert [cell["rival"] for cell in Store(tmp_path / "block.jsonl").read()] == ["frozen", "lotr_ext"]


def test_all_rivals_train_as_many_parameters_as_their_kind():
    case = rb.BlockCase("tiny", 8, 3, "fp32", 1)
    rivals = {name: make for name, (_, make) in rb.RIVALS.items() if name != "lora-peft"}
    count = {name: sum(p.numel() for p in make(case, rb.Values(case, CPU)).trained.values()) for name, make in rivals.items()}
    lora = sum(3 * sum(case.sizes.of(name)) for name in rb.NAMES)
    shapes = {case.sizes.of(name) for name in rb.NAMES}
    lotr = sum(3 * (k + n) for k, n in shapes) + 9 * len(rb.NAMES)
    assert count == {name: {"froz": 0, "lora": lora, "lotr": lotr}[name[:4]] for name in count}


def test_with_siblings_off_each_layer_gets_an_input_of_its_own():
    case = rb.BlockCase("tiny", 8, 3, "fp32", 1)
    for rival, objects in (("lotr_ext", 1), ("lotr_ext-unshared", 3)):
        made, seen = rb.RIVALS[rival][1](case, rb.Values(case, CPU)), []
        for name in rb.QKV:
            made.linear(name).register_forward_pre_hook(lambda module, inputs, seen=seen: seen.append(inputs[0]))
        made(torch.randn(8, 32))
        assert len({id(x) for x in seen}) == objects and len(seen) == 3
        assert all(torch.equal(x, seen[0]) for x in seen)


def test_it_measures_keeps_and_resumes(tmp_path, capsys):
    arguments = [*QUICK, "--tokens", "8,16", "--rivals", "lora-eager,lotr_ext", "--results", str(tmp_path)]
    assert block.main(arguments) == 0
    cells = Store(tmp_path / "block.jsonl").read()
    assert [(c["case"]["m"], c["rival"]) for c in cells] == [
        (m, rival) for m in (8, 16) for rival in ("frozen", "lora-eager", "lotr_ext")
    ]
    for c in cells:
        assert c["forward"]["seconds"][1] < c["step"]["seconds"][1] and c["peak_bytes"] > 0
        assert "eager" not in c and "graph" not in c  # forms of a GPU
    text = block_table(cells, {})
    assert text.startswith("`python -m bench.block --models tiny --tokens 8,16 --ranks 3 --dtypes fp32 ")
    assert text.count("\n| **lotr_ext** |") == 2 and "as CUDA graphs" not in text
    on_a_gpu = [c | {form: {"step": c["step"] | {"excess": [0.1, 0.25, 0.3]}} for form in ("eager", "graph")} for c in cells]
    heads, _, *rows = block_table(on_a_gpu, {}).split("\n")[2:7]
    assert "| as CUDA graphs |" in heads and all("| 25.0% | 25.0% |" in row for row in rows)
    capsys.readouterr()
    assert block.main(arguments) == 0
    out = capsys.readouterr().out
    assert "2 of 2 cases are in" in out and re.search(r"^ *lotr_ext +\d+ us", out, re.MULTILINE)
    assert len(Store(tmp_path / "block.jsonl").read()) == len(cells)
