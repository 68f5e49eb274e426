"""A subclass of sentence-transformers' Transformer that also loads the adapter beside the weights.

`modules.json` of a saved SentenceTransformer names the class of each module. For an adapted model it names this class, and
`SentenceTransformer(folder, trust_remote_code=True)` imports it: the package requires that flag for classes of other packages.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from sentence_transformers.sentence_transformer.modules import Transformer as Plain
from sentence_transformers.util import load_dir_path
from torch import nn

from ..layers.layer import LoTRLayer
from .adapter_files import JSON_NAME
from .pretrained import key_mapping, put_on

__all__ = ["Transformer", "load_with_adapter"]


class Transformer(Plain):
    """sentence-transformers' Transformer, whose `load` also loads the adapter beside the weights."""

    @classmethod
    def load(cls, model_name_or_path: str, subfolder: str = "", **kwargs: Any) -> Transformer:
        """Loads as the base class does, then loads the adapter. Raises as `lotr_ext.from_pretrained`."""
        where = {key: kwargs[key] for key in ("token", "cache_folder", "revision", "local_files_only") if key in kwargs}
        found = load_dir_path(model_name_or_path, subfolder, **where)
        if found is None or not Path(found, JSON_NAME).is_file():
            return super().load(model_name_or_path, subfolder=subfolder, **kwargs)
        folder, given = Path(found), kwargs.get("model_kwargs") or {}
        kwargs["model_kwargs"] = key_mapping(folder, given)
        module = super().load(model_name_or_path, subfolder=subfolder, **kwargs)
        put_on(module.auto_model, folder)
        return module

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Saves as the base class does. Without an adapter, the module becomes one of the base class again."""
        if not any(isinstance(m, LoTRLayer) for m in self.modules()):
            self.__class__ = Plain
        Plain.save(self, output_path, *args, **kwargs)


def load_with_adapter(module: nn.Module) -> None:
    """Changes the class of a module with an adapted model, so that loading it also loads the adapter."""
    if type(module) is Plain:
        module.__class__ = Transformer
    elif not isinstance(module, Transformer):
        warnings.warn(
            f"lotr_ext: SentenceTransformer(folder) will load this {type(module).__name__} without its adapter; call "
            "load_adapter(model, folder) afterwards",
            stacklevel=5,
        )
