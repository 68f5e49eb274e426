"""bench.evidence: intervals, the search for learning rates, what the kept runs say, the sweep."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench.evidence import digest, intervals, plan, problems, sweep, table
from bench.evidence.methods import METHODS, reference
from bench.evidence.packing import packed, unpacked
from bench.evidence.pictures import draw_evidence
from bench.evidence.tasks import TASKS
from bench.evidence.training import Run
from bench.measure.store import Store
from bench.report import rebuild as report

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


def test_a_rate_at_which_another_seed_diverges_gives_way_to_the_next_best(tmp_path: Path) -> None:
    """Also one whose loss is finite but far above the untrained model's; the search then looks below it again."""
    task, losses = "teacher-half", {0.1: 0.7, 0.05: 0.5, 0.02: 0.6, 0.01: 0.8}
    search, store = plan.Search(task, [("lotr", 4)], range(3)), Store(tmp_path / digest.file_of(task)).prepare()
    store.append(cell(task, "base", 0, 0.0, 0, 1.0))
    while runs := search.next_runs(digest.kept(tmp_path, task)):
        for run in runs:
            bad = run.lr == 0.05 and run.seed == 2
            store.append(cell(task, *run[1:5], loss=2.1 if bad else losses[run.lr]))
    cells = digest.kept(tmp_path, task)
    assert {c["case"]["lr"]: c["case"]["seed"] for c in cells if c["case"]["method"] == "lotr"} == {
        0.05: 2,
        0.02: 2,
        0.1: 0,
        0.01: 0,
    }
    found = digest.digest(TASKS[task], cells)
    assert found.of("lotr")[0].lr == 0.02 and found.given_up == ["LoTR, r = 4: 0.05 with 1 of 3 seeds"] and not found.unfinished
    assert "Rates given up, because runs diverged: LoTR, r = 4: 0.05 with 1 of 3 seeds." in table.sentences(found)


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
    assert (comparison.lotr.rank, comparison.rival.rank) == (8, 1) and comparison.difference.sign == 1
    assert comparison.words.startswith("LoRA PEFT, r = 1 (500 numbers) is lower than LoTR, r = 8 (400 numbers) by 0.0200")


def test_a_change_of_a_method_is_compared_at_the_same_rank() -> None:
    changed = [one for rank in (4, 8) for one in runs("minilm-movies", "lotr-gradient", rank, 0.3, 400)]
    (line,) = digest.changed(digest.digest(MOVIES, [*task_cells(), *changed]))
    assert line.startswith("LoTR, from the gradient, r = 8 is lower than LoTR, r = 8 by 0.")
    assert digest.changed(digest.digest(MOVIES, task_cells(seeds=2))) == []


def test_without_a_gain_of_full_fine_tuning_there_are_no_shares() -> None:
    cells = [one for one in task_cells() if one["case"]["method"] != "full"] + runs("minilm-movies", "full", 0, 0.60, 10_000)
    found = digest.digest(MOVIES, cells)
    assert not found.shares and found.gain.value == pytest.approx(0, abs=1e-3)
    assert any(
        line.startswith("No shares of full fine-tuning's gain, whose interval contains 0: ") for line in table.sentences(found)
    )
    assert digest.digest(MOVIES, task_cells()).shares


def test_a_grouping_is_compared_with_the_usual_one_of_no_more_numbers() -> None:
    """Rank 8 has 400 numbers and rank 16, which is lower, 600."""
    grouped = runs("minilm-movies", "lotr-width", 12, 0.45, 500) + runs("minilm-movies", "lotr-name", 1, 0.3, 50)
    (line,) = digest.changed(digest.digest(MOVIES, [*task_cells(), *grouped]))
    assert line.startswith("LoTR, by width, r = 12 (500 numbers) is lower than LoTR, r = 8 (400 numbers) by 0.0500")


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


