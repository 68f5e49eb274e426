"""bench.evidence: intervals, the search for learning rates, what the kept runs say, the sweep, resuming, bad input."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path

import pytest
import torch

from bench.evidence import __main__ as program
from bench.evidence import digest, intervals, plan, problems, sweep, table
from bench.evidence.methods import METHODS, measured, reference
from bench.evidence.packing import packed, unpacked
from bench.evidence.tasks import TASKS, problem_of
from bench.evidence.training import Run, train
from bench.measure.store import Store
from bench.report import rebuild as report
from bench.report.plots_evidence import draw_evidence

TEACHER, MOVIES = TASKS["teacher-half"], TASKS["minilm-movies"]
ITEMS, SEEDS = 200, 5


def losses_of(mean: float, seed: int, spread: float = 0.01) -> torch.Tensor:
    """A loss an item: the items' own levels are common to all methods, a little noise is the seed's."""
    items = torch.rand(ITEMS, generator=torch.Generator().manual_seed(9)).double()
    noise = torch.randn(ITEMS, generator=torch.Generator().manual_seed(seed)).double()
    return mean - 0.5 + items + spread * (noise - noise.mean())


def cell(
    task: str, method: str, rank: int, lr: float, seed: int, loss: float | None, numbers: int = 100, **more: object
) -> dict:
    """A kept run. more: of the case (scaling), or of the cell."""
    run = Run(task, method, rank, lr, seed, more.pop("scaling", ""))
    losses = None if loss is None else losses_of(loss, seed)
    found = {"parameters": numbers, "validation": loss, "loss": loss, "losses": None if losses is None else packed(losses)}
    made = {"setting": TASKS[task].setting._asdict(), "definition": METHODS[method].definition(TASKS[task])}
    about = {"case": run._asdict(), "rival": method, "label": METHODS[method].label, "machine": {"name": "a machine"}}
    return about | found | made | {"accuracy": None, "curve": [1.0, 0.5, 0.5], "commit": "abc", "build": "b", **more}


def runs(task: str, method: str, rank: int, loss: float, numbers: int, seeds: int = SEEDS, **more: object) -> list[dict]:
    """A finished place: three rates with the first seed, the best in their middle, and the other seeds."""
    lrs = [plan.rung(plan.index_of(METHODS[method].begins_at(TASKS[task].kind)) + step) for step in (0, -1, 1)]
    others = [cell(task, method, rank, lr, 0, loss + 0.1, numbers) for lr in lrs[1:]]
    return others + [cell(task, method, rank, lrs[0], seed, loss, numbers, **more) for seed in range(seeds)]


def task_cells(task: str = "minilm-movies", seeds: int = SEEDS, lotr: float = 0.50, lora: float = 0.48) -> list[dict]:
    found = runs(task, "head" if reference(TASKS[task]) == "head" else "full", 0, 0.60, 0, seeds)
    if reference(TASKS[task]) == "base":
        found = [cell(task, "base", 0, 0.0, 0, 0.60, 0)]
    found += runs(task, "full", 0, 0.40, 10_000, seeds) + runs(task, "lora", 1, lora, 500, seeds)
    found += runs(task, "lotr", 2, 0.55, 60, seeds) + runs(task, "lotr", 8, lotr, 400, seeds)
    return found + runs(task, "lotr", 16, 0.41, 600, seeds)


# ---- intervals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seeds", "of_seeds", "of_items"), [(5, 1.0, 0.0), (5, 0.0, 1.0), (5, 1.0, 1.0), (3, 1.0, 0.0)])
def test_intervals_hold_the_truth_as_often_as_they_say(seeds: int, of_seeds: float, of_items: float) -> None:
    """Made-up differences whose true mean is 0, spread over seeds, over items, or over both."""
    generator, draws, inside, widths = torch.Generator().manual_seed(1), intervals.Draws(seeds, 40), 0, 0.0
    for _ in range(100):
        level = 3 * torch.randn(seeds, 40, generator=generator).double()
        change = of_items * torch.randn(1, 40, generator=generator).double() * 40**0.5
        change = change + of_seeds * torch.randn(seeds, 1, generator=generator).double() * seeds**0.5
        found = draws.difference(level + change, level)
        inside += found.low <= 0 <= found.high
        widths += (found.high - found.low) / 200
    assert inside >= 88
    of_one, of_all = 4.4 if seeds == 3 else 2.9, (of_seeds**2 + of_items**2) ** 0.5  # Student's t and a little
    assert widths < of_one * of_all


def test_pairs_cancel_what_is_common() -> None:
    draws, base = intervals.Draws(SEEDS, ITEMS), torch.stack([losses_of(1.0, seed, 0.5) for seed in range(SEEDS)])
    found = draws.difference(base + 0.25, base)
    assert found == pytest.approx((0.25, 0.25, 0.25)) and found.sign == 1
    wide = draws.mean(base)
    assert wide.value == pytest.approx(base.mean().item()) and wide.low < wide.value - 0.02 < wide.value + 0.02 < wide.high


def test_the_share_is_of_full_fine_tunings_gain() -> None:
    base, full = (torch.full((SEEDS, ITEMS), value).double() for value in (3.0, 1.0))
    method = torch.stack([losses_of(1.5, seed) for seed in range(SEEDS)])
    found = intervals.Draws(SEEDS, ITEMS).share(base, method, full)
    assert found.value == pytest.approx((3 - method.mean().item()) / 2) and found.low < found.value < found.high


def test_words_name_a_difference_only_outside_of_its_interval() -> None:
    assert intervals.verdict(intervals.Interval(-0.2, -0.3, -0.1), "x", "y", 5) == (
        "x is lower than y by 0.2000 (0.1000 to 0.3000)"
    )
    assert intervals.verdict(intervals.Interval(0.2, 0.1, 0.3), "x", "y", 5).startswith(
        "y is lower than x by 0.2000 (0.1000 to"
    )
    assert intervals.verdict(intervals.Interval(-0.2, -0.4, 0.0), "x", "y", 5).startswith("no difference between x and y")
    assert "too few seeds for an interval: 2; give --seeds 3" in intervals.verdict(intervals.Interval(-0.2), "x", "y", 2)
    two = intervals.Draws(2, ITEMS).mean(torch.ones(2, ITEMS).double())
    assert two == (1.0, None, None) and two.sign == 0


def test_packing_keeps_a_loss_an_item() -> None:
    losses = losses_of(1.0, 3)
    torch.testing.assert_close(unpacked(packed(losses)), losses, rtol=1e-3, atol=0)


# ---- the search ------------------------------------------------------------------------------------------------------


def test_rates_are_one_two_five_of_each_decade() -> None:
    assert [plan.rung(i) for i in range(-4, 4)] == [0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10]
    assert all(plan.index_of(plan.rung(i)) == i for i in range(-20, 20)) and plan.rung(plan.index_of(3.1e-3)) == 2e-3


def test_a_search_goes_on_beyond_its_best_end_and_stops_inside() -> None:
    """As a minimum of known place would have it, from the begin on; then one that never ends."""

    def searched(best: float, diverges_at: float = 1e9) -> dict[float, float | None]:
        tried: dict[float, float | None] = {}
        while lrs := plan.rates_to_try(5e-3, tried):
            tried |= {lr: None if lr >= diverges_at else abs(torch.tensor(lr / best).log().item()) for lr in lrs}
        return tried

    assert sorted(searched(5e-3)) == [2e-3, 5e-3, 1e-2]
    assert sorted(searched(5e-2)) == [2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1]
    assert sorted(searched(5e-4)) == [2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2]
    assert sorted(searched(1.0, diverges_at=1e-2)) == [2e-3, 5e-3, 1e-2]  # the last one diverged: inside
    assert plan.best_rate(searched(1e-3, diverges_at=2e-3)) == 1e-3
    endless = searched(1e9)
    assert len(endless) == plan.MOST and plan.best_at_end(endless) == 1


def test_all_places_are_searched_before_any_gets_another_seed() -> None:
    places = [("base", 0), ("lotr", 4), ("lora", 1)]
    search = plan.Search("teacher-half", places, range(3))
    first = search.next_runs([])
    assert [run[1:3] for run in first].count(("base", 0)) == 1 and len(first) == 7 and {run.seed for run in first} == {0}
    cells = [cell("teacher-half", *run[1:5], loss=1.0 + abs(run.lr - 0.05)) for run in first]
    (wider,) = search.next_runs(cells)  # LoRA's best is the highest of 0.01, 0.02, 0.05
    assert wider == Run("teacher-half", "lora", 1, 0.1, 0)
    cells.append(cell("teacher-half", *wider[1:5], loss=1.2))
    for seed in (1, 2):
        second = search.next_runs(cells)
        assert [(*run[1:3], run.lr, run.seed) for run in second] == [("lotr", 4, 0.05, seed), ("lora", 1, 0.05, seed)]
        cells += [cell("teacher-half", *run[1:5], loss=1.0) for run in second]
    assert search.next_runs(cells) == [] and search.estimate(cells) == 0


def test_one_cell_is_searched_with_the_first_seed_and_run_with_its_own() -> None:
    search = plan.Search("teacher-half", [("lotr", 4)], [3])
    cells = [cell("teacher-half", *run[1:5], loss=abs(run.lr - 0.05)) for run in search.next_runs([])]
    assert {one["case"]["seed"] for one in cells} == {0} and search.next_runs(cells) == [
        Run("teacher-half", "lotr", 4, 0.05, 3)
    ]
    at_rate = plan.Search("teacher-half", [("lotr", 4)], [3], lr=0.3)
    assert at_rate.next_runs([]) == [Run("teacher-half", "lotr", 4, 0.3, 3)]


# ---- what the runs say -----------------------------------------------------------------------------------------------


def test_points_have_the_chosen_rate_the_share_and_what_is_missing() -> None:
    diverged = cell("minilm-movies", "dora", 1, 2e-3, 0, None)
    cells = [*task_cells(), diverged, *runs("minilm-movies", "vera", 256, 0.5, 30, 2)]
    found = digest.digest(MOVIES, cells)
    assert found.seeds == SEEDS and [(p.method, p.rank) for p in found.points] == [
        ("head", 0), ("full", 0), ("lotr", 2), ("lotr", 8), ("lotr", 16), ("lora", 1)
    ]  # fmt: skip
    lotr = found.of("lotr")[0]
    assert (lotr.lr, lotr.tried, lotr.end, lotr.parameters) == (5e-3, 3, 0, 60)
    assert lotr.share.value == pytest.approx(0.25, abs=1e-3) and lotr.loss.low < lotr.loss.value < lotr.loss.high
    assert found.unfinished == ["DoRA PEFT, r = 1: 1 runs diverged", "VeRA PEFT, r = 256: 2 of 5 seeds"]
    text = "\n".join(table.sentences(found))
    assert "Not finished: DoRA PEFT, r = 1: 1 runs diverged" in text and "Commits: abc" in text


def test_the_rate_at_the_end_of_the_longest_grid_and_a_run_that_still_falls_are_named() -> None:
    longest = [plan.rung(i) for i in range(-12, -12 + plan.MOST)]
    cells = [cell("minilm-movies", "lotr", 4, lr, 0, 1 - i / 20, curve=[1.0, 0.6, 0.5]) for i, lr in enumerate(longest)]
    found = digest.digest(MOVIES, cells)
    text = "\n".join(table.sentences(found))
    assert f"LoTR, r = 4: the best rate, {longest[-1]:g}, is the highest of {plan.MOST} tried." in text
    assert "Not at a plateau" in text and "too few seeds for an interval: 1" in text


def test_lotr_is_chosen_by_validation_among_those_no_larger() -> None:
    cells = task_cells()
    for one in cells:  # the best on held-out texts, at rank 2, is not what validation prefers
        if one["case"]["method"] == "lotr" and one["case"]["rank"] == 2:
            one["losses"] = packed(losses_of(0.30, one["case"]["seed"]))
    (comparison,) = digest.compared(digest.digest(MOVIES, cells))
    assert (comparison.lotr.rank, comparison.lora.rank) == (8, 1) and comparison.difference.sign == 1
    assert comparison.words.startswith("LoRA PEFT, r = 1 (500 numbers) is lower than LoTR, r = 8 (400 numbers) by 0.0200")


@pytest.mark.parametrize(
    ("first", "second", "take"),
    [
        ((0.45, 0.48), (0.44, 0.48), "LoTR"),
        ((0.50, 0.48), (0.48, 0.48), "LoRA"),
        ((0.48, 0.48), (0.48, 0.48), "either: no difference; LoTR trains no more numbers"),
        ((0.45, 0.48), (0.50, 0.48), "LoTR for minilm-movies; LoRA for minilm-tweets"),
    ],
)
def test_what_to_take_is_what_the_intervals_allow(first, second, take) -> None:
    found = [
        digest.digest(TASKS[name], task_cells(name, lotr=lotr, lora=lora))
        for name, (lotr, lora) in (("minilm-movies", first), ("minilm-tweets", second))
    ]
    smaller, one_or_two = digest.advice(found)
    assert smaller.take.startswith("LoTR: LoRA has none as small (") and one_or_two.take == take
    signs = [(lotr > lora) - (lotr < lora) for lotr, lora in (first, second)]
    assert (one_or_two.lower, one_or_two.none, one_or_two.higher) == tuple(signs.count(sign) for sign in (-1, 0, 1))
    assert digest.advice([digest.digest(MOVIES, task_cells(seeds=2))]) == []


def test_pages_and_pictures_come_from_the_files(tmp_path: Path) -> None:
    marked = "<!-- accuracy:begin made -->\nold\n<!-- accuracy:end -->\n<!-- summary:begin made -->\n<!-- summary:end -->"
    assert "No result of `make frontier` is kept yet." in report.rebuild(report.README, marked, tmp_path)
    folder = tmp_path / "evidence"
    for name in ("minilm-movies", "teacher-half"):
        store = Store(folder / digest.file_of(name)).prepare()
        for one in task_cells(name):
            store.append(one)
    assert {"minilm-movies.png", "teacher-half.png", "evidence.png"} <= {path.name for path in draw_evidence(folder)}
    readme = report.rebuild(report.README, marked, tmp_path)
    assert (
        "old" not in readme
        and "| as LoRA of rank 1 or 2 | 0 | 0 | 2 | LoRA |" in readme
        and "(bench/results/evidence/evidence.png)" in readme
    )
    page = report.rebuild(report.CHOOSING, "<!-- evidence:begin made -->\n<!-- evidence:end -->", tmp_path)
    assert "(../bench/results/evidence/teacher-half.png)" in page and "| LoTR | 2 | 60 | 0.5" in page
    assert "- LoRA PEFT, r = 1 (500 numbers) is lower than LoTR, r = 8" in page


# ---- the sweep -------------------------------------------------------------------------------------------------------


def test_scalings_are_equal_at_one_rank_and_reach_the_layers() -> None:
    same = {name: one.s(sweep.EQUAL_AT, sweep.WIDTH) for name, one in sweep.SCALINGS.items()}
    assert set(same.values()) == {4.0}
    assert [sweep.SCALINGS[name].s(32, 384) for name in ("constant", "root", "rank", "steep")] == [4, 2, 1, 0.5]
    problem = problems.Teacher(0.5, TEACHER.quick)
    from bench.evidence.methods import adapt

    model = adapt(problem.model(0), TEACHER, "lotr", 4)
    sweep.scale(model, "rank-slow")
    assert {layer.scaling for layer in model.modules() if hasattr(layer, "scaling")} == {8.0}
    assert [(g["name"], g["lr"]) for g in sweep.groups(model, "rank-slow", 0.3, 1.0)] == [("cores", 0.3), ("factors", 0.3 / 3)]


def test_the_one_rate_of_a_scaling_loses_least_at_its_worst_rank() -> None:
    """Constant s: the best rate falls with the rank, so one rate loses 20 % somewhere; s as 1 / r: one rate is best at both."""
    of = {
        "constant": {(2, 1e-2): 1.0, (2, 2e-3): 1.3, (64, 1e-2): 1.2, (64, 2e-3): 1.0},
        "rank": {(2, 1e-2): 1.0, (2, 2e-3): 1.4, (64, 1e-2): 1.0, (64, 2e-3): 1.1},
    }
    cells = [
        cell("teacher-half", "lotr", rank, lr, seed, loss, scaling=name)
        for name, own in of.items()
        for (rank, lr), loss in own.items()
        for seed in range(3)
    ]
    today, ours = sweep.transfers(cells)
    assert (today.scaling, today.lr, today.rank) == ("constant", 1e-2, 64) and today.best == {2: 1e-2, 64: 2e-3}
    assert today.excess.value == pytest.approx(0.2, abs=5e-3) and today.excess.low <= today.excess.value <= today.excess.high
    assert (ours.lr, ours.best) == (1e-2, {2: 1e-2, 64: 1e-2}) and ours.excess.value == pytest.approx(0, abs=1e-3)
    lines = sweep.words([today, ours], table.labels())
    assert lines[0] == "LoTR: within 10% of the best loss at every rank with one rate: s as 1 / r."
    assert "s as 1 / r is lower than s constant by 0.1000" in lines[1]
    diverged = [one | {"losses": None, "validation": None} if one["case"]["scaling"] == "rank" else one for one in cells]
    assert sweep.transfers(diverged)[1].excess.value == float("inf")


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
        "lotr": pairs + kinds * r * r, "lotr-width": widths + kinds * r * r, "lotr-name": sides * r + kinds * r * r,
        "lotr-core": kinds * r * r, "lotr-core-gradient": kinds * r * r, "lotr-gradient": pairs + kinds * r * r,
        "lotr-diagonal": pairs + kinds * r, "lotr-tucker": pairs + kinds * r + r**3, "lotr-train": pairs + (kinds + 1) * r * r,
        "lotr-few": kinds * 13, "vera": sum(r + n for _, n in shapes),
    }  # fmt: skip
    return formulas[method]


BERT = [(32, 32)] * 4 + [(32, 64), (64, 32)]
LLAMA = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 64), (32, 64), (64, 32)]
FEW = {"minilm-movies": [(32, 32)] * 2, "smollm2-kjv": [(32, 32), (32, 16)]}


@pytest.mark.parametrize(("task", "shapes"), [("minilm-movies", BERT), ("smollm2-kjv", LLAMA)])
def test_every_method_trains_the_numbers_that_it_says(task: str, shapes: list, tiny: Path) -> None:
    setting, base = problems.Setting(10 if task == "minilm-movies" else 2, 2, 6, 8), None
    for method in dict.fromkeys(name for name, _ in measured(TASKS[task])):
        rank = min(METHODS[method].ranks[TASKS[task].kind][0], 4)
        found = train(Run(task, method, rank, 1e-2, 0), setting)
        own = FEW[task] if method.endswith("-qv") else shapes
        if method == "full":
            want = sum(k * n + (n if task == "minilm-movies" else 0) for k, n in shapes)
        elif method == "norm":
            want = 3 * 2 * 32 if task == "minilm-movies" else 3 * 32
        else:
            want = count(own, method.removesuffix("-qv"), rank)
        assert found["parameters"] == want, method
        assert found["loss"] > 0 and 0 <= found["accuracy"] <= 1 and len(unpacked(found["losses"])) == 8, method
        if method == "base":
            base = found["loss"]
        elif base is not None:
            assert found["loss"] != base, method  # it trains something


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
    with pytest.raises(ValueError, match=r"scaling of lotr: expected 4.0, with which .* was begun, got 8.0"):
        program.main(given)


def test_one_cell_and_a_sweep_by_one_command(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())
    common = ["--task", "teacher-own", "--steps", "2", "--quick", "--jobs", "1", "--results", str(tmp_path)]
    assert program.main([*common, "--method", "lotr", "--rank", "3", "--seed", "4", "--lr", "0.02"]) == 0
    (one,) = (json.loads(line) for line in (tmp_path / "teacher-own.jsonl").read_text().splitlines())
    assert one["case"] == Run("teacher-own", "lotr", 3, 0.02, 4)._asdict()
    swept = [
        *common,
        "--sweep",
        "--rank",
        "2,4",
        "--method",
        "lotr",
        "--scaling",
        "constant,rank",
        "--seeds",
        "1",
        "--lr",
        "0.02",
    ]
    assert program.main(swept) == 0
    assert len((tmp_path / "teacher-own-sweep.jsonl").read_text().splitlines()) == 4
    assert "LoTR, s as 1 / r" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--task", "magic"], ["task", "teacher-half", "'magic'"]),
        (["--method", "magic"], ["method", "lotr", "'magic'"]),
        (["--task", "smollm2-kjv", "--method", "head"], ["method", "new head", "smollm2-kjv", "base"]),
        (["--method", "norm"], ["method", "norms", "teacher-half"]),
        (["--method", "lotr-qv"], ["method", "queries", "'lotr-qv'", "teacher-half"]),
        (["--method", "lotr-name"], ["rank", "'lotr-name'", "teacher-half"]),
        (["--seeds", "0"], ["seeds", "at least 1", "got 0"]),
        (["--seed", "1", "--seeds", "2"], ["seed", "no --seeds"]),
        (["--lr", "-1"], ["lr", "positive", "-1"]),
        (["--rank", "x"], ["rank", "positive numbers", "'x'"]),
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
