"""The forms of the hardware's own instructions in PTX texts, so that those of the project's kernels can be looked up in the
programs of this folder.

    python -m csrc.interpreter.calibrate.forms    a table: form, programs that have it
"""

from __future__ import annotations

from collections.abc import Iterable

from csrc.interpreter import build as kernels
from csrc.interpreter.calibrate import build
from csrc.interpreter.launch import Library
from csrc.interpreter.parse import Constant, Instruction, Module, Vector

_FAMILIES = ("cp", "mbarrier", "ldmatrix", "movmatrix", "mma", "wgmma", "mapa", "barrier", "bar", "fence", "setmaxnreg")
_FAMILIES += ("griddepcontrol", "atom", "red", "shfl", "prefetch")
_ORDERED = ("acquire", "release", "acq_rel", "shared::cluster")  # a load or store with one of these belongs to the list, too
_SAME = {"s32": "b32", "u32": "b32"}  # of loads and stores: the same bits

# Forms of the project's kernels that no program has, and what supports the interpreter's reading of them.
ONLY_OURS = {
    "ld f32 shared::cluster v4": "the manual alone; cuda_sm90.cu loads from other blocks by generic addresses",
    "st b32 shared::cluster": "the manual alone; cuda_sm90.cu stores to another block by a generic address",
    "mbarrier arrive b64 cluster release shared::cluster": "without .release.cluster: sm90_gemm.cu",
    "mbarrier acquire b64 cluster parity shared::cta try_wait": "without .acquire.cluster: sm90_gemm.cu, cute_sm90.cu",
    "movmatrix aligned b16 m8n8 sync trans": "the manual alone",
}


def form(i: Instruction) -> str | None:
    """The instruction and its qualifiers, without what is the same to the PTX manual: the order of qualifiers, cache hints, the
    name of the global state space, and .relaxed and .gpu, which an atomic has by default. None for other instructions."""
    first = i.words[0]
    listed = first in _FAMILIES or (first in ("ld", "st") and any(word in i.words for word in _ORDERED))
    if not listed:
        return None
    words = {word for word in i.words[1:] if not word.startswith(("L1::", "L2::"))}
    if first in ("ld", "st"):
        words = {_SAME.get(word, word) for word in words}
    if first in ("atom", "ld", "st"):
        words -= {"global"}
    if first == "atom":
        words |= {"gpu"} if words & {"acq_rel"} else {"gpu", "relaxed"}
    if first == "wgmma" and i.words[1] == "mma_async":
        place = "registers" if isinstance(i.operands[1], Vector) else "shared memory"
        transposes = " ".join(str(o.bits) for o in i.operands[6:] if isinstance(o, Constant))
        return f"wgmma {i.words[4]} {i.words[-1]}, a in {place}, transposed {transposes}"
    return " ".join([first, *sorted(words)])


def forms(texts: Iterable[str]) -> set[str]:
    """Of all kernels in PTX texts."""
    found = {form(i) for text in texts for entry in Module(text).entries.values() for i in entry.instructions}
    return {f for f in found if f is not None}


def of_programs() -> dict[str, set[str]]:
    """The forms of each program of this folder."""
    return {name: forms(Library(build.library(name), capability).texts()) for name, capability in build.PROGRAMS.items()}


def of_kernels() -> set[str]:
    """The forms of the project's kernels, for sm_80 and sm_90a."""
    return set().union(*(forms(Library(kernels.module(capability), capability).texts()) for capability in kernels.CAPABILITIES))


if __name__ == "__main__":
    there = of_programs()
    for name in sorted(of_kernels()):
        print(f"{name:100} {', '.join(p for p, has in there.items() if name in has) or ONLY_OURS.get(name, 'none')}")
