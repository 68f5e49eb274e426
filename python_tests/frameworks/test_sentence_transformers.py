"""sentence-transformers: an adapted SentenceTransformer is saved, loaded and trained with its adapter."""

from __future__ import annotations

from pathlib import Path

import pytest
from beside import needs, values_of

pytestmark = pytest.mark.slow

CHECKS = ["saved_and_loaded", "other_ways", "trained", "refused"]


@needs("sentence_transformers")
def test_a_sentence_transformer_keeps_its_adapter(tmp_path: Path) -> None:
    found = values_of([f"sentence_checks:{check}" for check in CHECKS], tmp_path)
    assert list(found.values()) == [[True]] * len(CHECKS)
