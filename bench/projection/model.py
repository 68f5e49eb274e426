"""Models a kernel's time and its limit: the longest of its blocks' tasks, plus the time before and after.

    time = begin + sum over waves of max(issue, memory) + after the last arrival, under a set of assumptions

issue     the hot loop's instructions on one multiprocessor (issue.py), with as many blocks resident as registers, shared memory
          and threads allow and the grid gives
cluster   what blocks read of one another's shared memory during the walk, beside what lands there
memory    bytes from DRAM at the bandwidth that is reached, or less where too few bytes are in flight: copies committed and
          not yet waited for (the operand of the loop's wait), against bandwidth x latency; all bytes from L2 at its own
after     the sums over the splits, of each tile by the last block: rounds of as many loads as its code keeps in flight, each an
          L2 latency, or its bytes at what one multiprocessor gets from L2, or those of all blocks at what all get; the arrival
          itself; and of every block what it then adds to, its way through shared memory and its last store. Of splits that
          are a cluster: its barrier, the bytes that each block reads of the others, beside the rest where other warps do
          it, and the store. Of a cooperative launch, whose blocks all sum: the wait for the last arrival as well
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

from ..measure.bounds import kernel_work
from . import cards
from .assumptions import BEGIN, EARLY, LIKELY, Assumed, Spread
from .cards import CARDS, Card
from .compiled import Compiled
from .counts import ELEMENT, Row, constants
from .hot import MATRIX, Hot, Wanted, hot_loop
from .issue import Run, run
from .sass import Instruction, blocks_of, loops_of

ITERATIONS = 14  # of the hot loop that are simulated


def blocks_resident(kernel: Compiled, warps: int, shared: int, card: Card) -> tuple[int, str]:
    """Blocks that fit on a multiprocessor, and what limits their number."""
    unit = cards.REGISTER_UNIT
    a_warp = math.ceil(kernel.registers * 32 / unit) * unit
    asked = shared + kernel.static_shared + cards.SHARED_RESERVED
    a_block = math.ceil(asked / cards.SHARED_UNIT) * cards.SHARED_UNIT
    limits = {
        "registers": cards.REGISTERS // a_warp // cards.WARP_UNIT * cards.WARP_UNIT // warps,
        "shared memory": card.shared_bytes // a_block,
        "threads": card.threads // (32 * warps),
    }
    least = min(limits, key=limits.__getitem__)
    return limits[least], least


@dataclass(frozen=True)
class Late:
    """How the last block to arrive sums what the others stored: loads of a thread in one round, and the round's cycles."""

    loads: int
    cycles: float


def late_sums(code: list[Instruction], warps: int, card: Card) -> Late:
    """From the loop without copies and products that has the most 16-byte loads, run like the hot loop, so that loads which
    the compiler made wait for one another do; where there is none, from straight code: as many loads as are issued before one
    of them is waited for, at L2's latency."""
    blocks, found = blocks_of(code), []
    for body in loops_of(blocks).values():
        own = blocks[min(body)].code if len(body) == 1 else ()
        if _wide_loads(own) > 1 and not any(i.name in (*MATRIX, "LDGSTS") for i in own):
            found.append(Late(_wide_loads(own), run([own] * ITERATIONS, warps, 1, card.latencies()).cycles))
    most = max((late.loads for late in found), default=0)
    if most:  # of alike loops the slowest
        return max((late for late in found if 2 * late.loads > most), key=lambda late: late.cycles / late.loads)
    loads = max(1, _together(code))
    return Late(loads, max(card.l2_latency + 4 * loads, warps * loads * 512 / cards.L2_ONE))


