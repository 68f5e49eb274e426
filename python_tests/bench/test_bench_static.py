"""The model of the machine code: listings, loops, the multiprocessor, and sums that can be made by hand."""

from __future__ import annotations

import dataclasses

import pytest

from bench import static as program
from bench.measure.store import Store
from bench.projection import compiled, predict, sources
from bench.projection.assumptions import BEGIN, EARLY, LIKELY, RANGES, Assumed
from bench.projection.cards import CARDS
from bench.projection.compiled import Compiled
from bench.projection.counts import Row
from bench.projection.hot import Wanted, hot_loop
from bench.projection.issue import Latencies, run
from bench.projection.model import LIMITS, Estimate, blocks_resident, estimate, in_turn, late_sums, together
from bench.projection.sass import Instruction, blocks_of, loops_of, parse

LISTING = """
.text._ZN4lotr7kernels6shrinkE:
        /*0000*/                   S2R R0, SR_TID.X ;            /* 0x0000000000007919 */
                                                                 /* 0x000e620000002100 */
        /*0010*/              @!P0 BRA `(.L_x_1) ;               /* 0x0000000000007947 */
                                                                 /* 0x002fea0003800000 */
        /*0020*/                   LDGSTS.E.BYPASS.128.ZFILL [R2], desc[UR8][R4.64], P3 ; /* 0x0000000000007fae */
                                                                 /* 0x0003e20000000000 */
.L_x_2:
        /*0030*/              @!PT LDS RZ, [RZ] ;                /* 0x0000000000007984 */
                                                                 /* 0x000fe20000000000 */
.L_x_1:
        /*0040*/                   BRX R16 -0x50        (*"BRANCH_TARGETS .L_x_1,.L_x_2,.L_x_3"*);  /* 0x000000000000794d */
                                                                 /* 0x000fea0003800000 */
.L_x_3:
        /*0050*/                   EXIT ;                        /* 0x000000000000794d */
                                                                 /* 0x000fea0003800000 */
"""


def code(*parts: str, start: int = 0) -> list[Instruction]:
    """Instructions from "[@guard ]OPCODE operands [| stall [sets [waits]]]", 16 bytes each from start on."""
    made = []
    for i, part in enumerate(parts):
        text, _, control = part.partition("|")
        numbers = control.split()
        words = text.split()
        guard = words.pop(0)[1:] if words[0].startswith("@") else ""
        sets = (int(numbers[1]),) if len(numbers) > 1 and numbers[1] != "-" else ()
        stall, waits = int(numbers[0]) if numbers else 1, int(numbers[2]) if len(numbers) > 2 else 0
        targets = (int(words[-1], 16),) if words[0] in ("BRA", "CALL.REL.NOINC") else ()
        made.append(Instruction(start + 16 * i, guard, words[0], " ".join(words[1:]), stall, sets, waits, targets))
    return made


def test_a_listing_is_read_with_its_scheduling_fields():
    functions = parse(LISTING)
    (instructions,) = functions.values()
    assert [i.name for i in instructions] == ["S2R", "BRA", "LDGSTS", "LDS", "BRX", "EXIT"]
    special, branch, copy, never, switch, _ = instructions
    assert (special.stall, special.sets, special.waits) == (1, (1,), 0)
    assert branch.guard == "!P0" and branch.targets == (0x40,) and branch.waits == 0b000010 and branch.stall == 5
    assert copy.width == 16 and copy.sets == (1,)
    assert never.never and not copy.never and switch.targets == (0x40, 0x30, 0x50)
    follow = {0: (0x20, 0x40), 0x20: (0x30,), 0x30: (0x40,), 0x40: (0x40, 0x30, 0x50), 0x50: ()}
    assert {start: block.next for start, block in blocks_of(instructions).items()} == follow


def test_far_branches_are_calls_that_return_nowhere():
    far = code("@P0 CALL.REL.NOINC 0x20", "EXIT", "MOV R0, R1", "BRA 0x10")
    assert {start: block.next for start, block in blocks_of(far).items()} == {0: (0x10, 0x20), 0x10: (), 0x20: (0x10,)}


