"""`lotr_ext.model.adapters` under its documented path."""

from .model.adapters import *  # noqa: F403
