"""The correct results of a rival in float64, and the memory that it keeps."""

from __future__ import annotations

import torch
from torch import Tensor

from ..measure.shapes import Case
from .base import LORA, LOTR, SCALING, VERA, Rival, Tensors

# Relative error (Frobenius) a rival may have against float64, per dtype; the factors and products round at each step.
TOLERANCE = {"fp32": 1e-5, "bf16": 1.5e-2, "fp16": 2e-3}


def adapter(x: Tensor, t: Tensors, values: dict[str, Tensor]) -> Tensor:
    """The output that a rival adds to the frozen layer, by the names of its parameters.

    LoRA   s x A B^T        LoTR   s x A G B^T        VeRA   b * (((x A) * d) B^T)
    """
    names = tuple(sorted(values))
    if names == VERA:
        return values["b"] * (((x @ t.A.double()) * values["d"]) @ t.B.double().T)
    u = x @ values["A"]
    if names == tuple(sorted(LOTR)):
        return SCALING * ((u @ values["core"]) @ values["B"].T)
    if names == tuple(sorted(LORA)):
        return SCALING * (u @ values["B"].T)
    raise ValueError(f"parameters: expected those of LoRA, LoTR or VeRA, got {', '.join(names)}")


class Truth:
    """A case in float64: the frozen layer's y and dx are computed once, each rival's part on demand."""

    def __init__(self, t: Tensors, case: Case, x: Tensor, g: Tensor):
        self.t, self.case, self.x, self.g = t, case, x, g
        weight = t.weight.double()
        self.y = x.double() @ weight.T
        self.y += 0 if t.bias is None else t.bias.double()
        self.dx = g.double() @ weight

    def of(self, rival: Rival) -> dict[str, Tensor]:
        """y, dx and the gradients of the parameters, by name."""
        if not rival.parameters:
            return {"y": self.y, "dx": self.dx}
        x = self.x.double().requires_grad_()
        values = {
            n: (p.T if transposed else p).detach().double().requires_grad_() for n, (p, transposed) in rival.parameters.items()
        }
        magnitude = values.pop("magnitude", None)
        delta = adapter(x, self.t, values)
        if magnitude is not None:
            return self._with_magnitude(x, delta, values, magnitude)
        delta.backward(self.g.double())
        return {"y": self.y + delta.detach(), "dx": self.dx + x.grad} | {f"d{n}": v.grad for n, v in values.items()}

    def _with_magnitude(self, x: Tensor, delta: Tensor, values: dict[str, Tensor], magnitude: Tensor) -> dict[str, Tensor]:
        """y = bias + (m / c) (x W^T + delta), c the lengths of the rows of W with the adapter, constant for gradients."""
        weight, bias = self.t.weight.double(), 0 if self.t.bias is None else self.t.bias.double()
        with torch.no_grad():
            columns = weight.T + adapter(torch.eye(weight.shape[1], dtype=x.dtype, device=x.device), self.t, values)
        y = bias + (magnitude / columns.norm(dim=0)) * (x @ weight.T + delta)
        y.backward(self.g.double())
        return {"y": y.detach(), "dx": x.grad} | {f"d{n}": v.grad for n, v in (values | {"magnitude": magnitude}).items()}


def check(rival: Rival, truth: Truth) -> float:
    """The largest relative error of y, dx and the parameters' gradients against float64. Raises ValueError above TOLERANCE."""
    case = truth.case
    leaf = truth.x.detach().clone().requires_grad_()
    for parameter, _ in rival.parameters.values():
        parameter.grad = None
    y = rival.layer(leaf)
    y.backward(truth.g)
    found = {"y": y.detach(), "dx": leaf.grad}
    for name, (parameter, transposed) in rival.parameters.items():
        found[f"d{name}"] = parameter.grad.T if transposed else parameter.grad
    worst, limit = 0.0, TOLERANCE[case.dtype]
    for name, expected in truth.of(rival).items():
        error = ((found[name].double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()
        if not error <= limit:
            raise ValueError(f"{rival.name}, {case.name()}: {name}: relative error expected <= {limit}, got {error:.2e}")
        worst = max(worst, error)
    return worst


def saved_bytes(rival: Rival, t: Tensors, x: Tensor) -> int:
    """Bytes that a forward keeps alive for backward: storages saved in the graph, without parameters and base weights."""
    own = {p.untyped_storage().data_ptr() for p, _ in rival.parameters.values()}
    own |= {v.untyped_storage().data_ptr() for v in (*vars(t).values(), *rival.frozen) if v is not None}
    kept: dict[int, int] = {}

    def pack(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        y = rival.layer(x.detach().requires_grad_())
    del y
    return sum(kept.values())
