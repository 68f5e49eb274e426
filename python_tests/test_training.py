"""What an adapter trains: its parameters, their number, and whether an optimizer has them."""

import dataclasses
import re
import warnings
from collections.abc import Callable, Iterable
from functools import partial

import pytest
import torch
import zoo
from helpers import run_python
from models import adapter_parameters, started, trained, trained_parameters
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    RobertaConfig,
    RobertaModel,
)

from lotr_ext import (
    LoTRConfig,
    TaskBank,
    apply_lotr,
    first_step,
    lotr_parameters,
    merge,
    parameter_groups,
    rank_for,
    trainable_summary,
    unmerge,
)
from lotr_ext.model import adapted_layers
from lotr_ext.reports import TrainableSummary

# ---- which parameters ----------------------------------------------------------------------------


def test_the_summary_counts_what_is_adapted_and_trained() -> None:
    model = started("bert", modules_to_save=["classifier"])
    r = 3
    adapter = 8 * r * r + r * (16 + 16) + r * (24 + 16)
    assert trainable_summary(model) == TrainableSummary(
        adapter=adapter,
        trained=adapter + 16 * 3 + 3,
        total=sum(p.numel() for p in model.parameters()),
        layers=8,
        groups=2,
        parts=("A", "B", "core", "classifier"),
        left_out={},
    )
    assert sum(p.numel() for p in lotr_parameters(model)) == adapter


@pytest.mark.parametrize("train", [("core",), ("A", "core"), ("B", "core"), ("A", "B", "core")])
def test_only_the_named_parts_are_trained(x: Tensor, train: tuple[str, ...]) -> None:
    model = trained("mlp", train=train)
    assert trainable_summary(model).parts == train
    zoo.output(model, x).sum().backward()
    for layer in adapted_layers(model).values():
        parts = {"A": layer.factors.A.value, "B": layer.factors.B.value, "core": layer.core}
        assert {part for part, p in parts.items() if p.grad is not None} == set(train)


# Rates for parameter_groups, and the rate of each group.
RATES = [
    ({}, [None, None, None]),
    ({"lr": 1e-3}, [1e-3, 1e-3, 1e-3]),
    ({"lr": 1e-3, "other_lr": 1e-2}, [1e-3, 1e-3, 1e-2]),
]


@pytest.mark.parametrize(("rates", "expected"), RATES)
def test_groups_have_the_given_rates(rates: dict, expected: list[float | None]) -> None:
    groups = parameter_groups(started("mlp", modules_to_save=["head"]), **rates)
    assert [group["name"] for group in groups] == ["cores", "factors", "other"]
    assert [group.get("lr") for group in groups] == expected


def test_a_bank_that_trains_is_among_the_parameters() -> None:
    model = started("mlp", modules_to_save=["head"])
    bank = TaskBank(model, 2)
    without_bank = list(lotr_parameters(model))
    assert len(without_bank) == 4 + 4
    bank.requires_grad_()
    assert set(lotr_parameters(model)) == {*without_bank, *bank.parameters()}
    cores, _, other = (set(group["params"]) for group in parameter_groups(model))
    assert set(bank.parameters()) < cores
    assert other == set(model.head.parameters())


# ---- how many ------------------------------------------------------------------------------------

ROBERTA = partial(RobertaModel, RobertaConfig(vocab_size=50265), add_pooling_layer=False)
QWEN3 = partial(
    Qwen3MoeForCausalLM,
    Qwen3MoeConfig(
        hidden_size=2048,
        moe_intermediate_size=768,
        num_experts=128,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
    ),
)
# From the paper, by rank: query and value of RoBERTa-base have 24 r^2 + 2 r 768 parameters.
COUNTS = {
    1: 1560,
    2: 3168,
    4: 6528,
    8: 13824,
    16: 30720,
    32: 73728,
    40: 99840,
    80: 276480,
    88: 321024,
}
COUNTED = [
    *((ROBERTA, {"rank": r, "target_modules": ["query", "value"]}, n) for r, n in COUNTS.items()),
    # Qwen3-30B-A3B: each of 128 experts has two cores per layer, each factor is there once.
    (
        QWEN3,
        {"rank": 16, "target_parameters": ["gate_up_proj", "down_proj"]},
        2 * 48 * 128 * 16**2 + 16 * (2048 + 1536 + 768 + 2048),
    ),
]


@pytest.mark.parametrize(("make", "settings", "count"), COUNTED)
def test_counts_of_models_without_memory(
    make: Callable[[], nn.Module], settings: dict, count: int
) -> None:
    with torch.device("meta"):
        model = make()
    summary = trainable_summary(apply_lotr(model, LoTRConfig(**settings)))
    assert summary.adapter == summary.trained == count
    assert all(p.is_meta for p in model.parameters())


SMOLLM2 = {
    "vocab_size": 64,
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
}
# The sizes that docs/choosing.md measures: (the requested size, rank, core, group_by).
RECIPES = [
    ({"like": "lora:1"}, 48, "diagonal", "shape"),
    ({"like": "lora:4"}, 6, "dense", "block"),
    ({"numbers": 27_936}, 4, "dense", "shape"),
    ({"numbers": 27_935}, 3, "dense", "shape"),
]


@pytest.mark.parametrize(("size", "rank", "core", "group_by"), RECIPES)
def test_the_recipe_for_a_language_model(size: dict, rank: int, core: str, group_by: str) -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SMOLLM2))
    assert rank_for(model, **size, dropout=0.1) == LoTRConfig(
        rank=rank, core=core, group_by=group_by, dropout=0.1
    )


