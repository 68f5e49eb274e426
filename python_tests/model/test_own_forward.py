"""Linear layers with hooks or a forward of their own are adapted and merged if they return x W^T + bias."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as nnf
from torch.nn.utils import parametrizations
from toys import target_names

from lotr_ext import (
    LoTRConfig,
    LoTRWrapped,
    apply_lotr,
    load_adapter,
    lotr_parameters,
    merge,
    save_adapter,
    trainable_summary,
    unload,
    unmerge,
)
from nets import relative


class Product(nn.Linear):
    """As transformers' FalconLinear."""

    def forward(self, x):
        return x @ self.weight.T + self.bias


class Router(nn.Linear):
    """As transformers' Llama4Router. calls: with values."""

    calls = 0

    def forward(self, x):
        logits = super().forward(x)
        self.calls += 1
        return logits.topk(2).indices, logits


class Grouped(nn.Linear):
    """As transformers' DeepseekV4GroupedLinear: each part of x [.., 2, in_features] has its own rows of the weight."""

    def forward(self, x):
        w = self.weight.view(2, -1, self.in_features)
        return torch.einsum("...gk,gnk->...gn", x.view(*x.shape[:-2], 2, self.in_features), w)


class Reads(nn.Linear):
    """A product that cannot run without values."""

    def forward(self, x):
        return super().forward(x) if x.sum().item() < 1e30 else x


class Net(nn.Module):
    def __init__(self, special: nn.Module):
        super().__init__()
        self.plain, self.special, self.last = nn.Linear(8, 8), special, nn.Linear(8, 8)

    def forward(self, x):
        y = self.special(self.plain(x).tanh())
        return self.last(y[1] if isinstance(y, tuple) else y)


def hooked() -> nn.Module:
    linear = nn.Linear(8, 8)
    linear.seen = []
    linear.register_forward_hook(lambda module, args, y: module.seen.append(y))
    return linear


def hooked_conv1d() -> nn.Module:
    conv = pytest.importorskip("transformers.pytorch_utils").Conv1D(8, 8)
    nn.init.normal_(conv.bias)
    conv.register_forward_pre_hook(lambda module, args: None)
    return conv


def given_forward() -> nn.Module:
    linear = nn.Linear(8, 8)
    linear.forward = lambda x: nnf.linear(x, linear.weight, linear.bias)
    return linear


def adapted(special: nn.Module, **settings) -> Net:
    model = apply_lotr(Net(special), LoTRConfig(rank=2, **settings))
    for parameter in lotr_parameters(model):
        nn.init.normal_(parameter, 0.5)
    return model.eval()


BASES = {
    "hooks": hooked,
    "a hooked Conv1D": hooked_conv1d,
    "a forward of its class": lambda: Product(8, 8),
    "a given forward": given_forward,
    "a forward that reads values": lambda: Reads(8, 8),
}


