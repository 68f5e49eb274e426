"""The gradient of each example: equal to a loop over examples, and to vmap of the plain formula in float64."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable

import mixtures
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lotr_ext import LoTRConfig, apply_lotr, disabled, merge, per_example
from nets import relative

WIDE = torch.float64


class Blocks(nn.Module):
    """Two blocks of two siblings and an output layer. again: the first block runs twice. reentrant: checkpointing's kind."""

    def __init__(self, dtype: torch.dtype = WIDE):
        super().__init__()
        torch.manual_seed(0)
        for name in ("q0", "k0", "o0", "q1", "k1", "o1"):
            setattr(self, name, nn.Linear(12, 12, dtype=dtype))
        self.again, self.reentrant = False, None

    def block(self, i: int, x: Tensor) -> Tensor:
        q, k, o = (getattr(self, f"{name}{i}") for name in "qko")
        return x + o(torch.tanh(q(x)) * torch.sigmoid(k(x)))

    def forward(self, x: Tensor) -> Tensor:
        for i in (0, 0, 1) if self.again else (0, 1):
            x = self.block(i, x) if self.reentrant is None else checkpoint(self.block, i, x, use_reentrant=self.reentrant)
        return x


def adapted(dtype: torch.dtype = WIDE, **settings) -> nn.Module:
    model = apply_lotr(Blocks(dtype), LoTRConfig(**{"rank": (3, 5), "alpha": 4.0, "adapter_dtype": WIDE, **settings}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ".A" not in name and ".B" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return model


def batch(*shape: int, dtype: torch.dtype = WIDE, grad: bool = True) -> Tensor:
    x = torch.randn(*shape, 12, generator=torch.Generator().manual_seed(2), dtype=WIDE).to(dtype)
    return x.requires_grad_(grad)


def loss(y: Tensor) -> Tensor:
    return (y.square().sum() + torch.sin(y).sum()).to(torch.float32 if y.dtype != WIDE else WIDE)


def of_all(model: nn.Module) -> dict[str, Tensor]:
    """The ordinary gradients, which are then gone."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def by_loop(
    model: nn.Module, examples: list[Tensor], run: Callable[[nn.Module, Tensor], Tensor], layers: list[str]
) -> dict[str, Tensor]:
    """The gradients of the cores, by one backward for each example."""
    found: dict[str, list[Tensor]] = {name: [] for name in layers}
    for one in examples:
        model.zero_grad(set_to_none=True)
        run(model, one).backward()
        for name in layers:
            found[name].append(model.get_submodule(name).core.grad.clone())
    model.zero_grad(set_to_none=True)
    return {name: torch.stack(parts) for name, parts in found.items()}


def check(model: nn.Module, x: Tensor, tolerance: float = 1e-10, **options) -> None:
    """per_example's gradients against a loop, and all ordinary ones against a plain backward."""
    loss(model(x)).backward()
    plain, plain_dx, x.grad = of_all(model), x.grad, None
    with per_example(model, **options) as gradients:
        loss(model(x)).backward()
    ordinary, dx, x.grad = of_all(model), x.grad, None
    assert ordinary.keys() == plain.keys()
    assert all(relative(ordinary[name], plain[name]) < tolerance for name in plain)
    assert plain_dx is None or relative(dx, plain_dx) < tolerance
    want = by_loop(
        model, [x.detach()[i : i + 1].requires_grad_() for i in range(len(x))], lambda m, one: loss(m(one)), list(gradients)
    )
    assert list(gradients) == [name for name, m in model.named_modules() if hasattr(m, "delta_weight")]
    for name, gradient in gradients.items():
        assert gradient.shape == want[name].shape and relative(gradient, want[name]) < tolerance
    norms = sum(gradient.flatten(1).square().sum(1) for gradient in want.values()).sqrt()
    assert relative(gradients.norms(), norms) < tolerance


@pytest.mark.parametrize("shape", [(4,), (4, 3), (2, 3, 2), (1, 5)], ids=str)
@pytest.mark.parametrize("settings", [{}, {"group_by": "width"}, {"train": ["core"]}, {"rslora": True}], ids=str)
def test_equal_to_a_loop(shape: tuple[int, ...], settings: dict) -> None:
    check(adapted(**settings), batch(*shape))


def test_equal_to_vmap_of_the_plain_formula() -> None:
    torch.manual_seed(3)
    model = apply_lotr(nn.Sequential(nn.Linear(7, 5, dtype=WIDE)), LoTRConfig(rank=(2, 3), adapter_dtype=WIDE))
    layer, x = model[0], torch.randn(6, 4, 7, dtype=WIDE)
    nn.init.normal_(layer.core)
    A, B = layer.factors.A.detach(), layer.factors.B.detach()

    def one(core: Tensor, x: Tensor) -> Tensor:
        return loss(nn.functional.linear(x, layer.weight, layer.bias) + layer.scaling * x @ A @ core @ B.T)

    want = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0))(layer.core.detach(), x)
    with per_example(model) as gradients:
        loss(model(x)).backward()
    assert relative(gradients["0"], want) < 1e-12


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_checkpointing(reentrant: bool) -> None:
    model = adapted()
    model.reentrant = reentrant
    check(model, batch(4, 3))


