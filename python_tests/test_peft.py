"""LoTR as a PEFT method, on our operators, against plain PyTorch in float64, over the zoo's nets.

PEFT's own tests of its methods run against LoTR by `python python_tests/peft_suite.py`.
"""

from __future__ import annotations

import copy
import importlib
import json
import pickle
import warnings
from pathlib import Path

import peft
import pytest
import torch
import transformers
import zoo
from safetensors.torch import load_file
from torch import Tensor, nn

from lotr_ext import LoTRConfig
from lotr_ext.init import START
from lotr_ext.peft import LoTRPeftConfig, LoTRPeftLinear
from lotr_ext.peft import config as peft_config

DATA = Path(__file__).parent / "data" / "bd4494a"
SMALL = {"rank": 3, "scaling": 2.0}
# name: (net, settings)
CASES = {
    "two shapes": ("mlp", {"modules_to_save": ["head"]}),
    "siblings": ("attention", {}),
    "by width": (
        "attention",
        {"rank": (2, 4), "group_by": "width", "target_modules": ["q", "v", "head"]},
    ),
    "diagonal": ("bert", {"core": "diagonal", "modules_to_save": ["classifier"]}),
    "cp": ("attention", {"core": "cp", "target_modules": ["q", "k"]}),
    "a pair per layer": ("llama", {"group_by": "layer"}),
    "conv1d by block": ("gpt2", {"group_by": "block"}),
    "by layer": ("attention", {"group_by": "layer"}),
    "regular expression by name": (
        "llama",
        {"group_by": "name", "target_modules": r".*\.(q|k|v|o)_proj"},
    ),
    "identity": ("llama", {"core_init": "identity", "train": ["B", "core"]}),
}
each_case = pytest.mark.parametrize("case", CASES)


def config(net: str, **settings: object) -> LoTRPeftConfig:
    return LoTRPeftConfig(**{"target_modules": zoo.TARGETS[net], **SMALL, **settings})


def fill(model: nn.Module, name: str = "default", seed: int = 7) -> None:
    """Gives an adapter's cores, B and modules_to_save values that matter."""
    marks = (f"lotr_adapter.{name}.", f"lotr_cores.{name}.", f"modules_to_save.{name}.")
    zoo.fill(
        model,
        seed,
        0.3,
        lambda key: (
            any(m in key for m in marks) or (f"lotr_factors.{name}." in key and ".B" in key)
        ),
    )


def tuned(case: str, filled: bool = True) -> tuple[peft.PeftModel, Tensor]:
    """The model of a case and an input of it."""
    net, settings = CASES[case]
    model = peft.get_peft_model(zoo.net(net), config(net, **settings)).eval()
    if filled:
        fill(model)
    return model, zoo.inputs(net)


def two() -> tuple[peft.PeftModel, Tensor]:
    """Returns a model with two adapters, and an input.

    "default", which is active, is on q, k, v and o, and "other", of another rank, on q, o and head.
    """
    model, x = tuned("siblings")
    model.add_adapter(
        "other", LoTRPeftConfig(rank=2, target_modules=["q", "o", "head"], scaling=1.5)
    )
    fill(model, "other", 8)
    return model.eval(), x


def layers(model: nn.Module) -> list[LoTRPeftLinear]:
    return [m for m in model.modules() if isinstance(m, LoTRPeftLinear)]


