"""Cores computed from fewer numbers: each form's equation, its numbers, and training through layers that share it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import worst
from torch import Tensor, nn

from lotr_ext import LoTRConfig, LoTRFactors, LoTRLinear, apply_lotr
from lotr_ext.cores import FORMS, Cores

PLACES = [
    ("0", "q"),
    ("0", "v"),
    ("1", "q"),
    ("2", "v"),
]  # three layers, two kinds, and not all of their pairs
R, K = 4, 8


def _grid(layer: int, kind: int, combine: Callable) -> list[Tensor]:
    return [combine(layer[int(l)], kind[("q", "v").index(k)]) for l, k in PLACES]


# form -> (how many numbers, the cores of PLACES from the form's parameters)
EQUATIONS: dict[str, tuple[int, Callable[[Cores], list[Tensor]]]] = {
    "diagonal": (4 * R, lambda c: [torch.diag(d) for d in c.diagonal]),
    "cp": (5 * R, lambda c: _grid(c.layer, c.kind, lambda a, b: torch.diag(a * b))),
    "tucker": (
        4 * R + R**3,
        lambda c: [sum(w * C for w, C in zip(row, c.slices)) for row in c.weights],
    ),
    "train": (5 * R * R, lambda c: _grid(c.layer, c.kind, torch.matmul)),
    "few": (4 * 13, lambda c: [sum(v * C for v, C in zip(row, c.random)) for row in c.numbers]),
}


def make(form: str) -> Cores:
    cores = FORMS[form](PLACES, R).double()
    for parameter in cores.parameters():
        nn.init.normal_(parameter)
    return cores


@pytest.mark.parametrize("form", FORMS)
def test_computes_its_equation(form: str) -> None:
    cores, (numbers, equation) = make(form), EQUATIONS[form]
    assert sum(p.numel() for p in cores.parameters()) == numbers
    assert worst([cores.at(place)() for place in PLACES], equation(cores)) < 1e-12


@pytest.mark.parametrize("form", FORMS)
def test_starts_at_zero_with_a_gradient(form: str) -> None:
    cores = FORMS[form](PLACES, R)
    made = [cores.at(place)() for place in PLACES]
    assert not any(core.any() for core in made)
    sum(core.sum() for core in made).backward()
    assert any(p.grad is not None and p.grad.any() for p in cores.parameters())


@pytest.mark.parametrize("form", [form for form in FORMS if form != "few"])
def test_begins_as_identity(form: str) -> None:
    cores = FORMS[form](PLACES, R)
    cores.begin_as_identity()
    assert all(torch.equal(cores.at(place)(), torch.eye(R)) for place in PLACES)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("owned", [True, False])
def test_layers_train_the_shared_numbers(form: str, owned: bool) -> None:
    cores, factors = make(form), LoTRFactors(K, K, R, dtype=torch.float64)
    layers = [LoTRLinear(K, K, factors=factors, scaling=0.5, dtype=torch.float64) for _ in PLACES]
    for layer, place in zip(layers, PLACES):
        layer.use_core(cores.at(place, owned))
        assert any(name.startswith("core_form") for name, _ in layer.named_parameters()) is owned
        assert {id(p) for p in cores.parameters()} <= {id(p) for p in layer.adapter_parameters()}
    x, leaves = (
        torch.randn(5, K, dtype=torch.float64),
        [factors.A.value, factors.B.value, *cores.parameters()],
    )

    def plain(layer: LoTRLinear, G: Tensor) -> Tensor:
        return (
            nn.functional.linear(x, layer.weight, layer.bias)
            + 0.5 * x @ factors.A.value @ G @ factors.B.value.T
        )

    got = torch.autograd.grad(sum(layer(x).sin().sum() for layer in layers), leaves)
    want = sum(plain(layer, G).sin().sum() for layer, G in zip(layers, EQUATIONS[form][1](cores)))
    assert worst(got, torch.autograd.grad(want, leaves)) < 1e-12


@pytest.mark.parametrize("form", FORMS)
def test_the_default_device_does_not_matter(form: str) -> None:
    """A model with values gets cores with values under torch.device("meta"), as its factors."""
    config = LoTRConfig(rank=2, target_modules=["0", "1"], core=form)
    models = []
    for device in ("cpu", "meta"):
        model = nn.Sequential(nn.Linear(K, K), nn.Linear(K, K))
        torch.manual_seed(0)
        with torch.device(device):
            models.append(apply_lotr(model, config))
    ours, control = (dict(model.named_parameters()) for model in models)
    for name in ours:
        assert ours[name].device.type == control[name].device.type == "cpu"
        assert "lotr" not in name or torch.equal(ours[name], control[name])


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


def test_few_numbers_can_be_tied() -> None:
    cores = FORMS["few"](PLACES, R, numbers=5, tied=True)
    nn.init.normal_(cores.numbers)
    made = [cores.at(place)() for place in PLACES]
    assert cores.numbers.shape == (1, 5) and torch.equal(made[0], made[1]) and made[0].any()


BAD = [
    (lambda: FORMS["diagonal"](PLACES, (3, 4)), ValueError, "rank"),
    (lambda: FORMS["cp"](["q"], 4), TypeError, "places"),
    (lambda: FORMS["diagonal"]([], 4), ValueError, "places"),
    (lambda: FORMS["diagonal"]([("0", "q")] * 2, 4), ValueError, "places"),
    (lambda: FORMS["diagonal"](PLACES, 4).at(("3", "q")), ValueError, "place"),
    (lambda: FORMS["train"](PLACES, 4).at(("0", "k")), ValueError, "place"),
    (lambda: FORMS["tucker"](PLACES, 4, slices=0), ValueError, "slices"),
    (lambda: FORMS["few"](PLACES, 4).begin_as_identity(), ValueError, "core_init"),
    (lambda: LoTRLinear(K, K, R).use_core(torch.zeros(R, R)), TypeError, "core"),
    (lambda: LoTRLinear(K, K, R).use_core(nn.Identity()), TypeError, ""),
    (
        lambda: LoTRLinear(K, K, R).use_core(FORMS["diagonal"](PLACES, R + 1).at(PLACES[0])),
        ValueError,
        "core",
    ),
    (
        lambda: LoTRLinear(K, K, R).use_core(FORMS["diagonal"](PLACES, R).double().at(PLACES[0])),
        ValueError,
        "core",
    ),
]


@pytest.mark.parametrize(("call", "error", "name"), BAD)
def test_bad_input_is_refused_by_name(
    call: Callable[[], object], error: type[Exception], name: str
) -> None:
    with pytest.raises(error, match=f"^{name}: expected" if name else None):
        call()
