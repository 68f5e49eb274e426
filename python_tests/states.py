"""A model with two adapters that are also tasks, and what it computes by the definition in each state of a request."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from toys import randomize

from lotr_ext import LoTRConfig, TaskBank, add_adapter, apply_lotr, disabled, mixed
from nets import relative

ROWS, TOKENS, D, LAYERS = 4, 3, 8, 2
# a state: the task or adapter of each row, the tasks of each row's tokens, "off", or None for the active adapter
NAMES = {0: "default", 1: "fr", -1: None}


class Net(nn.Module):
    """x [rows, tokens, D] -> [rows, tokens, D]. run: how a layer is called."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(LAYERS))
        self.run: Callable[[nn.Module, Tensor], Tensor] = lambda layer, x: layer(x)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(self.run(layer, x))
        return x


class World:
    """An adapted model whose adapters "default" and "fr" are also tasks 0 and 1, and what it computes by the definition.

    before: what each layer's input goes through."""

    def __init__(self, *, by_index: bool = False, before: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        torch.manual_seed(0)
        self.before = before
        self.model = apply_lotr(Net().double(), LoTRConfig(rank=4, alpha=2.0, target_modules=r"layers\.\d+"))
        self.model.double()
        randomize(self.model, std=0.5)
        add_adapter(self.model, "fr", share_factors="default")
        with torch.no_grad():
            for core in self.model.lotr_parked["fr"].cores:
                core.normal_()
        self.by_index, layers = by_index, self.layers
        self.cores = [[layer.core for layer in layers], list(self.model.lotr_parked["fr"].cores)]
        self.bank = TaskBank(self.model, 2).requires_grad_()
        for cores in self.cores:
            self.bank.add({f"layers.{i}.core": core.detach() for i, core in enumerate(cores)})
        self.x = torch.randn(ROWS, TOKENS, D, dtype=torch.float64)

    @property
    def layers(self) -> list[nn.Module]:
        return list(self.model.layers)

    def open(self, state: object) -> contextlib.AbstractContextManager:
        if state is None:
            return contextlib.nullcontext()
        if state == "off":
            return disabled(self.model)
        by_index = self.by_index or isinstance(state[0], list)
        return mixed(self.model, torch.tensor(state) if by_index else [NAMES[task] for task in state])

    def truth(self, state: object, x: Tensor | None = None) -> Tensor:
        """state: that of all layers, or a dictionary of each one's."""
        x, factors = self.x if x is None else x, self.model.lotr_factors[f"{D}x{D}"]
        none = torch.zeros(4, 4, dtype=torch.float64)
        for i, layer in enumerate(self.layers):
            own, x = state[i] if isinstance(state, dict) else state, self.before(x)
            index = torch.tensor([-1] * ROWS if own == "off" else [0] * ROWS if own is None else own)
            cores = torch.stack([*(cores[i] for cores in self.cores), none])[index.view(ROWS, -1)]  # -1: the last
            h = ((x @ factors.A).unsqueeze(-2) @ cores).squeeze(-2)
            x = torch.tanh(x @ layer.weight.T + layer.bias + layer.scaling * (h @ factors.B.T))
        return x

    def check(self, state: object, x: Tensor | None = None) -> None:
        got = self.model(self.x if x is None else x)
        assert relative(got, self.truth(state, x)) < 1e-9, state

    def gradients(self, y: Tensor, x: Tensor) -> list[Tensor]:
        """Of x and all that the adapters have: "default" by its name, and as task 0."""
        y.square().sum().backward()
        found = []
        for own, core in zip(self.cores[0], self.bank.cores, strict=True):
            if core.grad is not None:
                own.grad = core.grad[0] if own.grad is None else own.grad + core.grad[0]
                core.grad = None
        for t in (x, *self.model.lotr_factors.parameters(), *self.cores[0]):
            found.append(torch.zeros_like(t) if t.grad is None else t.grad)
            t.grad = None
        return found

    def check_gradients(self, y: Tensor, x: Tensor, state: object) -> None:
        like = x.detach().clone().requires_grad_()
        want = self.gradients(self.truth(state, like), like)
        for got, true in zip(self.gradients(y, x), want, strict=True):
            assert (got - true).norm() <= 1e-9 * max(1.0, true.norm().item()), state


BY_TOKEN = [[0, 1, -1], [-1, -1, 1], [0, 0, 0], [1, -1, 0]]
STATES = {"disabled": ["off", "off"], "mixed": [[0, 1, -1, 1], [1, 1, 0, -1]], "by token": [BY_TOKEN, BY_TOKEN[::-1]]}