def loop(*, unrolled: int = 1, edge: bool = False) -> list[Instruction]:
    """A kernel that copies and multiplies tile by tile; edge: with a way that copies element by element."""
    body = []
    for _ in range(unrolled):
        body += ["DEPBAR.LE SB0, 0x2", "LDGSTS.E.BYPASS.128 [R0], [R2.64]", "LDGSTS.E.BYPASS.128 [R0], [R2.64]"]
        body += ["HMMA.16816.F32.BF16 R8, R4, R6, R8"] * 4 + ["IADD3 R0, R0, R1, RZ"] * 5
    start = 1
    size = len(body)
    if edge:  # @P1: over the fast way to the slow one, which comes back to the products
        body.insert(1, "@P1 BRA 0x%x" % (16 * (start + size + 3)))
    kernel = ["MOV R0, R1", *body, "@P0 BRA 0x10", "EXIT"]
    if edge:
        kernel += ["LDG.E.U16 R3, [R2.64]", "STS.U16 [R0], R3", "BRA 0x%x" % (16 * (start + 4))]
    return code(*kernel)


@pytest.mark.parametrize("unrolled", [1, 2, 3])
def test_the_hot_loop_does_not_depend_on_unrolling(unrolled: int):
    tiles, warps = 600, 8
    wanted = Wanted(waits=tiles * warps, copies=2 * tiles * warps, matrix=4 * tiles * warps, stores=None)
    found = hot_loop(loop(unrolled=unrolled), wanted)
    assert found.instructions / (tiles * warps) == pytest.approx(12 + 1 / unrolled)  # and the branch back
    kinds = found.kinds()
    assert kinds["matrix"] == pytest.approx(4 * tiles * warps) and kinds["copy"] == pytest.approx(3 * tiles * warps)


def test_ways_that_were_not_taken_are_not_counted():
    wanted = Wanted(waits=100, copies=200, matrix=400, stores=None)
    found = hot_loop(loop(edge=True), wanted)
    assert all(i.name not in ("LDG", "STS") for _, way in found.ways for i in way)
    with pytest.raises(ValueError, match="hot loop: expected one with"):
        hot_loop(loop(), Wanted(waits=100, copies=200, matrix=400, stores=100))
    with pytest.raises(ValueError, match="hot loop"):  # the loop leaves out copies of the large matrix
        hot_loop(loop(), Wanted(waits=100, copies=300, matrix=400, stores=None, least_copies=300))
    assert hot_loop(loop(), Wanted(100, 230, 400, None, least_copies=200)).iterations == pytest.approx(100)  # factors before it
    assert hot_loop(loop(), Wanted(105, 200, 400, None, least_copies=200)).iterations == pytest.approx(100)  # a wait before it
    with pytest.raises(ValueError, match="hot loop"):
        hot_loop(loop(), Wanted(150, 200, 400, None, least_copies=200))


def test_a_loop_inside_is_no_loop_of_its_own_outside():
    nested = code("MOV R0, R1", "IADD3 R0, R0, R1, RZ", "@P0 BRA 0x10", "@P1 BRA 0x0", "EXIT")
    assert loops_of(blocks_of(nested)) == {0x0: {0x0, 0x10, 0x30}, 0x10: {0x10}}


LATENCIES = Latencies(matrix=8)


def cycles(way: list[Instruction], warps: int, blocks: int = 1) -> float:
    return run([way] * 12, warps, blocks, LATENCIES).cycles


def test_one_warp_waits_as_the_compiler_says():
    assert cycles(code(*["FADD R0, R0, R1 | 4"] * 10), 1) == 40
    assert cycles(code("LDS R0, [R1] | 1 0", "FADD R2, R0, R2 | 4 - 1"), 1) == pytest.approx(29 + 1 + 4, abs=1)


