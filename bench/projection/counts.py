"""Counts the bytes that each CUDA kernel moves, with the SIMT executor, over the minimum; needs no GPU.

    python -m bench.traffic                           kernels, whole layers, and a projection for known GPUs
    python -m bench.traffic --shapes 8192x4096x4096x16 --gpus h100
    python -m bench.traffic --blocks llama-3-8b:2048:16,qwen3-8b:8192:16

The kernels run on the CPU with the split that the planner chooses for a GPU's number of multiprocessors. The counts are exact
and deterministic: bytes of global memory that a warp's instruction accesses, per array, and 32-byte sectors. "large" is the
kernel's large matrix: x, g, or y in and out. Factors and partial sums are listed separately; most repeated reads hit L2.
A whole layer is its kernels and the base product, against the operators that eager LoRA runs (`layer_traffic`); what that would
take on a GPU is a projection (`projection`), no measurement. Counts are kept in bench/results/simt-executor/traffic.jsonl and
not made again while the kernels' sources stay as they are.
"""

from __future__ import annotations

import functools
import json
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from types import ModuleType
from typing import NamedTuple

import numpy as np

from ..measure.bounds import kernel_work
from ..measure.shapes import Shape
from ..measure.store import RESULTS, ROOT, Store, of_build, write_whole
from .compiled import SOURCES, WGMMA
from .sources import closure, cpp_id

FOLDER = RESULTS / "simt-executor"
CONSTANTS = FOLDER / "constants.json"
EXECUTOR = ROOT / "csrc" / "simt"
LAYER_SHAPES: list[Shape] = [(8192, 4096, 4096, 16), (2048, 4096, 4096, 16), (8192, 4096, 4096, 64), (8192, 4096, 14336, 16)]
KERNELS = ("shrink", "expand_add", "factor_grad", "shrink_grad")
SMALL = ("fold", "fold_grad")
LARGE = {"shrink": "x", "expand_add": "y", "factor_grad": "x", "shrink_grad": "g", "fold": "F", "fold_grad": "Q"}
ELEMENT = 2  # bfloat16
NOT_COUNTED = ("gemm_lotr",)  # in the names of files
MOST_THREADS = 65535  # concurrent threads of the executor
DTYPES = {"bf16": np.uint16, "fp16": np.float16, "tf32": np.float32, "fp32": np.float32}  # as the executor takes them


class Device(NamedTuple):
    """The properties of a GPU, besides its number of multiprocessors, that plans depend on, for the executor's set_device."""

    shared: int = 228 << 10  # bytes of a multiprocessor
    early: bool = True  # launches, and clusters
    wgmma: bool = False


# The known GPUs by their multiprocessors; of another number: an unnamed one of compute capability 10.0.
DEVICES = {108: Device(164 << 10, early=False), 128: Device(100 << 10, early=False), 132: Device(wgmma=True), 148: Device()}


@dataclass(frozen=True)
class Row:
    """One kernel at one shape: m tokens (fold, fold_grad: layers), n columns of the large matrix, rank r."""

    kernel: str
    m: int
    n: int
    r: int
    blocks: int
    large: int  # bytes of the large matrix, in and out
    moved: int  # of which moved, in fact
    factors: int
    partials: int
    total: int  # all bytes read and written
    sector_efficiency: float
    bank_conflicts: float  # wavefronts over phases
    launches: int
    machine: dict = field(default_factory=dict)  # what a model of the machine code needs (model.py): see `_machine`

    @property
    def once(self) -> float:
        """How often the large matrix moves; at least 1."""
        return self.moved / self.large

    @property
    def extra(self) -> float:
        """Factors and partial sums over the large matrix."""
        return (self.factors + self.partials) / self.large

    @property
    def over_least(self) -> float:
        """Those bytes over the minimum for any split into as many blocks."""
        return (self.factors + self.partials) / least_extra(self.kernel, self.m, self.n, self.r, self.blocks)

    @property
    def over_once(self) -> float:
        """All bytes over every operand moved once."""
        return self.total / kernel_work(self.kernel, self.m, self.n, self.r, ELEMENT).bytes


