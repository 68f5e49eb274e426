"""A callback for transformers' Trainer: the adapter in each checkpoint, and out of it again on resuming.

    trainer = Trainer(model, arguments, callbacks=[AdapterCheckpoint()], ...)

Trainer's own checkpoints hold the adapter among all weights, under the names that the model has on the Hub. Where these are
not the names of its modules (ViT in transformers 5), resuming finds no core in the file, warns, and goes on without. With this
callback the adapter is saved and loaded by its own names, and is there in each checkpoint, small, to be given away.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..layers.sharded import holds_parts
from .checkpoint import load_adapter, save_adapter, unwrapped

__all__ = ["AdapterCheckpoint"]

FOLDER = "lotr_adapter"


class AdapterCheckpoint(TrainerCallback):
    """Writes `<output_dir>/checkpoint-<step>/lotr_adapter` with each checkpoint and loads it when training resumes from there,
    and that of the best checkpoint at the end with load_best_model_at_end.

    resume_from: the checkpoint that `Trainer.train(resume_from_checkpoint=...)` was given, if it is not in output_dir.

    Raises:
        FileNotFoundError: training resumes from a checkpoint without an adapter. Else as `save_adapter` and `load_adapter`.
    """

    def __init__(self, resume_from: str | PathLike[str] | None = None):
        self.resume_from = None if resume_from is None else Path(resume_from)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module | None = None, **_
    ) -> None:
        """Called in every process once Trainer has written a checkpoint."""
        if state.is_world_process_zero or holds_parts(model):
            save_adapter(unwrapped(model), Path(args.output_dir) / f"checkpoint-{state.global_step}" / FOLDER)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module | None = None, **_
    ) -> None:
        """Called after Trainer has loaded what it resumes from."""
        if state.global_step:
            self._load(model, self.resume_from or Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module | None = None, **_
    ) -> None:
        """Called after Trainer has loaded the best checkpoint, where it is to."""
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load(model, Path(state.best_model_checkpoint))

    @staticmethod
    def _load(model: nn.Module, checkpoint: Path) -> None:
        if not (checkpoint / FOLDER).is_dir():
            raise FileNotFoundError(
                f"{checkpoint}: expected a folder {FOLDER}, as AdapterCheckpoint writes it, got none; with a checkpoint "
                "elsewhere than in output_dir give resume_from"
            )
        load_adapter(model, checkpoint / FOLDER)
