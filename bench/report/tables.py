"""The tables of docs/benchmarks.md in Markdown, each from the cells of one result file of one machine, and README's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .. import layer, model, shared, targets
from ..kernels import FLOOR, TUNED
from ..measure.forms import FORMS
from ..measure.names import EXTRA_FLOPS, NAMES, bold, name_of, named
from ..measure.session import ROUNDS, bytes_text, time_text
from ..measure.shapes import RANKS, TARGETS, TOKENS, Case, Shape
from ..measure.store import Store
from ..measure.summary import EAGER, LORA, OURS, Summary
from ..projection import block as block_traffic
from ..projection import fused, predictions
from ..projection.assumptions import RANGE_HEADS, range_rows
from ..projection.cards import CARDS
from ..projection.counts import LAYER_SHAPES, Key, Row, kept, needed
from ..projection.layer import BETA, FUSED, LEAST, all_steps, total_bytes
from ..projection.layer_time import LABEL, STEP_HEADS, Levels, assumptions, excess, step_rows
from ..projection.model import Estimate
from ..projection.predict import FILE as STATIC_FILE
from ..projection.predict import Key as StaticKey
from ..projection.predict import kept as static_kept
from ..projection.predict import projections
from ..projection.table import LABEL as STATIC_LABEL
from ..projection.table import markdown_rows
from ..rivals.model import MAGNITUDE
from ..rivals.model import SHAPES as MODELS

# The shapes in the table; the result files and pictures have all measured shapes.
SHOWN_SHAPES = [(1, 768, 768, 16), (16, 768, 768, 16), *TARGETS, *((m, 4096, 4096, 16) for m in TOKENS)]
SHOWN_SHAPES += [(8192, 4096, 4096, r) for r in RANKS] + [
    (8192, k, n, 16) for k, n in ((4096, 14336), (14336, 4096), (4096, 1024))
]
MOST_SHAPES = 8  # in a table's command
PROJECTED_SHAPE: Shape = (8192, 4096, 4096, 16)
BEST_LORA = "lora-in-place-beta"
Pictures = dict[str, str]  # name -> link


def busy(load: float, threads: int) -> str:
    """A warning if other programs ran during the measurement."""
    return f"; load average {load:.1f}: the machine was busy, so read times with care" if load > threads + 1 else ""


def where(cells: list[dict]) -> str:
    """Machine, version, clock, rounds, load."""
    facts, clock = cells[-1]["machine"], cells[-1]["clock"]
    clocks = {"wall": "wall seconds", "cpu": "CPU seconds", "events": "GPU events, L2 flushed"}
    loaded = busy(max(c["load"] for c in cells), max(c["case"]["threads"] for c in cells))
    least, most = min(c["rounds"] for c in cells), max(c["rounds"] for c in cells)
    rounds = f"{least} to {most}" if least < most else f"{most}"
    return f"{facts['name']}, torch {facts['torch']}, {clocks[clock]}, medians of {rounds} interleaved rounds{loaded}"


def command(program: str, cells: list[dict], options: dict[str, object], usual: dict[str, object]) -> str:
    """The command that measures the cells again: options by name without defaults, and the options of timing."""
    last = cells[-1]
    options = options | {"clock": last["clock"], "allocator": last.get("allocator", "keep"), "isa": last.get("isa")}
    usual = usual | {"clock": "events" if on_gpu(cells) else "wall", "allocator": "keep"}
    flags = [f"--{name} {value}" for name, value in options.items() if value != usual.get(name)]
    return f"`{' '.join(['python -m', f'bench.{program}', *flags])}`"


def on_gpu(cells: list[dict]) -> bool:
    return "cuda" in cells[-1]["machine"]


def _all(cells: list[dict], field: str) -> str:
    """The values of a case's field in their first order, comma-separated."""
    return ",".join(dict.fromkeys(str(c["case"][field]) for c in cells))


def _rounds(cells: list[dict]) -> int:
    return max(c["rounds"] for c in cells)


def markdown(heads: list[str], rows: list[list[str]], text_columns: int = 1) -> list[str]:
    """Lines of a table; the first text_columns columns are text, the others numbers."""
    rule = "|" + "---|" * text_columns + "---:|" * (len(heads) - text_columns)
    return ["| " + " | ".join(heads) + " |", rule, *("| " + " | ".join(row) + " |" for row in rows)]


def _images(pictures: Pictures, shown: dict[str, str]) -> list[str]:
    return [line for name, text in shown.items() if name in pictures for line in ("", f"![{text}]({pictures[name]})")]