def test_a_scheduler_issues_one_instruction_a_cycle():
    way = code(*["FADD R0, R0, R1 | 4"] * 10)
    assert cycles(way, 4) == 40  # a warp on each
    assert cycles(way, 16) == pytest.approx(40, abs=1)  # four on each: no gaps
    assert cycles(way, 32) == pytest.approx(80, abs=2)
    assert cycles(way, 16, blocks=2) == pytest.approx(80, abs=2)


def test_units_take_their_turns():
    assert cycles(code(*["LOP3.LUT R0, R0, R1 | 1"] * 10), 8) == pytest.approx(40, abs=2)  # two warps, 2 cycles each
    assert cycles(code(*["HMMA.16816.F32.BF16 R0, R4, R6, R0 | 1"] * 4), 8) == pytest.approx(64, abs=2)
    wide = code(*["LDS.128 R0, [R1] | 1"] * 8)  # 512 bytes each at 128 a cycle, all warps together
    assert cycles(wide, 8) == pytest.approx(8 * 8 * 4, rel=0.05)


def test_a_barrier_costs_what_the_others_are_late():
    way = code(*["FADD R0, R0, R1 | 4"] * 10)
    with_barrier = way + code("BAR.SYNC.DEFER_BLOCKING 0x0 | 1", start=160)
    assert cycles(with_barrier, 4) == pytest.approx(40 + 20, abs=2)
    assert run([with_barrier] * 12, 4, 1, LATENCIES).waits["barrier"] > 0.2
    assert cycles(with_barrier, 4, blocks=2) < 2 * cycles(with_barrier, 4)  # one block runs while the other waits


def kernel(registers: int, instructions: list[Instruction] | None = None) -> Compiled:
    return Compiled("_ZN4lotr7kernels6shrinkE", registers, 0, 0, instructions or loop())


def test_blocks_resident_by_hand():
    h100, ada = CARDS["h100"], CARDS["rtx4090"]
    assert blocks_resident(kernel(93), 8, 69 << 10, h100) == (2, "registers")  # 96 x 32 x 8 of 65536
    assert blocks_resident(kernel(161), 8, 69 << 10, h100) == (1, "registers")
    assert blocks_resident(kernel(32), 8, 69 << 10, h100) == (3, "shared memory")  # 228 K
    assert blocks_resident(kernel(32), 8, 1 << 10, h100) == (8, "registers")  # threads would do for as many
    assert blocks_resident(kernel(24), 8, 1 << 10, ada) == (6, "threads")
    assert blocks_resident(kernel(93), 8, 69 << 10, ada) == (1, "shared memory")


def row(blocks: int = 132, late_loads: int = 0, tiles: int = 100) -> Row:
    """A shrink of blocks of 8 warps that walk so many tiles, as `loop` does: 2 copies and 4 products a warp and tile."""
    copies = blocks * 8 * tiles * 2
    large = copies * 512
    n, r = 4096, 16
    m = large // (2 * n)
    machine = {"symbol": "_ZN4lotr7kernels6shrinkE", "names": ["shrink"], "grid": [blocks, 1, 1], "warps": 8, "shared": 65536}
    machine |= {"waits": copies / 2, "copies": copies, "matrix": 2 * copies, "late_loads": late_loads, "memsets": 0}
    machine |= {"multiply": 8, "cluster": 1, "bulk_bytes": 0}
    machine |= {"cluster_loads": 0, "cluster_bytes": 0, "cluster_total": 0, "sum_loads": late_loads, "together": False}
    machine |= {"atomics": late_loads, "late_bytes": late_loads * 8 * 512, "late_total": 0, "late_stored": 0}
    machine |= {"last_loads": 0, "last_shared": 0}
    return Row("shrink", m, n, r, blocks, large, large, 0, 0, large, 1.0, 1.0, 1, machine)


def found(**changes) -> tuple:
    made = {"_ZN4lotr7kernels6shrinkE": kernel(64)}
    return estimate(row(**changes), made, "h100")


