"""TaskBank and use_tasks, against one model per task.

The reference for a task is the model with the task's cores in its layers (`single_task_model`). For
a batch with several tasks, it is that model for each row (`row_by_row`). Task -1 is the base model.
"""

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
import zoo
from helpers import relative, worst
from models import adapter_parameters, moved, same, trained, trained_parameters, unchanged
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    Cache,
    DynamicCache,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)
from transformers.utils import ModelOutput

from lotr_ext import (
    LoTRConfig,
    LoTRExperts,
    LoTRLinear,
    TaskBank,
    apply_lotr,
    disabled,
    merge,
    unload,
    use_tasks,
)
from lotr_ext.adapted import adapted_layers, attached_parameters

INDEX = torch.tensor([2, -1, 0, 2])  # the task of each row
INDEX_PER_TOKEN = INDEX.unsqueeze(1).repeat(1, 5)


def banked(
    name: str = "attention", tasks: int = 4, taken: int = 3, **settings: object
) -> nn.Module:
    """Returns a trained model with a bank for `tasks` tasks, which has `taken` random ones."""
    return with_bank(trained(name, **settings), tasks, taken)


def with_bank(model: nn.Module, tasks: int, taken: int) -> nn.Module:
    bank = TaskBank(model, tasks)
    layers = adapted_layers(model).items()
    for _ in range(taken):
        bank.add({f"{name}.core": 0.4 * torch.randn(layer.core.shape) for name, layer in layers})
    return model


@pytest.fixture
def model() -> nn.Module:
    return banked("mlp")


@pytest.fixture
def x() -> Tensor:
    return zoo.inputs("mlp", rows=4)


def output(model: nn.Module, x: Tensor, index: Tensor = INDEX, **options: bool) -> Tensor:
    """Returns the output for x inside of `use_tasks`."""
    with use_tasks(model, index, **options):
        return zoo.output(model, x)


def single_task_model(model: nn.Module, task: int) -> nn.Module:
    """Returns a copy of the model with the task's cores in its layers, the base model for -1."""
    copied = copy.deepcopy(model)
    if task == -1:
        return unload(copied)
    copied.load_state_dict(model.lotr_tasks.cores_of(task), strict=False)
    return copied


def output_of_task(model: nn.Module, task: int, x: Tensor) -> Tensor:
    return zoo.output(single_task_model(model, task), x)


def row_by_row(model: nn.Module, x: Tensor) -> Tensor:
    """Returns the output of each row with its task in INDEX, one row after another.

    Differentiable in the cores of the bank.
    """
    names = [f"{name}.core" for name in adapted_layers(model)]
    outputs = []
    for i, task in enumerate(INDEX.tolist()):
        cores = [core[task] * (task >= 0) for core in model.lotr_tasks.cores]
        call = partial(torch.func.functional_call, model, dict(zip(names, cores)))
        outputs.append(zoo.output(call, x[i : i + 1]))
    return torch.cat(outputs)


def checkpointed(model: nn.Module, x: Tensor, reentrant: bool) -> Tensor:
    """Runs the model in a checkpoint, to which the anchor gives an input with a gradient."""
    anchor = torch.zeros((), requires_grad=True)
    return checkpoint(lambda a: zoo.output(model, x) + a, anchor, use_reentrant=reentrant)


# ---- rows and tokens -----------------------------------------------------------------------------

# (index, the call)
CALLS: dict[str, tuple[Tensor, Callable[[nn.Module, Tensor], Tensor]]] = {
    "rows": (INDEX, zoo.output),
    "tokens": (INDEX_PER_TOKEN, zoo.output),
    "non-reentrant": (INDEX, partial(checkpointed, reentrant=False)),
    "reentrant": (INDEX, partial(checkpointed, reentrant=True)),
}