def least_extra(kernel: str, m: int, n: int, r: int, blocks: int) -> float:
    """Least bytes of factors and partial sums for s x t = `blocks` blocks, s along the tokens and t along the columns.

    The factor of the columns is read s times and that of the tokens t times; a partial sum is 4 bytes, written and read.
    """
    along_m = r * n * {"shrink": ELEMENT, "expand_add": ELEMENT, "factor_grad": 8, "shrink_grad": ELEMENT + 8}[kernel]
    along_n = r * m * {"shrink": 8, "expand_add": ELEMENT, "factor_grad": ELEMENT, "shrink_grad": ELEMENT + 8}[kernel]
    return 2 * (along_m * along_n * blocks) ** 0.5  # s along_m + t along_n is least where the two are equal


def executor() -> ModuleType:
    """The test module that runs the kernels on the CPU, built if needed (a minute)."""
    try:
        from csrc.simt import build
    except ImportError:
        raise FileNotFoundError(f"the executor: expected csrc/simt in {ROOT}, found none; run from a checkout") from None
    try:
        lib = build.load("plain")
    except build.BuildError as error:
        raise OSError(f"the executor cannot be built: {str(error).strip().splitlines()[0]}") from None
    _keep_constants(lib)
    return lib


def sources_id() -> str:
    """An id of the kernels' and the executor's sources, which a kept count must match; without gemm_lotr, not counted."""
    files = closure([*EXECUTOR.rglob("*.cpp"), *SOURCES.values(), *WGMMA], [EXECUTOR.parent])
    return cpp_id(path for path in files if not any(name in path.stem for name in NOT_COUNTED))


@functools.cache
def constants() -> dict[str, int]:
    """Constants of the C++ sources at the executor's last count."""
    return json.loads(CONSTANTS.read_text(encoding="utf-8"))


def _keep_constants(lib: ModuleType) -> None:
    own = json.dumps(lib.constants(), indent=1) + "\n"
    if not CONSTANTS.exists() or CONSTANTS.read_text(encoding="utf-8") != own:
        write_whole(CONSTANTS, own)
        constants.cache_clear()