def test_an_estimate_is_the_sum_of_its_parts():
    e = found()
    t = e.at()
    assert t.seconds == pytest.approx(sum(t.parts.values())) and t.share == pytest.approx(e.least_seconds / t.seconds)
    assert e.resident == 3 and e.waves == pytest.approx(132 / (3 * 132)) and e.idle == 0
    assert e.per_16_bytes == pytest.approx(13 / 2)  # 13 instructions for two copies
    assert e.in_flight == 3 * 2 * 512 * 8  # the wait leaves two groups, one more is committed after it
    assert t.limiter == max(t.bound, key=t.bound.__getitem__) or t.limiter.startswith("issue")


def test_more_blocks_than_places_take_another_wave():
    one, two = found(blocks=3 * 132), found(blocks=3 * 132 + 1)
    assert one.idle == 0 and two.idle == pytest.approx(1 - 1 / 132)
    assert two.at().bound["issue"] > 1.2 * one.at().bound["issue"]
    assert found(blocks=200).idle == pytest.approx(64 / 264)


def test_sums_after_the_last_arrival_cost_a_latency_a_round():
    summing = code(
        "LDG.E.128 R0, [R4.64] | 1 0", "LDG.E.128 R8, [R4.64] | 1 0", "FADD R2, R0, R2 | 4 - 1", "@P0 BRA 0x0 | 5", "EXIT"
    )
    late = late_sums(summing, 8, CARDS["h100"])
    assert late.loads == 2 and 263 < late.cycles < 420
    serial = code(
        "LDG.E.128 R0, [R4.64] | 1 0", "FADD R2, R0, R2 | 4 - 1", "LDG.E.128 R8, [R4.64] | 1 0", "FADD R2, R8, R2 | 4 - 1"
    )
    serial += code("@P0 BRA 0x0 | 5", "EXIT", start=64)
    assert late_sums(serial, 8, CARDS["h100"]).cycles > 2 * 263  # two loads, one after the other
    made = {
        "_ZN4lotr7kernels6shrinkE": kernel(64, loop() + [dataclasses.replace(i, address=i.address + 0x1000) for i in summing])
    }
    short, long = (estimate(row(late_loads=n), made, "h100") for n in (0, 400))
    assert short.at().parts["after"] * CARDS["h100"].clock == pytest.approx(263)  # the last store
    assert long.at().parts["after"] > 200 * 263 / CARDS["h100"].clock
    one, two, three = (estimate(row(late_loads=n), made, "h100") for n in (1, 2, 3))
    assert (one.late_rounds, two.late_rounds, three.late_rounds) == (1, 1, 2) and one.idle == short.idle
    assert one.at().parts["after"] * CARDS["h100"].clock == pytest.approx(4 * 263)  # a round of half the loads: a load's time
    assert two.at().parts["after"] + 263 / CARDS["h100"].clock == pytest.approx(three.at().parts["after"])
    assert "sum at the end" in long.at().limiter and "sum at the end" not in short.at().limiter


def test_blocks_that_sum_together_wait_once_more_and_share_what_l2_gives():
    a100, made = CARDS["a100"], {"_ZN4lotr7kernels6shrinkE": kernel(64)}

    def late(kernel: str = "shrink", total: int = 0) -> Estimate:
        one = row(blocks=104, late_loads=1)
        more = {"warps": 12, "together": True, "late_total": total, "grid": [8, 13, 1]}
        return estimate(dataclasses.replace(one, kernel=kernel, machine=one.machine | more), made, "a100")

    def latencies(e: Estimate) -> float:
        return e.at().parts["after"] * a100.clock / a100.l2_latency

    q, last_q, k = in_turn(5, 13, 8), in_turn(2, 13, 8), in_turn(1, 8, 4)  # 64 fragments, or 16, over 13; 8 of k over 8
    assert (q, last_q, k) == (3, 3, 1) and late().late_rounds == q and latencies(late()) == pytest.approx(4 + q)
    # of the last column tile; beside it, by the warps that do not multiply, of the last row tile of k
    assert late("shrink_grad").late_rounds == max(last_q, k)
    much = 3_400_000  # bytes
    assert latencies(late(total=much)) == pytest.approx(5 + much / 108 / a100.l2_bytes_a_cycle / a100.l2_latency)
    assert (in_turn(9, 16, 8), in_turn(32, 16, 8), in_turn(33, 7, 8)) == (2, 4, 9)


