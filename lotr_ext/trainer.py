"""`lotr_ext.model.trainer` under its documented path."""

from .model.trainer import *  # noqa: F403
