"""README's generated sections from result files, the verdicts on the targets, and `python -m bench` as a whole."""

from __future__ import annotations

import pytest

import bench.__main__ as everything
from bench import report, report_tables, targets
from bench.shapes import TARGETS, Case
from bench.store import Store

MACHINE = {"name": "a machine", "torch": "2.13"}
SHARED = {"machine": MACHINE, "clock": "wall", "rounds": 7, "load": 0.5, "build": "new"}


def stage(middle: float, seconds: float = 1e-3) -> dict:
    return {"seconds": [seconds, seconds, seconds], "excess": [middle - 0.01, middle, middle + 0.01]}


def layer_cell(rival: str, excess: float, case: Case | None = None, **changes: object) -> dict:
    case = case or Case(*TARGETS[0], "fp32", 1)
    return {"case": case._asdict(), "rival": rival, "label": rival, "step": stage(excess)} | SHARED | changes


def model_cell(rival: str, seconds: float, peak: int) -> dict:
    case = {"model": "minilm", "targets": "query", "batch": 2, "sequence": 8, "r": 4, "dtype": "fp32", "threads": 1}
    sizes = {"rank": 4, "parameters": 1000, "adapter_bytes": 4096, "peak_bytes": peak, "optimizer_seconds": 1e-4}
    stages = {name: stage(0.1, seconds) for name in ("forward", "backward", "step")}
    return {"case": case, "rival": rival, "label": rival} | sizes | stages | SHARED


def write(folder, name: str, cells: list[dict]) -> None:
    store = Store(folder / name).prepare()
    for cell in cells:
        store.append(cell)


def test_sections_are_filled_from_the_files_and_only_from_them(tmp_path):
    folder = tmp_path / "a-machine"
    write(folder, "layer.jsonl", [layer_cell("frozen", 0), layer_cell("lora-eager", 0.2), layer_cell("lotr_ext", 0.1)])
    write(folder, "model.jsonl", [model_cell("lora-peft", 0.1, 2**21), model_cell("lotr_ext", 0.09, 2**20)])
    write(folder, "shared.jsonl", [shared_cell("autograd"), shared_cell("lotr_ext-scope")])
    write(folder, "kernels.jsonl", [kernel_cell("library", 0), kernel_cell("lotr_ext", -0.5)])
    written = report.draw(tmp_path)
    assert {path.name for path in written} == {"excess.png", "model.png", "shared.png", "kernels.png"}
    marks = [f"<!-- {name}:begin made -->\nold\n<!-- {name}:end -->" for name in (*report.REQUIRED, *report.OPTIONAL)]
    text = report.rebuild("\n".join(marks), tmp_path)
    assert "old" not in text and text.count("a machine") >= 4
    assert "| 512 x 768 x 768, 16 | fp32, 1 | 6.2% | 20.0% | 10.0% | 0.50 |" in text
    assert "| lotr_ext | 4 | 1,000 | 4 KiB | 0.90 | 0.50 |" in text
    assert "| 8 | fp32, 1 | **lotr_ext**, in a model | 1000 us | 3 KiB | 7 | 2 | 1e-07 |" in text
    assert "| shrink | 4 x 8, 2 | fp32, 1 | 1000 us | 1000 us | 0.50 | 5 | 40% |" in text
    assert "(bench/results/a-machine/excess.png)" in text
    assert report.rebuild(text, tmp_path) == text


def shared_cell(rival: str) -> dict:
    case = {"layers": 8, "m": 4, "k": 8, "r": 2, "dtype": "fp32", "threads": 1}
    counts = {"allocated_bytes": 3000, "launches": 7, "tensors": 2, "error": 1e-7}
    return {"case": case, "rival": rival, "label": rival, "backward": stage(0), "step": stage(0)} | counts | SHARED


def kernel_cell(rival: str, excess: float) -> dict:
    case = {"kernel": "shrink", "m": 4, "n": 8, "r": 2, "dtype": "fp32", "threads": 1}
    return {"case": case, "rival": rival, "step": stage(excess) | {"bytes_per_s": 5e9, "of_bound": 0.4}} | SHARED


def test_a_table_shows_one_build_and_the_shapes_for_readme():
    old = [layer_cell("lora-eager", 0.9, build="old"), layer_cell("lotr_ext", 0.9, build="old")]
    odd = Case(3, 5, 7, 2, "fp32", 1)
    cells = [*old, layer_cell("lotr_ext", 0.1), layer_cell("lotr_ext", 0.3, odd)]
    newest = report.newest_build(cells)
    assert [cell["step"]["excess"][1] for cell in newest] == [0.1, 0.3]
    text = report_tables.layer_table(newest, {})
    assert "LoRA eager |" not in text.replace("/ LoRA eager", "") and "3 x 5 x 7" not in text
    assert "3 x 5 x 7" in report_tables.layer_table(newest[1:], {})  # nothing else to show
    assert report.newest_build([]) == []


def test_a_busy_machine_is_said():
    assert "busy" in report_tables.layer_table([layer_cell("lotr_ext", 0.1, load=9.0)], {})
    assert "busy" not in report_tables.layer_table([layer_cell("lotr_ext", 0.1)], {})