class Plain(nn.Module):
    """base(x) + the sum over adapters of s ((x A) G) B^T by autograd alone."""

    def __init__(self, layer: LoTRPeftLinear, names: list[str]):
        super().__init__()
        self.base_layer = layer.base_layer
        self.lotr_adapter = nn.ModuleDict(
            {n: layer.lotr_adapter[n] for n in names if n in layer.lotr_adapter}
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        for core in self.lotr_adapter.values():
            y = (
                y
                + core.scaling
                * ((x @ core.factors.A.value) @ core.core_matrix())
                @ core.factors.B.value.mT
            )
        return y


def truth(model: peft.PeftModel, *names: str) -> nn.Module:
    """A copy of the model, in float64, whose adapters of these names are three lines of torch."""
    copied = copy.deepcopy(model).double()
    inner = copied.base_model.model
    for name, layer in [(n, m) for n, m in inner.named_modules() if isinstance(m, LoTRPeftLinear)]:
        parent, _, child = name.rpartition(".")
        setattr(inner.get_submodule(parent), child, Plain(layer, [*names]))
    return copied


def output(model: nn.Module, x: Tensor, **more: object) -> Tensor:
    """The model's output: `zoo.output` of a PEFT model."""
    dtype = next(model.parameters()).dtype
    y = model(x.to(dtype) if x.is_floating_point() else x, **more)
    return y if isinstance(y, Tensor) else y.logits


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    output(model, x).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    actual = actual.detach().double()
    expected = expected.detach().double()
    return bool(
        (actual - expected).abs().max() <= tolerance * max(1.0, float(expected.abs().max()))
    )


def loaded(folder: Path, net: str, **settings: object) -> peft.PeftModel:
    """Returns a fresh base model with a saved adapter. Warnings, as of missing keys, are errors."""
    torch.manual_seed(99)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return peft.PeftModel.from_pretrained(zoo.net(net), folder, **settings)


# ---- the numbers ---------------------------------------------------------------------------------


@each_case
def test_outputs_and_gradients_are_those_of_plain_torch(case: str, form: str) -> None:
    model, x = tuned(case)
    expected = truth(model, "default")
    assert close(output(model, x), output(expected, x)) and not close(
        output(model, x), output(zoo.net(CASES[case][0]), x), 1e-3
    )
    ours = gradients(model, x)
    theirs = gradients(expected, x)
    assert (
        ours.keys()
        == theirs.keys()
        == {name for name, p in model.named_parameters() if p.requires_grad}
    )
    for name, gradient in theirs.items():
        assert close(ours[name], gradient, 2e-4 * float(gradient.abs().max() + 1e-3)), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("net", ["mlp", "gpt2"])
def test_half_precision_bases_have_float32_adapters(net: str, dtype: torch.dtype) -> None:
    case = {"mlp": "two shapes", "gpt2": "conv1d by block"}[net]
    model, x = tuned(case)
    cast = peft.get_peft_model(zoo.net(net, dtype), config(net, **CASES[case][1])).eval()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {p.dtype for n, p in cast.named_parameters() if "lotr_" in n} == {wide}
    cast.load_state_dict(
        {k: v for k, v in model.state_dict().items() if "lotr_" in k or "modules_to_save" in k},
        strict=False,
    )
    y = output(cast, x)
    expected = output(model, x)
    assert (
        y.dtype == dtype
        and (y.double() - expected).abs().mean()
        < 8 * torch.finfo(dtype).eps * expected.abs().max() + 1e-6
    )
    gradients(cast, x)
    if dtype == torch.bfloat16:
        with torch.autocast("cpu", dtype):
            assert (output(model, x).double() - expected).abs().mean() < 0.05 * expected.abs().max()


def test_several_active_adapters_add_up() -> None:
    model, x = two()
    model.base_model.set_adapter(["default", "other"])
    assert close(output(model, x), output(truth(model, "default", "other"), x))
    assert gradients(model, x).keys() == {
        name for name, p in model.named_parameters() if p.requires_grad
    }


def test_dropout_and_checkpointing_train_alike() -> None:
    net = "llama"
    model = peft.get_peft_model(zoo.net(net), config(net, dropout=0.4)).train()
    fill(model)
    x = zoo.inputs(net)
    results = []
    for options in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        if options is not None:
            model.base_model.model.gradient_checkpointing_enable(options)
            model.enable_input_require_grads()
        torch.manual_seed(3)
        results.append(gradients(model, x))
    for other in results[1:]:
        assert all(close(other[name], gradient, 1e-5) for name, gradient in results[0].items())
    assert not close(output(model, x), output(model.eval(), x), 1e-3)


def test_a_compiled_model_computes_the_same() -> None:
    model, x = tuned("siblings")
    expected = gradients(model, x)
    compiled = torch.compile(model.base_model.model, backend="aot_eager", fullgraph=True)
    assert close(compiled(x), output(model, x), 1e-6)
    model.zero_grad()
    compiled(x).square().sum().backward()
    assert all(
        close(p.grad, expected[name], 1e-5)
        for name, p in model.named_parameters()
        if p.requires_grad
    )


def test_an_adapter_in_a_transformer_layer_with_a_fast_path_has_effect() -> None:
    net = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), 2).eval()
    x = torch.randn(2, 3, 16)
    before = net(x)
    model = peft.get_peft_model(net, LoTRPeftConfig(target_modules=["linear1"], **SMALL)).eval()
    fill(model)
    with torch.no_grad():
        assert close(model(x), truth(model, "default")(x.double())) and not close(
            model(x), model.base_model.unload()(x), 1e-3
        )
    assert close(net(x), before)


