"""gemm_lotr as problems: inputs in poisoned memory, several launches on one workspace, the float64 truth.

    forward   y = x W^T + bias + u F^T,  u = x A        backward   dx = g W + k A^T,  k = g F,  Q (+)= g^T u

in the forward pass's names: `weight` is W [n, k], in the backward pass as it lies there, [k, n].
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from types import ModuleType

import numpy as np

from csrc.simt.checks.arrays import DTYPE, PACKED, Layout, Output, check_close, narrow, place, wide


@dataclass(frozen=True)
class Case:
    """m tokens, n and k columns of y and x, r the rank. `sms` multiprocessors hold as many blocks; None: planned."""

    m: int
    n: int
    k: int
    r: int
    kind: str = "bf16"
    backward: bool = False
    cluster: int | None = 1
    sms: int = 4
    scouts: int | None = None
    band_group: int | None = None
    bias: bool = True
    ragged_y: bool = False  # rows of y, and of the forward pass's u, that do not start at multiples of 16 bytes
    factor: str = ""  # backward: Q as well, "new" or "added" to what is there

    def __str__(self) -> str:
        flags = "-backward" * self.backward + f"-Q-{self.factor}" * bool(self.factor)
        flags += f"-cluster{self.cluster}" + "-ragged" * self.ragged_y
        return f"{self.m}x{self.n}x{self.k}-r{self.r}-{self.kind}{flags}"

    @property
    def padded(self) -> int:
        """Ranks as u stores them."""
        return (self.r + 7) // 8 * 8


def aligned(cols: int) -> Layout:
    """Rows and first element at multiples of 16 bytes, NaN between the rows."""
    return Layout(8, -cols % 8 + 8)


class Inputs:
    """Of one launch; the values depend on the problem, not on how it is cut."""

    def __init__(self, case: Case, seed: int = 0):
        problem = replace(case, cluster=1, sms=1, scouts=None, band_group=None, ragged_y=False, factor="")
        rng = np.random.default_rng(zlib.crc32(f"{problem}{seed}".encode()))
        self.case = case

        def matrix(rows: int, cols: int, scale: float = 1.0) -> np.ndarray:
            return place(narrow(rng.standard_normal((rows, cols)) * scale, case.kind), DTYPE[case.kind], aligned(cols))

        self.x = matrix(case.m, case.k)
        self.weight = matrix(*((case.k, case.n) if case.backward else (case.n, case.k)))
        self.At, self.F = matrix(case.r, case.k, 0.5), matrix(case.n, case.r, 0.5)
        bias = case.bias and not case.backward
        self.bias = narrow(rng.standard_normal(case.n) * 4, case.kind) if bias else None
        self.u = matrix(case.m, case.r) if case.factor else None  # of the forward pass
        if case.factor and case.ragged_y:
            self.u = place(self.u, DTYPE[case.kind], Layout(3, -case.r % 8 + 5))
        self.Q0 = rng.standard_normal((case.k, case.r)).astype(np.float32) if case.factor == "added" else None

    def launch(self, lib: ModuleType, workspace: np.ndarray, packed: bool = False) -> dict[str, np.ndarray]:
        """y and u from outputs full of NaN, after a look at what lies around them; packed: nothing does."""
        case, dtype = self.case, DTYPE[self.case.kind]
        layout = PACKED if packed else Layout(3, -case.n % 8 + 5) if case.ragged_y else aligned(case.n)
        y = Output((case.m, case.n), dtype, layout)
        u = Output((case.m, case.padded), dtype, PACKED if packed else aligned(case.padded))
        outputs = {"y": y, "u": u}
        if case.factor:
            around = Layout(1, 3) if case.factor == "added" else PACKED  # a new one is contiguous
            outputs["Q"] = Output((case.k, case.r), np.dtype(np.float32), around, self.Q0)
        lib.gemm_lotr(
            y.view,
            self.x,
            self.weight,
            self.At,
            self.F,
            u.view,
            workspace,
            bias=self.bias,
            backward=case.backward,
            multiprocessors=case.sms,
            cluster=case.cluster,
            scouts=case.scouts,
            band_group=case.band_group,
            u_forward=self.u,
            Q=outputs["Q"].view if case.factor else None,
            accumulate=case.factor == "added",
        )
        for output in outputs.values():
            output.check_outside()
        return {name: output.view for name, output in outputs.items()}

    def check(self, out: dict[str, np.ndarray]) -> None:
        """u against x A; y against the product with u as it was stored, which is the rank's operand."""
        case = self.case
        x, At, F, u = wide(self.x), wide(self.At), wide(self.F), wide(out["u"])
        W = wide(self.weight).T if case.backward else wide(self.weight)
        self._close(out["u"][:, : case.r], x, At.T, 0.0, "u")
        assert not u[:, case.r :].any(), f"{case}: ranks beyond r are not zero"
        bias = wide(self.bias) if self.bias is not None else 0.0
        self._close(out["y"], np.hstack([x, u[:, : case.r]]), np.hstack([W, F]).T, bias, "y")
        if case.factor:
            self._close(out["Q"], x.T, wide(self.u), 0.0 if self.Q0 is None else wide(self.Q0), "Q", "fp32")

    def _close(self, got: np.ndarray, left: np.ndarray, right: np.ndarray, add, what: str, kind: str = "") -> None:
        kind = kind or self.case.kind
        eager = narrow(add + left.astype(np.float32) @ right.astype(np.float32), kind)
        size = np.abs(add) + np.abs(left) @ np.abs(right)
        check_close(got, left @ right + add, eager, size, kind, f"gemm_lotr {self.case}: {what}")