@pytest.mark.parametrize("name", zoo.NETS)
@pytest.mark.parametrize(("index", "call"), CALLS.values(), ids=CALLS)
def test_outputs_and_gradients_equal_those_of_one_model_per_task(
    name: str, index: Tensor, call: Callable[[nn.Module, Tensor], Tensor]
) -> None:
    model = banked(name)
    x = zoo.inputs(name, rows=4)
    bank = model.lotr_tasks.requires_grad_()
    targets = [*bank.cores, *adapter_parameters(model)[: len(model.lotr_factors)]]
    expected = row_by_row(model, x)
    direction = torch.randn_like(expected)
    with use_tasks(model, index) as inside:
        y = call(model, x)
        y.backward(direction)
    assert inside is model
    assert relative(y, expected) < 1e-5
    gradients = torch.autograd.grad(expected, targets, direction)
    assert worst([target.grad for target in targets], gradients) < 2e-5
    assert relative(zoo.output(model, x), y) > 1e-3  # outside: the model's cores


def test_each_token_uses_its_task(x: Tensor, model: nn.Module) -> None:
    tasks = [0, 1, 2, -1, 1]
    y = output(model, x, torch.tensor([tasks] * 4))
    for column, task in enumerate(tasks):
        assert relative(y[:, column], output_of_task(model, task, x)[:, column]) < 1e-5


