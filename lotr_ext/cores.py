"""Cores made of fewer numbers, shared over layers (`lotr_ext.layers.cores`)."""

from .layers.cores import FORMS, CoreAt, Cores, CPCores, DiagonalCores, FewCores, TrainCores, TuckerCores

__all__ = ["FORMS", "CPCores", "CoreAt", "Cores", "DiagonalCores", "FewCores", "TrainCores", "TuckerCores"]
