"""PEFT's habits: `r`, LoRA's other names, target_modules as a string or None, and a folder loaded without the import."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from peft_toys import LoTRPeftConfig, base, config, peft
from toys import assert_unchanged, refused, snapshot, toy

from lotr_ext import LoTRConfig


def test_r_is_another_name_for_rank(tmp_path: Path) -> None:
    for rank in (8, (3, 5)):
        for given in ({"r": rank}, {"rank": rank}, {"r": rank, "rank": rank}):
            found = LoTRPeftConfig(**given, target_modules=["q"])
            assert found.r == found.rank == rank == found.to_lotr().rank
            found.save_pretrained(tmp_path)
            again = peft.PeftConfig.from_pretrained(tmp_path)
            assert again.r == again.rank == rank and again.to_dict() == found.to_dict()
    assert LoTRPeftConfig().rank == LoTRPeftConfig().r == LoTRConfig().rank
    with pytest.raises(ValueError, match=r"r: expected rank = 4, or one of them alone, got 8"):
        LoTRPeftConfig(r=8, rank=4)
    with pytest.raises(ValueError, match="rank: expected at least 1, got 0"):
        LoTRPeftConfig(r=0)
    assert peft.get_peft_model(base(), LoTRPeftConfig(r=3, target_modules=["q"])).peft_config["default"].rank == 3


LORAS = {"lora_alpha": "'alpha'", "lora_dropout": "'dropout'", "use_rslora": "'rslora'", "init_lora_weights": "'init'"}
NOT_HERE = ("rank_pattern", "alpha_pattern", "lora_bias", "trainable_token_indices")


@pytest.mark.parametrize("kind", [LoTRPeftConfig, LoTRConfig])
def test_loras_names_are_refused_with_ours(kind: type) -> None:
    also = {} if kind is LoTRPeftConfig else {"r": "'rank'", "use_dora": "'magnitude'"}  # which LoTRPeftConfig takes
    for name, ours in (LORAS | also).items():
        with pytest.raises(TypeError, match=rf"{name}: expected a field of {kind.__name__}, got LoRA's name .*{ours}"):
            kind(**{name: 1})
    for name in NOT_HERE:
        with pytest.raises(TypeError, match=rf"{name}: expected a field of {kind.__name__}, got one that only LoRA has"):
            kind(**{name: {}})
    with pytest.raises(TypeError, match="nonsense"):
        kind(nonsense=1)


def test_configurations_are_copied_and_pickled() -> None:
    for one in (LoTRConfig(rank=3, alpha=6), LoTRPeftConfig(r=3, alpha=6)):
        assert copy.deepcopy(one) == pickle.loads(pickle.dumps(one)) == replace(one, alpha=6) == one
    with pytest.raises(ValueError, match=r"config: expected fields among .*got r \(r is rank here\)"):
        LoTRConfig.from_dict({"r": 4})


def test_target_modules_as_a_string_or_none() -> None:
    model = base()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"got 'q', which matches none; a string is a regular expression.* give \['q'\]"):
        peft.get_peft_model(model, config(target_modules="q"))
    model.config = {"model_type": "toys"}
    with pytest.raises(ValueError, match=r"target_modules: expected names .*got None for a model of type 'toys'"):
        peft.get_peft_model(model, config(target_modules=None))
    del model.config
    assert_unchanged(model, before)


@pytest.mark.parametrize("name", ["training", "_modules", "keys"])
def test_adapter_names_that_modules_use_themselves(name: str) -> None:
    model = toy()
    with refused(model, ValueError, match="adapter_name: expected a name"):
        peft.get_peft_model(model, config(), adapter_name=name)


def test_the_model_card_says_what_to_import(tmp_path: Path) -> None:
    model = peft.get_peft_model(base(), config())
    model.add_adapter("other", config(target_modules=["up"]))
    for _ in range(2):  # once, however often it is saved
        model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert card.count("import lotr_ext.interop.peft") == card.count("KeyError: 'LOTR'") == 1 and card.startswith("---")
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "README.md").write_text("mine")
    config().save_pretrained(tmp_path / "project" / "adapter")
    assert (tmp_path / "project" / "README.md").read_text() == "mine"

    code = "import sys, peft\npeft.PeftConfig.from_pretrained(sys.argv[1])"
    imports = next(line for line in card.splitlines() if line.startswith("import"))
    root = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", f"{imports}\n{code}", str(tmp_path)], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
