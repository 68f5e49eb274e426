"""Cores computed from fewer parameters: the equations of the forms, their sizes, and training."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from helpers import worst
from torch import Tensor, nn

from lotr_ext import LoTRConfig, LoTRFactors, LoTRLinear, apply_lotr
from lotr_ext.cores import FORMS, Cores

# Three layers and two projections, but not all of their pairs.
PLACES = [("0", "q"), ("0", "v"), ("1", "q"), ("2", "v")]
PROJECTIONS = ("q", "v")
R = 4
K = 8


def by_place(layer: Tensor, kind: Tensor, combine: Callable) -> list[Tensor]:
    """Returns combine(layer[l], kind[k]) for each place (l, k)."""
    return [combine(layer[int(l)], kind[PROJECTIONS.index(k)]) for l, k in PLACES]


def weighted_sums(weights: Tensor, matrices: Tensor) -> list[Tensor]:
    """Returns for each row of weights the sum of weight times matrix."""
    return list(torch.einsum("pi,irc->prc", weights, matrices))


class Form(NamedTuple):
    """What a form must be."""

    numel: int  # of its parameters
    equation: Callable[[Cores], list[Tensor]]  # returns the cores of PLACES


EXPECTED = {
    "diagonal": Form(4 * R, lambda form: [torch.diag(d) for d in form.diagonal]),
    "cp": Form(5 * R, lambda form: by_place(form.layer, form.kind, lambda a, b: torch.diag(a * b))),
    "tucker": Form(4 * R + R**3, lambda form: weighted_sums(form.weights, form.slices)),
    "train": Form(5 * R * R, lambda form: by_place(form.layer, form.kind, torch.matmul)),
    "few": Form(4 * 13, lambda form: weighted_sums(form.numbers, form.random)),
}


def make(form: str) -> Cores:
    cores = FORMS[form](PLACES, R).double()
    for parameter in cores.parameters():
        nn.init.normal_(parameter)
    return cores


@pytest.mark.parametrize("form", FORMS)
def test_computes_its_equation(form: str) -> None:
    cores = make(form)
    assert sum(parameter.numel() for parameter in cores.parameters()) == EXPECTED[form].numel
    assert worst([cores.at(place)() for place in PLACES], EXPECTED[form].equation(cores)) < 1e-12


@pytest.mark.parametrize("form", FORMS)
def test_starts_at_zero_with_a_gradient(form: str) -> None:
    cores = FORMS[form](PLACES, R)
    values = [cores.at(place)() for place in PLACES]
    assert not any(core.any() for core in values)
    sum(core.sum() for core in values).backward()
    gradients = [parameter.grad for parameter in cores.parameters()]
    assert any(gradient is not None and gradient.any() for gradient in gradients)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "few"])
def test_begins_as_identity(form: str) -> None:
    cores = FORMS[form](PLACES, R)
    cores.begin_as_identity()
    assert all(torch.equal(cores.at(place)(), torch.eye(R)) for place in PLACES)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("owned", [True, False])
def test_layers_train_the_shared_parameters(form: str, owned: bool) -> None:
    cores = make(form)
    factors = LoTRFactors(K, K, R, dtype=torch.float64)
    layers = [LoTRLinear(K, K, factors=factors, scaling=0.5, dtype=torch.float64) for _ in PLACES]
    for layer, place in zip(layers, PLACES):
        layer.use_core(cores.at(place, owned))
        names = [name for name, _ in layer.named_parameters()]
        assert any(name.startswith("core_form") for name in names) is owned
        assert set(cores.parameters()) <= set(layer.adapter_parameters())
    x = torch.randn(5, K, dtype=torch.float64)
    A = factors.A.value
    B = factors.B.value
    leaves = [A, B, *cores.parameters()]

    def plain(layer: LoTRLinear, G: Tensor) -> Tensor:
        return nn.functional.linear(x, layer.weight, layer.bias) + 0.5 * x @ A @ G @ B.T

    loss = sum(layer(x).sin().sum() for layer in layers)
    plain_cores = EXPECTED[form].equation(cores)
    plain_loss = sum(plain(layer, G).sin().sum() for layer, G in zip(layers, plain_cores))
    assert worst(torch.autograd.grad(loss, leaves), torch.autograd.grad(plain_loss, leaves)) < 1e-12


@pytest.mark.parametrize("form", ["dense", *FORMS])
def test_the_default_device_does_not_matter(form: str) -> None:
    """Under torch.device("meta"), a model with values gets cores and factors with values."""
    config = LoTRConfig(rank=2, target_modules=["0", "1"], core=form)
    states = []
    for device in ("cpu", "meta"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(K, K), nn.Linear(K, K))
        with torch.device(device):
            states.append(apply_lotr(model, config).state_dict())
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_sizes_and_scales_of_rectangular_cores() -> None:
    places = [(str(layer), "q") for layer in range(200)]
    few = FORMS["few"](places, (4, 64), numbers=300)
    assert few.random.std().item() == pytest.approx(0.5, rel=0.05)  # 1 / sqrt(r_in)
    tucker = FORMS["tucker"](places, (16, 2))
    assert tuple(tucker.slices.shape) == (16, 16, 2)
    assert tucker.weights.std().item() == pytest.approx(0.25, rel=0.05)  # 1 / sqrt(slices)
    train = FORMS["train"](places, (3, 5))
    assert tuple(train.layer.shape) == (200, 3, 5)
    assert tuple(train.kind.shape) == (1, 5, 5)


def test_the_numbers_of_few_can_be_tied() -> None:
    cores = FORMS["few"](PLACES, R, numbers=5, tied=True)
    nn.init.normal_(cores.numbers)
    first = cores.at(PLACES[0])()
    assert cores.numbers.shape == (1, 5)
    assert first.any()
    assert torch.equal(first, cores.at(PLACES[1])())
