"""bench.transfer: what its pairs, forms, search and tables compute."""

from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pandas as pd
import pytest
import torch
import zoo
from helpers import relative
from safetensors.torch import load_file
from torch import Tensor, nn

from bench import common, donors, forms, transfer
from bench.problems import TASKS, PlainText


def projector(columns: Tensor) -> Tensor:
    return columns @ columns.mT


@pytest.mark.parametrize(("group_by", "members"), [("layer", 1), ("block", 2), ("shape", 4)])
def test_a_pair_spans_the_leading_directions_of_its_group(group_by: str, members: int) -> None:
    """The pair of the first layer holds as much of its group's matrices as an exact SVD's.

    There are matrices of three donors and four layers, two of each block.
    """
    names = [f"layers.{i}.{kind}_proj" for i in (0, 1) for kind in "qk"]
    decay = 0.5 ** torch.arange(12.0)  # so that a few directions lead
    matrices = torch.randn(3, 4, 20, 12) * decay @ torch.randn(3, 4, 12, 12)
    pairs = donors.leading_pairs([dict(zip(names, m)) for m in matrices], group_by, 4)
    assert len({id(A) for A, _ in pairs.values()}) == len(names) // members
    A, B = pairs[names[0]]
    group = matrices[:, :members].double()
    inputs = group.flatten(0, 2).mT  # [12, all rows]
    outputs = group.movedim(2, 0).flatten(1)  # [20, all columns]
    for factor, columns in ((A.double(), inputs), (B.double(), outputs)):
        kept = float((projector(factor) @ columns).square().sum())
        best = float(torch.linalg.svdvals(columns)[:4].square().sum())
        assert kept == pytest.approx(best, rel=1e-3)
        assert relative(factor.mT @ factor, torch.eye(4).double()) < 1e-5


def test_random_pairs_depend_on_the_seed_and_are_shared_by_the_group() -> None:
    shapes = {"layers.0.q_proj": (8, 6), "layers.1.q_proj": (8, 6)}
    first = donors.random_pairs(shapes, "shape", (10, 10), 0)
    A, B = first["layers.0.q_proj"]
    assert [factor.shape for factor in (A, B)] == [(6, 10), (8, 10)]
    assert first["layers.1.q_proj"][0] is A
    assert not A[:, 6:].any()  # only six directions exist
    for seed in (0, 1):
        again = donors.random_pairs(shapes, "shape", (10, 10), seed)
        assert torch.equal(again["layers.0.q_proj"][0], A) == (seed == 0)
    shapes["layers.0.v_proj"] = (4, 6)
    by_width = donors.random_pairs(shapes, "width", (2, 5), 0)
    assert by_width["layers.0.v_proj"][0] is by_width["layers.0.q_proj"][0]
    assert [factor.shape for factor in by_width["layers.0.v_proj"]] == [(6, 2), (4, 5)]


@pytest.mark.parametrize("with_b", [True, False])
def test_a_layer_with_vectors_computes_its_equation(with_b: bool) -> None:
    torch.manual_seed(0)
    base = nn.Linear(6, 8).double()
    A = torch.randn(6, 4).double()
    B = torch.randn(8, 4).double()
    layer = forms.Vectors(base, A, B, with_b, 2.0).double()
    x = torch.randn(3, 6).double()
    assert torch.equal(layer(x), base(x))  # the model's function starts unchanged
    trained = [layer.d, layer.b] if with_b else [layer.d]
    assert any(grad.any() for grad in torch.autograd.grad(layer(x).sum(), trained))
    for parameter in trained:
        nn.init.normal_(parameter)
    b = layer.b if with_b else torch.ones(8).double()
    scale = 2 * (8 / 4) ** 0.5
    assert relative(layer(x), base(x) + scale * (x @ A @ torch.diag(layer.d) @ B.mT) * b) < 1e-12


