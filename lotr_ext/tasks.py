"""Many tasks over one model: a `TaskBank` holds them, `use_tasks` selects one per row or token.

    y_i = x_i W^T + bias + s ((x_i A) G_task(i)) B^T

The tasks share A and B. A task is one core [r_in, r_out] per layer, and nothing else. A bank has
one parameter [tasks, r_in, r_out] per layer, and a forward computes rows of any tasks together.

    use_tasks(model, index)       opens a request (core/request.py): a `_ModelTasks` for the model,
                                  a `_LayerTasks` per adapted layer
    the model's forward           stores which columns of the index it runs (`_before_forward`)
    each adapted layer's forward  reads its cores of all tasks and the task of each row

Not here: the file of a task (task_files.py), how a layer computes rows with different cores
(core/nodes.py), and tasks in vLLM (vllm/).
"""

import inspect
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .adapted import Attachment, Model, adapted_layers, attach, layers_in, unmerged_layers
from .checks import check_dimension, check_index
from .core._torch_private import current_backward
from .core.request import current_request, open_request, state_of
from .first_step import watch
from .layers import LoTRLayer
from .storage import FilePath, put_tensors
from .task_files import TaskFormat

Source = Mapping[str, Tensor] | FilePath  # the cores of a task, or its file

# One lock for all banks. A bank with a lock could not be copied or pickled.
_change_lock = threading.RLock()


# ---- the bank ------------------------------------------------------------------------------------


