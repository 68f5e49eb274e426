"""The tables of README and docs/benchmarks.md from result files, the verdicts on the targets, and `python -m bench`."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest
import torch

import bench.__main__ as everything
from bench import layer, shared, targets
from bench.evidence.methods import METHODS as EVIDENCE
from bench.measure import names
from bench.measure.shapes import QUICK, TARGETS, Case
from bench.measure.store import QUICK as QUICK_FOLDER
from bench.measure.store import ROOT, Store, newest
from bench.report import rebuild as report
from bench.report import tables as report_tables
from bench.rivals import block, host
from bench.rivals.base import Tensors
from bench.rivals.model import KNOWN
from bench.rivals.registry import RIVALS
from text_model import RECIPES

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
    text = report.rebuild(report.BENCHMARKS, marked(report.BENCHMARKS), tmp_path)
    assert "old" not in text and text.count("a machine") >= 4
    assert "| 512 x 768 x 768, 16 | fp32, 1 | 6.2% | 10.0% | 0.50 | 20.0% |" in text
    assert "| lotr_ext | 4 | 1,000 | 4 KiB | 0.90 | 0.50 |" in text
    assert "| 8 | fp32, 1 | **lotr_ext**, in a model | 1000 us | 3 KiB | 7 | 2 | 1e-07 |" in text
    assert "| shrink | 4 x 8, 2 | fp32, 1 | 1000 us | 1000 us | 0.50 | 5 | 40% |" in text
    assert "(../bench/results/a-machine/excess.png)" in text
    assert report.rebuild(report.BENCHMARKS, text, tmp_path) == text


def marked(page: report.Page) -> str:
    """A page of nothing but the places of its tables."""
    return "\n".join(f"<!-- {name}:begin made -->\nold\n<!-- {name}:end -->" for name in page.sections)


def test_readme_shows_few_rows_about_size_memory_and_cost(tmp_path):
    """Of the least number of threads, the fp32 layers and both dtypes of the model; LoRA's numbers left of ours."""
    folder, shape = tmp_path / "a-machine", Case(*TARGETS[1], "fp32", 1)
    assert "kept yet" in report.rebuild(report.README, marked(report.README), tmp_path)
    models = []
    for dtype, threads, seconds in (("fp32", 1, 0.2), ("bf16", 1, 0.1), ("fp32", 2, 0.05)):
        for rival, peak in (("frozen", 2**19), ("lora-peft", 2**21), ("lotr-eager", 2**22), ("lotr_ext", 2**20)):
            cell = model_cell(rival, seconds, peak)
            models.append(cell | {"case": cell["case"] | {"dtype": dtype, "threads": threads}})
            if rival != "frozen" and dtype == "bf16":
                other = {"model": "another", "targets": "q,k,v", "dtype": dtype}
                models.append(cell | {"case": cell["case"] | other, "step": stage(0.1, 0.4)})
    write(folder, "model.jsonl", models)
    assert "kept yet" in report.rebuild(report.README, marked(report.README), tmp_path)  # no layer yet
    layers = [layer_cell("lora-peft", 0.2, shape), layer_cell("lotr_ext", 0.1, shape)]
    layers += [layer_cell(rival, 0.3, shape._replace(threads=2)) for rival in ("lora-peft", "lotr_ext")]
    write(folder, "layer.jsonl", layers)
    assert "summary.png" in {path.name for path in report.draw(tmp_path)}
    text = report.rebuild(report.README, marked(report.README), tmp_path)
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert rows == [
        "| adapter: trained numbers | 1,000 | 1,000 | 1,000 |",
        "| training step: peak memory, fp32 | 2.0 MiB | 4.0 MiB | 1.0 MiB |",
        "| training step: peak memory, bf16 | 2.0 MiB | 4.0 MiB | 1.0 MiB |",
        "| training step: time, fp32 | 200.00 ms | 200.00 ms | 200.00 ms |",
        "| training step: time, bf16 | 100.00 ms | 100.00 ms | 100.00 ms |",
        "| another, 3 layers of every block, 2 x 8 tokens: time, bf16 | 400.00 ms | 400.00 ms | 400.00 ms |",
        "| one layer, 2048 tokens: time over the frozen layer, fp32 | 20.0% | - | 10.0% |",
    ]
    assert "a machine, 1 thread (`python -m bench.model" in text and "(bench/results/a-machine/summary.png)" in text


