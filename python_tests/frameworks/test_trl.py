"""TRL's SFTTrainer with adapters of apply_lotr and of PEFT."""

from __future__ import annotations

from pathlib import Path

from beside import needs, values_of


@needs("trl")
def test_sft_trains_checkpoints_resumes_and_loads(tmp_path: Path) -> None:
    found = values_of(["trl_checks:applied", "trl_checks:through_peft"], tmp_path)
    (applied,), (peft,) = found.values()
    for run in (applied, peft):
        assert run["losses"][-1] < 0.9 * run["losses"][0] and run["loaded"]
    assert applied["moved"] > 0.1 and applied["frozen"] and applied["resumed"] < 1e-5 * applied["moved"]
