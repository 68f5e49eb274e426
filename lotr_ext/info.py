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
    # From the metadata of the installed packages: importing transformers would take seconds.
    installed = {
        distribution.metadata["Name"]: distribution.version
        for distribution in importlib.metadata.distributions()
    }
    libraries = [f"{name} {installed.get(name, '-')}" for name in _LIBRARIES]
    lines = [
        f"CPU kernels: yes; CUDA kernels: {_cuda_summary()}",
        "",
        f"lotr_ext   {__version__} (extension {build['version']}, "
        f"for torch >= {build['torch_target']})",
        f"python     {platform.python_version()} on {platform.platform()}",
        f"torch      {torch.__version__}, CUDA {torch.version.cuda or 'not in this build'}, "
        f"threads: {torch.get_num_threads()}",
        f"libraries  {', '.join(libraries)}",
        f"CPU        kernels for {build['cpu']['isa']}",
    ]
    if build["cuda"]["built"]:
        runtime, driver = torch.ops.lotr.cuda_versions()
        driver_text = f"driver for CUDA {_cuda_version(driver)}" if driver else "no driver"
        lines.append(f"CUDA       kernels built by CUDA {_cuda_version(runtime)}; {driver_text}")
        # Even if torch sees no GPU, because an old driver hides it.
        obstacle = cuda_obstacle(0)
        if obstacle is not None:
            lines.append(f"           they cannot run: {obstacle}")
    lines.append(f"strategy   {strategy_from_environment() or 'by tokens'} on CUDA (LOTR_STRATEGY)")
    names = {torch.device("cpu"): platform.processor() or platform.machine()}
    for index in range(torch.cuda.device_count()):
        names[torch.device("cuda", index)] = torch.cuda.get_device_name(index)
    for device, name in names.items():
        lines.append(f"{device!s:10} {name}")
        for dtype in CUDA_DTYPES:  # float64 has kernels only on the CPU, and is not listed
            obstacle = kernel_obstacle(16, dtype, device)  # the default rank of LoTRConfig
            runs = f"the PyTorch fallback, because {obstacle}" if obstacle else "the kernels"
            lines.append(f"           {str(dtype).removeprefix('torch.'):9} {runs}")
    return lines


def _cuda_version(number: int) -> str:
    """Returns "12.8" for 12080."""
    return f"{number // 1000}.{number % 1000 // 10}"


def _cuda_summary() -> str:
    """Returns what the first line says of the CUDA kernels."""
    build = build_info()["cuda"]
    if not build["built"]:
        return "not built"
    obstacles = [cuda_obstacle(index) for index in range(torch.cuda.device_count())]
    if not obstacles:
        where = "no GPU here"
    elif None in obstacles:
        where = f"they run on {obstacles.count(None)} of {len(obstacles)} GPUs here"
    else:
        where = "they cannot run here"
    return f"built for {build['archs'].replace('-real', '')}, {where}"


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
    # Each kernel divides its work by the rows and columns of its large matrix.
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