# ---- the life of an adapter ----------------------------------------------------------------------


@each_case
def test_life_of_an_adapter(case: str, tmp_path: Path) -> None:
    net, settings = CASES[case]
    model, x = tuned(case, filled=False)
    expected = output(zoo.net(net), x)
    assert close(output(model, x), expected, 1e-6)  # it starts as the base model
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-3)
    for _ in range(3):
        gradients(model.train(), x)
        optimizer.step()
    model.eval()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lotr_" in name or ".modules_to_save." in name for name in changed)
    fill(model)
    y = output(model, x)
    with model.disable_adapter():
        assert close(output(model, x), expected, 1e-6) and not any(
            p.requires_grad for p in model.parameters()
        )
    model.save_pretrained(tmp_path)
    for options in ({}, {"low_cpu_mem_usage": True}):
        assert close(
            output(loaded(tmp_path, net, **options), x), y, 1e-6
        )  # the node depends on what is trained
    saved = load_file(tmp_path / "adapter_model.safetensors")
    owned = {key for key in saved if "lotr_factors" in key}
    assert len(owned) == len(list(model.base_model.lotr_factors.parameters()))  # A and B once
    weights = [layer.weight.clone() for layer in layers(model)]
    model.merge_adapter()
    assert close(output(model, x), y) and all(layer.merged for layer in layers(model))
    with model.disable_adapter():
        assert close(output(model, x), expected, 1e-6)
    model.unmerge_adapter()
    assert all(
        torch.equal(layer.weight, weight)
        for layer, weight in zip(layers(model), weights, strict=True)
    )
    again = pickle.loads(pickle.dumps(model))
    for copied, result in (
        (again.merge_and_unload(safe_merge=True), y),
        (copy.deepcopy(model).unload(), expected),
    ):
        assert copied.state_dict().keys() == zoo.net(net).state_dict().keys() and not layers(copied)
        assert close(zoo.output(copied, x), result) or (
            result is expected and "modules_to_save" in settings
        )


def test_two_adapters_switch_merge_and_are_deleted(tmp_path: Path) -> None:
    model, x = two()
    outputs = {
        names: output(truth(model, *names), x)
        for names in (("default",), ("other",), ("default", "other"))
    }

    def trained() -> set[str]:
        return {
            name.split("default")[0]
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and "other" in name
        }

    assert not trained()
    model.set_adapter("other")
    assert trained() and not any(
        p.requires_grad for name, p in model.named_parameters() if ".default." in name
    )
    assert close(output(model, x), outputs["other",])
    for names, expected in outputs.items():
        assert close(
            zoo.output(copy.deepcopy(model).merge_and_unload(adapter_names=[*names]), x), expected
        )
    model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="additionally merging"):
        model.merge_adapter(["other"])
    assert close(output(model, x), outputs["default", "other"])
    model.unmerge_adapter()
    model.save_pretrained(tmp_path, selected_adapters=["other"])
    model.delete_adapter("default")
    assert close(output(model, x), outputs["other",]) and set(model.base_model.lotr_factors) == {
        "other"
    }
    assert not any("default" in name for name in model.state_dict())
    fresh = peft.PeftModel.from_pretrained(zoo.net("attention"), tmp_path / "other")
    assert torch.equal(output(fresh, x), output(model, x))
    fresh.load_adapter(tmp_path / "other", "again", is_trainable=True)
    assert torch.equal(output(fresh, x), output(model, x)) and fresh.active_adapter == "default"


def test_a_merged_adapter_is_not_deleted() -> None:
    model, x = two()
    model.merge_adapter(["default"])
    y = output(model, x)
    with pytest.raises(ValueError, match=r"delete adapter\(s\) \['default'\] while"):
        model.delete_adapter("default")
    model.delete_adapter("other")
    assert torch.equal(output(model, x), y) and set(model.peft_config) == {"default"}
    assert set(model.base_model.lotr_factors) == {"default"}