@pytest.mark.parametrize("name", ["mlp", "mixture"])
@pytest.mark.parametrize("wrapped", [nn.Module.eval, nn.Sequential], ids=["plain", "container"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_backward_of_a_checkpoint_outside_of_the_context_raises(
    name: str, wrapped: Callable, reentrant: bool
) -> None:
    """It would recompute without tasks. Without a checkpoint or a bank, nothing is refused."""
    model = with_bank(wrapped(trained(name)), tasks=4, taken=3)
    x = zoo.inputs(name, rows=4)
    bank = model.lotr_tasks.requires_grad_()  # a reference that outlives `del model.lotr_tasks`
    for each in (model, copy.deepcopy(model)):  # a copied model refuses too
        with use_tasks(each, INDEX):
            y = zoo.output(each, x)
            z = checkpointed(each, x, reentrant)
        y.sum().backward()
        with pytest.raises(RuntimeError, match="use_tasks: expected backward inside"):
            z.sum().backward()
    del model.lotr_tasks
    checkpointed(model, x, reentrant=False).sum().backward()
    assert (len(bank), attached_parameters(model)) == (3, [])


def test_contexts_nest_and_belong_to_a_thread(x: Tensor, model: nn.Module) -> None:
    expected = {task: output_of_task(model, task, x) for task in (0, 1, 2, -1)}

    def run(task: int) -> None:
        for _ in range(10):
            assert relative(output(model, x, torch.full((4,), task)), expected[task]) < 1e-5

    with use_tasks(model, INDEX), ThreadPoolExecutor(len(expected)) as pool:
        outer = zoo.output(model, x)
        list(pool.map(run, expected))
        run(0)
        with disabled(model):
            assert relative(zoo.output(model, x), expected[-1]) < 1e-6
        assert torch.equal(zoo.output(model, x), outer)


# ---- generation ----------------------------------------------------------------------------------


GREEDY = {"do_sample": False, "max_new_tokens": 4}


def generated(model: nn.Module, index: Tensor, x: Tensor, **settings: object) -> Tensor:
    with use_tasks(model, index):
        return model.generate(x, **GREEDY, **settings)


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("name", ["gpt2", "llama", "mixture"])
def test_generate_with_one_task_per_row(name: str, beams: int) -> None:
    """A beam search runs num_beams rows per prompt."""
    model = banked(name)
    x = zoo.inputs(name, rows=4)
    batch = generated(model, INDEX.repeat_interleave(beams), x, num_beams=beams)
    for i, task in enumerate(INDEX.tolist()):
        (single,) = single_task_model(model, task).generate(x[i : i + 1], num_beams=beams, **GREEDY)
        assert torch.equal(batch[i, : len(single)], single)


def test_beam_search_needs_an_index_of_its_beams() -> None:
    with pytest.raises(ValueError, match="repeat_interleave"):
        generated(banked("llama"), INDEX, zoo.inputs("llama", rows=4), num_beams=2)


def test_generate_from_prompts_with_left_padding() -> None:
    """An index has a column for each token of the prompt, with the padding."""
    model = banked("llama")
    x = zoo.inputs("llama", rows=3)
    index = torch.tensor([0, 1, -1]).repeat(3, 2)[:, :5]
    padded = partial(nn.functional.pad, pad=(2, 0))
    y = generated(model, padded(index), padded(x), attention_mask=padded(torch.ones_like(x)))
    assert torch.equal(y[:, 2:], generated(model, index, x))
    assert not torch.equal(y[:, 2:], generated(model, 0 * index - 1, x))


def with_cache_by_position(model: nn.Module, ids: Tensor, cache: Cache) -> ModelOutput:
    """Passes the cache as GPT-2's second argument, Llama's fourth."""
    arguments_before = {"gpt2": (), "llama": (None, None)}[model.config.model_type]
    return model(ids, *arguments_before, cache)


def with_embeddings(model: nn.Module, ids: Tensor, cache: Cache) -> ModelOutput:
    return model(inputs_embeds=model.get_input_embeddings()(ids), past_key_values=cache)


def with_cache_by_name(model: nn.Module, ids: Tensor, cache: Cache) -> ModelOutput:
    return model(ids, past_key_values=cache)


# (class of the cache, its further arguments, call)
CACHED = {
    "by name": (DynamicCache, {}, with_cache_by_name),
    "by position": (DynamicCache, {}, with_cache_by_position),
    "static": (StaticCache, {"max_cache_len": 8}, with_cache_by_name),
    "embeddings": (DynamicCache, {}, with_embeddings),
}


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("cached", CACHED)
def test_columns_count_from_the_first_token_in_the_cache(name: str, cached: str) -> None:
    """Forwards over a cache equal one over all tokens. Later tokens use the last column."""
    cache_class, settings, call = CACHED[cached]
    model = banked(name)
    x = zoo.inputs(name, rows=2, tokens=6)
    index = torch.tensor([[0, 1, 2, 0], [1, 1, -1, 2]])
    expected = output(model, x, torch.cat([index, index[:, -1:].expand(-1, 2)], 1))
    cache = cache_class(config=model.config, **settings)
    with torch.no_grad(), use_tasks(model, index):
        y = torch.cat([call(model, part, cache).logits for part in x.split([3, 2, 1], 1)], 1)
    assert relative(y, expected) < 1e-5


def test_a_cache_of_the_base_model_serves_tasks() -> None:
    model = banked("llama")
    x = zoo.inputs("llama", rows=4, tokens=6)
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), disabled(model):
        model(x[:, :4], past_key_values=cache)
    with torch.no_grad(), use_tasks(model, INDEX):
        y = model(x[:, 4:], past_key_values=cache).logits
    index = torch.cat([torch.full((4, 4), -1), INDEX_PER_TOKEN[:, :2]], 1)
    assert relative(y, output(model, x, index)[:, 4:]) < 1e-5


def test_columns_count_the_tokens_of_the_longest_layer_of_a_cache() -> None:
    """The first layer of a hybrid model may keep no tokens."""

    class Hybrid(zoo.Mlp):
        def forward(self, inputs_embeds: Tensor, past_key_values: Cache) -> Tensor:
            keys = inputs_embeds.unsqueeze(1)
            past_key_values.update(keys, keys, 1)  # the cache of layer 0 stays empty
            return super().forward(inputs_embeds)

    config = LoTRConfig(rank=3, scaling=1.0, target_modules=["up"])
    model = with_bank(moved(apply_lotr(zoo.fill(Hybrid()), config)), tasks=2, taken=2)
    x = zoo.inputs("mlp", rows=1)
    cache = DynamicCache()
    with torch.no_grad(), use_tasks(model, torch.tensor([[0, 1, -1, 1, 0]])):
        y = torch.cat([model(part, cache) for part in x.split([3, 2], 1)], 1)
        assert relative(y, model(x, DynamicCache())) < 1e-5


# (tokens, caches), by name
WITHOUT_POSITIONS = {
    "a cache without a length": (
        {"input_ids": zoo.inputs("attention")},
        {"mems": (torch.zeros(3, 2),)},
    ),
    "several caches": (
        {"input_ids": zoo.inputs("attention")},
        {"past_key_values": DynamicCache(), "mems": DynamicCache()},
    ),
    "tokens of another name": (
        {"ids": zoo.inputs("attention")},
        {"past_key_values": DynamicCache()},
    ),
}


@pytest.mark.parametrize(("tokens", "caches"), WITHOUT_POSITIONS.values(), ids=WITHOUT_POSITIONS)
def test_a_call_without_positions_for_an_index_per_token_is_refused(
    tokens: dict[str, Tensor], caches: dict[str, object]
) -> None:
    class Remembers(zoo.Attention):
        def forward(self, **inputs: object) -> Tensor:
            return super().forward(next(iter(inputs.values())))

    model = apply_lotr(Remembers(), LoTRConfig(rank=2, target_modules=["q"]))
    TaskBank(model, 1).add()
    with use_tasks(model, torch.zeros(3, 5, dtype=torch.long)):
        model(**tokens)
        with pytest.raises(ValueError, match=r"index: expected .* cannot be found"):
            model(**tokens, **caches)
    with use_tasks(model, torch.zeros(3, dtype=torch.long)):  # one task per row needs no position
        model(**tokens, **caches)


def test_an_encoder_and_a_decoder_need_one_task_per_row() -> None:
    config = T5Config(
        vocab_size=20,
        d_model=16,
        d_kv=8,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
    )
    model = apply_lotr(T5ForConditionalGeneration(config), LoTRConfig(rank=2, target_modules=["q"]))
    TaskBank(model, 1).add()
    with use_tasks(model, torch.tensor([0, -1])):
        model.generate(torch.randint(1, 20, (2, 3)), max_new_tokens=2)
    with pytest.raises(ValueError, match="index: expected shape"):
        use_tasks(model, torch.zeros(2, 3, dtype=torch.long)).__enter__()


def test_columns_under_checkpoints_need_one_context_per_cache() -> None:
    model = banked("llama")
    x = zoo.inputs("llama", rows=2)
    with use_tasks(model, torch.zeros(2, 5, dtype=torch.long)):
        first, second = (checkpointed(model, x, reentrant=False).sum() for _ in range(2))
        first.backward()
        with torch.no_grad():
            model(x, past_key_values=DynamicCache(config=model.config))
        with pytest.raises(RuntimeError, match="expected no cache"):
            second.backward()


# ---- flat inputs ---------------------------------------------------------------------------------


class Flat(zoo.Children):
    """Gives b the tokens of all rows in one list."""

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)).flatten(0, 1)).view_as(x)


