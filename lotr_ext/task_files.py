"""The file of a task: one safetensors file with the cores of a task, and what they fit.

    tensors     `<layer>.core` [r_in, r_out] (experts: [e, r_in, r_out]) for each adapted layer
    metadata    format    "lotr_task"
                version   "1"
                scaling   s of the layers, a list if they differ
                factors   SHA-256 of the values of A and B

`TaskBank` writes and reads it, and so does the plugin for vLLM.

Not here: the bank (tasks.py) and how files are written (storage.py).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from .adapter_state import AdapterState
from .checks import check_floating
from .config import GroupBy
from .storage import checksum, expect_names, tensors_in
from .targets import group_of

_ADVICE = "Load the adapter that it was trained with."


@dataclass(frozen=True)
class TaskFormat:
    """What a task of one adapter consists of.

    Attributes:
        shapes: The shape of each core, by `<layer>.core` in the order of the layers.
        scalings: s of each layer.
        pairs: The values of A and B by layer. Layers that share a factor have the same tensor
            object.
        group_by: As in the configuration, "shape" if there is none. Not a callable, which is saved
            as its mapping.
    """

    shapes: Mapping[str, tuple[int, ...]]
    scalings: tuple[float, ...]
    pairs: Mapping[str, tuple[Tensor, Tensor]]
    group_by: GroupBy

    def check(self, tensors: Mapping[str, Tensor], where: str) -> None:
        """Checks that tensors are the cores of a task: their names, shapes and floating dtypes.

        Args:
            tensors: By name.
            where: The argument that names them, for the error.

        Raises:
            TypeError, ValueError: If they are not. The message names the tensor.
        """
        expect_names(where, self.shapes, tensors)
        for name, shape in self.shapes.items():
            core = tensors[name]
            check_floating(name, core)
            if tuple(core.shape) != shape:
                raise ValueError(
                    f"{name}: expected the ranks of the adapter, shape {shape}, got "
                    f"{tuple(core.shape)}. {_ADVICE}"
                )

    def read(self, path: Path, where: str) -> dict[str, Tensor]:
        """Reads the cores of a task from a file.

        Args:
            path: The file.
            where: The argument that names it, for the error.

        Raises:
            TypeError, ValueError: If it is another file, or a task of another adapter.
        """
        tensors, metadata = tensors_in(path, where)
        # Names and shapes first, because they say best how another adapter differs.
        self.check(tensors, where)
        expected = self.metadata()
        for key in ("format", "version", "scaling"):
            if metadata.get(key) != expected[key]:
                advice = _ADVICE if key == "scaling" else "Save the task with this lotr_ext."
                raise ValueError(
                    f"{where}: expected a task with {key} {expected[key]:.200}, got "
                    f"{metadata.get(key)!s:.200} in {path}. {advice}"
                )
        if metadata.get("factors") != expected["factors"]:
            raise ValueError(
                f"{where}: expected a task for the A and B of this adapter, got one that was made "
                f"for other A and B in {path}. {_ADVICE}"
            )
        return tensors

    def metadata(self) -> dict[str, str]:
        """Returns the metadata of the file of such a task."""
        # One number if all layers have the same, as after `apply_lotr`.
        has_one_scaling = len(set(self.scalings)) == 1
        return {
            "format": "lotr_task",
            "version": "1",
            "scaling": repr(self.scalings[0]) if has_one_scaling else json.dumps(self.scalings),
            "factors": checksum(self._factors()),
        }

    def _factors(self) -> list[tuple[str, Tensor]]:
        """Returns ("A" or "B", value) of each factor once, in the order of the groups' names.

        After `apply_lotr`, no two factors have the same group and part, so the order of the layers
        does not matter: a copy of the model with its layers in a different order has the same
        checksum. In a model built by hand, factors of one shape are in the order of the layers.
        """
        # (group, part, value) by id(value), because layers share a factor as one object.
        factors: dict[int, tuple[str, str, Tensor]] = {}
        for name, (A, B) in self.pairs.items():
            # Without the layer's module, which only a callable group_by would read.
            group = group_of(name, None, (len(A), len(B)), self.group_by)
            for part, value in (("A", A), ("B", B)):
                # By width, a group of layers has no pair of its own.
                factor_group = f"{part}_{len(value)}" if self.group_by == "width" else group
                factors.setdefault(id(value), (factor_group, part, value))
        return [
            (part, value)
            for _, part, value in sorted(factors.values(), key=lambda factor: factor[:2])
        ]


def task_format_of(adapter: AdapterState) -> TaskFormat:
    """Returns what a task over the factors of an adapter consists of."""
    return TaskFormat(
        shapes={
            f"{name}.core": tuple(adapter.tensors[f"{name}.core"].shape) for name in adapter.layers
        },
        scalings=tuple(entry.scaling for entry in adapter.layers.values()),
        pairs={
            name: (adapter.tensors[entry.A], adapter.tensors[entry.B])
            for name, entry in adapter.layers.items()
        },
        group_by="shape" if adapter.config is None else adapter.config.group_by,
    )
