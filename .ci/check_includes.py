"""Checks the includes in csrc: no cycles, and each layer includes only layers below it.

    python .ci/check_includes.py [FOLDER]     prints one line per wrong include, and exits with 1

The layers, from the lowest up:

    simt < ptx < tile < kernels < plan < launchers < torch
    cpu < torch

cpu and cuda do not include each other; both use tensor_view.h. simt/module, which is in no wheel,
includes simt and cuda.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SUFFIXES = (".h", ".cuh", ".cpp", ".cu")
INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)

KERNELS_AND_BELOW = (
    "cuda/problem.h",
    "cuda/params.h",
    "cuda/ptx",
    "cuda/tile",
    "cuda/kernels",
)
# The layers, and which other layers each may include. A file belongs to the first layer with which
# its path starts, so the order matters.
LAYERS = {
    "tensor_view.h": (),
    "cuda/problem.h": ("tensor_view.h",),
    "cuda/params.h": ("cuda/problem.h",),
    "cuda/ptx": ("simt",),
    "cuda/tile": ("cuda/problem.h", "cuda/params.h", "cuda/ptx"),
    "cuda/kernels": ("cuda/problem.h", "cuda/params.h", "cuda/ptx", "cuda/tile"),
    "cuda/plan.h": ("cuda/problem.h", "cuda/params.h", "cuda/kernels"),
    "cuda/sm90/wgmma.cuh": ("simt", "cuda/ptx"),
    "cuda/sm90/ptx.cuh": ("cuda/ptx", "cuda/sm90/wgmma.cuh"),
    "cuda": (*KERNELS_AND_BELOW, "cuda/plan.h", "cuda/sm90/ptx.cuh"),
    "cpu": ("tensor_view.h",),
    "simt/module": ("simt", "cuda", "cuda/kernels", "cuda/problem.h", "cuda/plan.h"),
    "simt": (),
    "torch": ("tensor_view.h", "cpu", "cuda", "cuda/problem.h"),
}


def read_includes(folder: Path) -> dict[str, list[str]]:
    """Returns the files of the folder that each of its files includes, as paths relative to it."""
    folder = folder.resolve()
    graph: dict[str, list[str]] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix not in SUFFIXES:
            continue
        targets = []
        for name in INCLUDE.findall(path.read_text(encoding="utf-8")):
            candidates = (path.parent / name, folder / name)
            target = next((file for file in candidates if file.is_file()), None)
            if target is not None and target.resolve().is_relative_to(folder):
                targets.append(target.resolve().relative_to(folder).as_posix())
        graph[path.relative_to(folder).as_posix()] = targets
    return graph


def cycles(graph: dict[str, list[str]]) -> list[str]:
    """Returns one line per cycle of includes."""
    finished: set[str] = set()
    lines: list[str] = []

    def walk(name: str, path: list[str]) -> None:
        if name in path:
            cycle = [*path[path.index(name) :], name]
            lines.append("a cycle: " + " -> ".join(cycle))
        elif name not in finished:
            for target in graph.get(name, ()):
                walk(target, [*path, name])
            finished.add(name)

    for name in graph:
        walk(name, [])
    return lines


def layer_of(name: str) -> str | None:
    """Returns the layer of a file, None if it is in no layer."""
    for layer in LAYERS:
        if name == layer or name.startswith(f"{layer}/"):
            return layer
    return None


def wrong_includes(graph: dict[str, list[str]]) -> list[str]:
    """Returns one line per include that LAYERS does not allow."""
    lines = []
    for name, targets in graph.items():
        layer = layer_of(name)
        if layer is None:
            lines.append(f"{name}: in none of the layers {', '.join(LAYERS)}")
            continue
        allowed = (layer, *LAYERS[layer])
        for target in targets:
            if layer_of(target) not in allowed:
                lines.append(f"{name} includes {target}. It may include {', '.join(allowed)}")
    return lines


def main(folder: Path) -> int:
    graph = read_includes(folder)
    lines = cycles(graph) + wrong_includes(graph)
    for line in lines:
        print(f"{folder.name}: {line}", file=sys.stderr)
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "csrc"))
