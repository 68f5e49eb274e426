"""TRL's SFTTrainer with adapters of apply_lotr and of PEFT."""

from __future__ import annotations

from pathlib import Path

import pytest
from beside import needs, values_of

pytestmark = pytest.mark.slow


@needs("trl")
def test_sft_trains_checkpoints_resumes_and_loads(tmp_path: Path) -> None:
    found = values_of(["trl_checks:applied", "trl_checks:through_peft"], tmp_path)
    (applied,), (peft,) = found.values()
    for run in (applied, peft):
        assert run["losses"][-1] < 0.9 * run["losses"][0] and run["loaded"]
    rates, grouped = applied["rates"], applied["grouped losses"]
    assert len(rates) == 12 and rates[0] == [0.1, 0.05] and rates[-1][0] < 0.02  # TRL's own schedule
    assert all(abs(cores - 2 * factors) < 1e-9 for cores, factors in rates) and grouped[-1] < 0.9 * grouped[0]
    assert applied["moved"] > 0.1 and applied["frozen"] and applied["resumed"] < 1e-5 * applied["moved"]
