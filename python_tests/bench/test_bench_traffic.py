"""Bytes of whole layers: library operators as counted by hand, ours from the executor's rows, and the projection's sums."""

from __future__ import annotations

import dataclasses

import pytest

from bench import traffic as program
from bench.measure.bounds import Work, kernel_work, work
from bench.measure.shapes import Case
from bench.measure.store import Store
from bench.projection import block, model
from bench.projection import counts as traffic
from bench.projection import layer as layer_traffic
from bench.projection import layer_time as projection
from bench.projection.assumptions import LEVELS, LIKELY, Assumed
from bench.projection.cards import CARDS, Card
from bench.projection.layer_time import KernelTime
from csrc.simt import build

SHAPE = (64, 32, 48, 8)
M, K, N, R = SHAPE
CASE = Case(*SHAPE, "bf16", 1)
LARGE = (8192, 4096, 4096, 16)


def row(kernel: str, m: int, n: int, r: int, extra: int = 0) -> traffic.Row:
    """A kernel that moves each operand once, and extra bytes of partial sums."""
    least = kernel_work(kernel, m, n, r, 2).bytes
    large = m * n * (4 if kernel == "expand_add" else 2)
    return traffic.Row(kernel, m, n, r, 1, large, large, 0, extra, least + extra, 1.0, 1.0, 1)


PLAIN = Assumed(1, 1, exposed=0, fold=0, fences=0, chain=0, launch=2e-6, main_loop=1, scouts=1)


def roofline(work: Work, gpu: Card) -> float:
    return projection.library_seconds(layer_traffic.Step("any", work), gpu, PLAIN)


def times(shape: tuple[int, int, int, int], gpu: Card) -> projection.Times:
    """Our kernels' times if bytes at bandwidth were all that counts."""
    keys = traffic.needed([shape], [gpu.multiprocessors])
    return {key: KernelTime(roofline(kernel_work(*key[:4], 2), gpu), 0.0) for key in keys if key[0] in traffic.KERNELS}


def rows(shape: tuple[int, int, int, int], extra: int = 0) -> dict[traffic.Key, traffic.Row]:
    keys = traffic.needed([shape], [108, 128, 132, 148])
    return {key: row(*key[:4], extra) for key in keys}


def test_eager_lora_by_hand():
    steps = layer_traffic.library_steps("lora-eager", CASE)
    x, y, u = 2 * M * K, 2 * M * N, 2 * M * R
    W, A, B = 2 * K * N, 2 * R * K, 2 * R * N
    bias = 2 * N  # these widths are of no known model
    forward = (bias + x + W + y) + (x + A + u) + (u + B + y) + 2 * y + 3 * y  # two products, scaling, sum
    assert layer_traffic.total_bytes(steps, "forward") == forward
    assert sum(step.work.flops for step in steps["forward"]) == 2 * M * (K * N + R * (K + N))
    # g s; dB = g^T u; du = g B; dA = du^T x; du A; g W; their sum
    backward = 2 * y + (y + u + B) + (y + B + u) + (u + x + A) + (u + A + x) + (y + W + x) + 3 * x
    assert layer_traffic.total_bytes(steps, "backward") == backward
    assert sum(step.work.flops for step in steps["backward"]) == 2 * M * (K * N + 2 * R * (K + N))
    assert layer_traffic.total_bytes(steps, "step") == forward + backward


@pytest.mark.parametrize("rival", layer_traffic.RIVALS)
def test_no_rival_moves_less_than_the_least(rival):
    steps = layer_traffic.library_steps(rival, CASE)
    for direction in ("forward", "backward"):
        assert layer_traffic.total_bytes(steps, direction) >= work(CASE, direction, rival != "frozen").bytes


