"""What CMake compiles for, and what it says where nvcc's CUDA is not torch's: csrc/cuda/toolkit.cmake, run as a script;
and that an older toolkit compiles the sources."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CMAKE = shutil.which("cmake", path=str(Path(sys.executable).parent)) or shutil.which("cmake")
CAPABILITIES = ("8.0", "8.6", "8.7", "8.9", "9.0", "10.0", "10.3", "11.0", "12.0", "12.1", "13.0")


def cmake(tmp_path: Path, script: str, smi: str | None = None) -> tuple[str, str]:
    """(what the script says, its warnings), on a machine where nvidia-smi prints smi; None: without the program."""
    if CMAKE is None:
        pytest.skip("no cmake")
    folder = tmp_path / "bin"
    folder.mkdir(parents=True, exist_ok=True)
    if smi is not None:
        program = folder / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{smi}\n")
        program.chmod(0o755)
    source = tmp_path / "script.cmake"
    source.write_text(
        f"cmake_minimum_required(VERSION 3.26)\nset(CMAKE_FIND_USE_CMAKE_SYSTEM_PATH OFF)\n"
        f"include({ROOT}/csrc/cuda/toolkit.cmake)\n{script}\n"
    )
    done = subprocess.run([CMAKE, "-P", str(source)], env={"PATH": str(folder)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, " ".join(done.stderr.split())


def archs(tmp_path: Path, wanted: str, nvcc: str, smi: str | None = None) -> list[str]:
    out, _ = cmake(tmp_path, f'lotr_archs(found "{wanted}" {nvcc})\nmessage(STATUS "archs=${{found}}")', smi)
    return re.search(r"archs=(\S+)", out)[1].split(";")


def serves(arch: str, capability: str) -> bool:
    """As the driver decides: code runs on its own and later minor versions, PTX on all later ones, 90a on 9.0 alone."""
    number, suffix, real = re.fullmatch(r"(\d+)(a?)(-real)?", arch).groups()
    built, card = divmod(int(number), 10), tuple(map(int, capability.split(".")))
    if suffix:
        return built == card
    return (built[0] == card[0] and built <= card) or (not real and built <= card)


@pytest.mark.parametrize("nvcc", ["12.0", "12.6", "12.8", "13.0"])
def test_without_a_card_the_build_serves_every_card(tmp_path, nvcc):
    found = archs(tmp_path, "AUTO", nvcc)
    for capability in CAPABILITIES:
        assert any(serves(arch, capability) for arch in found), capability
    assert len(found) == len(set(found)) and "90a-real" in found
    assert all(not a.startswith(("10", "12")) for a in found) or nvcc >= "12.8"  # unknown to older ones


@pytest.mark.parametrize(("smi", "says"), [(None, True), ("echo 9.0", False)])
def test_a_build_for_all_cards_says_how_to_shorten_it(tmp_path, smi, says):
    out, _ = cmake(tmp_path, 'lotr_archs(found "AUTO" 13.0)', smi)
    notes = [line for line in out.splitlines() if line.startswith("-- note: ")]  # what setup.py shows on the terminal
    assert len(notes) == says and all("LOTR_CUDA=OFF" in line and "LOTR_ARCHS=90a-real" in line for line in notes)


@pytest.mark.parametrize(
    ("smi", "expected"),
    [
        ("echo 9.0", ["90a-real"]),
        ("echo 8.0; echo 8.0; echo 8.9", ["80-real", "89-real"]),
        ("echo 12.0", ["120-real"]),
        ("echo 7.5; echo 8.6", ["86-real"]),
    ],
)
def test_the_cards_that_are_here_are_enough(tmp_path, smi, expected):
    assert archs(tmp_path, "AUTO", "13.0", smi) == expected


@pytest.mark.parametrize("smi", ["echo 7.5", "echo no devices were found; exit 6", "echo"])
def test_no_card_that_counts_is_no_card(tmp_path, smi):
    assert archs(tmp_path, "AUTO", "13.0", smi) == archs(tmp_path / "none", "AUTO", "13.0", "exit 9")


def test_a_card_that_nvcc_does_not_know_gets_ptx(tmp_path):
    found = archs(tmp_path, "AUTO", "12.6", "echo 8.6; echo 12.0")
    assert any(serves(arch, "12.0") for arch in found) and any(serves(arch, "8.6") for arch in found)


@pytest.mark.parametrize(
    ("wanted", "own", "shared"),
    [
        ("80-real;86-real;89-real;90a-real;100;120-real", "80-real;90a-real;100", ["80 86", "80 89", "100 120"]),
        ("89-real;86", "86", ["86 89"]),
        ("80;86;90-real;90a-real;120-real", "80;86;90-real;90a-real;120-real", []),
        ("120-real;100a-real;80-virtual;89-real", "120-real;100a-real;80-virtual;89-real", []),
        ("native", "native", []),
    ],
)
def test_ptx_is_compiled_once_for_cards_of_one_kind(tmp_path, wanted, own, shared):
    out, _ = cmake(tmp_path, f'lotr_share_ptx(own options "{wanted}")\nmessage(STATUS "own=${{own}} options=${{options}}")')
    options = [f"--generate-code=arch=compute_{a.split()[0]},code=[sm_{a.split()[1]}]" for a in shared]
    assert f"own={own} options={';'.join(options)}" in out


def test_what_is_asked_for_is_what_is_built(tmp_path):
    assert archs(tmp_path, "80;90a-real", "13.0", "echo 12.0") == ["80", "90a-real"]


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("cuda: Optional[str] = '12.8'", "12.8"),
        ("cuda = '13.0'", "13.0"),
        ("cuda: Optional[str] = None", ""),
        ("cuda_note = '11.1'", ""),
    ],
)
def test_torchs_cuda_is_read_from_its_version_file(tmp_path, text, version):
    (tmp_path / "version.py").write_text(f"__version__ = '2.13.0'\ndebug = False\n{text}\ngit_version = 'abc'\n")
    out, _ = cmake(tmp_path, f'lotr_torch_cuda(found "{tmp_path}")\nmessage(STATUS "found=<${{found}}>")')
    assert f"found=<{version}>" in out


@pytest.mark.parametrize(
    ("nvcc", "torch", "words", "warns"),
    [
        ("13.0", "12.8", "driver for CUDA 13", True),
        ("12.8", "13.0", "run on every driver that torch runs on", False),
        ("13.0", "13.2", "", False),
        ("13.0", "", "no CUDA", False),
    ],
)
def test_a_difference_from_torchs_cuda_is_said(tmp_path, nvcc, torch, words, warns):
    out, errors = cmake(tmp_path, f'lotr_compare_cuda("{nvcc}" "{torch}")')
    assert words in (errors if warns else out) and ("CMake Warning" in errors) == warns
    assert not warns or "CUDA_HOME" in errors


# ---- the oldest toolkits that CMake accepts ----------------------------------------------------------------------------


def toolkit_12() -> Path | None:
    """A CUDA 12 toolkit: LOTR_CUDA12_HOME's, or one beside /usr/local/cuda."""
    named = os.environ.get("LOTR_CUDA12_HOME")
    homes = [Path(named)] if named else sorted(Path("/usr/local").glob("cuda-12*"))
    return next((home for home in homes if (home / "bin" / "nvcc").is_file()), None)