def layer_table(cells: list[dict], pictures: Pictures) -> str:
    """Excess over the frozen layer, forward + backward, a row per case; ours first, for narrow screens."""
    cases: dict[Case, dict[str, dict]] = {}
    for cell in cells:
        cases.setdefault(Case(**cell["case"]), {})[cell["rival"]] = cell
    shown = {case: own for case, own in cases.items() if case[:4] in SHOWN_SHAPES} or cases
    columns = [rival for rival in NAMES if rival != OURS] + [MAGNITUDE]
    rivals = [rival for rival in columns if any(rival in own for own in shown.values())]
    bounds = any("of_bound" in own.get("lotr_ext", {"step": {}})["step"] for own in shown.values())
    forms = [form for form in FORMS if any(form in own.get(OURS, {}) for own in shown.values())]
    rows = []
    for case, own in sorted(shown.items(), key=lambda item: (item[0].threads, item[0].dtype != "fp32", item[0])):
        excess = {rival: own[rival]["step"]["excess"][1] for rival in (OURS, *rivals) if rival in own}
        ratio = "-"
        if "lotr_ext" in excess and excess.get("lora-eager", 0) > 0:
            ratio = f"{excess['lotr_ext'] / excess['lora-eager']:.2f}"
        row = [f"{case.m} x {case.k} x {case.n}, {case.r}", f"{case.dtype}, {case.threads}", f"{case.extra_flops():.1%}"]
        percent = {rival: f"{value:.1%}" for rival, value in excess.items()}
        row += [percent.get(OURS, "-"), ratio, *(percent.get(rival, "-") for rival in rivals)]
        if bounds:
            share = own.get("lotr_ext", {"step": {}})["step"].get("of_bound")
            row.append(f"{share:.0%}" if share is not None else "-")
        in_forms = [own.get(OURS, {}).get(form) for form in forms]
        rows.append(row + ["-" if stage is None else f"{stage['step']['excess'][1]:.1%}" for stage in in_forms])
    heads = ["M x K x N, r", "dtype, threads", EXTRA_FLOPS, bold(NAMES[OURS]), f"{NAMES[OURS]} / {NAMES['lora-eager']}"]
    heads += [named(rival) for rival in rivals]
    heads += ["lotr_ext, of the machine's bound"] if bounds else []
    heads += [f"lotr_ext {FORMS[form]}" for form in forms]
    images = {
        "excess": "time over the frozen layer by rival",
        "tokens": "time over the frozen layer against tokens",
        "rank": "time over the frozen layer against rank",
        "memory": "memory of one adapted layer",
    }
    lines = [f"{layer_command(cells)}; {where(cells)}:", "", *markdown(heads, rows, 2)]
    verdicts = [] if on_gpu(cells) else targets.limit_verdicts(cells) + targets.layer_verdicts(cells)
    lines += ["", targets.summary(verdicts)] if verdicts else []
    return "\n".join([*lines, *_images(pictures, images)])


def layer_command(cells: list[dict]) -> str:
    """The command, with shapes if they are few; otherwise they are the program's default."""
    shapes = list(dict.fromkeys("x".join(str(c["case"][size]) for size in "mknr") for c in cells))
    options = {"shapes": ",".join(shapes)} if len(shapes) <= MOST_SHAPES else {}
    options |= {"dtypes": _all(cells, "dtype"), "threads": _all(cells, "threads"), "rounds": _rounds(cells)}
    return command("layer", cells, options | {"slice": cells[-1].get("slice", layer.SLICE)}, {"slice": layer.SLICE})


def shared_table(cells: list[dict], pictures: Pictures) -> str:
    """L layers on one A and B, a row per way of summing."""
    rows = []
    for c in cells:
        case, label = c["case"], bold(shared.LABELS[c["rival"]])
        sizes = [f"{case['layers']}", f"{case['dtype']}, {case['threads']}", label]
        counts = [bytes_text(c["allocated_bytes"]), str(c["launches"]), str(c["tensors"]), f"{c['error']:.0e}"]
        rows.append([*sizes, time_text(c["backward"]["seconds"][1]), *counts])
    launched = "kernels" if on_gpu(cells) else "operators"
    heads = ["layers", "dtype, threads", "A's and B's gradients summed by", "backward", "allocated in it", f"{launched} in it"]
    c = cells[-1]["case"]
    title = f"{shared_command(cells)}, {c['m']} x {c['k']} x {c['k']}, r = {c['r']}; {where(cells)}:"
    table = markdown([*heads, "new tensors of A's shape", "error of dA"], rows, 3)
    return "\n".join([title, "", *table, *_images(pictures, {"shared": "the same against the number of layers"})])


