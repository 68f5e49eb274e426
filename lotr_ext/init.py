"""`lotr_ext.layers.init` under its documented path."""

from .layers.init import *  # noqa: F403