class TaskBank(Attachment):
    """Slots for the tasks of an adapted model. It is registered as `model.lotr_tasks`.

    `use_tasks(model, index)` then runs batches in which row i is of task index[i].

    Tasks may be added and removed in any thread between two forwards. A backward raises if a task
    was changed since its forward, as after any in-place write. `del model.lotr_tasks` removes the
    bank (from a container such as nn.Sequential, when it is called next).

    Args:
        model: An adapted model.
        tasks: The number of slots.

    Attributes:
        cores: One parameter [tasks, r_in, r_out] (experts: [tasks, e, r_in, r_out]) per adapted
            layer, with the dtype and device of the layer's core. Frozen until `requires_grad_()` is
            called.
        taken: Which slots hold a task [tasks] (bool). A free slot is zero.

    Raises:
        TypeError: If tasks is not an int.
        ValueError: If tasks is below 1, or if the adapter has init "svd".
        RuntimeError: If the model has no adapter, or has a bank already.
    """

    def __init__(self, model: nn.Module, tasks: int):
        super().__init__()
        self._hooks: list[RemovableHandle] = []  # first: `__del__` runs after an error below, too
        layers = adapted_layers(model)
        if hasattr(model, "lotr_tasks"):
            raise RuntimeError(
                "TaskBank: expected a model without a bank, got one with a bank. Remove it first: "
                "del model.lotr_tasks."
            )
        check_dimension("tasks", tasks)
        for name, layer in layers.items():
            if layer.start_core is not None:
                raise ValueError(
                    f'TaskBank: expected an adapter without init "svd", got one in {name!r}. "svd" '
                    f"moves a part of the base weights into the adapter, so rows without a task "
                    f"would not be the base model's."
                )
        cores = [layer.core.detach() for layer in layers.values()]
        self.cores = nn.ParameterList(
            nn.Parameter(core.new_zeros(tasks, *core.shape), requires_grad=False) for core in cores
        )
        # On the CPU, where an index is checked without waiting for a GPU.
        self.register_buffer("taken", torch.zeros(tasks, dtype=torch.bool, device="cpu"))
        # In a dictionary, so that they are not registered twice: the model has registered them.
        self._layers = layers
        # A model that was built by hand has no configuration.
        self._group_by = getattr(getattr(model, "lotr_config", None), "group_by", "shape")
        attach(model, "lotr_tasks", self)
        self._add_hooks(model)
        watch(model)

    def _add_hooks(self, model: nn.Module) -> None:
        # A set, because two adapters of experts have one host, which is called.
        for module in {layer.called_module() for layer in self._layers.values()}:
            self._hooks.append(module.register_forward_pre_hook(_refuse_without_request))
        self._hooks += [
            model.register_forward_pre_hook(_before_forward, with_kwargs=True),
            model.register_forward_hook(_after_forward, always_call=True),
            # With the list of hooks, because a hook that refers to the bank would keep it alive.
            # Last, because torch also calls hooks that were removed during the same call, but
            # without kwargs.
            model.register_forward_pre_hook(partial(_remove_without_bank, self._hooks)),
        ]

    def on_detach(self) -> None:
        """Removes the bank's hooks from the model."""
        for hook in self._hooks:
            hook.remove()

    def __del__(self) -> None:
        # `del model.lotr_tasks` calls this, unless something else refers to the bank: then the
        # next forward removes the hooks (`_remove_without_bank`).
        self.on_detach()

    def __len__(self) -> int:
        return int(self.taken.sum())

    # ---- tasks -----------------------------------------------------------------------------------

    def add(self, source: Source | None = None) -> int:
        """Adds a task in the first free slot.

        Args:
            source: The cores of the task [r_in, r_out] (experts: [e, r_in, r_out]) by
                `<layer>.core`, or a file that `save` wrote. None adds a task with zero cores, which
                equals the base model.

        Returns:
            The task's slot, which is its number in an index.

        Raises:
            RuntimeError: If no slot is free, or if a core is sparse or on the meta device.
            TypeError, ValueError: If source is not a task of this adapter: other layers, ranks,
                scalings or factors. The bank is then unchanged.
        """
        # Outside of the lock, because reading a file takes longer than all else.
        cores = self._checked_cores(source)
        with _change_lock:
            free = (~self.taken).nonzero()
            if not len(free):
                raise RuntimeError(
                    f"add: expected a free slot, got {len(self.taken)} that are all taken. Remove "
                    f"a task, or make a larger bank."
                )
            slot = int(free[0])
            self._write(slot, cores, taken=True)
        return slot

    def replace(self, task: int, source: Source | None) -> None:
        """Replaces a task by another one. source is as for `add`, as are the errors.

        Raises:
            ValueError: If there is no such task.
        """
        cores = self._checked_cores(source)
        with _change_lock:
            self._write(self._slot(task), cores, taken=True)

    def remove(self, task: int) -> None:
        """Removes a task. Its slot becomes zero and free.

        Raises:
            ValueError: If there is no such task.
        """
        with _change_lock:
            self._write(self._slot(task), self._checked_cores(None), taken=False)

    def cores_of(self, task: int) -> dict[str, Tensor]:
        """Returns the cores of a task by `<layer>.core`, as views of the bank.

        Raises:
            ValueError: If there is no such task.
        """
        slot = self._slot(task)
        return {
            f"{name}.core": cores.detach()[slot] for name, cores in zip(self._layers, self.cores)
        }

    def save(self, task: int, path: FilePath) -> None:
        """Writes a task into a safetensors file, atomically.

        Raises:
            TypeError, ValueError: If path is not a path, or there is no such task.
            OSError: If the file cannot be written.
        """
        # No other thread may change the task while it is written.
        with _change_lock:
            put_tensors(Path(path), self.cores_of(task), self._format().metadata())

    # ---- slots and cores -------------------------------------------------------------------------

    def _slot(self, task: object) -> int:
        if task not in self.taken.nonzero().flatten().tolist():
            raise ValueError(f"task: expected a task of the bank, as add returned it, got {task!r}")
        # A bool would index all slots, although it equals 0 or 1.
        return int(task)

    @torch.no_grad()
    def _write(self, slot: int, cores: Sequence[Tensor], *, taken: bool) -> None:
        """Writes the cores of a task into a slot, and sets the gradient of the slot to zero."""
        for parameter, core in zip(self.cores, cores, strict=True):
            parameter[slot].copy_(core)
            if parameter.grad is not None:
                # The gradient of the task that was there would move this one, and would count in a
                # norm of gradients.
                parameter.grad[slot].zero_()
        self.taken[slot] = taken

    @torch.no_grad()
    def _checked_cores(self, source: Source | None) -> list[Tensor]:
        """Returns the cores of a task in the order of the layers, checked."""
        if source is None:
            return [torch.zeros_like(cores[0]) for cores in self.cores]
        task_format = self._format()
        if isinstance(source, Mapping):
            tensors = source
            task_format.check(tensors, "source")
        else:
            tensors = task_format.read(Path(source), "source")
        # Copies, so that torch refuses a core that is sparse or on the meta device before any core
        # is written.
        return [
            torch.empty_like(cores[0]).copy_(tensors[name])
            for name, cores in zip(task_format.shapes, self.cores)
        ]

    def _format(self) -> TaskFormat:
        """Returns what a task of the adapter consists of, with the current values of A and B."""
        pairs = {name: layer.factors for name, layer in self._layers.items()}
        factors = {factor for pair in pairs.values() for factor in (pair.A, pair.B)}
        # Each is read once, because a parametrized value is a new tensor each time.
        values = {factor: factor.value for factor in factors}
        return TaskFormat(
            shapes={
                f"{name}.core": tuple(cores.shape[1:])
                for name, cores in zip(self._layers, self.cores)
            },
            scalings=tuple(float(layer.scaling) for layer in self._layers.values()),
            pairs={name: (values[pair.A], values[pair.B]) for name, pair in pairs.items()},
            group_by=self._group_by,
        )


