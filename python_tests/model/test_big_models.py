"""Models that begin without values or live on several devices: one pair of factors a group, or a refusal, never a copy."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_model
from torch import Tensor, nn
from toys import IDS, Toy, adapted, loss, randomize, toy

from lotr_ext import LoTRConfig, LoTRFactors, LoTRLinear, LoTRWrapped, load_adapter, save_adapter
from lotr_ext.interop import lotr_to_peft
from lotr_ext.model.adapted import adapted_layers, lotr_parameters
from lotr_ext.model.apply import apply_lotr
from nets import relative

CONFIG = LoTRConfig(rank=4, target_modules=["q", "v"], modules_to_save=["head"])


class ByHand(nn.Module):
    """Two layers that both register the factors: state_dict names them twice."""

    def __init__(self) -> None:
        super().__init__()
        factors = LoTRFactors(16, 16, 4)
        self.embed = nn.Embedding(29, 16)
        self.first, self.second = (LoTRLinear(16, 16, factors=factors) for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(self.embed(ids)))).mean(1)


def by_apply() -> nn.Module:
    return apply_lotr(Toy(), CONFIG)


def with_values(make) -> nn.Module:
    torch.manual_seed(3)
    model = make()
    randomize(model)
    return model


def assert_one_pair(model: nn.Module) -> None:
    """All layers train the very tensors that the model and its optimizer know."""
    layers = list(adapted_layers(model).values())
    known = {id(p) for p in model.parameters()}
    assert len({id(layer.factors) for layer in layers}) == 1
    assert {id(layers[0].factors.A), id(layers[0].factors.B)} <= known
    assert sum(p.numel() for p in lotr_parameters(model)) == 2 * 16 * 4 + len(layers) * 16


@pytest.mark.parametrize("make", [by_apply, ByHand])
@pytest.mark.parametrize("way", ["to_empty, then copied in", "assigned", "to meta and back"])
def test_a_model_from_the_meta_device_shares_its_factors(make, way: str) -> None:
    model = with_values(make)
    state = copy.deepcopy(model.state_dict())
    if way == "to meta and back":
        fresh = make().to("meta")
    else:
        with torch.device("meta"):
            fresh = make()
    trained = {name for name, p in fresh.named_parameters() if p.requires_grad}
    assert all(p.is_meta for p in fresh.parameters())
    if way == "assigned":
        fresh.load_state_dict(state, assign=True)
    else:
        fresh.to_empty(device="cpu").load_state_dict(state)
    assert {name for name, p in fresh.named_parameters() if p.requires_grad} == trained
    assert_one_pair(fresh)

    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2) for m in (model, fresh)]
    for _ in range(2):
        for net, optimizer in zip((model, fresh), optimizers):
            optimizer.zero_grad()
            net(IDS).square().mean().backward()
            optimizer.step()
    assert torch.equal(fresh(IDS), model(IDS))
    assert_one_pair(fresh)


@pytest.mark.parametrize("assign", [False, True])
def test_what_a_diverged_run_left_is_loaded(assign: bool) -> None:
    source = with_values(ByHand)
    with torch.no_grad():
        source.first.factors.A[0, 0], source.first.factors.B[1, 0] = torch.nan, torch.inf
    state, model = copy.deepcopy(source.state_dict()), ByHand()
    model.load_state_dict(state, assign=assign)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0, equal_nan=True)
    state["second.factors.A"] = state["second.factors.A"].nan_to_num(0.0)
    with pytest.raises(RuntimeError, match=r"second.factors.A: expected the values of first.factors.A.*shared, got others"):
        ByHand().load_state_dict(state, assign=assign)


@pytest.mark.parametrize("assign", [False, True])
def test_values_that_were_untied_are_refused(assign: bool) -> None:
    state = copy.deepcopy(with_values(ByHand).state_dict())
    state["second.factors.B"] = state["second.factors.B"] + 1e-3
    with pytest.raises(RuntimeError, match=r"second.factors.B: expected the values of first.factors.B.*shared, got others"):
        ByHand().load_state_dict(state, assign=assign)
    del state["second.factors.A"], state["second.factors.B"]
    model = ByHand()
    model.load_state_dict(state, strict=False, assign=assign)
    model.load_state_dict(with_values(ByHand).state_dict())  # another load, other values
    assert torch.equal(model(IDS), with_values(ByHand)(IDS))


def test_tie_weights_and_the_factors_both_hold() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    size = {"n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}

    def gpt2() -> nn.Module:
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=29, **size))
        return apply_lotr(model, LoTRConfig(rank=4, target_modules=["c_attn"]))

    model = with_values(gpt2).eval()
    with torch.device("meta"):
        fresh = gpt2().eval()
    fresh.load_state_dict(model.state_dict(), assign=True)
    fresh.tie_weights()
    assert fresh.lm_head.weight is fresh.transformer.wte.weight
    assert fresh.transformer.h[0].attn.c_attn.factors is fresh.transformer.h[1].attn.c_attn.factors
    assert torch.equal(fresh(IDS).logits, model(IDS).logits)


def test_an_svd_start_cannot_be_lost_on_the_meta_device() -> None:
    model = adapted(init="svd")
    with pytest.raises(RuntimeError, match='got meta for factors of init "svd"'):
        model.to("meta")
    assert model.double().lotr_factors["16x16"].start_A.dtype == torch.float64


def test_a_tensor_without_values_is_no_input_of_a_kernel(either_path: str) -> None:
    for part in ("A", "B", "core"):
        layer = LoTRLinear(16, 16, factors=LoTRFactors(16, 16, 4))
        owner = layer if part == "core" else layer.factors
        setattr(owner, part, nn.Parameter(getattr(owner, part).to("meta")))
        with pytest.raises(RuntimeError, match="meta"):
            layer(torch.randn(3, 16))


class Staged(nn.Module):
    """Blocks on devices of their own: activations follow."""

    def __init__(self, model: Toy) -> None:
        super().__init__()
        self.blocks = model.blocks

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x.to(block.o.weight.device))
        return x


def test_one_pair_serves_layers_on_two_devices() -> None:
    """The meta device stands for a second one: the pair stays on the first, and a gradient without values is no gradient."""
    model = Staged(Toy())
    model.blocks[1].to("meta")
    apply_lotr(model, LoTRConfig(rank=4, target_modules=["q", "v", "o"]))
    (factors,) = model.lotr_factors.values()
    assert factors.A.device.type == factors.B.device.type == "cpu"
    assert [block.q.core.is_meta for block in model.blocks] == [False, True]
    y = model(torch.randn(2, 5, 16))
    assert y.is_meta and y.shape == (2, 5, 16)
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        y.sum().backward()
    assert factors.A.grad is None and factors.B.grad is None
    layer = model.blocks[0].q
    layer(torch.randn(2, 5, 16)).sum().backward()  # the failed backward left nothing
    assert factors._group.A.pending() == factors._group.B.pending() == 0


# ---- accelerate: a device_map over the CPU and a disk -----------------------------------------------------------------

MAP = {"embed": "cpu", "blocks.0": "cpu", "blocks.1": "disk", "head": "cpu"}


def dispatched(model: nn.Module, folder: Path, device_map: dict[str, str]) -> nn.Module:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    return accelerate.dispatch_model(model, device_map, main_device="cpu", offload_dir=str(folder), force_hooks=True)


def test_an_adapter_over_offloaded_layers_is_in_memory_and_trains(tmp_path: Path) -> None:
    want = with_values(by_apply)
    torch.manual_seed(3)
    model = apply_lotr(dispatched(Toy(), tmp_path, MAP), CONFIG)
    randomize(model)
    assert model.blocks[1].q.base_layer.weight.is_meta and isinstance(model.blocks[1].q, LoTRWrapped)
    assert all(not p.is_meta for p in lotr_parameters(model))
    for net in (want, model):
        loss(net).backward()
    for got, right in zip(lotr_parameters(model), lotr_parameters(want), strict=True):
        assert relative(got.grad, right.grad.double()) < 1e-5
    save_adapter(model, tmp_path / "adapter")
    torch.manual_seed(3)
    assert torch.equal(load_adapter(Toy(), tmp_path / "adapter")(IDS), want(IDS))
    torch.manual_seed(3)
    reloaded = load_adapter(dispatched(Toy(), tmp_path / "again", MAP), tmp_path / "adapter")
    assert relative(reloaded(IDS), want(IDS).detach().double()) < 1e-6


@pytest.mark.parametrize("settings", [{}, {"core": "cp"}, {"group_by": "width"}], ids=str)
def test_a_peft_adapter_over_offloaded_layers_is_in_memory_and_trains(settings: dict, tmp_path: Path) -> None:
    peft_toys = pytest.importorskip("peft_toys")
    want = peft_toys.tuned(**settings)
    want.save_pretrained(tmp_path / "adapter")
    model = peft_toys.peft.get_peft_model(dispatched(toy(), tmp_path, MAP), peft_toys.config(**settings))
    assert model.base_model.model.blocks[1].q.base_layer.weight.is_meta
    assert not any(p.is_meta for p in model.parameters() if p.requires_grad)
    randomize(model)
    loss(model).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)
    peft_toys.peft.set_peft_model_state_dict(model, peft_toys.peft.load_peft_weights(tmp_path / "adapter"))
    assert relative(model(IDS), want(IDS).detach().double()) < 1e-6
    with pytest.raises(TypeError, match=r"merge: expected a weight with values, got one on the meta device.*blocks.1.q"):
        model.merge_adapter()
    assert not any(layer.merged for layer in model.base_model._adapted().values())


def test_an_adapter_over_offloaded_experts_is_in_memory_and_trains(tmp_path: Path) -> None:
    """Also the experts' cores, which are made for the device to which accelerate moves the experts for a forward."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"vocab_size": 29, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape = transformers.MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)
    base = transformers.MixtralForCausalLM(shape)
    config = LoTRConfig(rank=4, target_parameters=["experts.gate_up_proj", "experts.down_proj"], target_modules=["q_proj"])
    want, ids = apply_lotr(copy.deepcopy(base), config), IDS.view(1, -1)
    randomize(want)
    places = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    save_adapter(want, tmp_path / "adapter")
    for_peft = dispatched(copy.deepcopy(base), tmp_path / "disk, PEFT", places)
    model = apply_lotr(dispatched(base, tmp_path / "disk", places), config)
    assert model.model.layers[0].mlp.experts.gate_up_proj.is_meta and all(not p.is_meta for p in lotr_parameters(model))
    load_adapter(model, tmp_path / "adapter")
    for net in (want, model):
        net(ids, labels=ids, use_cache=False).loss.backward()
    for got, right in zip(lotr_parameters(model), lotr_parameters(want), strict=True):
        assert relative(got.grad, right.grad.double()) < 1e-5
    peft_toys = pytest.importorskip("peft_toys")
    lotr_to_peft(tmp_path / "adapter", tmp_path / "peft")
    loaded = peft_toys.peft.PeftModel.from_pretrained(for_peft, tmp_path / "peft", offload_dir=str(tmp_path / "to"))
    assert relative(loaded(ids).logits, want(ids).logits.double()) < 1e-6


