"""Starts of whole models: from the weights ("svd") and from the gradients (init_from_gradient)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import zoo
from helpers import relative
from models import moved, started
from torch import Tensor, nn

from lotr_ext import (
    LoTRConfig,
    LoTRConv1D,
    apply_lotr,
    disabled,
    init_from_gradient,
    load_adapter,
    lotr_parameters,
    save_adapter,
    unload,
)
from lotr_ext.init import (
    FACTOR_INITS,
    START,
    CapturedGradient,
    fill_core_,
    fill_factor_,
    leading,
    tucker2,
)
from lotr_ext.model import adapted_layers


def stack(count: int, n: int, k: int, r_in: int, r_out: int) -> list[Tensor]:
    """Weights of one Tucker-2 stack of these ranks."""
    A, B = torch.randn(k, r_in, dtype=torch.float64), torch.randn(n, r_out, dtype=torch.float64)
    return [B @ torch.randn(r_out, r_in, dtype=torch.float64) @ A.T for _ in range(count)]


# ---- factors and cores ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("d", "r"), [(40, 6), (6, 40), (5, 5)])
def test_orthonormal_factors(d: int, r: int) -> None:
    found = fill_factor_(torch.empty(d, r, dtype=torch.float64), "orthonormal") / START
    assert relative(found.T @ found if r <= d else found @ found.T, torch.eye(min(d, r))) < 1e-12
    signs = torch.stack(
        [fill_factor_(torch.empty(3, 1), "orthonormal")[0, 0].sign() for _ in range(200)]
    )
    assert 60 < int((signs > 0).sum()) < 140  # uniform: QR alone would give one sign


def test_normal_and_kaiming_factors_and_cores() -> None:
    normal = fill_factor_(torch.empty(400, 50), "normal") / START
    assert abs(float(normal.std()) - 1) < 0.05 and abs(float(normal.mean())) < 0.05
    kaiming = fill_factor_(torch.empty(100, 50), "kaiming") / START
    assert 0.09 < float(kaiming.abs().max()) <= 0.1 and abs(float(kaiming.mean())) < 0.005
    for init in FACTOR_INITS:
        one, two = (
            fill_factor_(torch.empty(8, 2), init, torch.Generator().manual_seed(3))
            for _ in range(2)
        )
        half = fill_factor_(
            torch.empty(8, 2, dtype=torch.bfloat16), init, torch.Generator().manual_seed(3)
        )
        assert torch.equal(one, two) and torch.equal(
            half, one.bfloat16()
        )  # drawn in float32, cast once
    assert torch.equal(fill_core_(torch.ones(2, 2, 3), "identity"), torch.eye(2, 3).expand(2, 2, 3))
    assert not fill_core_(torch.ones(2, 3), "zero").any()


# ---- tucker2 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "k"), [(20, 12), (12, 20), (700, 30), (30, 700)])
def test_factorisation_is_exact_at_the_stack_s_rank(n: int, k: int) -> None:
    weights = stack(3, n, k, 4, 3)
    A, B, cores = tucker2(weights, (4, 3))
    assert relative(A.T @ A, torch.eye(4)) < 1e-10 and relative(B.T @ B, torch.eye(3)) < 1e-10
    assert max(relative(B @ core.T @ A.T, w) for core, w in zip(cores, weights)) < 1e-8


def test_factorisation_is_a_least_squares_optimum() -> None:
    """No better than the SVD for one matrix, and no other pair near it is better for several."""
    w = torch.randn(14, 10, dtype=torch.float64)
    A, B, cores = tucker2([w], (3, 3))
    left, values, right = torch.linalg.svd(w)
    assert relative(B @ cores[0].T @ A.T, (left[:, :3] * values[:3]) @ right[:3]) < 1e-6
    weights = [torch.randn(14, 10, dtype=torch.float64) for _ in range(4)]
    A, B, cores = tucker2(weights, (3, 2))

    def captured(A: Tensor, B: Tensor) -> float:
        return sum(float((A.T @ w.T @ B).square().sum()) for w in weights)

    best = captured(A, B)
    for _ in range(20):
        near_A, near_B = (torch.linalg.qr(t + 0.05 * torch.randn_like(t))[0] for t in (A, B))
        assert captured(near_A, near_B) <= best * (1 + 1e-5)


def test_factorisation_has_converged() -> None:
    """Each factor is the best one for the other. The start (HOSVD) and one step are not enough."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(14, 10, dtype=torch.float64, generator=generator) for _ in range(4)]
    A, B, _ = tucker2(weights, (3, 2))
    best_B = leading([w @ A for w in weights], 2)
    assert relative(B @ (B.T @ best_B), best_B) < 1e-3