def shared_command(cells: list[dict]) -> str:
    case = cells[-1]["case"]
    options = {"layers": _all(cells, "layers"), "shape": f"{case['m']}x{case['k']}x{case['r']}", "dtypes": _all(cells, "dtype")}
    usual = {"layers": ",".join(map(str, shared.LAYERS)), "shape": shared.SHAPES["cuda" if on_gpu(cells) else "cpu"]}
    usual |= {"dtypes": "fp32", "rounds": ROUNDS["shared"]}
    return command("shared", cells, options | {"rounds": _rounds(cells)}, usual)


def model_table(cells: list[dict], pictures: Pictures) -> str:
    """A row per method; two columns per (dtype, threads): step and peak memory over LoRA PEFT's."""
    groups: dict[tuple, dict[str, dict]] = {}
    for cell in cells:
        c = cell["case"]
        groups.setdefault((c["model"], c["batch"], c["sequence"], c["r"]), {}).setdefault(cell["rival"], {})[
            c["dtype"], c["threads"]
        ] = cell
    lines = []
    for (name, batch, sequence, r), methods in groups.items():
        columns = sorted({key for own in methods.values() for key in own}, key=lambda key: (key[1], key[0] != "fp32"))
        heads = ["", "rank", "parameters", "adapter"]
        for dtype, threads in columns:
            heads += [f"step, {dtype}, {threads}", "peak"]
        rows = []
        for own in methods.values():
            first = next(iter(own.values()))
            row = [name_of(first), str(first["rank"] or ""), f"{first['parameters']:,}", bytes_text(first["adapter_bytes"])]
            for key in columns:
                lora = methods.get("lora-peft", {}).get(key)
                row += _against_lora(own.get(key), lora)
            rows.append(row)
        title = f"{name}, {batch} x {sequence} tokens per step, rank {r}; ratios to {NAMES[LORA]}, whose row has its numbers; "
        own = [cell for method in methods.values() for cell in method.values()]
        if lines:
            lines.append("")
        lines += [f"{model_command(own)}: {title}{where(own)}:", "", *markdown(heads, rows)]
    shown = {"model": "step time and memory of every method"} | {f"model-{key[0]}": f"the same for {key[0]}" for key in groups}
    return "\n".join([*lines, *_images(pictures, shown)])


def model_command(cells: list[dict]) -> str:
    """Of one model, batch and rank."""
    case, usual = cells[-1]["case"], {"rank": model.RANK, "rounds": ROUNDS["model"]}
    names = ("model", "targets", "batch", "sequence")
    if case["model"] in MODELS:
        shape = MODELS[case["model"]]
        usual |= {"targets": ",".join(shape.targets), "batch": shape.batch, "sequence": shape.sequence}
    usual |= {} if on_gpu(cells) else {"model": "minilm"}  # the default depends on the GPU's memory
    options = {name: case[name] for name in names} | {"rank": case["r"], "rounds": _rounds(cells)}
    return command("model", cells, options, usual)


def _against_lora(cell: dict | None, lora: dict | None) -> list[str]:
    if cell is None:
        return ["-", "-"]
    step, peak = cell["step"]["seconds"][1], cell["peak_bytes"]
    if lora is None or cell["rival"] == "lora-peft":
        return [time_text(step), bytes_text(peak)]
    return [f"{step / lora['step']['seconds'][1]:.2f}", f"{peak / lora['peak_bytes']:.2f}"]


def kernels_table(cells: list[dict], pictures: Pictures) -> str:
    """Each kernel alone, a row per shape: on a GPU all shapes with 16 tokens, or with 8,192 and more."""
    ours = [c for c in cells if c["rival"] == "lotr_ext"]
    library, tuned = ({tuple(c["case"].values()): c for c in cells if c["rival"] == rival} for rival in (FLOOR, TUNED))
    main = [c for c in ours if c["case"]["m"] in (16, 32, 8192) and c["case"]["n"] == 4096] or ours
    rows = []
    for c in main:
        case, step = c["case"], c["step"]
        theirs = library[tuple(case.values())]["step"]["seconds"][1]
        size = [case["kernel"], f"{case['m']} x {case['n']}, {case['r']}", f"{case['dtype']}, {case['threads']}"]
        times = [time_text(theirs), time_text(step["seconds"][1]), f"{1 + step['excess'][1]:.2f}"]
        if tuned:
            best = tuned.get(tuple(case.values()))
            times.insert(1, "-" if best is None else time_text(best["step"]["seconds"][1]))
        rows.append(size + times + [f"{step['bytes_per_s'] / 1e9:.0f}", f"{step['of_bound']:.0%}"])
    heads = [
        "kernel",
        "M x N, r",
        "dtype, threads",
        "library",
        *(["library, autotuned"] if tuned else []),
        "ours",
        "ours / library",
        "GB/s",
        "of the machine's bound",
    ]
    again = command("kernels", cells, {"rounds": _rounds(cells)}, {"rounds": ROUNDS["kernels"]})
    title = f"{again}, each kernel alone; {where(cells)}:"
    return "\n".join([title, "", *markdown(heads, rows, 3), *_images(pictures, {"kernels": "each kernel over the library"})])


