"""The model of row_core's machine code: turns of its loop, what the executor counts of a launch, and sums made by hand."""

from __future__ import annotations

import dataclasses

import pytest
from test_bench_static import code

from bench import static as program
from bench.measure.store import Store
from bench.projection import compiled, counts, predict
from bench.projection import row_counts as rows
from bench.projection import row_model as model
from bench.projection.assumptions import BEGIN, EARLY, LIKELY
from bench.projection.cards import CARDS
from bench.projection.compiled import Compiled
from bench.projection.row_counts import Mixture
from bench.projection.row_model import ELEMENTS, RowLaunch, Turn, hot_of_rows, turn_of
from bench.report import rows_table


@pytest.fixture(scope="module")
def lib():
    return counts.executor()


def tiles() -> list:
    """Elements one by one, each loaded (at 0x20) or not, then products, sixteen at a time, between two barriers."""
    body = ["MOV R0, R1", "@P0 BRA 0x40"]  # an element is out of range
    body += ["LDG.E.U16 R3, [R2.64]", "IADD3 R2, R2, R1, RZ"]
    body += ["STS [R0], R3", "@P1 BRA 0x10", "BAR.SYNC.DEFER_BLOCKING 0x0"]
    body += ["FFMA R4, R5, R6, R4"] * 16
    body += ["@P2 BRA 0x70", "BAR.SYNC.DEFER_BLOCKING 0x0", "@P3 BRA 0x0", "EXIT"]
    return code(*body)


def kernel(name: str = "row_core", instructions: list | None = None) -> Compiled:
    return Compiled(f"_ZN4lotr7kernels{len(name)}{name}E", 64, 0, 0, instructions or tiles())


@pytest.mark.parametrize("loads", [0, 5, 12])
def test_a_turn_goes_through_inner_loops_as_often_as_counted(loads: int) -> None:
    way = turn_of(tiles(), Turn(loads))
    assert Turn(loads).of(way) == (12, loads, 0, 128, 2)
    # 12 times a branch, a store and a branch back, 2 more for a load; eight rounds of products; MOV, two barriers, a branch
    assert len(way) == 12 * 3 + 2 * loads + 8 * 17 + 4


def test_turns_of_a_mean_between_two_whole_numbers() -> None:
    hot = hot_of_rows(kernel(), 10.0, 4.25)
    full, few = (turn_of(tiles(), Turn(n)) for n in (5, 4))
    assert hot.iterations == 10 and hot.instructions == pytest.approx(2.5 * len(full) + 7.5 * len(few))
    with pytest.raises(ValueError, match=r"turn: expected a way with Turn\(loads=13"):
        turn_of(tiles(), Turn(13))
    with pytest.raises(ValueError, match="turn: expected a way"):  # its rows need an index each, which are not there
        hot_of_rows(kernel("row_core_grad"), 1.0, ELEMENTS)


def test_what_the_executor_counts_of_a_launch(lib) -> None:
    """Five rows with a core each, each in a block of three tiles of columns: at r = 40 two turns, of 32 and of 8 sums."""
    found = rows.count(lib, "row_core", Mixture(5, 1, 9, 40), 132)
    (one,) = found.machine
    assert found.launches == [("row_core", 15)] and one["warps"] == 4 and "row_core" in one["symbol"]
    assert one["barriers"] == 15 * (1 + 2 * 2) and one["bytes"] == found.total
    # of each tile: in a turn one warp loads its row of u, and a warp two rows of 16 columns of the core
    of_u, of_cores = 5 * 3 * 2, 5 * 3 * (16 + 4)
    assert one["half_loads"] == of_u + of_cores
    backward = rows.count(lib, "row_core backward", Mixture(6, 2, 4, 8), 4)
    assert [name for name, _ in backward.launches] == ["row_ends", "row_core", "sum_rows", "row_core_grad"]
    assert sum(launch["bytes"] for launch in backward.machine) == backward.total
    assert backward.machine[0]["barriers"] == backward.machine[2]["barriers"] == 0


