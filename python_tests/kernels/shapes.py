"""The sizes of problems: one Shape, and lists of shapes by what they reach."""

from dataclasses import KW_ONLY, dataclass

from arrays import ALIGNED, COLUMNS, ODD, PACKED, Layout

# The kernels that multiply with W. They need aligned rows and have lists of their own.
FUSED = ("gemm_lotr", "gemm_lotr_backward")


@dataclass(frozen=True)
class Shape:
    """The sizes of a problem, and which of its operands it has.

    `minimal` leaves out every operand that a kernel can do without:

        expand_fresh, gemm_lotr     the bias
        factor_grad, shrink_grad    the values that the sum D or Q is added to
        few_tokens_backward         dx and dA
        row_core, its backward      the token of each row (row i is token i), and the core of each
                                    row (the rows are sorted by core, and `offs` has the ends)

    Attributes:
        m: Tokens.
        k: Columns of x, or of the large matrix of the kernel.
        r: The rank: columns of A.
        layout: The layout of every matrix.
        p: The probability of dropout.
        sms: Multiprocessors of the device.
        other_r: Columns of B, if they are not r.
        n: Rows of W, or of the B of few tokens. 0 stands for half of k.
        minimal: See above.
        float_factors: A, B, core and F are float32, also with half-precision tokens.
        cores: How many there are for rows. 0 stands for 1 to 9, by k.
    """

    m: int
    k: int
    r: int
    layout: Layout = ALIGNED
    _: KW_ONLY
    p: float = 0.0
    sms: int = 132
    other_r: int = 0
    n: int = 0
    minimal: bool = False
    float_factors: bool = False
    cores: int = 0

    @property
    def r_out(self) -> int:
        return self.other_r or self.r

    @property
    def out_features(self) -> int:
        return self.n or max(1, self.k // 2)


SHAPES = {
    # Odd, ragged, strided, unaligned, transposed; ranks 1 to 256; no token and one; fewer tiles
    # than splits and more; more cores than rows.
    "quick": [
        Shape(0, 64, 16),
        Shape(0, 64, 16, minimal=True),
        Shape(40, 8, 4, cores=3000),
        Shape(1, 1, 1, ODD, p=0.5),
        Shape(1, 1000, 8, sms=8),
        Shape(2, 333, 5, ODD, p=0.1, minimal=True),
        Shape(3, 129, 17, COLUMNS),
        Shape(16, 256, 16, PACKED, minimal=True),
        Shape(17, 65, 33, ODD, sms=1),
        Shape(31, 255, 31, sms=3, float_factors=True),
        Shape(33, 31, 256),
        Shape(48, 200, 128, p=0.25),
        Shape(64, 128, 32, PACKED, p=0.5, sms=4, minimal=True),
        Shape(100, 100, 100, COLUMNS, sms=5),
        Shape(65, 72, 200, sms=3),
        Shape(150, 70, 60, ODD, sms=2, other_r=7),
        Shape(256, 256, 16, PACKED, sms=3, minimal=True),
        Shape(385, 130, 10, ODD, sms=8, float_factors=True),
    ],
    "more": [
        Shape(1, 64, 16, PACKED),
        Shape(5, 7, 3, COLUMNS, p=0.3),
        Shape(16, 512, 64, sms=4, other_r=32),
        Shape(65, 200, 12, ODD, p=0.1, sms=6, other_r=20, minimal=True),
        Shape(127, 129, 16, sms=12, minimal=True),
        Shape(129, 257, 1, p=0.9, sms=20),
        Shape(130, 40, 129, sms=4),
        Shape(200, 330, 24, PACKED, sms=16),
        Shape(256, 320, 32, p=0.1, sms=2),
        Shape(67, 100, 250, sms=2),
        Shape(400, 24, 4, PACKED, p=0.4, sms=11, minimal=True),
        Shape(600, 90, 36, sms=2, other_r=50, minimal=True),
        Shape(1030, 8, 16, PACKED, sms=40),
        Shape(300, 560, 24, sms=10),
        Shape(700, 512, 13, ODD, sms=16),
        Shape(2040, 40, 13, ODD, sms=16),
    ],
    # At least two blocks in each dimension of every grid, and walks of more tiles than the ring has
    # stages, so that every stage is filled a second time; with and without dropout, aligned and
    # not. On few multiprocessors a block has several tiles.
    "pipeline": [
        Shape(700, 560, 16, sms=2),
        Shape(700, 560, 16, sms=5),
        Shape(330, 700, 40, p=0.25, sms=6, other_r=20, minimal=True),
        Shape(330, 600, 40, sms=6),  # parts of Q of several column tiles
        Shape(520, 264, 16, ODD, p=0.1, sms=4),
        Shape(1700, 40, 16, ODD, p=0.1, sms=4, minimal=True),
        Shape(130, 1700, 16, sms=6),
        Shape(200, 400, 100, PACKED, sms=5),
        Shape(130, 3000, 13, ODD, p=0.1, sms=12),  # parts of u and D, at a rank that they pad
        Shape(150, 300, 200, PACKED, p=0.5, sms=6),
        Shape(2000, 70, 13, sms=12),
    ],
}
FUSED_SHAPES = {
    # Ragged in every extent; one tile and several per pair of blocks; fewer k-steps than the ring
    # has stages, and more; both steps of the rank.
    "quick": [
        Shape(0, 16, 4, n=16),
        Shape(1, 1, 1, n=1, sms=1),
        Shape(1, 8, 65, n=264, sms=2),
        Shape(130, 520, 1, n=264, sms=2),
        Shape(200, 72, 128, n=200, sms=2, minimal=True),
        Shape(300, 200, 11, n=331, sms=2),
        Shape(200, 328, 50, n=520, sms=4),
    ],
    "more": [
        Shape(520, 136, 64, n=520, sms=4, minimal=True),
        Shape(257, 264, 80, n=257, sms=2),
        # More bands of tiles than are walked together, two columns of them.
        Shape(2400, 8, 8, n=300, sms=6),
    ],
    "pipeline": [
        # More k-steps than stages, three tiles for a pair of blocks.
        Shape(130, 328, 16, n=600, sms=2),
        # So few k-steps that the stages of the next tile are loaded meanwhile.
        Shape(260, 40, 100, n=264, sms=2, minimal=True),
    ],
}


def shapes_of(kernel: str, which: str) -> list[Shape]:
    """Returns shapes of a kernel: quick (of `make test`), pipeline, some (half of it) or all."""
    lists = FUSED_SHAPES if kernel in FUSED else SHAPES
    if which == "all":
        return [*lists["quick"], *lists["more"], *lists["pipeline"]]
    return lists["pipeline"][::2] if which == "some" else lists[which]