# ---- requests ------------------------------------------------------------------------------------


@contextmanager
def use_tasks(model: Model, index: Tensor, *, flat: bool = False) -> Iterator[Model]:
    """Runs row i of a batch with the task index[i] of the model's `TaskBank`, inside the context.

    One forward computes the batch: one product with A and one with B for all rows. Only the core
    depends on the row, so the time does not depend on the number of tasks. The cores get gradients
    if they require them.

    The context applies to the thread that opened it, and to the backwards that it starts. A
    backward with activation checkpointing must be inside it, otherwise it raises. Do not change the
    index inside the context.

    Args:
        model: An adapted model with a bank.
        index: The task of each row [b] (int64), -1 for the base model. [b, tokens] has a task per
            token. All adapted layers must then get as many tokens as the model, [b, tokens, k].
            With a key-value cache (`generate`), columns count from the row's first token in the
            cache, and later tokens use the last column.
        flat: Whether a layer may get the tokens of all rows in one list [m, k], row after row, with
            the same number for each row, as in transformers' OPT. Always allowed in a model with
            adapted experts.

    Raises:
        TypeError, ValueError: If index is not an index of tasks, or names a free slot (its values
            are checked only on the CPU). In a layer, ValueError if the rows or tokens of an input
            do not match the index.
        RuntimeError: If the model has no adapter, no bank, or is merged.

    Warns:
        UserWarning: If the model is in training mode, and A or B are trained, but the tasks are
            not.
    """
    bank = getattr(model, "lotr_tasks", None)
    layers = unmerged_layers(model, "use_tasks")
    if not isinstance(bank, TaskBank):
        raise RuntimeError(
            "use_tasks: expected a model with a TaskBank, got one without. Create "
            "TaskBank(model, tasks) first."
        )
    _check_tasks(model, bank, index)
    if model.training and torch.is_grad_enabled() and _trains_only_factors(bank, layers):
        warnings.warn(
            "lotr_ext: the shared A and B are trained, but the tasks are not. Call "
            "model.lotr_tasks.requires_grad_() to train the tasks, or model.eval() to run them.",
            stacklevel=3,
        )
    has_experts = any(layer.num_experts for layer in layers.values())
    # Moved here, and not in each layer, where a copy to a GPU would wait.
    request = _ModelTasks(index.to(bank.cores[0].device), flat=flat or has_experts)
    layer_states = {
        layer: _LayerTasks(cores, request.index_of)
        for layer, cores in zip(layers.values(), bank.cores, strict=True)
    }
    # `model: request` is for the hooks below. It comes first, so that the state of a layer takes
    # its place if the model itself is an adapted layer.
    with open_request({model: request, **layer_states}):
        yield model


def _check_tasks(model: nn.Module, bank: TaskBank, index: object) -> None:
    """Checks an index of tasks. Its values are checked only on the CPU."""
    check_index("index", index, len(bank.taken))
    if index.dim() not in (1, 2) or 0 in index.shape[1:]:
        raise ValueError(
            f"index: expected shape [b], one task per row, or [b, tokens], one per token, got "
            f"shape {tuple(index.shape)}"
        )
    has_encoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if index.dim() == 2 and has_encoder:
        raise ValueError(
            f"index: expected shape [b] for a model with an encoder and a decoder, which have "
            f"different tokens, got {tuple(index.shape)}"
        )
    # Reading values of a GPU would wait for it. A free slot computes as the base model there.
    if index.device.type != "cpu" or bank.taken.device.type != "cpu":
        return
    tasks = index[index >= 0]
    free = tasks[~bank.taken[tasks]]
    if len(free):
        raise ValueError(f"index: expected tasks of the bank, got {int(free[0])}, a free slot")


