"""A stream that is captured into a CUDA graph forbids some calls, and an allocation or a wait in an operator stops all others.
So the sources call the CUDA runtime by these names alone; a new one belongs here once it has been thought of."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CAPTURED = {
    "cudaLaunchKernelEx": "becomes a node of the graph",
    "cudaMemsetAsync": "becomes a node of the graph",
    "cudaStreamGetCaptureInfo": "asks",
    "cudaGetDevice": "asks",
    "cudaGetDeviceCount": "asks: the probe",
    "cudaSetDevice": "asks and sets; no work",
    "cudaDeviceGetAttribute": "asks",
    "cudaFuncGetAttributes": "asks: the probe",
    "cudaOccupancyMaxActiveClusters": "asks: whether a persistent launch fits",
    "cudaOccupancyMaxActiveBlocksPerMultiprocessor": "asks: whether a cooperative launch fits",
    "cudaThreadExchangeStreamCaptureMode": "sets what this thread may call while another call of this list asks",
    "cudaFuncSetAttribute": "of a kernel, no work",
    "cudaGetLastError": "asks",
    "cudaGetErrorName": "a text",
    "cudaGetErrorString": "a text",
    "cudaRuntimeGetVersion": "asks",
    "cudaDriverGetVersion": "asks",
    "cudaGetSymbolAddress": "asks; the array is in the module",
    "cudaGetDriverEntryPointByVersion": "asks",
    "cudaGetDriverEntryPoint": "asks, before CUDA 12.5",
}


def runtime_calls(text: str) -> set[str]:
    code = re.sub(r"//[^\n]*", "", text)
    return set(re.findall(r"\b(cuda[A-Z]\w*)\s*(?:<[^<>]*>)?\(", code))


def test_operators_call_nothing_that_a_capture_forbids() -> None:
    folders = ("torch", "cpu", "cuda", "simt")  # csrc/interpreter stands in for the runtime, so it defines all of these
    files = [p for folder in folders for p in (ROOT / "csrc" / folder).rglob("*") if p.suffix in (".h", ".cuh", ".cu", ".cpp")]
    found = set().union(*(runtime_calls(path.read_text()) for path in files))
    assert found == CAPTURED.keys()


def test_a_call_that_waits_would_be_found() -> None:
    assert runtime_calls("cudaStreamSynchronize(s); // cudaFree(p)\ncudaMalloc<float>(&p, 1);") == {
        "cudaStreamSynchronize",
        "cudaMalloc",
    }
