"""Adapters over quantised experts: the numbers of the experts made dense, without a dense copy that outlives a call.

The formats of torchao and bitsandbytes are tested in the process of layers/test_quantized.py.
"""

from __future__ import annotations

import copy
import importlib.util
import weakref

import mixtures
import packed
import pytest
import torch
from mixtures import adapted, logits, loss, mixture, randomize, written_out
from packed import FORMATS, e2m1, nibbles
from torch import Tensor, nn
from toys import refused

from lotr_ext import (
    LoTRConfig,
    TaskBank,
    apply_lotr,
    disabled,
    load_adapter,
    merge,
    mixed,
    save_adapter,
    trainable_summary,
    unload,
)
from lotr_ext.layers.packed import Mxfp4
from lotr_ext.layers.packed import packed as find
from lotr_ext.ops import grouped
from nets import relative

BOTH = ["experts.gate_up_proj", "experts.down_proj"]


def pair(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Adapted over packed experts, the same over dense ones, and the dense base."""
    over_packed, base = FORMATS[name](dtype)
    models = []
    for model in (over_packed, copy.deepcopy(base)):
        torch.manual_seed(5)  # of the factors
        models.append(adapted("GptOss", dtype, model=model))
    return *models, base


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "name, dtype", [*((name, torch.float32) for name in FORMATS), ("mxfp4", torch.bfloat16), ("fp8 by blocks", torch.bfloat16)]
)
def test_values_and_gradients_are_those_over_dense_experts(name, dtype):
    model, dense, base = pair(name, dtype)
    for each in (model, dense):
        loss(each).backward()
    got, want = gradients(model), gradients(dense)
    assert torch.equal(logits(model), logits(dense)) and got.keys() == want.keys() and len(got) == 8
    assert all(torch.equal(got[key], want[key]) for key in got)
    if dtype == torch.float32:
        truth, _, grads = written_out(model, base)
        assert relative(logits(model), truth) < 1e-6
        assert all(relative(got[key], grads[key]) < 5e-6 for key in grads)


@pytest.mark.parametrize("name", FORMATS)
def test_saved_loaded_disabled_and_taken_off(name, tmp_path):
    model, _, base = pair(name)
    fresh, _ = FORMATS[name]()
    y, before = logits(model), logits(base)
    save_adapter(model, tmp_path)
    assert torch.equal(logits(load_adapter(fresh, tmp_path)), y)
    with disabled(model):
        assert relative(logits(model), before) < 1e-6
    assert relative(logits(model), before) > 1e-3
    found = dict(trainable_summary(model).formats)
    want = name.removesuffix(" nested").removesuffix(" of modelopt")
    assert len(found) == 4 and set(found.values()) == {want} and f"4 x {want}" in str(trainable_summary(model))
    parts = [(key, id(m)) for key, m in model.named_modules()]
    for call in (merge, lambda m: unload(m, merge=True)):
        with pytest.raises(TypeError, match=rf"merge: expected dense experts, got 'model.layers.0.*packed as {want}"):
            call(model)
    assert torch.equal(logits(model), y) and parts == [(key, id(m)) for key, m in model.named_modules()]
    unload(model, merge=False)
    assert not any("lotr" in key for key, _ in model.named_modules())


def test_the_bases_that_are_dense_have_no_format():
    assert trainable_summary(adapted("GptOss")).formats == () and "quantised" not in str(trainable_summary(adapted("GptOss")))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant):
    model, dense, _ = pair("mxfp4")
    loss(dense.train()).backward()
    model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    loss(model).backward()
    want = gradients(dense)
    assert all(torch.equal(p, want[key]) for key, p in gradients(model).items())


def test_autocast():
    model, dense, _ = pair("mxfp4")
    with torch.autocast("cpu", torch.bfloat16):
        for each in (model, dense):
            loss(each).backward()
    want = gradients(dense)
    assert all(torch.equal(p, want[key]) for key, p in gradients(model).items())


def test_tasks_by_row():
    model, dense, _ = pair("fp8 by blocks")
    got = []
    for each in (model, dense):
        bank, gen = TaskBank(each, 2), torch.Generator().manual_seed(1)
        for _ in range(2):
            for core in bank.cores_of(bank.add()).values():
                core.copy_(torch.randn(core.shape, generator=gen))
        with mixed(each, torch.tensor([1, 0, -1])):
            got.append(logits(each))
    assert torch.equal(*got) and not torch.equal(got[0], logits(model))


def test_through_peft():
    from peft import get_peft_model

    from lotr_ext.interop.peft import LoTRPeftConfig

    got = []
    for base in FORMATS["mxfp4"]():
        torch.manual_seed(5)
        model = get_peft_model(base, LoTRPeftConfig(r=4, target_parameters=BOTH))
        randomize(model)
        loss(model).backward()
        got.append((logits(model), *gradients(model).values()))
    assert len(got[0]) == 9 and all(torch.equal(a, b) for a, b in zip(*got, strict=True))


# ---- the product ---------------------------------------------------------------------------------------------------------


class Counted(grouped.Packed):
    """Dense matrices that are handed out as a format would, with a record of what was made and what is alive."""

    format = "counted"

    def __init__(self, W: Tensor):
        self.W, self.shape, self.device, self.made, self.alive, self.most = W, tuple(W.shape), W.device, [], [], 0

    def dense(self, first: int, end: int, dtype: torch.dtype) -> Tensor:
        part = self.W[first:end].to(dtype, copy=True)
        self.made.append((first, end))
        self.alive = [ref for ref in self.alive if ref() is not None] + [weakref.ref(part)]
        self.most = max(self.most, sum(ref().shape[0] for ref in self.alive))
        return part


E, N, K = 6, 5, 7
OFFS = torch.tensor([3, 3, 4, 9, 9, 11], dtype=torch.int32)  # the experts 1 and 4 have no rows


def operands(dtype: torch.dtype = torch.float64, rows: int = 11) -> tuple[Tensor, Counted]:
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(rows, K, dtype=torch.float64, generator=gen).to(dtype).requires_grad_()
    return x, Counted(torch.randn(E, N, K, dtype=torch.float64, generator=gen))


@pytest.mark.parametrize("experts", [1, 2, 3, 100])
def test_few_experts_are_dense_at_a_time_and_none_after_the_call(experts, monkeypatch):
    monkeypatch.setitem(grouped._DENSE, "cpu", experts * N * K * 8)
    x, weight = operands()
    y = grouped.grouped_packed(x, weight, OFFS)
    want = grouped.grouped_mm(x, weight.W, OFFS)
    g = torch.randn_like(y)
    assert torch.equal(y, want) and torch.equal(*(torch.autograd.grad(t, x, g)[0] for t in (y, want)))
    assert not any(ref() is not None for ref in weight.alive) and weight.most <= experts
    forward = {1: [(0, 1), (2, 3), (3, 4), (5, 6)]}.get(experts, [(0, 1), (2, 4), (5, 6)])
    assert weight.made == 2 * forward  # again for the backward; none of the experts without rows


def test_derivatives_of_any_order():
    x, weight = operands()
    assert torch.autograd.gradcheck(lambda x: grouped.grouped_packed(x, weight, OFFS), x)
    assert torch.autograd.gradgradcheck(lambda x: grouped.grouped_packed(x, weight, OFFS).sin(), x)
    square = lambda x: grouped.grouped_packed(x, weight, OFFS).square().sum()  # noqa: E731
    assert relative(torch.func.grad(square)(x.detach()), torch.autograd.grad(square(x), x)[0]) < 1e-12


def test_rows_of_no_expert_and_no_rows_at_all():
    x, weight = operands(rows=14)
    y = grouped.grouped_packed(x, weight, OFFS)
    y.sum().backward()
    assert y.shape == (14, N) and not y[11:].any() and not x.grad[11:].any() and x.grad[:11].all()
    empty, weight = operands(rows=0)
    y = grouped.grouped_packed(empty, weight, torch.zeros(E, dtype=torch.int32))
    y.sum().backward()
    assert y.shape == (0, N) and empty.grad.shape == (0, K) and weight.made == []


def test_wrong_operands_of_the_product():
    x, weight = operands()
    with pytest.raises(ValueError, match=r"x: expected \[rows, 7\] of 6 experts, got \(11, 5\) and 6 ends"):
        grouped.grouped_packed(torch.zeros(11, N), weight, OFFS)
    with pytest.raises(ValueError, match=r"of 6 experts, got \(11, 7\) and 5 ends"):
        grouped.grouped_packed(x, weight, OFFS[:5])
    with pytest.raises(ValueError, match="offs: expected ascending ends"):
        grouped.grouped_packed(x, weight, OFFS.flip(0))


@pytest.mark.full
def test_compiled_beside_a_break_of_the_graph():
    model, dense, _ = pair("mxfp4")
    torch._dynamo.reset()
    x, index, weights = torch.randn(9, 32), torch.randint(0, 4, (9, 2)), torch.rand(9, 2)
    got, want = (m.model.layers[0].mlp.experts for m in (model, dense))
    assert relative(torch.compile(got, backend="eager")(x, index, weights), want(x, index, weights)) < 1e-5


# ---- the formats ---------------------------------------------------------------------------------------------------------


def test_every_code_and_exponent_of_mxfp4():
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(2, 1, 16, 1)
    scales = torch.arange(512, dtype=torch.int64).remainder(255).to(torch.uint8).view(2, 1, 256)
    weight = Mxfp4("w", blocks, scales)
    want = (e2m1(nibbles(blocks)) * 2.0 ** (scales.double() - 127).unsqueeze(-1)).view(2, 1, -1)
    assert weight.shape == (2, 1, 8192) and torch.equal(weight.dense(0, 2, torch.float64), want)
    in_range = (want.abs() < 1e38) & ((want.abs() > 1e-37) | (want == 0))
    for dtype in (torch.float32, torch.bfloat16):
        for c in range(2):
            assert torch.equal(weight.dense(c, c + 1, dtype)[0].double()[in_range[c]], want[c][in_range[c]])


@pytest.mark.parametrize("block", [8, 16, 20, 64])
def test_fp8_with_blocks_that_do_and_do_not_divide(block):
    """20: the last blocks are cut off; 64: a gate and an up projection have a scale each, in one block."""
    model, dense = packed.fp8(block=block)
    for module, twin in zip(packed.experts_of(model), packed.experts_of(dense), strict=True):
        for own in ("gate_up_proj", "down_proj"):
            assert torch.equal(find(module, own).dense(1, 4, torch.float32), getattr(twin, own)[1:4]), own


def test_fp4_by_32_of_deepseek_v4():
    gen, module = torch.Generator().manual_seed(0), nn.Module()
    codes = torch.randint(-128, 128, (3, 6, 32), dtype=torch.int8, generator=gen)
    scales = torch.randint(120, 130, (3, 6, 2), dtype=torch.uint8, generator=gen).view(torch.float8_e8m0fnu)
    module.register_parameter("down_proj", nn.Parameter(codes, requires_grad=False))
    module.register_parameter("down_proj_scale_inv", nn.Parameter(scales, requires_grad=False))
    weight = find(module, "down_proj")
    want = e2m1(nibbles(codes)) * scales.double().repeat_interleave(32, 2)
    assert weight.shape == (3, 6, 64) and weight.format == "fp4 by 32"
    assert torch.equal(weight.dense(1, 3, torch.float32).double(), want[1:])


@pytest.mark.skipif(importlib.util.find_spec("compressed_tensors") is None, reason="tested where it is on the path")
def test_nvfp4_is_that_of_compressed_tensors():
    """Which makes weights dense in bfloat16. (Its name is in the -k of layers/test_quantized.py.)"""
    from compressed_tensors.compressors import NVFP4PackedCompressor
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme

    model, _ = FORMATS["nvfp4"]()
    scheme, module = preset_name_to_scheme("NVFP4A16", ["Linear"]), next(packed.experts_of(model))
    stored = {name: getattr(module, f"down_proj_{name}").detach() for name in ("packed", "scale", "global_scale")}
    got = find(module, "down_proj").dense(0, 4, torch.float32)
    for c in range(4):
        parts = {f"weight_{name}": tensor[c] for name, tensor in stored.items()}
        assert relative(NVFP4PackedCompressor.decompress(parts, scheme)["weight"].float(), got[c].double()) < 4e-3


@pytest.mark.skipif("bitsandbytes nf4" not in FORMATS, reason="tested where it is on the path")
@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes_blocks_that_lie_in_two_experts(nested):
    """5 x 48 numbers an expert, 64 a block. bitsandbytes 0.50 itself reads rows of 48 wrongly on a CPU; it reads all in one row
    right."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    module, W = nn.Module(), torch.randn(40, 5, 48, generator=torch.Generator().manual_seed(0))
    module.w = nn.Parameter(W)
    replace_parameter_4bit(module, "w", compress_statistics=nested, quant_type="nf4")
    weight, state = find(module, "w"), copy.copy(module.parametrizations.w[0].quant_state)
    state.shape = torch.Size((W.numel(),))
    want = dequantize_4bit(module.parametrizations.w.original, state).view(W.shape)
    for first, end in ((0, 1), (3, 5), (39, 40), (0, 40)):
        assert torch.equal(weight.dense(first, end, torch.float32), want[first:end])
    assert relative(want, W.double()) < 0.12


# ---- refusals ------------------------------------------------------------------------------------------------------------


def without_a_row_of_scales() -> nn.Module:
    model, _ = FORMATS["mxfp4"]()
    experts = model.model.layers[1].mlp.experts
    experts.down_proj_scales = nn.Parameter(experts.down_proj_scales[:, :-1].clone(), requires_grad=False)
    return model


def without_scales() -> nn.Module:
    model, _ = FORMATS["mxfp4"]()
    del model.model.layers[0].mlp.experts.gate_up_proj_scales
    return model


def with_floating_scales() -> nn.Module:
    model, _ = FORMATS["mxfp4"]()
    experts = model.model.layers[1].mlp.experts
    experts.gate_up_proj_scales = nn.Parameter(experts.gate_up_proj_scales.float(), requires_grad=False)
    return model


def with_scales_of_other_blocks() -> nn.Module:
    model, _ = FORMATS["fp8 by blocks"]()
    experts = model.model.layers[1].mlp.experts
    experts.down_proj_scale_inv = nn.Parameter(experts.down_proj_scale_inv[:, :, :2].clone(), requires_grad=False)
    return model


def with_half_the_scales_of_nvfp4() -> nn.Module:
    model, _ = FORMATS["nvfp4"]()
    experts = model.model.layers[0].mlp.experts
    experts.down_proj_scale = nn.Parameter(experts.down_proj_scale[..., :1].clone(), requires_grad=False)
    return model


def of_bytes_alone() -> nn.Module:
    model = mixture("Mixtral")
    experts = model.model.layers[0].mlp.experts
    experts.down_proj = nn.Parameter(torch.zeros(experts.down_proj.shape, dtype=torch.uint8), requires_grad=False)
    return model


REFUSED = {
    "scales of another shape": (
        without_a_row_of_scales,
        ValueError,
        r"model\.layers\.1\.mlp\.experts\.down_proj_scales: expected shape \(4, 32, 1\).*got \(4, 31, 1\)",
    ),
    "no scales": (
        without_scales,
        TypeError,
        r"layers\.0\.mlp\.experts\.gate_up_proj_scales: expected torch.uint8, got NoneType",
    ),
    "scales of another dtype": (
        with_floating_scales,
        TypeError,
        r"layers\.1\.mlp\.experts\.gate_up_proj_scales: expected torch.uint8, got torch.float32",
    ),
    "scales of other blocks": (
        with_scales_of_other_blocks,
        ValueError,
        r"layers\.1\.mlp\.experts\.down_proj_scale_inv: expected shape \(5, 4, 3\).*got \(5, 4, 2\)",
    ),
    "nvfp4 with scales of blocks of 32": (
        with_half_the_scales_of_nvfp4,
        ValueError,
        r"layers\.0\.mlp\.experts\.down_proj_scale: expected shape \(4, 32, 2\).*got \(4, 32, 1\)",
    ),
    "a format that is not known": (
        of_bytes_alone,
        TypeError,
        r"layers\.0\.mlp\.experts\.down_proj', quantised experts of Mixtral",
    ),
}


@pytest.mark.parametrize("make, error, message", REFUSED.values(), ids=REFUSED)
def test_refused_by_name_before_anything_changes(make, error, message):
    model = make()
    with refused(model, error, match=message):
        apply_lotr(model, LoTRConfig(rank=2, target_parameters=BOTH))


def test_packed_experts_cannot_be_trained_whole():
    model, _ = FORMATS["mxfp4"]()
    with pytest.raises(ValueError, match=r"can be trained, got model.layers.1.mlp.experts.*quantised"):
        apply_lotr(model, LoTRConfig(rank=2, target_modules=["q_proj"], modules_to_save=["layers.1.mlp"]))


def test_dense_and_packed_experts_in_one_model():
    model, dense, _ = pair("mxfp4")
    model, base = FORMATS["mxfp4"]()
    model.model.layers[0].mlp = base.model.layers[0].mlp
    torch.manual_seed(5)
    model = adapted("GptOss", model=model)
    assert torch.equal(logits(model), logits(dense))
    assert [name for name, _ in trainable_summary(model).formats] == [
        f"model.layers.1.mlp.experts.lotr.{own.removeprefix('experts.')}" for own in mixtures.parameters_of("GptOss")
    ]