@pytest.mark.filterwarnings("ignore")  # the rank exceeds a width, a head stays frozen
@pytest.mark.parametrize("name", ["mlp", "attention", "bert", "gpt2", "llama"])
@pytest.mark.parametrize("like", [1, 3])
def test_a_recommended_adapter_has_the_size_of_a_lora(name: str, like: int) -> None:
    model = zoo.net(name)
    recommended = rank_for(model, like=f"lora:{like}", target_modules=zoo.TARGETS[name])
    one_rank_more = dataclasses.replace(recommended, rank=recommended.rank + 1)

    def size(settings: LoTRConfig) -> int:
        return trainable_summary(apply_lotr(zoo.net(name), settings)).adapter

    targets = [m for n, m in model.named_modules() if n.endswith(tuple(zoo.TARGETS[name]))]
    size_of_lora = like * sum(sum(m.weight.shape) for m in targets)
    assert size(recommended) <= size_of_lora < size(one_rank_more)


def test_a_recommendation_leaves_out_the_head_of_the_task() -> None:
    recommended = rank_for(
        zoo.net("bert"), numbers=1000, task_type="SEQ_CLS", target_modules=["query", "classifier"]
    )
    without_head = rank_for(zoo.net("bert"), numbers=1000, target_modules=["query"])
    assert recommended.rank == without_head.rank


# ---- the first step of an optimizer --------------------------------------------------------------


def warnings_of_steps(model: nn.Module, parameters: Iterable[nn.Parameter], x: Tensor) -> list[str]:
    """Returns the warnings of an optimizer over these parameters.

    It takes one step without gradients, then three.
    """
    optimizer = torch.optim.SGD(parameters, 1e-3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()  # without gradients: no warning yet
        for _ in range(3):
            model(x).sum().backward()
            optimizer.step()
    return [str(warning.message) for warning in caught if "lotr_ext" in str(warning.message)]


def idle() -> nn.Module:
    """A model that calls one of its four adapted layers."""
    model = started("mlp")
    model.forward = lambda x: model.blocks[0]["up"](x)
    return model


def with_head() -> nn.Module:
    return trained("mlp", modules_to_save=["head"])


def with_frozen_adapter() -> nn.Module:
    """A model that trains only its head."""
    model = with_head().requires_grad_(False)
    model.head.requires_grad_()
    return model


def another_model() -> nn.Module:
    started("mlp")  # this adapter exists, but the optimizer belongs to another model
    return zoo.Mlp()


def older_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Returns the parameters that the model had before it was adapted."""
    adapter = set(lotr_parameters(model))
    return [parameter for parameter in model.parameters() if parameter not in adapter]


def head_parameters(model: nn.Module) -> list[nn.Parameter]:
    return list(model.head.parameters())


NOT_OF_THE_ADAPTER = r"none of the adapter's parameters"
# (makes the model, returns the parameters of its optimizer, patterns of the warnings)
FIRST_STEPS = {
    "an idle layer": (idle, trained_parameters, [r"called 3 of 4 .*'blocks.0.down'"]),
    "before apply_lotr": (partial(started, "mlp"), older_parameters, [NOT_OF_THE_ADAPTER]),
    "before apply_lotr, with a head": (with_head, older_parameters, [NOT_OF_THE_ADAPTER]),
    "merged": (
        lambda: merge(with_head()),
        trained_parameters,
        [r"merged into the weights.*unmerge"],
    ),
    "merged and unmerged": (lambda: unmerge(merge(with_head())), trained_parameters, []),
    "all parameters": (with_head, trained_parameters, []),
    "a head": (with_head, head_parameters, []),
    "a head of a merged model": (lambda: merge(with_head()), head_parameters, []),
    "merged, with a frozen adapter": (
        lambda: merge(with_frozen_adapter()),
        nn.Module.parameters,
        [],
    ),
    "another model": (another_model, trained_parameters, []),
    "some parts": (partial(started, "mlp", train=["core"]), adapter_parameters, []),
}


@pytest.mark.parametrize(
    ("make", "parameters_of", "expected"), FIRST_STEPS.values(), ids=FIRST_STEPS
)
def test_the_first_step_says_once_what_does_not_train(
    make: Callable[[], nn.Module], parameters_of: Callable, expected: list[str]
) -> None:
    model = make()
    messages = warnings_of_steps(model, parameters_of(model), zoo.inputs("mlp"))
    assert len(messages) == len(expected)
    assert all(map(re.search, expected, messages))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "parts", [(head_parameters, lotr_parameters), (lotr_parameters, head_parameters)]
)
@pytest.mark.parametrize("settings", [{}, {"core_init": "identity", "train": ["B"]}], ids=str)
def test_an_optimizer_for_the_head_and_one_for_the_adapter_are_right(
    parts: tuple, settings: dict
) -> None:
    model = trained("mlp", modules_to_save=["head"], **settings)
    optimizers = [torch.optim.SGD(parameters_of(model), 1e-3) for parameters_of in parts]
    for _ in range(2):
        model(zoo.inputs("mlp")).sum().backward()
        for optimizer in optimizers:
            optimizer.step()
    assert model not in first_step._watched  # the adapter has trained: later steps are not checked


def test_training_after_a_merge_is_noticed_also_later(x: Tensor) -> None:
    model = with_head()
    for change, count in ((lambda model: model, 0), (merge, 1), (unmerge, 0)):
        assert len(warnings_of_steps(change(model), trained_parameters(model), x)) == count


def test_importing_the_package_registers_no_hook() -> None:
    code = (
        "import lotr_ext, torch.optim.optimizer as o; assert not o._global_optimizer_post_hooks; "
        "import lotr_ext.tasks, lotr_ext.convert; assert not o._global_optimizer_post_hooks"
    )
    run_python("-c", code, check=True)
