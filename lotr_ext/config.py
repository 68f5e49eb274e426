"""LoTRConfig: how `apply_lotr` adapts a model, and its JSON form.

Not here: which layers of a model a configuration means (targets.py).
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import nn

from .checks import check_choice, check_probability, check_rank
from .core.operators import DTYPES
from .cores import FORMS
from .factors import Scaling, scaling_of
from .init import CORE_INITS, FACTOR_INITS

# What the fields group_by, train and task_type of LoTRConfig may be.
GROUPS = ("shape", "block", "name", "layer", "width")
GroupBy = str | Mapping[str, str] | Callable[[str, nn.Module], str]
PARTS = ("A", "B", "core")
HEADED_TASKS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")  # models with a new head
TASKS = (*HEADED_TASKS, "SEQ_2_SEQ_LM", "CAUSAL_LM", "FEATURE_EXTRACTION")

# Settings of PEFT's LoRA, and one of an earlier version, that LoTR lacks or calls by another name,
# and what to use instead.
LORA_SETTINGS = {
    "r": "Here it is 'rank'.",
    "lora_alpha": "Here it is 'alpha'.",
    "lora_dropout": "Here it is 'dropout'.",
    "use_rslora": "Here it is 'rslora'.",
    "init_lora_weights": "Here it is 'init'.",
    "rank_pattern": "Layers that share factors have one rank.",
    "alpha_pattern": "All layers have one scaling.",
    "bias": "To train biases, use lotr_ext.peft. Its configuration has this field.",
    "lora_bias": "An adapter has no bias.",
    "use_dora": "LoTR has no magnitudes.",
    "magnitude": "LoTR has no magnitudes.",  # of an earlier version
    "fan_in_fan_out": "Conv1D layers are recognized without it.",
    "layers_to_transform": "Pass a regular expression as target_modules.",
    "layers_pattern": "Pass a regular expression as target_modules.",
    "layer_replication": "Replicate the layers before they are adapted.",
    "trainable_token_indices": "Name the embedding in modules_to_save.",
    "target_parameters": "To adapt experts, use apply_lotr. LoTRConfig has this field.",
    "loftq_config": "Quantize the model before it is adapted.",
    "eva_config": "lotr_ext.init_from_gradient starts an adapter from data.",
    "corda_config": "lotr_ext.init_from_gradient starts an adapter from data.",
}


def refuse_lora_settings(names: Iterable[str], config_class: type) -> None:
    """Raises for a name that is in `LORA_SETTINGS` but not a field of a configuration.

    Args:
        names: The names of the arguments with which the configuration is made.
        config_class: The class of the configuration, a dataclass.

    Raises:
        TypeError: If there is such a name. The message says what to use instead.
    """
    field_names = {field.name for field in fields(config_class)}
    for name in names:
        if name in LORA_SETTINGS and name not in field_names:
            raise TypeError(
                f"{name}: expected a field of {config_class.__name__}, got one of PEFT's LoRA or "
                f"of an earlier lotr_ext. {LORA_SETTINGS[name]}"
            )


def place_of(name: str) -> tuple[str, str]:
    """Returns the place (layer, kind) of a layer: its name up to the first number, and the rest.

    "model.layers.3.self_attn.q_proj" has the place ("model.layers.3", "self_attn.q_proj"). A name
    without a number is only a kind: ("", name).
    """
    # As few dotted parts as possible, of which the last one is a number.
    match = re.fullmatch(r"((?:.*?\.)??\d+)(?:\.(.*))?", name)
    if match is None:
        return "", name
    return match[1], match[2] or ""


@dataclass(frozen=True)
class LoTRConfig:
    """How `apply_lotr` adapts a model. Frozen, and checked when it is made.

    Layers have in_features k and out_features n.

    Attributes:
        rank: r, or (r_in, r_out) for A [k, r_in], B [n, r_out] and cores [r_in, r_out].
        alpha: If given, s is alpha / r (alpha / sqrt(r) with rslora), with r = max(r_in, r_out).
        rslora: Whether to divide by sqrt(r) instead of r (arXiv 2312.03732). alpha is then r if it
            is not given.
        scaling: s itself, or "auto", with which LoRA's learning rate suits every rank
            (`lotr_ext.factors.scaling_of`).
        dropout: The probability of dropping an element of the adapter's x in training, in [0, 1).
        target_modules: A list of name endings, which match full dotted parts (["query", "value"]);
            a regular expression for the full name; or "all-linear". None means "all-linear", but no
            linear layer if target_parameters is given. "all-linear" leaves out layers that cannot
            be adapted, layers that share their weight with another module and, as PEFT does, the
            output layer or head (transformers, timm). `trainable_summary` lists what was left out.
        exclude_modules: Name endings, or a regular expression, to leave out.
        modules_to_save: Name endings of modules that are fully trained, and saved with the adapter,
            such as a new head.
        group_by: Which layers share A and B. "shape": one pair per (k, n), as in the paper.
            "block": one pair per shape and block. The layers of a block share their name up to the
            first number ("model.layers.3"). "name": one pair per shape and last part of the
            name (q and v apart). "layer": one pair per layer. "width": one A per k and one B per
            n, over all adapted layers. Or a mapping from layer name to group, or a callable
            (name, module) -> group.
        init: "orthonormal", "normal", "kaiming" or "svd" (lotr_ext.init).
        train: Which of "A", "B" and "core" are trained. The others keep their initial values.
        adapter_dtype: The dtype of A, B and the cores: float32, float64, bfloat16 or float16.
        core_init: "zero", or "identity" (B then starts at zero).
        target_parameters: Name endings of the 3-D parameters of a transformers mixture's experts,
            as PEFT matches them: ["experts.gate_up_proj", "experts.down_proj"].
        core: "dense" (a parameter [r_in, r_out] per layer), or a form that computes the cores from
            fewer parameters, which layers share (`lotr_ext.cores`): "diagonal", "cp", "tucker",
            "train", "few", or a callable (places, rank) -> Cores. A place is a layer's (layer,
            kind), such as ("model.layers.3", "self_attn.q_proj"). The configuration of a saved
            adapter has "custom" for a callable.
        task_type: PEFT's name of the task. With "SEQ_CLS", "TOKEN_CLS" and "QUESTION_ANS",
            `apply_lotr` adds the model's head to modules_to_save. "CAUSAL_LM", "SEQ_2_SEQ_LM" and
            "FEATURE_EXTRACTION" change nothing.

    Raises:
        TypeError, ValueError: If a field has a wrong type or value, or fields exclude each other.
            The message names the field. For a setting of PEFT's LoraConfig, such as r or
            rank_pattern, it says what to use here.
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

    def __new__(cls, *_: Any, **settings: Any) -> "LoTRConfig":
        # Before __init__ gets them. Its error would not say what to use instead.
        refuse_lora_settings(settings, cls)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        # For its checks, also of the rank. The value is computed on demand, see `s`.
        scaling_of(self.rank, self.alpha, self.rslora, self.scaling)
        check_probability("dropout", self.dropout)
        if not callable(self.group_by) and not isinstance(self.group_by, Mapping):
            check_choice("group_by", self.group_by, GROUPS, ", a mapping or a callable")
        if not callable(self.core):
            check_choice("core", self.core, ("dense", *FORMS, "custom"), ", or a callable")
        check_choice("init", self.init, (*FACTOR_INITS, "svd"))
        check_choice("core_init", self.core_init, CORE_INITS)
        check_choice("adapter_dtype", self.adapter_dtype, DTYPES.values())
        check_choice("task_type", self.task_type, (*TASKS, None))
        # Normalized, so that equal settings compare equal: names are a tuple or None, a pair of
        # ranks is a tuple, parts are in one order. By update, because the dataclass is frozen.
        vars(self).update(
            rank=self.rank if isinstance(self.rank, int) else self.ranks,
            group_by=dict(self.group_by) if isinstance(self.group_by, Mapping) else self.group_by,
            target_modules=_pattern("target_modules", self.target_modules),
            exclude_modules=_pattern("exclude_modules", self.exclude_modules),
            modules_to_save=_names("modules_to_save", self.modules_to_save),
            target_parameters=_names("target_parameters", self.target_parameters),
            train=tuple(sorted(set(_names("train", self.train) or ()))),
        )
        self._check_combinations()

    def _check_combinations(self) -> None:
        svd = self.init == "svd"
        # Only one part has a nonzero gradient at the start: the cores if they are zero, B if they
        # are the identity. With "svd", every part has one.
        needed = "core" if self.core_init == "zero" else "B"
        can_learn = len(self.train) > 0 if svd else needed in self.train
        if not can_learn or not set(self.train) <= set(PARTS):
            requirement = (
                f", with {needed!r} among them, because at core_init {self.core_init!r} all other "
                f"gradients are zero at the start"
            )
            raise ValueError(
                f"train: expected some of {', '.join(PARTS)}{'' if svd else requirement}, got "
                f"{self.train!r}"
            )
        if self.core != "dense" and (svd or self.target_parameters):
            raise ValueError(
                f'core: expected "dense" with init "svd", which sets the cores, and with '
                f"target_parameters, because each expert has a core, got {self.core!r}"
            )
        if svd and (self.core_init != "zero" or self.target_parameters or self.group_by == "width"):
            raise ValueError(
                'init: expected another init than "svd" with core_init="identity", '
                'target_parameters or group_by="width", got "svd"'
            )

    def __getattr__(self, name: str) -> Any:
        """Raises AttributeError. Names the right class if `peft.get_peft_model` got this one."""
        # The attributes that get_peft_model reads first.
        if name in ("base_model_name_or_path", "peft_type"):
            raise AttributeError(
                "peft_config: expected a LoTRPeftConfig, got a LoTRConfig, which is for "
                "apply_lotr. Use lotr_ext.peft.LoTRPeftConfig with PEFT's functions."
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def ranks(self) -> tuple[int, int]:
        """(r_in, r_out)."""
        return check_rank(self.rank)

    @property
    def s(self) -> float:
        """The scaling of each layer."""
        return scaling_of(
            self.rank,
            self.alpha,
            self.rslora,
            self.scaling,
            diagonal=self.core in ("diagonal", "cp"),
        )

    @property
    def adapts_all_linear(self) -> bool:
        """Whether all linear layers are targets."""
        if self.target_modules is None:
            return self.target_parameters is None
        return self.target_modules == "all-linear"

    def to_dict(self) -> dict[str, Any]:
        """Returns a dictionary for JSON. A callable core becomes "custom".

        A callable group_by has no JSON form. In model.lotr_config, `apply_lotr` replaces it with
        a mapping from each layer to its group.
        """
        return {
            **asdict(self),
            "adapter_dtype": str(self.adapter_dtype).removeprefix("torch."),
            "core": "custom" if callable(self.core) else self.core,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LoTRConfig":
        """Returns the configuration that `to_dict` described.

        Raises:
            TypeError: If a field is unknown.
            TypeError, ValueError: As for the constructor.
        """
        name = values.get("adapter_dtype", "float32")
        dtype = DTYPES.get(str(name), name)  # the constructor refuses another name
        return cls(**{**values, "adapter_dtype": dtype})


# ---- checks --------------------------------------------------------------------------------------


def _names(field: str, value: object) -> tuple[str, ...] | None:
    """Returns a list of names as a tuple, a set in alphabetical order."""
    if value is None:
        return None
    is_list = isinstance(value, (Sequence, Set)) and not isinstance(value, str)
    if not is_list or not value or not all(isinstance(name, str) and name for name in value):
        raise TypeError(f"{field}: expected a list of at least one name, or None, got {value!r}")
    # The order of a set differs between processes, and so would the saved configuration.
    return tuple(sorted(value)) if isinstance(value, Set) else tuple(value)


def _pattern(field: str, value: object) -> str | tuple[str, ...] | None:
    """Returns a regular expression, or a list of name endings as a tuple."""
    if not isinstance(value, str):
        return _names(field, value)
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(
            f"{field}: expected a regular expression, got {value!r} ({error})"
        ) from None
    return value
