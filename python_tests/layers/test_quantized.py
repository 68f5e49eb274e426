"""Adapters over quantised layers: the base's own forward runs, its weight is never read, merges are made on request only."""

from __future__ import annotations

import copy
import importlib.util
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from quantised import QUANTISED, TARGETS, Dense, Rounded, codes, with_layers
from torch import Tensor, nn
from toys import IDS, Toy, adapted, loss, plain, randomize, toy

from lotr_ext import (
    CoreES,
    LoTRConfig,
    LoTRLinear,
    LoTRWrapped,
    TaskBank,
    load_adapter,
    merge,
    mixed,
    save_adapter,
    trainable_summary,
    unload,
    unmerge,
)
from lotr_ext.layers import quantized, wrapped
from lotr_ext.model.adapted import adapted_layers
from lotr_ext.model.apply import apply_lotr
from nets import relative

LIBRARIES = Path(sys.prefix) / "quantized"  # where make setup puts torchao and bitsandbytes


@pytest.mark.slow
@pytest.mark.skipif(not LIBRARIES.is_dir(), reason="torchao and bitsandbytes are missing: run make setup")
def test_with_the_real_libraries() -> None:
    """In a process of its own: wherever transformers finds torchao it imports it, loudly, at each from_pretrained."""
    here = Path(__file__).resolve().parent
    others = ("interop/test_peft.py", "model/test_packed_experts.py", "model/test_packed_loading.py")
    path = os.pathsep.join(filter(None, [str(here.parent), str(LIBRARIES), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, *"-m pytest -v -p no:cacheprovider -k".split(), "torchao or bitsandbytes or compressed_tensors"]
    run = subprocess.run(
        [*command, __file__, *(str(here.parent / other) for other in others)],
        env=dict(os.environ, PYTHONPATH=path),
        cwd=here.parent,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-2000:]
    assert "skipped" not in run.stdout.splitlines()[-1]
    experts = (
        "[torchao Int8Tensor",
        "[torchao Float8Tensor",
        "[bitsandbytes nf4",
        "[bitsandbytes nf4 nested",
        "_checkpoint_with",
        "of_compressed_tensors",
        "layers_of_compressed_tensors[nvfp4-pack-quantized",
    )
    for name in ("torchao int8", "torchao int4", "bitsandbytes 4 bit", "bitsandbytes 8 bit", "torchao_base", *experts):
        assert any(name in line and "PASSED" in line for line in run.stdout.splitlines()), name


SCHEMES = {"nvfp4-pack-quantized": "NVFP4A16", "mxfp4-pack-quantized": "MXFP4A16", "float-quantized": "FP8_DYNAMIC"}


@pytest.mark.skipif(importlib.util.find_spec("compressed_tensors") is None, reason="tested where it is on the path")
@pytest.mark.parametrize("format", SCHEMES)
def test_layers_of_compressed_tensors(format: str) -> None:
    """They stay nn.Linear, and a forward of their own makes the weight dense when it first runs; FP8_DYNAMIC rounds x too."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme

    base = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 64)).bfloat16()
    config = QuantizationConfig(config_groups={"all": preset_name_to_scheme(SCHEMES[format], ["Linear"])}, format=format)
    apply_quantization_config(base, config)
    for layer in base[::2]:
        if hasattr(layer, "weight_global_scale"):
            layer.weight_global_scale.data.fill_(100)
        layer.weight_scale.data = torch.full_like(layer.weight_scale, 8 if format.startswith("nvfp4") else 0.03)
    ModelCompressor(quantization_config=config).compress_model(base)
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    model = apply_lotr(copy.deepcopy(base), LoTRConfig(rank=4, target_modules=["0", "2"]))
    assert {name for _, name in trainable_summary(model).formats} == {f"compressed-tensors {format}"}
    assert torch.equal(model(x), base(x))
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            layer.core.normal_()
    first = model[0]
    update = x.float() @ first.factors.A @ first.core @ first.factors.B.T
    assert relative(first(x).float() - base[0](x).float(), update.double()) < 2e-2  # bfloat16
    model(x).square().sum().backward()
    assert all(layer.core.grad.abs().sum() > 0 for layer in adapted_layers(model).values())
    with pytest.raises(TypeError, match="merge: expected a base whose dense weight can be read"):
        merge(model, dequantize=True)


@pytest.mark.parametrize("name", QUANTISED)
def test_trains_saves_and_merges_on_request(name: str, either_path: str, tmp_path) -> None:
    base = QUANTISED[name](toy(d=64))  # bitsandbytes' kernels want multiples of 32
    want = base(IDS).detach()
    model = apply_lotr(copy.deepcopy(base), LoTRConfig(rank=4, target_modules=TARGETS))
    assert {type(layer) for layer in adapted_layers(model).values()} == {LoTRWrapped}
    assert torch.equal(model(IDS), want)

    randomize(model)
    definition = plain(copy.deepcopy(model))
    for net in (model, definition):
        loss(net).backward()
    truth = dict(definition.named_parameters())
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert relative(parameter.grad, truth[key].grad.double()) < 2e-5, key

    save_adapter(model, tmp_path)
    trained = model(IDS).detach()
    assert torch.equal(load_adapter(copy.deepcopy(base), tmp_path)(IDS), trained)

    with torch.no_grad():
        model.eval()(IDS)  # here bitsandbytes moves its 4-bit codes, and rounds their scales to bfloat16 for good
    model.train()
    before = parts_of(model)
    with pytest.raises(TypeError, match=r"'blocks.0.q'.*quantised.*dequantize=True"):
        merge(model)
    assert parts_of(model) == before
    merge(model, dequantize=True)
    assert {type(layer.base_layer) for layer in adapted_layers(model).values()} == {nn.Linear}
    tolerance = 0.02 if "bitsandbytes" in name else 2e-5  # its 8 bits round x too, which a dense layer does not
    assert relative(model(IDS), trained.double()) < tolerance
    unmerge(model)
    assert relative(model(IDS), trained.double()) < tolerance and parts_of(model) == before

    unload(model, merge=True, dequantize=True)
    assert type(model.blocks[0].q) is nn.Linear and relative(model(IDS), trained.double()) < tolerance


MANY = torch.randint(0, 29, (110, 20), generator=torch.Generator().manual_seed(1))  # 2,200 tokens
ONE_LAYER = {name: make for name, make in QUANTISED.items() if "torchao" in name or name == "bitsandbytes 4 bit"}


@pytest.mark.parametrize("name", ONE_LAYER)
def test_many_tokens_run_as_one_layer_that_keeps_no_dense_weight(name: str, monkeypatch) -> None:
    model = apply_lotr(QUANTISED[name](toy(d=64)), LoTRConfig(rank=4, target_modules=TARGETS))
    randomize(model)
    alive, counts = [], []

    def watched(module: nn.Module, x: Tensor) -> Callable[[], Tensor]:
        def dense() -> Tensor:
            alive.append(weakref.ref(W := make()))
            counts.append(sum(ref() is not None for ref in alive))
            return W

        make = quantized.one_layer(module, x)
        return dense

    monkeypatch.setattr(wrapped, "one_layer", watched)
    total = model(MANY).square().sum()
    assert len(counts) == 6 and not any(ref() is not None for ref in alive)
    total.backward()
    # again for the gradients of x, which q and v of the first block do not need
    assert len(counts) == 6 + 4 and max(counts) == 1 and not any(ref() is not None for ref in alive)
    got = {key: p.grad for key, p in model.named_parameters() if p.requires_grad}
    monkeypatch.setattr(wrapped, "one_layer", lambda *_: None)  # the base's own forward, and the adapter onto it
    model.zero_grad()
    want = model(MANY).square().sum()
    want.backward()
    assert relative(total.detach(), want.double()) < 1e-5
    for key, p in model.named_parameters():
        assert not p.requires_grad or relative(got[key], p.grad.double()) < 1e-5, key


@pytest.mark.parametrize("name", [name for name in ONE_LAYER if "int8" in name])
def test_hooks_of_the_base_are_called_with_many_tokens(name: str) -> None:
    model, called = QUANTISED[name](toy(d=64)), []
    model.blocks[0].q.register_forward_hook(lambda module, args, y: called.append(y.shape))
    apply_lotr(model, LoTRConfig(rank=4, target_modules=TARGETS))(MANY)
    assert len(called) == 1


@pytest.mark.parametrize("name", [name for name in QUANTISED if "bitsandbytes" in name])
def test_gradients_after_an_evaluation_are_those_before_it(name: str) -> None:
    """bitsandbytes' 4 bits have kernels without a gradient of x on some CPUs, which an evaluation selects for good."""
    model = apply_lotr(QUANTISED[name](toy(d=64)), LoTRConfig(rank=4, target_modules=TARGETS))
    randomize(model)
    grads = []
    for train in (True, True, False):  # the last one without model.train() after the evaluation
        loss(model.train(train)).backward()
        grads.append({key: p.grad for key, p in model.named_parameters() if p.requires_grad})
        model.zero_grad()
        with torch.no_grad():
            model.eval()(IDS)
    for got in grads[1:]:
        assert all(relative(got[key], grads[0][key].double()) < 0.02 for key in got)


@pytest.mark.parametrize("name", QUANTISED)
def test_evolves_by_forwards_alone(name: str) -> None:
    """An accuracy over a base of which no gradient is taken."""
    model = apply_lotr(QUANTISED[name](toy(d=64)).eval(), LoTRConfig(rank=4, scaling=16.0, target_modules=TARGETS))
    es = CoreES(TaskBank(model, 16), 16, 0.3, lr=0.1)
    ids = torch.randint(0, 29, (24, 5), generator=torch.Generator().manual_seed(0))
    labels, seen = (ids[:, 0] + ids[:, 1]) % 3, []
    for _ in range(20):
        index = es.ask()
        with torch.inference_mode(), mixed(model, index.repeat_interleave(24)):
            right = model(ids.repeat(16, 1)).argmax(1) == labels.repeat(16)
        es.tell(right.view(16, 24).sum(1))
        seen.append(right.double().mean().item())
    assert seen[-1] > seen[0] + 0.1


@pytest.mark.parametrize("kind", [Dense, Rounded])
def test_all_linear_means_layers_that_can_be_made_dense(kind: type[Rounded]) -> None:
    model = apply_lotr(with_layers(kind), LoTRConfig(rank=2))
    adapted = {name.rpartition(".")[2] for name in adapted_layers(model)}
    assert (kind is Dense) == (set(TARGETS) <= adapted) and adapted - set(TARGETS)
    assert (kind is Rounded) == ("a Rounded: name it to adapt it" in str(trainable_summary(model)))


def test_transformers_fp8_layers_are_merged_on_request() -> None:
    """Their own forward needs a GPU's kernels."""
    from transformers.integrations.finegrained_fp8 import FP8Linear

    def converted(linear: nn.Linear) -> nn.Module:
        layer = FP8Linear(linear.in_features, linear.out_features, block_size=(16, 12))
        layer.weight.data = (linear.weight * 100).to(torch.float8_e4m3fn)
        layer.weight_scale_inv.data = torch.rand(layer.weight_scale_inv.shape) + 0.5
        return layer

    model = apply_lotr(with_layers(converted), LoTRConfig(rank=4, target_modules=TARGETS))
    randomize(model)
    assert dict(trainable_summary(model).formats).keys() == adapted_layers(model).keys()
    layer = model.blocks[1].down
    base, parts = layer.base_layer, parts_of(model)
    scales = base.weight_scale_inv.repeat_interleave(16, 0)[:16].repeat_interleave(12, 1)[:, :32]
    with pytest.raises(TypeError, match="dequantize=True"):
        merge(model)
    merge(model, dequantize=True)
    want = base.weight.double() * scales.double() + layer.delta_weight().double()
    assert relative(layer.base_layer.weight, want) < 1e-6
    unmerge(model)
    assert parts_of(model) == parts


def test_the_dense_layer_takes_the_dtype_that_is_asked_for() -> None:
    model = adapted_over(Dense)
    merge(model, dequantize=torch.bfloat16)
    layer = model.blocks[0].q.base_layer
    assert layer.weight.dtype == layer.bias.dtype == torch.bfloat16
    unmerge(model)
    delta, dense = model.blocks[0].q.delta_weight(), model.blocks[0].q.base_layer.dequantize()
    assert torch.equal(layer.weight, (dense + delta).bfloat16())  # summed in float32, cast once


def adapted_over(kind: type[nn.Module]) -> Toy:
    model = apply_lotr(with_layers(kind), LoTRConfig(rank=4, target_modules=TARGETS)).eval()
    randomize(model)
    return model


def test_a_base_that_nothing_dequantises_is_refused_with_and_without_the_request() -> None:
    model = adapted_over(Rounded)
    before = parts_of(model)
    for request in (False, True):
        with pytest.raises(TypeError, match=r"dense weight can be read .* got 'blocks.0.q' over Rounded"):
            merge(model, dequantize=request)
    with pytest.raises(TypeError, match="dense weight can be read"):
        unload(model, merge=True, dequantize=True)
    assert parts_of(model) == before


def parts_of(model: Toy) -> list[tuple[str, int, bool]]:
    """Which modules stand where, and which of them are merged."""
    return [(name, id(m), getattr(m, "merged", False)) for name, m in model.named_modules()]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda w: w.T[:3], r"expected floating \[16, 16\] of Dense, got torch.float32 \(3, 16\)"),
        (lambda w: w.to(torch.int8), "got torch.int8"),
        (lambda w: "W", "got str"),
    ],
)
def test_what_a_dequantiser_gives_is_checked_and_nothing_is_half_merged(answer, message, monkeypatch) -> None:
    model = adapted_over(Dense)
    model.blocks[1].v.base_layer.answer = answer  # an instance's own: called with the weight alone
    x, parts = model(IDS).detach(), parts_of(model)
    with pytest.raises(ValueError, match=message):
        merge(model, dequantize=True)
    assert parts_of(model) == parts and torch.equal(model(IDS), x)
    assert not any(layer.merged for layer in adapted_layers(model).values())


