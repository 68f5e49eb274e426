"""python -m bench.packed: what a step over packed experts holds."""

from __future__ import annotations

import json

import pytest

from bench import packed, quantised


def test_packed_experts_hold_less_than_dense_ones(tmp_path, capsys):
    options = ["--shape", "8x256x256x8x2x4", "--threads", "1", "--clock", "cpu", "--rounds", "1", "--results", str(tmp_path)]
    assert packed.main(options) == 0
    cells = [json.loads(line) for line in (tmp_path / "packed.jsonl").read_text().splitlines()]
    assert [(cell["case"]["format"], cell["rival"]) for cell in cells] == [
        (name, rival) for name in ("mxfp4", "fp8") for rival in packed.RIVALS
    ]
    for small, dense in (cells[:2], cells[2:]):
        assert dense["weight_bytes"] == 8 * 3 * 256 * 256 * 2 and small["weight_bytes"] < 0.6 * dense["weight_bytes"]
        assert small["weight_bytes"] + small["peak_bytes"] > small["weight_bytes"] > 0
    assert "packed" in capsys.readouterr().out


def test_unknown_formats_of_layers():
    with pytest.raises(ValueError, match="formats: expected some of nf4, int8, int4, fp8, got 'gguf'"):
        quantised.main(["--formats", "gguf"])


@pytest.mark.parametrize("argument", [["--shape", "8x256"], ["--formats", "gguf"]])
def test_wrong_arguments(argument):
    with pytest.raises(ValueError, match=f"{argument[0][2:]}: expected"):
        packed.main([*argument, "--threads", "1"])