class Counting(PlainText):
    """A text that counts in steps, for the zoo's Llama."""

    def __init__(self, name: str) -> None:
        self.task = TASKS[donors.BASE_TASK]
        step = 1 + donors.DONORS.index(name)
        rows = torch.arange(40)[:, None] + step * torch.arange(12)
        self.parts = {"training": (rows % zoo.VOCABULARY,)}
        self.base = zoo.net("llama")


def spans_the_changes(pairs: donors.Pairs) -> None:
    """Checks that the pair of each layer spans the changes of all LoRAs."""
    for name, (A, B) in pairs.items():
        for donor in donors.DONORS:
            tensors = load_file(donors.CACHE / "loras" / donor / "adapter_model.safetensors")
            lora_A, lora_B = (tensors[f"base_model.model.{name}.lora_{s}.weight"] for s in "AB")
            assert relative(lora_A @ projector(A), lora_A) < 1e-4
            assert relative(projector(B) @ lora_B, lora_B) < 1e-4


def differ_from_their_start(pairs: donors.Pairs) -> None:
    with mock.patch.object(donors, "MIXED_STEPS", 0):
        start = donors.mixed_pairs("layer", 3)
    assert all(relative(pairs[name][0], A) > 0.01 for name, (A, _) in start.items())


@pytest.mark.parametrize(
    ("source", "check"), [("loras", spans_the_changes), ("mixed", differ_from_their_start)]
)
def test_pairs_that_the_donors_train(
    source: str, check: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The LoRAs of three donors at rank 1: a pair of rank 3 can hold all of their changes.
    small = {"CACHE": tmp_path, "DONORS": donors.DONORS[:3], "LORA_RANK": 1, "problem": Counting}
    for name, value in small.items():
        monkeypatch.setattr(donors, name, value)
    pairs = forms.Form.parse(f"{source}/layer/3/dense").pairs(donors.DONORS[0], 0)
    assert len(pairs) == 14  # two blocks of seven layers
    assert len(forms.Form.parse(f"{source}/layer/3/dense/only:q,v").pairs("", 0)) == 4
    for factor in [factor for pair in pairs.values() for factor in pair]:
        assert relative(factor.mT @ factor, torch.eye(3)) < 1e-5
    check(pairs)


def test_the_search_continues_from_what_is_recorded(tmp_path: Path) -> None:
    words = "--targets smollm2-kjv --forms random/layer/16/dense --seeds 3 --rates 1e-3,2e-3,4e-3"
    options = common.parser_of("transfer", "", transfer.OPTIONS).parse_args(
        [*words.split(), "--results", str(tmp_path / "r.jsonl")]
    )
    finished = []
    # As `complete` does, with one run at a time. 2e-3 is the best rate.
    while runs := transfer.next_runs(transfer.runs_in(options.results, transfer.COLUMNS), options):
        run = runs[0]
        finished.append((run.lr, run.seed))
        row = run._asdict()
        if run.lr != 4e-3:  # this one diverges
            row |= {"validation": abs(run.lr - 2e-3), "parameters": 7}
        transfer.record(options.results, row)
    assert finished == [(1e-3, 0), (2e-3, 0), (4e-3, 0), (2e-3, 1), (2e-3, 2)]


def test_the_recorded_runs_make_tables_and_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded = pd.read_json(transfer.RESULTS / "transfer.jsonl", lines=True)
    path = tmp_path / "transfer.jsonl"
    common.write(path, recorded)
    # The collection is read from the same folder, here without the bank of rank 16.
    common.write(
        path.with_name("transfer_collection.jsonl"),
        common.read(transfer.RESULTS / "transfer_collection.jsonl").query("rank != 16"),
    )
    assert transfer.main(["--targets", "none", "--results", str(path)]) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "| lora, r 4 | 1,221,120 | 4,770 |" in output and "100% (100% to 100%)" in output
    assert "bank, r 32" in output and "bank, r 16" not in output
    assert (tmp_path / "transfer.png").stat().st_size > 10_000
    for form in recorded[recorded["items"].notna()]["form"].unique():
        assert f"| {form} |" in output
