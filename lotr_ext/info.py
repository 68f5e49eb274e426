"""`python -m lotr_ext.info [--plans M K N r]`: what was built, and what runs on this machine."""

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
    kernel_obstacle,
)
from .core.strategy import strategy_from_environment

_LIBRARIES = ("safetensors", "transformers", "peft", "accelerate")


def report() -> list[str]:
    """Returns the lines that the command prints. The first one says which kernels run here.

    Raises:
        RuntimeError: If LOTR_CPU_ISA names an instruction set that this CPU or build lacks.
        ValueError: If LOTR_STRATEGY names no strategy.
    """
    build = build_info()
    cuda_summary, cuda_lines = _cuda_report()
    torch_cuda = torch.version.cuda or "not in this build"
    return [
        f"CPU kernels: yes; CUDA kernels: {cuda_summary}",
        "",
        f"lotr_ext   {__version__} (extension {build['version']}, "
        f"for torch >= {build['torch_target']})",
        f"python     {platform.python_version()} on {platform.platform()}",
        f"torch      {torch.__version__}, CUDA {torch_cuda}, threads: {torch.get_num_threads()}",
        f"libraries  {_library_versions()}",
        f"CPU        kernels for {build['cpu']['isa']}",
        *cuda_lines,
        *_device_report(torch.device("cpu"), platform.processor() or platform.machine()),
        *_gpu_reports(),
    ]


def _library_versions() -> str:
    versions = {
        distribution.metadata["Name"]: distribution.version
        for distribution in importlib.metadata.distributions()
    }
    return ", ".join(f"{name} {versions.get(name, '-')}" for name in _LIBRARIES)


def _cuda_report() -> tuple[str, list[str]]:
    """Returns what the first line says of the CUDA kernels, and the lines about them."""
    strategy = strategy_from_environment()
    strategy_line = f"strategy   {strategy or 'by tokens'} on CUDA (LOTR_STRATEGY)"
    build = build_info()["cuda"]
    if not build["built"]:
        return "not built", [strategy_line]
    runtime, driver = torch.ops.lotr.cuda_versions()
    supported = f"driver for CUDA {_cuda_version(driver)}" if driver else "no driver"
    lines = [f"CUDA       kernels built by CUDA {_cuda_version(runtime)}; {supported}"]
    obstacle = cuda_obstacle(0)
    gpu_count = torch.cuda.device_count()
    where = "no GPU here"
    if gpu_count and obstacle is None:
        where = f"they run on {gpu_count} GPU{'s' * (gpu_count > 1)} here"
    elif gpu_count:
        where = "they cannot run here"
    if obstacle is not None:
        lines.append(f"           they cannot run: {obstacle}")
    archs = ", ".join(arch.removesuffix("-real") for arch in build["archs"])
    return f"built for {archs}, {where}", [*lines, strategy_line]


def _cuda_version(number: int) -> str:
    """Returns "12.8" for 12080."""
    return f"{number // 1000}.{number % 1000 // 10}"


def _gpu_reports() -> list[str]:
    lines = []
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        lines += _device_report(device, torch.cuda.get_device_name(device))
    return lines


def _device_report(device: torch.device, name: str) -> list[str]:
    """Returns a line for the device and one per dtype."""
    lines = [f"{device!s:10} {name}"]
    for dtype in CUDA_DTYPES:
        obstacle = kernel_obstacle(16, dtype, device)
        runs = "the kernels"
        if obstacle is not None:
            runs = f"the PyTorch fallback, because {obstacle}"
        lines.append(f"           {str(dtype).removeprefix('torch.'):9} {runs}")
    return lines


def plans(m: int, k: int, n: int, r: int) -> list[str]:
    """Returns how the CUDA kernels of one layer divide their work, one line per kernel.

    The plans are those for bfloat16 on the first GPU, or on an H100 if there is none.

    Args:
        m: Tokens.
        k: in_features.
        n: out_features.
        r: Rank.

    Raises:
        RuntimeError: If the build has no CUDA kernels, or a size is out of range.
    """
    if not build_info()["cuda"]["built"]:
        raise RuntimeError("--plans: expected a build with CUDA kernels, got one without")
    device = 0 if torch.cuda.is_available() else -1  # -1: an H100
    large_matrices = {
        "shrink": (m, k),
        "expand_add": (m, n),
        "shrink_grad": (m, n),
        "factor_grad": (m, k),
        "fold_grad": (1, n),  # it reads no tokens
    }
    return [
        torch.ops.lotr.cuda_plans(kernel, *sizes, r, device)
        for kernel, sizes in large_matrices.items()
    ]


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
    options = parser.parse_args(arguments)
    try:
        lines = plans(*options.plans) if options.plans else report()
    except (RuntimeError, ValueError) as error:  # a wrong environment variable or size
        sys.exit(f"lotr_ext: {str(error).splitlines()[0]}")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
