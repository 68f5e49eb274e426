"""Fine-tuning by TRL's SFTTrainer on a tiny random model, in one process. Run by test_trl.py."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import lotr_ext.interop.peft as lotr_peft
from lotr_ext import LoTRConfig, apply_lotr, load_adapter, parameter_groups
from lotr_ext.interop.trainer import AdapterCheckpoint

WORDS = "a b c d e f g h i j k l".split()
TARGETS = ["q_proj", "v_proj", "down_proj"]
STEPS = 12


def tiny() -> nn.Module:
    """The same weights each time."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "initializer_range": 0.3,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=16, num_key_value_heads=2, max_position_embeddings=32, **sizes))


def tokenizer() -> PreTrainedTokenizerFast:
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*special, *WORDS])}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), special))
    return PreTrainedTokenizerFast(tokenizer_object=words, **names)


def trainer(model: nn.Module, folder: Path, **further) -> SFTTrainer:
    text = [" ".join(WORDS[(i + j) % len(WORDS)] for j in range(8)) for i in range(24)]
    settings = SFTConfig(
        output_dir=str(folder), max_steps=STEPS, save_steps=STEPS // 2, per_device_train_batch_size=4, learning_rate=0.1,
        logging_steps=1, report_to=[], use_cpu=True, bf16=False, disable_tqdm=True,
    )  # fmt: skip
    return SFTTrainer(model, settings, train_dataset=Dataset.from_dict({"text": text}), processing_class=tokenizer(), **further)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(4, 16).unsqueeze(0)).logits


def losses(one: SFTTrainer) -> list[float]:
    return [entry["loss"] for entry in one.state.log_history if "loss" in entry]


def applied(rank: int, folder: Path) -> dict:
    """A model of apply_lotr: trained, saved at each checkpoint, gone on with from the first one, loaded."""
    make = lambda: apply_lotr(tiny(), LoTRConfig(rank=4, target_modules=TARGETS))  # noqa: E731
    first = trainer(make(), folder / "applied", callbacks=[AdapterCheckpoint()])
    first.train()
    want, checkpoints = logits(first.model), [folder / "applied" / f"checkpoint-{step}" for step in (STEPS // 2, STEPS)]
    loaded = load_adapter(tiny(), checkpoints[1] / "lotr_adapter")
    again = trainer(make(), folder / "again", callbacks=[AdapterCheckpoint(resume_from=checkpoints[0])])
    again.train(resume_from_checkpoint=str(checkpoints[0]))
    grouped = make()
    optimizer = torch.optim.AdamW(parameter_groups(grouped, core_lr=0.1, factor_lr=0.05))
    with_rates = trainer(grouped, folder / "groups", optimizers=(optimizer, None))
    seen: list[list[float]] = []
    optimizer.register_step_pre_hook(lambda one, args, kwargs: seen.append([g["lr"] for g in one.param_groups]))
    with_rates.train()
    frozen = {n: p for n, p in tiny().named_parameters() if n.split(".")[-2] not in TARGETS}
    same = all(torch.equal(p, dict(first.model.named_parameters())[n]) for n, p in frozen.items())
    return {
        "losses": losses(first),
        "loaded": torch.equal(logits(loaded), want),
        "resumed": float((logits(again.model) - want).abs().max()),
        "moved": float((want - logits(tiny())).abs().max()),
        "frozen": same,
        "grouped losses": losses(with_rates),
        "rates": seen,
    }


def through_peft(rank: int, folder: Path) -> dict:
    """A LoTRPeftConfig given to the trainer."""
    config = lotr_peft.LoTRPeftConfig(rank=4, target_modules=TARGETS, task_type="CAUSAL_LM")
    first = trainer(tiny(), folder / "peft", peft_config=config)
    first.train()
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = PeftModel.from_pretrained(tiny(), folder / "peft" / f"checkpoint-{STEPS}")
    return {"losses": losses(first), "loaded": torch.equal(logits(loaded), logits(first.model))}
