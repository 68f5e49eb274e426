"""Influence of training examples: equal to plain autograd's gradients, one example at a time, and torch.linalg, in float64."""

from __future__ import annotations

import copy
import gc
import io
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator

import mixtures
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

from lotr_ext import LoTRConfig, apply_lotr, influence, merge
from nets import relative

WIDE = torch.float64
Batch = tuple[Tensor, Tensor]
Loss = Callable[[nn.Module, Batch], Tensor]


class Model(nn.Module):
    """Tokens [b, t, 6] -> the mean over the tokens of a net -> [b, 3]. whole: whether the second layer has a part."""

    whole = True

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = (nn.Linear(*size, dtype=WIDE) for size in ((6, 8), (8, 8), (8, 3)))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        return self.head((torch.tanh(self.second(x)) if self.whole else x).mean(1))


def adapted(cores: float = 0.4, **settings) -> nn.Module:
    torch.manual_seed(0)
    config = {"rank": (2, 3), "target_modules": ["first", "second"], "adapter_dtype": WIDE, "modules_to_save": ["head"]}
    model = apply_lotr(Model(), LoTRConfig(**(config | settings)))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and ".A" not in name and ".B" not in name and "head" not in name:
                p.copy_(torch.randn(p.shape, dtype=WIDE) * cores)
    return model


def examples(n: int, seed: int, tokens: int = 4) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, tokens, 6, generator=generator, dtype=WIDE)
    return [(x[i : i + 1], torch.randint(0, 3, (1,), generator=generator)) for i in range(n)]


def batches(found: list[Batch], *sizes: int) -> list[Batch]:
    parts, start = [], 0
    for size in sizes:
        parts.append(tuple(torch.cat(tensors) for tensors in zip(*found[start : start + size])))
        start += size
    assert start == len(found)
    return parts


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")


def to_the_side(model: nn.Module, batch: Batch) -> Tensor:
    """Whose gradient is that of the first output, for any value of it."""
    return model(batch[0])[:, 0].sum()


def of_examples(model: nn.Module, found: list[Batch], loss: Loss = loss) -> dict[str, Tensor]:
    """[n, r_in r_out] of each layer, by plain autograd through W + s B G^T A^T, one example at a time."""
    base = Model()
    base.whole = model.whole
    base.load_state_dict({k: v for k, v in model.state_dict().items() if k in base.state_dict()})
    names = ("first", "second")
    layers = {name: model.get_submodule(name) for name in names}
    rows: dict[str, list[Tensor]] = {name: [] for name in names}
    for one in found:
        cores = {name: layers[name].core.detach().clone().requires_grad_() for name in names}
        weights = {}
        for name, layer in layers.items():
            A, B = layer.factors.A.detach(), layer.factors.B.detach()
            weights[f"{name}.weight"] = layer.weight + layer.scaling * B @ cores[name].T @ A.T
        whole = dict(base.named_parameters()) | weights
        loss(lambda x, whole=whole: functional_call(base, whole, (x,)), one).backward()
        for name in names:
            rows[name].append((cores[name].grad if base.whole or name == "first" else torch.zeros_like(cores[name])).flatten())
    return {name: torch.stack(parts) for name, parts in rows.items()}


def truth(train: dict[str, Tensor], query: dict[str, Tensor], damping: float | None, curved: dict[str, Tensor]) -> Tensor:
    """[q, n]"""
    total = 0
    for name, g in train.items():
        inverse = torch.eye(g.shape[1], dtype=WIDE)
        if damping is not None:
            H = sum(torch.outer(one, one) for one in curved[name]) / len(curved[name])
            inverse = torch.linalg.inv(H + damping * torch.linalg.eigvalsh(H).mean() * torch.eye(len(H), dtype=WIDE))
        total = total + query[name] @ inverse @ g.T
    return total


@pytest.mark.parametrize("damping", [None, 0.1, 3])
@pytest.mark.parametrize("cores", [0.4, 0.0], ids=["trained", "zero"])
@pytest.mark.parametrize("settings", [{}, {"group_by": "shape"}, {"rslora": True}], ids=str)
def test_scores_are_those_of_a_loop(damping: float | None, cores: float, settings: dict) -> None:
    model, train, query = adapted(cores, **settings), examples(9, 1), examples(5, 2)
    own, asked = of_examples(model, train), of_examples(model, query)
    got = influence(model, batches(train, 4, 4, 1), batches(query, 2, 3), loss=loss, damping=damping)
    want = truth(own, asked, damping, own)
    assert got.shape == (5, 9) and got.dtype == WIDE and relative(got, want) < 1e-10
    itself = influence(model, batches(train, 3, 6), loss=loss, damping=damping)
    assert itself.shape == (9,) and relative(itself, truth(own, own, damping, own).diagonal()) < 1e-10