def test_what_is_stored_and_read_at_the_end_is_paid_for():
    h100, made = CARDS["h100"], {"_ZN4lotr7kernels6shrinkE": kernel(64)}

    def after(blocks: int = 132, **more: int) -> float:
        one = row(blocks=blocks, late_loads=1)
        return estimate(dataclasses.replace(one, machine=one.machine | more), made, "h100").at().parts["after"] * h100.clock

    stored = 1 << 16
    assert after(late_stored=stored) - after() == pytest.approx(stored / 64)  # the last block's, alone
    assert after(late_stored=stored, cluster=8) - after(cluster=8) == pytest.approx(stored / 27)  # of all blocks at once
    assert after(264, late_stored=stored, cluster=8) - after(264, cluster=8) == pytest.approx(2 * stored / 27)
    assert after(33, late_stored=stored, cluster=8) - after(33, cluster=8) == pytest.approx(stored / 64)
    # of blocks that own what they make: their store, what they add to two loads at a time, their way through shared memory
    own = {"late_loads": 0, "atomics": 0}
    assert after(late_stored=stored, **own) - after(**own) == pytest.approx(stored / 27)
    assert after(last_loads=3, **own) - after(**own) == pytest.approx(2 * 263)
    assert after(last_shared=1 << 13, **own) - after(**own) == pytest.approx(2 * 29 + 20 + 64)
    total = 1 << 24  # bytes that all blocks sum
    assert after(late_total=total) - after() == pytest.approx(total / 132 / 27, abs=5)  # the load's own issue
    of_cluster = {"cluster": 8, "cluster_loads": 8, "cluster_bytes": 1 << 17, "grid": [16, 8, 1]}
    both, beside = after(sum_loads=9, **of_cluster), after(sum_loads=8, **of_cluster)
    assert both - beside == pytest.approx(263, abs=5)  # the load from L2 by the same threads, or by others meanwhile


def test_limits_that_are_equal_do_not_overlap_for_nothing():
    assert together([1.0, 0.0]) == 1.0 and together([1.0, 1.0]) == pytest.approx(2 ** (1 / 8)) and together([0.0]) == 0.0


# ---- the program -----------------------------------------------------------------------------------------------------


def test_without_tools_it_says_so_in_one_line(tmp_path, monkeypatch):
    arguments = ["--gpus", "h100", "--ranks", "16", "--shapes", "64x64", "--results", str(tmp_path)]
    monkeypatch.setattr(compiled, "tool", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"^nvcc: expected in CUDA_HOME/bin.*found none[^\n]*$"):
        program.main(arguments)
    monkeypatch.setattr(compiled, "tool", lambda name: "/bin/nvcc" if name == "nvcc" else None)
    with pytest.raises(FileNotFoundError, match=r"^nvdisasm: expected[^\n]*pip install nvidia-cuda-nvdisasm[^\n]*$"):
        program.main(arguments)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="results: cannot write"):
        program.main([*arguments[:-1], str(tmp_path / "file")])


def test_what_is_kept_is_shown_without_tools(tmp_path, monkeypatch, capsys):
    key = ("shrink", 64, 64, 16, "bf16", "h100")
    cell = {"case": dict(zip(predict.CASE, key)), "rival": "lotr_ext", "build": predict.model_id()}
    Store(tmp_path / predict.FILE).append(cell | {"estimate": dataclasses.asdict(found())})
    monkeypatch.setattr(compiled, "tool", lambda name: None)
    arguments = ["--gpus", "h100", "--ranks", "16", "--shapes", "64x64", "--kernels", "shrink", "--rows", ""]
    arguments += ["--results", str(tmp_path)]
    assert program.main(arguments) == 0
    out = capsys.readouterr().out
    assert (
        "not measured" in out and all(part in out for part in found().spread.us().split()) and "Assumed, with its source" in out
    )
    assert (tmp_path / "static.png").stat().st_size > 10_000


