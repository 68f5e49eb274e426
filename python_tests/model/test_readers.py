"""Layers that other code reads by their weight: refused, warned of once, or the reading method is refused."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toys import randomize, refused, target_names

from lotr_ext import LoTRConfig, apply_lotr, trainable_summary, unload
from lotr_ext.model.adapted import adapted_layers


def attention(x: Tensor, qkv: Tensor, proj: Tensor) -> Tensor:
    q, k, v = F.linear(x, qkv).chunk(3, -1)
    return F.linear(F.scaled_dot_product_attention(q, k, v), proj)


class Window(nn.Module):
    """As torchvision's Swin: a function gets the weights, and no layer is called. The mixing layer is called."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj, self.mix = nn.Linear(8, 24, bias=False), nn.Linear(8, 8, bias=False), nn.Linear(8, 8)
        nn.init.normal_(self.mix.weight.data)

    def attend(self, x: Tensor) -> Tensor:
        return attention(x, self.qkv.weight, self.proj.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(self.attend(x).to(self.mix.weight.dtype))


class ShiftedWindow(Window):
    pass


class Either(nn.Module):
    """As timm's BEiT: the layer is called, or its weight is read."""

    def __init__(self, fused: bool = False) -> None:
        super().__init__()
        self.fc, self.fused = nn.Linear(8, 8), fused

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.fc.weight, self.fc.bias) if self.fused else self.fc(x)


class Attention(nn.Module):
    """As diffusers': a processor calls the layers, or the one that fuse_projections makes of them."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.out = (nn.Linear(8, 8, bias=False) for _ in range(4))
        self.processor = call_each

    @torch.no_grad()
    def fuse_projections(self) -> None:
        self.to_qkv = nn.Linear(8, 24, bias=False)
        self.to_qkv.weight.copy_(torch.cat([self.to_q.weight.data, self.to_k.weight.data, self.to_v.weight.data]))

    def forward(self, x: Tensor) -> Tensor:
        return self.processor(self, x)


def call_each(attn: Attention, x: Tensor) -> Tensor:
    return attn.out(F.scaled_dot_product_attention(attn.to_q(x), attn.to_k(x), attn.to_v(x)))


def call_fused(attn: Attention, x: Tensor) -> Tensor:
    return attn.out(F.scaled_dot_product_attention(*attn.to_qkv(x).chunk(3, -1)))


class Unet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.blocks = nn.Linear(8, 8), nn.ModuleList(Attention() for _ in range(3))

    def fuse_qkv_projections(self) -> None:
        for block in self.blocks:
            block.fuse_projections()
            block.processor = call_fused

    def unfuse_qkv_projections(self) -> None:
        for block in self.blocks:
            block.processor = call_each

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return x


@pytest.mark.parametrize("make", [Window, ShiftedWindow])
def test_a_layer_that_is_read_and_never_called_is_refused(make: type[nn.Module]) -> None:
    model = nn.Sequential(make(), nn.Linear(8, 8))
    with refused(model, ValueError, match=rf"got '0.qkv', whose weight {make.__name__} reads without calling it"):
        apply_lotr(model, LoTRConfig(rank=2, target_modules=["qkv"]))
    with pytest.warns(UserWarning, match="lotr_ext: left out 0.qkv, 0.proj: ") as caught:
        apply_lotr(model, LoTRConfig(rank=2))
    assert len(caught) == 1
    assert dict(trainable_summary(model).left_out)["0.qkv"] == f"{make.__name__} reads its weight without calling it"
    randomize(model)
    model(torch.randn(2, 5, 8)).square().sum().backward()
    assert sorted(adapted_layers(model)) == ["0.mix", "1"]
    assert all(layer.core.grad is not None and layer.core.grad.abs().max() > 0 for layer in adapted_layers(model).values())


def test_rwkvs_layers_that_eval_mode_divides_are_left_out() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 4, "attention_hidden_size": 8, "intermediate_size": 12}
    ids = torch.arange(6).unsqueeze(0)

    def rwkv(every: int) -> nn.Module:
        torch.manual_seed(0)
        return transformers.RwkvForCausalLM(transformers.RwkvConfig(**sizes, context_length=8, rescale_every=every)).train()

    with refused(model := rwkv(2), ValueError, match="blocks.0.attention.output', whose weight RwkvModel in eval mode"):
        apply_lotr(model, LoTRConfig(rank=2, target_modules=["attention.output"]))
    with pytest.warns(UserWarning, match="left out rwkv.blocks.0.attention.output, rwkv.blocks.0.feed_forward.value"):
        apply_lotr(model, LoTRConfig(rank=2))
    whole = apply_lotr(rwkv(0), LoTRConfig(rank=2, target_modules=["attention.output", "feed_forward.value"]))
    for adapted in (model, whole):
        randomize(adapted)
        with torch.no_grad():
            torch.testing.assert_close(adapted.eval()(ids).logits, adapted.train()(ids).logits, rtol=1e-4, atol=1e-4)


def test_layers_that_may_be_read_are_warned_of_once_with_a_count() -> None:
    with pytest.warns(
        UserWarning, match=r"Either reads 0.fc.weight, and so do parents of 3 other layers; if it does not"
    ) as caught:
        assert target_names(nn.Sequential(*(Either() for _ in range(4)))) == [f"{i}.fc" for i in range(4)]
    assert len(caught) == 1
    with pytest.warns(UserWarning, match=r"Either reads fc.weight; if it does not"):
        assert target_names(Either()) == ["fc"]


def test_reading_a_kind_is_no_reading(recwarn: pytest.WarningsRecorder) -> None:
    class Kind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.tied = nn.Linear(8, 8), nn.Linear(8, 8)
            nn.init.normal_(self.fc.weight)

        def forward(self, x: Tensor) -> Tensor:
            if isinstance(self.fc.weight, nn.Parameter) and self.fc.weight.data.device == x.device:
                x = x.to(self.fc.weight.dtype)
            return self.fc(x) + self.tied(x)

    assert target_names(Kind()) == ["fc", "tied"] and not recwarn


def test_fusing_adapted_layers_is_refused_until_the_adapter_is_in_the_weights(recwarn: pytest.WarningsRecorder) -> None:
    torch.manual_seed(0)
    model, x = Unet(), torch.randn(2, 5, 8)
    apply_lotr(model, LoTRConfig(rank=2, target_modules=["to_q", "to_v"]))
    assert not recwarn
    randomize(model)
    y = model(x)
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(RuntimeError, match=r"fuse_qkv_projections: expected .* got 'blocks.0.to_q' with one"):
            one.fuse_qkv_projections()
        with pytest.raises(RuntimeError, match=r"fuse_projections: expected .* got 'blocks.1.to_q' with one"):
            one.blocks[1].fuse_projections()
        assert torch.equal(one(x), y)
        one.unfuse_qkv_projections()
    unload(model, merge=True)
    model.fuse_qkv_projections()
    torch.testing.assert_close(model(x), y)
    assert "fuse_projections" not in vars(model.blocks[0]) and "fuse_qkv_projections" not in vars(model)


def test_fusing_layers_without_an_adapter_stays() -> None:
    torch.manual_seed(0)
    model, x = Unet(), torch.randn(2, 5, 8)
    apply_lotr(model, LoTRConfig(rank=2, target_modules=["out"]))
    randomize(model)
    y = model(x)
    model.fuse_qkv_projections()
    torch.testing.assert_close(model(x), y)
