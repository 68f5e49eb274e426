"""LoTRConfig, the configuration of an adapter, and its JSON form."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import nn

from ..layers.checks import check_dtype, check_rank
from ..layers.cores import FORMS, Cores
from ..layers.init import CORE_INITS, FACTOR_INITS, FOUND_INITS
from ..layers.settings import Settings
from ..ops.planner import DTYPES

__all__ = ["GroupBy", "LoTRConfig"]

_GROUPS = ("shape", "block", "name", "width")
GroupBy = str | Mapping[str, str] | Callable[[str, nn.Module], str]

# PEFT's names for LoRA's settings, and what they are called here
_NAMES_HERE = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "use_rslora": "rslora",
    "use_dora": "magnitude",
    "init_lora_weights": "init",
}
_NOT_HERE = {
    "rank_pattern": "the layers of a group share A and B, and so the rank",
    "alpha_pattern": "a configuration has one scaling",
    "lora_bias": "the adapter has no biases",
    "trainable_token_indices": "rows of an embedding cannot be trained",
    "layer_replication": "layers cannot be repeated",
    "fan_in_fan_out": "a Conv1D is detected by its class",
    "loftq_config": "quantise the model first",
}


def check_names(given: Iterable[str], of: str) -> None:
    """Refuses settings by the names that PEFT's LoRA has for them. of: the configuration's class.

    Raises:
        TypeError: which name it was, and what to give instead.
    """
    for name in given:
        if name in _NAMES_HERE:
            raise TypeError(f"{name}: expected a field of {of}, got LoRA's name for it; here it is {_NAMES_HERE[name]!r}")
        if name in _NOT_HERE:
            raise TypeError(f"{name}: expected a field of {of}, got one that only LoRA has: {_NOT_HERE[name]}")


HEADED_TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")  # PEFT's names
TASKS = (*HEADED_TASKS, "SEQ_2_SEQ_LM", "CAUSAL_LM", "FEATURE_EXTRACTION")


def check_task(task_type: object) -> str | None:
    """Returns PEFT's name of a task as a str, or raises ValueError for another one."""
    if task_type is not None and task_type not in TASKS:
        raise ValueError(f"task_type: expected one of {', '.join(TASKS)} or None, got {task_type!r}")
    return None if task_type is None else str.__str__(task_type)  # PEFT's own is an enumeration of strings


_PARTS = ("A", "B", "core", "magnitude")


def _names(value: object, name: str) -> tuple[str, ...] | None:
    """A list of name endings as a tuple."""
    if value is None:
        return None
    if isinstance(value, str) or not isinstance(value, Sequence | set | frozenset):
        raise TypeError(f"{name}: expected a list of name endings or None, got {value!r}")
    for ending in value:
        if not isinstance(ending, str) or not ending:
            raise TypeError(f"{name}: expected non-empty strings, got {ending!r}")
    if not value:
        raise ValueError(f"{name}: expected at least one name ending or None, got an empty list")
    return tuple(sorted(value)) if isinstance(value, set | frozenset) else tuple(value)


