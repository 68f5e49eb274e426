"""LoTR as a PEFT method: the real PEFT on our operators, against plain torch."""

from __future__ import annotations

import gc
import importlib.util
import json
import subprocess
import sys
import weakref

import pytest
import torch
from peft_toys import CASES, FEWER_NUMBERS, base, config, gradients, ours, peft, plain, randomize, trained, tuned, with_two
from torch import nn
from toys import IDS, toy

from lotr_ext.ops import planner


def close(y: torch.Tensor, want: torch.Tensor) -> bool:
    return bool((y - want).abs().max() < 1e-5)


# ---- our operators ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, settings", [*CASES.values(), *(("toy", settings) for settings in FEWER_NUMBERS)], ids=str)
def test_outputs_and_gradients_are_those_of_plain_torch(kind, settings, either_path):
    model = tuned(kind, **settings)
    truth = plain(model, ["default"])
    assert close(model(IDS), truth(IDS)) and (truth(IDS) - base(kind)(IDS)).abs().max() > 0.001
    ours, theirs = gradients(model), gradients(truth)
    assert ours.keys() == theirs.keys() and len(ours) == len(trained(model))
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).norm() < 1e-5 * gradient.norm(), name


def test_siblings_share_one_shrink_and_a_step_has_one_fold(counter, two_nodes):
    """q, k and v of 2 blocks in one group: one u a block, one fold a forward, one gradient of A and of B."""
    model = tuned(target_modules=["q", "k", "v"])
    counter.take()
    y = model(IDS)
    assert counter.take() == {"shrink": 2, "fold": 1, "expand_add_": 6}
    arrived = []
    for name, parameter in model.base_model.lotr_factors["default"]["16x16"].named_parameters():
        parameter.register_hook(lambda gradient, name=name: arrived.append(name))
    y.square().sum().backward()
    taken = counter.take()
    assert taken["factor_grad_"] == 2 and taken["fold_grad"] == 1 and taken["shrink_grad_"] == 6
    assert sorted(arrived) == ["A", "B"]


def test_a_deleted_and_an_added_adapter_renew_the_scope(counter, two_nodes):
    model = with_two()
    model(IDS)
    core = weakref.ref(model.base_model.model.blocks[0].q.lotr_adapter["default"])
    model.set_adapter("other")
    model.delete_adapter("default")
    gc.collect()
    assert core() is None
    model.add_adapter("third", config(target_modules=["q", "k"]))
    randomize(model, "third")
    model.set_adapter("third")
    counter.take()
    assert close(model(IDS), plain(model, ["third"])(IDS))
    assert counter["fold"] == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["toy", "conv"])
def test_half_precision_bases_and_autocast(kind, dtype, counter, two_nodes):
    targets = {"target_modules": ["q", "v"] if kind == "toy" else ["up", "down"]}
    truth = tuned(kind, **targets)
    want, plain_base = truth(IDS), base(kind)(IDS)
    half = peft.get_peft_model(base(kind).to(dtype), config(**targets)).eval()
    factors = half.base_model.lotr_factors["default"]
    assert {p.dtype for p in half.parameters() if p.requires_grad} == {torch.float32}
    half.load_state_dict({k: v for k, v in truth.state_dict().items() if "lotr_" in k}, strict=False)
    counter.take()
    y = half(IDS)
    assert counter["small_forward" if dtype == torch.float16 else "shrink"] > 0
    y.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in factors.parameters())
    ours = [y]
    if dtype == torch.bfloat16:
        counter.take()
        with torch.autocast("cpu", dtype):
            ours.append(truth(IDS))
        assert counter["shrink"] > 0
    for y in ours:
        assert y.dtype == dtype and (y - want).abs().max() < 0.2 * (want - plain_base).abs().max()


def test_several_active_adapters_add_up(either_path):
    model = with_two()
    model.base_model.set_adapter(["default", "other"])
    assert close(model(IDS), plain(model, ["default", "other"])(IDS))
    y = model(IDS)
    y.sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == set(trained(model))


def test_a_base_of_its_own_kind_is_called_and_not_merged_into():
    class Odd(nn.Linear):
        def forward(self, x):
            return super().forward(x).clamp(-1, 1)

    net = toy()
    for block in net.blocks:
        block.q = Odd(16, 16)
    model = peft.get_peft_model(net.eval(), config())
    randomize(model)
    y = model(IDS)
    assert close(y, plain(model, ["default"])(IDS))
    before = {name: p.clone() for name, p in model.named_parameters()}
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(TypeError, match=r"merge: expected a plain nn.Linear or Conv1D base, got Odd.*\(blocks.0.q\)"):
            merge()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters()) and torch.equal(model(IDS), y)


