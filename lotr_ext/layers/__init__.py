"""Adapted layers and the factors that they share, for models built by hand."""