@dataclass(frozen=True)
class LoTRConfig:
    """How `apply_lotr` adapts a model. Frozen, and checked when it is made.

    Attributes:
        rank: r, or (r_in, r_out) for A [K, r_in], B [N, r_out] and cores [r_in, r_out].
        alpha: the adapter is scaled by alpha / r (alpha / sqrt(r) with rslora), r = max(r_in, r_out). None: alpha = r.
        rslora: divide by sqrt(r) instead of r (arXiv 2312.03732).
        scaling: s itself, instead of alpha; "auto": 4 (8 / r)^1.5, with diagonal cores 4 (8 / r)^0.5, for one learning
            rate at every rank (docs/choosing.md).
        dropout: on the adapter's x, in [0, 1).
        target_modules: name endings (["query", "value"]: whole dotted parts), a regular expression that matches the full
            name, or "all-linear" (also for None): every linear layer except those that cannot be adapted or share their weight
            with another module, and, as in PEFT, a transformers model's output layer (or its head) and a timm model's
            classifier. `trainable_summary` lists the layers that were left out. With target_parameters, None: no linear layer.
        target_parameters: name endings of the 3-D parameters of a transformers mixture's experts, as PEFT matches them:
            ["experts.gate_up_proj", "experts.down_proj"].
        exclude_modules: name endings, or a regular expression, to leave out.
        modules_to_save: name endings of modules to be trained whole and saved with the adapter (a new head).
        group_by: which layers share one pair of factors. "shape": one pair for each (K, N), the paper's; "block": one for each
            shape and block, the layers whose names agree up to their first number ("model.layers.3"); "name": one for each last
            part of the name and shape (q and v apart); "width": no pairs but one A for each K and one B for each N, over all
            adapted layers; a mapping from layer name to group; or a callable (name, module) -> group.
        init: "orthonormal", "normal", "kaiming", "svd" (lotr_ext.init), or "gradient", for which `apply_lotr` needs batches and
            a loss (`init_from_gradient`).
        train: which of "A", "B", "core" and "magnitude" are trained, by default all; the rest stays as it starts.
        magnitude: whether each layer has a trained length m_n for each row of W + s B G^T A^T, which starts at the row's own
            (DoRA, arXiv 2402.09353): y = bias + (m / c) (x W^T + s ((x A) G) B^T), c the lengths, without a gradient. Not for
            target_parameters.
        adapter_dtype: of A, B and the cores: float32, float64, bfloat16 or float16.
        core_init: "zero", or "identity" (then B starts at zero).
        core: "dense", each layer has its own core; or cores made of fewer numbers that layers share (`lotr_ext.cores`):
            "diagonal", "cp", "tucker", "train" or "few", or a callable (places, rank) -> Cores, where a place is a layer's
            (layer, kind), ("model.layers.3", "self_attn.q_proj"). A saved adapter's config has "custom" for a callable.
        task_type: PEFT's name of the task. With "SEQ_CLS", "TOKEN_CLS" and "QUESTION_ANS" `apply_lotr` adds the model's head
            to modules_to_save; "CAUSAL_LM", "SEQ_2_SEQ_LM" and "FEATURE_EXTRACTION" change nothing.

    Raises:
        TypeError, ValueError: a field of the wrong type or value. For LoRA's names of these settings (r, lora_alpha, ..) the
            message gives the name used here.
    """

    rank: int | tuple[int, int] = 16
    alpha: float | None = None
    rslora: bool = False
    scaling: float | Literal["auto"] | None = None
    dropout: float = 0.0
    target_modules: Sequence[str] | str | None = None
    exclude_modules: Sequence[str] | str | None = None
    modules_to_save: Sequence[str] | None = None
    group_by: GroupBy = "shape"
    init: str = "orthonormal"
    train: Sequence[str] = ("A", "B", "core", "magnitude")
    adapter_dtype: torch.dtype = torch.float32
    core_init: str = "zero"
    target_parameters: Sequence[str] | None = None
    core: str | Callable[..., Cores] = "dense"
    task_type: str | None = None
    magnitude: bool = False

    def __new__(cls, *_: Any, **given: Any) -> LoTRConfig:
        check_names(given, "LoTRConfig")
        return super().__new__(cls)

    def __getattr__(self, name: str) -> Any:
        if name == "base_model_name_or_path":  # the first attribute that peft.get_peft_model reads
            raise AttributeError(
                "peft_config: expected lotr_ext.interop.peft.LoTRPeftConfig, which has the same fields, got LoTRConfig, which "
                "is for lotr_ext.apply_lotr"
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __post_init__(self) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        put("rank", self._checked_rank())
        settings = Settings.of(self)
        for name in ("alpha", "scaling"):
            value = getattr(settings, name)
            put(name, value if value is None or isinstance(value, str) else float(value))
        put("dropout", settings.dropout)
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, str):
                try:
                    re.compile(value)
                except re.error as error:
                    raise ValueError(f"{name}: expected a regular expression, got {value!r} ({error})") from None
            else:
                put(name, _names(value, name))
        put("modules_to_save", _names(self.modules_to_save, "modules_to_save"))
        put("target_parameters", _names(self.target_parameters, "target_parameters"))
        self._check_group_by()
        if self.init not in (*FACTOR_INITS, *FOUND_INITS):
            raise ValueError(f"init: expected one of {', '.join((*FACTOR_INITS, *FOUND_INITS))}, got {self.init!r}")
        if self.core_init not in CORE_INITS:
            raise ValueError(f"core_init: expected one of {', '.join(CORE_INITS)}, got {self.core_init!r}")
        if self.adapter_dtype is None:
            raise TypeError(f"adapter_dtype: expected one of {', '.join(DTYPES)}, got None")
        check_dtype(self.adapter_dtype, "adapter_dtype")
        put("task_type", check_task(self.task_type))
        self._check_train()
        self._check_core()
        if self.magnitude and self.target_parameters is not None:
            raise ValueError("magnitude: expected False with target_parameters, whose experts have none, got True")

    def _check_core(self) -> None:
        known = ("dense", *FORMS)
        if not callable(self.core) and self.core not in (*known, "custom"):
            raise ValueError(f"core: expected one of {', '.join(known)}, or a callable, got {self.core!r}")
        if self.core != "dense" and self.target_parameters is not None:
            raise ValueError(
                f'core: expected "dense" with target_parameters, whose experts have a core each, got {self.core!r}'
            )
        if self.core != "dense" and self.init == "svd":
            raise ValueError(f'core: expected "dense" with init "svd", which sets the cores, got {self.core!r}')

    def _checked_rank(self) -> int | tuple[int, int]:
        ranks = check_rank(self.rank)
        return self.rank if isinstance(self.rank, int) else ranks

    def _check_group_by(self) -> None:
        if isinstance(self.group_by, str):
            if self.group_by not in _GROUPS:
                raise ValueError(f"group_by: expected one of {_GROUPS}, a mapping or a callable, got {self.group_by!r}")
        elif isinstance(self.group_by, Mapping):
            for name, group in self.group_by.items():
                if not (isinstance(name, str) and isinstance(group, str)):
                    raise TypeError(f"group_by: expected layer names to group names, got {name!r}: {group!r}")
            object.__setattr__(self, "group_by", dict(self.group_by))
        elif not callable(self.group_by):
            raise TypeError(f"group_by: expected one of {_GROUPS}, a mapping or a callable, got {self.group_by!r}")

    def _check_train(self) -> None:
        train = _names(self.train, "train")
        if train is None or len(set(train)) != len(train) or not set(train) <= set(_PARTS):
            raise ValueError(f"train: expected some of {_PARTS}, each once, got {self.train!r}")
        if not self.magnitude and "magnitude" in train:
            if set(train) != set(_PARTS):
                raise ValueError(f'train: expected "magnitude" only with magnitude=True, got {self.train!r} without')
            train = _PARTS[:-1]
        object.__setattr__(self, "train", tuple(part for part in _PARTS if part in train))
        if self.init == "svd":
            if self.group_by == "width":
                raise ValueError('init: expected another one with group_by "width", got "svd", which needs layers of one shape')
            if self.core_init != "zero":
                raise ValueError(f'core_init: expected "zero" with init "svd", which sets the cores, got {self.core_init!r}')
            return
        if self.init == "gradient" and self.core_init != "zero":
            raise ValueError(f'core_init: expected "zero" with init "gradient", got {self.core_init!r}')
        if self.init == "gradient" and self.target_parameters is not None:
            raise ValueError('init: expected another one with target_parameters, got "gradient", which needs linear layers')
        moves = "core" if self.core_init == "zero" else "B"  # the only part with a nonzero gradient at the start
        if moves not in self.train and self.train != ("magnitude",):
            raise ValueError(
                f"train: expected {moves!r} among the trained parts with core_init {self.core_init!r} (all other gradients are "
                f"zero while it is), got {self.train!r}"
            )

    @property
    def ranks(self) -> tuple[int, int]:
        """(r_in, r_out)."""
        return (self.rank, self.rank) if isinstance(self.rank, int) else self.rank

    def to_dict(self) -> dict[str, Any]:
        """A dictionary for JSON; a callable core is "custom". Raises ValueError for a callable group_by: use a mapping."""
        if callable(self.group_by):
            raise ValueError(f"group_by: expected one of {_GROUPS} or a mapping for JSON, got a callable")
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["adapter_dtype"] = str(self.adapter_dtype).removeprefix("torch.")
        values["core"] = "custom" if callable(self.core) else self.core
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LoTRConfig:
        """The inverse of `to_dict`.

        Raises:
            TypeError, ValueError: not a mapping, an unknown field, or a value that the constructor refuses.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"config: expected a mapping, got {type(values).__name__}")
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            known = ", ".join(f.name for f in fields(cls))
            here = ", ".join(f"{name} is {_NAMES_HERE[name]}" for name in unknown if name in _NAMES_HERE)
            raise ValueError(
                f"config: expected fields among {known}, got {', '.join(unknown)}{f' ({here} here)' if here else ''}"
            )
        values = dict(values)
        if "adapter_dtype" in values:
            name = values["adapter_dtype"]
            if name not in DTYPES:
                raise ValueError(f"adapter_dtype: expected one of {', '.join(DTYPES)}, got {name!r}")
            values["adapter_dtype"] = DTYPES[name]
        return cls(**values)
