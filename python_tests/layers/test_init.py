"""Starts: each init's statistics, Tucker-2, and "svd" in a model."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from toys import IDS, Toy, adapted, loss, toy

from lotr_ext.layers.init import FACTOR_INITS, fill_core_, fill_factor_, tucker2
from lotr_ext.model.adapted import adapted_layers
from lotr_ext.model.apply import apply_lotr, disabled
from lotr_ext.model.config import LoTRConfig
from lotr_ext.model.merging import merge, unload, unmerge

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d", "r"), [(40, 7), (7, 40), (12, 12), (5, 1), (1, 5)])
def test_orthonormal_is_semi_orthogonal_when_the_rank_exceeds_the_width(dtype: torch.dtype, d: int, r: int) -> None:
    t = fill_factor_(torch.empty(d, r, dtype=dtype), "orthonormal").double()
    gram = t.T @ t if r <= d else t @ t.T
    assert (gram - torch.eye(min(d, r), dtype=torch.float64)).abs().max() < 8 * torch.finfo(dtype).eps
    if dtype == torch.float64:  # both signs of the diagonal occur: no preferred direction
        signs = torch.stack([fill_factor_(torch.empty(3, 2), "orthonormal") for _ in range(64)]).sign()
        assert signs.mean(0).abs().max() < 0.6


@pytest.mark.parametrize(("init", "std", "bound"), [("normal", 1.0, 6.0), ("kaiming", 1 / math.sqrt(3 * 400), 1 / 20)])
def test_distributions(init: str, std: float, bound: float) -> None:
    t = fill_factor_(torch.empty(400, 100), init)
    assert abs(t.std().item() / std - 1) < 0.03 and abs(t.mean().item()) < 0.05 * std and t.abs().max() <= bound


@pytest.mark.parametrize("init", FACTOR_INITS)
def test_draws_follow_the_seed_and_leave_meta_tensors_alone(init: str) -> None:
    def draw(seed: int) -> Tensor:
        return fill_factor_(torch.empty(9, 4), init, torch.Generator().manual_seed(seed))

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    state = torch.get_rng_state()
    assert fill_factor_(torch.empty(9, 4, device="meta"), init).is_meta
    assert torch.equal(torch.get_rng_state(), state)
    parameter = torch.nn.Parameter(torch.empty(9, 4))
    assert fill_factor_(parameter, init) is parameter and parameter.is_leaf and parameter.grad_fn is None


def test_cores() -> None:
    assert not fill_core_(torch.ones(3, 4), "zero").any()
    assert torch.equal(fill_core_(torch.ones(3, 4), "identity"), torch.eye(3, 4))


# ---- Tucker-2 --------------------------------------------------------------------------------------------------------


def stack(layers: int, n: int, k: int, r_in: int, r_out: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Weights of that exact multilinear rank, singular values over two orders of magnitude."""
    A, B = torch.randn(k, r_in, dtype=torch.float64), torch.randn(n, r_out, dtype=torch.float64)
    scale = torch.logspace(0, -2, r_in, dtype=torch.float64)[:, None]
    return [(B @ (scale * torch.randn(r_in, r_out, dtype=torch.float64)).T @ A.T).to(dtype) for _ in range(layers)]


def error(weights: list[Tensor], A: Tensor, B: Tensor, cores: Tensor) -> float:
    residual = sum((w.double() - B @ G.T @ A.T).square().sum() for w, G in zip(weights, cores, strict=True))
    return math.sqrt(residual / sum(w.double().square().sum() for w in weights))


@pytest.mark.parametrize(("n", "k"), [(20, 30), (30, 20), (24, 24), (600, 5), (5, 600), (520, 540)])
@pytest.mark.parametrize("ranks", [(3, 4), (2, 5)])
def test_tucker2_is_exact_on_low_rank_stacks(n: int, k: int, ranks: tuple[int, int]) -> None:
    weights = stack(6, n, k, *ranks)
    A, B, cores = tucker2(weights, ranks)
    assert A.shape == (k, ranks[0]) and B.shape == (n, ranks[1]) and cores.shape == (6, *ranks)
    assert error(weights, A, B, cores) < 1e-12
    for t, r in ((A, ranks[0]), (B, ranks[1])):
        assert torch.allclose(t.T @ t, torch.eye(r, dtype=torch.float64), atol=1e-12)
    weights = [w.float() for w in weights]
    assert error(weights, *tucker2(weights, ranks)) < 1e-6


def leading(matrix: Tensor, r: int) -> Tensor:
    return torch.linalg.svd(matrix)[0][:, :r]


