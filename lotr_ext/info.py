"""`python -m lotr_ext.info [--json]`: versions, what was built, what runs on this machine."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import sys
from typing import Any

import torch

from . import __version__
from .ops.planner import CUDA_DTYPES, CUDA_WITHOUT, build_info, cuda_obstacle, cuda_probe, cuda_version, plan

__all__ = ["collect", "main"]

_LIBRARIES = ("safetensors", "transformers", "peft", "accelerate")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def collect() -> dict[str, Any]:
    """All that the command prints, as a dictionary that json can write."""
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    runs = {}
    for device in devices:
        name = platform.processor() or platform.machine() if device.type == "cpu" else torch.cuda.get_device_name(device)
        runs[str(device)] = {"name": name, "paths": {str(t).removeprefix("torch."): _path(t, device) for t in CUDA_DTYPES}}
    return {
        "lotr_ext": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "libraries": {name: _version(name) for name in _LIBRARIES},
        "built": build_info(),
        "cuda": _cuda(),
        "runs": runs,
    }


def _path(dtype: torch.dtype, device: torch.device) -> dict[str, str | None]:
    """The strategy, None if LOTR_STRATEGY is one that cannot run there, and why."""
    try:
        chosen = plan(4096, 16, dtype, device)
    except ValueError as error:
        return {"strategy": None, "why": str(error)}
    return {"strategy": chosen.strategy, "why": chosen.reason}


def _cuda() -> dict[str, Any]:
    """The CUDA versions of the build and of the driver (None without CUDA kernels), why the kernels cannot run, and what
    LOTR_CUDA_WITHOUT turns off."""
    obstacle = cuda_obstacle(0)
    if not build_info()["cuda"]["built"]:
        return {"runtime": None, "driver": None, "obstacle": obstacle, "without": list(CUDA_WITHOUT)}
    found = cuda_probe(-1)
    return {"runtime": found["runtime"], "driver": found["driver"], "obstacle": obstacle, "without": list(CUDA_WITHOUT)}


def _cuda_line(built: dict[str, Any], cuda: dict[str, Any]) -> str:
    if not built["built"]:
        return "CUDA       no kernels built"
    driver = f"driver for CUDA {cuda_version(cuda['driver'])}" if cuda["driver"] else "no driver"
    kernels = f"kernels for {', '.join(map(str, built['archs']))}, built by CUDA {cuda_version(cuda['runtime'])}"
    return f"CUDA       {kernels}; {driver}" + (f"\n           they cannot run: {cuda['obstacle']}" if cuda["obstacle"] else "")


def _lines(facts: dict[str, Any]) -> list[str]:
    built = facts["built"]
    cpu = built["cpu"]
    lines = [
        f"lotr_ext   {facts['lotr_ext']} (extension {built['version']}, for torch >= {built['torch_target']})",
        f"python     {facts['python']} on {facts['platform']}",
        f"torch      {facts['torch']}, CUDA {facts['torch_cuda'] or 'not in this build'}, {facts['threads']} threads",
        "libraries  " + ", ".join(f"{name} {version or '-'}" for name, version in facts["libraries"].items()),
        f"CPU        kernels for {cpu['isa']}",
        _cuda_line(built["cuda"], facts["cuda"]),
        *([f"           LOTR_CUDA_WITHOUT turns off {', '.join(CUDA_WITHOUT)}"] if CUDA_WITHOUT else []),
        "runs (4096 tokens, rank 16)",
    ]
    for device, found in facts["runs"].items():
        lines.append(f"  {device}: {found['name']}")
        lines += [f"    {dtype:9} {path['strategy'] or 'error'}: {path['why']}" for dtype, path in found["paths"].items()]
    return lines


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m lotr_ext.info", description="Versions, what was built, what runs.")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    as_json = parser.parse_args(arguments).json
    try:
        facts = collect()
    except RuntimeError as error:
        if not str(error).startswith("LOTR_CPU_ISA: "):
            raise
        sys.exit(f"lotr_ext: {error}")
    print(json.dumps(facts, indent=2) if as_json else "\n".join(_lines(facts)))


if __name__ == "__main__":
    main()
