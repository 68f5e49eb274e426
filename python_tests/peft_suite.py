"""Runs PEFT's tests of custom models with LoTR in place of PEFT's methods.

    python python_tests/peft_suite.py [pytest's arguments]

The tests come from the source distribution of the installed version, which is unpacked in
build/peft-<version>. This file is also the pytest plugin that runs them with LoTR. It

    replaces PEFT's tables of cases with ours: TABLES
    keeps only the tests that have a LoTR configuration and are not in LEFT_OUT
    starts cores at random values where PEFT's tests expect an adapter with an effect: STARTED
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before PEFT reads it: tests of the hub are left out
# PEFT's tests compare a forward with the same forward in another batch, or of a reloaded model, to
# 1e-8. Without this setting, MKL's products on AMD's CPUs differ by more, because they depend on
# the batch and on addresses.
os.environ.setdefault("MKL_CBWR", "COMPATIBLE")
import peft

from lotr_ext import peft as ours
from lotr_ext.peft.layer import LoTRPeftAdapter

FOLDER = Path(__file__).resolve().parents[1] / "build" / f"peft-{peft.__version__}"
FILES = ("test_custom_models.py", "test_config.py")
for module in ("datasets", "diffusers"):  # imported by PEFT's tests, and not used by these
    if module not in sys.modules and importlib.util.find_spec(module) is None:
        sys.modules[module] = mock.MagicMock()

# Marks a configuration whose cores start at random values, in a field that LoTR does not use.
STARTED = {"revision": "started"}
CONFIG = ours.LoTRPeftConfig
# PEFT's tests compare to 1e-5 at inputs up to 90. Their learning rates suit a small scaling.
SMALL = {"scaling": 0.2}
CASES = [
    ("names", "MLP", CONFIG, {"target_modules": ["lin0"], **SMALL}),
    ("a regular expression", "MLP", CONFIG, {"target_modules": "lin0", "alpha": 2.0}),
    ("both layers", "MLP", CONFIG, {"target_modules": ["lin0", "lin1"], "rank": (2, 3), **SMALL}),
    (
        "modules_to_save",
        "MLP",
        CONFIG,
        {"target_modules": ["lin0"], "modules_to_save": ["lin1"], **SMALL},
    ),
    (
        "by width",
        "MLP",
        CONFIG,
        {"target_modules": ["lin0", "lin1"], "group_by": "width", "rank": 2, **SMALL},
    ),
    (
        "diagonal cores",
        "MLP",
        CONFIG,
        {"target_modules": ["lin0", "lin1"], "core": "diagonal", "rank": 2, **SMALL},
    ),
    ("Conv1D", "EmbConv1D", CONFIG, {"target_modules": ["conv1d"], "rank": 2, **SMALL}),
]
ON_LIN0 = {"target_modules": ["lin0"], **SMALL, **STARTED}
TABLES = {
    "test_name, model_id, config_cls, config_kwargs": CASES,
    "config_cls": [CONFIG],
    "config_class, mandatory_kwargs": [(CONFIG, {})],
    "test_name, tuner_method, config_cls, config_kwargs_1, config_kwargs_2": [
        ("LoTR Same", "lotr", CONFIG, ON_LIN0, ON_LIN0),
        ("LoTR Different", "lotr", CONFIG, ON_LIN0, {**ON_LIN0, "target_modules": ["lin1"]}),
    ],
    "test_name, config0, config1": [("LoTR mixed", CONFIG(**ON_LIN0), CONFIG(rank=3, **ON_LIN0))],
}
# PEFT's tests that are left out, with the reason.
LEFT_OUT = {
    "test_mixed_adapter_batches_unsupported_layer_raises": "refuses layers that LoTR does not have",
    "test_mixed_adapter_batches_mha_raises": "refuses layers that LoTR does not have",
    "test_mixed_adapter_batches_length_mismatch_raises": "another wording; bad_calls.py has it",
    "test_mixed_adapter_batches_training_mode_raises": "another wording; bad_calls.py has it",
    "test_mixed_adapter_batches_merged_raises": "another wording; bad_calls.py has it",
    "test_from_pretrained": "reads the hub",
    "test_from_pretrained_cache_dir": "reads the hub",
    "test_save_pretrained_with_runtime_config": "reads the hub",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keeps the tests that have a LoTR configuration."""

    def is_ours(item: pytest.Item) -> bool:
        values = item.callspec.params.values() if hasattr(item, "callspec") else ()
        return any(value is CONFIG or isinstance(value, CONFIG) for value in values)

    items[:] = [item for item in items if is_ours(item) and item.originalname not in LEFT_OUT]


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marks = metafunc.definition.own_markers
    for i, mark in enumerate(marks):
        if mark.name == "parametrize" and mark.args[0] in TABLES:
            marks[i] = pytest.mark.parametrize(mark.args[0], TABLES[mark.args[0]]).mark


def pytest_collectstart(collector: pytest.Collector) -> None:
    module = getattr(collector, "obj", None)
    if hasattr(module, "set_init_weights_false"):
        module.set_init_weights_false = lambda config_cls, settings: {**settings, **STARTED}


def pytest_configure() -> None:
    init = LoTRPeftAdapter.__init__

    def started(
        self: LoTRPeftAdapter,
        factors: Any,
        config: ours.LoTRPeftConfig,
        form: torch.nn.Module | None = None,
    ) -> None:
        init(self, factors, config, form)
        is_started = config.revision == STARTED["revision"]
        for part, parameter in self.parts():
            if is_started and part == "core" and not parameter.is_meta:
                torch.nn.init.normal_(parameter, std=0.3)

    LoTRPeftAdapter.__init__ = started


def tests() -> Path:
    """Returns the folder of PEFT's tests, which are downloaded once."""
    folder = FOLDER / FOLDER.name / "tests"
    if not (folder / "__init__.py").exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        options = ["--no-deps", "--no-build-isolation", "--no-binary", "peft"]
        subprocess.run(
            [sys.executable, "-m", "pip", "download", *options, f"peft=={peft.__version__}"],
            check=True,
            cwd=FOLDER,
        )
        shutil.unpack_archive(FOLDER / f"{FOLDER.name}.tar.gz", FOLDER, filter="data")
        (folder / "__init__.py").touch()  # the tests import each other
    return folder


if __name__ == "__main__":
    files = [str(tests() / name) for name in FILES]
    (FOLDER / "pytest.ini").write_text("[pytest]\n")
    options = ["-c", str(FOLDER / "pytest.ini"), "-p", "peft_suite", "-q"]
    sys.exit(pytest.main([*files, *options, *sys.argv[1:]]))