def new_workspace(lib: ModuleType, m: int) -> np.ndarray:
    """Zeros, as before the first call on a stream."""
    return np.zeros(lib.gemm_lotr_workspace(m) // 4, np.int32)


def run(lib: ModuleType, case: Case, launches: int = 2) -> list[bytes]:
    """So many launches on one workspace, which nobody clears in between; all checked. The bits of every output."""
    workspace = new_workspace(lib, case.m)
    bits = []
    for launch in range(launches):
        inputs = Inputs(case, launch)
        out = inputs.launch(lib, workspace)
        inputs.check(out)
        bits += [np.ascontiguousarray(a).tobytes() for a in out.values()]
        assert workspace[0] == 0 and workspace[1] == (launch + 1 if case.m else 0), (
            f"{case}: counter and launches {workspace[:2]}"
        )
    return bits


def without_Q(case: Case, bits: list[bytes]) -> list[bytes]:
    """Those of y and u, which do not depend on how a launch is cut; Q's do, on how many bands a scout adds up."""
    return [b for i, b in enumerate(bits) if i % 3 < 2] if case.factor else bits


# Ragged in every extent, more tiles than blocks, tiles of more k-steps than the ring has stages, one scout for two bands.
QUICK = [
    Case(300, 331, 200, 11, scouts=2, band_group=2, sms=3),
    Case(300, 331, 200, 11, cluster=2, band_group=1),
    Case(200, 520, 264, 64, cluster=2, bias=False),
    Case(200, 300, 136, 100, sms=3, ragged_y=True),
    Case(260, 331, 136, 30, backward=True, sms=3),
    Case(390, 520, 200, 50, backward=True, cluster=2),
    Case(200, 200, 72, 128, backward=True, cluster=2),
    Case(200, 280, 136, 16, "fp16", sms=3),
    Case(140, 280, 136, 8, "fp16", backward=True, cluster=2, ragged_y=True),
    Case(130, 264, 700, 1, sms=2, scouts=1),
    # Q: bands that go on with a ticket's sums, an odd number of k-steps, a last cluster without one
    Case(390, 200, 328, 11, backward=True, sms=3, scouts=2, factor="new"),
    Case(520, 72, 264, 16, backward=True, cluster=2, scouts=2, factor="added"),
    Case(20, 40, 40, 3, "fp16", backward=True, sms=2, factor="added"),
    Case(150, 24, 72, 16, backward=True, sms=2, ragged_y=True, factor="new"),
    Case(0, 16, 72, 4, backward=True, factor="new"),
    Case(5, 7, 8, 3, sms=2),
    Case(1, 1, 1, 1, cluster=2),
    Case(0, 16, 16, 4),
]
RANKS = [r for r in range(1, 129) if r in (1, 2, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64, 65, 96, 127, 128)]
ALL = QUICK + [
    Case(140, 264 if r <= 64 else 136, 72, r, kind, backward, cluster)
    for i, r in enumerate(RANKS)
    for kind, backward, cluster in [
        (("bf16", "fp16")[i % 2], bool(i // 2 % 2), 1),
        (("fp16", "bf16")[i % 2], not i // 2 % 2, 2),
    ]
]
ALL += [
    Case(m, 72, k, r, ("bf16", "fp16")[(r + k) % 2], True, 1 + r % 2, scouts=scouts, factor=("new", "added")[m % 2])
    for r in (1, 2, 7, 8, 9, 15, 16)
    for m, k, scouts in [(130, 8, 1), (391, 200, 2), (640, 136, 3)]
]
# For leaving out one synchronisation: all code paths, in problems that are over soon.
SMALL = [
    Case(150, 24, 72, 16, backward=True, sms=2, ragged_y=True, factor="new"),
    Case(260, 264, 40, 16, sms=1),  # so few k-steps that the next pieces of work are fetched while this one runs
    Case(200, 264, 328, 11, scouts=1, sms=3),
    Case(270, 136, 328, 16, cluster=2),
    Case(140, 136, 136, 100, backward=True, sms=3),
    Case(260, 40, 328, 16, backward=True, scouts=2, sms=3, factor="added"),
]
