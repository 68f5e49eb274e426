"""Bytes that the CUDA kernels move, counted by the SIMT executor without a GPU, beside the least of each rival's operators.

    python -m bench.bytes                     the kernels and the whole layer at 8192 x 4096 x 4096, r = 16 (minutes)
    python -m bench.bytes --shapes 2048x4096x4096x64 --multiprocessors 108

A shape is tokens x in x out x rank, in bfloat16. The kernels run on the CPU with the split that the planner chooses for a GPU
of so many multiprocessors. Counted bytes are exact and the same in every run: all that a warp's instructions read and write in
global memory. What a kernel reads again of its factors, and partial sums, fit in a GPU's L2; so a whole layer is shown with the
large matrices as counted and everything else once, and the worst case with every counted byte. Operators of torch are taken to
move every operand once, which is their least. Layers are shown less the frozen layer's bytes. No GPU has run these kernels.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .common import NAMES, QUICK, RESULTS, commit, replace_rows, show, sizes
from .rivals import LAYERS, Tensors

FOLDER = RESULTS / "simt-executor"
SHAPES = "8192x4096x4096x16"
MULTIPROCESSORS = 132  # of an H100; 108: A100, 128: RTX 4090, 148: B200
ELEMENT = 2  # bytes of bfloat16
Key = tuple[str, int, int, int]  # kernel, tokens, width, rank
RIVALS = ("lotr-eager", "lora-eager", "lora-in-place", "lora-beta")


# ---- torch's operators -----------------------------------------------------------------------------------------------


class MovedBytes(TorchDispatchMode):
    """Adds up operands read and results written by operators that move data; views and empty tensors are free."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        is_view = any(
            r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns
        )
        if not is_view and not func._schema.name.startswith("aten::empty"):
            both = [*args, *(out if isinstance(out, tuple) else (out,))]
            self.total += sum(_bytes(t) for t in both if isinstance(t, Tensor))
        return out


def _bytes(t: Tensor) -> int:
    """Of a tensor's storage: an expanded tensor is read once."""
    return min(t.numel() * t.element_size(), t.untyped_storage().nbytes())


def library_bytes(rival: str, m: int, k: int, n: int, r: int) -> tuple[int, int]:
    """(forward, backward) of a rival's layer, recorded on tensors without data."""
    t = Tensors.random(k, n, r, torch.bfloat16, "meta")
    layer = LAYERS[rival](t)
    x = torch.empty(m, k, dtype=torch.bfloat16, device="meta", requires_grad=True)
    with MovedBytes() as forward:
        y = layer(x)
    g = torch.empty_like(y)
    with MovedBytes() as backward:
        y.backward(g)
    return forward.total, backward.total


# ---- our kernels -----------------------------------------------------------------------------------------------------


def executor() -> ModuleType:
    """The module that runs the kernels on the CPU, built if needed (a minute)."""
    from csrc.simt import build

    print(
        "compiling the executor, if its sources changed (about 90 s)", file=sys.stderr, flush=True
    )
    return build.load("plain")


