"""SASS listings of nvdisasm as instructions, with the scheduling fields that ptxas put into each encoding.

Since Volta the compiler decides what a warp waits for; each 16-byte instruction carries it in bits 105 to 125 (Jia, Maggioni,
Staiger, Scarpazza, "Dissecting the NVIDIA Volta GPU architecture via microbenchmarking", arXiv 1804.06826, section 2.1): cycles
to the next issue, a scoreboard that its result or its reading of operands sets, and the scoreboards that it waits for.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

_FUNCTION = re.compile(r"^\.text\.(\S+):$")
_LABEL = re.compile(r"^(\.L\S*):$")
_FIRST = re.compile(
    r"^\s*/\*([0-9a-f]{4,6})\*/\s+(?:@(!?U?P[0-9T]+)\s+)?([A-Z][A-Z0-9_.x]*)\s*([^;]*);\s*/\* 0x([0-9a-f]{16}) \*/"
)
_SECOND = re.compile(r"^\s*/\* 0x([0-9a-f]{16}) \*/")
LISTED = re.compile(r"^(\.text\.\S+:|\.L\S*:|\s*/\*[0-9a-f]{4,6}\*/.*|\s*/\* 0x[0-9a-f]{16} \*/.*)$")  # the lines that matter
NONE = 7  # no scoreboard
_ENDS = ("EXIT", "RET", "BRX", "BREAK")


@dataclass(frozen=True)
class Instruction:
    address: int
    guard: str  # "P0", "!UP1", or "" where it always runs
    opcode: str  # with its modifiers: LDGSTS.E.BYPASS.128.ZFILL
    operands: str
    stall: int  # cycles to the warp's next issue
    sets: tuple[int, ...]  # scoreboards held until its result is there, or its operands are read
    waits: int  # mask of scoreboards
    targets: tuple[int, ...] = ()  # addresses where a branch may go; a CALL that leaves no return address is one

    @property
    def name(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def ends(self) -> bool:
        """Whether control never reaches the next instruction."""
        return not self.guard and (self.name in _ENDS or (bool(self.targets) and "P" not in self.operands.split(",")[0]))

    @property
    def never(self) -> bool:
        return self.guard in ("!PT", "!UPT")

    @property
    def width(self) -> int:
        """Bytes of a lane's access to memory, or of its four 8 x 8 matrices in LDSM."""
        if self.name == "LDSM":
            return {"": 4, ".2": 8, ".4": 16}[next((m for m in (".4", ".2") if self.opcode.endswith(m)), "")]
        sizes = [int(part) for part in self.opcode.split(".")[1:] if part in ("8", "16", "32", "64", "128")]
        if sizes:
            return sizes[-1] // 8
        return 1 if ".U8" in self.opcode or ".S8" in self.opcode else 2 if ".U16" in self.opcode or ".S16" in self.opcode else 4


def parse(listing: str) -> dict[str, list[Instruction]]:
    """The instructions of each function of a listing (nvdisasm --print-instruction-encoding), or of several in a row: a label
    is known in its own function."""
    functions: dict[str, list[Instruction]] = {}
    labels: dict[str, dict[str, int]] = {}
    pending: list[str] = []  # labels of the next instruction
    code: list[Instruction] = []
    known: dict[str, int] = {}
    first: re.Match | None = None
    for line in listing.splitlines():
        if match := _FUNCTION.match(line):
            code, known = functions.setdefault(match[1], []), labels.setdefault(match[1], {})
        elif match := _LABEL.match(line):
            pending.append(match[1])
        elif match := _FIRST.match(line):
            first = match
            known |= dict.fromkeys(pending, int(match[1], 16))
            pending = []
        elif first is not None and (match := _SECOND.match(line)):
            code.append(_decode(first, int(match[1], 16)))
            first = None
    return {name: [_aim(i, labels[name]) for i in own] for name, own in functions.items() if own}


def _decode(first: re.Match, high: int) -> Instruction:
    control = high >> 41
    sets = tuple(board for board in (control >> 5 & 7, control >> 8 & 7) if board != NONE)
    address, guard, opcode, operands = int(first[1], 16), first[2] or "", first[3], first[4].strip()
    return Instruction(address, "" if guard == "PT" else guard, opcode, operands, control & 15, sets, control >> 11 & 63)


def _aim(i: Instruction, labels: dict[str, int]) -> Instruction:
    """The instruction, if a branch, with the addresses of its targets."""
    if i.name not in ("BRA", "BRX") and i.opcode != "CALL.REL.NOINC":
        return i
    named = re.findall(r"\.L\w+", i.operands)
    return replace(i, targets=tuple(labels[name] for name in named if name in labels))


# ---- control flow ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """Instructions that run one after another, and the blocks that may follow."""

    code: tuple[Instruction, ...]
    next: tuple[int, ...]  # starts; falling through first


def blocks_of(code: list[Instruction]) -> dict[int, Block]:
    """The basic blocks by start address."""
    known = {i.address for i in code}
    starts = {code[0].address} if code else set()
    for here, after in zip(code, [*code[1:], None]):
        if here.targets or here.name in _ENDS:
            starts |= {a for a in (*here.targets, after.address if after else None) if a in known}
    blocks: dict[int, Block] = {}
    own: list[Instruction] = []
    for here, after in zip(code, [*code[1:], None]):
        own.append(here)
        if after is not None and after.address not in starts:
            continue
        follow = [] if here.ends or after is None else [after.address]
        follow += [target for target in here.targets if target in known]
        blocks[own[0].address] = Block(tuple(own), tuple(dict.fromkeys(follow)))
        own = []
    return blocks


def loops_of(blocks: dict[int, Block]) -> dict[int, set[int]]:
    """Natural loops: for each block that an edge leads back to, the blocks from which it comes again. In a listing of ptxas an
    edge to a lower or equal address is such an edge, once the head dominates its source."""
    before: dict[int, set[int]] = {start: set() for start in blocks}
    for start, block in blocks.items():
        for follow in block.next:
            before[follow].add(start)
    reachable = _reachable(blocks, min(blocks)) if blocks else set()
    loops: dict[int, set[int]] = {}
    for source in reachable:
        for head in blocks[source].next:
            if head > source or (head != min(blocks) and source in _reachable(blocks, min(blocks), without=head)):
                continue
            body, todo = {head}, [source]
            while todo:
                at = todo.pop()
                if at not in body:
                    body.add(at)
                    todo += [b for b in before[at] if b in reachable]
            loops.setdefault(head, set()).update(body)
    return loops


def _reachable(blocks: dict[int, Block], start: int, without: int | None = None) -> set[int]:
    found, todo = set(), [start]
    while todo:
        at = todo.pop()
        if at not in found and at != without:
            found.add(at)
            todo += blocks[at].next
    return found