def in_turn(fragments: int, splits: int, warps: int) -> int:
    """How many loads of a thread wait for one another where so many warps sum so many fragments of 16 x 8 over so many
    splits (csrc/cuda/tile/reduce.cuh): 16 go together, of fewer splits by halves of that; of several fragments alike."""
    a_warp = math.ceil(fragments / warps)
    together = 1 if a_warp <= 1 else 2 if a_warp % 4 in (1, 2) else 4
    ahead = 16 // together
    return math.ceil(a_warp / together) * (splits // ahead + (splits % ahead).bit_count())


def rounds_together(row: Row) -> int:
    """The same of a block of a cooperative launch: its share of D or Q. In shrink_grad without wgmma that of the last column
    tile, the others' sums being made before; beside it, by other warps, its share of the last row tile of k."""
    owners, splits = row.machine["grid"][:2]
    ranks, columns, multiply = math.ceil(row.r / 8), math.ceil(row.n / owners), row.machine["multiply"]
    if row.kernel != "shrink_grad" or row.machine["bulk_bytes"]:
        return in_turn(math.ceil(math.ceil(columns / 16) * ranks / splits), splits, multiply)
    tile = constants()["SHRINK_GRAD_ROW_BYTES"] // (row.large // (row.m * row.n))
    q = math.ceil(math.ceil(min(columns, tile) / 16) * ranks / splits)
    k = math.ceil(constants()["SHRINK_GRAD_ROWS"] // 16 * ranks / owners)
    return max(in_turn(q, splits, multiply), in_turn(k, owners, row.machine["warps"] - multiply))


def _wide_loads(code: Iterable[Instruction]) -> int:
    return sum(i.name == "LDG" and i.width == 16 for i in code)


def _together(code: list[Instruction]) -> int:
    """The most 16-byte loads that are issued before one of them is waited for."""
    most, count, pending = 0, 0, set()
    for i in code:
        if any(i.waits >> board & 1 for board in pending) or i.targets or i.name == "EXIT":
            count, pending = 0, set()
        if i.name == "LDG" and i.width == 16:
            count += 1
            most = max(most, count)
            pending |= set(i.sets)
    return most


SHARPNESS = 8
LIMITS = ("issue", "memory bandwidth", "bytes in flight", "L2 bandwidth", "cluster")


def together(seconds: Iterable[float]) -> float:
    """Limits that overlap, but not quite where two are equal: a power mean, 9 % above either of two equal ones."""
    limits = list(seconds)
    most = max(limits)
    return most * sum((s / most) ** SHARPNESS for s in limits) ** (1 / SHARPNESS) if most else 0.0


def gap(card: Card, after: float | None, assumed: Assumed) -> float:
    """Seconds between two kernels of a stream. after: how long the one ahead still runs when the second may begin; None: as
    long as any that was not launched early."""
    return assumed.launch if after is None or not card.early else max(EARLY, assumed.launch - after)


class Timed(NamedTuple):
    """A kernel's seconds under a set of assumptions."""

    seconds: float
    parts: dict[str, float]  # begin, waves, after; together they are the seconds
    bound: dict[str, float]  # what each of LIMITS alone asks for
    limiter: str
    share: float  # of the data sheet's bandwidth


@dataclass(frozen=True)
class Estimate:
    """An operator on a GPU, from its machine code and the executor's counts. Kept in a file; `at` adds the assumptions."""

    gpu: str  # of CARDS
    waves_of: list[dict[str, float]]  # seconds that each of LIMITS alone asks for, a wave of blocks; bytes at the data sheet's
    afters: list[float]  # seconds after the last arrival, a launch; launches follow one another
    maps: int  # launches that fetch tensor maps
    chains: int  # and those whose clusters exchange k
    reason: str  # what the warps of the busiest multiprocessor wait for
    registers: int
    spilled: int
    shared: int
    resident: int
    resident_by: str
    blocks: int
    waves: float
    idle: float  # multiprocessors' share in the last wave
    iteration: float  # instructions a warp and hot iteration
    per_16_bytes: float  # instructions a thread for each 16 bytes of the large matrix
    kinds: dict[str, float]  # of these, by kind
    waiting: dict[str, float]  # a warp's time in the hot loop on the busiest multiprocessor
    in_flight: int  # bytes a multiprocessor
    needed_in_flight: float
    dram: int  # bytes
    late_rounds: int
    launches: int
    memsets: int

    def at(self, assumed: Assumed = LIKELY) -> Timed:
        card = CARDS[self.gpu]
        bound, hot = dict.fromkeys(LIMITS, 0.0), 0.0
        for wave in self.waves_of:
            limits = wave | {"memory bandwidth": wave["memory bandwidth"] / assumed.bandwidth}
            bound = {name: bound[name] + limits[name] for name in LIMITS}
            hot += together(limits.values())
        begin = len(self.afters) * (BEGIN + card.memory_latency) + self.maps * assumed.fences
        begin += sum(gap(card, after, assumed) for after in self.afters[:-1])
        parts = {"begin": begin, "waves": hot, "after": sum(self.afters) + self.chains * assumed.chain}
        seconds, most = sum(parts.values()), max(bound, key=bound.__getitem__)
        limiter = f"reads it {len(self.afters)} times; " if len(self.afters) > 1 else ""
        limiter += f"issue ({self.reason})" if most == "issue" else most
        limiter += ", sum at the end" if parts["after"] > 0.25 * seconds else ""
        return Timed(seconds, parts, bound, limiter, self.least_seconds / seconds)

    @property
    def spread(self) -> Spread:
        return Spread.of(lambda assumed: self.at(assumed).seconds)

    @property
    def least_seconds(self) -> float:
        """The time of its bytes from DRAM at the data sheet's bandwidth."""
        return self.dram / CARDS[self.gpu].bytes_per_s


def in_turns(own: list[Estimate]) -> Estimate:
    """Sequential launches of one operator; the numbers of the code are those of the longest."""
    longest = max(own, key=lambda e: e.at().seconds)
    return replace(
        longest,
        waves_of=[wave for e in own for wave in e.waves_of],
        afters=[after for e in own for after in e.afters],
        **{name: sum(getattr(e, name) for e in own) for name in ("maps", "chains", "launches", "memsets")},
    )


def wanted_of(row: Row, large_stores: bool) -> Wanted:
    """The executor's counts of a row as the required work of the hot loop."""
    m = row.machine
    read = row.moved / 512 / (2 if large_stores else 1)
    stores = read if large_stores else None
    return Wanted(m["waits"] or None, m["copies"] or None, m["matrix"] or None, stores, read if m["copies"] else 0)


def hot_of(row: Row, compiled: dict[str, Compiled]) -> tuple[Compiled, Hot]:
    """The instance that ran under the executor, and its hot loop."""
    symbol = row.machine["symbol"]
    own = next((one for one in compiled.values() if symbol and instance(one.symbol) == instance(symbol)), None)
    if own is None:
        raise ValueError(f"{row.kernel}: expected the instance {symbol or '(none)'} among the compiled kernels, found none")
    return own, hot_loop(own.code, wanted_of(row, row.kernel == "expand_add"))


def instance(symbol: str) -> str:
    """The kernel and its template's arguments. Its parameters differ where one is a tensor map, whose type the host lacks."""
    return symbol.partition("EEv")[0]


def dram_bytes(row: Row) -> int:
    """The large matrix as moved, every other operand once; what is read again and partial sums stay in L2."""
    element = row.large // (row.m * row.n * (2 if row.kernel == "expand_add" else 1))
    return row.moved + kernel_work(row.kernel, row.m, row.n, row.r, element).bytes - row.large


def hot_waves(row: Row, hot: Hot, resident: int, card: Card) -> tuple[list[dict[str, float]], float, Run]:
    """Seconds that each of LIMITS alone asks for, a wave of blocks; bytes in flight of a block; how the multiprocessor with
    the most blocks runs the loop."""
    m, warps = row.machine, row.machine["multiply"]
    clock, sms = card.clock, card.multiprocessors
    places = resident * sms
    full, rest = divmod(row.blocks, places)
    iterations = hot.iterations / (row.blocks * warps)  # of a warp
    trace = hot.trace(ITERATIONS)
    latencies = card.latencies()
    walked = max(0, m["cluster_total"] - row.blocks * m["cluster_bytes"])  # bytes from the cluster before the last products
    runs = {}

    def cycles(blocks: int) -> float:
        if blocks not in runs:
            arriving = (m["bulk_bytes"] + walked) / (row.blocks * iterations)
            runs[blocks] = run(trace, warps, blocks, latencies, arriving=arriving)
        return runs[blocks].cycles

    depth = groups_in_flight(hot)
    a_block = depth * 512 * m["copies"] / m["waits"] * warps if m["waits"] else float(bulk_in_flight(row))
    dram = dram_bytes(row)
    l2 = min(card.l2_bytes_a_cycle * sms, cards.L2_ONE * min(sms, row.blocks)) * clock  # fewer blocks draw no more
    waves = []
    for times, blocks in ((full, places), (1, rest)):
        if times * blocks:
            own = times * blocks / row.blocks  # share of the work
            on_one = math.ceil(blocks / sms)
            flight = own * dram * card.memory_latency / (a_block * blocks) if a_block else 0.0
            cluster = times * on_one * walked / row.blocks / cards.CLUSTER_ONE / clock
            issue = times * iterations * cycles(on_one) / clock
            limits = (issue, own * dram / card.bytes_per_s, flight, own * row.total / l2, cluster)
            waves.append(dict(zip(LIMITS, limits, strict=True)))
    return waves, a_block, runs[max(runs)]


def estimate(row: Row, compiled: dict[str, Compiled], gpu: str) -> Estimate:
    """Estimates a counted kernel on a GPU of CARDS."""
    card = CARDS[gpu]
    kernel, hot = hot_of(row, compiled)
    m = row.machine
    resident, by = blocks_resident(kernel, m["warps"], m["shared"], card)
    if resident < 1:
        raise ValueError(f"{row.kernel}: expected a block to fit on a multiprocessor, got {by} for none")
    sms = card.multiprocessors
    places = resident * sms
    rest = row.blocks % places
    waves, a_block, busiest = hot_waves(row, hot, resident, card)
    rounds, after = after_last_arrival(row, kernel, resident, card)
    bulk = bool(m["bulk_bytes"])
    large = row.moved / 16 / 32  # warps' 16-byte accesses
    return Estimate(
        gpu=gpu,
        waves_of=waves,
        afters=[after / card.clock],
        maps=int(bulk),
        chains=int(bulk and row.kernel == "shrink_grad" and m["cluster"] > 1),
        reason=busiest.reason,
        registers=kernel.registers,
        spilled=kernel.spilled,
        shared=m["shared"] + kernel.static_shared,
        resident=resident,
        resident_by=by,
        blocks=row.blocks,
        waves=row.blocks / places,
        idle=1 - rest / (math.ceil(rest / sms) * sms) if rest else 0.0,
        iteration=hot.instructions / hot.iterations,
        per_16_bytes=hot.instructions / large,
        kinds={kind: value / large for kind, value in hot.kinds().items()},
        waiting=busiest.waits,
        in_flight=int(a_block * min(resident, math.ceil(row.blocks / sms))),
        needed_in_flight=card.bytes_per_s * card.memory_latency / sms,
        dram=dram_bytes(row),
        late_rounds=rounds,
        launches=row.launches,
        memsets=m["memsets"],
    )


def after_last_arrival(row: Row, kernel: Compiled, resident: int, card: Card) -> tuple[int, float]:
    """Rounds of loads that the sums over the splits take, and all cycles after a block's last products."""
    m = row.machine
    rounds, summing = 0, 0.0
    if m["late_loads"]:
        late = late_sums(kernel.code, math.ceil(m["late_bytes"] / (512 * m["late_loads"])), card)  # by the warps that do
        whole, left = divmod(m["late_loads"], late.loads)
        rounds, summing = whole + (left > 0), whole * late.cycles
        if left:  # fewer bytes, but no less than a load's time
            summing += max(card.l2_latency, late.cycles * left / late.loads)
        # other blocks sum their own at the same time
        summing = max(summing, card.l2_latency + m["late_total"] / (card.multiprocessors * card.l2_bytes_a_cycle))
    together = m["together"]
    if together and m["late_loads"]:
        rounds = rounds_together(row)
        summing = max(summing, rounds * card.l2_latency)
    if m["cluster_loads"]:  # a round of them is a fragment's, from all blocks
        one = math.ceil(m["cluster_loads"] / m["cluster"])
        of_cluster = card.l2_latency + max(one * card.l2_latency, m["cluster_bytes"] / cards.CLUSTER_ONE)
        beside = m["sum_loads"] < m["cluster_loads"] + m["late_loads"]  # no thread does all of both
        rounds, summing = (max(rounds, one), max(summing, of_cluster)) if beside else (rounds + one, summing + of_cluster)
    if m["atomics"]:
        summing += (3 + together) * card.l2_latency  # store, arrive, wait, store
    else:
        summing += card.l2_latency  # store
        if not rounds:  # what a block adds to, as D: two loads of a thread at a time (csrc/cuda/tile/store.cuh)
            summing += math.ceil(m["last_loads"] / 2) * card.l2_latency
    # what is stored after the last products: by the last block alone, or by all where all sum or none has to
    sms, alone = card.multiprocessors, m["late_stored"] / cards.L2_ONE
    most = min(resident, math.ceil(row.blocks / sms)) * min(sms, row.blocks)
    at_once = m["late_stored"] * most / (card.l2_bytes_a_cycle * sms)
    summing += alone if rounds and not together and m["cluster"] == 1 else max(alone, at_once)
    if m["last_shared"]:  # its way through shared memory: a store, a barrier, a load, at 128 bytes a cycle
        latencies = card.latencies()
        summing += 2 * latencies.shared + latencies.barrier + m["last_shared"] / 128
    return rounds, summing


def bulk_in_flight(row: Row) -> int:
    """Bytes of the large matrix that bulk copies bring to a block at a time. shrink_grad's: half of the ring, while the other
    half is multiplied. The others': all stages but those that are multiplied and as many before them; a stage is a tile of x
    and as many rows of the factor, and factor_grad multiplies two at a time up to rank 64."""
    if not row.machine["bulk_bytes"]:
        return 0
    name = "SHRINK_GRAD_WGMMA" if row.kernel == "shrink_grad" else "ONE_PRODUCT_WGMMA"
    tile = constants()[f"{name}_ROWS"] * constants()[f"{name}_COLS"] * ELEMENT
    if row.kernel != "shrink_grad":
        together = 2 if row.kernel == "factor_grad" and row.r <= 64 else 1
        ranks = max(16, 1 << (row.r - 1).bit_length())  # that the kernel is compiled for
        stage = tile + constants()[f"{name}_ROWS"] * ranks * ELEMENT
        return (row.machine["shared"] // stage - 2 * together) * tile
    return constants()[f"{name}_STAGES"] // 2 * tile // 2


def groups_in_flight(hot: Hot) -> int:
    """Groups of copies under way while the loop multiplies: what its wait leaves, and the one committed after it."""
    left = [int(i.operands.split(",")[1], 16) for _, way in hot.ways for i in way if i.name == "DEPBAR"]
    return min(left) + 1 if left else 0
