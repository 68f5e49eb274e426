"""LoTRPeftConfig: a LoTRConfig in the form that PEFT stores and reads. Imported by `lotr_ext.interop.peft`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft.config import PeftConfig

from ..files import put_file
from ..layers.cores import FORMS
from ..model.config import LoTRConfig, check_names
from ..model.peft_files import SAME

DEFAULT_RANK = LoTRConfig().rank
_BIASES = ("none", "all", "lotr_only")
_LOADING = """## Loading

LoTR is a method of the package lotr_ext. Import it before PEFT reads this folder; else PEFT raises `KeyError: 'LOTR'`.

```python
import lotr_ext.interop.peft
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path/of/this/folder")
```
"""


class _PeftType(str):
    """A string that replaces a member of PEFT's enum: it prints like one, and has a value."""

    __slots__ = ()

    def __str__(self) -> str:
        return f"PeftType.{self.value}"

    @property
    def value(self) -> str:
        return str.__str__(self)


LOTR = _PeftType("LOTR")


@dataclass
class LoTRPeftConfig(PeftConfig):
    """What to adapt and how, for `peft.get_peft_model`. Checked at construction.

    Attributes:
        rank, or r as PEFT's other methods call it: 16 if neither is given; afterwards r equals rank.
        alpha, rslora, scaling, dropout, group_by, init, core, core_init, train, magnitude: as in `lotr_ext.LoTRConfig`;
            group_by is no callable (it cannot be saved), and init not "svd" (it changes the base weights, which other adapters
            share) or "gradient" (which needs batches).
        target_modules, exclude_modules, layers_to_transform, layers_pattern, modules_to_save: as in `peft.LoraConfig`. None
            for target_modules: PEFT's default for LoRA and the model's type; with target_parameters no module.
        target_parameters: as in `lotr_ext.LoTRConfig`, the 3-D parameters of a transformers mixture's experts.
        use_dora: PEFT's name for magnitude; either may be given.
        share_factors: the adapter of the model whose A and B this one uses. This one then owns only cores (and magnitudes), and
            by default trains only those. Its files still contain A and B. The first adapter of a model owns its factors.
        layers: the adapted layers, which PEFT saves with the adapter for `lotr_ext.load_adapter`; not to be given.
        bias: "none", "all", or "lotr_only" to train the adapted layers' biases.

    Raises:
        TypeError, ValueError: a field of the wrong type or value.
    """

    rank: int | tuple[int, int] | None = field(default=None, metadata={"help": "r, or (r_in, r_out); None: r"})
    alpha: float | None = field(default=None, metadata={"help": "the adapter is scaled by alpha / r; None: alpha = r"})
    rslora: bool = field(default=False, metadata={"help": "scale by alpha / sqrt(r)"})
    scaling: float | str | None = field(default=None, metadata={"help": "the scaling itself, or auto, instead of alpha"})
    dropout: float = field(default=0.0, metadata={"help": "on the adapter's x"})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "names or a regular expression"})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "names or a regular expression"})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "indices of layers to adapt"})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "the name before a layer's index"})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "modules to be trained whole and saved"})
    bias: str = field(default="none", metadata={"help": "none, all or lotr_only"})
    group_by: str | dict[str, str] = field(default="shape", metadata={"help": "which layers share A and B"})
    init: str = field(default="orthonormal", metadata={"help": "how A and B start"})
    core_init: str = field(default="zero", metadata={"help": "how the cores start"})
    core: str = field(default="dense", metadata={"help": "one core per layer, or how all are made of fewer numbers"})
    train: list[str] | None = field(
        default=None, metadata={"help": "which parts are trained; None: all that it does not share"}
    )
    target_parameters: list[str] | None = field(default=None, metadata={"help": "3-D parameters of experts"})
    layers: list[dict[str, Any]] | None = field(default=None, metadata={"help": "written when layers are adapted"})
    share_factors: str | None = field(default=None, metadata={"help": "the adapter whose A and B it uses"})
    magnitude: bool = field(default=False, metadata={"help": "a trained length of each row (DoRA)"})
    use_dora: bool = field(default=False, metadata={"help": "another name for magnitude"})
    r: int | tuple[int, int] | None = field(default=None, metadata={"help": "another name for rank; None: rank, 16 by default"})

    def __new__(cls, *_: Any, **given: Any) -> LoTRPeftConfig:
        check_names((name for name in given if name not in ("r", "use_dora")), "LoTRPeftConfig")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = LOTR
        if self.init == "svd":
            raise ValueError('init: expected one that does not change the base weights, got "svd"; use apply_lotr for it')
        if self.init == "gradient":
            raise ValueError('init: expected one that needs no batches, got "gradient"; use apply_lotr for it')
        if callable(self.group_by):
            raise ValueError("group_by: expected a name or a mapping, got a callable, which cannot be saved")
        if not isinstance(self.core, str) or self.core == "custom":
            raise ValueError(f"core: expected one of {', '.join(('dense', *FORMS))}, got {self.core!r}, which cannot be saved")
        if self.bias not in _BIASES:
            raise ValueError(f"bias: expected one of {', '.join(_BIASES)}, got {self.bias!r}")
        ranks = [tuple(given) if isinstance(given, list) else given for given in (self.rank, self.r) if given is not None]
        if len(set(ranks)) > 1:
            raise ValueError(f"r: expected rank = {self.rank!r}, or one of them alone, got {self.r!r}")
        self.rank = ranks[0] if ranks else DEFAULT_RANK
        if self.share_factors is not None and not isinstance(self.share_factors, str):
            raise TypeError(f"share_factors: expected the name of an adapter or None, got {self.share_factors!r}")
        self.magnitude = self.use_dora = self.magnitude or self.use_dora
        if self.train is None:
            own = ["core", "magnitude"] if self.magnitude else ["core"]
            self.train = ["A", "B", *own] if self.share_factors is None else own
        checked = self.to_lotr(target_parameters=self.target_parameters)
        self.rank, self.train = checked.rank, list(checked.train)
        self.r = self.rank
        for name in ("target_modules", "exclude_modules"):
            if isinstance(value := getattr(self, name), list):
                setattr(self, name, set(value))
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError("layers_to_transform: expected None where target_modules is a regular expression, got "
                             f"{self.layers_to_transform!r}")  # fmt: skip
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(f"layers_pattern: expected it with layers_to_transform, got {self.layers_pattern!r} alone")

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As PEFT's; the model card names the import that loading the adapter needs."""
        super().save_pretrained(save_directory, **kwargs)
        for card in (Path(save_directory) / "README.md", Path(save_directory).parent / "README.md"):
            if card.is_file() and "library_name: peft" in (text := card.read_text(encoding="utf-8")):
                if _LOADING.rstrip() not in text:
                    put_file(card.parent, card.name, f"{text.rstrip()}\n\n{_LOADING}".encode())
                return

    def to_lotr(self, target_modules: str | None = None, target_parameters: list[str] | None = None) -> LoTRConfig:
        """The same settings for `apply_lotr`, with targets as given and without modules_to_save."""
        targets = {"target_modules": target_modules, "target_parameters": target_parameters}
        return LoTRConfig(**targets, **{name: getattr(self, name) for name in SAME})