def test_curvature_of_another_loss_is_the_gauss_newton_matrix() -> None:
    """For a squared error of one output the Gauss-Newton matrix is the mean of J^T J, with the output's gradient J."""
    model, train, query = adapted(), examples(9, 1), examples(5, 2)
    jacobians = of_examples(model, train, to_the_side)
    want = truth(of_examples(model, train), of_examples(model, query), 0.1, jacobians)
    got = influence(model, batches(train, 4, 5), batches(query, 5), loss=loss, curvature=to_the_side)
    assert relative(got, want) < 1e-10


@pytest.mark.parametrize("core", ["diagonal", "few"])
def test_computed_and_frozen_cores(core: str) -> None:
    """A computed core has the scores of the dense one, and a core may be frozen."""
    model, train = adapted(core=core, rank=3), batches(examples(6, 1), 4, 2)
    dense = adapted(rank=3, train=["core"])
    with torch.no_grad():
        for name in ("first", "second"):
            dense.get_submodule(name).core.copy_(model.get_submodule(name).core)
            for part in "AB":
                getattr(dense.get_submodule(name).factors, part).copy_(getattr(model.get_submodule(name).factors, part))
    dense.head.load_state_dict(model.head.state_dict())
    dense.requires_grad_(False)
    assert relative(influence(model, train, train, loss=loss), influence(dense, train, train, loss=loss)) < 1e-10


def test_experts_have_a_curvature_each() -> None:
    model = mixtures.adapted("Mixtral", WIDE, target_modules=["q_proj"])
    ids = torch.randint(3, 60, (5, 6), generator=torch.Generator().manual_seed(0))

    def run(model: nn.Module, rows: Tensor) -> Tensor:
        return model(rows, use_cache=False).logits.square().sum()

    names = [name for name, m in model.named_modules() if hasattr(m, "delta_weight")]
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    for one in ids:
        model.zero_grad(set_to_none=True)
        run(model, one[None]).backward()
        for name in names:
            core = model.get_submodule(name).core.grad
            for e, part in enumerate(core if core.dim() == 3 else [core]):
                found.setdefault(f"{name} {e}", []).append(part.flatten().clone())
    blocks = {name: torch.stack(parts) for name, parts in found.items() if parts}
    blocks = {name: block for name, block in blocks.items() if block.any()}
    want = truth(blocks, blocks, 0.1, blocks)
    got = influence(model, [ids[:3], ids[3:]], [ids], loss=run, rows=len)
    assert len(blocks) > len(names) and relative(got, want) < 1e-8


def test_one_batch_and_its_gradients_are_kept_at_a_time() -> None:
    alive: list[weakref.ref] = []
    kept: list[int] = []  # gradients [1, 1, r_in r_out], as they are kept of batches of one

    class Batches:
        def __iter__(self) -> Iterator[Batch]:
            for x, target in batches(examples(8, 1), *[1] * 8):
                assert sum(ref() is not None for ref in alive) <= 1
                x = x.clone()
                alive.append(weakref.ref(x))
                yield x, target
            kept.append(sum(type(one) is Tensor and one.shape == (1, 1, 6) for one in gc.get_objects()))

    for damping, query in ((0.1, batches(examples(2, 2), 2)), (0.1, None), (None, None)):
        influence(adapted(), Batches(), query, loss=loss, damping=damping)
    assert len(alive) == 40 and len(kept) == 5 and max(kept) <= 4, kept


def test_a_layer_without_a_part_in_a_batch_adds_nothing() -> None:
    """As an expert without tokens: its curvature is zero."""

    model, train, query = adapted(), examples(5, 1), examples(3, 2)
    asked = of_examples(model, query)
    model.whole = False
    own = of_examples(model, train)

    def of_batch(model: nn.Module, batch: Batch) -> Tensor:
        model.whole = len(batch[1]) == 3  # the query's
        return loss(model, batch)

    got = influence(model, batches(train, 4, 1), batches(query, 3), loss=of_batch)
    first = [{"first": found["first"]} for found in (own, asked)]
    assert not own["second"].any() and asked["second"].any()
    assert relative(got, truth(*first, 0.1, first[0])) < 1e-10
    assert (
        relative(
            influence(model, batches(train, 4, 1), batches(query, 3), loss=of_batch, damping=None), truth(*first, None, {})
        )
        < 1e-10
    )


