"""Experts of transformers' mixtures, adapted: eight of its classes against their own eager forward in float64, and all that
holds for layers."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
import transformers
from mixtures import IDS, MIXTURES, adapted, logits, loss, mixture, randomize, written_out
from torch import nn
from toys import refused

from lotr_ext import (
    LoTRConfig,
    add_adapter,
    apply_lotr,
    delete_adapter,
    disabled,
    load_adapter,
    merge,
    mixed,
    save_adapter,
    set_adapter,
    trainable_summary,
    unload,
    unmerge,
)
from lotr_ext.layers.factors import LoTRFactors
from lotr_ext.layers.hosted import LoTRHostedExperts
from lotr_ext.model.adapted import adapted_layers
from lotr_ext.model.experts import adapt_parameter, expert_sizes, first_projection
from nets import relative

BOTH = ["experts.gate_up_proj", "experts.down_proj"]


@pytest.mark.parametrize("name", MIXTURES)
def test_numbers_and_gradients(either_path, name):
    plain = mixture(name, torch.float64)
    before = logits(plain)
    model = adapted(name, torch.float64, model=copy.deepcopy(plain), random=False)
    epsilon = 1e-12 if name != "NemotronH" else 2e-6  # which has its residuals in float32
    assert relative(logits(model), before) < epsilon  # zero change at the start
    randomize(model)
    want, _, grads = written_out(model, plain)
    assert relative(logits(model), want) < epsilon and not torch.allclose(want.to(before.dtype), before)
    loss(model).backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == grads.keys() and all(".core" in n or "lotr_factors" in n for n in trained)
    for key, parameter in trained.items():
        assert relative(parameter.grad, grads[key]) < 100 * epsilon, key


def test_attention_beside_the_experts_and_the_router_as_it_is():
    plain = mixture("Qwen3Moe", torch.float64)
    settings = {"target_modules": ["q_proj", "v_proj", "o_proj"], "rank": 3}
    model = adapted("Qwen3Moe", torch.float64, model=copy.deepcopy(plain), **settings)
    want, _, grads = written_out(model, plain)
    loss(model).backward()
    assert relative(logits(model), want) < 1e-12
    assert all(relative(p.grad, grads[n]) < 1e-10 for n, p in model.named_parameters() if p.requires_grad)
    gates = [p for n, p in model.named_parameters() if n.endswith("mlp.gate.weight")]
    assert len(gates) == 2 and not any(p.requires_grad for p in gates)
    summary = trainable_summary(model)
    assert summary.layers == 2 * (2 + 3) and summary.adapter == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_groups_shared_with_linear_layers_of_the_same_shape_and_one_parameter_alone():
    plain = mixture("Mixtral", torch.float64, intermediate_size=16)  # gate_up is 32 x 32, as q_proj
    model = adapted(model=copy.deepcopy(plain), dtype=torch.float64, target_modules=["q_proj"], target_parameters=BOTH[:1])
    assert list(model.lotr_factors) == ["32x32"]
    want, _, grads = written_out(model, plain)
    loss(model).backward()
    assert relative(logits(model), want) < 1e-12
    assert all(relative(p.grad, grads[n]) < 1e-10 for n, p in model.named_parameters() if p.requires_grad)


def test_factors_that_belong_to_widths(tmp_path):
    model = adapted("Qwen3Moe", target_modules=["q_proj", "v_proj"], group_by="width")
    assert {n for n, _ in model.lotr_factors.named_parameters()} == {
        f"{p}.value" for p in ("A_32", "A_24", "B_32", "B_16", "B_48")
    }
    y = logits(model)
    loss(model).backward()
    assert all(p.grad.any() for p in model.lotr_factors.parameters())
    save_adapter(model, tmp_path)
    assert torch.equal(logits(load_adapter(mixture("Qwen3Moe"), tmp_path)), y)
    merge(model)
    assert relative(logits(model), y) < 1e-5


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant):
    model = adapted(dtype=torch.float64, target_modules=["q_proj"]).train()
    loss(model).backward()
    want = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    loss(model).backward()
    assert all(relative(p.grad, want[n]) < 1e-12 for n, p in model.named_parameters() if p.requires_grad)


def host_of(model: nn.Module) -> nn.Module:
    return next(m for m in model.modules() if hasattr(m, "lotr"))


def routing(tokens: int, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    gen = torch.Generator().manual_seed(0)
    return torch.randint(0, experts, (tokens, 2), generator=gen), torch.rand(tokens, 2, generator=gen)


@pytest.mark.parametrize("name", ["Mixtral", "GptOss"])
def test_half_precision_and_autocast(name):
    model = adapted(name)
    host, x, (index, weights) = host_of(model), torch.randn(40, 32), routing(40, 4)
    exact = copy.deepcopy(host).double()(x.double(), index, weights.double())
    half = host_of(adapted(name, torch.bfloat16))
    y = half(x.bfloat16(), index, weights.bfloat16())
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and half.lotr.down_proj.core.grad.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        cast = host(x, index, weights)
    cast.sum().backward()
    assert relative(y, exact) < 2e-2 and relative(cast, exact) < 2e-2
    assert relative(half.lotr.down_proj.core.grad, host.lotr.down_proj.core.grad) < 5e-2


def test_compiled_where_the_base_is():
    host, x, (index, weights) = host_of(adapted("GptOss")), torch.randn(20, 32), routing(20, 4)
    core = host.lotr.gate_up_proj.core
    host(x, index, weights).square().sum().backward()
    want, core.grad = core.grad, None
    y = torch.compile(host, backend="aot_eager", fullgraph=True)(x, index, weights)
    y.square().sum().backward()
    assert relative(y, host(x, index, weights)) < 1e-5 and relative(core.grad, want) < 1e-5


@pytest.mark.parametrize("name", ["Mixtral", "GptOss"])
def test_merged_unmerged_disabled_unloaded(name):
    plain = mixture(name)
    base, before = logits(plain), {n: p.detach().clone() for n, p in plain.named_parameters()}
    config = plain.model.layers[0].mlp.experts.config
    model = adapted(name, model=plain)
    y = logits(model)
    merge(model, safe=True)
    assert relative(logits(model), y) < 1e-5 and not torch.equal(y, base)
    with pytest.warns(UserWarning, match="a merged adapter is not trained"):
        loss(model)
    unmerge(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    assert torch.equal(logits(model), y)
    with disabled(model):
        assert relative(logits(model), base) < 1e-6
    merged = unload(copy.deepcopy(model), merge=True)
    assert relative(logits(merged), y) < 1e-5
    unload(model, merge=False)
    assert model.state_dict().keys() == before.keys() and torch.equal(logits(model), base)
    assert model.model.layers[0].mlp.experts.config is config


def test_named_adapters():
    model = adapted(random=False)
    base = logits(model)
    add_adapter(model, "other", LoTRConfig(rank=2, alpha=6.0))
    add_adapter(model, "cores", share_factors="default")
    found = {}
    for name in ("default", "other", "cores"):
        set_adapter(model, name)
        for layer in adapted_layers(model).values():
            assert layer.core.shape == (4, *((2, 2) if name == "other" else (4, 4)))
            nn.init.normal_(layer.core, 0, 0.4)
        found[name] = logits(model)
    set_adapter(model, "other")
    assert torch.equal(logits(model), found["other"])
    assert not any(torch.allclose(one, two) for one, two in itertools.combinations([*found.values(), base], 2))
    set_adapter(model, "default")
    with pytest.raises(ValueError, match='core: expected "dense" with target_parameters, whose experts have a core each'):
        add_adapter(model, "few", LoTRConfig(rank=4, core="diagonal"))
    with torch.no_grad(), mixed(model, ["cores", "default", "default"]):
        rows = model(IDS, use_cache=False).logits
    assert relative(rows[1:], found["default"][1:]) < 1e-5 and relative(rows[0], found["cores"][0]) < 1e-5
    delete_adapter(model, "other")
    assert torch.equal(logits(model), found["default"])


@pytest.mark.parametrize("name", ["Mixtral", "GptOss"])
def test_saved_and_loaded(tmp_path, name):
    settings = {"target_modules": ["q_proj"], "exclude_modules": r"model\.layers\.1\.self_attn.*", "alpha": 6.0}
    model = adapted(name, **settings)
    save_adapter(model, tmp_path)
    fresh = load_adapter(mixture(name), tmp_path)
    assert torch.equal(logits(fresh), logits(model)) and fresh.lotr_config == model.lotr_config
    again = adapted(name, random=False, **settings)
    assert torch.equal(logits(load_adapter(again, tmp_path)), logits(model))
    cores = [k for k in fresh.state_dict() if k.endswith(".core")]
    assert len(cores) == 2 * 2 + 1 and fresh.get_parameter(cores[-1]).shape == (4, 4, 4)  # one stacked core a parameter
    with pytest.raises(ValueError, match=r"lotr\.gate_up_proj: expected \(experts, in_features, out_features\) \(4, 32, 48\)"):
        load_adapter(mixture(name, num_local_experts=5), tmp_path)
    other = adapted(name, model=mixture(name, num_local_experts=5), **settings)
    with refused(other, ValueError, match=r"lotr\.gate_up_proj: expected 5 experts as in the model, got 4 in the adapter"):
        load_adapter(other, tmp_path)
    with pytest.raises(ValueError, match="layers: expected the adapter's 5 layers"):
        load_adapter(nn.Sequential(nn.Linear(3, 3)), tmp_path)


def test_the_whole_model_saved_and_read_again(tmp_path):
    from lotr_ext import from_pretrained

    model = adapted()
    model.save_pretrained(tmp_path)
    again = from_pretrained(transformers.MixtralForCausalLM, tmp_path).eval()
    assert relative(logits(again), logits(model)) < 1e-6


def test_nothing_leaves_the_adapter_out_in_silence():
    model = adapted()
    y = logits(model)
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        model.set_experts_implementation(implementation)
        assert torch.equal(logits(model), y)
    twin = pickle.loads(pickle.dumps(model))
    clone = copy.deepcopy(model)
    for other in (twin, clone):
        layer = next(iter(adapted_layers(other).values()))
        assert layer.holder is other.model.layers[0].mlp.experts
        assert torch.equal(logits(other), y)
    randomize(clone, 0.9)
    assert torch.equal(logits(model), y) and not torch.equal(logits(clone), y)
    merge(twin)
    assert relative(logits(twin), y) < 1e-5 and torch.equal(logits(model), y)


def test_generate_gives_the_merged_model_s_text():
    model = adapted()
    ours = model.generate(IDS, max_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(IDS))
    merged = unload(copy.deepcopy(model), merge=True)
    assert torch.equal(ours, merged.generate(IDS, max_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(IDS)))


def test_trainer(tmp_path):
    model = adapted(random=False, target_modules=["q_proj"])
    data = [{"input_ids": row, "labels": row} for row in IDS]
    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=12, learning_rate=0.05, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True
    )
    before = loss(model).item()
    transformers.Trainer(model, arguments, train_dataset=data).train()
    assert loss(model.eval()).item() < before - 0.05
    assert all(layer.core.any() for layer in adapted_layers(model).values())


# ---- what transformers' own implementations do besides ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["Mixtral", "GptOss", "NemotronH"])
def test_experts_elsewhere(name):
    """Expert parallelism: an index of num_experts is that of an expert in another process, with a weight of zero."""
    host, x, (index, weights) = host_of(adapted(name)), torch.randn(20, 32, requires_grad=True), routing(20, 5)
    weights = weights.masked_fill(index == 4, 0.0).requires_grad_()
    host._is_expert_parallel = True
    y = host(x, index, weights)
    y.sum().backward()
    got = [t.grad.clone() for t in (x, weights, host.lotr.down_proj.core)]
    for layer in host.lotr.values():
        layer.merge()
    host.config = host.lotr.config
    host.config._experts_implementation = "grouped_mm"
    x.grad = weights.grad = None
    want = host(x, index, weights)
    want.sum().backward()
    assert relative(y, want) < 1e-5 and relative(got[0], x.grad) < 1e-5 and relative(got[1], weights.grad) < 1e-5
    assert got[2].isfinite().all()


def test_a_norm_after_each_expert():
    from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts

    sizes = {"hidden_size": 16, "moe_hidden_size": 16, "moe_intermediate_size": 12, "num_attention_heads": 4}
    config = transformers.MuseSparkTextConfig(**sizes, num_local_experts=4, num_key_value_heads=2, head_dim=4)
    module = MuseSparkExperts(config)
    for parameter in module.parameters():
        nn.init.normal_(parameter, 0, 0.3)
    config._experts_implementation = "eager"
    x, (index, weights) = torch.randn(9, 16), routing(9, module.num_experts)
    want = module(x, index, weights)
    for name in (first_projection(module), "down_proj"):
        adapt_parameter(module, name, LoTRFactors(*expert_sizes(module, name)[1:], 3))
    assert relative(module(x, index, weights), want) < 1e-5


# ---- refusals --------------------------------------------------------------------------------------------------------


def llama4() -> nn.Module:
    from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

    config = transformers.Llama4TextConfig(hidden_size=8, intermediate_size=8, num_local_experts=2)
    return nn.ModuleDict({"experts": Llama4TextExperts(config)})


def quantised() -> nn.Module:
    model = mixture()
    experts = model.model.layers[1].mlp.experts
    experts.down_proj = nn.Parameter(experts.down_proj.detach().to(torch.float8_e4m3fn), requires_grad=False)
    return model


REFUSED = {
    "a class that takes no implementations": (
        llama4,
        {},
        TypeError,
        r"'experts\.gate_up_proj', a parameter of Llama4TextExperts, whose class",
    ),
    "quantised experts": (
        quantised,
        {},
        TypeError,
        r"'model\.layers\.1\.mlp\.experts\.down_proj', quantised experts of MixtralExperts \(torch\.float8",
    ),
    "the router": (
        mixture,
        {"target_parameters": ["gate.weight"]},
        TypeError,
        r"'model\.layers\.0\.mlp\.gate\.weight', a 2-D parameter of MixtralTopKRouter",
    ),
    "a bias": (
        lambda: mixture("GptOss"),
        {"target_parameters": ["down_proj_bias"]},
        TypeError,
        "a 2-D parameter of GptOssExperts",
    ),
    "a misspelt name": (
        mixture,
        {"target_parameters": ["experts.up_proj"]},
        ValueError,
        r"target_parameters: expected names of parameters, got 'experts\.up_proj'",
    ),
    "no list": (
        mixture,
        {"target_parameters": "experts.down_proj"},
        TypeError,
        "target_parameters: expected a list of name endings",
    ),
    "svd": (mixture, {"init": "svd"}, ValueError, r"init: expected weights that \"svd\" can read and write, got 'model"),
    "a start from the gradient": (
        mixture,
        {"init": "gradient"},
        ValueError,
        "init: expected another one with target_parameters",
    ),
    "a group of two shapes": (
        mixture,
        {"group_by": lambda name, module: "one"},
        ValueError,
        "group_by: expected layers of one shape",
    ),
}


@pytest.mark.parametrize("make, settings, error, message", REFUSED.values(), ids=REFUSED)
def test_refused_by_name_before_anything_changes(make, settings, error, message):
    model = make()
    with refused(model, error, match=message):
        apply_lotr(model, LoTRConfig(**{"rank": 2, "target_parameters": BOTH, **settings}))


def test_counts_at_the_shape_of_qwen3_30b():
    config = transformers.Qwen3MoeConfig(
        hidden_size=2048, moe_intermediate_size=768, num_experts=128, num_hidden_layers=48, num_attention_heads=32,
        num_key_value_heads=4, head_dim=128, intermediate_size=6144,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.Qwen3MoeForCausalLM(config)
    summary = trainable_summary(apply_lotr(model, LoTRConfig(rank=16, target_parameters=BOTH)))
    assert summary.adapter == summary.trained == 96 * 128 * 16**2 + 16 * (2048 + 1536 + 768 + 2048) == 3_248_128
    lora = sum(
        m.num_experts * 16 * (m.in_features + m.out_features) for m in model.modules() if isinstance(m, LoTRHostedExperts)
    )
    assert lora == 629_145_600
