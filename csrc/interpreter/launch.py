"""Runs the launches of a library that build.py has linked."""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from . import arithmetic, barriers, conversion, copies, memory, products, tensor_map  # noqa: F401  they register the instructions
from .errors import PtxError
from .grid import Grid, Launch
from .parse import Module
from .program import Program

_IMAGE = 0xBA55ED50  # the magic number of a fat binary


class _LaunchOf(ctypes.Structure):
    _fields_ = [
        ("kernel", ctypes.c_char_p),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("cluster", ctypes.c_uint * 3),
        ("shared", ctypes.c_size_t),
        ("cooperative", ctypes.c_int),
        ("early", ctypes.c_int),
        ("parameters", ctypes.POINTER(ctypes.c_void_p)),
    ]


_NUMBERS = itertools.count()
_Launched = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_LaunchOf))
_U32, _U64 = ctypes.POINTER(ctypes.c_uint32), ctypes.POINTER(ctypes.c_uint64)
_Encoded = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p, _U64, _U64, _U32, _U32, *[ctypes.c_int] * 4
)


class Library:
    """A library whose launches run here.

    Args:
        path: as build.link returns it.
        capability: of the GPU that the library finds, times ten.
        multiprocessors: of that GPU.

    Attributes:
        seed: of the orders of the next launches.
        launches: (kernel, grid, cluster) of each launch.
        steps: instructions of warps that have run.
        functions: the library, for ctypes.
        resident: clusters that run at the same time; a cooperative launch has all.
        dynamic_align: bytes; dynamic shared memory begins at a multiple of it if it is more than the kernel declares.
        edit: applied to the text of each source file before it is parsed, for tests; after a change call `forget`.
    """

    def __init__(self, path: Path, capability: int = 90, multiprocessors: int = 132, shared_per_block: int = 232448) -> None:
        self.path, self.seed, self.steps = path, 0, 0
        self.launches: list[tuple[str, Sequence[int], Sequence[int]]] = []
        self.resident, self.dynamic_align = 2, 1
        self.edit: Callable[[str], str] = lambda text: text
        self._error: BaseException | None = None
        self._modules: list[Module] | None = None
        self._programs: dict[str, tuple[Program, Module]] = {}
        self.functions = ctypes.CDLL(str(path))
        self._launched, self._encoded = _Launched(self._on_launch), _Encoded(self._on_encode)
        self.functions.interpreter_on_launch(self._launched)
        self.functions.interpreter_on_encode(self._encoded)
        self.functions.interpreter_device(capability, multiprocessors, shared_per_block)
        self.functions.interpreter_image.restype = ctypes.c_void_p
        self.functions.interpreter_variable.restype = ctypes.c_void_p

    def python_module(self, name: str) -> ModuleType:
        """The library as a Python module, if it is one. It is not entered into sys.modules."""
        # pybind11 keeps modules by their full name. Without a package of its own a second library would be the first one again.
        spec = importlib.util.spec_from_file_location(f"library_{next(_NUMBERS)}.{name}", self.path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def raise_error(self) -> None:
        """Raises what stopped the last launch."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def forget(self) -> None:
        """Parses the texts again at the next launch."""
        self._modules, self._programs = None, {}

    def texts(self) -> list[str]:
        """The PTX of each source file, from the image that its host code registers."""
        texts, index = [], 0
        while data := self.functions.interpreter_image(ctypes.c_size_t(index)):
            head = ctypes.string_at(data, 16)
            if int.from_bytes(head[:4], "little") != _IMAGE:
                raise PtxError(f"image: expected a fat binary, got {head[:4].hex()}")
            size = int.from_bytes(head[6:8], "little") + int.from_bytes(head[8:16], "little")
            image = ctypes.string_at(data, size)
            start = image.find(b"\n.version ")
            while start >= 0:
                end = image.index(b"\0", start)
                texts.append(image[start:end].decode())
                start = image.find(b"\n.version ", end)
            index += 1
        return texts

    def _program(self, name: str) -> tuple[Program, Module]:
        if self._modules is None:
            self._modules = [Module(self.edit(text)) for text in self.texts()]
        if name not in self._programs:
            module = next((m for m in self._modules if name in m.entries), None)
            if module is None:
                raise PtxError(f"kernel: expected PTX of {name}, found none; compile with --no-compress")
            self._programs[name] = Program(module.entries[name]), module
        return self._programs[name]

    def _on_launch(self, given: Any) -> int:
        try:
            self._run(given.contents)
        except BaseException as error:
            self._error = error
            return 1
        return 0

    def _run(self, given: _LaunchOf) -> None:
        name = given.kernel.decode()
        program, module = self._program(name)
        kept = []  # each parameter at its alignment
        addresses: dict[str, int] = {}
        for n, parameter in enumerate(program.entry.parameters):
            copy = np.zeros(parameter.size + parameter.align, np.uint8)
            at = -(-copy.ctypes.data // parameter.align) * parameter.align
            ctypes.memmove(at, given.parameters[n], parameter.size)
            addresses[parameter.name] = at
            kept.append(copy)
        for variable in module.globals:
            address = self.functions.interpreter_variable(variable.name.encode())
            if address:  # none: the host does not know the variable; a kernel that reads it is refused
                addresses[variable.name] = address
        grid, block, cluster = tuple(given.grid), tuple(given.block), tuple(given.cluster)
        launch = Launch(program, grid, block, cluster, given.shared, bool(given.cooperative), bool(given.early), addresses)
        launch.statics = [v for v in module.shared if v.size]
        launch.dynamic = next((replace(v, align=max(v.align, self.dynamic_align)) for v in module.shared if not v.size), None)
        self.launches.append((name, grid, cluster))
        self.steps += Grid(launch, self.seed, self.resident).run()

    def _on_encode(
        self, map_at: int, kind: int, rank: int, address: int, sizes: Any, strides: Any, box: Any, steps: Any, *modes: int
    ) -> int:
        try:
            described = tensor_map.encode(
                kind,
                rank,
                address or 0,
                list(sizes[:rank]),
                list(strides[: rank - 1]),
                list(box[:rank]),
                list(steps[:rank]),
                *modes,
            )
        except PtxError as error:
            self._error = error
            return 1
        ctypes.memmove(map_at, described, len(described))
        return 0
