"""transformers' Trainer with adapters: checkpoints of only the adapter, or of the whole weights and the adapter.

    trainer = AdapterTrainer(model, arguments, ...)                             # checkpoints without the base model
    trainer = Trainer(model, arguments, callbacks=[AdapterCheckpoint()], ...)   # whole checkpoints, and the adapter in each

Trainer's own checkpoints hold the adapter among all weights, under the names that the model has on the Hub. Where these are
not the names of its modules (ViT in transformers 5), resuming finds no core in the file, warns, and continues without. Both
classes here save and load the adapter by its own names.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME

from .. import files
from ..layers.sharded import holds_parts
from ..model.adapted import adapted_layers
from ..model.adapter_files import describe, serialized
from ..model.loading import load_adapter
from ..model.saving import contents, unwrapped, write_adapter
from ..model.targets import features

__all__ = ["AdapterCheckpoint", "AdapterTrainer"]

REST = "lotr_rest.safetensors"
FOLDER = "lotr_adapter"


class AdapterCheckpoint(TrainerCallback):
    """Writes `<output_dir>/checkpoint-<step>/lotr_adapter` with each checkpoint and loads it when training resumes from there,
    and at the end that of the best checkpoint, with load_best_model_at_end.

    resume_from: the argument of `Trainer.train(resume_from_checkpoint=...)`, if that checkpoint is not in output_dir.

    Raises:
        FileNotFoundError: training resumes from a checkpoint without an adapter. Also as `save_adapter` and `load_adapter`.
    """

    def __init__(self, resume_from: str | PathLike[str] | None = None):
        self.resume_from = None if resume_from is None else Path(resume_from)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module | None = None, **_
    ) -> None:
        """Called in every process after Trainer has written a checkpoint."""
        if (together := holds_parts(model)) or state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}" / FOLDER
            write_adapter(model if together else unwrapped(model), folder)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module | None = None, **_
    ) -> None:
        """Called after Trainer has loaded the checkpoint from which it resumes."""
        if state.global_step:
            self._load(model, self.resume_from or Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module | None = None, **_
    ) -> None:
        """Called after Trainer has loaded the best checkpoint, if it does."""
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


class AdapterTrainer(Trainer):
    """Trainer whose checkpoints and `save_model` contain the adapter and not the base model.

    A checkpoint has the adapter as `save_adapter` writes it, in `lotr_rest.safetensors` what else training changes (other
    trained parameters, and buffers such as BatchNorm's), and Trainer's state of the optimizer, the scheduler and the random
    generators. Training resumes from it exactly, onto a model that was made and adapted as before, and load_best_model_at_end
    works. It also resumes from whole checkpoints. `load_adapter(base, checkpoint)` loads only the adapter.

    For another trainer, inherit from both: `class AdapterSFTTrainer(AdapterTrainer, SFTTrainer): pass`. Under FSDP,
    DeepSpeed and tensor parallelism it writes Trainer's checkpoints of the whole model.

    Raises:
        TypeError, RuntimeError: a model without an adapter. When resuming as `load_adapter`, and ValueError: other
            parameters or buffers than the checkpoint has.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        adapted_layers(unwrapped(self.model))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or holds_parts(self.model):
            super()._save(output_dir, state_dict)
            return
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        write_adapter(self.model, folder)
        _save_rest(self.model, folder)
        tokenizer = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        torch.save(self.args, folder / TRAINING_ARGS_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if (Path(resume_from_checkpoint) / REST).is_file():
            self._load_adapter(Path(resume_from_checkpoint))
        elif model is None:
            super()._load_from_checkpoint(resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        best = Path(self.state.best_model_checkpoint)
        if (best / REST).is_file():
            self._load_adapter(best)
        else:
            super()._load_best_model()

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Trainer uploads output_dir; it copies only files with names that it knows from the checkpoint to it."""
        if (Path(checkpoint_folder) / REST).is_file() and self.is_world_process_zero():
            write_adapter(self.model, self.args.output_dir)
            _save_rest(self.model, Path(self.args.output_dir))
        super()._push_from_checkpoint(checkpoint_folder)

    def _load_adapter(self, folder: Path) -> None:
        tensors = _read_rest(self.model, folder)
        load_adapter(self.model, folder)
        with torch.no_grad():
            for name, tensor in _rest(self.model).items():
                tensor.copy_(tensors[name])


def _rest(model: nn.Module) -> dict[str, Tensor]:
    """The tensors (not copies) that training changes and an adapter's file lacks, by their names in state_dict: other trained
    parameters, and the buffers of all modules but linear layers, whose buffers are quantised weights."""
    seen = {id(tensor) for tensor in contents(unwrapped(model))[1].values()}
    changing = {id(p) for p in model.parameters() if p.requires_grad}
    for module in model.modules():
        if features(module) is None:
            changing |= {id(buffer) for buffer in module.buffers(recurse=False)}
    found: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in changing and id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor
    return found


def _save_rest(model: nn.Module, folder: Path) -> None:
    files.put_file(folder, REST, serialized(_rest(model)))


def _read_rest(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = folder / REST
    try:
        tensors = load(files.read_bytes(path))
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a safetensors file, got something else ({error})") from None
    want = {name: describe(t) for name, t in _rest(model).items()}
    got = {name: describe(t) for name, t in tensors.items()}
    if want != got:
        other = sorted(name for name in want.keys() | got.keys() if want.get(name) != got.get(name))
        raise ValueError(
            f"{path}: expected the model's trained parameters and buffers outside the adapter, got others at "
            f"{', '.join(other[:5])}; make and adapt the model as it was when the checkpoint was written"
        )
    return tensors
