"""A GPU that fails as one is told: the CPU operators behind the interface of the GPU's, with faults of the kinds a card has.

LOTR_FAKE_FAULTS in the environment is JSON, by variant: {"shrink-bf16-16": ["wrong", "wgmma"]}. The fault is there unless its
feature is among LOTR_CUDA_WITHOUT. Kinds: wrong (a number), sticky (an illegal access: this call and all after it raise), hang,
assert (the process aborts), segfault, unstable (other bits the second time).
"""

from __future__ import annotations

import ctypes
import json
import os
import time

from bench.gpu.torch_library import TorchLibrary

STICKY = "CUDA error: an illegal memory access was encountered"


class FakeGpu(TorchLibrary):
    def __init__(self, variant: str):
        super().__init__("cpu")
        kind, feature = json.loads(os.environ.get("LOTR_FAKE_FAULTS", "{}")).get(variant, (None, None))
        self.fault = None if feature in os.environ.get("LOTR_CUDA_WITHOUT", "").split(",") else kind
        self.calls, self.broken = 0, False

    def _call(self, name: str, *arguments: object, out: tuple = (), **keywords: object) -> None:
        self.calls += 1
        if self.fault == "sticky" and self.calls > 1:
            self.broken = True
        if self.broken:
            raise RuntimeError(STICKY)
        if self.fault == "hang":
            time.sleep(3600)
        if self.fault == "assert":
            os.abort()
        if self.fault == "segfault":
            ctypes.string_at(0)
        super()._call(name, *arguments, out=out, **keywords)
        if self.fault == "wrong" or (self.fault == "unstable" and self.calls == 2):
            changed = out[0] if out else arguments[0]
            first = (0,) * changed.ndim
            changed[first] = changed[first] ^ 0x4000 if changed.dtype.kind == "u" else changed[first] + 1000
