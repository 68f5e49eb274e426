"""The swizzles of shared memory that TMA and wgmma share: they exchange 16-byte chunks by the bits of their address.

Source: PTX ISA manual, "Swizzling Modes" (the tables of each mode, with 16-byte cells and eight cells a line) and "Canonical
Layouts" (Swizzle<B, 4, 3>: the bits 4 to 3 + B of an address are XORed with the bits 7 to 6 + B). A table begins at an address
that is aligned to its length, so the swizzle depends on the address and not on the position in the tile.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

CHUNK = 16  # bytes that stay together
LINE = 128  # bytes of shared memory with the same exchange of chunks

# Swizzled span in bytes (0: no swizzle) -> B, the number of exchanged address bits.
EXCHANGED_BITS = {0: 0, 32: 1, 64: 2, 128: 3}


def swizzle(addresses: npt.NDArray[np.int64], span: int, first_line: int = 0) -> npt.NDArray[np.int64]:
    """The byte addresses in shared memory at which the data of unswizzled addresses lie.

    span is a key of EXCHANGED_BITS. first_line is the line (address / 128) modulo 8 at which the pattern begins: 0 for a
    pattern that begins at a multiple of its length (256, 512 or 1024 bytes for a span of 32, 64 or 128 bytes).
    """
    bits = EXCHANGED_BITS[span]
    lines = (addresses // LINE - first_line) & ((1 << bits) - 1)
    return addresses ^ (lines * CHUNK)