@pytest.mark.parametrize(
    ("offloaded", "named"), [({}, "LoTRLinear.core"), ({"lotr_factors": "disk", "blocks.1": "cpu"}, "LoTRFactors.A")]
)
def test_training_an_offloaded_adapter_is_refused_and_evaluating_it_is_not(offloaded, named: str, tmp_path: Path) -> None:
    model = with_values(by_apply).eval()
    want = model(IDS).detach()
    model = dispatched(model, tmp_path, {**MAP, "lotr_factors": "cpu", **offloaded})
    with torch.no_grad():
        assert torch.equal(model(IDS), want)
    with pytest.raises(RuntimeError, match=f"{named}: expected a trained parameter in memory.*accelerate offloads"):
        model(IDS)
    with pytest.raises(RuntimeError, match="on the meta device"):
        save_adapter(model, tmp_path / "adapter")


def test_an_empty_model_is_filled_from_a_checkpoint_file(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = with_values(by_apply)
    save_model(model, str(tmp_path / "model.safetensors"))
    with accelerate.init_empty_weights():
        fresh = apply_lotr(toy(), CONFIG)
    assert all(p.is_meta for p in fresh.parameters())
    accelerate.load_checkpoint_and_dispatch(fresh, str(tmp_path / "model.safetensors"), device_map={"": "cpu"})
    assert_one_pair(fresh)
    assert torch.equal(fresh(IDS), model(IDS))


def test_an_empty_model_takes_no_adapter(tmp_path: Path) -> None:
    save_adapter(adapted(), tmp_path)
    with torch.device("meta"):
        model = Toy()
    with pytest.raises(RuntimeError, match=r"'blocks.0.q' on the meta device; materialise it first"):
        load_adapter(model, tmp_path)
    assert not hasattr(model, "lotr_factors")
