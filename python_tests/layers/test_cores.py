"""The cores of LoTR's relatives against their papers' formulas in float64, and their numbers of parameters."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import nn

from lotr_ext import LoTRFactors, LoTRLinear, cores
from nets import relative

L, KINDS, R = 3, ("q", "v", "up"), 4
GRID = list(itertools.product(range(L), KINDS))


def filled(made: cores.Cores) -> cores.Cores:
    """With values that matter, in float64."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return made.double()


def count(made: nn.Module) -> int:
    return sum(p.numel() for p in made.parameters())


def test_diagonal() -> None:
    made = filled(cores.DiagonalCores(GRID, R))
    assert count(made) == len(GRID) * R
    for i, place in enumerate(GRID):
        torch.testing.assert_close(made.at(place)(), torch.diag(made.diagonal[i]), rtol=0, atol=0)


def test_canonical_polyadic_is_lorta_without_heads() -> None:
    """dW[l, k] = sum_j b_j a_j^T layer[l, j] kind[k, j]."""
    made, A, B = filled(cores.CPCores(GRID, R)), torch.randn(7, R).double(), torch.randn(6, R).double()
    assert count(made) == (L + len(KINDS)) * R
    want = torch.einsum("nj,mj,lj,kj->lkmn", A, B, made.layer, made.kind)
    for (l, kind), G in zip(GRID, made(), strict=True):
        assert relative(B @ G.T @ A.T, want[l, KINDS.index(kind)]) < 1e-14


def test_tucker_is_fact_tk() -> None:
    """dW = C x1 P x2 U x3 V (FacT, equation of FacT-TK): dW[i] = U (sum_k P[i, k] C[k]) V^T."""
    made, U, V = filled(cores.TuckerCores(GRID, R)), torch.randn(7, R).double(), torch.randn(6, R).double()
    assert count(made) == len(GRID) * R + R**3
    want = torch.einsum("ik,kab,na,mb->inm", made.weights, made.slices, U, V)
    for delta, G in zip(want, made(), strict=True):
        assert relative((V @ G.T @ U.T).T, delta) < 1e-14


def test_tensor_train_is_metatt_4d() -> None:
    """dW[l, k] = G1 G2[l] G3[k] G4."""
    made, G1, G4 = filled(cores.TrainCores(GRID, R)), torch.randn(7, R).double(), torch.randn(R, 6).double()
    assert count(made) == (L + len(KINDS)) * R**2
    want = torch.einsum("na,lab,kbc,cm->lknm", G1, made.layer, made.kind, G4)
    for (l, kind), G in zip(GRID, made(), strict=True):
        assert relative(G1 @ G @ G4, want[l, KINDS.index(kind)]) < 1e-14


@pytest.mark.parametrize("tied", [False, True])
def test_few_numbers_is_tinylora(tied: bool) -> None:
    """R = sum_i v_i P_i with P fixed."""
    made = filled(cores.FewCores(GRID, R, numbers=5, tied=tied))
    assert count(made) == 5 * (1 if tied else len(GRID)) and not made.random.requires_grad
    for i, place in enumerate(GRID):
        v = made.numbers[0 if tied else i]
        assert relative(made.at(place)(), sum(v[j] * made.random[j] for j in range(5))) < 1e-14
    assert torch.equal(made.random, cores.FewCores(GRID, R, numbers=5, tied=tied).double().random)  # of a seed
    assert abs(float(cores.FewCores(GRID, 64, numbers=9).random.std()) * math.sqrt(64) - 1) < 0.02


@pytest.mark.parametrize("name", cores.FORMS)
def test_they_begin_at_zero_with_a_gradient_and_give_one_and_all_alike(name: str) -> None:
    made = cores.FORMS[name](GRID, R)
    assert made().shape == (len(GRID), R, R) and not made().any()
    (made() * torch.randn(len(GRID), R, R)).sum().backward()
    assert any(p.grad.abs().sum() > 0 for p in made.parameters())
    made = filled(made)
    for i, place in enumerate(GRID):
        assert relative(made.at(place)(), made()[i].detach()) < 1e-14
    if name != "few":
        made = cores.FORMS[name](GRID, R)
        made.begin_as_identity()
        assert torch.equal(made(), torch.eye(R).expand(len(GRID), R, R))


def test_ranks_in_and_out_and_inner_sizes() -> None:
    assert filled(cores.TuckerCores(GRID, (3, 5), slices=2))().shape == (9, 3, 5)
    train = filled(cores.TrainCores(GRID, (3, 5), inner=2))
    assert train().shape == (9, 3, 5) and train.kind.shape == (3, 2, 5)
    assert cores.FewCores(GRID, (3, 5))().shape == (9, 3, 5)


