"""examples/peft_method_comparison: its configurations train as many numbers as it says, and it runs PEFT's script."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples" / "peft_method_comparison"
COUNTS = {"llama-3.2-3B-cores-rank8": 3_584, "llama-3.2-3B-width-rank16": 129_024, "llama-3.2-3B-cores-rank64": 229_376}
FRAMEWORKS = Path(sys.prefix) / "frameworks"
PACKAGES = str(FRAMEWORKS)

# In the place of their run.py: what it asks of a method, on a model of its own.
TRAINS = """
from peft import PeftConfig, get_peft_model
from torch import nn

class Net(nn.Module):
    prepare_inputs_for_generation = None
    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 4)

assert json.loads((Path(sys.argv[-1]) / "training_params.json").read_text())["optimizer_kwargs"]["lr"] > 0
numbers = get_peft_model(Net(), PeftConfig.from_pretrained(sys.argv[-1])).get_nb_trainable_parameters()[0]
"""
WRITES = """
folder, name = Path(__file__).parent / "temporary_results", sys.argv[-1].partition("/")[2]
folder.mkdir(exist_ok=True)
metrics = [{"test accuracy": 0.25, "forgetting": 0.5}]
info = {"status": status, "metrics": metrics, "num_trainable_params": numbers}
info |= {"accelerator_memory_max": 2**30, "train_time": 60.0}
about = {"created_at": "2026-11-28T00:00", "experiment_name": name, "error_msg": "no memory"}
(folder / f"{name.replace('/', '--')}--now.json").write_text(json.dumps({"run_info": about, "train_info": info}))
"""
SCRIPT = "import json, sys\nfrom pathlib import Path\n"


def run(*arguments: str, cwd: Path, frameworks: bool = False) -> subprocess.CompletedProcess:
    paths = os.pathsep.join([str(ROOT), *([PACKAGES] if frameworks else [])])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(FOLDER / "run.py"), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)


def clone(folder: Path, script: str) -> Path:
    theirs = folder / "peft" / "method_comparison" / "MetaMathQA"
    (theirs / "results").mkdir(parents=True)
    (theirs / "run.py").write_text(script)
    return folder / "peft"


@pytest.mark.parametrize("experiment", COUNTS)
def test_each_configuration_trains_as_many_numbers_as_its_rival(experiment: str) -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    import torch

    import lotr_ext.interop.peft  # noqa: F401

    sizes = {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "vocab_size": 128256}
    heads = {"num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128}
    config = transformers.LlamaConfig(**sizes, **heads, tie_word_embeddings=True)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
        adapted = peft.get_peft_model(model, peft.PeftConfig.from_pretrained(str(FOLDER / "experiments" / "lotr" / experiment)))
    assert adapted.get_nb_trainable_parameters()[0] == COUNTS[experiment]


def test_every_configuration_is_one_that_can_be_written_today() -> None:
    """Their script reads it with PEFT, which ignores fields that it does not know."""
    pytest.importorskip("peft")
    from lotr_ext.interop.peft import LoTRPeftConfig

    folders = sorted((FOLDER / "experiments" / "lotr").iterdir())
    assert [folder.name for folder in folders] == sorted(COUNTS)
    for folder in folders:
        kept = json.loads((folder / "adapter_config.json").read_text())
        assert set(kept) == set(LoTRPeftConfig().to_dict()) | {"auto_mapping"}
        assert kept["peft_type"] == "LOTR" and set(json.loads((folder / "training_params.json").read_text())) == {
            "optimizer_kwargs"
        }


@pytest.mark.slow
def test_their_script_runs_with_our_method_and_its_result_is_kept(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    peft = clone(tmp_path, f"{SCRIPT}{TRAINS}status = 'success'{WRITES}")
    result = run("--peft", str(peft), "llama-3.2-3B-cores-rank8", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    kept = tmp_path / "peft_comparison" / "lotr--llama-3.2-3B-cores-rank8.json"
    assert json.loads(kept.read_text())["train_info"]["num_trainable_params"] == 2 * 8 * 8
    # 1.96 sqrt(0.25 0.75 / 1319) = 0.0234
    assert "| lotr llama-3.2-3B-cores-rank8 | 128 | 25.0 ± 2.3 | 0.50 | 1.0 | 1 | 2026-11-28 |" in result.stdout
    assert not list((peft / "method_comparison" / "MetaMathQA" / "temporary_results").iterdir())


@pytest.mark.slow
def test_a_run_of_theirs_that_was_cancelled_is_named(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    peft = clone(tmp_path, f"{SCRIPT}numbers, status = 1, 'canceled'{WRITES}")
    result = run("--peft", str(peft), "llama-3.2-3B-cores-rank8", cwd=tmp_path)
    assert result.returncode == 1 and "llama-3.2-3B-cores-rank8: canceled: no memory" in result.stderr


@pytest.mark.parametrize(
    "arguments, text",
    [(["--peft", "."], "git clone https://github.com/huggingface/peft"), (["--peft", ".", "lora"], "got lora"), ([], "--peft")],
)
def test_bad_input(tmp_path: Path, arguments: list[str], text: str) -> None:
    result = run(*arguments, cwd=tmp_path)
    assert result.returncode == 2 and text in result.stderr and "Traceback" not in result.stderr


@pytest.mark.skipif("LOTR_PEFT_CLONE" not in os.environ, reason="LOTR_PEFT_CLONE names no clone of github.com/huggingface/peft")
@pytest.mark.skipif(not (FRAMEWORKS / "datasets").is_dir(), reason="datasets is missing: run make setup")
def test_the_whole_way_with_their_script_on_a_tiny_model(tmp_path: Path) -> None:
    peft = os.environ["LOTR_PEFT_CLONE"]
    result = run("--peft", peft, "--try", cwd=tmp_path, frameworks=True)
    assert result.returncode == 0, result.stderr
    kept = {path.name: json.loads(path.read_text()) for path in (tmp_path / "peft_comparison").iterdir()}
    assert set(kept) == {f"try--lotr--{name}.json" for name in COUNTS}
    for one in kept.values():
        assert [metrics["step"] for metrics in one["train_info"]["metrics"]] == [2, 4, 4]
        assert one["run_info"]["peft_config"]["peft_type"] == "LOTR" and one["train_info"]["num_trainable_params"] > 0
