"""Batches of many tasks through adapted experts: a core by (task, expert), against each task by itself and its gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from mixtures import IDS, adapted, mixture, written_out
from safetensors.torch import load_file
from test_mixtures import host_of, routing
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM

from lotr_ext import LoTRConfig, TaskBank, add_adapter, apply_lotr, disabled, explain, mixed, set_adapter
from lotr_ext.layers.request import NOW
from lotr_ext.model.adapted import adapted_layers
from nets import relative

TASKS = 3


def with_tasks(name: str, dtype: torch.dtype = torch.float64, **settings) -> tuple[nn.Module, TaskBank]:
    """Attention and experts adapted, three tasks of cores that matter."""
    linear = {"NemotronH": None, "Qwen2Moe": "all-linear"}.get(name, ["q_proj", "v_proj"])  # and Qwen2's shared expert
    model = adapted(name, dtype, target_modules=linear, **settings)
    bank = TaskBank(model, TASKS)
    gen = torch.Generator().manual_seed(3)
    for _ in range(TASKS):
        cores = bank.cores_of(bank.add())
        for core in cores.values():
            core.copy_(torch.randn(core.shape, generator=gen, dtype=torch.float64) * 0.3)
    return model, bank


@contextmanager
def alone(model: nn.Module, bank: TaskBank, task: int) -> Iterator[None]:
    """The model with a task's cores as its own, or without its adapter."""
    if task < 0:
        with disabled(model):
            yield
        return
    layers = adapted_layers(model).values()
    before = [layer.core.data for layer in layers]
    for layer, core in zip(layers, bank.cores_of(task).values(), strict=True):
        layer.core.data = core.clone()
    try:
        yield
    finally:
        for layer, core in zip(layers, before, strict=True):
            layer.core.data = core


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    return model(ids, use_cache=False).logits


@pytest.mark.parametrize("name", ["Mixtral", "GptOss", "NemotronH", "Qwen2Moe"])
def test_each_row_goes_through_the_experts_of_its_task(either_path, name: str) -> None:
    model, bank = with_tasks(name)
    epsilon = 1e-12 if name != "NemotronH" else 2e-6  # which has its residuals in float32
    with torch.no_grad(), mixed(model, torch.tensor([2, -1, 0])):
        together = logits(model)
    for row, task in enumerate((2, -1, 0)):
        with torch.no_grad(), alone(model, bank, task):
            assert relative(together[row], logits(model, IDS[row : row + 1])[0]) < epsilon
    with torch.no_grad(), alone(model, bank, 1):
        assert relative(together[0], logits(model, IDS[:1])[0]) > 0.01  # another task is another function


def test_gradients_of_many_tasks_in_one_batch(either_path) -> None:
    """Each task's are those of its own rows by plain autograd with the experts written out; one without rows gets zeros."""
    model, bank = with_tasks("Mixtral")
    bank.requires_grad_()
    index, chosen = torch.tensor([2, 0, 2]), torch.randn(*IDS.shape, 61, dtype=torch.float64)
    with mixed(model, index):
        (logits(model) * chosen).sum().backward()
    bank.requires_grad_(False)
    factors = {n: torch.zeros_like(p) for n, p in model.named_parameters() if n.startswith("lotr_factors")}
    plain = mixture("Mixtral", torch.float64)
    for task in (0, 2):
        rows = index == task
        with alone(model, bank, task):
            grads = written_out(model, plain, IDS[rows], of=lambda out, rows=rows: (out.logits * chosen[rows]).sum())[2]
        for name, core in zip(bank.cores_of(task), bank.cores, strict=True):
            assert relative(core.grad[task], grads[name]) < 1e-10, name
        for name, total in factors.items():
            total += grads[name]
    assert not any(core.grad[1].any() for core in bank.cores)
    assert all(relative(model.get_parameter(name).grad, total) < 1e-10 for name, total in factors.items())


def test_tasks_of_experts_come_and_go(tmp_path: Path) -> None:
    model, bank = with_tasks("Mixtral")
    index = torch.tensor([0, 1, 2])
    with torch.no_grad(), mixed(model, index):
        want = logits(model)
        bank.save(1, tmp_path / "one")
        bank.drop(1)
        assert bank.add(tmp_path / "one") == 1 and torch.equal(logits(model), want)
    saved = load_file(tmp_path / "one")
    assert saved["model.layers.0.mlp.experts.lotr.down_proj.core"].shape == (4, 4, 4)
    first = next(iter(cores := bank.cores_of(0)))
    expert = next(name for name in cores if name.endswith("down_proj.core"))
    for name, shape in ((first, (3, 3)), (expert, (5, 4, 4))):
        with pytest.raises(ValueError, match=rf"{name}: expected shape .*got \("):
            bank.replace(0, cores | {name: torch.zeros(shape)})
    with torch.no_grad(), mixed(model, index):
        assert torch.equal(logits(model), want)


def test_adapters_by_name_each_with_its_scaling() -> None:
    model = adapted("Mixtral", torch.float64, target_modules=["q_proj"])
    config = model.lotr_config
    add_adapter(model, "loud", type(config)(rank=4, scaling=3.0, adapter_dtype=torch.float64), share_factors="default")
    add_adapter(model, "silent", type(config)(rank=4, scaling=0.0, adapter_dtype=torch.float64), share_factors="default")
    want = []
    for name in ("loud", "default", "silent"):
        set_adapter(model, name)
        for layer in adapted_layers(model).values():
            nn.init.normal_(layer.core, 0, 0.3)
        with torch.no_grad():
            want.append(logits(model)[len(want)])
    for names in (["loud", "default", "silent"], ["loud", "default", None]):
        with torch.no_grad(), mixed(model, names):
            assert relative(logits(model), torch.stack(want)) < 1e-12
    with torch.no_grad(), mixed(model, ["silent"] * 3), disabled(model):
        base = logits(model)
    with torch.no_grad(), mixed(model, ["silent"] * 3):
        assert relative(logits(model), base) < 1e-12


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant: bool) -> None:
    model, bank = with_tasks("Mixtral")
    bank.requires_grad_()
    model.train()
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.zero_grad()
        with mixed(model, torch.tensor([1, -1, 0])):
            logits(model).square().sum().backward()
        found.append([core.grad.clone() for core in bank.cores])
    assert all(relative(a, b) < 1e-12 for a, b in zip(*found, strict=True)) and found[0][0].any()