@pytest.mark.parametrize("magnitude", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_merging_adds_to_the_weight_and_keeps_the_module(base: str, magnitude: bool, tmp_path) -> None:
    torch.manual_seed(0)
    special, x = BASES[base](), torch.randn(5, 8)
    bits = special.weight.detach().clone()
    model = adapted(special, magnitude=magnitude, target_modules=["plain", "special", "last"])
    assert isinstance(model.special, LoTRWrapped)
    with torch.no_grad():
        want = model(x)
        assert relative(model.special.to_linear()(x), model.special(x).double()) < 2e-5
        delta = model.special.delta_weight()
        merge(model)
        assert model.special.merged and model.special.base_layer is special and relative(model(x), want.double()) < 2e-5
        if not magnitude:
            stored = special.weight.t() if base == "a hooked Conv1D" else special.weight
            assert relative(stored - (bits.t() if base == "a hooked Conv1D" else bits), delta.double()) < 1e-5
        with pytest.raises(RuntimeError, match="merged"):
            model.special.state_dict()
        unmerge(model)
        assert torch.equal(special.weight, bits) and torch.equal(model(x), want)
        if not magnitude:
            merge(model, keep_backup=False)
            unmerge(model)
            assert relative(special.weight, bits.double()) < 1e-5 and relative(model(x), want.double()) < 2e-5
        save_adapter(model, tmp_path)
        load_adapter(unload(model, merge=False), tmp_path)
        model.eval()
        assert relative(model(x), want.double()) < 2e-5
        assert unload(model, merge=True).special is special and relative(model(x), want.double()) < 2e-5


def doubled() -> nn.Module:
    linear = nn.Linear(8, 8)
    linear.register_forward_hook(lambda module, args, y: 2 * y)
    return linear


@pytest.mark.parametrize("special", [doubled, lambda: parametrizations.weight_norm(nn.Linear(8, 8))])
def test_a_base_that_is_no_product_is_not_merged_and_nothing_changes(special) -> None:
    torch.manual_seed(0)
    model, x = adapted(special()), torch.randn(5, 8)
    before, want = model.plain.weight.clone(), model(x)
    with pytest.raises(TypeError, match="special"):
        merge(model)
    with pytest.raises(TypeError):
        model.special.merge()
    if special is doubled:
        with pytest.raises(TypeError, match="returns something else"):
            model.special.to_linear()
    assert torch.equal(model.plain.weight, before) and torch.equal(model(x), want)
    assert not any(layer.merged for layer in (model.plain, model.special, model.last))


def test_a_product_is_called_in_eval_mode_and_keeps_its_mode() -> None:
    linear = nn.Linear(8, 8)
    linear.register_forward_hook(lambda module, args, y: nnf.dropout(y, 0.5, module.training))
    model = adapted(linear).train()
    state = torch.get_rng_state()
    merge(model)
    assert linear.training and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("special, what", [(Router, "a tuple"), (Grouped, "RuntimeError")])
def test_all_linear_leaves_out_what_is_no_product(special: type[nn.Module], what: str) -> None:
    model = Net(special(8, 8))
    with pytest.warns(UserWarning, match=f"left out special: its forward .*{what}"):
        assert target_names(model) == ["plain", "last"]
    assert getattr(model.special, "calls", 0) == 0
    with pytest.warns(UserWarning, match="special"):
        apply_lotr(model, LoTRConfig(rank=2))
    assert what in dict(trainable_summary(model).left_out)["special"]


def test_a_name_of_what_is_no_product_is_refused() -> None:
    with pytest.raises(ValueError, match=r"special.*a tuple"):
        target_names(Net(Router(8, 8)), target_modules=["special"])
    model = apply_lotr(Net(Grouped(8, 8)), LoTRConfig(rank=2, target_modules=["special"]))  # raised an error: perhaps it works
    with pytest.raises(TypeError, match="return"):
        model.special(torch.randn(3, 2, 8))
    with pytest.raises(TypeError, match=r"special.*returns something else"):
        merge(model)


@torch.no_grad()
def test_peft_merges_a_product() -> None:
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    from lotr_ext.interop.peft import LoTRPeftConfig

    torch.manual_seed(0)
    x, special = torch.randn(5, 8), Product(8, 8)
    bits = special.weight.detach().clone()
    model = peft.get_peft_model(Net(special), LoTRPeftConfig(r=2, target_modules=["special"])).eval()
    for name, parameter in model.named_parameters():
        if "lotr" in name:
            nn.init.normal_(parameter, 0.5)
    want = model(x)
    model.merge_adapter()
    assert not torch.equal(special.weight, bits) and relative(model(x), want.double()) < 2e-5
    model.unmerge_adapter()
    assert torch.equal(special.weight, bits)


def test_pefts_all_linear_leaves_out_the_same() -> None:
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    from lotr_ext.interop.peft import LoTRPeftConfig

    with pytest.warns(UserWarning, match="left out special: its forward"):
        model = peft.get_peft_model(Net(Router(8, 8)), LoTRPeftConfig(r=2, target_modules="all-linear"))
    assert {name.rpartition(".")[2] for name, m in model.named_modules() if hasattr(m, "lotr_adapter")} == {"plain", "last"}
    with pytest.warns(UserWarning, match="left out special: its forward"):
        model.add_adapter("second", LoTRPeftConfig(r=2, target_modules="all-linear"))
    assert all(set(m.lotr_adapter) == {"default", "second"} for m in model.modules() if hasattr(m, "lotr_adapter"))
    assert model.peft_config["second"].target_modules == {"plain", "last"}