@pytest.mark.parametrize("has_experts", [False, True])
def test_a_layer_may_get_the_tokens_of_all_rows_in_one_list(has_experts: bool) -> None:
    """That needs flat=True, except in a model with experts."""
    model = zoo.fill(Flat(a=nn.Linear(16, 16), b=nn.Linear(16, 16)))
    apply_lotr(model, LoTRConfig(rank=2, scaling=1.0))
    if has_experts:
        model.experts = LoTRExperts(2, 16, 16, rank=2)
    with_bank(moved(model), tasks=3, taken=3)
    x = torch.randn(4, 5, 16)
    for index in (INDEX, INDEX_PER_TOKEN):
        assert relative(output(model, x, index, flat=not has_experts), row_by_row(model, x)) < 1e-5
        # A batch may be empty.
        assert output(model, x[:0], index[:0], flat=not has_experts).shape == (0, 5, 16)
    with use_tasks(model, INDEX, flat=True), pytest.raises(ValueError, match="equal length"):
        model.b(torch.randn(7, 16))


# ---- training ------------------------------------------------------------------------------------


def trained_tasks(model: nn.Module) -> TaskBank:
    """Puts a model in training mode, freezes all but its tasks, and returns the bank."""
    model.train()
    model.requires_grad_(False)
    return model.lotr_tasks.requires_grad_()


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
def test_tasks_trained_one_after_another_do_not_move_each_other(
    model: nn.Module,
    kind: type[torch.optim.Optimizer],
) -> None:
    bank = trained_tasks(model)
    for task in range(3):
        before = [core.detach().clone() for core in bank.cores]
        optimizer = kind(bank.parameters(), lr=0.1, weight_decay=0.0)
        for _ in range(3):
            x = torch.randn(3, 5, zoo.WIDTH)
            output(model, x, torch.full((3,), task)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        for core, old in zip(bank.cores, before, strict=True):
            assert [torch.equal(core[i], old[i]) for i in range(3)] == [i != task for i in range(3)]


ALL_PARTS = ["A", "B", "core"]


@pytest.mark.filterwarnings("error:lotr_ext")
@pytest.mark.parametrize(
    ("parts", "trained_cores", "warns"),
    [
        (ALL_PARTS, [], True),
        (["A"], [], True),
        (["B"], [], True),
        (["core"], [], False),
        (ALL_PARTS, range(4), False),
        (ALL_PARTS, [1], False),
    ],
)
def test_tasks_that_are_frozen_while_factors_train_are_noticed(
    x: Tensor, model: nn.Module, parts: list[str], trained_cores: list[int], warns: bool
) -> None:
    for layer in adapted_layers(model).values():
        layer.set_trained(parts)
    for i in trained_cores:
        model.lotr_tasks.cores[i].requires_grad_()
    output(model, x)  # in eval mode
    model.train()
    with torch.no_grad():
        output(model, x)
    with pytest.warns(UserWarning, match="tasks are not") if warns else nullcontext():
        output(model, x)


@pytest.mark.filterwarnings("error:lotr_ext")
def test_an_optimizer_of_tasks_that_no_forward_used_is_noticed_once(
    x: Tensor, model: nn.Module
) -> None:
    """The model's adapter trains, and the bank idles."""
    model.lotr_tasks.requires_grad_()
    optimizer = torch.optim.SGD(trained_parameters(model), lr=0.1)
    optimizer.step()  # without a backward
    zoo.output(model, x).square().mean().backward()
    with pytest.warns(UserWarning, match="lotr_ext"):
        optimizer.step()
    optimizer.step()


@pytest.mark.filterwarnings("error:lotr_ext")
@pytest.mark.parametrize("adapter_trains_first", [False, True])
def test_an_optimizer_of_tasks_that_a_forward_used_is_silent(
    x: Tensor, model: nn.Module, adapter_trains_first: bool
) -> None:
    bank = model.lotr_tasks.requires_grad_()
    optimizer = torch.optim.SGD([*bank.parameters(), *adapter_parameters(model)], lr=0.1)
    # The first step trains only the model's adapter, by an optimizer that does not have the tasks.
    if adapter_trains_first:
        zoo.output(model, x).square().mean().backward()
        torch.optim.SGD(adapter_parameters(model), lr=0.1).step()
    output(model, x).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize(
    "checkpoints",
    [{}, {"use_reentrant": False}, {"use_reentrant": True}],
    ids=["plain", "non-reentrant", "reentrant"],
)
def test_the_trainer_of_transformers_trains_tasks(
    checkpoints: dict[str, bool], tmp_path: Path
) -> None:
    """One step of SGD, also with checkpoints, which need the context in backward."""

    class TaskTrainer(Trainer):  # as in docs/many_tasks.md
        def training_step(self, model, inputs, *args, **kwargs):
            with use_tasks(self.model, inputs.pop("task")):
                return super().training_step(model, inputs, *args, **kwargs)

        def prediction_step(self, model, inputs, *args, **kwargs):
            with use_tasks(self.model, inputs.pop("task")):
                return super().prediction_step(model, inputs, *args, **kwargs)

    model = banked("llama")
    x = zoo.inputs("llama", rows=4)
    bank = trained_tasks(model)
    logits = row_by_row(model, x)[:, :-1].flatten(0, 1)
    loss = nn.functional.cross_entropy(logits, x[:, 1:].flatten())
    gradients = torch.autograd.grad(loss, [*bank.cores])
    expected = [core.detach() - gradient for core, gradient in zip(bank.cores, gradients)]

    settings = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=4,
        max_steps=1,
        remove_unused_columns=False,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        disable_tqdm=True,
        gradient_checkpointing=bool(checkpoints),
        gradient_checkpointing_kwargs=checkpoints or None,
    )
    model.enable_input_require_grads()
    data = [{"input_ids": row, "labels": row, "task": task} for row, task in zip(x, INDEX.tolist())]
    trainer = TaskTrainer(
        model,
        settings,
        train_dataset=data,
        eval_dataset=data,
        optimizers=(torch.optim.SGD(bank.parameters(), lr=1.0), None),
    )
    trainer.train()
    assert worst([*bank.cores], expected) < 1e-5
    with torch.no_grad(), use_tasks(model.eval(), INDEX):
        eval_loss = model(x, labels=x).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(eval_loss, abs=1e-4)