def test_our_layer_is_its_kernels_and_the_base_products():
    found = rows(SHAPE, extra=1000)
    base = [
        step for step in layer_traffic.our_steps("lotr_ext two_pass", SHAPE, found, 132)["backward"] if step.name[:4] == "base"
    ]
    assert base == [layer_traffic.base_step(M, N, K)]
    two_pass = layer_traffic.our_steps("lotr_ext two_pass", SHAPE, found, 132)
    assert [step.name for step in two_pass["forward"]] == ["shrink", "fold", "base product", "expand_add"]
    worst = layer_traffic.our_steps("lotr_ext beta, nothing from L2", SHAPE, found, 132)
    like = layer_traffic.our_steps("lotr_ext beta", SHAPE, found, 132)
    assert layer_traffic.total_bytes(like, "forward") == layer_traffic.total_bytes(two_pass, "forward")  # y is written twice
    assert layer_traffic.base_step(M, K, N, accumulate=True).work.bytes == 2 * (M * K + N * K + 2 * M * N)
    assert layer_traffic.total_bytes(worst, "backward") - layer_traffic.total_bytes(like, "backward") == 3 * 1000
    order = [step.name for step in layer_traffic.our_steps("lotr_ext beta", SHAPE, found, 132)["backward"]]
    assert order == ["shrink_grad", "fold_grad", "factor_grad", "expand", "base product"]  # as csrc/torch/layer.h
    with pytest.raises(ValueError, match="strategy: expected one of"):
        layer_traffic.our_steps("magic", SHAPE, found, 132)


def levels(own: projection.Times) -> projection.Levels:
    return dict.fromkeys(LEVELS, own)


def test_the_projection_agrees_with_sums_made_by_hand(monkeypatch):
    """An H100 at 800 TFLOP/s and its whole bandwidth: what each form adds to the base product, worked out on paper."""
    monkeypatch.setattr(projection, "FLOPS_REACHED", 800 / 989)
    monkeypatch.setattr(projection, "LEVELS", LEVELS | {"low": dataclasses.replace(PLAIN, launch=0.0)})
    monkeypatch.setattr(model, "EARLY", 0.0)
    h100 = CARDS["h100"]
    excess = projection.excess(LARGE, rows(LARGE), h100, levels(times(LARGE, h100)))
    by_hand = {
        "lora-eager": (0.41, 0.53, 0.47),
        "lora-in-place": (0.18, 0.295, 0.24),
        "lora-in-place-beta": (0.117, 0.235, 0.18),
        "lotr_ext two_pass": (0.175, 0.235, 0.205),
        "lotr_ext beta": (0.117, 0.175, 0.147),
    }
    for name, expected in by_hand.items():
        assert tuple(own.low for own in excess[name].values()) == pytest.approx(expected, abs=0.012), name
    shown = projection.table(LARGE, rows(LARGE), {"h100": levels(times(LARGE, h100))})
    assert "not measured" in projection.assumptions() and "not measured" in shown.title


def test_what_is_assumed_of_the_library_counts_for_ours_and_for_rivals():
    """Of each operator in turn: bandwidth, a sum over few columns, the read of y, the least time, fold's latency."""
    h100, shape = CARDS["h100"], (8192, 4096, 4096, 16)
    bare = {name: getattr(PLAIN, name) for name in ("bandwidth", "one_step", "exposed", "fold")}

    def time(step: layer_traffic.Step, **more: float) -> float:
        return projection.library_seconds(step, h100, dataclasses.replace(PLAIN, **bare | more))

    eager = layer_traffic.library_steps("lora-in-place-beta", Case(*shape, "bf16", 1))["forward"]
    expands = [next(step for step in eager if step.inner == 16), layer_traffic.expand_step(8192, 4096, 16)]
    bases = [next(step for step in eager if step.added), layer_traffic.base_step(8192, 4096, 4096, accumulate=True)]
    y = 2 * 8192 * 4096 / h100.bytes_per_s
    for step in expands:
        assert time(step, one_step=0.5) == pytest.approx(2 * time(step)) and time(step, bandwidth=0.5) == time(step)
    for step in bases:
        assert step.added == 2 * 8192 * 4096 and time(step, exposed=0.5) - time(step) == pytest.approx(0.5 * y)
        assert time(step, one_step=0.5) == time(step)
    read = layer_traffic.Step("scale", Work(0, 1000))
    assert time(read, fold=1e-6) == 1e-6 and time(read) == pytest.approx(1000 / h100.bytes_per_s)
    assert time(layer_traffic.Step("fold", Work(0, 1000), layers=4), fold=1e-6) == pytest.approx(
        0.25e-6 + 1000 / h100.bytes_per_s
    )