def test_vera_has_a_row_of_its_own() -> None:
    """With 450 numbers: the LoTR of no more is rank 8 with 400, which is higher than VeRA and no different from LoRA."""
    cells = task_cells(lotr=0.48, lora=0.48)
    *_, lora, vera = digest.advice([digest.digest(MOVIES, [*cells, *runs("minilm-movies", "vera", 256, 0.40, 450)])])
    assert lora == ("as LoRA of rank 1 or 2", 0, 1, 0, "either: no difference; LoTR trains no more numbers")
    assert vera == ("as VeRA", 0, 0, 1, "VeRA")


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
    page = report.rebuild(report.EVIDENCE, "<!-- evidence:begin made -->\n<!-- evidence:end -->", tmp_path)
    assert "(../bench/results/evidence/teacher-half.png)" in page and "| LoTR | 2 | 60 | 0.5" in page
    assert "- LoRA PEFT, r = 1 (500 numbers) is lower than LoTR, r = 8" in page
    marked = "".join(f"<!-- {name}:begin made -->\n<!-- {name}:end -->" for name in ("advice", "recipe"))
    assert "| as LoRA of rank 1 or 2 | 0 | 0 | 2 | LoRA |" in report.rebuild(report.CHOOSING, marked, tmp_path)


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
    assert today.lost is None
    without = {seed: torch.full((len(unpacked(cells[0]["losses"])),), 1.5).double() for seed in range(3)}
    (today, ours) = sweep.transfers(cells, without)
    assert today.lost.value == pytest.approx(0.2 / 0.5, abs=1e-2) and today.lost.low <= today.lost.value <= today.lost.high
    assert sweep.transfers(cells, {0: without[0]})[0].lost is None  # not of all seeds
    assert (ours.lr, ours.best) == (1e-2, {2: 1e-2, 64: 1e-2}) and ours.excess.value == pytest.approx(0, abs=1e-3)
    lines = sweep.words([today, ours], table.labels())
    assert lines[0] == "LoTR: within 10% of the best loss at every rank with one rate: s as 1 / r."
    assert lines[1] == "LoTR: at most 10% of the gain lost: s as 1 / r."
    assert "s as 1 / r is lower than s constant by 0.1000" in lines[2]
    lines = sweep.words(
        [today, ours._replace(losses=today.losses), ours._replace(scaling="root", losses=today.losses)], table.labels()
    )
    even = "s as 1 / r (0.0000 (0.0000 to 0.0000)); s as 1 / sqrt(r) (0.0000 (0.0000 to 0.0000))"
    assert lines[2:] == [f"LoTR, mean loss over ranks, each at its one rate: no difference to s constant: {even}."]
    wide = sweep.words([today, ours._replace(excess=intervals.Interval(0.08, 0.0, 0.13))], table.labels())
    assert wide[0] == "LoTR: within 10% of the best loss at every rank with one rate: no scaling."
    alone = sweep.words([ours._replace(seeds=1)], table.labels())
    assert alone[-1] == "LoTR: no intervals, too few seeds for an interval: 1; give --seeds 3 or more."
    other = [one | {"case": one["case"] | {"method": "lotr-width"}} for one in cells if one["case"]["seed"] == 0]
    assert [one.seeds for one in sweep.transfers(cells + other)] == [3, 3, 1, 1]
    needed = [one for one in cells if one["case"]["lr"] == 1e-2 or one["case"]["rank"] == 64 or one["case"]["seed"] == 0]
    assert len(needed) < len(cells) and sweep.transfers(needed)[0][:7] == today._replace(lost=None)[:7]  # chosen by seed 0
    fewer = [one for one in needed if one["case"]["rank"] == 2 or one["case"]["lr"] == 1e-2 or one["case"]["seed"] == 0]
    assert [one.seeds for one in sweep.transfers(fewer)] == [1, 1]  # of the best at rank 64 there is one seed
    diverged = [one | {"losses": None, "validation": None} if one["case"]["scaling"] == "rank" else one for one in cells]
    assert sweep.transfers(diverged)[1].excess.value == float("inf")
