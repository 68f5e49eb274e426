"""Bytes that kernels and layers move, counted without a GPU, and what they would take on one."""
