"""Starts of A and B: random, from the weights ("svd"), from gradients (`init_from_gradient`)."""

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import zoo
from helpers import OLD_FILES, relative, worst
from models import flags_of, moved, started, state, unchanged
from torch import Tensor, nn

from lotr_ext import (
    LoTRConfig,
    LoTRConv1D,
    apply_lotr,
    init_from_gradient,
    load_adapter,
    save_adapter,
    unload,
)
from lotr_ext.init import (
    FACTOR_INITS,
    INIT_GAIN,
    CapturedGradient,
    fill_core_,
    fill_factor_,
    leading_vectors,
    tucker2,
)
from lotr_ext.model import adapted_layers


def stack(count: int, n: int, k: int, r_in: int, r_out: int) -> list[Tensor]:
    """Returns weights [n, k] that have one A and one B, with random cores."""
    A = torch.randn(k, r_in, dtype=torch.float64)
    B = torch.randn(n, r_out, dtype=torch.float64)
    return [B @ torch.randn(r_out, r_in, dtype=torch.float64) @ A.T for _ in range(count)]


def spans(basis: Tensor, vectors: Tensor, tolerance: float) -> bool:
    """Whether the vectors are in the space of an orthonormal basis."""
    return relative(basis @ (basis.T @ vectors), vectors) < tolerance


# ---- factors and cores ---------------------------------------------------------------------------


@pytest.mark.parametrize(("d", "r"), [(40, 6), (6, 40), (5, 5)])
def test_orthonormal_factors(d: int, r: int) -> None:
    factor = fill_factor_(torch.empty(d, r, dtype=torch.float64), "orthonormal") / INIT_GAIN
    columns = factor if r <= d else factor.T
    assert relative(columns.T @ columns, torch.eye(min(d, r))) < 1e-12


def test_orthonormal_factors_have_random_signs() -> None:
    """The QR decomposition gives only one sign."""
    factors = [fill_factor_(torch.empty(3, 1), "orthonormal") for _ in range(200)]
    assert 60 < sum(bool(factor[0, 0] > 0) for factor in factors) < 140


def test_normal_and_kaiming_factors() -> None:
    normal = fill_factor_(torch.empty(400, 50), "normal") / INIT_GAIN
    assert abs(float(normal.std()) - 1) < 0.05
    assert abs(float(normal.mean())) < 0.05
    kaiming = fill_factor_(torch.empty(100, 50), "kaiming") / INIT_GAIN
    assert 0.09 < float(kaiming.abs().max()) <= 0.1
    assert abs(float(kaiming.mean())) < 0.005


@pytest.mark.parametrize("init", FACTOR_INITS)
def test_a_generator_determines_the_factor(init: str) -> None:
    """Values are drawn in float32 and cast once."""
    first, second, in_bfloat16 = (
        fill_factor_(torch.empty(8, 2, dtype=dtype), init, torch.Generator().manual_seed(3))
        for dtype in (torch.float32, torch.float32, torch.bfloat16)
    )
    assert torch.equal(first, second)
    assert torch.equal(first.bfloat16(), in_bfloat16)


def test_cores() -> None:
    assert torch.equal(fill_core_(torch.ones(2, 2, 3), "identity"), torch.eye(2, 3).expand(2, 2, 3))
    assert not fill_core_(torch.ones(2, 3), "zero").any()


# ---- tucker2 -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "k"), [(20, 12), (12, 20), (700, 30), (30, 700)])
def test_tucker2_is_exact_at_the_rank_of_the_stack(n: int, k: int) -> None:
    weights = stack(3, n, k, 4, 3)
    A, B, cores = tucker2(weights, (4, 3))
    assert relative(A.T @ A, torch.eye(4)) < 1e-10
    assert relative(B.T @ B, torch.eye(3)) < 1e-10
    assert worst([B @ core.T @ A.T for core in cores], weights) < 1e-8


