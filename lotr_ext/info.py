"""`python -m lotr_ext.info [--plans M K N r]`: what was built, and what runs on this machine."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import sys

import torch

from . import __version__
from .core.kernel_support import (
    CUDA_DTYPES,
    build_info,
    cuda_obstacle,
    cuda_version,
    kernel_obstacle,
)

__all__ = ["main", "plans", "report"]

_LIBRARIES = ("safetensors", "transformers", "peft", "accelerate")


def report() -> list[str]:
    """The lines that the command prints. The first says in plain words which kernels there are, and whether they run here."""
    built, gpus = build_info(), torch.cuda.device_count()
    versions = {
        found.metadata["Name"]: found.version for found in importlib.metadata.distributions()
    }
    libraries = ", ".join(f"{name} {versions.get(name, '-')}" for name in _LIBRARIES)
    summary, cuda = "not built", []
    if built["cuda"]["built"]:
        obstacle, (runtime, driver) = cuda_obstacle(0), torch.ops.lotr.cuda_versions()
        archs = ", ".join(arch.removesuffix("-real") for arch in built["cuda"]["archs"])
        here = (
            f"they run on {gpus} GPU{'s' * (gpus > 1)} here"
            if obstacle is None
            else "they cannot run here"
        )
        summary = f"built for {archs}, {here if gpus else 'no GPU here'}"
        served = f"driver for CUDA {cuda_version(driver)}" if driver else "no driver"
        cuda.append(f"CUDA       kernels built by CUDA {cuda_version(runtime)}; {served}")
        if obstacle is not None:
            cuda.append(f"           they cannot run: {obstacle}")
    lines = [
        f"CPU kernels: yes; CUDA kernels: {summary}",
        "",
        f"lotr_ext   {__version__} (extension {built['version']}, for torch >= {built['torch_target']})",
        f"python     {platform.python_version()} on {platform.platform()}",
        f"torch      {torch.__version__}, CUDA {torch.version.cuda or 'not in this build'}, {torch.get_num_threads()} threads",
        f"libraries  {libraries}",
        f"CPU        kernels for {built['cpu']['isa']}",
        *cuda,
    ]
    for device in (torch.device("cpu"), *(torch.device("cuda", i) for i in range(gpus))):
        name = (
            torch.cuda.get_device_name(device)
            if device.type == "cuda"
            else platform.processor() or platform.machine()
        )
        lines.append(f"{device!s:10} {name}")
        for dtype in CUDA_DTYPES:
            why = kernel_obstacle(16, dtype, device)
            runs = "the kernels" if why is None else f"torch, because {why}"
            lines.append(f"           {str(dtype).removeprefix('torch.'):9} {runs}")
    return lines


def plans(m: int, k: int, n: int, r: int) -> list[str]:
    """How the CUDA kernels of one layer's forward and backward divide their work: x [m, k], W [n, k], rank r. One line a
    kernel in bfloat16, for the first GPU, or an H100 if there is none."""
    if not build_info()["cuda"]["built"]:
        raise RuntimeError("--plans: expected a build with CUDA kernels, got one without")
    device = 0 if torch.cuda.is_available() else -1
    calls = {
        "shrink": (m, k),
        "expand_add": (m, n),
        "shrink_grad": (m, n),
        "factor_grad": (m, k),
        "fold_grad": (1, n),
    }
    return [torch.ops.lotr.cuda_plans(op, *sizes, r, device) for op, sizes in calls.items()]


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m lotr_ext.info", description="What was built, and what runs here."
    )
    parser.add_argument(
        "--plans",
        type=int,
        nargs=4,
        metavar=("M", "K", "N", "r"),
        help="how the CUDA kernels divide their work",
    )
    given = parser.parse_args(arguments)
    try:
        print("\n".join(plans(*given.plans) if given.plans else report()))
    except (
        RuntimeError
    ) as error:  # of a variable in the environment, such as LOTR_CPU_ISA, or of a size
        sys.exit(f"lotr_ext: {str(error).splitlines()[0]}")


if __name__ == "__main__":
    main()