def test_the_parts_of_a_layer_add_up_to_its_time_over_the_frozen_one():
    h100 = CARDS["h100"]
    own = levels(times(LARGE, h100))
    lines = projection.step_rows(LARGE, rows(LARGE), h100, own)
    steps = layer_traffic.all_steps(LARGE, rows(LARGE), 132)
    over = [
        projection.seconds(steps["lotr_ext beta"], "step", h100, own["likely"], LIKELY)
        - projection.seconds(steps["frozen"], "step", h100, own["likely"], LIKELY)
    ]
    assert sum(float(line[2].split()[0]) for line in lines) == pytest.approx(1e6 * over[0], abs=1)
    assert [line[1] for line in lines[:4]] == ["shrink", "fold", "expand", "base product, over the frozen one"]


def test_launches_and_the_kernels_own_times_count():
    h100 = CARDS["h100"]
    own = times(LARGE, h100)
    for layers, launches in ((1, 9), (32, 7 + 2 / 32)):  # three and four; fold and fold_grad, alone or for many layers
        steps = layer_traffic.our_steps("lotr_ext two_pass", LARGE, rows(LARGE), 132, layers)
        both = projection.seconds(steps, "step", h100, own, PLAIN)
        all_work = sum(roofline(step.work, h100) for direction in steps.values() for step in direction)
        assert both - all_work == pytest.approx(launches * PLAIN.launch, rel=1e-6)
    first = ("shrink", 8192, 4096, 16, 132)
    slower = own | {first: KernelTime(own[first].seconds + 1e-5)}
    assert projection.seconds(steps, "forward", h100, slower, PLAIN) - projection.seconds(
        steps, "forward", h100, own, PLAIN
    ) == pytest.approx(1e-5)
    with pytest.raises(KeyError, match="shrink"):
        projection.seconds(steps, "forward", h100, {}, PLAIN)


def test_an_early_launch_hides_behind_the_sum_of_the_kernel_ahead():
    """Only of ours after ours, on cards that can: here factor_grad after shrink_grad, fold_grad between them being shared."""
    gaps = [model.gap(CARDS["h100"], after, PLAIN) for after in (None, 0.0, 1e-6, 1.0)]
    assert gaps == [2e-6, 2e-6, 1e-6, 0.5e-6]
    for name, saved in (("h100", 1.5e-6), ("b200", 1.5e-6), ("a100", 0.0), ("rtx4090", 0.0)):
        gpu = CARDS[name]
        plain, sums = times(LARGE, gpu), {key: KernelTime(t.seconds, 5e-6) for key, t in times(LARGE, gpu).items()}
        for strategy in ("lotr_ext two_pass", "lotr_ext beta"):
            steps = layer_traffic.our_steps(strategy, LARGE, rows(LARGE), gpu.multiprocessors, layers=32)
            less = {
                d: projection.seconds(steps, d, gpu, plain, PLAIN) - projection.seconds(steps, d, gpu, sums, PLAIN)
                for d in steps
            }
            assert less == pytest.approx({"forward": 0.0, "backward": saved}, abs=1e-12), (name, strategy)