TABLES: dict[str, Callable[[list[dict], Pictures], str]] = {
    "layer": layer_table,
    "shared": shared_table,
    "model": model_table,
    "kernels": kernels_table,
}


def static_found(results: Path) -> dict[StaticKey, Estimate]:
    """The kept estimates of the newest sources that were modelled."""
    return static_kept(Store(results / "simt-executor" / STATIC_FILE))


def static_table(found: dict[StaticKey, Estimate], pictures: Pictures) -> str:
    """Estimates of each kernel's speed from its machine code: a row per kernel and size, a column per GPU."""
    gpus = sorted({key[5] for key in found}, key=lambda gpu: (gpu != "h100", list(CARDS).index(gpu)))
    heads, rows = markdown_rows({key: e for key, e in found.items() if key[4] == "bf16"}, gpus)
    title = f"`python -m bench.static`, no GPU, bf16: {STATIC_LABEL}. First the likely time and its share of the data sheet's "
    title += "bandwidth, in brackets that with all assumptions low and with all high:"
    images = _images(pictures, {"static": "where each kernel's time goes, modelled"})
    return "\n".join([title, "", *markdown(heads, rows, 2), *images, "", *fused_lines()])


def fused_lines() -> list[str]:
    """The estimates for gemm_lotr next to those for beta."""
    title = (
        f"`gemm_lotr`, the base product with the adapter inside ([how it works](hopper.md)), {CARDS['h100'].name}, bf16: a "
        f"model of its tickets, not measured, by the same command. Also assumed: {'; '.join(fused.ASSUMED)}."
    )
    return [title, "", *markdown(list(fused.HEADS), fused.rows(fused.SHAPES, "h100"), 2)]


def predicted_table(folder: Path, pictures: Pictures) -> str:
    """Measurements on a GPU next to the predictions for it; empty without any."""
    made_on, made = predictions.kept(folder.parent)
    found = predictions.compared_in(folder, made)
    if not found:
        return ""
    title = f"Measured on {folder.name}, beside what was predicted on {made_on}; kernels in us, others in % over their base:"
    rows = markdown(["", "predicted", "measured", "measured / likely"], [one.cells() for one in found])
    return "\n".join([title, "", *rows, *_images(pictures, {"predicted": "measured over predicted"})])


def traffic_rows(results: Path) -> dict[Key, Row]:
    """The kept counts of the newest sources that were counted."""
    store = Store(results / "simt-executor" / "traffic.jsonl")
    cells = store.read()
    return kept(store, cells[-1]["build"]) if cells else {}


def traffic_table(rows: dict[Key, Row], found: dict[StaticKey, Estimate], pictures: Pictures) -> str:
    """Counted bytes of a whole layer in excess of the frozen one's, and their projected time."""
    m, k, n, r = shape = PROJECTED_SHAPE
    levels = projections([shape], rows, found)
    counted = [card for card in CARDS.values() if all(key in rows for key in needed([shape], [card.multiprocessors]))]
    if not counted:
        return ""
    steps = all_steps(shape, rows, counted[-1].multiprocessors)
    frozen = total_bytes(steps["frozen"], "step")
    projected = [excess(shape, rows, CARDS[gpu], own) for gpu, own in levels.items()]
    lines = []
    for name in (name for name in steps if name != "frozen"):
        sizes = [f"{(total_bytes(steps[name], 'step') - frozen) / 1e6:.0f} MB"]
        columns = [column[name]["step"].percent() if name in column else "-" for column in projected]
        lines.append([bold(NAMES.get(name, name)) if name != LEAST else LEAST, *sizes, *columns])
    heads = ["", "counted bytes over the frozen layer's", *(f"{CARDS[gpu].name}, projected" for gpu in levels)]
    title = (
        f"`python -m bench.traffic`, no GPU: one layer by itself, {m} x {k} x {n}, r = {r}, bf16, forward + backward. Bytes: "
        f"our kernels' counted by the executor, library operators' at their least. Times over the frozen layer in %: a "
        f"{assumptions()}."
    )
    images = {"projection": f"{CARDS['h100'].name} and others, projected"}
    blocks = [line for block in block_traffic.parse(block_traffic.BLOCKS) for line in projected_block(block, rows, found)]
    others, parts = other_layers(rows, found), layer_parts(rows, levels)
    assumed = ["", "The assumptions, and the time that follows from each:", "", *markdown(list(RANGE_HEADS), range_rows())]
    return "\n".join([title, "", *markdown(heads, lines), *_images(pictures, images), *others, *blocks, *parts, *assumed])


