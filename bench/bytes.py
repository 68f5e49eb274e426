"""Bytes that the CUDA kernels move, counted by the SIMT executor without a GPU.

    python -m bench.bytes                     kernels and layer at 8192 x 4096 x 4096, r = 16
    python -m bench.bytes --shapes 2048x4096x4096x64 --multiprocessors 108

A shape is tokens x in x out x rank, in bfloat16. A run takes minutes. The kernels run on the CPU
with the plan for a GPU, by default one with the 132 multiprocessors of an H100. Counted bytes are
exact, and the same in every run: all that the instructions of a warp read and write in global
memory.

What a kernel reads again of its factors, and partial sums, fit in a GPU's L2. A layer is therefore
shown with the large matrices as counted and everything else once, and in the worst case with every
counted byte. Operators of torch are assumed to move every operand once, which is their least. The
bytes of the frozen layer are subtracted. No GPU has run these kernels.

In this file m, n, r are the sizes of a kernel's operands: x [m, n], factors [n, r], u [m, r]. A
layer has k inputs and n outputs: its kernels that read x run at width k, those that read g at n.
"""

import itertools
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from csrc.simt import build

from .common import NAMES, RESULTS, commit, parser_of, replace_rows, show, sizes
from .rivals import LAYERS, Tensors

SHAPES = "8192x4096x4096x16"
DIMENSIONS = ("m", "k", "n", "r")
MULTIPROCESSORS = 132  # of an H100; 108: A100, 128: RTX 4090, 148: B200
OPTIONS: dict[str, dict[str, Any]] = {
    "shapes": {"type": sizes(*DIMENSIONS), "default": SHAPES, "help": f"MxKxNxR,.. ({SHAPES})"},
    "multiprocessors": {"type": int, "default": MULTIPROCESSORS, "help": f"({MULTIPROCESSORS})"},
    "results": {
        "type": Path,
        "default": RESULTS / "simt-executor",
        "help": "folder for the results",
    },
}
ELEMENT = 2  # bytes of bfloat16
RIVALS = ("lotr-eager", "lora-eager", "lora-in-place", "lora-beta")
Kernel = tuple[str, int, int, int]  # its name, and its sizes m, n, r
Directions = np.ndarray  # two numbers: bytes of forward, bytes of backward


# ---- torch's operators ---------------------------------------------------------------------------


class MovedBytes(TorchDispatchMode):
    """Adds up the bytes of the operands that operators read and of the results that they write.

    Operators that only make a view or an uninitialized tensor count nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        aliases = [result.alias_info for result in func._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in aliases)
        if not is_view and not func._schema.name.startswith("aten::empty"):
            results = out if isinstance(out, tuple) else (out,)
            self.total += sum(_bytes(t) for t in (*args, *results) if isinstance(t, Tensor))
        return out


def _bytes(t: Tensor) -> int:
    """Returns the bytes of a tensor, at most its storage's: an expanded tensor is read once."""
    return min(t.numel() * t.element_size(), t.untyped_storage().nbytes())


def library_bytes(rival: str, m: int, k: int, n: int, r: int) -> Directions:
    """Returns the bytes of a rival's layer, recorded on tensors without data."""
    layer = LAYERS[rival](Tensors.random(k, n, r, torch.bfloat16, "meta"))
    x = torch.empty(m, k, dtype=torch.bfloat16, device="meta", requires_grad=True)
    with MovedBytes() as forward:
        y = layer(x)
    with MovedBytes() as backward:
        y.backward(torch.empty_like(y))
    return np.array([forward.total, backward.total])


# ---- our kernels ---------------------------------------------------------------------------------