def test_each_model_has_a_table_and_a_picture_of_its_own():
    one = [model_cell(rival, 0.1, 2**20) for rival in ("lora-peft", "lotr_ext")]
    other = [cell | {"case": cell["case"] | {"model": "another"}} for cell in one]
    lines = report_tables.model_table([*one, *other], {"model": "one.png", "model-another": "another.png"}).splitlines()
    tables = [i for i, line in enumerate(lines) if line.startswith("|---")]
    assert len(tables) == 2 and all(lines[i - 2] == "" and lines[i - 4 : i - 3] in ([], [""]) for i in tables)
    assert [line.split("(")[1] for line in lines if line.startswith("![")] == ["one.png)", "another.png)"]


def test_one_name_and_one_colour_for_each_method():
    colours = [*names.COLOURS.values(), names.LIGHT_BLUE, names.DARK_BLUE, names.FROZEN]
    assert len(set(colours)) == len(colours) and set(names.COLOURS) == set(names.NAMES)
    assert set(names.NAMES) <= set(RIVALS)
    of_model = {method: names.name_of({"rival": method, "label": known.label}) for method, known in KNOWN.items()}
    assert len(set(of_model.values())) == len(KNOWN) and of_model["frozen"] == KNOWN["frozen"].label
    assert all(of_model[method] == names.NAMES[method] for method in KNOWN if method in names.NAMES)
    assert names.name_of({"rival": "vera-peft-as-lotr"}) == "VeRA PEFT, size of LoTR"
    assert names.colour_of("lotr_ext-core") == names.COLOURS["lotr_ext"]
    assert set(names.SHARED_COLOURS) == set(shared.LABELS)


def test_programs_and_kept_results_have_the_same_names():
    """Those with keys, those of examples, which have none, and what is kept."""
    tensors = Tensors.random(Case(2, 8, 8, 2, "fp32", 1), torch.device("cpu"))
    here = [name for name in names.NAMES if name not in ("lora-compiled", "lora-unsloth", "lora-lorafusion")]
    assert all(RIVALS[name](tensors, Case(2, 8, 8, 2, "fp32", 1)).name == names.NAMES[name] for name in here)
    assert all(known.label == names.named(method) for method, known in KNOWN.items() if not method.startswith("frozen"))
    assert all(block.RIVALS[name][0] == names.NAMES[name] for name in block.RIVALS if name in names.NAMES)
    own = [name for name in host.RIVALS if name in names.NAMES]
    assert len(own) == 4 and all(host.RIVALS[name].label.split(", ")[0] == names.NAMES[name] for name in own)
    assert EVIDENCE["lora"].label == RECIPES["lora"].name == names.NAMES["lora-peft"] and EVIDENCE["vera"].label == "VeRA PEFT"
    pages = "".join(page.path.read_text(encoding="utf-8") for page in report.PAGES)
    shown = "".join(re.findall(r":begin made by.*?:end -->", pages, re.DOTALL))
    former = [old for old in ("LoRA (PEFT)", "PEFT LoRA", "VeRA (PEFT)", "LoTR eager", "as the original") if old in shown]
    assert "LoRA PEFT" in shown and not former


def shared_cell(rival: str) -> dict:
    case = {"layers": 8, "m": 4, "k": 8, "r": 2, "dtype": "fp32", "threads": 1}
    counts = {"allocated_bytes": 3000, "launches": 7, "tensors": 2, "error": 1e-7}
    return {"case": case, "rival": rival, "label": rival, "backward": stage(0), "step": stage(0)} | counts | SHARED


def kernel_cell(rival: str, excess: float) -> dict:
    case = {"kernel": "shrink", "m": 4, "n": 8, "r": 2, "dtype": "fp32", "threads": 1}
    return {"case": case, "rival": rival, "step": stage(excess) | {"bytes_per_s": 5e9, "of_bound": 0.4}} | SHARED


