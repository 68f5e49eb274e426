"""DeepSpeed's ZeRO in two processes, and TRL's SFTTrainer.

`make frameworks` installs both, next to the packages of .venv.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from distributed import CHECKS
from test_distributed import run_in_two_processes

FRAMEWORKS = Path(sys.prefix) / "frameworks"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (FRAMEWORKS / "deepspeed").is_dir(), reason="needs DeepSpeed and TRL: make frameworks"
    ),
]
ZERO = [name for name in CHECKS if name.startswith("zero")]


@pytest.fixture(scope="module", autouse=True)
def _frameworks_last_on_the_path() -> Any:
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [before, str(FRAMEWORKS)]))
    yield
    os.environ["PYTHONPATH"] = before


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_in_two_processes(ZERO, tmp_path_factory.mktemp("zero") / "results.json")


@pytest.mark.parametrize("name", ZERO)
def test_zero_equals_one_process(results: dict[str, Any], name: str) -> None:
    assert isinstance(results[name], float), results[name]
    assert results[name] < 1e-4  # float32


TRL = """
import sys, torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer
from zoo import net
import lotr_ext
from lotr_ext.peft import LoTRPeftConfig

words = "a b c d e f g h i j k l".split()
special = ["<pad>", "<s>", "</s>", "<unk>"]
ids = {word: i for i, word in enumerate([*special, *words])}
word_level = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
word_level.pre_tokenizer = pre_tokenizers.Whitespace()
names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), special))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=word_level, **names)
text = [" ".join(words[(i + j) % len(words)] for j in range(8)) for i in range(24)]
settings = SFTConfig(
    output_dir=sys.argv[1], max_steps=20, per_device_train_batch_size=4, learning_rate=0.01,
    logging_steps=1, report_to=[], use_cpu=True, bf16=False, disable_tqdm=True, save_strategy="no",
)
targets = ["q_proj", "v_proj", "down_proj"]
model = net("llama").float()
options = {}
torch.manual_seed(0)  # for the factors; the net does not use it
if sys.argv[2] == "peft":
    options["peft_config"] = LoTRPeftConfig(rank=4, target_modules=targets)
else:
    lotr_ext.apply_lotr(model, lotr_ext.LoTRConfig(rank=4, target_modules=targets))
data = Dataset.from_dict({"text": text})
trainer = SFTTrainer(model, settings, train_dataset=data, processing_class=tokenizer, **options)
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
assert losses[-1] < 0.8 * losses[0], losses
trained = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
assert trained and all("lotr" in name or "core" in name for name in trained), trained
"""


@pytest.mark.parametrize("entry", ["peft", "apply_lotr"])
def test_trl_trains_the_adapter(entry: str, tmp_path: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-c", TRL, str(tmp_path), entry],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert process.returncode == 0, process.stderr[-3000:]