def layer_parts(rows: dict[Key, Row], levels: dict[str, Levels]) -> list[str]:
    """The parts of beta's time over the frozen layer."""
    if "h100" not in levels:
        return []
    says = f"The parts of {BETA}'s time over the frozen layer, for the same layer on an {CARDS['h100'].name} ({LABEL}):"
    lines = step_rows(PROJECTED_SHAPE, rows, CARDS["h100"], levels["h100"])
    return ["", says, "", *markdown(list(STEP_HEADS), lines, 2)]


def other_layers(rows: dict[Key, Row], found: dict[StaticKey, Estimate]) -> list[str]:
    """The best forms of LoRA and of ours for every layer that is counted, a column per GPU."""
    every = {shape: projections([shape], rows, found) for shape in LAYER_SHAPES}
    columns = [gpu for gpu in CARDS if any(gpu in levels for levels in every.values())]
    names, lines = {name: NAMES.get(name, name) for name in (BEST_LORA, BETA, FUSED)}, []
    for shape, levels in every.items():
        m, k, n, r = shape
        over = {gpu: excess(shape, rows, CARDS[gpu], own) for gpu, own in levels.items()}
        for name, label in names.items():
            cells = [over[gpu][name]["step"].percent() if name in over.get(gpu, {}) else "-" for gpu in columns]
            lines += [[f"{m} x {k} x {n}, {r}", bold(label), *cells]] if set(cells) != {"-"} else []
    says = "Time over the frozen layer in % for other layers, projected in the same way:"
    return ["", says, "", *markdown(["M x K x N, r", "", *(CARDS[gpu].name for gpu in columns)], lines, 2)] if columns else []


def projected_block(block: block_traffic.Block, rows: dict[Key, Row], found: dict[StaticKey, Estimate]) -> list[str]:
    """Every way of a transformer's block, a column per GPU with all counts and estimates of its layers."""
    levels = projections(block_traffic.shapes(block), rows, found)
    if not levels:
        return []
    (model, m, r), columns = block, [block_traffic.excess(block, rows, CARDS[gpu], own) for gpu, own in levels.items()]
    lines = [
        [bold(NAMES.get(name, block_traffic.label_of(name))), *(own[name]["step"].percent() for own in columns)]
        for name in columns[0]
    ]
    says = (
        f"All linear layers of a {model} block, {m} tokens, r = {r}, time over the frozen ones in %, projected in the same "
        f"way. LoTR's layers of one shape share a pair, so k and v share u, and so do gate and up. fold and fold_grad are one "
        f"launch for {block_traffic.LAYERS} layers. Norms, attention and activations are not included:"
    )
    return ["", says, "", *markdown(["", *(CARDS[gpu].name for gpu in levels)], lines)]


def summary_table(found: Summary, pictures: Pictures) -> str:
    """README's table: a row per quantity, LoRA and LoTR in plain torch beside this package."""
    c = found.case
    commands = [*dict.fromkeys(model_command([cell]) for cell in (found.model, *found.others)), layer_command(found.layers)]
    lines = [
        f"{c['model']}, {c['targets'].replace(',', ' and ')} of every block, rank {c['r']}, {c['batch']} x {c['sequence']} "
        f"tokens per step, unless the row says otherwise; {found.where} ({', '.join(commands)}):",
        "",
        *markdown(["", NAMES[LORA], NAMES[EAGER], bold(NAMES[OURS])], [list(row) for row in found.rows]),
    ]
    return "\n".join([*lines, *_images(pictures, {"summary": "size, memory and time of LoRA, VeRA and LoTR"})])
