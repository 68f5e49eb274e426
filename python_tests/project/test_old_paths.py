"""Modules of 0.1.0 whose names have another home: they work, and warn."""

from __future__ import annotations

import importlib

import pytest

OLD = {
    "lotr_ext.adapters": ("lotr_ext.model.adapters", ("DEFAULT", "active_adapter", "adapter_names", "add_adapter", "mixed")),
    "lotr_ext.planner": ("lotr_ext.ops.planner", ("STRATEGIES", "Plan", "plan")),
    "lotr_ext.trainer": ("lotr_ext.interop.trainer", ("AdapterCheckpoint", "AdapterTrainer")),
    "lotr_ext.version": ("lotr_ext", ("__version__",)),
}


@pytest.mark.parametrize("path", OLD)
def test_an_old_path_gives_the_very_objects_and_warns(path: str) -> None:
    if path == "lotr_ext.trainer":
        pytest.importorskip("transformers")
    home, names = OLD[path]
    old, new = importlib.import_module(path), importlib.import_module(home)
    for name in names:
        with pytest.warns(DeprecationWarning, match=f"{path}.{name}: import it from {home}"):
            assert getattr(old, name) is getattr(new, name)


FORMS = [
    "from lotr_ext.planner import plan",
    "from lotr_ext import planner; planner.plan",
    "import lotr_ext.planner; lotr_ext.planner.plan",
    "from lotr_ext.adapters import *; add_adapter",
    "from lotr_ext.version import __version__",
]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_import_works(form: str) -> None:
    with pytest.warns(DeprecationWarning, match="import it from"):
        exec(form, {})