class Halved(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        return value / 2

    def right_inverse(self, value: Tensor) -> Tensor:
        return value * 2


def parametrized(filled: bool) -> tuple[peft.PeftModel, Tensor]:
    model, x = tuned("siblings", filled)
    for module, name in (
        *((layer.lotr_adapter["default"], "core") for layer in layers(model)),
        *((f, "value") for f in model.base_model.lotr_factors["default"].values()),
    ):
        nn.utils.parametrize.register_parametrization(module, name, Halved())
    return model, x


def test_parametrized_parts_are_saved_and_loaded_as_such(tmp_path: Path) -> None:
    model, x = parametrized(filled=True)
    y = output(model, x)
    model.save_pretrained(tmp_path)
    other, _ = parametrized(filled=False)
    peft.set_peft_model_state_dict(other, load_file(tmp_path / "adapter_model.safetensors"))
    assert torch.equal(output(other, x), y)
    with pytest.raises(ValueError, match=r"missing .*core"):
        peft.PeftModel.from_pretrained(zoo.net("attention"), tmp_path)


def trained_names(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_a_second_adapter_leaves_what_the_first_one_trains() -> None:
    model, _ = tuned("siblings")
    before = trained_names(model)
    model.add_adapter("other", config("attention"))
    assert trained_names(model) == before
    model.add_adapter("only used", config("attention", inference_mode=True))
    assert trained_names(model) == before
    model.set_adapter("other", inference_mode=True)
    assert not trained_names(model) and model.active_adapter == "other"
    model.set_adapter("default")
    assert trained_names(model) == before


def test_a_second_adapter_that_is_refused_leaves_the_first_one() -> None:
    model, x = tuned("siblings")
    y = output(model, x)
    keys = set(model.state_dict())
    for settings in (
        {"target_modules": ["embed"]},
        {"target_modules": ["q", "head"], "group_by": {n: "g" for n, _ in model.named_modules()}},
    ):
        with pytest.raises((TypeError, ValueError), match="expected"):
            model.add_adapter("other", config("attention", **settings))
        assert torch.equal(output(model, x), y) and set(model.state_dict()) == keys
        assert set(model.peft_config) == {"default"}
    model.add_adapter("other", config("attention"))
    assert torch.equal(output(model, x), y)


def test_the_status_of_a_model() -> None:
    model, _ = two()
    status = model.get_model_status()
    assert status.enabled is True and status.active_adapters == ["default"]
    assert status.num_adapter_layers == len(layers(model)) and status.merged_adapters == []
    assert status.requires_grad == {"default": True, "other": False}


def test_pefts_own_conversion_to_lora() -> None:
    model, x = tuned("siblings")
    config_of_lora, tensors = peft.convert_to_lora(model, rank=3)
    lora = peft.get_peft_model(zoo.net("attention"), config_of_lora).eval()
    peft.set_peft_model_state_dict(lora, tensors)
    assert close(output(lora, x), output(model, x), 1e-4)


def test_without_target_modules_the_layers_are_those_of_the_model_type() -> None:
    model = peft.get_peft_model(zoo.net("llama"), LoTRPeftConfig(rank=2))
    names = {n.rpartition(".")[2] for n, m in model.named_modules() if m in layers(model)}
    assert names == {"q_proj", "v_proj"}


@pytest.mark.parametrize("core", ["diagonal", "cp", "tucker", "train", "few"])
def test_computed_cores_load_onto_a_model_in_another_order(core: str, tmp_path: Path) -> None:
    x = zoo.inputs("attention")
    model = peft.get_peft_model(zoo.net("attention"), config("attention", core=core)).eval()
    fill(model)
    model.save_pretrained(tmp_path)
    other = zoo.net("attention")
    other.blocks = nn.ModuleList(
        nn.ModuleDict(dict(reversed(list(block.items())))) for block in other.blocks
    )
    assert torch.equal(output(peft.PeftModel.from_pretrained(other, tmp_path), x), output(model, x))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_safe_merge_refuses_values_that_are_not_finite(value: float) -> None:
    model, _ = tuned("siblings")
    layers(model)[0].lotr_adapter["default"].core.data[0, 0] = value
    weight = layers(model)[0].weight.clone()
    with pytest.raises(
        ValueError, match=r"NaNs detected in the merged weights. The adapter default"
    ):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layers(model)[0].weight, weight) and not layers(model)[0].merged


def test_adapter_names_choose_an_adapter_a_row() -> None:
    net = zoo.net("llama")
    model = peft.get_peft_model(net, config("llama", modules_to_save=["lm_head"])).eval()
    fill(model)
    model.add_adapter(
        "other", LoTRPeftConfig(rank=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    )
    fill(model, "other", 8)
    x = zoo.inputs("llama", rows=5)
    expected = {"__base__": None}
    for name in ("default", "other"):
        model.set_adapter(name)
        expected[name] = output(model, x)
    with model.disable_adapter():
        expected["__base__"] = output(model, x)
    names = ["other", "__base__", "default", "default", "other"]
    mixed = output(model, x, adapter_names=names)
    assert all(close(mixed[i], expected[name][i]) for i, name in enumerate(names))
    generated = model.generate(
        input_ids=x, adapter_names=["other"] * 5, max_new_tokens=3, do_sample=False, num_beams=2
    )
    model.set_adapter("other")
    assert torch.equal(
        generated, model.generate(input_ids=x, max_new_tokens=3, do_sample=False, num_beams=2)
    )
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("beams", [1, 2])
def test_adapter_names_of_an_encoder_and_a_decoder(beams: int) -> None:
    """A beam search repeats the decoder's rows and not the encoder's."""
    shape = transformers.BartConfig(
        vocab_size=20,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_position_embeddings=16,
    )
    net = zoo.fill(transformers.BartForConditionalGeneration(shape).eval())
    settings = {"target_modules": ["q_proj", "v_proj"], "rank": 2}
    model = peft.get_peft_model(net, LoTRPeftConfig(**settings)).eval()
    model.add_adapter("other", LoTRPeftConfig(**settings))
    for seed, name in enumerate(("default", "other")):
        fill(model, name, seed)
    x = torch.arange(15).view(3, 5)
    names = ["other", "default", "other"]
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": beams}
    mixed = model.generate(input_ids=x, adapter_names=names, **options)
    for i, name in enumerate(names):
        model.set_adapter(name)
        single = model.generate(input_ids=x[i : i + 1], **options)[0]
        assert torch.equal(mixed[i][: len(single)], single)


def test_an_old_peft_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft, "__version__", "0.20.1")
    with pytest.raises(ImportError, match=r"expected PEFT 0.21 or later, got 0.20.1"):
        importlib.reload(peft_config)


def test_biases_are_trained_and_saved(tmp_path: Path) -> None:
    model = peft.get_peft_model(zoo.net("attention"), config("attention", bias="lotr_only"))
    names = [
        name for name, p in model.named_parameters() if p.requires_grad and name.endswith("bias")
    ]
    assert len(names) == 8 and all(name.endswith(".base_layer.bias") for name in names)
    zoo.fill(model, 7, 0.3, lambda name: name.endswith("base_layer.bias"))
    model.save_pretrained(tmp_path)
    x = zoo.inputs("attention")
    assert torch.equal(output(loaded(tmp_path, "attention"), x), output(model.eval(), x))


# ---- files and configuration ---------------------------------------------------------------------


def test_the_first_versions_files_load(tmp_path: Path) -> None:
    expected = load_file(DATA / "peft" / "expected.safetensors")
    assert close(output(loaded(DATA / "peft", "gpt2"), expected["x"]), expected["y"], 1e-6)
    with pytest.warns(
        UserWarning, match="Unexpected keyword arguments"
    ):  # PEFT's, where its base class reads the file
        assert peft.PeftConfig.from_pretrained(str(DATA / "peft")).scaling == 1.0
    content = json.loads((DATA / "peft" / "adapter_config.json").read_text())
    # "auto" was 4 (8 / r)^1.5, with an exponent of 0.5 only for the form "diagonal"
    for settings, scaling in (
        ({"scaling": "auto"}, 32.0),
        ({"scaling": 0.5}, 0.5),
        ({"scaling": "auto", "rank": 4, "r": 4, "core": "cp"}, 4 * 2**1.5),
        ({"scaling": "auto", "rank": 4, "r": 4, "core": "diagonal"}, 4 * 2**0.5),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(content | settings))
        assert LoTRPeftConfig.from_pretrained(str(tmp_path)).scaling == pytest.approx(scaling)
    for other in (
        {"magnitude": True, "use_dora": True},
        {"target_parameters": ["experts.down_proj"]},
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(content | other))
        for read in (LoTRPeftConfig, peft.PeftConfig):
            with pytest.raises(
                (TypeError, ValueError), match=r"magnitude|use_dora|target_parameters"
            ):
                read.from_pretrained(str(tmp_path))


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({"lora_alpha": 3}, "Here it is 'alpha'"),
        ({"rank_pattern": {}}, "one rank"),
        ({"alpha_pattern": {}}, "one scaling"),
        ({"use_dora": True}, "no magnitudes"),
        ({"trainable_token_indices": [1]}, "modules_to_save"),
        ({"target_parameters": ["up"]}, "apply_lotr"),
    ],
)
def test_what_only_lora_has_is_named(settings: dict[str, object], advice: str) -> None:
    (name,) = settings
    with pytest.raises(TypeError, match=f"{name}: expected a field of LoTRPeftConfig, .*{advice}"):
        LoTRPeftConfig(**settings)