def counted(blocks: int, turns: int, loads: int) -> dict:
    barriers, warps = blocks * (1 + 2 * turns), 4
    shared = {"shared": 8192, "symbol": kernel().symbol, "warps": warps}
    return shared | {"barriers": barriers, "half_loads": blocks * turns * warps * loads, "bytes": 10**6}


def of(blocks: int, turns: int = 3, loads: int = 12) -> RowLaunch:
    case = Mixture(64, 1, 64, 16)
    return model.launch("row_core", blocks, counted(blocks, turns, loads), kernel(), case, 10**6, CARDS["h100"])


def test_a_launch_is_the_sum_of_its_parts() -> None:
    card, e = CARDS["h100"], of(132)
    assert (e.turns, e.loads, e.resident) == (3, 12, 8) and e.instructions == len(turn_of(tiles(), Turn(12)))
    assert e.waits == pytest.approx(card.l2_latency / card.clock)  # its core's index
    assert e.dram == pytest.approx(10**6 / card.bytes_per_s)
    assert e.seconds() > BEGIN + card.memory_latency + e.waits + max(e.issue, e.dram / LIKELY.bandwidth)
    assert of(132, turns=6).issue == pytest.approx(2 * e.issue) and of(132, loads=4).instructions < e.instructions
    assert of(2 * 8 * 132).issue == pytest.approx(2 * of(8 * 132).issue)  # another wave
    sorting = dataclasses.replace(e, name="row_ends")  # behind a sort of the library's
    for name, gap in (("a100", LIKELY.launch), ("h100", max(EARLY, LIKELY.launch - (e.seconds() - BEGIN)))):
        assert model.seconds([e, e], CARDS[name]) == pytest.approx(2 * e.seconds() + gap)
        assert model.seconds([e, sorting], CARDS[name]) == pytest.approx(2 * e.seconds() + LIKELY.launch)


def test_loads_that_wait_for_one_another() -> None:
    mixture, tasks = Mixture(2048, 4, 32, 16), Mixture(64, 1, 64, 16)
    assert model.chain("row_core", mixture, 1) == 6 and model.chain("row_core", tasks, 1) == 1  # a search among 33 places
    assert model.chain("row_ends", mixture, 1) == 14 and model.chain("sum_rows", mixture, 1) == 9
    assert model.chain("row_core_grad", mixture, 3) > model.chain("row_core_grad", mixture, 1) == 1


def test_what_is_kept_is_shown_without_tools(tmp_path, monkeypatch, capsys) -> None:
    store = Store(tmp_path / "simt-executor" / model.FILE).prepare()
    case = {"operator": "row_core"} | Mixture(64, 1, 64, 16)._asdict() | {"gpu": "h100"}
    launches = [dataclasses.asdict(of(132))]
    for build, many in (("old", 2), (predict.model_id(), 1)):
        store.append({"case": case, "rival": "lotr_ext", "build": build, "launches": launches * many})
    key = ("row_core", Mixture(64, 1, 64, 16), "h100")
    assert model.kept(store) == {key: [of(132)]}
    monkeypatch.setattr(compiled, "tool", lambda name: None)
    monkeypatch.setattr(program, "predict", lambda *_: {})
    monkeypatch.setattr(model.traffic, "OPERATORS", ("row_core",))
    arguments = ["--gpus", "h100", "--rows", "64x1x64x16", "--results", str(tmp_path / "simt-executor")]
    assert program.main(arguments) == 0
    assert "row_core, model from the machine code, not measured" in capsys.readouterr().out
    text = rows_table.static_rows_table(tmp_path)
    assert (
        "| row_core | 64, 1 of 64, 16 | 1 | row_core | 64 |" in text
        and f"| {model.spread([of(132)], CARDS['h100']).us()} |" in text
    )
    assert rows_table.static_rows_table(tmp_path / "none") == ""


def test_cases_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rows: expected TOKENSxTOPxCORESxRANK, .*got '64x1'"):
        program.arguments(["--rows", "64x1"])
