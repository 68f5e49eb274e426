"""Runs small PTX texts in the interpreter: what the tests of single instructions share."""

from __future__ import annotations

import re

import numpy as np

from csrc.interpreter import arithmetic, barriers, conversion, copies, memory, products  # noqa: F401  they register the instructions
from csrc.interpreter.grid import Grid, Launch, Three
from csrc.interpreter.parse import Module
from csrc.interpreter.program import Program

REGISTERS = ".reg .pred %p<40>; .reg .b16 %h<40>; .reg .b32 %r<80>; .reg .f32 %f<40>; .reg .b64 %d<80>;"


def program(body: str, arrays: int = 0, shared: int = 0) -> Program:
    """A kernel: parameters p0, p1, ... of 64 bits, `shared` bytes called `memory`, and the registers %p, %h, %r, %f, %d."""
    parameters = ", ".join(f".param .u64 p{n}" for n in range(arrays))
    static = f".shared .align 128 .b8 memory[{shared}];" if shared else ""
    text = f".version 8.0\n.target sm_90a\n.visible .entry k({parameters}) {{ {REGISTERS} {static} {body} ret; }}"
    return Program(Module(text).entries["k"])


def run(
    body: str,
    *arrays: np.ndarray,
    block: int = 32,
    grid: Three = (1, 1, 1),
    cluster: Three = (1, 1, 1),
    shared: int = 0,
    seed: int = 0,
    early: bool = False,
) -> Grid:
    """Runs `body`, which finds the addresses of the arrays in %d0, %d1, ... and may change them. Returns the grid that ran."""
    loads = "".join(f"ld.param.u64 %d{n}, [p{n}];" for n in range(len(arrays)))
    kernel = program(loads + body, len(arrays), shared)
    pointers = np.array([a.ctypes.data for a in arrays], np.uint64)
    addresses = {f"p{n}": pointers.ctypes.data + 8 * n for n in range(len(arrays))}
    launch = Launch(kernel, grid, (block, 1, 1), cluster, 0, False, early, addresses)
    ran = Grid(launch, seed)
    ran.run()
    return ran


def own(*sizes: int) -> str:
    """%r0: the thread's number; %d40, %d41, ...: the address of its element in each array, whose elements have these sizes."""
    wide = "".join(
        f"mul.wide.u32 %d{60 + n}, %r0, {size}; add.s64 %d{40 + n}, %d{n}, %d{60 + n};" for n, size in enumerate(sizes)
    )
    return f"mov.u32 %r0, %tid.x; {wide}"


_PREFIX = {0: "%p", 2: "%h", 4: "%r", 8: "%d"}


def compute(instruction: str, result: np.dtype | type, *operands: np.ndarray) -> np.ndarray:
    """`instruction` with D for its result and A, B, C for its operands, on each element of the operands: [32]."""
    out = np.zeros(32, result)
    sizes = [a.dtype.itemsize for a in operands]
    body = own(*sizes, out.itemsize)
    for n, size in enumerate(sizes):
        register = f"{_PREFIX[size]}{20 + n}"
        body += f"ld.global.u{8 * size} {register}, [%d{40 + n}];"
        instruction = re.sub(rf"\b{'ABC'[n]}\b", register, instruction)
    target = f"{_PREFIX[out.itemsize]}30"
    body += re.sub(r"\bD\b", target, instruction) + f"st.global.u{8 * out.itemsize} [%d{40 + len(sizes)}], {target};"
    run(body, *operands, out)
    return out


def predicate(instruction: str, *operands: np.ndarray) -> np.ndarray:
    """As compute, for an instruction whose result is a predicate: bool [32]."""
    return compute(re.sub(r"\bD\b", "%p0", instruction) + " selp.b32 D, 1, 0, %p0;", np.uint32, *operands).astype(bool)