def test_a_configuration_for_apply_lotr_is_refused_by_name() -> None:
    with pytest.raises(AttributeError, match="expected a LoTRPeftConfig, got a LoTRConfig"):
        peft.get_peft_model(zoo.net("mlp"), LoTRConfig(rank=2))
    assert not hasattr(LoTRConfig(), "r") and copy.deepcopy(LoTRConfig()) == LoTRConfig()


def test_a_saved_configuration_has_its_scaling_as_a_number(tmp_path: Path) -> None:
    for settings, scaling in (
        ({}, 4 * (8 / 16) ** 1.5 / START**3),
        ({"alpha": 8, "r": 4}, 2.0),
        ({"rslora": True, "r": 4}, 2.0),
    ):
        LoTRPeftConfig(target_modules=["q"], **settings).save_pretrained(str(tmp_path))
        content = json.loads((tmp_path / "adapter_config.json").read_text())
        assert content["scaling"] == pytest.approx(scaling) and content["alpha"] is None
        assert LoTRPeftConfig.from_pretrained(str(tmp_path)).to_lotr().s == pytest.approx(scaling)


def test_an_adapter_of_other_layers_is_refused(tmp_path: Path) -> None:
    model, _ = tuned("siblings")
    model.save_pretrained(tmp_path)
    other = peft.get_peft_model(zoo.net("attention"), config("attention", target_modules=["q"]))
    with pytest.raises(ValueError, match="adapter: expected the model's 4, got 10"):
        peft.set_peft_model_state_dict(other, load_file(tmp_path / "adapter_model.safetensors"))