def test_a_layer_that_runs_twice_has_the_sum_of_its_calls() -> None:
    model = adapted()
    model.again = True
    check(model, batch(4, 3))


@pytest.mark.parametrize("other", [1, 3])  # one row would be added to all four
def test_calls_with_other_rows_before_one_backward_are_refused(other: int) -> None:
    model = adapted()
    with (
        per_example(model),
        pytest.raises(ValueError, match=r"as many rows in all calls of '.*' before one backward, got . and "),
    ):
        (loss(model(batch(4, 3))) + loss(model(batch(other, 3)))).backward()


def test_tokens_in_one_list_need_the_batch() -> None:
    model, x = adapted(), batch(4, 3)
    with per_example(model) as want:
        loss(model(x)).backward()
    with per_example(model, batch=4) as gradients:
        loss(model(x.flatten(0, 1))).backward()
    assert all(relative(gradients[name], want[name]) < 1e-12 for name in want)


@pytest.mark.parametrize("shape", [(0,), (0, 3)], ids=str)
def test_an_empty_batch_has_no_gradients(shape: tuple[int, ...]) -> None:
    model = adapted()
    with per_example(model) as gradients:
        loss(model(batch(*shape))).backward()
    assert all(gradient.shape == (0, 3, 5) for gradient in gradients.values()) and len(gradients) == 6
    assert gradients.norms().shape == (0,) and not any(gradient.any() for gradient in of_all(model).values())


def test_micro_batches_follow_one_another() -> None:
    model, x = adapted(), batch(5, 3)
    with per_example(model) as want:
        loss(model(x)).backward()
    whole = of_all(model)
    with per_example(model) as gradients:
        for part in (x[:2], x[2:3], x[3:]):
            loss(model(part)).backward()
    assert all(relative(gradients[name], want[name]) < 1e-12 for name in want)
    parts = of_all(model)
    assert all(relative(parts[name], whole[name]) < 1e-12 for name in whole)


def test_norms_alone_are_kept() -> None:
    model, x = adapted(), batch(5, 3)
    with per_example(model) as gradients:
        loss(model(x)).backward()
    with per_example(model, norms_only=True) as norms:
        for part in (x[:2], x[2:]):
            loss(model(part)).backward()
    for name in gradients:
        assert norms[name].shape == (5,) and relative(norms[name], gradients[name].flatten(1).norm(dim=1)) < 1e-12
    assert relative(norms.norms(), gradients.norms()) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_gradients_are_float32(dtype: torch.dtype) -> None:
    model, x = adapted(torch.float32, adapter_dtype=torch.float32), batch(4, 3, dtype=torch.float32)
    with per_example(model) as want:
        loss(model(x)).backward()
    with per_example(model) as gradients, torch.autocast("cpu", dtype):
        loss(model(x)).backward()
    for name in want:
        assert gradients[name].dtype == torch.float32 and relative(gradients[name], want[name]) < 0.05