def test_a_layer_trains_what_its_core_is_made_of() -> None:
    """By hand, outside of any model: three layers whose cores are one table's."""
    table, factors = filled(cores.TrainCores(GRID, R)).float(), LoTRFactors(8, 8, R)
    layers = nn.ModuleList(LoTRLinear(8, 8, factors=factors) for _ in GRID[:3])
    for layer, place in zip(layers, GRID[:3], strict=True):
        layer.use_core(table.at(place))
    x = torch.randn(40, 8)
    twin = copy.deepcopy(layers).double()
    sum(layer(x).square().sum() for layer in layers).backward()
    loss = 0
    for layer in twin:
        A, B = layer.factors.A, layer.factors.B
        y = x.double() @ layer.weight.T + layer.bias + layer.scaling * (((x.double() @ A) @ layer.core) @ B.T)
        loss = loss + y.square().sum()
    loss.backward()
    mine, theirs = dict(layers.named_parameters()), dict(twin.named_parameters())
    trained = [name for name, p in mine.items() if p.requires_grad]
    assert trained == ["0.factors.A", "0.factors.B", "0.core_form.cores.layer", "0.core_form.cores.kind"]
    for name in trained:
        assert relative(mine[name].grad, theirs[name].grad) < 5e-6, name


def test_a_module_of_ones_own_makes_a_core() -> None:
    class Symmetric(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.upper = nn.Parameter(torch.randn(R, R))

        def forward(self) -> torch.Tensor:
            return self.upper + self.upper.T

    layer = LoTRLinear(8, 6, R)
    layer.use_core(form := Symmetric())
    assert torch.equal(layer.core, form()) and "core_form.upper" in layer.state_dict() and "core" not in layer.state_dict()
    assert {id(p) for p in layer.adapter_parameters()} == {id(layer.factors.A), id(layer.factors.B), id(form.upper)}
    x, before = torch.randn(5, 8), form.upper.detach().clone()
    layer(x).sum().backward()
    assert form.upper.grad is not None and torch.equal(form.upper, before)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer.core.dtype == torch.float32
    y = layer(x).detach()
    layer.merge()
    with torch.no_grad():
        assert relative(layer(x), y.double()) < 1e-6


def test_what_makes_no_core_is_refused() -> None:
    layer = LoTRLinear(8, 6, R)
    before = dict(layer.named_parameters())
    cases = (
        (torch.zeros(R, R), TypeError, "core: expected a module whose forward returns it, got Tensor"),
        (cores.DiagonalCores([0], 3).at(0), ValueError, r"core: expected shape \(4, 4\), got \(3, 3\) of CoreAt"),
        (cores.DiagonalCores([0], R).double().at(0), ValueError, "core: expected dtype torch.float32, got torch.float64"),
        (cores.DiagonalCores([0], R).to("meta").at(0), ValueError, "core: expected device cpu, got meta"),
    )
    for form, error, message in cases:
        with pytest.raises(error, match=message):
            layer.use_core(form)
    assert {n: id(p) for n, p in layer.named_parameters()} == {n: id(p) for n, p in before.items()}
    for made, place, error, message in (
        (cores.TrainCores(GRID, R), (7, "q"), ValueError, r"place: expected a layer among \[0, 1, 2\], got 7"),
        (cores.TrainCores(GRID, R), (0, "o"), ValueError, r"place: expected a kind among \['q', 'v', 'up'\], got 'o'"),
        (cores.CPCores(GRID, R), "q", TypeError, r"place: expected a pair \(layer, kind\), got 'q'"),
        (cores.TuckerCores(["a", "b"], R), "c", ValueError, r"place: expected one of \['a', 'b'\], got 'c'"),
    ):
        with pytest.raises(error, match=message):
            made.at(place)
    for make, error, message in (
        (lambda: cores.DiagonalCores([0], (3, 4)), ValueError, r"rank: expected one rank for DiagonalCores, got \(3, 4\)"),
        (lambda: cores.TuckerCores([], R), ValueError, r"places: expected at least one, each once, got \[\]"),
        (lambda: cores.TrainCores(["q"], R), TypeError, r"places: expected pairs \(layer, kind\), got 'q'"),
        (lambda: cores.FewCores([0], R, numbers=0), ValueError, "numbers: expected at least 1, got 0"),
    ):
        with pytest.raises(error, match=message):
            make()