def aligned(*shape: int, dtype: type = np.uint16) -> np.ndarray:
    """Returns zeros at a multiple of 256 bytes, as from torch's allocator on a GPU."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.zeros(size + 256, np.uint8)
    start = -memory.ctypes.data % 256
    return memory[start : start + size].view(dtype).reshape(shape)


class Operands(NamedTuple):
    """The arrays that a kernel reads and writes.

    Attributes:
        dimensions: The dimensions of each array, a letter for each: m, n, r.
        large: The largest array. With tokens, it is too large for the L2.
        added_to: The array that is read and written, "" if there is none.
    """

    dimensions: dict[str, str]
    large: str
    added_to: str = ""


OPERANDS = {
    "shrink": Operands({"x": "mn", "A": "nr", "u": "mr"}, large="x"),
    "expand_add": Operands({"y": "mn", "u": "mr", "F": "nr"}, large="y", added_to="y"),
    "factor_grad": Operands({"D": "nr", "x": "mn", "v": "mr"}, large="x", added_to="D"),
    "shrink_grad": Operands({"g": "mn", "F": "nr", "u": "mr", "du": "mr", "Q": "nr"}, large="g"),
    "fold": Operands({"B": "nr", "core": "rr", "F": "nr"}, large="F"),
    "fold_grad": Operands(
        {"Q": "nr", "B": "nr", "core": "rr", "dcore": "rr", "dB": "nr"}, large="Q", added_to="dB"
    ),
}
SUMS = ("D", "Q", "dcore", "dB")  # float32


def arrays_of(kernel: str, m: int, n: int, r: int) -> dict[str, np.ndarray]:
    """Returns the arrays that the executor's `run` takes. uint16 stands for bfloat16."""
    lengths = {"m": m, "n": n, "r": r}
    return {
        array: aligned(
            *(lengths[letter] for letter in letters),
            dtype=np.float32 if array in SUMS else np.uint16,
        )
        for array, letters in OPERANDS[kernel].dimensions.items()
    }


def count(executor: ModuleType, kernel: Kernel, multiprocessors: int) -> dict[str, Any]:
    """Runs one kernel and counts.

    Returns:
        These columns of its row:

            bytes           all that it moves
            least_bytes     every operand once, but twice if it is added to
            large_times     how often the large matrix moves
            dram_bytes      the least, but the large matrix as often as it moves
            sectors_used    the share of the bytes of all touched 32-byte sectors that is used
            bank_conflicts  wavefronts per access to shared memory, 1 without conflicts
            launches        how many the kernel takes
    """
    name = kernel[0]
    arrays = arrays_of(*kernel)
    operands = OPERANDS[name]
    once = {array: values.size * values.itemsize for array, values in arrays.items()}
    if operands.added_to:
        once[operands.added_to] *= 2
    executor.set_device(multiprocessors=multiprocessors)
    executor.set_options(count_memory=True)
    executor.reset_counters()
    executor.run(name, arrays)
    counters = executor.counters()
    executor.set_options()  # all at their defaults again: nothing is counted
    counted = pd.DataFrame(counters["arrays"]).T
    moved = counted["read_bytes"] + counted["written_bytes"]
    sectors = (counted["read_sectors"] + counted["written_sectors"]).sum()
    least = sum(once.values())
    large = moved[operands.large]
    return {
        "bytes": moved.sum(),
        "least_bytes": least,
        "large_times": large / once[operands.large],
        "dram_bytes": least + large - once[operands.large],
        "sectors_used": moved.sum() / (32 * sectors),
        "bank_conflicts": counters["shared_wavefronts"] / max(1, counters["shared_phases"]),
        "launches": len(counters["launches"]),
    }


def kernels_of(m: int, k: int, n: int, r: int) -> dict[str, list[Kernel]]:
    """Returns the kernels that a layer runs in each direction, whatever its strategy, and "adds".

    "adds" run only in two passes: after y = x W^T, and after dx = g W.
    """
    return {
        "forward": [("shrink", m, k, r), ("fold", 1, n, r)],
        "backward": [("shrink_grad", m, n, r), ("fold_grad", 1, n, r), ("factor_grad", m, k, r)],
        "adds": [("expand_add", m, n, r), ("expand_add", m, k, r)],
    }


def layer_bytes(
    counts: dict[Kernel, dict[str, Any]], m: int, k: int, n: int, r: int
) -> dict[str, Directions]:
    """Returns the bytes that a layer adds to the frozen one, by strategy, and the least possible.

    The strategies differ in how u F^T [m, n] reaches y in forward, and du A^T [m, k] reaches dx in
    backward:

    two passes   it is added to the base product's result, by expand_add
    beta         it is written first, and the base product adds onto it: one more write and read
    fused        the base product reads u and F as one more k-step
    """
    kernels = kernels_of(m, k, n, r)

    def summed(column: str) -> Directions:
        sides = (kernels["forward"], kernels["backward"])
        return np.array([sum(counts[kernel][column] for kernel in side) for side in sides])

    widths = np.array([n, k])  # of y and of dx
    two_pass = np.array([counts[kernel]["dram_bytes"] for kernel in kernels["adds"]])
    # The result is written, then read by the base product. u and F are read.
    beta = ELEMENT * (2 * m * widths + m * r + widths * r)
    fused = ELEMENT * (m * r + widths * r)
    factors = ELEMENT * r * (k + n)
    return {
        "lotr_ext, two passes": summed("dram_bytes") + two_pass,
        "lotr_ext, beta": summed("dram_bytes") + beta,
        "lotr_ext, fused": summed("dram_bytes") + fused,
        "lotr_ext, beta, nothing from L2": summed("bytes") + beta,
        # Forward reads the factors. Backward also writes their gradients, and reads x again.
        "least possible": np.array([factors, 2 * factors + ELEMENT * m * k]),
    }