def test_a_table_shows_one_build_and_the_shapes_for_readme(tmp_path):
    old = [layer_cell("lora-eager", 0.9, build="old"), layer_cell("lotr_ext", 0.9, build="old")]
    odd = Case(3, 5, 7, 2, "fp32", 1)
    cells = [*old, layer_cell("lotr_ext", 0.1), layer_cell("lotr_ext", 0.3, odd)]
    shown = newest(cells)
    assert [cell["step"]["excess"][1] for cell in shown] == [0.1, 0.3]
    text = report_tables.layer_table(shown, {})
    assert "LoRA eager |" not in text.replace("/ LoRA eager", "") and "3 x 5 x 7" not in text
    assert "3 x 5 x 7" in report_tables.layer_table(shown[1:], {})  # nothing else to show
    write(tmp_path / "a-machine", "layer.jsonl", cells)
    assert "90.0%" not in report.SECTIONS["layer"](tmp_path, "")[0]


def test_a_range_of_rounds_is_said():
    cells = [layer_cell("lotr_ext", 0.1, rounds=7), layer_cell("lotr_ext", 0.1, Case(*TARGETS[1], "fp32", 1), rounds=41)]
    text = report_tables.layer_table([*cells, layer_cell("lotr_ext", 0.1, Case(*TARGETS[2], "fp32", 1))], {})
    assert "medians of 7 to 41 interleaved rounds" in text and "--rounds 41`" in text
    assert "medians of 7 interleaved rounds" in report_tables.layer_table(cells[:1], {})


def test_a_table_says_the_command_that_makes_it():
    cells = [layer_cell("lotr_ext", 0.1, Case(m, 8, 6, 2, dtype, 1)) for m in range(1, 9) for dtype in ("fp32", "bf16")]
    shapes = ",".join(f"{m}x8x6x2" for m in range(1, 9))
    assert report_tables.layer_command(cells) == (
        f"`python -m bench.layer --shapes {shapes} --dtypes fp32,bf16 --threads 1 --rounds 7`"
    )
    assert report_tables.layer_table(cells, {}).startswith(report_tables.layer_command(cells))
    many = [*cells, layer_cell("lotr_ext", 0.1, Case(9, 8, 6, 2, "fp32", 1), clock="cpu", slice=0.1, allocator="system")]
    assert report_tables.layer_command(many) == (
        "`python -m bench.layer --dtypes fp32,bf16 --threads 1 --rounds 7 --slice 0.1 --clock cpu --allocator system`"
    )
    ours = model_cell("lotr_ext", 0.1, 1)
    own = {"model": "minilm", "targets": "query,value", "batch": 16, "sequence": 64, "r": 16}
    usual = ours | {"case": ours["case"] | own}
    assert report_tables.model_table([usual], {}).startswith("`python -m bench.model`: ")
    assert report_tables.model_table([usual | {"rounds": 15}], {}).startswith("`python -m bench.model --rounds 15`: ")
    other = "`python -m bench.model --targets query --batch 2 --sequence 8 --rank 4`: "
    assert report_tables.model_table([ours], {}).startswith(other)
    stack = shared_cell("autograd") | {"rounds": 9}
    small = "`python -m bench.shared --layers 8 --shape 4x8x2"
    assert report_tables.shared_table([stack], {}).startswith(f"{small}`, ")
    assert report_tables.shared_table([stack | {"rounds": 3}], {}).startswith(f"{small} --rounds 3`, ")
    kernel = [kernel_cell("library", 0), kernel_cell("lotr_ext", -0.5)]
    assert report_tables.kernels_table(kernel, {}).startswith("`python -m bench.kernels --rounds 7`, ")
    assert "autotuned" not in report_tables.kernels_table(kernel, {})
    searched = report_tables.kernels_table([*kernel, kernel_cell("autotuned", -0.2)], {})
    assert "| library | library, autotuned | ours |" in searched
    formed = [c | {"graph": {"step": {"seconds": [1, 1, 1], "excess": [0.0, 0.125, 0.2]}}} for c in cells]
    assert "| lotr_ext as CUDA graphs |\n" in report_tables.layer_table(formed, {})
    assert "| 12.5% |\n" in report_tables.layer_table(formed, {})


