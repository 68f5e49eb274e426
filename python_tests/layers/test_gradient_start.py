"""A and B from the gradients of the weights, against the singular vectors of the dense gradients in float64."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import lotr_ext
from lotr_ext import LoTRConfig, apply_lotr, init_from_gradient, load_adapter, save_adapter
from lotr_ext.layers import gradient
from lotr_ext.model.adapted import adapted_layers

D, UP = 60, 94  # beyond q = r + 8, so that what is left out matters
TARGETS = ["q", "v", "up", "down"]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.v = nn.Linear(D, D), nn.Linear(D, D, bias=False)
        self.up, self.down = nn.Linear(D, UP), nn.Linear(UP, D)

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.tanh(self.q(x)) * torch.sigmoid(self.v(x))
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    """[b, t, D] -> [b, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList(Block() for _ in range(2)), nn.Linear(D, 3)
        self.checkpointed = False

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return self.head(x.mean(1))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def batches(count: int = 3, size: int = 4) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    decay = torch.linspace(0, -3, D).exp()  # so that the gradients' spectra fall, as real ones do
    return [
        (torch.randn(size, 5, D, generator=generator) * decay, torch.randint(0, 3, (size,), generator=generator))
        for _ in range(count)
    ]


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, target = batch
    dtype = next(model.parameters()).dtype
    return F.cross_entropy(model(x.to(dtype)).float() if dtype != torch.float64 else model(x.to(dtype)), target)


def dense_gradients(model: nn.Module, seen: list) -> dict[str, Tensor]:
    """dW of every layer, float64, by plain autograd."""
    truth = copy.deepcopy(model).double()
    for batch in seen:
        loss(truth, batch).backward()
    return {name: m.weight.grad for name, m in truth.named_modules() if name.rpartition(".")[2] in TARGETS}


def by_factor(model: nn.Module, dense: dict[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Each factor once, and what its columns are to span the leading left singular vectors of."""
    sides: dict[int, tuple[Tensor, list[Tensor]]] = {}
    for name, layer in adapted_layers(model).items():
        for factor, part in ((layer.factors.A, dense[name].T), (layer.factors.B, dense[name])):
            sides.setdefault(id(factor), (factor, []))[1].append(part)
    for factor, parts in sides.values():
        yield factor.detach().double(), torch.cat(parts, 1)


def check(model: nn.Module, dense: dict[str, Tensor], lost: float, factors: int) -> None:
    """Each factor is orthonormal and captures all but `lost` of what the best one of its rank does."""
    count = 0
    for factor, side in by_factor(model, dense):
        r = factor.shape[1]
        torch.testing.assert_close(factor.T @ factor, torch.eye(r).double(), atol=1e-5, rtol=0)
        best = torch.linalg.svdvals(side)[:r].square().sum()
        assert (factor.T @ side).square().sum() >= (1 - lost) * best
        count += 1
    assert count == factors


@pytest.mark.parametrize(
    ("group_by", "factors"),
    [("shape", 6), ("block", 12), ("name", 8), ("width", 4), (lambda name, module: name.replace(".", "_"), 16)],
)
def test_factors_span_the_leading_directions_of_all_layers_that_share_them(group_by, factors):
    """A single gradient, or a random pair, captures far less."""
    model, seen = net(), batches()
    dense = dense_gradients(model, seen)
    config = LoTRConfig(rank=(5, 3), target_modules=TARGETS, group_by=group_by, init="gradient")
    assert apply_lotr(model, config, batches=seen, loss=loss) is model
    check(model, dense, 0.01, factors)
    with pytest.raises(AssertionError):
        check(apply_lotr(net(), LoTRConfig(rank=(5, 3), target_modules=TARGETS, group_by=group_by)), dense, 0.5, factors)


def test_gradients_of_low_rank_are_spanned_exactly():
    """One text a batch: every dW_l has the rank of its tokens at most, and the pair the angle of rounding to all of them."""
    model, seen = net().double(), batches(1, size=1)
    dense = dense_gradients(model, seen)
    config = LoTRConfig(rank=10, target_modules=["q"], init="gradient", adapter_dtype=torch.float64)
    apply_lotr(model, config, batches=seen, loss=loss)
    for factor, side in by_factor(model, dense):
        assert ((side - factor @ (factor.T @ side)).norm() / side.norm()).item() < 1e-10


@pytest.mark.parametrize("kind", ["bfloat16", "autocast", "checkpointed", "without kernels"])
def test_in_other_precision_and_by_other_ways_it_is_the_same_start(kind, monkeypatch):
    model, seen = net(), batches()
    dense = dense_gradients(model, seen)
    if kind == "bfloat16":
        model.bfloat16()
    if kind == "without kernels":
        monkeypatch.setattr(gradient.planner, "obstacle_to_kernels", lambda *_: "none here")
    model.checkpointed = kind == "checkpointed"
    config = LoTRConfig(rank=4, target_modules=TARGETS, init="gradient")
    with torch.autocast("cpu", torch.bfloat16) if kind == "autocast" else nullcontext():
        apply_lotr(model, config, batches=seen, loss=loss)
    check(model, dense, 0.01 if kind in ("checkpointed", "without kernels") else 0.03, 6)


class Shapes(TorchDispatchMode):
    """The shapes of all that is computed, views left out, and the names of what computes it."""

    VIEWS = frozenset(("t", "transpose", "detach", "alias", "view", "_unsafe_view"))

    def __init__(self) -> None:
        super().__init__()
        self.made: set[tuple[int, ...]] = set()
        self.called: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        name = function.__name__.split(".")[0]
        self.called.add(name)
        if isinstance(found, Tensor) and name not in self.VIEWS:
            self.made.add(tuple(found.shape))
        return found


def test_no_gradient_of_a_weight_is_ever_made_and_the_products_are_the_package_s_own():
    weights, seen, model = {(UP, D), (D, UP)}, batches(), net()
    with Shapes() as dense:
        loss(model, seen[0]).backward()
    assert dense.made & weights  # so would it be seen
    apply_lotr(model, LoTRConfig(rank=4, target_modules=TARGETS))
    with Shapes() as found:
        init_from_gradient(model, seen, loss)
    assert not found.made & weights and {"shrink", "factor_grad_"} <= found.called


def test_the_function_stays_to_the_bit_and_nothing_is_left_behind(tmp_path):
    model, seen = net(), batches()
    model.head.weight.grad = before = torch.ones(3, D)
    out = model(seen[0][0])
    read = iter(seen)
    apply_lotr(
        model, LoTRConfig(rank=4, target_modules=TARGETS, modules_to_save=["head"], init="gradient"), batches=read, loss=loss
    )
    assert next(read, None) is None and torch.equal(model(seen[0][0]), out)
    assert all(p.grad is None for n, p in model.named_parameters() if n != "head.weight") and model.head.weight.grad is before
    assert all(not m._forward_hooks and not layer.disabled for layer in adapted_layers(model).values() for m in layer.modules())
    assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {
        "A",
        "B",
        "core",
        "weight",
        "bias",
    }
    loss(model, seen[0]).backward()
    assert all(layer.core.grad.any() for layer in adapted_layers(model).values())
    save_adapter(model, tmp_path)
    fresh = load_adapter(net(), tmp_path)
    assert fresh.lotr_config.init == "gradient"
    for (_, one), (_, other) in zip(model.lotr_factors.named_parameters(), fresh.lotr_factors.named_parameters()):
        assert torch.equal(one, other)


@pytest.mark.parametrize("train", [("core",), ("core", "magnitude")])
def test_a_frozen_pair_starts_from_the_gradient_where_batches_are_given(train):
    seen, settings = batches(), {"rank": 4, "target_modules": TARGETS, "train": train, "magnitude": len(train) == 2}
    models = [
        apply_lotr(net(), LoTRConfig(**settings, init=init), batches=seen, loss=loss) for init in ("orthonormal", "gradient")
    ]
    assert [model.lotr_config.init for model in models] == ["gradient"] * 2
    for one, other in zip(*(model.lotr_factors.parameters() for model in models)):
        assert torch.equal(one, other)
    for changed in ({"init": "normal"}, {"train": ("A", "core")}):
        with pytest.raises(ValueError, match='batches: expected None without init "gradient"'):
            apply_lotr(net(), LoTRConfig(**settings | changed), batches=seen, loss=loss)


def test_an_adapted_model_a_new_one_and_one_built_by_hand_start_alike():
    seen = batches()
    new = apply_lotr(net(), LoTRConfig(rank=4, target_modules=TARGETS, init="gradient"), batches=seen, loss=loss)
    adapted = apply_lotr(net(), LoTRConfig(rank=4, target_modules=TARGETS))
    assert init_from_gradient(adapted, seen, loss) is adapted
    hand = net()
    pairs = {sizes: lotr_ext.LoTRFactors(*sizes, 4) for sizes in ((D, D), (D, UP), (UP, D))}
    for block in hand.blocks:
        for name in TARGETS:
            linear = getattr(block, name)
            setattr(block, name, lotr_ext.LoTRLinear.from_linear(linear, pairs[linear.in_features, linear.out_features]))
    init_from_gradient(hand, seen, loss)
    wanted = [(layer.factors.A, layer.factors.B) for layer in adapted_layers(new).values()]
    for model in (adapted, hand):
        for (A, B), layer in zip(wanted, adapted_layers(model).values()):
            assert torch.equal(A, layer.factors.A) and torch.equal(B, layer.factors.B)


def test_cores_that_are_made_of_fewer_numbers_stay_so():
    seen, config = batches(), LoTRConfig(rank=4, target_modules=TARGETS, group_by="width", core="train", init="gradient")
    model = apply_lotr(net(), config, batches=seen, loss=loss)
    later = apply_lotr(net(), LoTRConfig(rank=4, target_modules=TARGETS, group_by="width", core="train"))
    init_from_gradient(later, seen, loss)
    check(model, dense_gradients(net(), seen), 0.01, 4)
    assert model.state_dict().keys() == later.state_dict().keys() and hasattr(model, "lotr_cores")
    for (A, _), (B, _) in zip(by_factor(model, dense := dense_gradients(net(), seen)), by_factor(later, dense)):
        assert torch.equal(A, B)


def test_layers_in_a_fast_path_are_seen_too():
    """A frozen nn.TransformerEncoder in eval mode would read its weights without calling a layer."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(D, 2, UP, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Linear(D, 3)).eval().requires_grad_(False)

    def of_tokens(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]).mean(1), batch[1])

    config = LoTRConfig(rank=4, target_modules=["linear1", "linear2"], init="gradient")
    apply_lotr(model, config, batches=batches(), loss=of_tokens)
    assert len(adapted_layers(model)) == 4


# ---- bad input -------------------------------------------------------------------------------------------------------


def taps(model: nn.Module) -> list[nn.Module]:
    """Where a hook would be left."""
    return [m for name, m in model.named_modules() if name.rpartition(".")[2] in TARGETS]


BAD = [
    ({"batches": []}, ValueError, ["batches", "at least one", "got none"]),
    ({"batches": None}, TypeError, ["batches", "a few batches", "NoneType"]),
    ({"batches": None, "loss": None}, TypeError, ["batches", "a few batches", "NoneType"]),
    ({"loss": None}, TypeError, ["loss", "a function", "NoneType"]),
    ({"loss": lambda model, batch: 1.0}, TypeError, ["loss", "a tensor", "float"]),
    ({"loss": lambda model, batch: model(batch[0])}, ValueError, ["loss", "one number", "(4, 3)"]),
    ({"loss": lambda model, batch: torch.zeros(())}, ValueError, ["loss", "depends on the adapted layers"]),
    ({"loss": lambda model, batch: loss(model, batch) * torch.nan}, ValueError, ["finite", "blocks.0.q"]),
    ({"loss": lambda model, batch: loss(model, batch) * 0}, ValueError, ["at least one of", "blocks.0.q", "zero"]),
]


@pytest.mark.parametrize(("changes", "error", "words"), BAD)
@pytest.mark.parametrize("there", [False, True])
def test_bad_input_is_named_and_changes_nothing(changes, error, words, there):
    model = net()
    if there:
        apply_lotr(model, LoTRConfig(rank=4, target_modules=TARGETS))
    before = {name: (t.clone(), t.requires_grad) for name, t in model.state_dict(keep_vars=True).items()}
    given = {"batches": batches(1), "loss": loss} | changes
    with pytest.raises(error) as caught:
        if there:
            init_from_gradient(model, given["batches"], given["loss"])
        else:
            apply_lotr(model, LoTRConfig(rank=4, target_modules=TARGETS, init="gradient"), **given)
    assert all(word in str(caught.value) for word in words), caught.value
    after = {name: (t, t.requires_grad) for name, t in model.state_dict(keep_vars=True).items()}
    assert before.keys() == after.keys() and not any(m._forward_hooks for m in taps(model))
    assert all(torch.equal(t, after[name][0]) and needs == after[name][1] for name, (t, needs) in before.items())


def test_models_that_cannot_start_so_are_refused():
    seen = batches(1)
    with pytest.raises(RuntimeError, match="model: expected one with a LoTR adapter, got Net without"):
        init_from_gradient(net(), seen, loss)
    model = apply_lotr(net(), LoTRConfig(rank=4, target_modules=TARGETS))
    with pytest.raises(TypeError, match=r"expected a plain, whole one .* wrapped or compiled"):
        model.__dict__["_orig_mod"] = None  # torch.compile's mark
        init_from_gradient(model, seen, loss)
    del model.__dict__["_orig_mod"]
    with torch.no_grad():
        model.blocks[1].v.core[0, 0] = 1
    with pytest.raises(ValueError, match=r"core: expected zero for a start from the gradient, got .* 'blocks.1.v'"):
        init_from_gradient(model, seen, loss)
    with torch.no_grad():
        model.blocks[1].v.core.zero_()
    with pytest.raises(RuntimeError, match="disabled: expected unmerged layers"):
        init_from_gradient(lotr_ext.merge(model), seen, loss)
    lotr_ext.unmerge(model)
    with pytest.raises(ValueError, match='add_adapter: expected an init without batches, got "gradient"'):
        lotr_ext.add_adapter(model, "second", LoTRConfig(rank=4, init="gradient"))
    with pytest.raises(ValueError, match='core_init: expected "zero" with init "gradient"'):
        LoTRConfig(init="gradient", core_init="identity")
    with pytest.raises(ValueError, match="batches: expected None without init \"gradient\", got list with 'orthonormal'"):
        apply_lotr(net(), LoTRConfig(target_modules=TARGETS), batches=seen)