def aligned(*shape: int, dtype: type = np.uint16) -> np.ndarray:
    """Zeros at an address divisible by 256, as from torch's allocator, with rows at multiples of 16 bytes."""
    size = np.dtype(dtype).itemsize
    row = -(-shape[-1] * size // 16) * 16 // size
    count = int(np.prod(shape[:-1])) * row * size
    raw = np.zeros(count + 256, np.uint8)
    start = -raw.ctypes.data % 256
    return raw[start : start + count].view(dtype).reshape(*shape[:-1], row)[..., : shape[-1]]


LARGE = {
    "shrink": "x",
    "expand_add": "y",
    "factor_grad": "x",
    "shrink_grad": "g",
    "fold": "F",
    "fold_grad": "Q",
}
TWICE = {"expand_add": "y", "factor_grad": "D", "fold_grad": "dB"}  # read and written


def arrays_of(kernel: str, m: int, n: int, r: int) -> dict[str, np.ndarray]:
    """The arrays that run() takes."""
    large, factor, narrow = (
        (lambda: aligned(m, n)),
        (lambda: aligned(n, r)),
        (lambda: aligned(m, r)),
    )
    sums = lambda *shape: aligned(*(shape or (n, r)), dtype=np.float32)  # noqa: E731
    if kernel == "shrink":
        return {"x": large(), "A": factor(), "u": narrow()}
    if kernel == "expand_add":
        return {"y": large(), "u": narrow(), "F": factor()}
    if kernel == "factor_grad":
        return {"D": sums(), "x": large(), "v": narrow()}
    if kernel == "shrink_grad":
        return {"g": large(), "F": factor(), "u": narrow(), "k": narrow(), "Q": sums()}
    if kernel == "fold":
        return {"B": factor(), "core": aligned(r, r), "F": factor()}
    return {"Q": sums(), "B": factor(), "core": aligned(r, r), "dcore": sums(r, r), "dB": sums()}


def count(lib: ModuleType, key: Key, multiprocessors: int) -> dict[str, Any]:
    """Runs one kernel. bytes: all that it moves; least_bytes: every operand once, sums read and written; large_times: how often
    the large matrix moves; dram_bytes: the least, with the large matrix as often as it moves."""
    kernel, arrays = key[0], arrays_of(*key)
    once = {
        name: a.size * a.itemsize * (1 + (TWICE.get(kernel) == name)) for name, a in arrays.items()
    }
    lib.set_device(multiprocessors=multiprocessors)
    lib.set_options(count_memory=True)
    lib.reset_counters()
    lib.run(kernel, arrays)
    counters = lib.counters()
    lib.set_options()
    moved = {name: a["read_bytes"] + a["written_bytes"] for name, a in counters["arrays"].items()}
    sectors = sum(a["read_sectors"] + a["written_sectors"] for a in counters["arrays"].values())
    least, total, large = sum(once.values()), sum(moved.values()), LARGE[kernel]
    found = {"bytes": total, "least_bytes": least, "large_times": moved[large] / once[large]}
    found |= {
        "dram_bytes": least + moved[large] - once[large],
        "sectors_used": total / (32 * sectors),
    }
    conflicts = counters["shared_wavefronts"] / max(1, counters["shared_phases"])
    return found | {"bank_conflicts": conflicts, "launches": len(counters["launches"])}


def keys_of(m: int, k: int, n: int, r: int) -> dict[str, list[Key]]:
    """The kernels of a layer by direction, of the three ways to order them (`layer_bytes`)."""
    forward = [("shrink", m, k, r), ("fold", 1, n, r)]
    backward = [("shrink_grad", m, n, r), ("fold_grad", 1, n, r), ("factor_grad", m, k, r)]
    return {
        "forward": forward,
        "backward": backward,
        "adds": [("expand_add", m, n, r), ("expand_add", m, k, r)],
    }


def layer_bytes(
    found: dict[Key, dict[str, Any]], m: int, k: int, n: int, r: int
) -> dict[str, tuple[int, int]]:
    """(forward, backward) beyond the frozen layer of each way to order a layer's kernels, and of the least possible.

    two passes: u F^T is added to the base product's y. beta: u F^T is written first, and the base product adds onto it.
    fused: the base product takes u and F as one more k-step (gemm_lotr, its operands once).
    """
    keys = keys_of(m, k, n, r)

    def summed(what: str, more: list[int]) -> tuple[int, int]:
        return tuple(
            sum(found[key][what] for key in keys[way]) + add
            for way, add in zip(("forward", "backward"), more)
        )

    beta = [
        ELEMENT * (2 * m * width + m * r + width * r) for width in (n, k)
    ]  # written, then read by the base product
    fused = [ELEMENT * (m * r + width * r) for width in (n, k)]
    made = {
        "lotr_ext, two passes": summed(
            "dram_bytes", [found[key]["dram_bytes"] for key in keys["adds"]]
        )
    }
    made |= {
        "lotr_ext, beta": summed("dram_bytes", beta),
        "lotr_ext, fused": summed("dram_bytes", fused),
    }
    made["lotr_ext, beta, nothing from L2"] = summed("bytes", beta)
    factors = ELEMENT * r * (k + n)
    return made | {"least possible": (factors, 2 * factors + ELEMENT * m * k)}


# ---- the program -----------------------------------------------------------------------------------------------------


def measure(shape: dict[str, int], multiprocessors: int, lib: ModuleType) -> list[dict[str, Any]]:
    """A row a kernel, and a row a whole layer."""
    sizes_of = tuple(shape.values())
    frozen = library_bytes("frozen", *sizes_of)
    about = {"multiprocessors": multiprocessors, "commit": commit()}
    found: dict[Key, dict[str, Any]] = {}
    for key in dict.fromkeys(key for keys in keys_of(*sizes_of).values() for key in keys):
        print(f"{key[0]} {key[1]} x {key[2]}, r {key[3]}", file=sys.stderr, flush=True)
        found[key] = count(lib, key, multiprocessors)
    rows = []
    for (kernel, m, n, r), counted in found.items():
        case = {"m": m, "k": n, "n": n, "r": r}
        rows.append({**case, **about, "rival": kernel, "stage": "kernel", **counted})
    layers = {NAMES[rival]: library_bytes(rival, *sizes_of) for rival in RIVALS}
    layers = {name: tuple(a - b for a, b in zip(both, frozen)) for name, both in layers.items()}
    layers |= layer_bytes(found, *sizes_of)
    for name, (forward, backward) in layers.items():
        both = {"forward_bytes": forward, "backward_bytes": backward, "bytes": forward + backward}
        rows.append({**shape, **about, "rival": name, "stage": "layer", **both})
    return rows


def tables(
    rows: list[dict[str, Any]], shape: dict[str, int], multiprocessors: int, markdown: bool
) -> None:
    frame = pd.DataFrame(rows)
    kernels, layers = (frame[frame["stage"] == stage] for stage in ("kernel", "layer"))
    megabytes = lambda value: f"{value / 1e6:.1f} MB"  # noqa: E731
    shown = pd.DataFrame(
        {
            "kernel": kernels["rival"]
            + kernels.apply(lambda row: f" {row['m']} x {row['n']}", axis=1),
            "counted": kernels["bytes"].map(megabytes),
            "every operand once": kernels["least_bytes"].map(megabytes),
            "the large matrix moves": kernels["large_times"].map("{:.3f} times".format),
            "32-byte sectors used": kernels["sectors_used"].map("{:.1%}".format),
            "bank conflicts": kernels["bank_conflicts"].map("{:.3f}".format),
        }
    )
    text = "{m} x {k} x {n}, r {r}, bf16".format(**shape)
    show(
        f"Counted bytes, planned for {multiprocessors} multiprocessors (SIMT executor, no GPU): {text}",
        shown,
        markdown,
    )
    least = layers["bytes"].min()
    shown = pd.DataFrame(
        {
            "a layer, beyond the frozen one": layers["rival"],
            **{name: layers[f"{name}_bytes"].map(megabytes) for name in ("forward", "backward")},
            "both": layers["bytes"].map(megabytes),
            "of the least": (layers["bytes"] / least).map("{:.1f}".format),
        }
    )
    show(
        f"Bytes of a whole layer, {text}: our kernels counted, operators of torch at their least",
        shown,
        markdown,
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.bytes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    convert = sizes("m", "k", "n", "r")
    parser.add_argument(
        "--shapes",
        type=convert,
        default=convert(SHAPES),
        help=f"MxKxNxR, comma-separated ({SHAPES})",
    )
    parser.add_argument(
        "--multiprocessors",
        type=int,
        default=MULTIPROCESSORS,
        help=f"of the GPU ({MULTIPROCESSORS})",
    )
    parser.add_argument(
        "--quick", action="store_true", help="one small shape, into demo_results/bench"
    )
    parser.add_argument(
        "--results", type=Path, help="folder for the results (bench/results/simt-executor)"
    )
    parser.add_argument(
        "--markdown", action="store_true", help="print the tables in Markdown, as docs have them"
    )
    options = parser.parse_args(argv)
    shapes = [{"m": 256, "k": 256, "n": 128, "r": 16}] if options.quick else options.shapes
    folder = options.results or (QUICK if options.quick else FOLDER)
    lib = executor()
    for shape in shapes:
        rows = measure(shape, options.multiprocessors, lib)
        replace_rows(folder / "bytes.jsonl", rows, [*shape, "multiprocessors"])
        tables(rows, shape, options.multiprocessors, options.markdown)
    print(f"results in {folder / 'bytes.jsonl'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