# ---- slots ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["shape", "layer"])
def test_slots_are_added_replaced_and_removed(way: str, tmp_path: Path) -> None:
    model = trained("mlp", way)
    x = zoo.inputs("mlp", rows=2)
    bank = TaskBank(model, 2)
    assert not any(parameter.requires_grad for parameter in bank.cores)
    assert bank.add() == 0  # a task starts at zero, as the base model
    assert relative(output(model, x, torch.tensor([0, -1])), output_of_task(model, -1, x)) < 1e-6
    cores = {f"{name}.core": layer.core for name, layer in adapted_layers(model).items()}
    assert bank.add(cores) == 1
    assert relative(output(model, x, torch.tensor([1, 1])), zoo.output(model, x)) < 1e-6
    bank.save(1, tmp_path / "one.safetensors")
    bank.remove(1)
    assert len(bank) == 1
    assert not any(bool(parameter[1].any()) for parameter in bank.cores)
    bank.replace(0, tmp_path / "one.safetensors")
    assert same(bank.cores_of(0), cores)
    assert bank.add(tmp_path / "one.safetensors") == 1


def test_a_reused_slot_has_no_gradient_of_its_last_task() -> None:
    model = banked("mlp", tasks=2, taken=2)
    x = zoo.inputs("mlp", rows=2)
    bank = model.lotr_tasks.requires_grad_()
    output(model, x, torch.tensor([0, 1])).square().sum().backward()
    bank.remove(0)
    bank.add()
    for core in bank.cores:
        assert core.grad.flatten(1).any(1).tolist() == [False, True]


