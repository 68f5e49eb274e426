"""Adapters into whole models and out of them: targets, merging, named adapters, files."""