def test_factorisation_beyond_the_width() -> None:
    w = torch.randn(3, 5, dtype=torch.float64)
    A, B, cores = tucker2([w], (7, 4))
    assert A.shape == (5, 7) and B.shape == (3, 4) and cores.shape == (1, 7, 4)
    assert relative(B @ cores[0].T @ A.T, w) < 1e-10


def test_leading_directions_of_a_wide_stack() -> None:
    """The subspace iteration and the dense decomposition find the same space."""
    parts = [torch.randn(800, 4, dtype=torch.float64) @ torch.randn(4, 900, dtype=torch.float64)]
    found = leading(parts, 4)
    want = torch.linalg.svd(parts[0], full_matrices=False)[0][:, :4]
    assert relative(found @ (found.T @ want), want) < 1e-8


def test_leading_directions_of_fewer_columns_than_directions() -> None:
    found = leading([torch.randn(20, 2, dtype=torch.float64)], 4)
    assert found.shape == (20, 4)
    assert relative(found.T @ found, torch.eye(4)) < 1e-12


def test_leading_directions_of_close_singular_values() -> None:
    """The iterated block spans the right space at once, but not in the order of the values."""
    generator = torch.Generator().manual_seed(0)

    def orthonormal(rows: int, columns: int) -> Tensor:
        values = torch.randn(rows, columns, dtype=torch.float64, generator=generator)
        return torch.linalg.qr(values)[0]

    left, right = orthonormal(900, 9), orthonormal(800, 9)
    matrix = left * torch.linspace(1.0, 0.8, 9, dtype=torch.float64) @ right.T
    found = leading([matrix], 4)
    assert relative(found @ (found.T @ left[:, :4]), left[:, :4]) < 1e-8


# ---- init "svd" ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "gpt2", "llama"])
def test_svd_moves_the_leading_part_of_the_weights_into_the_adapter(name: str) -> None:
    plain, model = zoo.net(name), started(name, "svd")
    moved_part = left = 0.0
    for at, layer in adapted_layers(model).items():
        before = plain.get_submodule(at).weight.detach()
        delta = (
            layer.delta_weight()
            if layer.weight_matrix() is layer.weight
            else layer.delta_weight().T
        )
        assert relative(layer.weight + delta, before) < 1e-6  # the function is unchanged
        moved_part, left = (
            moved_part + float(delta.square().sum()),
            left + float(layer.weight.detach().square().sum()),
        )
        assert (
            relative(layer.factors.A.value.T @ layer.factors.A.value, START**2 * torch.eye(3))
            < 1e-5
        )
    whole = sum(
        float(plain.get_submodule(at).weight.square().sum()) for at in adapted_layers(model)
    )
    assert abs(moved_part + left - whole) < 1e-3 * whole  # an orthogonal projection
    assert moved_part > 0.15 * whole


def test_svd_start_survives_files_and_unload(tmp_path: Path) -> None:
    x, plain = zoo.inputs("mlp"), zoo.net("mlp")
    model = moved(started("mlp", "svd"))
    y = model(x)
    save_adapter(model, tmp_path)
    fresh = load_adapter(zoo.net("mlp"), tmp_path)
    assert torch.equal(fresh(x), y)
    for other in (
        started("mlp"),
        moved(started("mlp", "svd", rank=3, scaling=0.7), 3),
    ):  # another start is given back first
        load_adapter(other, tmp_path)
        assert relative(other(x), y) < 1e-6
        with disabled(other):
            assert relative(other(x), plain(x)) < 1e-6
        unload(other)
        assert relative(other(x), plain(x)) < 1e-6
    started_plain = moved(started("mlp"))
    save_adapter(started_plain, tmp_path)
    load_adapter(model, tmp_path)  # a file without a start: the weights are the base model's again
    assert relative(model(x), started_plain(x)) < 1e-6
    assert all(layer.start_core is None for layer in adapted_layers(model).values())


# ---- from the gradient -----------------------------------------------------------------------------------------------


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return zoo.output(model, x).square().mean()


