"""DeepSpeed's ZeRO in two processes, TRL's SFTTrainer, and sentence-transformers.

`make frameworks` installs them, next to the packages of .venv.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from distributed import CHECKS, run_in_two_processes
from helpers import ROOT, run_python

FRAMEWORKS = Path(sys.prefix) / "frameworks"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (FRAMEWORKS / "deepspeed").is_dir(),
        reason="needs DeepSpeed and others: make frameworks",
    ),
]
ZERO = [name for name in CHECKS if name.startswith("zero")]


@pytest.fixture(scope="module", autouse=True)
def _frameworks_last_on_the_path() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{os.environ['PYTHONPATH']}{os.pathsep}{FRAMEWORKS}")
        yield


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run_in_two_processes(ZERO, tmp_path_factory.mktemp("zero") / "results.json")


@pytest.mark.parametrize("name", ZERO)
def test_zero_equals_one_process(errors: dict[str, str], name: str) -> None:
    assert not errors[name], errors[name]


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


SENTENCES = """
import sys
from pathlib import Path
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers import SentenceTransformerTrainingArguments
from sentence_transformers.losses import MultipleNegativesRankingLoss
import numpy as np, torch
from lotr_ext import LoTRConfig, apply_lotr, load_adapter, save_adapter, unload
from lotr_ext.trainer import AdapterCheckpoints

output, base = sys.argv[1:]
words = "boring funny moving slow bright dull".split()
texts = [f"a {word} film, number {i}" for i in range(6) for word in words]
pairs = Dataset.from_dict({"anchor": texts[:18], "positive": texts[18:]})

class Trainer(AdapterCheckpoints, SentenceTransformerTrainer):
    pass

def trained(name, checkpoint=None):
    torch.manual_seed(0)
    config = LoTRConfig(rank=4, exclude_modules=["pooler.dense"])
    model = apply_lotr(SentenceTransformer(base, device="cpu"), config)
    settings = SentenceTransformerTrainingArguments(
        output_dir=f"{output}/{name}", max_steps=4, save_steps=2, per_device_train_batch_size=6,
        learning_rate=1e-3, report_to=[], use_cpu=True, disable_tqdm=True, seed=1,
    )
    loss = MultipleNegativesRankingLoss(model)
    trainer = Trainer(model=model, args=settings, train_dataset=pairs, loss=loss)
    trainer.train(resume_from_checkpoint=checkpoint)
    return model

def close(model, expected):
    np.testing.assert_allclose(model.encode(texts[:3]), expected, atol=1e-5)

original = SentenceTransformer(base, device="cpu").encode(texts[:3])
model = trained("straight")
vectors = model.encode(texts[:3])
assert abs(vectors - original).max() > 1e-3
checkpoint = f"{output}/straight/checkpoint-2"
sizes = [f.stat().st_size for f in Path(checkpoint).rglob("*.safetensors")]
assert sum(sizes) < 2e6, sizes  # the base has 91 MB
close(trained("resumed", checkpoint), vectors)
save_adapter(model, f"{output}/adapter")
loaded = load_adapter(SentenceTransformer(base, device="cpu"), f"{output}/adapter")
close(loaded, vectors)
close(unload(loaded, merge=True), vectors)
"""


def run_program(code: str, *arguments: str) -> None:
    process = run_python("-c", code, *arguments, timeout=600)
    assert process.returncode == 0, process.stderr[-3000:]


@pytest.mark.parametrize("entry", ["peft", "apply_lotr"])
def test_trl_trains_the_adapter(entry: str, tmp_path: Path) -> None:
    run_program(TRL, str(tmp_path), entry)


def test_sentence_transformers_train_resume_and_encode(tmp_path: Path) -> None:
    base = ROOT / "data" / "all-minilm-l6-v2"
    if not base.is_dir():
        pytest.skip(f"{base} is missing: python examples/data.py minilm")
    run_program(SENTENCES, str(tmp_path), str(base))