def test_a_changed_task_makes_an_older_backward_raise(x: Tensor, model: nn.Module) -> None:
    y = output(model, x)
    model.lotr_tasks.remove(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("attention", {"scaling": 2.0}, "scaling"),
        ("attention", {"seed": 3}, "made for other A and B"),
        ("attention", {"rank": 2}, "ranks"),
        ("attention", {"rank": 2, "scaling": 2.0}, "ranks"),
        ("mlp", {}, "missing"),
    ],
)
def test_a_task_of_another_adapter_is_refused(
    name: str, settings: dict, reason: str, tmp_path: Path
) -> None:
    """test_vllm_files.py has every damage of a task's file."""
    path = tmp_path / "task.safetensors"
    banked("attention").lotr_tasks.save(0, path)
    banked("attention").lotr_tasks.replace(1, path)  # the same factors
    with pytest.raises(ValueError, match=f"expected .*{reason}"):
        banked(name, **settings).lotr_tasks.add(path)


def test_threads_add_and_remove_tasks() -> None:
    """Each task gets its own slot, and no core belongs to two tasks."""
    model = banked("mlp", tasks=44, taken=0)
    bank = model.lotr_tasks
    names = [f"{name}.core" for name in adapted_layers(model)]

    def add(value: int) -> int:
        bank.remove(bank.add())
        return bank.add(dict.fromkeys(names, torch.full((3, 3), float(value))))

    with ThreadPoolExecutor(4) as pool:
        slots = list(pool.map(add, range(40)))
    assert len(bank) == len(set(slots)) == 40
    for value, slot in enumerate(slots):
        assert all(bool((core == value).all()) for core in bank.cores_of(slot).values())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_cores_of_another_dtype_are_cast(dtype: torch.dtype) -> None:
    bank = banked("mlp").lotr_tasks
    cores = {name: core.to(dtype) for name, core in bank.cores_of(0).items()}
    for name, core in bank.cores_of(bank.add(cores)).items():
        assert torch.equal(core, cores[name].to(core.dtype))


