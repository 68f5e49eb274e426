"""Finds on a machine what the parts of a run need."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from ..measure.store import ROOT as ROOT
from ..measure.store import write_whole

NEEDED = ("torch", "numpy", "safetensors")
OPTIONAL = ("matplotlib", "peft", "transformers", "hypothesis", "xdist", "pytest_timeout")
HOPPER = "compute capability 9.0"


def write(path: Path, value: object) -> None:
    """Writes JSON atomically."""
    write_whole(path, json.dumps(value, indent=1) + "\n")


def sanitizer() -> str | None:
    beside = Path("/usr/local/cuda/bin/compute-sanitizer")
    return shutil.which("compute-sanitizer") or (str(beside) if beside.exists() else None)


def nvcc() -> str | None:
    """Finds nvcc as CMakeLists.txt does."""
    folders = [Path(os.environ[name]) / "bin" for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    for folder in (*folders, Path("/usr/local/cuda/bin")):
        if (folder / "nvcc").is_file():
            return str(folder / "nvcc")
    return shutil.which("nvcc")


def tool(name: str) -> str | None:
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)


def gpu() -> str | None:
    """The first GPU and its driver, as seen by torch; None without one."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else None


def look() -> dict[str, str | None]:
    """The path of each requirement of the parts on this machine, or None."""
    found = {"gpu": gpu(), "nvcc": nvcc(), "c++": shutil.which(os.environ.get("CXX", "c++").split()[0])}
    found |= {name: tool(name) for name in ("cmake", "ninja", "ncu")} | {"compute-sanitizer": sanitizer()}
    for package in (*NEEDED, "pytest", *OPTIONAL):
        spec = importlib.util.find_spec(package)
        found[package] = None if spec is None else str(spec.origin)
    found[HOPPER] = found["gpu"] if found["gpu"] and found["gpu"].endswith(", 9.0") else None
    return found
