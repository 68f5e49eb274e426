"""sentence-transformers' module around a transformers model, which loads the adapter that lies beside the weights too.

`modules.json` of a saved SentenceTransformer names the class of each module. It names this one where the model is adapted, and
`SentenceTransformer(folder, trust_remote_code=True)` imports it: the package asks for that flag before any class but its own.
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
    """sentence-transformers' Transformer, whose `load` puts the adapter that lies beside the weights onto the model."""

    @classmethod
    def load(cls, model_name_or_path: str, subfolder: str = "", **kwargs: Any) -> Transformer:
        """As the class of sentence-transformers; then the adapter. Raises as `lotr_ext.from_pretrained`."""
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
        """As the class of sentence-transformers; without an adapter the module is of that class again."""
        if not any(isinstance(m, LoTRLayer) for m in self.modules()):
            self.__class__ = Plain
        Plain.save(self, output_path, *args, **kwargs)


def load_with_adapter(module: nn.Module) -> None:
    """Makes a module that holds an adapted model one that loads its adapter."""
    if type(module) is Plain:
        module.__class__ = Transformer
    elif not isinstance(module, Transformer):
        warnings.warn(
            f"lotr_ext: SentenceTransformer(folder) will load this {type(module).__name__} without its adapter; call "
            "load_adapter(model, folder) after it",
            stacklevel=5,
        )
