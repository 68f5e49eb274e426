"""Checkpoints of transformers' Trainer that contain only the adapter.

    class AdapterTrainer(AdapterCheckpoints, Trainer): ...

A checkpoint of the Trainer has all weights of the model, hundreds of times the size of the adapter.
"""

from typing import Any

from torch import nn

from .sharded import load_adapter, save_adapter

__all__ = ["AdapterCheckpoints"]


class AdapterCheckpoints:
    """Mixin for transformers.Trainer and its subclasses, such as TRL's. Place it first.

    `save_model` and each checkpoint write the adapter and modules_to_save as `save_adapter` does,
    next to the optimizer's state. Resuming and load_best_model_at_end load them. The model must be
    adapted before it is given to the trainer. With FSDP and DeepSpeed, accelerate writes all
    weights next to the optimizer's state.
    """

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the adapter. All processes call it, and one writes."""
        folder = output_dir or self.args.output_dir
        save_adapter(self.model_wrapped, folder)
        if self.processing_class is not None and self.args.should_save:
            self.processing_class.save_pretrained(folder)

    # Private methods of the Trainer: it has no public ones for what a checkpoint loads.

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        load_adapter(model or self.model, resume_from_checkpoint)

    def _load_best_model(self, *args: Any) -> None:
        load_adapter(self.model, self.state.best_model_checkpoint)