def _trains_only_factors(bank: TaskBank, layers: Mapping[str, LoTRLayer]) -> bool:
    trains_factors = any(
        part != "core" and parameter.requires_grad
        for layer in layers.values()
        for part, parameter in layer.parts()
    )
    return trains_factors and not any(cores.requires_grad for cores in bank.cores)


@dataclass
class _ModelTasks:
    """Which task computes which row, or token, in one open `use_tasks`. All layers share it.

    The columns of an index per token are the tokens of a sequence. A forward with a cache of keys
    and values gets the columns of those tokens that follow the cached ones:

        index                            [[0, 1, 2]]
        3 tokens, no cache               [[0, 1, 2]]
        2 tokens after 1 in the cache       [[1, 2]]
        1 token after 3 in the cache           [[2]]    the last column goes on

    Attributes:
        index: The tasks of the rows [b], or of the tokens [b, tokens].
        flat: Whether an input [m, k] has the tokens of all rows.
        after_cache: The columns of the running forward, if it has a cache and index is per token.
        had_cache: Whether any forward in this context had a cache.
    """

    index: Tensor
    flat: bool
    after_cache: Tensor | None = None
    had_cache: bool = False

    def index_of(self, x: Tensor) -> Tensor:
        """Returns the tasks of the rows, or tokens, of an input of a layer.

        Args:
            x: [b, .., k], or [b, tokens, .., k] for an index per token. [m, k] if flat.

        Returns:
            [b], [b, tokens] or [m].
        """
        self._refuse_recomputation()
        # Copies only if the bank is on another device.
        index = (self.index if self.after_cache is None else self.after_cache).to(x.device)
        rows = len(index)
        is_flat = self.flat and x.dim() == 2
        # An empty batch does not tell how many tokens a row has.
        if is_flat and not rows and not len(x):
            return index.flatten()
        has_equal_rows = is_flat and rows > 0 and len(x) % rows == 0
        # (rows, tokens, ..), also for a flat input, which has the tokens of all rows. If they do
        # not divide evenly, [m], which the check refuses.
        lead = (rows, len(x) // rows) if has_equal_rows else x.shape[:-1]
        if len(lead) < index.dim() or lead[0] != rows:
            raise ValueError(
                f"x: expected a batch of {rows} rows of equal length, one for each row of the "
                f"index {list(index.shape)} of tasks, got shape {list(x.shape)}. If it has the "
                f"tokens of all rows, row after row, pass use_tasks(.., flat=True). For beam "
                f"search, or several sequences per prompt, pass index.repeat_interleave(num_beams)."
            )
        if index.dim() == 2 and lead[1] != index.shape[1]:
            raise ValueError(
                f"x: expected {index.shape[1]} tokens per row, as in the index of tasks or in the "
                f"call of the model, got {lead[1]}. Pass an index [b] of one task per row. To "
                f"generate tokens past the index, pass the cache to the model's own forward."
            )
        if not is_flat:
            return index
        # An entry of the index is for one token, or for all tokens of its row.
        return index.flatten().repeat_interleave(len(x) // index.numel())

    def _refuse_recomputation(self) -> None:
        """Refuses a checkpoint's recomputation in a context that had a forward with a cache.

        It cannot tell whether it repeats that forward or one without a cache.
        """
        # `current_backward` is -1 outside a backward.
        if self.had_cache and self.after_cache is None and current_backward() >= 0:
            raise RuntimeError(
                "use_tasks: expected no cache of keys and values in a context whose forward is "
                "recomputed by a checkpoint, got one. Pass an index of one task per row, or open "
                "one context for the forward with a cache and another one for this forward."
            )


class _LayerTasks(NamedTuple):
    """The state of a layer in an open `use_tasks` (see core/request.py)."""

    cores: Tensor  # [tasks, r_in, r_out], or [tasks, e, r_in, r_out]
    index_of: Callable[[Tensor], Tensor]  # `_ModelTasks.index_of`


# ---- hooks on the model --------------------------------------------------------------------------


def _refuse_without_request(module: nn.Module, args: tuple) -> None:
    """Refuses a checkpoint's recomputation outside the context: it would compute without tasks.

    A hook on the modules that compute adapted layers.
    """
    if torch.compiler.is_compiling() or current_backward() < 0:
        return
    # The layers of the module: itself, or the experts' adapters in a host.
    if current_request().keys().isdisjoint(layers_in(module).values()):
        raise RuntimeError(
            "use_tasks: expected backward inside the context, because a checkpoint recomputes a "
            "layer with its tasks, got one outside. To train the model's own adapter with "
            "checkpoints, remove the bank first: del model.lotr_tasks."
        )


def _remove_without_bank(hooks: list[RemovableHandle], model: nn.Module, args: tuple) -> None:
    """Removes what `del model.lotr_tasks` has left of a bank."""
    if not hasattr(model, "lotr_tasks"):
        for hook in hooks:
            hook.remove()
        # If the model is a container, another module in it has registered the bank (`attach`).
        for module in list(model.modules()):
            if getattr(module._modules.get("lotr_tasks"), "_hooks", None) is hooks:
                del module.lotr_tasks


def _before_forward(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Stores which columns of an index per token a forward of the model runs."""
    request = state_of(model)
    if isinstance(request, _ModelTasks) and request.index.dim() == 2:
        request.after_cache = _columns_after_cache(request.index, model, args, kwargs)
        # Kept after the forward, for a checkpoint that recomputes in backward.
        request.had_cache = request.had_cache or request.after_cache is not None


def _after_forward(model: nn.Module, args: tuple, output: object) -> None:
    # A layer that is called outside of the model's forward has no cache.
    request = state_of(model)
    if isinstance(request, _ModelTasks):
        request.after_cache = None


# ---- a cache of keys and values ------------------------------------------------------------------

# The arguments in which models receive a cache.
_CACHE_NAMES = ("past_key_values", "cache", "cache_params", "past_key_value", "layer_past", "mems")


def _columns_after_cache(
    index: Tensor, model: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> Tensor | None:
    """Returns the columns of an index for a call of the model, None if it has no cache.

    Tokens after the last column have its task.

    Args:
        index: [b, columns].
        model: The model.
        args: The positional arguments of the call.
        kwargs: Its keyword arguments.

    Raises:
        ValueError: If the call has no tokens, several caches, or one with an unknown number of
            tokens.
    """
    # By position as well as by name: GPT-2 receives the cache second, Llama fourth.
    by_position = inspect.signature(model.forward).bind_partial(*args).arguments
    arguments = {**by_position, **kwargs}
    caches = [
        value
        for name, value in arguments.items()
        if value is not None and (name in _CACHE_NAMES or hasattr(value, "get_seq_length"))
    ]
    if not caches:
        return None
    inputs = [
        arguments[name]
        for name in ("inputs_embeds", "input_ids")
        if arguments.get(name) is not None
    ]
    past = _tokens_in(caches[0])
    if len(caches) > 1 or not inputs or past is None:
        raise ValueError(
            f"index: expected shape [b] for a call in which the tokens after the cache "
            f"({len(caches)} x {type(caches[0]).__name__}) cannot be found, got an index per "
            f"token. Pass one transformers Cache with input_ids or inputs_embeds."
        )
    columns = torch.arange(past, past + inputs[0].shape[1], device=index.device)
    return index[:, columns.clamp(max=index.shape[1] - 1)]


def _tokens_in(cache: object) -> int | None:
    """Returns how many tokens a transformers Cache holds, None if that is unknown."""
    layers = getattr(cache, "layers", None)
    lengths = [
        int(layer.get_seq_length()) for layer in layers or () if hasattr(layer, "get_seq_length")
    ]
    # The longest layer counts, because a layer with a state in place of keys and values holds none.
    # No layers: a new cache, with 0 tokens. Layers that do not count, or no attribute: None.
    return max(lengths, default=0 if layers == [] else None)