def test_without_a_backup_there_is_no_way_back() -> None:
    model = adapted_over(Dense)
    trained = model(IDS).detach()
    merge(model, dequantize=True, keep_backup=False)
    for call in (unmerge, lambda m: unload(m, merge=False)):
        with pytest.raises(RuntimeError, match=r"quantised base of 'blocks.0.q'.*keep_backup=False"):
            call(model)
    assert relative(model(IDS), trained.double()) < 2e-5
    unload(model, merge=True)
    assert type(model.blocks[0].q) is nn.Linear


def test_the_base_comes_back_where_and_as_the_model_is_now() -> None:
    model = adapted_over(Dense)
    merge(model, dequantize=True)
    model.train().to("meta")
    unmerge(model)
    assert all(layer.base_layer.training and layer.base_layer.codes.is_meta for layer in adapted_layers(model).values())


@pytest.mark.parametrize("request_", ["yes", 1, torch.int8])
def test_dequantize_is_checked(request_: object) -> None:
    model = adapted()
    with pytest.raises(TypeError, match="dequantize: expected True, False or a floating dtype"):
        merge(model, dequantize=request_)


def test_safe_refuses_what_is_not_finite() -> None:
    model = adapted_over(Dense)
    model.blocks[1].q.base_layer.scale[0] = float("inf")
    with pytest.raises(ValueError, match=r"merge: expected finite weights.*'blocks.1.q'"):
        merge(model, safe=True, dequantize=True)
    assert not any(layer.merged for layer in adapted_layers(model).values())


def test_a_quantised_module_cannot_be_trained_whole() -> None:
    model = codes(toy())
    config = LoTRConfig(rank=2, target_modules=["q", "v"], modules_to_save=["blocks.1.down"])
    with pytest.raises(ValueError, match=r"can be trained, got blocks.1.down.weight, quantised"):
        apply_lotr(model, config)
    assert not hasattr(model, "lotr_factors") and type(model.blocks[0].q) is nn.Linear


def test_svd_cannot_change_a_quantised_weight() -> None:
    model = codes(toy())
    with pytest.raises(ValueError, match=r'"svd" can read and write, got \'blocks.0.q\''):
        apply_lotr(model, LoTRConfig(rank=2, init="svd", target_modules=TARGETS))
    assert not hasattr(model, "lotr_factors")


def test_quantising_after_the_adapter_is_refused_at_merge() -> None:
    model = codes(adapted())
    assert type(model.blocks[0].q) is LoTRLinear
    with pytest.raises(TypeError, match=r"'blocks.0.q'; quantise a model before apply_lotr"):
        merge(model)
