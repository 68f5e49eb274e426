"""Tells the saving hook how a sentence-transformers module is made to load the adapter of the model inside it.

`save_hook` is imported by `apply`, and the class that loads an adapter imports `apply`: so the hook has a list of functions, to
which this module, which `lotr_ext` imports, adds one.
"""

from __future__ import annotations

from torch import nn

from . import save_hook
from .stages import is_of_sentence_transformers

__all__ = ["name_loader"]


def name_loader(model: nn.Module, holder: nn.Module) -> None:
    """Changes the class of a sentence-transformers module that holds the adapted `model` to one that loads the adapter: a
    SentenceTransformer writes the class of each module into its folder."""
    if is_of_sentence_transformers(holder) and any(child is model for child in holder.children()):
        from .sentence_transformers import load_with_adapter

        load_with_adapter(holder)


save_hook.of_holders.append(name_loader)
