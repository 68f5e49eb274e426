"""The sizes, layouts and devices at which every kernel runs under the executor."""

from __future__ import annotations

from dataclasses import dataclass

from .arrays import ALIGNED, COLUMNS, ODD, PACKED, Layout


@dataclass(frozen=True)
class Shape:
    """m tokens, k columns of the large matrix, r and r2 ranks; the device is played with `sms` multiprocessors."""

    m: int
    k: int
    r: int
    layout: Layout = ALIGNED
    p: float = 0.0
    sms: int = 132
    r2: int = 0  # rank of the other factor; 0: the same
    layers: int = 1
    float_factors: bool = False
    wgmma: bool = False
    early: bool = True  # a GPU with early launches and clusters
    without: str = ""  # LOTR_CUDA_WITHOUT
    most_of_cluster: int = 8  # blocks of the largest cluster that the device has room for

    @property
    def other(self) -> int:
        return self.r2 or self.r

    def __str__(self) -> str:
        place = {PACKED: "packed", ALIGNED: "aligned", ODD: "odd", COLUMNS: "columns"}[self.layout]
        extra = f"-p{self.p}" * bool(self.p) + "-float" * self.float_factors + "-no-clusters" * (not self.early)
        return f"{self.m}x{self.k}-r{self.r}-{place}-sm{self.sms}{extra}"


# Odd, ragged, strided, unaligned, transposed; ranks 1 to 256; no token and one; fewer tiles than splits and more.
SHAPES = [
    Shape(0, 64, 16),
    Shape(0, 1, 1, ODD),
    Shape(1, 1, 1),
    Shape(1, 1, 1, ODD, 0.5),
    Shape(1, 64, 16, PACKED),
    Shape(1, 1000, 8, sms=8),
    Shape(2, 333, 5, ODD, 0.1),
    Shape(3, 129, 17, COLUMNS),
    Shape(5, 7, 3, COLUMNS, 0.3),
    Shape(16, 256, 16, PACKED, layers=3),
    Shape(16, 512, 64, sms=4, r2=32),
    Shape(17, 65, 33, ODD, sms=1),
    Shape(31, 255, 31, sms=3, float_factors=True),
    Shape(33, 31, 256),
    Shape(48, 200, 128, p=0.25),
    Shape(63, 64, 16, sms=2),
    Shape(64, 64, 16, PACKED, sms=1),
    Shape(64, 128, 32, PACKED, 0.5, 4, layers=2),
    Shape(65, 63, 15, sms=7),
    Shape(65, 200, 12, ODD, 0.1, 6, r2=20),
    Shape(96, 96, 96, sms=2),
    Shape(100, 100, 100, COLUMNS, sms=5),
    Shape(127, 129, 16, sms=12, layers=4),
    Shape(128, 64, 8, PACKED, sms=9, float_factors=True),
    Shape(65, 72, 200, sms=3),
    Shape(129, 257, 1, p=0.9, sms=20),
    Shape(130, 520, 16, sms=10),
    Shape(150, 70, 60, ODD, sms=2, r2=7),
    Shape(192, 192, 64, sms=6),
    Shape(130, 40, 129, sms=4),
    Shape(200, 330, 24, PACKED, sms=16),
    Shape(255, 65, 2, ODD, 0.2, 5),
    Shape(256, 256, 16, PACKED, sms=3, layers=2),
    Shape(256, 320, 32, p=0.1, sms=2),
    Shape(67, 100, 250, sms=2),
    Shape(300, 72, 48, COLUMNS, sms=3),
    Shape(320, 640, 16, sms=12),
    Shape(385, 130, 10, ODD, sms=8, float_factors=True),
    Shape(400, 24, 4, PACKED, 0.4, 11),
    Shape(512, 64, 64, sms=4),
    Shape(520, 132, 16, sms=1),
    Shape(600, 90, 36, sms=2, r2=50, layers=5),
    Shape(777, 33, 7, ODD, sms=132),
    Shape(1030, 8, 16, PACKED, sms=40),
    Shape(300, 560, 24, sms=10),
    Shape(300, 560, 24, sms=10, early=False),
    Shape(129, 257, 1, p=0.9, sms=20, early=False),
    Shape(150, 70, 60, ODD, sms=2, early=False),
    Shape(385, 130, 10, ODD, sms=8, float_factors=True, early=False),
    Shape(260, 200, 100, COLUMNS, sms=6, early=False),
    Shape(700, 264, 31, p=0.2, sms=5, early=False),
    Shape(520, 264, 60, sms=12, early=False),
    Shape(1010, 256, 16, PACKED, sms=16, early=False),
    Shape(520, 264, 60, ODD, sms=12),
    Shape(700, 512, 13, ODD, sms=16),
    Shape(1010, 256, 16, PACKED, sms=16),
    Shape(2040, 40, 13, ODD, sms=16),
    Shape(1700, 40, 16, sms=5, early=False),
    Shape(150, 40, 24, sms=4),
    Shape(150, 40, 13, ODD, sms=3, early=False),
    Shape(330, 40, 24, ODD, sms=5),
    Shape(330, 40, 24, sms=5, early=False),
]