def test_meta_as_the_default_device_changes_nothing(x: Tensor, model: nn.Module) -> None:
    other = trained("mlp")
    with torch.device("meta"):
        y = output(model, x, INDEX_PER_TOKEN)
        bank = TaskBank(other, 4)
    assert relative(y, row_by_row(model, x)) < 1e-5
    assert not bank.taken.is_meta and not bank.cores[0].is_meta


BAD_VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "meta": lambda core: core.to("meta"),
    "sparse": lambda core: core.to_sparse(),
    "integers": lambda core: core.int(),
    "complex": lambda core: core.to(torch.complex64),
}


@pytest.mark.parametrize("kind", BAD_VALUES)
@pytest.mark.parametrize("write", [TaskBank.add, partial(TaskBank.replace, task=1)])
def test_a_refused_core_changes_nothing(model: nn.Module, write: Callable, kind: str) -> None:
    bank = model.lotr_tasks
    cores = {name: core.clone() for name, core in bank.cores_of(0).items()}
    last = list(cores)[-1]
    cores[last] = BAD_VALUES[kind](cores[last])
    with unchanged(model), pytest.raises((TypeError, RuntimeError)):  # from torch
        write(bank, source=cores)


def test_the_bank_is_part_of_the_model(x: Tensor, model: nn.Module) -> None:
    assert {k for k in model.state_dict() if "tasks" in k} == {
        *(f"lotr_tasks.cores.{i}" for i in range(4)),
        "lotr_tasks.taken",
    }
    y = output(model, x)
    other = copy.deepcopy(model)
    moved(model, 9)
    assert torch.equal(output(other, x), y)
    other.load_state_dict(model.state_dict())
    assert torch.equal(output(other, x), output(model, x))
    merge(model)
    with pytest.raises(RuntimeError, match="use_tasks: expected unmerged"), use_tasks(model, INDEX):
        pass
    unload(model)
    assert not hasattr(model, "lotr_tasks")


def test_a_batch_may_be_empty(model: nn.Module) -> None:
    assert output(model, torch.randn(0, 5, 16), INDEX[:0]).shape == (0, 5, 3)


def test_the_file_of_a_task_fits_groups_in_any_order(tmp_path: Path) -> None:
    """The checksum takes the factors in the order of their groups' names, not of the layers."""
    model, other = (trained("mlp", scaling=1.0) for _ in range(2))
    other.blocks = nn.ModuleList(
        nn.ModuleDict(dict(reversed(block.items()))) for block in other.blocks
    )
    assert list(adapted_layers(model)) != list(adapted_layers(other))
    bank = TaskBank(model, 1)
    bank.add()
    bank.save(0, tmp_path / "task.safetensors")
    TaskBank(other, 1).add(tmp_path / "task.safetensors")


def test_a_single_layer_may_have_a_bank() -> None:
    layer = with_bank(moved(LoTRLinear(6, 4, rank=2)), tasks=1, taken=1)
    x = torch.randn(2, 6)
    y = output(layer, x, torch.tensor([0, -1]))
    with disabled(layer):
        base_output = layer(x)
    assert relative(y[1], base_output[1]) < 1e-6
    assert relative(y[0], base_output[0]) > 1e-6