@pytest.mark.parametrize("name", ["mlp", "attention", "gpt2"])
@pytest.mark.parametrize("way", ["shape", "width"])
def test_factors_span_the_leading_directions_of_the_gradients(name: str, way: str) -> None:
    model, batches = started(name, way), [zoo.inputs(name), zoo.inputs(name, rows=2).flip(0)]
    plain = zoo.net(name)
    sum(loss_of(plain, x) for x in batches).backward()
    before = zoo.output(model, batches[0])
    captured = init_from_gradient(model, batches, loss_of)
    assert torch.equal(zoo.output(model, batches[0]), before)
    sides: dict[nn.Module, list[Tensor]] = {}
    for at, layer in adapted_layers(model).items():
        g = plain.get_submodule(at).weight.grad.double()
        g = g if layer.weight_matrix() is layer.weight else g.T  # [n, k]
        sides.setdefault(layer.factors.A, []).append(g.T)
        sides.setdefault(layer.factors.B, []).append(g)
    check_captured(model, plain, captured)
    for factor, parts in sides.items():
        value = factor.value.detach().double() / START
        assert relative(value.T @ value, torch.eye(factor.rank)) < 1e-5
        whole = torch.cat(parts, 1)
        captured = float((value.T @ whole).norm())
        best = float(torch.linalg.svdvals(whole)[: factor.rank].norm())
        assert captured > 0.97 * best, (captured, best)


def check_captured(model: nn.Module, plain: nn.Module, captured: CapturedGradient) -> None:
    """The reported shares are |B^T dW A|^2 / |dW|^2. What is not captured is estimated."""
    captured_sum = norm_sum = 0.0
    layers = adapted_layers(model)
    assert list(captured.layers) == list(layers)
    for name, layer in layers.items():
        gradient = plain.get_submodule(name).weight.grad.double()
        if isinstance(layer, LoTRConv1D):
            gradient = gradient.T
        A, B = (factor.value.detach().double() / START for factor in layer.factors.children())
        projected = float((B.T @ gradient @ A).square().sum())
        norm = float(gradient.square().sum())
        captured_sum += projected
        norm_sum += norm
        tolerance = 0.02 + 0.3 * (1 - projected / norm)
        assert captured.layers[name] == pytest.approx(projected / norm, abs=tolerance)
    assert captured.total == pytest.approx(captured_sum / norm_sum, abs=0.1)
    assert 0 < captured.total <= 1


def test_a_full_rank_captures_all_gradients() -> None:
    model = started("mlp", rank=64)
    captured = init_from_gradient(model, [zoo.inputs("mlp")], loss_of)
    assert captured.total == pytest.approx(1)
    assert all(share == pytest.approx(1) for share in captured.layers.values())


def test_the_gradient_start_changes_nothing_else() -> None:
    class WithState(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.norm, self.drop = zoo.net("mlp"), nn.BatchNorm1d(3), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.drop(self.norm(self.net(x).flatten(0, 1)))

    model = apply_lotr(
        WithState().train(),
        LoTRConfig(rank=2, target_modules=["up", "down"], modules_to_save=["norm"]),
    )
    x, state, random = (
        zoo.inputs("mlp"),
        {n: t.clone() for n, t in model.state_dict().items()},
        torch.get_rng_state(),
    )
    flags = [p.requires_grad for p in model.parameters()]
    init_from_gradient(model, [x], lambda m, b: m(b).square().sum())
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, state[n])}
    assert changed == {f"lotr_factors.{i}.value" for i in range(4)}
    assert torch.equal(torch.get_rng_state(), random) and flags == [
        p.requires_grad for p in model.parameters()
    ]
    assert all(p.grad is None for p in model.parameters())


def test_a_failing_loss_leaves_the_factors() -> None:
    model, x = started("mlp"), zoo.inputs("mlp")
    before = [p.detach().clone() for p in lotr_parameters(model)]
    for bad in (
        lambda m, b: m(b).sum() * float("nan"),
        lambda m, b: m(b).sum() * 0,
        lambda m, b: 1 / 0,
        lambda m, b: 3.0,
    ):
        with pytest.raises((ValueError, TypeError, ZeroDivisionError)):
            init_from_gradient(model, [x], bad)
    assert all(torch.equal(a, b) for a, b in zip(before, lotr_parameters(model)))
    assert not any(m._forward_hooks for m in model.modules())