def test_text_of_many_tasks_is_that_of_each() -> None:
    model, bank = with_tasks("Mixtral", torch.float32)
    settings = {"max_new_tokens": 5, "do_sample": False}
    with mixed(model, torch.tensor([2, 0, -1])):
        together = model.generate(IDS, attention_mask=torch.ones_like(IDS), **settings)
    for row, task in enumerate((2, 0, -1)):
        with alone(model, bank, task):
            ids = IDS[row : row + 1]
            assert torch.equal(model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0], together[row])


def test_experts_elsewhere() -> None:
    """Expert parallelism: rows of experts in other processes take no core, of whatever task they are."""
    model, bank = with_tasks("Mixtral", torch.float32)
    host, x, (index, weights) = host_of(model), torch.randn(20, 32), routing(20, 5)
    weights = weights.masked_fill(index == 4, 0.0)
    host._is_expert_parallel = True
    tasks = torch.tensor([2, -1])
    with torch.no_grad(), mixed(model, tasks):
        y = host(x, index, weights)
    for task, rows in ((2, slice(0, 10)), (-1, slice(10, 20))):
        with torch.no_grad(), alone(model, bank, task):
            assert relative(y[rows], host(x[rows], index[rows], weights[rows])) < 1e-5


def test_explain_says_what_runs() -> None:
    """Neither experts nor a mixed batch run the base product of one node."""
    model, _ = with_tasks("Mixtral", torch.float32)
    experts, linear = host_of(model).lotr.gate_up_proj, model.model.layers[0].self_attn.q_proj
    x = torch.randn(3, 2, 32)
    assert explain(experts, x).nodes == 2 and explain(linear, x).nodes == 1
    with mixed(model, torch.tensor([0, 1, 2])):
        assert explain(experts, x).nodes == explain(linear, x).nodes == 2


def test_what_is_refused() -> None:
    model, bank = with_tasks("Mixtral", torch.float32)
    host, (index, weights) = host_of(model), routing(21, 4)
    with mixed(model, torch.tensor([0, 1])):
        with pytest.raises(ValueError, match="x: expected the tokens of a batch of 2 rows of equal length, got 21"):
            host(torch.randn(21, 32), index, weights)
        with pytest.raises(RuntimeError, match="mixed: expected experts that their transformers module calls"):
            host.lotr.gate_up_proj(torch.randn(4, 32), torch.tensor([1, 2, 3, 4], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"names: expected tasks in \[-1, 3\), got 0 to 3"), mixed(model, torch.tensor([0, 3])):
        pass
    bank.drop(1)
    with pytest.raises(ValueError, match="got 1, a free slot"), mixed(model, torch.tensor([0, 1])):
        pass
    assert NOW.any is None


@pytest.mark.parametrize("names", [torch.tensor([0, -1]), ["other", None]], ids=["tasks", "names"])
def test_all_layers_have_one_index_with_its_values(names) -> None:
    """Also offloaded layers, whose parameters are on the meta device until their forward."""
    model = apply_lotr(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).to("meta"), LoTRConfig(rank=2))
    TaskBank(model, TASKS).add()
    add_adapter(model, "other", share_factors="default")
    with mixed(model, names):
        first, second = (layer._state()[1].index for layer in adapted_layers(model).values())
        assert first is second and first.tolist() == [0, -1] and model(torch.empty(2, 6, device="meta")).shape == (2, 6)


def opt() -> nn.Module:
    sizes = {"vocab_size": 61, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return apply_lotr(OPTForCausalLM(OPTConfig(**sizes, word_embed_proj_dim=32)).eval(), LoTRConfig(rank=4))


def with_shared_expert() -> nn.Module:
    return apply_lotr(mixture("Qwen2Moe").eval(), LoTRConfig(rank=4, exclude_modules=["shared_expert_gate"]))


@pytest.mark.parametrize("make", [opt, with_shared_expert])
@pytest.mark.parametrize("tokens", [1, 7])
def test_layers_that_get_the_tokens_of_all_rows_in_one_list(make, tokens: int) -> None:
    torch.manual_seed(0)
    model, ids = make(), IDS[:, :tokens]
    bank = TaskBank(model, TASKS)
    for _ in range(TASKS):
        for core in bank.cores_of(bank.add()).values():
            nn.init.normal_(core, std=0.3)
    index = torch.tensor([2, -1, 0])
    with torch.no_grad():
        with mixed(model, index, flat=True):
            found = logits(model, ids)
        for i, task in enumerate(index.tolist()):
            with alone(model, bank, task):
                assert relative(found[i], logits(model, ids)[i]) < 1e-5
        with mixed(model, torch.tensor([[2] * tokens, [-1] * tokens, [0] * tokens]), flat=True):
            assert relative(logits(model, ids), found) < 1e-5
        if tokens > 1:
            with pytest.raises(ValueError, match="flat=True"), mixed(model, index):
                logits(model, ids)
