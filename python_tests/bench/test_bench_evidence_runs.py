"""bench.evidence: the problems, what every method trains, resuming, one cell, bad input."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path

import pytest
import torch

from bench.evidence import __main__ as program
from bench.evidence import problems, sweep
from bench.evidence.methods import METHODS, adapt, check, measured, reference
from bench.evidence.packing import unpacked
from bench.evidence.tasks import TASKS, problem_of
from bench.evidence.training import Run, train
from lotr_ext import lotr_parameters

TEACHER, MOVIES = TASKS["teacher-half"], TASKS["minilm-movies"]


# ---- problems and runs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [1.0, 0.5, 0.0])
def test_the_teachers_change_is_shared_as_it_says(shared: float) -> None:
    """The part of the changes' squared norm that the leading directions of all layers hold, and their size."""
    problem = problems.Teacher(shared, problems.Setting(1, 1, 8, 8))
    teacher = problems.changed(problem.net, shared, torch.Generator().manual_seed(3))
    for kind in ("up", "down"):
        pairs = [(getattr(t, kind).weight, getattr(b, kind).weight) for t, b in zip(teacher.blocks, problem.net.blocks)]
        changes = [(t - b).detach() for t, b in pairs]
        for change, (_, weight) in zip(changes, pairs):
            assert change.norm().item() == pytest.approx(problems.CHANGE * weight.norm().item(), rel=1e-4)
            assert torch.linalg.matrix_rank(change, rtol=1e-4) == problems.CHANGE_RANK * (1 if shared in (0, 1) else 2)
        side = torch.linalg.svdvals(torch.cat([change / change.norm() for change in changes], 1))
        held = (side[: problems.CHANGE_RANK].square().sum() / side.square().sum()).item()
        assert held > 0.999 if shared == 1 else held < 0.9 if shared == 0.5 else held < 0.6


def test_the_loss_of_the_unchanged_net_is_one_and_of_the_teacher_its_noise() -> None:
    problem = problems.Teacher(0.5, problems.Setting(1, 1, 500, 2000))
    before = problem.measure(problem.model(0), "held_out")[0]
    assert before.shape == (2000,) and before.mean().item() == pytest.approx(1 + problems.NOISE**2, rel=0.1)


def test_a_run_is_the_same_each_time_and_a_diverged_one_has_no_loss() -> None:
    run, setting = Run("teacher-half", "lotr", 4, 0.05, 1), problems.Setting(12, 16, 50, 60)
    one, two = train(run, setting), train(run, setting)
    assert one | {"seconds": 0} == two | {"seconds": 0} and one["parameters"] == 4 * 192 + 12 * 16
    assert unpacked(one["losses"]).mean().item() == pytest.approx(one["loss"], rel=1e-3) and len(one["curve"]) == 6
    other = train(run._replace(seed=2), setting)
    assert other["loss"] != one["loss"]
    for lr in (1e30, 30.0):  # beyond float32, and beyond what the file holds
        gone = train(run._replace(lr=lr), setting)
        assert gone["loss"] is None and gone["losses"] is None and gone["parameters"] == one["parameters"]
    scaled = train(run._replace(scaling="rank"), setting)
    same = train(run._replace(rank=8, scaling="rank"), setting), train(run._replace(rank=8), setting)
    assert scaled["loss"] != one["loss"] and same[0]["loss"] == same[1]["loss"]  # at rank 8 s is the method's own


