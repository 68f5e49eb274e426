"""Exports of LoRA adapters into one folder at once, and exports that end in the middle: one adapter whole, or none."""

from __future__ import annotations

import os
from functools import partial
from itertools import count
from pathlib import Path

import pytest
import torch
from torch import nn
from toys import at_once

from lotr_ext import LoTRFactors, LoTRLinear, files
from lotr_ext.interop import export_lora, read_lora

SCALINGS = (0.5, 2.0, 8.0)


def adapted(scaling: float) -> nn.Module:
    """A layer whose scaling can be told from its tensors: B is full of it."""
    model = nn.Sequential(LoTRLinear.from_linear(nn.Linear(5, 4), LoTRFactors(5, 4, 2), scaling=scaling))
    with torch.no_grad():
        model[0].factors.B.fill_(scaling)
        model[0].core.copy_(torch.eye(2))
    return model


def assert_whole(directory: Path) -> float:
    (layer,) = read_lora(directory).layers.values()
    assert torch.equal(layer.B, torch.full((4, 2), layer.scaling))
    return layer.scaling


def test_exports_into_one_folder_at_once_never_mix(tmp_path: Path) -> None:
    export_lora(adapted(SCALINGS[0]), tmp_path)
    seen: set[float] = set()
    left = list(SCALINGS)

    def export(scaling: float) -> None:
        try:
            for _ in range(15):
                export_lora(adapted(scaling), tmp_path)
        finally:
            left.remove(scaling)

    def read() -> None:
        while left:
            seen.add(assert_whole(tmp_path))

    assert at_once(*(partial(export, scaling) for scaling in SCALINGS), read) == []
    assert seen <= set(SCALINGS) and assert_whole(tmp_path) in SCALINGS
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


class Killed(BaseException):
    """As a kill: no handler of errors catches it."""


@pytest.mark.parametrize("at", [1, 2], ids=["before the tensors", "before the configuration"])
def test_an_export_that_ends_in_the_middle_leaves_no_mixture(tmp_path: Path, monkeypatch, at: int) -> None:
    export_lora(adapted(0.5), tmp_path)
    calls, replace = count(1), os.replace

    def killed(*paths) -> None:
        if next(calls) == at:
            raise Killed
        replace(*paths)

    with monkeypatch.context() as m:
        m.setattr(files.os, "replace", killed)
        with pytest.raises(Killed):
            export_lora(adapted(2.0), tmp_path)
    with pytest.raises(ValueError, match="adapter_config"):
        read_lora(tmp_path)
    export_lora(adapted(2.0), tmp_path)
    assert assert_whole(tmp_path) == 2.0