def test_the_layer_table_says_which_targets_are_met():
    cells = [layer_cell("lora-eager", 0.12), layer_cell("lotr_ext", 0.07)]
    text = report_tables.layer_table(cells, {})
    missed = "limit 512x768x768 r16 fp32 t1: 7.0% (6.0%, 8.0%) against 6.0% (5.5%, 6.5%) (LoRA eager x 0.5), within the spread"
    assert "\n\n1 of the 2 limits and comparisons of `python -m bench.targets` are met by medians, all but" in text
    assert f"{missed}, and that limit is under the extra FLOPs.\n" in f"{text}\n"
    cells[1] = layer_cell("lotr_ext", 0.01)
    assert (
        "\n\n2 of the 2 limits and comparisons of `python -m bench.targets` are met by medians."
        in report_tables.layer_table(cells, {})
    )
    cells[1] = layer_cell("lotr_ext", 0.3)
    assert "(LoRA eager), not met." in report_tables.layer_table(cells, {})
    on_gpu = [cell | {"machine": MACHINE | {"cuda": "13"}, "clock": "events"} for cell in cells]
    other = [layer_cell(rival, 0.1, Case(*QUICK["cuda"][0], "fp32", 1)) for rival in ("lora-eager", "lotr_ext")]
    assert "bench.targets" not in report_tables.layer_table(on_gpu, {}) + report_tables.layer_table(other, {})


def test_check_changes_nothing_and_a_table_of_no_demo_is_refused(tmp_path):
    with pytest.raises(ValueError, match="check: it changes nothing; expected no --keep-demo"):
        report.main(["--check", "--keep-demo", str(tmp_path)])
    for text in ("{}", "[]", "{", '{"runs": [], "rows": []}'):
        (tmp_path / "table.json").write_text(text)
        with pytest.raises(ValueError, match=r"^keep-demo: expected the table of a demo run in .*table\.json, got \w+Error: "):
            report.keep_demo(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"keep-demo: expected .*none/table\.json, found none"):
        report.keep_demo(tmp_path / "none")


def test_a_demo_is_kept_without_its_curves(tmp_path, monkeypatch):
    (source,) = report.RESULTS.glob("*/demo-3-methods-1-seeds.json")
    demo = json.loads(source.read_text())
    demo["runs"][0]["losses"] = [1.0]
    demo["runs"][0]["settings"]["out"] = "/somewhere"
    (tmp_path / "table.json").write_text(json.dumps(demo))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert report.keep_demo(tmp_path).read_text() == source.read_text()


def test_a_busy_machine_is_said():
    assert "busy" in report_tables.layer_table([layer_cell("lotr_ext", 0.1, load=9.0)], {})
    assert "busy" not in report_tables.layer_table([layer_cell("lotr_ext", 0.1)], {})


def test_missing_markers_are_refused_and_a_table_without_results_says_so(tmp_path):
    for page in report.PAGES:
        for name in page.sections:
            text = marked(page).replace(f"<!-- {name}:end -->", "")
            with pytest.raises(ValueError, match=rf"^{page.name}: expected the markers {name}:begin and {name}:end"):
                report.rebuild(page, text, tmp_path)
        filled = report.rebuild(page, marked(page), tmp_path)
        assert filled.count(" is kept yet.") == len(page.sections) and report.rebuild(page, filled, tmp_path) == filled


def test_the_projection_of_kept_counts_is_labelled():
    rows = report_tables.traffic_rows(report.RESULTS)
    found = report_tables.static_found(report.RESULTS)
    text = report_tables.traffic_table(rows, found, {})
    assert "a projection, not measured" in text and text.count("projected |") == 5
    assert "**lotr_ext beta**" in text and "LoRA eager" in text