def test_the_model_is_as_it_was() -> None:
    model, train = adapted(), batches(examples(5, 1), 5)
    model.train()
    loss(model, train[0]).backward()
    before = copy.deepcopy({name: (p.detach(), p.grad, p.requires_grad) for name, p in model.named_parameters()})
    with torch.no_grad():
        influence(model, train, train, loss=loss)
    for name, p in model.named_parameters():
        value, grad, requires_grad = before[name]
        assert torch.equal(p, value) and p.requires_grad == requires_grad
        assert (p.grad is None) == (grad is None) and (grad is None or torch.equal(p.grad, grad))
    assert model.training


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = io.StringIO()
    seen.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", seen)
    train = batches(examples(4, 1), 2, 2)
    influence(adapted(), train, train, loss=loss)
    assert "influence 6/6" in seen.getvalue()
    seen.truncate(0)
    influence(adapted(), iter(train), loss=loss, damping=None)
    influence(adapted(), train, loss=loss, progress=False)
    assert "influence" not in seen.getvalue()


@pytest.mark.parametrize("reduce", [F.cross_entropy, lambda y, t: F.cross_entropy(y, t, reduction="none").double().mean()])
def test_a_mean_is_warned_of(reduce: Callable) -> None:
    train = batches(examples(4, 1), 3, 1)
    with pytest.warns(UserWarning, match=r"loss: expected a sum over the 3 examples of a batch, got a mean \((NllL|Mean)"):
        influence(adapted(), train, loss=lambda m, b: reduce(m(b[0]), b[1]), damping=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        influence(adapted(), batches(examples(4, 1), *[1] * 4), loss=lambda m, b: reduce(m(b[0]), b[1]))
        influence(adapted(), train, loss=lambda m, b: reduce(m(b[0]), b[1]) * len(b[1]))
        influence(adapted(), train, loss=lambda m, b: m(b[0]).mean(1).sum())


def test_bad_input() -> None:
    model, train = adapted(), batches(examples(4, 1), 2, 2)
    merged, hooked = merge(copy.deepcopy(model)), copy.deepcopy(model)
    hooked.second.core.register_post_accumulate_grad_hook(lambda p: None)
    shuffled = DataLoader(TensorDataset(torch.zeros(3, 4, 6, dtype=WIDE), torch.zeros(3, dtype=torch.long)), shuffle=True)
    nan = (train[0][0] * float("nan"), train[0][1])
    for words, kind, message in (
        ({"model": nn.Linear(2, 2)}, RuntimeError, "model: expected one with a LoTR adapter"),
        ({"model": merged}, RuntimeError, "influence: expected unmerged layers, got 'first'"),
        ({"model": hooked}, ValueError, "post_accumulate_grad hooks, got one at the core of 'second'"),
        ({"train": 3}, TypeError, "train: expected batches, got int"),
        ({"train": iter(train)}, TypeError, "train: expected batches that can be read twice.*got list_iterator"),
        ({"train": shuffled}, ValueError, "train: expected batches in a fixed order"),
        ({"query": shuffled}, ValueError, "query: expected batches in a fixed order"),
        ({"train": []}, ValueError, "train: expected at least one example, got none"),
        ({"train": [], "damping": None}, ValueError, "train: expected at least one example, got none"),
        ({"query": []}, ValueError, "query: expected at least one example, got none"),
        ({"train": [train[0], nan]}, ValueError, "loss: expected finite gradients, got NaN or infinity in batch 1 of train"),
        ({"query": [nan]}, ValueError, "got NaN or infinity in batch 0 of query"),
        ({"loss": None}, TypeError, "loss: expected a function"),
        ({"loss": lambda m, b: m(b[0])}, ValueError, r"loss: expected one number per batch, got shape \(2, 3\)"),
        ({"loss": lambda m, b: torch.zeros(())}, ValueError, "loss: expected one that depends on the adapted layers"),
        ({"loss": lambda m, b: b[0].clone().requires_grad_().sum()}, ValueError, "loss: expected one that depends on the adap"),
        ({"damping": 0}, ValueError, "damping: expected a positive number, or None for the plain dot product, got 0"),
        ({"damping": float("nan")}, ValueError, "damping: expected a positive number"),
        ({"damping": True}, TypeError, "damping: expected a number or None, got bool True"),
        ({"damping": 1e-300}, ValueError, "damping: expected enough to invert the curvature of 'first', got 1e-300"),
        ({"damping": None, "curvature": loss}, ValueError, "curvature: expected None without damping"),
        ({"curvature": 1}, TypeError, "curvature: expected a function"),
    ):
        given = {"model": model, "train": train, "loss": loss} | words
        with pytest.raises(kind, match=message):
            influence(given.pop("model"), given.pop("train"), given.pop("query", None), **given)
    assert all(p.requires_grad == q.requires_grad for p, q in zip(model.parameters(), adapted().parameters()))


def test_train_that_changes_between_its_readings_is_refused() -> None:
    class Shrinking:
        def __init__(self) -> None:
            self.found = batches(examples(4, 1), 2, 1, 1)

        def __iter__(self) -> Iterator[Batch]:
            yield from self.found
            self.found.pop()

    with pytest.raises(ValueError, match="train: expected the same examples at each reading, got 4 and then 3"):
        influence(adapted(), Shrinking(), loss=loss)
