"""Checkpoints of transformers' Trainer that contain only the adapter."""

from pathlib import Path

import torch
import transformers
import zoo
from models import same, started, trained_values

from lotr_ext import load_adapter
from lotr_ext.trainer import AdapterCheckpoints


class AdapterTrainer(AdapterCheckpoints, transformers.Trainer):
    pass


def trainer(folder: Path, **settings: object) -> AdapterTrainer:
    rows = torch.randint(0, 20, (32, 6), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in rows]
    options = {
        "max_steps": 4,
        "save_steps": 2,
        "learning_rate": 0.01,
        "per_device_train_batch_size": 4,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    arguments = transformers.TrainingArguments(str(folder), **{**options, **settings})
    model = started("llama", modules_to_save=["lm_head"])
    return AdapterTrainer(model, arguments, train_dataset=data, eval_dataset=data)


def test_a_run_that_is_resumed_equals_one_that_is_not(tmp_path: Path) -> None:
    run = trainer(tmp_path / "one")
    start = trained_values(run.model)
    run.train()
    expected = trained_values(run.model)
    assert not same(start, expected)
    checkpoint = tmp_path / "one" / "checkpoint-2"
    files = {path.name for path in checkpoint.iterdir()}
    assert {"lotr_adapter.safetensors", "optimizer.pt"} <= files
    assert "model.safetensors" not in files

    trainer(tmp_path / "two").train(resume_from_checkpoint=str(checkpoint))
    loaded = load_adapter(zoo.net("llama"), tmp_path / "two" / "checkpoint-4")
    assert same(trained_values(loaded), expected)


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path: Path) -> None:
    run = trainer(
        tmp_path,
        load_best_model_at_end=True,
        eval_strategy="steps",
        eval_steps=2,
        greater_is_better=True,  # the loss falls, so the first checkpoint is the best one
    )
    run.train()
    best = Path(run.state.best_model_checkpoint)
    assert best.name == "checkpoint-2"
    run.save_model(str(tmp_path / "end"))
    for folder in (best, tmp_path / "end"):
        loaded = load_adapter(zoo.net("llama"), folder)
        assert same(trained_values(run.model), trained_values(loaded))
