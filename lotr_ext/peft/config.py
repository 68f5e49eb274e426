"""LoTRPeftConfig: what `peft.get_peft_model` adapts and how, and its file."""

import re
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import peft
from peft.config import PeftConfig

from ..checks import check_choice
from ..config import PARTS, LoTRConfig, refuse_lora_settings
from ..old_files import config_of_version_1

if tuple(map(int, re.findall(r"\d+", peft.__version__)[:2])) < (0, 21):
    raise ImportError(
        f"lotr_ext.peft: expected PEFT 0.21 or later, got {peft.__version__}. Run pip install -U "
        f"peft."
    )


class PeftType(str, Enum):
    """The method's name.

    PEFT's enum of this name cannot be extended. This member compares and prints as one
    of its members would.
    """

    LOTR = "LOTR"


# Fields in files of version 1 that this version lacks. With a value, such as True, they are an
# error. Otherwise they are ignored.
_REMOVED_FIELDS = ("magnitude", "use_dora", "target_parameters")


@dataclass
class LoTRPeftConfig(PeftConfig):
    """What to adapt and how, for `peft.get_peft_model`. Checked when it is made.

    Attributes:
        rank: An int or (r_in, r_out), 16 if neither rank nor r is given.
        r: The name of rank in PEFT's other methods. Always equal to rank.
        alpha: As in `lotr_ext.LoTRConfig`, as are rslora, scaling, dropout, group_by, init, core,
            core_init and train. A saved configuration has the scaling as a number. group_by cannot
            be a callable, which cannot be saved, and init cannot be "svd", which changes the base
            weights that PEFT's adapters share.
        target_modules: As in `peft.LoraConfig`, as are exclude_modules, layers_to_transform,
            layers_pattern and modules_to_save. None selects what PEFT's LoRA targets by default in
            a model of this type.
        bias: "none", "all", or "lotr_only" to train the biases of adapted layers.
        layers: The adapted layers with the names of their factors. Set when layers are adapted.

    Raises:
        TypeError, ValueError: If a field has a wrong type or value.
    """

    rank: int | tuple[int, int] | None = None
    alpha: float | None = None
    rslora: bool = False
    scaling: float | str = "auto"
    dropout: float = 0.0
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    bias: str = "none"
    group_by: str | dict[str, str] = "shape"
    init: str = "orthonormal"
    core_init: str = "zero"
    core: str = "dense"
    train: list[str] = field(default_factory=lambda: list(PARTS))
    layers: list[dict[str, Any]] | None = None
    r: int | tuple[int, int] | None = None

    def __new__(cls, *_: Any, **values: Any) -> "LoTRPeftConfig":
        # Before `__init__`, whose error for an unknown name does not say what to use. A removed
        # field without a value is left to `__init__`: PEFT catches its error, and drops the field.
        refuse_lora_settings(_without_removed_fields(values), cls)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.LOTR
        if self.rank is None:
            self.rank = 16 if self.r is None else self.r
        if self.r not in (None, self.rank):
            raise ValueError(
                f"r: expected rank = {self.rank!r}, got {self.r!r}. Pass only one of them."
            )
        if callable(self.group_by) or callable(self.core) or self.core == "custom":
            raise ValueError(
                f"group_by, core: expected no callable, which cannot be saved, got "
                f"{self.group_by!r}, {self.core!r}. Use apply_lotr for callables."
            )
        # PEFT's files name factors after their groups. A name of a module cannot have a dot.
        if isinstance(self.group_by, dict) and "." in "".join(map(str, self.group_by.values())):
            raise ValueError(f"group_by: expected groups without dots, got {self.group_by!r:.200}")
        if self.init == "svd":
            raise ValueError(
                'init: expected one that does not change the base weights, got "svd". Use '
                "apply_lotr for it."
            )
        check_choice("bias", self.bias, ("none", "all", "lotr_only"))
        # Checks the fields that both configurations have.
        checked = self.to_lotr()
        self.rank = self.r = checked.rank  # a tuple, also of the list that JSON has
        self.train = list(checked.train)
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple)):
                setattr(self, name, set(value))  # as PEFT's configurations have it
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError(
                f"layers_to_transform: expected None with a regular expression, got "
                f"{self.layers_to_transform!r}. Give names as target_modules, or put the layers "
                f"into the expression."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"layers_pattern: expected layers_to_transform with it, got only "
                f"{self.layers_pattern!r}"
            )

    def to_lotr(self) -> LoTRConfig:
        """Returns the same settings for `apply_lotr`, without targets and modules_to_save."""
        return LoTRConfig(
            rank=self.rank,
            alpha=self.alpha,
            rslora=self.rslora,
            scaling=self.scaling,
            dropout=self.dropout,
            group_by=self.group_by,
            init=self.init,
            core_init=self.core_init,
            core=self.core,
            train=self.train,
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns what PEFT saves, with the scaling as a number.

        What "auto" means may change, but not what a saved adapter computes.
        """
        return {**super().to_dict(), "scaling": self.to_lotr().s, "alpha": None, "rslora": False}

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> PeftConfig:
        """Returns the configuration in a file, as PEFT's method does. Also reads version 1.

        Raises:
            TypeError, ValueError: If the file has a setting that this version lacks, or a wrong
                value.
        """
        # Only version 1 saved None or "auto", which had other meanings. Later files have a number,
        # see `to_dict`.
        if kwargs.get("scaling") in (None, "auto"):
            values = {**kwargs, "rank": kwargs.get("rank") or 16}
            kwargs["scaling"] = config_of_version_1(values)["scaling"]
        # In version 1, several adapters could share one A and B. Each file has both, so the setting
        # is not needed.
        kwargs.pop("share_factors", None)
        return super().from_peft_type(**_without_removed_fields(kwargs))


def _without_removed_fields(values: dict[str, Any]) -> dict[str, Any]:
    # PEFT's base class would drop them with a warning. A field with a value stays, and raises.
    return {name: value for name, value in values.items() if value or name not in _REMOVED_FIELDS}
