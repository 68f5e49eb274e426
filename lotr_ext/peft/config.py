"""LoTRPeftConfig: what `peft.get_peft_model` adapts and how, and its file."""

import re
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import peft
from peft.config import PeftConfig

from ..checks import check_choice
from ..config import LoTRConfig, check_names
from ..old_files import config_of_version_1

if tuple(map(int, re.findall(r"\d+", peft.__version__)[:2])) < (0, 21):
    raise ImportError(
        f"lotr_ext.peft: expected PEFT 0.21 or later, got {peft.__version__}. Run pip install -U "
        f"peft."
    )


class PeftType(str, Enum):
    """Stands next to PEFT's enum of this name, which is closed, and prints as its members do."""

    LOTR = "LOTR"


LOTR = PeftType.LOTR

# Fields of the first version that a file may have, and that this version lacks.
_FORMER = ("magnitude", "use_dora", "target_parameters")
# Fields that LoTRConfig has, too.
_SHARED = (
    "rank",
    "alpha",
    "rslora",
    "scaling",
    "dropout",
    "group_by",
    "init",
    "core_init",
    "core",
    "train",
)


@dataclass
class LoTRPeftConfig(PeftConfig):
    """What to adapt and how, for `peft.get_peft_model`. Checked when it is made.

    Attributes:
        rank: An int or (r_in, r_out), 16 if neither rank nor r is given.
        r: The name that PEFT's other methods have for rank. Equal to it.
        alpha: As in `lotr_ext.LoTRConfig`, as are rslora, scaling, dropout, group_by, init, core,
            core_init and train. A saved configuration has the scaling as a number. group_by cannot
            be a callable, which cannot be saved, and init cannot be "svd", which changes the base
            weights that PEFT's adapters share.
        target_modules: As in `peft.LoraConfig`, as are exclude_modules, layers_to_transform,
            layers_pattern and modules_to_save. None selects PEFT's default for LoRA and the type of
            the model.
        bias: "none", "all", or "lotr_only" to train the biases of adapted layers.
        layers: The adapted layers with the names of their factors. Set when layers are adapted.

    Raises:
        TypeError, ValueError: If a field has a wrong type or value.
    """

    rank: int | tuple[int, int] | None = field(
        default=None, metadata={"help": "r, or (r_in, r_out); None: r"}
    )
    alpha: float | None = field(
        default=None, metadata={"help": "the adapter is scaled by alpha / r"}
    )
    rslora: bool = field(default=False, metadata={"help": "scale by alpha / sqrt(r)"})
    scaling: float | str = field(
        default="auto", metadata={"help": "the scaling itself, or auto, instead of alpha"}
    )
    dropout: float = field(default=0.0, metadata={"help": "on the adapter's x"})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "names or a regular expression"}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "names or a regular expression"}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "indices of layers to adapt"}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "the name before a layer's index"}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "modules to train fully and to save"}
    )
    bias: str = field(default="none", metadata={"help": "none, all or lotr_only"})
    group_by: str | dict[str, str] = field(
        default="shape", metadata={"help": "which layers share A and B"}
    )
    init: str = field(default="orthonormal", metadata={"help": "how A and B start"})
    core_init: str = field(default="zero", metadata={"help": "how the cores start"})
    core: str = field(
        default="dense",
        metadata={"help": "one core per layer, or the form that computes all of them"},
    )
    train: list[str] = field(
        default_factory=lambda: ["A", "B", "core"], metadata={"help": "which parts are trained"}
    )
    layers: list[dict[str, Any]] | None = field(
        default=None, metadata={"help": "set when layers are adapted"}
    )
    r: int | tuple[int, int] | None = field(
        default=None, metadata={"help": "another name for rank"}
    )

    def __new__(cls, *_: Any, **values: Any) -> "LoTRPeftConfig":
        # What an old file has and this class lacks is dropped by PEFT, with a warning.
        check_names((n for n, value in values.items() if value or n not in _FORMER), cls)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = LOTR
        if self.rank is None:
            self.rank = 16 if self.r is None else self.r
        if self.r not in (None, self.rank):
            raise ValueError(f"r: expected rank = {self.rank!r}, or only one, got {self.r!r}")
        if callable(self.group_by) or callable(self.core) or self.core == "custom":
            raise ValueError(
                f"group_by, core: expected what can be saved, got {self.group_by!r}, {self.core!r}"
            )
        if self.init == "svd":
            raise ValueError(
                'init: expected one that does not change the base weights, got "svd". Use '
                "apply_lotr for it."
            )
        check_choice("bias", self.bias, ("none", "all", "lotr_only"))
        # Checks the fields that both configurations have.
        checked = self.to_lotr()
        self.rank = checked.rank  # a pair is a list in JSON
        self.r = checked.rank
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
        return LoTRConfig(**{name: getattr(self, name) for name in _SHARED})

    def to_dict(self) -> dict[str, Any]:
        """Returns what PEFT saves, with the scaling as a number.

        What "auto" means may change, but not what a saved adapter computes.
        """
        return {**super().to_dict(), "scaling": self.to_lotr().s, "alpha": None, "rslora": False}

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> PeftConfig:
        """Returns the configuration of a file, as PEFT's method does, also of the first version.

        Raises:
            TypeError: If the file has a setting that this version lacks.
        """
        # Version 1 saved None or "auto", with other meanings. Now it is a number, see `to_dict`.
        if kwargs.get("scaling") in (None, "auto"):
            values = {**kwargs, "rank": kwargs.get("rank") or 16}
            kwargs["scaling"] = config_of_version_1(values)["scaling"]
        kwargs.pop("share_factors", None)  # such a file contains A and B
        kwargs = {name: value for name, value in kwargs.items() if value or name not in _FORMER}
        return super().from_peft_type(**kwargs)