def test_tucker2_has_converged() -> None:
    """A is the best factor for B, and B for A. The start (HOSVD) and one step are not enough."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(14, 10, dtype=torch.float64, generator=generator) for _ in range(4)]
    A, B, cores = tucker2(weights, (3, 2))
    assert spans(B, leading_vectors([weight @ A for weight in weights], 2), 1e-3)
    assert spans(A, leading_vectors([weight.T @ B for weight in weights], 3), 1e-3)
    assert worst([B.T @ weight @ A for weight in weights], cores.mT) < 1e-6


def test_tucker2_of_a_rank_above_the_width() -> None:
    weight = torch.randn(3, 5, dtype=torch.float64)
    A, B, cores = tucker2([weight], (7, 4))
    assert (A.shape, B.shape, cores.shape) == ((5, 7), (3, 4), (1, 7, 4))
    assert relative(B @ cores[0].T @ A.T, weight) < 1e-10


def matrix_of_close_values() -> Tensor:
    """The iterated block spans the right space early, but not in the order of the values."""
    left = torch.linalg.qr(torch.randn(900, 9, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(800, 9, dtype=torch.float64))[0]
    return left * torch.linspace(1.0, 0.8, 9, dtype=torch.float64) @ right.T


MATRICES: dict[str, Callable[[], Tensor]] = {
    "wide": lambda: stack(1, 800, 900, 4, 4)[0],
    "fewer columns than directions": lambda: torch.randn(20, 2, dtype=torch.float64),
    "close singular values": matrix_of_close_values,
}


@pytest.mark.parametrize("case", MATRICES)
def test_leading_directions(case: str) -> None:
    """The subspace iteration and the dense decomposition find the same space."""
    values = MATRICES[case]()
    directions = leading_vectors([values], 4)
    assert relative(directions.T @ directions, torch.eye(4)) < 1e-10
    assert spans(directions, torch.linalg.svd(values, full_matrices=False)[0][:, :4], 1e-8)


# ---- init "svd" ----------------------------------------------------------------------------------


def n_by_k(layer: nn.Module, t: Tensor) -> Tensor:
    """Returns a plain layer's weight, or its gradient, as [n, k]."""
    return t.T if isinstance(layer, LoTRConv1D) else t


@torch.no_grad()
@pytest.mark.parametrize("name", ["mlp", "gpt2", "llama"])
def test_svd_moves_the_leading_part_of_the_weights_into_the_adapter(name: str) -> None:
    plain = zoo.net(name)
    squares = torch.zeros(3)  # squared norms: moved into the adapter, remaining, total
    for layer_name, layer in adapted_layers(started(name, "svd")).items():
        before = n_by_k(layer, plain.get_submodule(layer_name).weight)
        remaining = layer.weight_matrix()
        delta = layer.delta_weight()
        assert relative(remaining + delta, before) < 1e-6  # the function is unchanged
        A = layer.factors.A.value
        assert relative(A.T @ A, INIT_GAIN**2 * torch.eye(3)) < 1e-5
        squares += torch.stack([part.square().sum() for part in (delta, remaining, before)])
    moved_square, remaining_square, total_square = squares.tolist()
    # An orthogonal projection splits the squared norm.
    assert moved_square + remaining_square == pytest.approx(total_square, rel=1e-3)
    assert moved_square > 0.15 * total_square


SVD = {"way": "svd"}
OTHER_SVD = {"way": "svd", "rank": 3, "scaling": 0.7}


@pytest.mark.parametrize(
    ("settings", "settings_in_file"), [({}, SVD), (OTHER_SVD, SVD), (SVD, {})], ids=str
)
def test_a_loaded_start_replaces_the_start_of_a_model(
    x: Tensor, settings: dict, settings_in_file: dict, tmp_path: Path
) -> None:
    saved = moved(started("mlp", **settings_in_file))
    save_adapter(saved, tmp_path)
    model = load_adapter(moved(started("mlp", **settings), 3), tmp_path)
    assert relative(model(x), saved(x)) < 1e-6
    assert relative(unload(model)(x), zoo.net("mlp")(x)) < 1e-6


def test_a_start_that_cannot_be_added_back_is_refused_before_a_change() -> None:
    model = started("mlp", "svd", rank=2, modules_to_save=["head"])
    nn.utils.spectral_norm(list(adapted_layers(model).values())[-1])  # its weight is then computed
    with unchanged(model), pytest.raises(TypeError, match="load_adapter: expected a weight"):
        load_adapter(model, OLD_FILES / "dense")


# ---- from gradients ------------------------------------------------------------------------------


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return zoo.output(model, x).square().mean()


