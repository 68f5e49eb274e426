"""LoTRConfig, how `apply_lotr` adapts a model, and its JSON form."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from .core.operators import DTYPES
from .cores import FORMS
from .factors import Scaling, scaling_of
from .functional import check_probability, check_rank
from .init import CORE_INITS, FACTOR_INITS

__all__ = ["GroupBy", "LoTRConfig", "place_of"]

DIAGONAL = ("diagonal", "cp")  # forms whose core has r numbers on its diagonal: `scaling_of`
HEADED_TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")  # PEFT's names
TASKS = (*HEADED_TASKS, "SEQ_2_SEQ_LM", "CAUSAL_LM", "FEATURE_EXTRACTION")
PARTS = ("A", "B", "core")
GroupBy = str | Mapping[str, str] | Callable[[str, nn.Module], str]

# LoRA's names of settings in PEFT, and the names here.
NAMES_HERE = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "use_rslora": "rslora",
    "init_lora_weights": "init",
}


# Settings of PEFT's LoRA that LoTR lacks, and why, or what to do.
NOT_HERE = {
    "rank_pattern": "Layers that share factors have one rank.",
    "alpha_pattern": "All layers have one scaling.",
    "bias": "To train biases, use lotr_ext.peft, whose configuration has this field.",
    "lora_bias": "An adapter has no bias.",
    "use_dora": "LoTR has no magnitudes.",
    "magnitude": "LoTR has no magnitudes.",
    "fan_in_fan_out": "Conv1D layers are recognized without it.",
    "layers_to_transform": "Name the layers in target_modules.",
    "layers_pattern": "Name the layers in target_modules.",
    "layer_replication": "Replicate the layers before they are adapted.",
    "trainable_token_indices": "Name the embedding in modules_to_save.",
    "target_parameters": "apply_lotr adapts experts.",
    "loftq_config": "The base weights stay as they are.",
    "eva_config": "lotr_ext.init_from_gradient starts an adapter from data.",
    "corda_config": "lotr_ext.init_from_gradient starts an adapter from data.",
}


def check_names(names: Iterable[str], kind: type) -> None:
    """Checks the names of settings for a configuration.

    Args:
        names: The names of the arguments.
        kind: The configuration's class, a dataclass.

    Raises:
        TypeError: If a name is one that only PEFT's LoRA has.
    """
    for name in names:
        if name in kind.__dataclass_fields__:
            continue
        if name in NAMES_HERE:
            raise TypeError(
                f"{name}: expected a field of {kind.__name__}, got LoRA's name for it. Here it is "
                f"{NAMES_HERE[name]!r}."
            )
        if name in NOT_HERE:
            raise TypeError(
                f"{name}: expected a field of {kind.__name__}, got one that it does not have. "
                f"{NOT_HERE[name]}"
            )


def place_of(name: str) -> tuple[str, str]:
    """(layer, kind) of a layer's name: what stands up to its first number, and after it, such as ("model.layers.3",
    "self_attn.q_proj"). Without a number, layer is ""."""
    found = re.fullmatch(r"((?:.*?\.)??\d+)(?:\.(.*))?", name)
    return ("", name) if found is None else (found[1], found[2] or "")


def _names(value: object, name: str) -> tuple[str, ...] | None:
    """A list of names as a tuple."""
    if value is None:
        return None
    many = isinstance(value, (Sequence, set, frozenset)) and not isinstance(value, str)
    if not many or not value or not all(isinstance(one, str) and one for one in value):
        hint = f" Write [{value!r}]." if isinstance(value, str) else ""
        raise TypeError(
            f"{name}: expected a list of at least one name, or None, got {value!r}.{hint}"
        )
    return tuple(sorted(value)) if isinstance(value, (set, frozenset)) else tuple(value)


def _pattern(value: object, name: str) -> str | tuple[str, ...] | None:
    """A regular expression, or a list of name endings as a tuple."""
    if not isinstance(value, str):
        return _names(value, name)
    if value.replace("_", "-").lower() == "all-linear" and value != "all-linear":
        raise ValueError(f'{name}: expected "all-linear", got {value!r}')
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(
            f"{name}: expected a regular expression, got {value!r} ({error})"
        ) from None
    return value


def _one_of(known: Sequence[object], value: object, name: str, more: str = "") -> None:
    if value not in known:
        raise ValueError(
            f"{name}: expected one of {', '.join(map(str, known))}{more}, got {value!r}"
        )


@dataclass(frozen=True)
class LoTRConfig:
    """How `apply_lotr` adapts a model. Frozen, and checked when it is made.

    Attributes:
        rank: r, or (r_in, r_out) for A [K, r_in], B [N, r_out] and cores [r_in, r_out].
        alpha: s is alpha / r (alpha / sqrt(r) with rslora), r = max(r_in, r_out), instead of scaling's value.
        rslora: divide by sqrt(r) instead of r (arXiv 2312.03732). alpha is r if it is not given.
        scaling: s itself, or "auto": with it LoRA's learning rate serves at every rank (`lotr_ext.factors.scaling_of`).
        dropout: on the adapter's x, in [0, 1).
        target_modules: name endings (["query", "value"]: whole dotted parts), a regular expression that matches the full
            name, or "all-linear" (also for None): every linear layer except those that cannot be adapted or share their weight
            with another module, and, as in PEFT, the output layer or heads (transformers, timm). `trainable_summary` lists the
            layers that were left out. With target_parameters, None: no linear layer.
        exclude_modules: name endings, or a regular expression, to leave out.
        modules_to_save: name endings of modules to be trained whole and saved with the adapter (a new head).
        group_by: which layers share A and B. "shape": one pair for each (K, N), the paper's; "block": one for each shape and
            block, the layers whose names agree up to their first number ("model.layers.3"); "name": one for each last part of
            the name and shape (q and v apart); "layer": one for each layer; "width": one A for each K and one B for each N, over all adapted layers; a
            mapping from layer name to group; or a callable (name, module) -> group.
        init: "orthonormal", "normal", "kaiming" or "svd" (lotr_ext.init).
        train: which of "A", "B" and "core" are trained; the rest stays as it starts.
        adapter_dtype: of A, B and the cores: float32, float64, bfloat16 or float16.
        core_init: "zero", or "identity" (then B starts at zero).
        target_parameters: name endings of the 3-D parameters of a transformers mixture's experts, as PEFT matches them:
            ["experts.gate_up_proj", "experts.down_proj"].
        core: "dense", each layer has its own core; or cores made of fewer numbers that layers share (`lotr_ext.cores`):
            "diagonal", "cp", "tucker", "train" or "few", or a callable (places, rank) -> Cores, where a place is a layer's
            (layer, kind), ("model.layers.3", "self_attn.q_proj"). A saved adapter's config has "custom" for a callable.
        task_type: PEFT's name of the task. With "SEQ_CLS", "TOKEN_CLS" and "QUESTION_ANS" `apply_lotr` adds the model's head
            to modules_to_save; "CAUSAL_LM", "SEQ_2_SEQ_LM" and "FEATURE_EXTRACTION" change nothing.

    Raises TypeError, ValueError: a field of the wrong type or value. For LoRA's names of these settings (r, lora_alpha, ..) the
    message gives the name used here.
    """

    rank: int | tuple[int, int] = 16
    alpha: float | None = None
    rslora: bool = False
    scaling: Scaling = "auto"
    dropout: float = 0.0
    target_modules: Sequence[str] | str | None = None
    exclude_modules: Sequence[str] | str | None = None
    modules_to_save: Sequence[str] | None = None
    group_by: GroupBy = "shape"
    init: str = "orthonormal"
    train: Sequence[str] = PARTS
    adapter_dtype: torch.dtype = torch.float32
    core_init: str = "zero"
    target_parameters: Sequence[str] | None = None
    core: str | Callable[..., Any] = "dense"
    task_type: str | None = None

    def __new__(cls, *_: Any, **given: Any) -> LoTRConfig:
        check_names(given, cls)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        ranks = check_rank(self.rank)
        put("rank", self.rank if isinstance(self.rank, int) else ranks)
        scaling_of(self.rank, self.alpha, self.rslora, self.scaling)
        check_probability("dropout", self.dropout)
        for name in ("target_modules", "exclude_modules"):
            put(name, _pattern(getattr(self, name), name))
        for name in ("modules_to_save", "target_parameters", "train"):
            put(name, _names(getattr(self, name), name))
        if isinstance(self.group_by, Mapping):
            put("group_by", dict(self.group_by))
        elif not callable(self.group_by):
            _one_of(
                ("shape", "block", "name", "layer", "width"),
                self.group_by,
                "group_by",
                ", a mapping or a callable",
            )
        if not callable(self.core):
            _one_of(("dense", *FORMS, "custom"), self.core, "core", ", or a callable")
        _one_of((*FACTOR_INITS, "svd"), self.init, "init")
        _one_of(CORE_INITS, self.core_init, "core_init")
        _one_of(tuple(DTYPES.values()), self.adapter_dtype, "adapter_dtype")
        _one_of((*TASKS, None), self.task_type, "task_type")
        self._check_combinations()
        put("train", tuple(part for part in PARTS if part in self.train))

    def __getattr__(self, name: str) -> Any:
        """Explains what is missing to `peft.get_peft_model`, which reads these names first."""
        if name in ("base_model_name_or_path", "peft_type"):
            raise AttributeError(
                "peft_config: expected a LoTRPeftConfig, got a LoTRConfig, which is for "
                "apply_lotr. Use lotr_ext.peft.LoTRPeftConfig with PEFT's functions."
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def _check_combinations(self) -> None:
        moves = (
            "core" if self.core_init == "zero" else "B"
        )  # the only part with a nonzero gradient at the start
        trained, svd = set(self.train or ()), self.init == "svd"
        if not trained or not trained <= set(PARTS) or (moves not in trained and not svd):
            raise ValueError(
                f"train: expected some of {', '.join(PARTS)}, with {moves!r} among them, because at core_init "
                f"{self.core_init!r} all other gradients are zero at the start, got {self.train!r}"
            )
        if self.core != "dense" and (svd or self.target_parameters is not None):
            why = (
                'init "svd", which sets the cores'
                if svd
                else "target_parameters, whose experts have a core each"
            )
            raise ValueError(f'core: expected "dense" with {why}, got {self.core!r}')
        if svd and (
            self.core_init != "zero"
            or self.target_parameters is not None
            or self.group_by == "width"
        ):
            raise ValueError(
                'init: expected another one with core_init, target_parameters or group_by="width", got "svd"'
            )

    @property
    def ranks(self) -> tuple[int, int]:
        """(r_in, r_out)."""
        return check_rank(self.rank)

    @property
    def s(self) -> float:
        """The scaling of each layer."""
        return scaling_of(self.rank, self.alpha, self.rslora, self.scaling, self.core in DIAGONAL)

    @property
    def everything(self) -> bool:
        """Whether it selects all linear layers."""
        return self.target_modules == "all-linear" or (
            self.target_modules is None and self.target_parameters is None
        )

    def to_dict(self) -> dict[str, Any]:
        """A dictionary for JSON; a callable core is "custom". Raises ValueError for a callable group_by: use a mapping."""
        if callable(self.group_by):
            raise ValueError("group_by: expected a name or a mapping for JSON, got a callable")
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["adapter_dtype"] = str(self.adapter_dtype).removeprefix("torch.")
        values["core"] = "custom" if callable(self.core) else self.core
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LoTRConfig:
        """The inverse of `to_dict`. Raises TypeError or ValueError for an unknown field or a wrong value."""
        values = {**values}
        if "adapter_dtype" in values:
            values["adapter_dtype"] = DTYPES.get(
                str(values["adapter_dtype"]), values["adapter_dtype"]
            )
        return cls(**values)