def aligned(shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """Zeros at an address divisible by 256, as from torch's allocator."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.zeros(size + 256, np.uint8)
    start = -raw.ctypes.data % 256
    return raw[start : start + size].view(dtype).reshape(shape)


def in_rows(shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """The same, with rows at multiples of 16 bytes, as operators pad tensors along the rank."""
    chunk = 16 // np.dtype(dtype).itemsize
    return aligned((*shape[:-1], -(-shape[-1] // chunk) * chunk), dtype)[..., : shape[-1]]


def _call(lib: ModuleType, kernel: str, m: int, n: int, r: int, dtype: str) -> tuple[Callable[[], None], np.ndarray]:
    """A function that runs one kernel, and its large matrix."""

    def elements(*shape: int) -> np.ndarray:
        return in_rows(shape, DTYPES[dtype])

    def fp32(*shape: int) -> np.ndarray:
        return aligned(shape, np.float32)

    if kernel in SMALL:
        B, cores = elements(n, r), elements(m, r, r)
        if kernel == "fold":
            F = elements(m, n, r)
            return lambda: lib.fold(B, cores, 1.0, F), F
        Q, dB, dcores = fp32(m, n, r), fp32(n, r), fp32(m, r, r)
        return lambda: lib.fold_grad(Q, B, cores, 1.0, dB, dcores), Q
    large, factor, narrow = elements(m, n), elements(n, r), elements(m, r)
    calls = {
        "shrink": lambda: lib.shrink(large, factor, narrow),
        "expand_add": lambda: lib.expand_add_(large, narrow, factor),
        "factor_grad": lambda: lib.factor_grad_(fp32(n, r), large, narrow),
        "shrink_grad": lambda: lib.shrink_grad(large, factor, narrow, elements(m, r), fp32(n, r)),
    }
    if kernel not in calls:
        raise ValueError(f"kernel: expected one of {', '.join(KERNELS + SMALL)}, got {kernel}")
    return calls[kernel], large


def _pace(lib: ModuleType, kernel: str, m: int, n: int, r: int, dtype: str, multiprocessors: int) -> dict:
    """Blocks of shrink_grad that share rows run at the same time and keep pace, as on a GPU that holds all blocks: each then
    sums the row tiles of k that it is made to reach last (csrc/cuda/kernels/shrink_grad.cuh), not the last one all of them."""
    if kernel != "shrink_grad" or r > constants()["SHRINK_GRAD_MAX_RANK"]:
        return {}
    plan = lib.plan(kernel, m, n, r, np.dtype(DTYPES[dtype]).itemsize, multiprocessors)  # as set_device says
    most = constants()["MOST_RESIDENT"]  # that the executor can run at the same time
    cluster = plan["m_blocks"] if plan["cluster"] else plan["of_row"]
    together = MOST_THREADS // (384 * cluster) if cluster > 1 else most  # whole clusters of blocks of up to 384 threads
    return {"order": "in_turn", "resident": min(plan["n_blocks"], most, together)}


def count(
    lib: ModuleType,
    kernel: str,
    m: int,
    n: int,
    r: int,
    multiprocessors: int = 132,
    dtype: str = "bf16",
    wgmma: bool | None = None,
) -> Row:
    """Runs one kernel and counts. dtype: bf16, fp16, tf32 (float32 whose products are rounded) or fp32. wgmma: whether the GPU
    has it; None: as the known one of so many multiprocessors."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    call, large = _call(lib, kernel, m, n, r, dtype)
    device = DEVICES.get(multiprocessors, Device())
    device = device if wgmma is None else device._replace(wgmma=wgmma)
    float32 = "tf32" if dtype == "tf32" else "exact"
    lib.set_device(multiprocessors=multiprocessors, float32=float32, **device._asdict())
    lib.set_options(count_memory=True, **_pace(lib, kernel, m, n, r, dtype, multiprocessors))
    lib.reset_counters()
    call()
    counters = lib.counters()
    lib.set_device()
    lib.set_options()
    arrays = {name: a for name, a in counters["arrays"].items() if a["read_bytes"] + a["written_bytes"]}
    total = {name: a["read_bytes"] + a["written_bytes"] for name, a in arrays.items()}
    sectors = sum(a["read_sectors"] + a["written_sectors"] for a in arrays.values())
    grid = counters["launches"][0]["grid"]
    main = LARGE[kernel]
    return Row(
        kernel=kernel,
        m=m,
        n=n,
        r=r,
        blocks=grid[0] * grid[1] * grid[2],
        large=large.nbytes * (2 if kernel == "expand_add" else 1),
        moved=total[main],
        # what is written once at the end is neither: u, k, Q and the accumulator
        factors=sum(a["read_bytes"] for name, a in arrays.items() if name not in (main, "workspace", "acc", "Q")),
        partials=total.get("workspace", 0),
        total=sum(total.values()),
        sector_efficiency=sum(total.values()) / (32 * sectors),
        bank_conflicts=counters["shared_wavefronts"] / max(1, counters["shared_phases"]),
        launches=len(counters["launches"]),
        machine=_machine(lib, counters, total[main]),
    )


def _machine(lib: ModuleType, counters: dict, moved: int) -> dict:
    """What ran, for a model of the machine code: the last launch's instance, grid, threads and shared bytes; warp instructions
    of the whole kernel; what the last block to arrive still reads, and what any reads from its cluster; accesses that were not
    by 16-byte copies or stores."""
    launch = counters["launches"][-1]
    arrays = counters["arrays"].values()
    return {
        "names": [one["name"] for one in counters["launches"]],
        "symbol": symbols(lib).get(launch["offset"], ""),
        "grid": launch["grid"],
        "warps": launch["block"][0] // 32,
        "memsets": sum(one["cleared"] for one in counters["launches"]),
        "shared": launch["shared_bytes"],
        "waits": counters["async_waits"] / 32,
        "copies": counters["async_copies"] / 32,
        "bulk_bytes": counters["bulk_bytes"],
        "matrix": counters["mma"] + 4 * counters["wgmma"],
        "multiply": counters["multiply"] or launch["block"][0] // 32,  # warps that do
        "cluster": launch["cluster"][0] * launch["cluster"][1] * launch["cluster"][2],
        "late_loads": counters["late_loads"],  # of 16 bytes, a thread
        "late_bytes": counters["late_bytes"],
        "late_stored": counters["late_stored"],  # after its last products
        "last_shared": counters["last_shared"],  # bytes that a block then moves to and from its own shared memory
        "last_loads": counters["last_loads"],  # of a thread, from global memory, then
        "together": launch["cooperative"],  # all blocks are there at once, and sum at the same time
        "late_total": counters["late_total"],  # the late bytes of all blocks
        "atomics": counters["atomics"],
        "cluster_loads": counters["cluster_loads"],
        "sum_loads": counters["sum_loads"],  # the most of both kinds that one thread has
        "cluster_bytes": counters["cluster_bytes"],
        "cluster_total": counters["cluster_total"],  # of all blocks, late or not
        "read": sum(a["read_bytes"] for a in arrays),
        "written": sum(a["written_bytes"] for a in arrays),
    }


@functools.cache
def symbols(lib: ModuleType) -> dict[int, str]:
    """The module's functions by address: an instance of a kernel has one mangled name on host and device."""
    try:
        listing = subprocess.run(["nm", lib.__file__], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise OSError(f"nm: cannot list the symbols of {lib.__file__}: {error}") from None
    words = [line.split() for line in listing.splitlines()]
    found = {int(w[0], 16): w[2] for w in words if len(w) == 3 and w[1] in "tTwW" and "kernels" in w[2]}
    return {at: name.replace("7kernelsL", "7kernels") for at, name in found.items()}  # L: a file's own, on the host alone


# ---- counts that are kept --------------------------------------------------------------------------------------------

CASE = ("kernel", "m", "n", "r", "multiprocessors")
Key = tuple[str, int, int, int, int]  # of these


def needed(shapes: list[Shape], multiprocessors: list[int]) -> list[Key]:
    """The kernels of whole layers at shapes (m, k, n, r), for GPUs with these numbers of multiprocessors."""
    keys: list[Key] = []
    for sm in multiprocessors:
        for m, k, n, r in shapes:
            keys += [("shrink", m, k, r, sm), ("expand_add", m, n, r, sm), ("shrink_grad", m, n, r, sm)]
            keys += [
                ("expand_add", m, k, r, sm),
                ("factor_grad", m, k, r, sm),
                ("factor_grad", m, n, r, sm),
                ("fold", 1, n, r, sm),
                ("fold_grad", 1, n, r, sm),
            ]
    return list(dict.fromkeys(keys))


def kept(store: Store, build: str, dtype: str = "bf16") -> dict[Key, Row]:
    """The kept counts of a dtype from these sources."""
    cells = [c for c in of_build(store.read(), build) if c["case"].get("dtype") == dtype]
    return {tuple(cell["case"][name] for name in CASE): Row(**cell["row"]) for cell in cells}


def keep(store: Store, build: str, key: Key, row: Row, dtype: str = "bf16") -> None:
    case = dict(zip(CASE, key)) | {"dtype": dtype}
    store.append({"case": case, "rival": "lotr_ext", "build": build, "row": asdict(row)})


def count_all(
    keys: list[Key], store: Store, begin: Callable[[str], None], again: bool = False, dtype: str = "bf16"
) -> dict[Key, Row]:
    """The rows of keys; counts those that are not kept."""
    build = sources_id()
    rows = {} if again else kept(store, build, dtype)
    lib = None
    for key in keys:
        begin(f"{key[0]} {key[1]}x{key[2]} r{key[3]} {dtype}, {key[4]} multiprocessors")
        if key not in rows:
            lib = lib or executor()
            rows[key] = count(lib, *key, dtype=dtype)
            keep(store, build, key, rows[key], dtype)
    if lib is not None:
        store.keep_only(build)
    return {key: rows[key] for key in keys}