def test_targets(tmp_path, capsys):
    case = Case(*TARGETS[1], "bf16", 2)
    cells = [layer_cell("lora-eager", 0.2), layer_cell("lora-peft", 0.3), layer_cell("lotr_ext", 0.1)]
    cells += [layer_cell("lora-eager", 0.2, case), layer_cell("lotr_ext", 0.3, case)]
    write(tmp_path, "layer.jsonl", [*cells, layer_cell("vera-peft", 0.01)])  # VeRA is no form of LoRA
    write(tmp_path, "model.jsonl", [model_cell("lora-peft", 0.1, 2**21), model_cell("lotr_ext", 0.1, 2**22)])
    limits, found = targets.verdicts(tmp_path)[:2], targets.verdicts(tmp_path)[2:]
    assert [verdict.met for verdict in found] == ["yes", "no", "yes", "no"]
    assert found[0].rival == "LoRA eager"  # the best of them, not PEFT's
    assert [verdict.rival for verdict in limits] == 2 * ["LoRA eager x 0.5"] and limits[1].met == "no"
    assert targets.main([str(tmp_path)]) == 1 and "LoRA eager" in capsys.readouterr().out
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
    for eager, said in ((0.12, "LoRA eager x 0.5, under the extra FLOPs"), (0.13, "LoRA eager x 0.5")):
        cells = [layer_cell("lora-eager", eager), layer_cell("lotr_ext", 0.1)]
        assert [verdict.rival for verdict in targets.limit_verdicts(cells)] == [said]
    with pytest.raises(FileNotFoundError, match="expected a folder of results"):
        targets.main([str(tmp_path / "none")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"run python -m bench\.layer"):
        targets.main([str(tmp_path / "empty")])


def test_everything_hands_its_options_on(tmp_path):
    options = everything.arguments(["--device", "cpu", "--threads", "1", "--quick", "--results", str(tmp_path)])
    assert options.parts == ["layer", "shared", "model", "host"]
    common = ["--device", "cpu", "--threads", "1", "--results", str(tmp_path), "--allocator", "keep", "--quick"]
    assert everything.commands(options) == dict.fromkeys(options.parts, common)
    options = everything.arguments(["--device", "cpu", "--quick", "--dtypes", "fp32,bf16"])
    model = everything.commands(options)["model"]
    assert "--dtypes fp32,bf16" in " ".join(model)  # also where it is the others' default
    assert model[model.index("--results") + 1] == str(QUICK_FOLDER)  # never over what docs show
    options = everything.arguments(["--device", "cpu", "--quick", "--parts", "traffic"])
    assert everything.commands(options) == {"traffic": []}
    options = everything.arguments(["--device", "cpu", "--dtypes", "bf16", "--minutes", "3", "--fresh"])
    assert options.parts == ["layer", "block", "shared", "model", "host", "experts", "tasks", "profile", "traffic"]
    own = everything.commands(options)
    assert own["layer"] == ["--device", "cpu", "--allocator", "keep", "--dtypes", "bf16", "--fresh", "--minutes", "3.0"]
    assert own["traffic"] == ["--fresh"]
    with pytest.raises(ValueError, match="parts: expected some of layer"):
        everything.arguments(["--parts", "magic"])


def test_a_quick_part_alone_leaves_what_docs_show_alone_too():
    assert QUICK_FOLDER == ROOT / "demo_results" / "bench"
    for name in ("layer", "block", "shared", "model", "host", "experts", "tasks", "kernels"):
        arguments = getattr(everything, name).arguments
        common = ["--device", "cpu"]
        assert arguments([*common, "--quick"]).results == str(QUICK_FOLDER)
        assert arguments([*common, "--quick", "--results", "there"]).results == "there"
        assert arguments([*common, "--quick", "--keep"]).results is arguments(common).results is None
    own = everything.commands(everything.arguments(["--device", "cpu", "--quick", "--keep"]))["layer"]
    assert layer.arguments(own).results is None


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

    def has_a_bug() -> int:
        return {}["a key"]

    assert everything.run({"one": fails, "bug": has_a_bug, "two": lambda: ran.append("two") or 0}) == 1
    out, err = capsys.readouterr()
    assert ran == ["two"] and "bench.one: no such thing" in out and "bench.bug: KeyError: 'a key'" in out
    assert 'return {}["a key"]' in err and "no such thing" not in err  # where a bug is; bad input needs no traceback


def test_only_the_default_folder_is_what_readme_is_made_of(tmp_path, monkeypatch, capsys):
    part, ran = SimpleNamespace(main=lambda argv: 0, MINUTES=1.0), []
    for name in ("layer", "model"):
        monkeypatch.setattr(everything, name, part)
    monkeypatch.setattr(everything.targets, "main", lambda argv: ran.append(argv) or 1)
    arguments = ["--device", "cpu", "--parts", "layer,model"]
    assert everything.main([*arguments, "--results", str(tmp_path)]) == 0  # a target that is missed is no failure
    out = capsys.readouterr().out
    assert f"results under {tmp_path}\n" in out and "bench.report" not in out
    assert everything.main(arguments) == 0 and ran == [[str(tmp_path)], []]
    assert "python -m bench.report puts them into README.md" in capsys.readouterr().out