def test_assumptions_change_a_time_by_what_they_say():
    """One at a time, from none."""
    e = dataclasses.replace(found(), waves_of=[dict.fromkeys(LIMITS, 0.0) | {"memory bandwidth": 8e-6}], afters=[1e-6, 2e-6])
    none = Assumed(1, 1, 0, fold=0, fences=0, chain=0, launch=0.6e-6, main_loop=1, scouts=1)
    plain = e.at(none).seconds
    latencies = 2 * (BEGIN + CARDS["h100"].memory_latency) + EARLY  # the first launch hides the second's
    assert plain == pytest.approx(8e-6 + 3e-6 + latencies)
    slow = {"bandwidth": (0.8, 2e-6), "fences": (1e-6, 0), "chain": (1e-6, 0), "launch": (2e-6, 0.5e-6)}
    for name, (value, more) in slow.items():
        assert e.at(dataclasses.replace(none, **{name: value})).seconds - plain == pytest.approx(more, abs=1e-12), name
    with_maps = dataclasses.replace(e, maps=2, chains=1)
    both = dataclasses.replace(none, fences=1e-6, chain=1.5e-6)
    assert with_maps.at(both).seconds - plain == pytest.approx(2e-6 + 1.5e-6)
    low, likely, high = with_maps.spread
    assert low < likely < high and likely == with_maps.at(LIKELY).seconds


def test_ranges_are_in_order_and_have_an_origin():
    """By the time that follows: a share that is reached falls from low to high, all else rises."""
    for name, quantity in RANGES.items():
        rises = name not in ("bandwidth", "one_step", "main_loop")
        assert sorted(quantity[:3], reverse=not rises) == list(quantity[:3]) and quantity.origin, name


# ---- what the records are keyed by -----------------------------------------------------------------------------------


def test_comments_and_layout_invalidate_no_record(tmp_path):
    text = 'int a = 1;  // one\n/* two\n lines */ const char* b = "// no comment /* \\" */"; char c = \'"\'; // "\n'
    text += "#define N 1\nint d;"
    other = text.replace("// one", "").replace("int a = 1;", "int  a =\t1;").replace("two\n lines", "2") + "  // end"
    assert sources.tokens(text) == sources.tokens(other)
    for old, new in (("1;", "2;"), ("no comment", "text"), ("#define N 1\n", "#define N 1 ")):
        assert sources.tokens(text) != sources.tokens(text.replace(old, new)), new
    broken = "f(\n    a,\n    b)\n->c\n += 1.5f;\n#if N\n g<h>( );"
    assert sources.tokens("f(a, b)->c += 1.5f;\n#if N\ng<h>();") == sources.tokens(broken)
    assert sources.tokens("a++ + b") != sources.tokens("a + ++b") and sources.tokens("1 .5") != sources.tokens("1.5")
    main, header = tmp_path / "main.cu", tmp_path / "kernels" / "a.h"
    header.parent.mkdir()
    (tmp_path / "unused.h").write_text("int unused;")
    main.write_text('#include <cuda.h>\n#include "kernels/a.h"\n')
    header.write_text('#pragma once\n#include "b.h"\n')
    (header.parent / "b.h").write_text("int b;")
    files = sources.closure([main], [])
    assert [path.name for path in files] == ["a.h", "b.h", "main.cu"]
    before = sources.cpp_id(files)
    (header.parent / "b.h").write_text("int b;  // as before")
    assert sources.cpp_id(files) == before
    (header.parent / "b.h").write_text("long b;")
    assert sources.cpp_id(files) != before


def test_a_docstring_of_the_model_invalidates_no_estimate(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "__file__", str(tmp_path / "sources.py"))
    ids = []
    for text in (
        'def f():\n    """One."""\n    return 1\n',
        '# two\ndef f():\n    """2"""\n    return 1',
        "def f():\n    return 2",
    ):
        (tmp_path / "model.py").write_text(text)
        ids.append(sources.python_id(["model"]))
    assert ids[0] == ids[1] != ids[2]