def test_missing_markers_are_refused_where_they_must_be(tmp_path):
    with pytest.raises(ValueError, match="expected the markers demo:begin and demo:end"):
        report.rebuild("no markers", tmp_path)
    both = "".join(f"<!-- {name}:begin -->\n<!-- {name}:end -->\n" for name in report.REQUIRED)
    assert report.rebuild(both, tmp_path) == both


def test_the_projection_of_kept_counts_is_labelled():
    rows = report_tables.traffic_rows(report.RESULTS)
    text = report_tables.traffic_table(rows, picture=False)
    assert "a projection, not measured" in text and text.count("projected |") == 4
    assert "**lotr_ext beta**" in text and "LoRA eager" in text


def test_targets(tmp_path, capsys):
    case = Case(*TARGETS[1], "bf16", 2)
    cells = [layer_cell("lora-eager", 0.2), layer_cell("lora-peft", 0.3), layer_cell("lotr_ext", 0.1)]
    cells += [layer_cell("lora-eager", 0.2, case), layer_cell("lotr_ext", 0.3, case)]
    write(tmp_path, "layer.jsonl", [*cells, layer_cell("vera-peft", 0.01)])  # VeRA is no form of LoRA
    write(tmp_path, "model.jsonl", [model_cell("lora-peft", 0.1, 2**21), model_cell("lotr_ext", 0.1, 2**22)])
    limits, found = targets.verdicts(tmp_path)[:2], targets.verdicts(tmp_path)[2:]
    assert [verdict.met for verdict in found] == ["yes", "no", "yes", "no"]
    assert found[0].rival == "lora-eager"  # the best of them, not PEFT's
    assert [verdict.rival for verdict in limits] == 2 * ["lora-eager x 0.5"] and limits[1].met == "no"
    assert targets.main([str(tmp_path)]) == 1 and "lora-eager" in capsys.readouterr().out
    near = [layer_cell("lora-eager", 0.2), layer_cell("lotr_ext", 0.21)]
    assert [verdict.met for verdict in targets.layer_verdicts(near)] == ["within the spread"]
    near[1]["step"]["excess"] = [0.18, 0.195, 0.2]
    assert [verdict.met for verdict in targets.layer_verdicts(near)] == ["yes, within the spread"]
    few, wide = Case(16, 768, 768, 16, "fp32", 1), Case(2048, 768, 768, 64, "fp32", 1)
    for case, ours, eager, met in (
        (few, 0.2, 0.3, "yes"),
        (few, 0.4, 0.3, "no"),
        (wide, 0.3, 0.9, "yes"),
        (wide, 0.4, 0.9, "no"),
    ):
        cells = [layer_cell("lora-eager", eager, case), layer_cell("lotr_ext", ours, case)]
        assert [verdict.met for verdict in targets.limit_verdicts(cells)] == [met], case
    # The floor at r = 16 and K = 768 is 6.25 %.
    for eager, said in ((0.12, "lora-eager x 0.5, under floor"), (0.13, "lora-eager x 0.5")):
        cells = [layer_cell("lora-eager", eager), layer_cell("lotr_ext", 0.1)]
        assert [verdict.rival for verdict in targets.limit_verdicts(cells)] == [said]
    with pytest.raises(FileNotFoundError, match="expected a folder of results"):
        targets.main([str(tmp_path / "none")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"run python -m bench\.layer"):
        targets.main([str(tmp_path / "empty")])


def test_everything_hands_its_options_on(tmp_path):
    options = everything.arguments(["--device", "cpu", "--threads", "1", "--quick", "--results", str(tmp_path)])
    assert options.parts == ["layer", "shared", "model"]
    common = ["--device", "cpu", "--threads", "1", "--results", str(tmp_path), "--allocator", "keep", "--quick"]
    assert everything.commands(options) == dict.fromkeys(options.parts, common)
    options = everything.arguments(["--device", "cpu", "--dtypes", "bf16", "--minutes", "3", "--fresh"])
    assert options.parts == ["layer", "shared", "model", "profile", "traffic"]
    own = everything.commands(options)
    assert own["layer"] == ["--device", "cpu", "--allocator", "keep", "--dtypes", "bf16", "--fresh", "--minutes", "3.0"]
    assert own["traffic"] == ["--fresh"]
    with pytest.raises(ValueError, match="parts: expected some of layer"):
        everything.arguments(["--parts", "magic"])


def test_every_part_takes_what_it_is_handed():
    options = everything.arguments(["--device", "cpu", "--parts", ",".join(everything.PARTS), "--quick"])
    own = everything.commands(options)
    for name in everything.PARTS:
        module = getattr(everything, name)
        module.arguments(own[name])


def test_a_part_that_fails_is_named_and_the_others_run(capsys):
    ran = []

    def fails() -> int:
        raise ValueError("no such thing")

    assert everything.run({"one": fails, "two": lambda: ran.append("two") or 0}) == 1
    assert ran == ["two"] and "bench.one: no such thing" in capsys.readouterr().out