@pytest.mark.parametrize("core", ["diagonal", "tucker", "train", "few"])
def test_of_computed_cores_the_gradient_is_the_dense_ones(core: str) -> None:
    model, x = adapted(core=core, rank=4), batch(4, 3)
    loss(model(x)).backward()
    plain = of_all(model)
    with per_example(model) as gradients:
        loss(model(x)).backward()
    ordinary = of_all(model)
    assert all(relative(ordinary[name], plain[name]) < 1e-10 for name in plain)
    dense = adapted(rank=4)
    dense.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        for name in gradients:
            dense.get_submodule(name).core.copy_(model.get_submodule(name).core)
    with per_example(dense) as want:
        loss(dense(x)).backward()
    assert all(relative(gradients[name], want[name]) < 1e-10 for name in want)


@pytest.mark.parametrize("name", ["Mixtral", "GptOss"])
def test_experts_have_a_gradient_for_each_example_and_expert(name: str) -> None:
    model = mixtures.adapted(name, torch.float64, target_modules=["q_proj"])
    ids = mixtures.IDS

    def run(m: nn.Module, rows: Tensor) -> Tensor:
        return loss(m(rows, use_cache=False).logits)

    with per_example(model, batch=len(ids)) as gradients:
        run(model, ids).backward()
    model.zero_grad(set_to_none=True)
    want = by_loop(model, [ids[i : i + 1] for i in range(len(ids))], run, list(gradients))
    assert any(gradient.dim() == 4 for gradient in gradients.values())
    for key, gradient in gradients.items():
        assert gradient.shape == want[key].shape and relative(gradient, want[key]) < 1e-9
    with pytest.raises(ValueError, match=r"batch: expected the number of examples .* got None"), per_example(model):
        run(model, ids)


def test_a_recorded_backward_is_that_without_it() -> None:
    model, x = adapted(), batch(4, 3)
    found = []
    for inside in (False, True):
        with per_example(model) if inside else contextlib.nullcontext():
            (dx,) = torch.autograd.grad(loss(model(x)), x, create_graph=True)
            found.append((dx.detach(), *torch.autograd.grad(dx.square().sum(), [x, model.q0.core, model.q0.factors.B])))
    assert all(relative(got, want) < 1e-10 for want, got in zip(*found))


def test_a_layer_that_is_switched_off_has_none() -> None:
    model, x = adapted(), batch(4, 3)
    with per_example(model) as gradients, disabled(model):
        loss(model(x)).backward()
    assert len(gradients) == 0
    with pytest.raises(RuntimeError, match="norms: expected gradients, got none"):
        gradients.norms()
    with pytest.raises(KeyError):
        gradients["q0"]


def test_bad_input() -> None:
    model, x = adapted(), batch(4, 3)
    for value, kind, message in (
        (True, TypeError, "batch: expected an int or None, got bool True"),
        (2.0, TypeError, "batch: expected an int or None, got float 2.0"),
        (0, ValueError, "batch: expected at least 1, got 0"),
    ):
        with pytest.raises(kind, match=message), per_example(model, batch=value):
            pass
    frozen, merged = copy.deepcopy(model), merge(copy.deepcopy(model))
    frozen.k1.core.requires_grad_(False)
    for other, kind, message in (
        (frozen, ValueError, "model: expected cores that require grad, got a frozen one in 'k1'"),
        (merged, RuntimeError, "per_example: expected unmerged layers, got 'q0'"),
        (nn.Linear(2, 2), RuntimeError, "model: expected one with a LoTR adapter"),
    ):
        with pytest.raises(kind, match=message), per_example(other):
            pass
    with pytest.raises(ValueError, match="x: expected a batch of 5 rows"), per_example(model, batch=5):
        model(x)
    with per_example(model) as gradients:
        loss(model.q0(x)).backward()
        loss(model.k0(x[:2])).backward()
    with pytest.raises(RuntimeError, match=r"norms: expected as many rows in all layers, got 4 in 'q0' and 2 in 'k0'"):
        gradients.norms()


def test_a_compiled_model_is_refused() -> None:
    model = adapted()
    with per_example(model), pytest.raises(Exception, match="per_example: expected a model that runs eagerly"):
        torch.compile(model, backend="eager", fullgraph=True)(batch(4, 3))