def compiled_by_12(source: str, *options: object) -> str:
    """What nvcc of CUDA 12 prints for csrc/cuda/<source>.cu and sm_90a; skips without one."""
    home = toolkit_12()
    if home is None:
        pytest.skip("no CUDA 12 toolkit: set LOTR_CUDA12_HOME to one")
    command = [home / "bin" / "nvcc", "-std=c++17", "-gencode=arch=compute_90a,code=sm_90a", f"-I{ROOT}/csrc", *options]
    done = subprocess.run(
        [str(word) for word in (*command, ROOT / "csrc" / "cuda" / f"{source}.cu")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.parametrize("source", ["one_product_sm90", "rows", "counters"])
def test_cuda_12_compiles_the_launchers(tmp_path, source):
    """Host code and sm_90a's: the runtime's functions that came after 12.0 are asked for only where they are."""
    compiled_by_12(source, "-c", "-Xptxas", "-O0", "-o", tmp_path / "object.o")


@pytest.mark.full
@pytest.mark.parametrize("source", ["one_product_sm90", "shrink_grad_sm90"])
def test_ptxas_of_cuda_12_lets_products_overlap(tmp_path, source):
    """C75xx: wgmma that ptxas runs one after another. 12.4 did so with sums that nothing had set, and does in gemm_lotr."""
    said = compiled_by_12(source, "-cubin", "-Xptxas", "-v", "-o", tmp_path / "kernels.cubin")
    assert "registers" in said and "C75" not in said