# ---- the program ---------------------------------------------------------------------------------


def measure(
    shape: dict[str, int], multiprocessors: int, executor: ModuleType
) -> list[dict[str, Any]]:
    """Returns a row per kernel and a row per layer."""
    m, k, n, r = (shape[name] for name in DIMENSIONS)
    provenance = {"multiprocessors": multiprocessors, "commit": commit()}
    kernels = itertools.chain(*kernels_of(m, k, n, r).values())
    counts: dict[Kernel, dict[str, Any]] = {}
    rows = []
    for kernel in dict.fromkeys(kernels):
        name, tokens, width, rank = kernel
        print(f"{name} {tokens} x {width}, r {rank}", file=sys.stderr, flush=True)
        counts[kernel] = count(executor, kernel, multiprocessors)
        case = {"m": tokens, "k": width, "n": width, "r": rank}
        rows.append({**case, **provenance, "rival": name, "stage": "kernel", **counts[kernel]})
    frozen = library_bytes("frozen", m, k, n, r)
    layers = {NAMES[rival]: library_bytes(rival, m, k, n, r) - frozen for rival in RIVALS}
    layers |= layer_bytes(counts, m, k, n, r)
    for name, (forward, backward) in layers.items():
        moved = {"forward_bytes": forward, "backward_bytes": backward, "bytes": forward + backward}
        rows.append({**shape, **provenance, "rival": name, "stage": "layer", **moved})
    return rows


def _megabytes(value: float) -> str:
    return f"{value / 1e6:.1f} MB"


def tables(rows: list[dict[str, Any]], shape: dict[str, int], multiprocessors: int) -> None:
    frame = pd.DataFrame(rows)
    kernels, layers = (frame[frame["stage"] == stage] for stage in ("kernel", "layer"))
    text = "{m} x {k} x {n}, r {r}, bf16".format(**shape)
    planned = f"planned for {multiprocessors} multiprocessors (SIMT executor, no GPU)"
    show(
        f"Counted bytes, {planned}: {text}",
        pd.DataFrame(
            {
                "kernel": kernels.apply("{rival} {m} x {n}".format_map, axis=1),
                "counted": kernels["bytes"].map(_megabytes),
                "every operand once": kernels["least_bytes"].map(_megabytes),
                "the large matrix moves": kernels["large_times"].map("{:.3f} times".format),
                "32-byte sectors used": kernels["sectors_used"].map("{:.1%}".format),
                "bank conflicts": kernels["bank_conflicts"].map("{:.3f}".format),
            }
        ),
    )
    show(
        f"Bytes of a layer, {text}: our kernels counted, operators of torch at their least",
        pd.DataFrame(
            {
                "a layer, beyond the frozen one": layers["rival"],
                "forward": layers["forward_bytes"].map(_megabytes),
                "backward": layers["backward_bytes"].map(_megabytes),
                "both": layers["bytes"].map(_megabytes),
                "of the least": (layers["bytes"] / layers["bytes"].min()).map("{:.1f}".format),
            }
        ),
    )


def main(argv: list[str] | None = None) -> int:
    options = parser_of("bytes", __doc__, OPTIONS).parse_args(argv)
    path = options.results / "bytes.jsonl"
    print("compiling the executor if its sources changed (about 90 s)", file=sys.stderr, flush=True)
    executor = build.load("plain")
    for shape in options.shapes:
        rows = measure(shape, options.multiprocessors, executor)
        replace_rows(path, rows, [*shape, "multiprocessors"])
        tables(rows, shape, options.multiprocessors)
    print(f"results in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