def test_what_a_scaling_changes_besides_s() -> None:
    run, setting = Run("teacher-half", "lotr", 4, 0.05, 1, "steep"), problems.Setting(12, 16, 50, 60)
    losses = {name: train(run._replace(scaling=name), setting)["loss"] for name in sweep.SCALINGS if name.startswith("steep")}
    assert len(set(losses.values())) == len(losses) == 4
    problem = problem_of("teacher-half", setting)
    model = adapt(problem.model(0), TEACHER, "lotr", 3)
    with torch.no_grad():
        for p in lotr_parameters(model):
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    before = problem.measure(model, "held_out")[0]
    sweep.retract(model)
    torch.testing.assert_close(problem.measure(model, "held_out")[0], before, rtol=1e-3, atol=0)
    for pair in model.lotr_factors.values():
        for factor in (pair.A, pair.B):
            torch.testing.assert_close(factor.T @ factor, torch.eye(3), rtol=0, atol=1e-5)


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch) -> Path:
    """A one-layer encoder and a one-layer language model of a few words, and texts, in the tasks' places."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = "<pad> <unk> a fine dull film number in the beginning were words and then came more".split()
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 16}
    for name, model in (
        ("encoder", BertModel(BertConfig(**size))),
        ("language", LlamaForCausalLM(LlamaConfig(**size, num_key_value_heads=1))),
    ):
        model.save_pretrained(tmp_path / name)
        fast = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>")
        fast.save_pretrained(tmp_path / name)
    rated = [f"{2 if i % 2 else -2}\ta {'fine' if i % 2 else 'dull'} film, number {i}" for i in range(90)]
    (tmp_path / "rated.tsv").write_text("\n".join([*rated, "0.1\tin between"]))
    (tmp_path / "text.txt").write_text("in the beginning were words and then came more words " * 300)
    makes = {
        "minilm-movies": lambda setting: problems.Classified(tmp_path / "rated.tsv", setting, tmp_path / "encoder"),
        "smollm2-kjv": lambda setting: problems.Written(tmp_path / "text.txt", setting, tmp_path / "language"),
        "teacher-half": TEACHER.make,
    }
    for name, make in makes.items():
        monkeypatch.setitem(TASKS, name, dataclasses.replace(TASKS[name], make=make))
    problem_of.cache_clear()
    yield tmp_path
    problem_of.cache_clear()


def test_the_examples_are_found_where_their_folder_is_not_on_the_path(monkeypatch) -> None:
    """As in `python -m bench.evidence`; pytest puts the folder there."""
    monkeypatch.setattr(sys, "path", [path for path in sys.path if Path(path).name != "examples"])
    for name in ("causal_lm", "causal_data", "data", "finetune_text", "text_model"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert problems.example("causal_lm").next_token_loss and problems.example("text_model").linear_decay


def count(shapes: list[tuple[int, int]], method: str, r: int) -> int:
    """The trained numbers of a method on linear layers of these shapes (in, out), by formula; core forms count one layer of as
    many kinds."""
    groups, kinds, sides = set(shapes), len(shapes), sum(k + n for k, n in shapes)
    pairs, widths = sum(k + n for k, n in groups) * r, (sum({k for k, _ in groups}) + sum({n for _, n in groups})) * r
    formulas = {
        "base": 0, "head": 0, "lora": sides * r, "dora": sides * r + sum(n for _, n in shapes), "lora-xs": kinds * r * r,
        "lotr-block": pairs + kinds * r * r,  # all in one block
        "lotr": pairs + kinds * r * r, "lotr-width": widths + kinds * r * r, "lotr-name": sides * r + kinds * r * r,
        "lotr-core": kinds * r * r, "lotr-core-gradient": kinds * r * r, "lotr-gradient": pairs + kinds * r * r,
        "lotr-diagonal": pairs + kinds * r, "lotr-tucker": pairs + kinds * r + r**3, "lotr-train": pairs + (kinds + 1) * r * r,
        "lotr-few": kinds * 13, "vera": sum(r + n for _, n in shapes),
        "lotr-magnitude": pairs + kinds * r * r + sum(n for _, n in shapes),
    }  # fmt: skip
    return formulas[method]


BERT = [(32, 32)] * 4 + [(32, 64), (64, 32)]
LLAMA = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 64), (32, 64), (64, 32)]
NOT_THERE = {"minilm-movies": "base", "smollm2-kjv": "head"}


@pytest.mark.parametrize(("task", "shapes"), [("minilm-movies", BERT), ("smollm2-kjv", LLAMA)])
def test_every_method_trains_the_numbers_that_it_says(task: str, shapes: list, tiny: Path) -> None:
    setting, base = problems.Setting(10 if task == "minilm-movies" else 2, 2, 6, 8), None
    for method in METHODS:
        if method == NOT_THERE[task]:
            continue
        rank = 4 if METHODS[method].family in ("lotr", "peft") else 0
        found = train(Run(task, method, rank, 1e-2, 0), setting)
        if method == "full":
            want = sum(k * n + (n if task == "minilm-movies" else 0) for k, n in shapes)
        elif method == "norm":
            want = 3 * 2 * 32 if task == "minilm-movies" else 3 * 32
        else:
            want = count(shapes, method, rank)
        assert found["parameters"] == want, method
        assert found["loss"] > 0 and 0 <= found["accuracy"] <= 1 and len(unpacked(found["losses"])) == 8, method
        if method == "base":
            base = found["loss"]
        elif base is not None:
            assert found["loss"] != base, method  # it trains something


def test_a_task_is_measured_with_methods_that_suit_it() -> None:
    for task in TASKS.values():
        places = measured(task)
        for name, rank in places:
            check(name, task)
            assert (rank > 0) == (METHODS[name].family in ("lotr", "peft")), (task.name, name)
        assert len(set(places)) == len(places) and {reference(task), "full", "lotr", "lora"} <= {name for name, _ in places}


def test_a_languages_losses_are_the_models_own(tiny: Path) -> None:
    problem = problem_of("smollm2-kjv", problems.Setting(2, 2, 6, 8))
    model, rows = problem.model(0), problem.parts["held_out"]
    losses, _ = problem.measure(model, "held_out")
    want = [problem.loss(model, (row[None],)).item() for row in rows]
    assert losses.tolist() == pytest.approx(want, rel=1e-5)
    everything = torch.cat(list(problem.parts.values()))
    assert len({tuple(row.tolist()) for row in everything}) <= len(everything) and len(problem.parts["validation"]) == 6


# ---- the program -----------------------------------------------------------------------------------------------------

SHORT = ("--task", "teacher-half", "--method", "base,full,lotr,lora", "--rank", "2", "--quick", "--steps", "3", "--jobs", "1")


def test_a_command_that_was_cut_off_is_gone_on_with_and_not_with_other_settings(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())
    given, file = [*SHORT, "--results", str(tmp_path)], tmp_path / "teacher-half.jsonl"
    assert program.main(given) == 0
    printed, lines = capsys.readouterr(), file.read_text().splitlines()
    cells = [json.loads(line) for line in lines]
    assert len(cells) == 1 + 3 * 2 and (tmp_path / "teacher-half.png").is_file()
    assert all({"commit", "build", "machine", "setting", "definition"} <= set(one) for one in cells)
    assert "too few seeds for an interval: 2" in printed.err and "share of full's gain" in printed.out
    file.write_text("\n".join([*lines[:-1], lines[-1][:40]]))  # killed while it wrote the last
    assert program.main(given) == 0
    again = capsys.readouterr()
    assert "no whole result" in again.err and "[2/2]" in again.err
    last = json.loads(file.read_text().splitlines()[-1])
    assert (last["case"], last["loss"]) == (cells[-1]["case"], cells[-1]["loss"])
    with pytest.raises(ValueError, match=r"steps: expected 3, with which .*teacher-half.jsonl was begun, got 4; .*--results"):
        program.main([*given, "--steps", "4"])
    monkeypatch.setitem(METHODS, "lotr", dataclasses.replace(METHODS["lotr"], settings={"scaling": 8.0}))
    with pytest.raises(ValueError, match=r"scaling of lotr: expected 'auto', with which .* was begun, got 8.0"):
        program.main(given)


def test_one_cell_and_a_sweep_by_one_command(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())
    common = ["--task", "teacher-own", "--steps", "2", "--quick", "--jobs", "1", "--results", str(tmp_path)]
    assert program.main([*common, "--method", "lotr", "--rank", "3", "--seed", "4", "--lr", "0.02"]) == 0
    (one,) = (json.loads(line) for line in (tmp_path / "teacher-own.jsonl").read_text().splitlines())
    assert one["case"] == Run("teacher-own", "lotr", 3, 0.02, 4)._asdict()
    swept = "--sweep --rank 2,4 --method lotr --scaling constant,rank --seeds 1 --lr 0.02".split()
    assert program.main([*common, *swept]) == 0
    assert len((tmp_path / "teacher-own-sweep.jsonl").read_text().splitlines()) == 4
    assert "LoTR, s as 1 / r" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--task", "magic"], ["task", "teacher-half", "'magic'"]),
        (["--method", "magic"], ["method", "lotr", "'magic'"]),
        (["--task", "smollm2-kjv", "--method", "head"], ["method", "new head", "smollm2-kjv", "base"]),
        (["--method", "norm"], ["method", "norms", "teacher-half"]),
        (["--method", "lotr-name"], ["rank", "'lotr-name'", "teacher-half"]),
        (["--seeds", "0"], ["seeds", "at least 1", "got 0"]),
        (["--seed", "1", "--seeds", "2"], ["seed", "no --seeds"]),
        (["--lr", "-1"], ["lr", "positive", "-1"]),
        (["--rank", "x"], ["rank", "positive numbers", "'x'"]),
        (["--scaling", "rank"], ["scaling", "--sweep", "'rank'"]),
        (["--sweep", "--method", "lora"], ["method", "LoTR", "'lora'"]),
        (["--results", "Makefile/results"], ["results", "cannot write", "Makefile/results"]),
    ],
)
def test_bad_input_is_said_before_any_run(given, words, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr(program, "train", None)
    usual = ["--task", "teacher-half", "--quick", "--results", str(tmp_path)]
    with pytest.raises((ValueError, OSError)) as error:
        program.main([*usual, *given])
    assert all(word in str(error.value) for word in words), error.value


def test_missing_data_is_said_with_the_command_that_fetches_it(monkeypatch) -> None:
    lacking = dataclasses.replace(MOVIES, needs=(Path("nowhere.tsv"),))
    with pytest.raises(FileNotFoundError, match=r"task: expected nowhere.tsv for minilm-movies, found nothing; run make setup"):
        lacking.check()
