"""Private training of cores by Opacus: the steps of the same function under Opacus' own hooks, and of a loop."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from beside import needs, values_of

pytestmark = pytest.mark.slow


@needs("opacus")
def test_private_steps_are_those_of_opacus_and_of_a_loop(tmp_path: Path) -> None:
    checks = [f"opacus_checks:{name}" for name in ("as_opacus", "as_by_hand", "refused", "evaluated", "as_documented")]
    (as_opacus,), (by_hand,), (refused,), (evaluated,), (documented,) = values_of(checks, tmp_path).values()
    for run in as_opacus.values():
        mine, theirs = run["epsilon"]
        assert run["difference"] < 1e-9 and run["moved"] > 0.1 and mine == theirs > 0, as_opacus
    assert as_opacus["empty batches"]["smallest"] == 0 and as_opacus["virtual steps"]["largest"] == 3
    for run in by_hand.values():
        assert run["difference"] < 1e-5 * run["moved"], by_hand  # Opacus divides by the norm + 1e-6
    for name, words in (
        ("factors", r"model: expected frozen factors, got a trained one, 'lotr_factors\..*LoTRConfig\(train=\[\"core\"\]\)"),
        ("frozen", "model: expected cores that require grad, got a frozen one in 'second'"),
        ("computed", "model: expected cores that are parameters, got a computed one in 'first'"),
        ("beside", "model: expected trained parameters in modules without adapted layers, got 'shift' in 'the model'"),
        ("experts", "model: expected adapted linear layers, got experts in "),
        ("plain", "model: expected one with a LoTR adapter"),
        ("mode", "grad_sample_mode: expected 'hooks' and a model that is wrapped, got 'ghost'"),
        ("unwrapped", "grad_sample_mode: expected 'hooks' .* wrap_model=False"),
        ("twice", r"backward: expected optimizer.step\(\) and zero_grad\(\) after each"),
        ("flat", "x: expected a row for each of 40 examples in every adapted layer, got 120 rows"),
    ):
        assert re.search(words, refused[name]), refused[name]
    assert 2 < documented[0] < 3.01 and documented[1] > 0
    assert evaluated == {"same": True, "back": True, "left": False}


@needs("opacus")
def test_two_processes_take_the_step_of_the_whole_batch(tmp_path: Path) -> None:
    (found,) = values_of(["opacus_checks:in_two_processes"], tmp_path, world=2).values()
    assert all(one["difference"] < 1e-12 < one["moved"] for one in found) and found[0]["values"] == found[1]["values"]
