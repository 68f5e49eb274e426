"""The headers in csrc include each other without a circle, and each layer includes only those below it.

simt < ptx; problem.h < params.h, ptx < tile < kernels < plan < launchers < torch; cpu < torch. simt/module, which is in no
wheel, includes simt and cuda. cpu and cuda include nothing of each other.

    python .ci/check_includes.py [FOLDER]     1 and a line an include that is wrong
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# By the beginning of a path (the first that matches): the layers that a file may include besides its own.
LAYERS = {
    "cuda/problem.h": (),
    "cuda/params.h": ("cuda/problem.h",),
    "cuda/ptx": ("simt",),
    "cuda/tile": ("cuda/problem.h", "cuda/params.h", "cuda/ptx"),
    "cuda/kernels": ("cuda/problem.h", "cuda/params.h", "cuda/ptx", "cuda/tile"),
    "cuda/plan.h": ("cuda/problem.h", "cuda/params.h", "cuda/kernels"),
    "cuda/sm90/wgmma.cuh": ("simt", "cuda/ptx"),
    "cuda/sm90/ptx.cuh": ("cuda/ptx", "cuda/sm90/wgmma.cuh"),
    "cuda": (
        "cuda/problem.h",
        "cuda/params.h",
        "cuda/ptx",
        "cuda/tile",
        "cuda/kernels",
        "cuda/plan.h",
        "cuda/sm90/ptx.cuh",
    ),
    "cpu": (),
    "simt/module": ("simt", "cuda", "cuda/kernels", "cuda/problem.h", "cuda/plan.h"),
    "simt": (),
    "torch": ("cpu", "cuda", "cuda/problem.h"),
}


def includes(folder: Path) -> dict[str, list[str]]:
    """What each file under folder includes of the others, by their paths in it."""
    found: dict[str, list[str]] = {}
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".h", ".cuh", ".cpp", ".cu")):
        names = re.findall(
            r'^\s*#\s*include\s+"([^"]+)"', path.read_text(encoding="utf-8"), re.MULTILINE
        )
        targets = (
            (path.parent / name if (path.parent / name).is_file() else folder / name).resolve()
            for name in names
        )
        own = [
            t.relative_to(folder.resolve()).as_posix()
            for t in targets
            if t.is_file() and t.is_relative_to(folder.resolve())
        ]
        found[path.relative_to(folder).as_posix()] = own
    return found


def circles(graph: dict[str, list[str]]) -> list[str]:
    """One line a circle that a walk from each file meets."""
    done: set[str] = set()
    lines: list[str] = []

    def walk(name: str, way: list[str]) -> None:
        if name in way:
            lines.append("a circle: " + " -> ".join([*way[way.index(name) :], name]))
        elif name not in done:
            for target in graph.get(name, ()):
                walk(target, [*way, name])
            done.add(name)

    for name in graph:
        walk(name, [])
    return lines


def layer(name: str) -> str:
    return next((layer for layer in LAYERS if name == layer or name.startswith(f"{layer}/")), "")


def strangers(graph: dict[str, list[str]]) -> list[str]:
    """A line for each include of a layer that is not below."""
    lines = []
    for name, targets in graph.items():
        own = layer(name)
        if not own:
            lines.append(f"{name}: in none of the layers {', '.join(LAYERS)}")
            continue
        for target in targets:
            if layer(target) != own and layer(target) not in LAYERS[own]:
                lines.append(
                    f"{name} includes {target}: {own} may include {', '.join(LAYERS[own]) or 'nothing else'}"
                )
    return lines


def main(folder: Path) -> int:
    graph = includes(folder)
    lines = circles(graph) + strangers(graph)
    for line in lines:
        print(f"{folder.name}: {line}", file=sys.stderr)
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "csrc"))
