"""Export to ONNX by TorchScript: adapted layers become products that any runtime has, with the same numbers."""

from __future__ import annotations

import io
import warnings

import pytest
import torch
from torch import nn

from lotr_ext import LoTRConfig, LoTRConv1D, LoTRFactors, LoTRLinear, LoTRWrapped, add_adapter, apply_lotr, mixed

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")


def exported(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What the exported graph computes of x, by onnx's own evaluator."""
    from onnx.reference import ReferenceEvaluator

    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model.eval(), (x,), file, dynamo=False, input_names=["x"])
    (y,) = ReferenceEvaluator(onnx.load_from_string(file.getvalue())).run(None, {"x": x.numpy()})
    return torch.from_numpy(y)


def filled(model: nn.Module) -> nn.Module:
    """Cores start at zero, where nothing of the adapter could be seen."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "core" in name:
                p.normal_()
    return model


class OwnLinear(nn.Linear):
    """A base that only its own forward knows, so that it is wrapped."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).tanh()


def conv1d() -> nn.Module:
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    return LoTRConv1D.from_linear(pytorch_utils.Conv1D(7, 8), LoTRFactors(8, 7, 3))


MODELS = {
    "linear": lambda: LoTRLinear(8, 7, 3),
    "no bias": lambda: LoTRLinear(8, 7, (3, 2), bias=False),
    "conv1d": conv1d,
    "wrapped": lambda: LoTRWrapped.from_linear(OwnLinear(8, 7), LoTRFactors(8, 7, 3)),
    "model": lambda: apply_lotr(
        nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 5)),
        LoTRConfig(rank=3, target_modules="all-linear"),
    ),
}


@pytest.mark.parametrize("tokens", [4, 200])  # the unfolded form, and the folded one
@pytest.mark.parametrize("kind", MODELS)
def test_the_exported_graph_computes_the_same(kind: str, tokens: int) -> None:
    model, x = filled(MODELS[kind]()), torch.randn(tokens, 8)
    torch.testing.assert_close(exported(model, x), model(x).detach(), rtol=1e-4, atol=1e-5)


def test_several_adapters_in_one_batch() -> None:
    model = apply_lotr(nn.Sequential(nn.Linear(8, 8)), LoTRConfig(rank=3, target_modules=["0"]))
    add_adapter(model, "other", share_factors="default")
    filled(model)
    x = torch.randn(2, 5, 8)
    with mixed(model, ["default", "other"]):
        torch.testing.assert_close(exported(model, x), model(x).detach(), rtol=1e-4, atol=1e-5)