def test_tensors_in_parts_are_not_saved(tmp_path: Path) -> None:
    model, _ = tuned("siblings")
    state = {key: t[:0] if "lotr_factors" in key else t for key, t in model.state_dict().items()}
    with pytest.raises(
        RuntimeError, match=r"save_pretrained: expected full tensors, got base_model.lotr_factors"
    ):
        model.save_pretrained(tmp_path, state_dict=state)


@pytest.mark.parametrize("kind", ["parametrized", "own forward", "hook"])
def test_only_a_plain_product_is_merged_into(kind: str) -> None:
    class Odd(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).clamp(-1, 1)

    net = zoo.net("attention")
    x = zoo.inputs("attention")
    q = net.blocks[0]["q"]
    if kind == "own forward":
        net.blocks[0]["q"] = Odd(16, 16)
    elif kind == "hook":
        q.register_forward_hook(lambda module, args, y: y * 2)
    else:
        nn.utils.parametrizations.weight_norm(q)
    model = peft.get_peft_model(net, config("attention")).eval()
    fill(model)
    y = output(model, x)
    assert close(y, output(truth(model, "default"), x))
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(TypeError, match=r"merge: expected a .* \(blocks.0.q\)"):
            merge()
    assert torch.equal(output(model, x), y)


@pytest.mark.parametrize("train", [["core"], ["A", "core"], ["B", "core"]], ids="+".join)
def test_only_the_named_parts_are_trained(train: list[str]) -> None:
    """Also after another adapter was active."""
    model = peft.get_peft_model(zoo.net("attention"), config("attention", train=train))
    model.add_adapter("other", config("attention"))
    for name in ("default", "other", "default"):
        model.set_adapter(name)
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    parts = {"core" if ".core" in key else "A" if ".A" in key else "B" for key in trained}
    assert parts == set(train) and all("default" in key for key in trained)