def test_hooks_of_a_base_layer_still_run():
    net, seen = toy().eval(), []
    net.blocks[0].q.register_forward_hook(lambda module, args, output: seen.append(output) or output * 2)
    model = peft.get_peft_model(net, config())
    randomize(model)
    assert close(model(IDS), plain(model, ["default"])(IDS)) and len(seen) == 2
    q, x = model.base_model.model.blocks[1].q, torch.randn(3, 16)
    q.base_layer = Positional(q.base_layer)
    assert torch.allclose(q(x, 3.0), q(x, factor=3.0)) and torch.allclose(q(x, 3.0) - q(x), 2 * q.base_layer(x), atol=1e-5)


class Positional(nn.Module):
    """A base with an argument beside x."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear, self.in_features, self.out_features = linear, linear.in_features, linear.out_features

    def forward(self, x: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
        return self.linear(x) * factor


@pytest.mark.skipif(not importlib.util.find_spec("torchao"), reason="test_quantized.py runs it in a process with torchao")
def test_a_torchao_base_is_called_and_not_merged_into():
    from torchao import quantization

    net = toy().eval()
    quantization.quantize_(net.blocks, quantization.Int8WeightOnlyConfig())
    before = net(IDS)
    model = peft.get_peft_model(net, config())
    assert torch.equal(model(IDS), before)
    randomize(model)
    y = model(IDS)
    y.sum().backward()
    assert (y - before).abs().max() > 0.01 and all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with pytest.raises(TypeError, match=r"merge: expected a plain nn\.Linear or Conv1D base"):
        model.merge_adapter()
    assert torch.equal(model.unload()(IDS), before)


def test_explain_says_what_runs(monkeypatch):
    model = with_two()
    model.base_model.set_adapter(["default", "other"])
    layer = model.base_model.model.blocks[0].v
    found = layer.explain(torch.randn(200, 16))
    assert list(found) == ["default", "other"] and [e.nodes for e in found.values()] == [2, 2]
    assert [e.nodes for e in layer.explain(torch.randn(3, 16)).values()] == [1, 2]  # few tokens; and added to what is there
    monkeypatch.setattr(planner, "LOTR_STRATEGY", "composite")
    assert {e.strategy for e in layer.explain(torch.randn(200, 16)).values()} == {"composite"}
    with model.disable_adapter():
        assert layer.explain(torch.randn(3, 16)) == {}


def test_compiled_in_one_graph():
    model = tuned(target_modules=["q", "k", "v"])
    want = gradients(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    model.zero_grad()
    compiled(IDS).square().sum().backward()
    got = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(got) == len(want) and all((g - w).norm() < 1e-5 * w.norm() for g, w in zip(got, want.values(), strict=True))


def test_the_encoder_layers_fast_path_does_not_skip_an_adapter():
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)).eval()
    x, names = torch.randn(2, 5, 16), ["linear1", "linear2"]
    with torch.no_grad():
        before = encoder(x)
        model = peft.get_peft_model(encoder, config(target_modules=names))
        model.add_adapter("other", config(target_modules=names))
        randomize(model)
        assert (model(x) - before).abs().max() > 0.01
        assert torch.allclose(model.unload()(x), before, atol=1e-6) and encoder[0].activation_relu_or_gelu == 1


def test_dropout_only_in_training(two_nodes):
    model = tuned(dropout=0.5)
    assert torch.equal(model(IDS), model(IDS)) and close(model(IDS), plain(model, ["default"])(IDS))
    model.train()
    assert not torch.equal(model(IDS), model(IDS))


# ---- on disk ---------------------------------------------------------------------------------------------------------


def test_factors_are_stored_once_and_a_fresh_process_loads_them(tmp_path):
    from safetensors.torch import load_file

    model = tuned(target_modules=r".*\.(q|k|up)", modules_to_save=["head"])
    model.save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert {n for n in names if n.endswith((".A", ".B"))} == {
        f"base_model.lotr_factors.{g}.{p}" for g in ("16x16", "16x32") for p in "AB"
    }
    assert sum(n.endswith(".lotr_adapter.core") for n in names) == 6 and len(names) == 12
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (stored["peft_type"], stored["rank"], stored["group_by"]) == ("LOTR", 4, "shape")
    assert type(peft.PeftConfig.from_pretrained(tmp_path)) is ours.LoTRPeftConfig
    torch.save(model(IDS), tmp_path / "y.pt")
    code = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "import peft, lotr_ext.interop.peft; from toys import IDS, toy\n"
        "model = peft.PeftModel.from_pretrained(toy(), sys.argv[1])\n"
        "assert torch.allclose(model(IDS), torch.load(sys.argv[1] + '/y.pt'), atol=1e-6)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
