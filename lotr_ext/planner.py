"""`lotr_ext.ops.planner` under its documented path."""

from .ops.planner import *  # noqa: F403