def test_a_rank_whose_rows_are_not_whole_is_counted_as_it_runs():
    """Rows along the rank are padded, so no kernel packs; A is the user's, and packed once a direction that reads its rows."""
    lib = traffic.executor()
    for kernel in traffic.KERNELS + traffic.SMALL:
        counted = traffic.count(lib, kernel, 2 if kernel in traffic.SMALL else 96, 72, 12)
        assert counted.launches == 1 and counted.once == pytest.approx(2 if kernel == "fold_grad" else 1), kernel
    shape = (64, 32, 48, 12)
    for strategy, packs in (("lotr_ext two_pass", [1, 1]), ("lotr_ext beta", [1, 0]), ("lotr_ext fused", [0, 0])):
        steps = layer_traffic.our_steps(strategy, shape, rows(shape), 132)
        found = {direction: [step for step in own if step.name == "pack"] for direction, own in steps.items()}
        assert [len(own) for own in found.values()] == packs, strategy
        assert all(step.work == Work(0, 2 * 32 * (12 + 16)) for own in found.values() for step in own)


def test_constants_are_those_of_the_sources():
    lib, constants = traffic.executor(), traffic.constants()
    many = constants["MOST_RESIDENT"]
    lib.set_options(resident=many)
    with pytest.raises(ValueError, match=f"expected 1 to {many}"):
        lib.set_options(resident=many + 1)
    lib.set_options()
    most = constants["SHRINK_GRAD_MAX_RANK"]
    assert [traffic.count(lib, "shrink_grad", 40, 40, r).launches for r in (most, most + 1)] == [1, 2]
    assert [layer_traffic.makes_Q(True, r) for r in (16, 17)] == [True, False] and not layer_traffic.makes_Q(False, 8)


def test_a_slower_memory_or_a_faster_product_raises_the_excess():
    excess = {
        name: projection.excess(LARGE, rows(LARGE), gpu, levels(times(LARGE, gpu)))["lora-eager"]["step"].likely
        for name, gpu in CARDS.items()
    }
    assert excess["a100"] < excess["h200"] < excess["h100"]


def test_counts_are_kept_and_not_made_again(tmp_path, monkeypatch, capsys):
    lib = traffic.executor()
    monkeypatch.setattr(traffic, "executor", lambda: lib)
    arguments = ["--shapes", "64x32x48x8", "--rows", "6x2x4x8,5x1x9x8", "--gpus", "h100"]
    arguments += ["--blocks", "", "--results", str(tmp_path)]
    assert program.main(arguments) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "projection, not measured" in out and "lotr_ext beta" in out
    cells = Store(tmp_path / "traffic.jsonl").read()
    keys = [tuple(cell["case"][name] for name in traffic.CASE) for cell in cells]
    assert keys == traffic.needed([(64, 32, 48, 8)], [132])
    for cell in cells:
        counted = traffic.Row(**cell["row"])
        if counted.kernel in traffic.KERNELS:
            assert counted.once == pytest.approx(1) and counted.over_once >= 1

    def never() -> None:
        raise AssertionError("counted again")

    monkeypatch.setattr(traffic, "executor", never)
    assert program.main(arguments) == 0 and len(Store(tmp_path / "traffic.jsonl").read()) == len(cells)
    monkeypatch.setattr(traffic, "sources_id", lambda: "other sources")
    with pytest.raises(AssertionError, match="counted again"):
        program.main(arguments)


# ---- a block ---------------------------------------------------------------------------------------------------------

BLOCK = ("tiny", 64, 8)  # hidden 32, q 32, k and v 16, inner 48


def block_rows() -> dict[traffic.Key, traffic.Row]:
    return {key: row for shape in block.shapes(BLOCK) for key, row in rows(shape).items()}


def names(steps: layer_traffic.Steps, direction: str) -> list[str]:
    return [step.name for step in steps[direction]]


def test_siblings_share_u_and_the_pass_over_x():
    alone = layer_traffic.our_steps("lotr_ext beta", (64, 32, 48, 8), block_rows(), 132, block.LAYERS)
    assert block.sibling_steps(64, 32, [48], 8, block_rows(), 132) == alone
    pair = block.sibling_steps(64, 32, [48, 48], 8, block_rows(), 132)
    assert names(pair, "forward") == ["shrink", *["fold", "expand", "base product"] * 2]
    first, last = (
        ["shrink_grad", "fold_grad", "base product"],
        ["shrink_grad", "fold_grad", "sum of k", "factor_grad", "expand_add"],
    )
    assert names(pair, "backward") == [*first, *last, "base product"]  # as csrc/torch/layer.h
    accumulated = [step == layer_traffic.base_step(64, 48, 32, accumulate=True) for step in pair["backward"]]
    assert accumulated == [False] * 8 + [True]


