"""Whole models, adapted and merged, as torch.jit.trace, AOTInductor and ONNX run them: the numbers of the model itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
import torch
from torch import Tensor, nn
from toys import randomize

from lotr_ext import LoTRConfig, apply_lotr, merge

pytestmark = pytest.mark.filterwarnings("ignore")
IDS = torch.randint(3, 67, (2, 10), generator=torch.Generator().manual_seed(1))
OTHERS = torch.randint(3, 67, (3, 40), generator=torch.Generator().manual_seed(2))
SHAPES = ({0: torch.export.Dim("rows", max=64), 1: torch.export.Dim("columns", max=64)},)


class Logits(nn.Module):
    """A transformers model from token ids to logits alone."""

    def __init__(self, model: nn.Module, **options: bool):
        super().__init__()
        self.model, self.options = model, options

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, **self.options).logits


MODELS: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: Logits(apply_lotr(tiny_models.bert(), LoTRConfig(rank=4, target_modules=["query", "value"]))),
    "llama": lambda: Logits(
        apply_lotr(tiny_models.llama(), LoTRConfig(rank=4, target_modules="all-linear", magnitude=True)), use_cache=False
    ),
}


def traced(model: nn.Module, _: Path) -> Callable[[Tensor], Tensor]:
    return torch.jit.trace(model, (IDS,))


def compiled(model: nn.Module, folder: Path) -> Callable[[Tensor], Tensor]:
    exported = torch.export.export(model, (IDS,), dynamic_shapes=SHAPES)
    path = torch._inductor.aoti_compile_and_package(exported, package_path=str(folder / "model.pt2"))
    return torch._inductor.aoti_load_package(path)


def onnx(model: nn.Module, folder: Path) -> Callable[[Tensor], Tensor]:
    pytest.importorskip("onnxscript", reason="onnxscript, which torch.onnx.export needs, is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    torch.onnx.export(model, (IDS,), folder / "model.onnx", input_names=["ids"], dynamic_shapes=SHAPES, verbose=False)
    session = runtime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    return lambda ids: torch.from_numpy(session.run(None, {"ids": ids.numpy()})[0])


CASES = [
    (traced, "bert"),
    (traced, "llama"),
    pytest.param(compiled, "bert", marks=pytest.mark.full),  # minutes of a C++ compiler
    pytest.param(onnx, "bert", marks=pytest.mark.full),
    pytest.param(onnx, "llama", marks=pytest.mark.full),
]


@pytest.mark.parametrize(("way", "kind"), CASES)
def test_an_exported_model_computes_the_same(way: Callable, kind: str, tmp_path: Path) -> None:
    model = MODELS[kind]().eval()
    randomize(model)
    with torch.no_grad():
        want = [model(IDS), model(OTHERS)]
        plain = MODELS[kind]().eval()(IDS)
        assert (want[0] - plain).abs().max() > 1e-2
        for merged in (False, True):
            if merged:
                merge(model.model)
            run = way(model, tmp_path)
            for ids, values in zip((IDS, OTHERS), want):
                torch.testing.assert_close(run(ids), values, rtol=1e-4, atol=1e-5)


def test_a_block_or_a_layer_is_exported_alone() -> None:
    """The factors are parameters of the model around them."""
    model = MODELS["bert"]().eval()
    randomize(model)
    attention, x = model.model.bert.encoder.layer[0].attention.self, torch.randn(2, 5, 32)
    for part, run in ((attention, lambda y: y[0]), (attention.query, lambda y: y)):
        got, want = run(torch.export.export(part, (x,)).module()(x)), run(part(x))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
