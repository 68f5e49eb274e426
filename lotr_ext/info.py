"""`python -m lotr_ext.info [--json] [--plans M K N r]`: what was built, and what runs on this machine."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import sys
from typing import Any

import torch

from . import __version__
from .ops import CUDA_DTYPES, build_info, cuda_obstacle, cuda_version, obstacle_to_kernels

__all__ = ["collect", "main", "plans"]

_LIBRARIES = ("safetensors", "transformers", "peft", "accelerate")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def collect() -> dict[str, Any]:
    """All that the command prints, as a dictionary that json can write."""
    built, devices = build_info(), [torch.device("cpu")]
    devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    names = [platform.processor() or platform.machine(), *(torch.cuda.get_device_name(d) for d in devices[1:])]
    runtime, driver = torch.ops.lotr.cuda_versions() if built["cuda"]["built"] else (None, None)
    return {
        "lotr_ext": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "libraries": {name: _version(name) for name in _LIBRARIES},
        "built": built,
        "cuda": {"runtime": runtime, "driver": driver, "obstacle": cuda_obstacle(0)},
        "runs": {  # why PyTorch's own products run in place of the kernels, by device and dtype; None: the kernels run
            str(device): {
                "name": name,
                **{str(t).removeprefix("torch."): obstacle_to_kernels(16, t, device) for t in CUDA_DTYPES},
            }
            for device, name in zip(devices, names)
        },
    }


def _summary(facts: dict[str, Any]) -> str:
    """The first line: which kernels there are, and whether they run here."""
    cuda, gpus = facts["built"]["cuda"], len(facts["runs"]) - 1
    if not cuda["built"]:
        return "CPU kernels: yes; CUDA kernels: not built"
    if not gpus:
        where = "no GPU here"
    else:
        where = (
            f"they run on {gpus} GPU{'s' * (gpus > 1)} here" if facts["cuda"]["obstacle"] is None else "they cannot run here"
        )
    return f"CPU kernels: yes; CUDA kernels: built for {', '.join(a.removesuffix('-real') for a in cuda['archs'])}, {where}"


def _lines(facts: dict[str, Any]) -> list[str]:
    cuda, built = facts["cuda"], facts["built"]
    lines = [
        _summary(facts),
        "",
        f"lotr_ext   {facts['lotr_ext']} (extension {built['version']}, for torch >= {built['torch_target']})",
        f"python     {facts['python']} on {facts['platform']}",
        f"torch      {facts['torch']}, CUDA {facts['torch_cuda'] or 'not in this build'}, {facts['threads']} threads",
        "libraries  " + ", ".join(f"{name} {version or '-'}" for name, version in facts["libraries"].items()),
        f"CPU        kernels for {built['cpu']['isa']}",
    ]
    if built["cuda"]["built"]:
        driver = f"driver for CUDA {cuda_version(cuda['driver'])}" if cuda["driver"] else "no driver"
        lines.append(f"CUDA       kernels built by CUDA {cuda_version(cuda['runtime'])}; {driver}")
    if cuda["obstacle"]:
        lines.append(f"           they cannot run: {cuda['obstacle']}")
    for device, found in facts["runs"].items():
        lines.append(f"{device:10} {found['name']}")
        dtypes = {dtype: why for dtype, why in found.items() if dtype != "name"}
        lines += [
            f"           {dtype:9} {'the kernels' if why is None else f'torch, because {why}'}" for dtype, why in dtypes.items()
        ]
    return lines


def plans(m: int, k: int, n: int, r: int) -> list[str]:
    """How the CUDA kernels of one layer's forward and backward divide their work: x [m, k], W [n, k], rank r. One line a
    kernel in bfloat16, for the first GPU, or an H100 if there is none."""
    if not build_info()["cuda"]["built"]:
        raise RuntimeError("--plans: expected a build with CUDA kernels, got one without")
    device = 0 if torch.cuda.is_available() else -1
    calls = {"shrink": (m, k), "expand_add": (m, n), "shrink_grad": (m, n), "factor_grad": (m, k), "fold_grad": (1, n)}
    return [torch.ops.lotr.cuda_plans(op, *sizes, r, device) for op, sizes in calls.items()]


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m lotr_ext.info", description="What was built, and what runs here.")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument(
        "--plans", type=int, nargs=4, metavar=("M", "K", "N", "r"), help="how the CUDA kernels divide their work"
    )
    given = parser.parse_args(arguments)
    try:
        if given.plans:
            print("\n".join(plans(*given.plans)))
            return
        facts = collect()
    except RuntimeError as error:  # of a variable in the environment, such as LOTR_CPU_ISA, or of a size
        sys.exit(f"lotr_ext: {str(error).splitlines()[0]}")
    print(json.dumps(facts, indent=2) if given.json else "\n".join(_lines(facts)))


if __name__ == "__main__":
    main()