def gradient_of(plain: nn.Module, name: str, layer: nn.Module) -> Tensor:
    """Returns the gradient [n, k] of the weight of the plain layer."""
    return n_by_k(layer, plain.get_submodule(name).weight.grad.double())


def check_captured(model: nn.Module, plain: nn.Module, captured: CapturedGradient) -> None:
    """The reported shares are |B^T dW A|^2 / |dW|^2.

    What is not captured is estimated by 32 random vectors. The tolerance of a layer is 30 % of it,
    plus 0.02.
    """
    squares = torch.zeros(2, dtype=torch.float64)  # squared norms: projected, total
    for name, layer in adapted_layers(model).items():
        gradient = gradient_of(plain, name, layer)
        A, B = (factor.value.detach().double() / INIT_GAIN for factor in layer.factors.children())
        layer_squares = torch.stack([(B.T @ gradient @ A).square().sum(), gradient.square().sum()])
        squares += layer_squares
        share = float(layer_squares[0] / layer_squares[1])
        assert captured.layers[name] == pytest.approx(share, abs=0.02 + 0.3 * (1 - share))
    assert captured.total == pytest.approx(float(squares[0] / squares[1]), abs=0.1)
    assert 0 < captured.total <= 1


@pytest.mark.parametrize("name", ["mlp", "attention", "gpt2"])
@pytest.mark.parametrize("way", ["shape", "width"])
def test_factors_span_the_leading_directions_of_the_gradients(name: str, way: str) -> None:
    model = started(name, way)
    plain = zoo.net(name)
    batches = [zoo.inputs(name), zoo.inputs(name, rows=2).flip(0)]
    sum(loss_of(plain, x) for x in batches).backward()
    check_captured(model, plain, init_from_gradient(model, batches, loss_of))

    gradients: dict[nn.Module, list[Tensor]] = defaultdict(list)  # of each factor
    for layer_name, layer in adapted_layers(model).items():
        gradient = gradient_of(plain, layer_name, layer)
        gradients[layer.factors.A].append(gradient.T)
        gradients[layer.factors.B].append(gradient)
    for factor, blocks in gradients.items():
        directions = factor.value.detach().double() / INIT_GAIN
        assert relative(directions.T @ directions, torch.eye(factor.rank)) < 1e-5
        all_gradients = torch.cat(blocks, 1)
        norm = float((directions.T @ all_gradients).norm())
        assert norm > 0.97 * float(torch.linalg.svdvals(all_gradients)[: factor.rank].norm())


def test_a_full_rank_captures_all_gradients() -> None:
    captured = init_from_gradient(started("mlp", rank=64), [zoo.inputs("mlp")], loss_of)
    assert all(share == pytest.approx(1) for share in captured.layers.values())


def test_the_gradient_start_changes_nothing_else() -> None:
    """The model has buffers, draws random numbers, and another device is the default."""
    net = nn.Sequential(zoo.net("mlp"), nn.Flatten(0, 1), nn.BatchNorm1d(3), nn.Dropout(0.5))
    config = LoTRConfig(rank=2, target_modules=["up", "down"], modules_to_save=["2"])
    model = apply_lotr(net.train(), config)
    before = state(model)
    flags = flags_of(model)
    batches = [zoo.inputs("mlp")]
    random_state = torch.get_rng_state()
    with torch.device("meta"):
        init_from_gradient(model, batches, lambda model, x: model(x).square().sum())
    after = state(model)
    changed = {name for name in before if not torch.equal(after[name], before[name])}
    assert after.keys() == before.keys()
    assert changed == {name for name in before if "lotr_factors" in name}
    assert torch.equal(torch.get_rng_state(), random_state)
    assert flags_of(model) == flags
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("loss", "error"),
    [
        (lambda model, x: model(x).sum() * float("nan"), ValueError),
        (lambda model, x: model(x).sum() * 0, ValueError),
        (lambda model, x: 1 / 0, ZeroDivisionError),
        (lambda model, x: 3.0, TypeError),
    ],
    ids=["nan", "zero", "an error", "not a tensor"],
)
def test_a_failing_loss_leaves_the_model(loss: Callable, error: type[Exception]) -> None:
    model = started("mlp")
    with unchanged(model), pytest.raises(error):
        init_from_gradient(model, [zoo.inputs("mlp")], loss)
    assert not any(module._forward_hooks for module in model.modules())