def test_tucker2_beats_its_start_and_no_random_pair_beats_it() -> None:
    weights = [torch.randn(14, 18, dtype=torch.float64) for _ in range(5)]
    best = error(weights, *tucker2(weights, (4, 4)))
    P, Q = leading(torch.cat([w.T for w in weights], 1), 4), leading(torch.cat(weights, 1), 4)
    assert best < 0.999 * error(weights, P, Q, torch.stack([P.T @ w.T @ Q for w in weights]))  # HOSVD alone
    A, B, cores = tucker2(weights, (4, 4), max_iterations=500, tolerance=0.0)
    P = leading(torch.cat([w.T @ B for w in weights], 1), 4)  # the best A for this B is this A, and no other
    assert error(weights, P, B, torch.stack([P.T @ w.T @ B for w in weights])) > (1 - 1e-9) * error(weights, A, B, cores)
    for _ in range(20):
        P = torch.linalg.qr(A + 0.05 * torch.randn_like(A))[0]
        Q = torch.linalg.qr(B + 0.05 * torch.randn_like(B))[0]
        assert error(weights, P, Q, torch.stack([P.T @ w.T @ Q for w in weights])) > best
    # a single matrix: the truncated SVD, optimal by Eckart and Young
    s = torch.linalg.svdvals(weights[0])
    assert error(weights[:1], *tucker2(weights[:1], (4, 4))) == pytest.approx(
        math.sqrt(s[4:].square().sum() / s.square().sum())
    )


def test_tucker2_by_subspace_iteration_is_nearly_optimal() -> None:
    u, v = (torch.linalg.qr(torch.randn(n, 530, dtype=torch.float64))[0] for n in (560, 530))
    s = torch.arange(1, 531, dtype=torch.float64) ** -0.5  # slow decay
    optimum = math.sqrt(s[4:].square().sum() / s.square().sum())
    assert error([u * s @ v.T], *tucker2([u * s @ v.T], (4, 4))) < 1.0002 * optimum


def test_tucker2_beyond_full_rank_is_exact_and_can_still_learn() -> None:
    weights = [torch.randn(5, 7, dtype=torch.float64) for _ in range(3)]
    A, B, cores = tucker2(weights, (9, 6))
    assert error(weights, A, B, cores) < 1e-12
    assert torch.allclose(A.norm(dim=0), torch.ones(9, dtype=torch.float64)) and not cores[:, 7:].any()


# ---- "svd" in a model ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [{}, {"alpha": 12.0}, {"scaling": -0.5, "rank": (3, 6)}, {"adapter_dtype": torch.float64}])
def test_svd_leaves_the_function_and_moves_the_weights(dtype: torch.dtype, settings: dict) -> None:
    torch.manual_seed(0)
    model = Toy().to(dtype)
    base, weights = (
        model(IDS),
        {n: m.weight.detach().clone() for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)},
    )
    apply_lotr(model, LoTRConfig(**{"rank": 4, "init": "svd", "group_by": "name", **settings}))
    eps = torch.finfo(dtype if "adapter_dtype" in settings or dtype != torch.float64 else torch.float32).eps
    assert torch.allclose(model(IDS), base, rtol=16 * eps, atol=16 * eps)
    for name, layer in adapted_layers(model).items():
        total = layer.weight.double() + layer.delta_weight().double()
        assert (total - weights[name].double()).abs().max() <= 2 * eps * weights[name].double().abs().max(), name
        assert layer.delta_weight().double().norm() > 0.3 * weights[name].double().norm()
    with disabled(model):
        assert torch.allclose(model(IDS), base, rtol=16 * eps, atol=16 * eps)


def test_svd_takes_all_of_a_low_rank_stack() -> None:
    """The original's is transposed: there 0.47 to 0.85 of the weight remains."""
    model = toy()
    for block, wq, wv in zip(model.blocks, stack(2, 16, 16, 3, 3), stack(2, 16, 16, 3, 3), strict=True):
        block.q.weight.data.copy_(wq)
        block.v.weight.data.copy_(wv)
    before = {f"blocks.{i}.{n}": getattr(block, n).weight.norm().item() for i, block in enumerate(model.blocks) for n in "qv"}
    apply_lotr(model, LoTRConfig(rank=3, init="svd", target_modules=["q", "v"], group_by="name"))
    for name, layer in adapted_layers(model).items():
        assert layer.weight.norm() < 3e-7 * before[name]


def test_svd_is_deterministic_and_undone_by_unload() -> None:
    weights = [adapted(random=False, init="svd").blocks[i].q.weight for i in (0, 0)]
    assert torch.equal(*weights)
    base, model = toy(), adapted(init="svd")
    changed = model(IDS)
    merge(model)
    assert torch.allclose(model(IDS), changed, atol=1e-5)
    unmerge(model)
    with disabled(model):
        assert torch.allclose(model(IDS), base(IDS), atol=1e-6)
    unload(model, merge=False)
    for name, weight in base.state_dict().items():
        assert torch.allclose(model.state_dict()[name], weight, atol=2e-7), name


def test_svd_trains() -> None:
    model = adapted(random=False, init="svd")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.2)
    first = loss(model).item()
    for _ in range(5):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    assert loss(model).item() < first
    start = model.lotr_factors["16x16"].start_A
    assert not torch.equal(model.lotr_factors["16x16"].A, start)  # the start is a copy, not the parameter