def test_a_block_is_its_layers_and_what_autograd_adds():
    found = block.all_steps(BLOCK, block_rows(), 132)
    layers = [(64, 32, 32, 8), *[(64, 32, 16, 8)] * 2, (64, 32, 32, 8), *[(64, 32, 48, 8)] * 2, (64, 48, 32, 8)]
    added = 3 * 3 * 2 * 64 * 32  # two of q, k, v and one of gate, up: read, read, written
    for rival in ("frozen", "lora-eager", "lora-in-place-beta"):
        alone = [layer_traffic.library_steps(rival, Case(*shape, "bf16", 1)) for shape in layers]
        assert layer_traffic.total_bytes(found[rival], "step") == added + sum(
            layer_traffic.total_bytes(steps, "step") for steps in alone
        )
    off, on = found[block.UNSHARED], found[block.SHARED]
    backward = [names(steps, "backward") for steps in (off, on)]
    assert names(off, "forward").count("shrink") == 7 and names(on, "forward").count("shrink") == 5
    assert [[b.count(name) for b in backward] for name in ("factor_grad", "add")] == [[7, 5], [3, 1]]
    assert layer_traffic.total_bytes(on, "step") < layer_traffic.total_bytes(off, "step")


def test_stacked_lora_by_hand():
    """Three layers with one x: u of rank 24 for all, and their gradients put side by side again."""
    found = block.all_steps(BLOCK, block_rows(), 132)[block.STACKED]
    products = [step.work.flops for step in found["forward"] if step.work.flops]
    m, k, n, r = 64, 32, 64, 8
    assert {2 * m * k * n, 2 * m * k * 3 * r, 2 * m * 3 * r * n} <= set(products)
    cat = [step.work.bytes for step in found["backward"] if step.name == "cat"]
    assert 2 * 2 * m * n in cat  # dq, dk, dv


def test_a_blocks_projection(capsys):
    gpu = CARDS["h100"]
    own = {key: time for shape in block.shapes(BLOCK) for key, time in times(shape, gpu).items()}
    over = block.excess(BLOCK, block_rows(), gpu, levels(own))
    assert set(over) == {"lora-eager", "lora-in-place-beta", block.STACKED, block.UNSHARED, block.SHARED}
    assert over[block.SHARED]["step"] < over[block.UNSHARED]["step"]
    print(block.table(BLOCK, block_rows(), {"h100": levels(own)}))
    out = " ".join(capsys.readouterr().out.split())
    assert "LoRA, q k v and gate up stacked" in out and "projection, not measured" in out and "siblings off" in out


@pytest.mark.parametrize("text", ["llama-3-8b", "nobody:1:2", "tiny:0:8", "tiny:8:x", "tiny:8:300", "tiny:8:8,"])
def test_no_such_block(text):
    with pytest.raises(ValueError, match="blocks: expected"):
        block.parse(text)
    assert block.parse("") == [] and block.parse("tiny:64:8") == [BLOCK]


def test_without_a_compiler_the_executor_says_what_is_missing(tmp_path, monkeypatch):
    """In a folder where nothing is built yet."""
    monkeypatch.setattr(build, "BUILD", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    for named, got in ((None, "c\\+\\+"), ("", "c\\+\\+"), ("clang-99", "clang-99")):
        monkeypatch.delenv("CXX", raising=False) if named is None else monkeypatch.setenv("CXX", named)
        with pytest.raises(
            OSError, match=rf"no C\+\+ compiler: expected g\+\+, .* got '{got}': .*; install one, on Debian by apt-get"
        ):
            traffic.executor()
