"""TaskBank and use_tasks, against one model per task."""

import copy
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
import zoo
from helpers import relative, worst
from models import adapter_parameters, moved, trained, unchanged
from safetensors.torch import load_file, save_file
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
    LoTRFactors,
    LoTRLinear,
    TaskBank,
    apply_lotr,
    disabled,
    merge,
    unload,
    use_tasks,
)
from lotr_ext.model import adapted_layers

INDEX = torch.tensor([2, -1, 0, 2])  # the task of each row
INDEX_PER_TOKEN = INDEX.unsqueeze(1).repeat(1, 5)


def banked(
    name: str = "attention", tasks: int = 4, taken: int = 3, **settings: object
) -> nn.Module:
    """A trained model with a bank of random tasks, the last slots free."""
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
    """The output for x inside of `use_tasks`."""
    with use_tasks(model, index, **options):
        return zoo.output(model, x)


def called(model: nn.Module, cores: dict[str, Tensor], x: Tensor) -> Tensor:
    """The output for x with these cores in the layers themselves."""
    return zoo.output(partial(torch.func.functional_call, model, cores), x)


def output_of_task(model: nn.Module, task: int, x: Tensor) -> Tensor:
    """The output for x with the task's cores in the layers, -1 for the base model."""
    if task == -1:
        with disabled(model):
            return zoo.output(model, x)
    return called(model, model.lotr_tasks.cores_of(task), x)


def rows(model: nn.Module, x: Tensor, index: Tensor = INDEX) -> Tensor:
    """The output of each row with its task, one row after another."""
    return torch.cat(
        [output_of_task(model, int(task), x[i : i + 1]) for i, task in enumerate(index)]
    )


def rows_by_bank(model: nn.Module, x: Tensor) -> Tensor:
    """The output of each row with its task in INDEX, differentiable in the cores of the bank."""
    names = [f"{name}.core" for name in adapted_layers(model)]
    outputs = []
    for i, task in enumerate(INDEX.tolist()):
        cores = [core[task] * (task >= 0) for core in model.lotr_tasks.cores]
        outputs.append(called(model, dict(zip(names, cores)), x[i : i + 1]))
    return torch.cat(outputs)


# ---- rows and tokens -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", zoo.NETS)
def test_each_row_equals_the_model_of_its_task(name: str) -> None:
    model = banked(name)
    x = zoo.inputs(name, rows=4)
    with use_tasks(model, INDEX) as inside:
        y = zoo.output(model, x)
        assert inside is model
    assert relative(y, rows(model, x)) < 1e-5
    assert relative(zoo.output(model, x), y) > 1e-3  # outside: the model's cores
    assert relative(output(model, x, torch.full((4,), -1)), output_of_task(model, -1, x)) < 1e-6


@pytest.mark.parametrize("name", ["mlp", "attention", "gpt2", "llama"])
def test_each_token_uses_its_task(name: str) -> None:
    """The task of a token changes only the adapter of this token.

    An index with equal columns is an index of rows, and the first token sees no other.
    """
    model = banked(name)
    x = zoo.inputs(name, rows=4)
    assert relative(output(model, x, INDEX_PER_TOKEN), rows(model, x)) < 1e-5
    index = torch.tensor([[0, 1, 2, -1, 1]] * 4)
    y = output(model, x, index)
    if name == "mlp":  # tokens do not see each other
        for column, task in enumerate(index[0].tolist()):
            assert relative(y[:, column], output_of_task(model, task, x)[:, column]) < 1e-5
    elif name != "attention":
        assert relative(y[:, 0], output_of_task(model, 0, x)[:, 0]) < 1e-5
        # Token 0, which it sees, is of another task.
        assert relative(y[:, 1], output_of_task(model, 1, x)[:, 1]) > 1e-4


@pytest.mark.parametrize("name", zoo.NETS)
@pytest.mark.parametrize("how", ["plain", "non-reentrant", "reentrant"])
def test_gradients_equal_those_of_one_model_per_task(name: str, how: str) -> None:
    model = banked(name)
    x = zoo.inputs(name, rows=4)
    bank = model.lotr_tasks.requires_grad_()
    direction = torch.randn_like(zoo.output(model, x))
    factors = adapter_parameters(model)[: len(model.lotr_factors)]
    total = (rows_by_bank(model, x) * direction).sum()
    expected = torch.autograd.grad(total, (*bank.cores, *factors))
    with use_tasks(model, INDEX):
        if how == "plain":
            y = zoo.output(model, x)
        else:
            y = checkpointed(model, x, reentrant=how == "reentrant")
        (y * direction).sum().backward()
    assert worst([p.grad for p in (*bank.cores, *factors)], expected) < 2e-5


def checkpointed(model: nn.Module, x: Tensor, reentrant: bool) -> Tensor:
    """Runs the model in a checkpoint, also for token ids, which need no gradient."""
    anchor = torch.zeros((), requires_grad=True)
    return checkpoint(lambda a: zoo.output(model, x) + a, anchor, use_reentrant=reentrant)


@pytest.mark.parametrize("name", ["mlp", "mixture"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_backward_of_a_checkpoint_outside_of_the_context_raises(name: str, reentrant: bool) -> None:
    """It would recompute without tasks. Without a checkpoint it is right."""
    model = banked(name)
    x = zoo.inputs(name, rows=4)
    model.lotr_tasks.requires_grad_()
    for each in (model, copy.deepcopy(model)):  # the copy refuses by the copy of the bank
        with use_tasks(each, INDEX):
            y = zoo.output(each, x)
            z = checkpointed(each, x, reentrant)
        y.sum().backward()
        assert all(core.grad is not None for core in each.lotr_tasks.cores)
        with pytest.raises(RuntimeError, match="use_tasks: expected backward inside"):
            z.sum().backward()
    del model.lotr_tasks
    checkpointed(model, x, reentrant=False).sum().backward()


def test_each_thread_uses_its_tasks() -> None:
    model = banked("llama")
    x = zoo.inputs("llama", rows=4)
    expected = {task: output_of_task(model, task, x) for task in (0, 1, 2, -1)}

    def run(task: int) -> list[float]:
        with use_tasks(model, torch.full((4,), task)):
            return [relative(zoo.output(model, x), expected[task]) for _ in range(10)]

    with ThreadPoolExecutor(len(expected)) as pool:
        assert max(max(errors) for errors in pool.map(run, expected)) < 1e-5


def test_contexts_nest(x: Tensor, model: nn.Module) -> None:
    plain = output_of_task(model, -1, x)
    task_0 = output_of_task(model, 0, x)
    with use_tasks(model, INDEX):
        outer = zoo.output(model, x)
        assert relative(output(model, x, torch.zeros(4, dtype=torch.long)), task_0) < 1e-5
        assert relative(output_of_task(model, -1, x), plain) < 1e-6
        assert torch.equal(zoo.output(model, x), outer)


# ---- generation ----------------------------------------------------------------------------------


def generated(model: nn.Module, index: Tensor, x: Tensor, **settings: object) -> Tensor:
    with use_tasks(model, index):
        return model.generate(x, do_sample=False, max_new_tokens=4, **settings)


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("name", ["gpt2", "llama", "mixture"])
def test_generate_with_one_task_per_row(name: str, beams: int) -> None:
    """The model runs num_beams rows per prompt."""
    model = banked(name)
    x = zoo.inputs(name, rows=4)
    index = INDEX.repeat_interleave(beams)
    batch = generated(model, index, x, num_beams=beams)
    for i, tasks in enumerate(index.split(beams)):
        (single,) = generated(model, tasks, x[i : i + 1], num_beams=beams)
        assert torch.equal(batch[i, : len(single)], single)


def test_beam_search_needs_an_index_of_its_beams() -> None:
    with pytest.raises(ValueError, match="repeat_interleave"):
        generated(banked("llama"), INDEX, zoo.inputs("llama", rows=4), num_beams=2)


def test_generate_from_prompts_with_left_padding() -> None:
    """An index has a column for each token of the prompt, with the padding."""
    model = banked("llama")
    x = zoo.inputs("llama", rows=3)
    padded = nn.functional.pad(x, (2, 0))
    mask = nn.functional.pad(torch.ones_like(x), (2, 0))
    by_row = torch.tensor([0, 1, -1])
    by_token = by_row.repeat(3, 2)[:, :5]
    for index, padded_index in (
        (by_row, by_row),
        (by_token, torch.cat([by_token[:, :2], by_token], 1)),
    ):
        y = generated(model, padded_index, padded, attention_mask=mask)
        assert torch.equal(y[:, 2:], generated(model, index, x))


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


def test_one_cache_of_the_base_model_serves_several_tasks() -> None:
    """The prompt is computed once without a task. Its cache is repeated for the rows of tasks."""
    model = banked("llama")
    x = zoo.inputs("llama", rows=1, tokens=6)
    tasks = torch.tensor([0, 2, -1])
    index = torch.full((3, 6), -1)
    index[:, 4:] = tasks.unsqueeze(1)
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), disabled(model):
        model(x[:, :4], past_key_values=cache)
    cache.batch_repeat_interleave(3)
    rows = x.expand(3, -1)
    with torch.no_grad(), use_tasks(model, tasks):
        y = model(rows[:, 4:], past_key_values=cache).logits
    assert relative(y, output(model, rows, index)[:, 4:]) < 1e-5


def test_columns_count_the_tokens_of_the_longest_layer_of_a_cache() -> None:
    """The first layer of a hybrid model may keep no tokens."""

    class Hybrid(zoo.Mlp):
        def forward(self, inputs_embeds: Tensor, past_key_values: Cache) -> Tensor:
            keys = inputs_embeds.unsqueeze(1)
            past_key_values.update(keys, keys, 1)  # the cache of layer 0 stays empty
            return super().forward(inputs_embeds)

    model = apply_lotr(zoo.fill(Hybrid()), LoTRConfig(rank=3, scaling=1.0, target_modules=["up"]))
    with_bank(moved(model), tasks=2, taken=2)
    x = zoo.inputs("mlp", rows=1)
    cache = DynamicCache()
    with torch.no_grad(), use_tasks(model, torch.tensor([[0, 1, -1, 1, 0]])):
        y = torch.cat([model(part, cache) for part in x.split([3, 2], 1)], 1)
        expected = model(x, DynamicCache())
    assert relative(y, expected) < 1e-5


def test_a_cache_without_a_length_is_refused() -> None:
    class Remembers(zoo.Attention):
        def forward(self, ids: Tensor, mems: tuple | None = None) -> Tensor:
            return super().forward(ids)

    model = Remembers()
    moved(apply_lotr(model, LoTRConfig(rank=2, scaling=1.0, target_modules=["q"])))
    TaskBank(model, 1).add()
    x = zoo.inputs("attention")
    memory = (torch.zeros(3, 2),)
    with use_tasks(model, torch.zeros(3, 5, dtype=torch.long)):
        model(x)
        for positional, named in (((memory,), {}), ((), {"mems": memory})):
            with pytest.raises(ValueError, match="index: expected"):
                model(x, *positional, **named)
    with use_tasks(model, torch.zeros(3, dtype=torch.long)):  # one task per row needs no length
        model(x, memory)


def test_an_encoder_and_a_decoder_need_one_task_per_row() -> None:
    sizes = {
        "vocab_size": 20,
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 16,
        "num_layers": 1,
        "num_heads": 2,
    }
    net = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
    model = apply_lotr(net, LoTRConfig(rank=2, target_modules=["q"]))
    TaskBank(model, 1).add()
    ids = torch.randint(1, 20, (2, 3))
    with use_tasks(model, torch.tensor([0, -1])):
        model.generate(ids, max_new_tokens=2)
    with (
        pytest.raises(ValueError, match="index: expected shape"),
        use_tasks(model, torch.zeros(2, 3, dtype=torch.long)),
    ):
        model(ids, labels=ids)


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


# ---- flat inputs and experts ---------------------------------------------------------------------


def test_flat_inputs_have_the_tokens_of_all_rows() -> None:
    class Flat(zoo.Children):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.tanh(self.a(x)).flatten(0, 1)).view_as(x)

    model = zoo.fill(Flat(a=nn.Linear(16, 16), b=nn.Linear(16, 16)))
    x = torch.randn(4, 5, 16)
    with_bank(moved(apply_lotr(model, LoTRConfig(rank=2, scaling=1.0))), tasks=3, taken=3)
    with use_tasks(model, INDEX), pytest.raises(ValueError, match="flat=True"):
        model(x)
    for index in (INDEX, INDEX_PER_TOKEN):
        assert relative(output(model, x, index, flat=True), rows(model, x)) < 1e-5
    with use_tasks(model, INDEX, flat=True), pytest.raises(ValueError, match="equal length"):
        model.b(torch.randn(7, 16))


def test_experts_take_a_core_by_row_and_expert() -> None:
    """Also of a mixture's shared expert, which gets all tokens in one list."""
    torch.manual_seed(1)

    class Both(zoo.Children):
        def forward(self, x: Tensor) -> Tensor:
            flat = x.flatten(0, 1)
            expert, order = torch.sort(torch.arange(len(flat)) % 3, stable=True)
            offs = torch.bincount(expert, minlength=3).cumsum(0).int()
            routed = torch.zeros_like(flat)
            routed = routed.index_add(0, order, self.experts(flat, offs, tokens=order))
            return (self.shared(flat) + routed).view_as(x)

    factors = LoTRFactors(16, 16, 2)
    experts = LoTRExperts(3, 16, 16, factors=factors)
    model = moved(Both(experts=experts, shared=LoTRLinear(16, 16, factors=factors)))
    with_bank(model, tasks=3, taken=3)
    x = torch.randn(4, 5, 16)
    assert [tuple(core.shape) for core in model.lotr_tasks.cores] == [(3, 3, 2, 2), (3, 2, 2)]
    tasks = torch.tensor([2, -1, 0, 1])
    y = output(model, x, tasks)
    # The expert of a token depends on its place in the batch, so x stays a batch.
    of_tasks = [output_of_task(model, task, x)[i] for i, task in enumerate(tasks.tolist())]
    assert relative(y, torch.stack(of_tasks)) < 1e-5


# ---- training ------------------------------------------------------------------------------------


def trained_tasks(model: nn.Module) -> TaskBank:
    """The bank of a model in training mode, of which only the tasks are trained."""
    model.train()
    model.requires_grad_(False)
    return model.lotr_tasks.requires_grad_()


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
def test_tasks_trained_one_after_another_do_not_move_each_other(
    model: nn.Module,
    kind: type[torch.optim.Optimizer],
) -> None:
    """Each task has its optimizer, without weight decay."""
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
            moved_tasks = {i for i in range(3) if not torch.equal(core[i], old[i])}
            assert moved_tasks == {task}


def warnings_of(call: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(warning.message) for warning in caught if "lotr_ext" in str(warning.message)]


# What is trained, and whether use_tasks warns that the tasks are not.
FROZEN: dict[str, tuple[Callable[[nn.Module], object], bool]] = {
    "A, B and the model's cores": (lambda model: model.train(), True),
    "A": (lambda model: train_only(model, "A"), True),
    "B": (lambda model: train_only(model, "B"), True),
    "the model's cores": (lambda model: train_only(model, "core"), False),
    "A, B and tasks": (lambda model: model.train().lotr_tasks.requires_grad_(), False),
    "tasks": (trained_tasks, False),
    "one layer of tasks": (lambda model: model.train().lotr_tasks.cores[1].requires_grad_(), False),
    "in eval mode": (lambda model: model.eval(), False),
}


def train_only(model: nn.Module, part: str) -> None:
    model.train()
    for layer in adapted_layers(model).values():
        layer.set_trained([part])


@pytest.mark.parametrize("trained_parts", FROZEN)
def test_tasks_that_are_frozen_while_factors_train_are_noticed(
    model: nn.Module, trained_parts: str
) -> None:
    prepare, expected = FROZEN[trained_parts]
    prepare(model)

    def call() -> None:
        with use_tasks(model, INDEX):
            pass

    assert bool(warnings_of(call)) == expected
    with torch.no_grad():
        assert not warnings_of(call)


def test_an_optimizer_of_tasks_that_no_forward_used_is_noticed_once(model: nn.Module) -> None:
    """The model's adapter trains, and the bank idles."""
    x = zoo.inputs("mlp")
    model.lotr_tasks.requires_grad_()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    assert not warnings_of(optimizer.step)  # without a backward
    zoo.output(model, x).square().mean().backward()
    assert len(warnings_of(optimizer.step)) == 1
    assert not warnings_of(optimizer.step)


@pytest.mark.parametrize("forgotten_at_first", [False, True])
def test_an_optimizer_of_tasks_that_a_forward_used_is_silent(
    x: Tensor, model: nn.Module, forgotten_at_first: bool
) -> None:
    bank = model.lotr_tasks.requires_grad_()
    optimizer = torch.optim.SGD([*bank.parameters(), *adapter_parameters(model)], lr=0.1)
    if forgotten_at_first:  # for the model's cores, with another optimizer
        zoo.output(model, x).square().mean().backward()
        assert not warnings_of(torch.optim.SGD(adapter_parameters(model), lr=0.1).step)
    output(model, x).square().mean().backward()
    assert not warnings_of(optimizer.step)


@pytest.mark.parametrize("checkpoints", [None, False, True], ids=["plain", "kept", "reentrant"])
def test_the_trainer_of_transformers_trains_tasks(checkpoints: bool | None, tmp_path: Path) -> None:
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
    logits = rows_by_bank(model, x)[:, :-1].flatten(0, 1)
    loss = nn.functional.cross_entropy(logits, x[:, 1:].flatten())
    gradients = torch.autograd.grad(loss, [*bank.cores])
    expected = [core.detach() - gradient for core, gradient in zip(bank.cores, gradients)]

    arguments = {
        "per_device_train_batch_size": 4,
        "max_steps": 1,
        "remove_unused_columns": False,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "disable_tqdm": True,
        "gradient_checkpointing": checkpoints is not None,
        "gradient_checkpointing_kwargs": {"use_reentrant": bool(checkpoints)},
    }
    model.enable_input_require_grads()
    data = [{"input_ids": row, "labels": row, "task": task} for row, task in zip(x, INDEX.tolist())]
    trainer = TaskTrainer(
        model,
        TrainingArguments(str(tmp_path), **arguments),
        train_dataset=data,
        eval_dataset=data,
        optimizers=(torch.optim.SGD(bank.parameters(), lr=1.0), None),
    )
    trainer.train()
    assert worst([*bank.cores], expected) < 1e-5
    with torch.no_grad(), use_tasks(model.eval(), INDEX):
        loss = model(x, labels=x).loss.item()
    assert abs(trainer.evaluate()["eval_loss"] - loss) < 1e-4


# ---- slots ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["shape", "layer"])
def test_slots_are_added_replaced_and_removed(way: str, tmp_path: Path) -> None:
    model = trained("mlp", way)
    x = zoo.inputs("mlp", rows=2)
    bank = TaskBank(model, 2)
    assert not any(parameter.requires_grad for parameter in bank.cores)
    assert bank.add() == 0  # a task starts at zero, as the base model
    assert relative(output(model, x, torch.tensor([0, -1])), output_of_task(model, -1, x)) < 1e-6
    cores = {f"{n}.core": layer.core for n, layer in adapted_layers(model).items()}
    assert bank.add(cores) == 1
    assert relative(output(model, x, torch.tensor([1, 1])), zoo.output(model, x)) < 1e-6
    with pytest.raises(RuntimeError, match="free slot"):
        bank.add()
    bank.save(1, tmp_path / "one.safetensors")
    saved = load_file(tmp_path / "one.safetensors")
    assert {name: tuple(core.shape) for name, core in saved.items()} == dict.fromkeys(cores, (3, 3))
    bank.remove(1)
    assert len(bank) == 1
    assert not any(bool(parameter[1].any()) for parameter in bank.cores)
    bank.replace(0, tmp_path / "one.safetensors")
    assert all(torch.equal(bank.cores_of(0)[n], t) for n, t in cores.items())
    bank.add(tmp_path / "one.safetensors")
    assert len(bank) == 2


def test_a_reused_slot_has_no_gradient_of_its_last_task() -> None:
    model = banked("mlp", tasks=2, taken=2)
    x = zoo.inputs("mlp", rows=2)
    bank = model.lotr_tasks.requires_grad_()
    output(model, x, torch.tensor([0, 1])).square().sum().backward()
    assert all(bool(core.grad[0].any() and core.grad[1].any()) for core in bank.cores)
    bank.remove(0)
    bank.add()
    assert not any(bool(core.grad[0].any()) for core in bank.cores)
    assert all(bool(core.grad[1].any()) for core in bank.cores)


def test_a_changed_task_makes_an_older_backward_raise(x: Tensor, model: nn.Module) -> None:
    y = output(model, x)
    model.lotr_tasks.remove(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_files_of_other_factors_scalings_and_kinds_are_refused(tmp_path: Path) -> None:
    model = banked("attention")
    path = tmp_path / "task.safetensors"
    wrong = tmp_path / "wrong.safetensors"
    model.lotr_tasks.save(0, path)
    again = banked("attention")
    again.lotr_tasks.replace(1, path)  # the same factors: `trained` is deterministic
    for other, reason in (
        (banked("attention", scaling=2.0), "scaling"),
        (banked("attention", seed=3), "made for other A and B"),
        (banked("attention", rank=2), "ranks"),
        (banked("attention", rank=2, scaling=2.0), "ranks"),
        (banked("mlp"), "missing"),
    ):
        with pytest.raises(ValueError, match=f"expected .*{reason}"):
            other.lotr_tasks.add(path)
    tensors = load_file(path)
    for metadata in (None, {"format": "pt"}, {"format": "lotr_task", "version": "9"}):
        save_file(tensors, wrong, metadata)
        with pytest.raises(ValueError, match="source: expected"):
            again.lotr_tasks.add(wrong)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="source: expected a safetensors file"):
        again.lotr_tasks.add(path)
    for shape in ((1, 1), (3,)):
        with pytest.raises(ValueError, match="core: expected"):
            again.lotr_tasks.add(dict.fromkeys(tensors, torch.zeros(shape)))


def test_threads_add_and_remove_tasks() -> None:
    """Each task gets another slot, and no core is of two tasks."""
    bank = banked("mlp", tasks=40, taken=1).lotr_tasks
    names = list(bank.cores_of(0))
    bank.remove(0)

    def run(number: int) -> dict[int, float]:
        value_of_slot = {}
        for i in range(10):
            core = torch.full((3, 3), 100.0 * number + i)
            value_of_slot[bank.add(dict.fromkeys(names, core))] = 100.0 * number + i
        removed, _ = value_of_slot.popitem()
        bank.remove(removed)
        return value_of_slot

    with ThreadPoolExecutor(4) as pool:
        slots = [item for of_thread in pool.map(run, range(4)) for item in of_thread.items()]
    assert len(bank) == len(dict(slots)) == 36
    for slot, value in slots:
        assert all(bool((core == value).all()) for core in bank.cores_of(slot).values())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_cores_of_another_dtype_are_cast(dtype: torch.dtype) -> None:
    bank = banked("mlp").lotr_tasks
    cores = {name: core.to(dtype) for name, core in bank.cores_of(0).items()}
    for name, core in bank.cores_of(bank.add(cores)).items():
        assert torch.equal(core, cores[name].to(core.dtype))


def test_meta_as_the_default_device_changes_nothing(x: Tensor) -> None:
    model = trained("mlp")
    with torch.device("meta"):
        with_bank(model, tasks=4, taken=0)
    assert not model.lotr_tasks.taken.is_meta and not model.lotr_tasks.cores[0].is_meta
    for _ in range(3):
        model.lotr_tasks.add()
    expected = rows(model, x)
    with torch.device("meta"):
        y = output(model, x, INDEX_PER_TOKEN)
    assert relative(y, expected) < 1e-5


BAD_VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "meta": lambda core: core.to("meta"),
    "sparse": lambda core: core.to_sparse(),
    "integers": lambda core: core.int(),
    "complex": lambda core: core.to(torch.complex64),
}


@pytest.mark.parametrize("kind", BAD_VALUES)
@pytest.mark.parametrize("write", ["add", "replace"])
def test_a_core_without_values_of_its_kind_changes_nothing(
    model: nn.Module, write: str, kind: str
) -> None:
    bank = model.lotr_tasks
    cores = {name: core.clone() for name, core in bank.cores_of(0).items()}
    last = list(cores)[-1]
    cores[last] = BAD_VALUES[kind](cores[last])
    with unchanged(model), pytest.raises((TypeError, RuntimeError)):  # torch's own
        bank.add(cores) if write == "add" else bank.replace(1, cores)


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
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_a_batch_may_be_empty(model: nn.Module) -> None:
    assert output(model, torch.randn(0, 5, 16), INDEX[:0]).shape == (0, 5, 3)


def test_the_file_of_a_task_fits_groups_in_any_order(tmp_path: Path) -> None:
    """The checksum is of the factors by the names of their groups."""
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
    base_output = output_of_task(layer, -1, x)
    assert relative(y[1], base_output[1]) < 1e-6 < relative(y[0], base_output[0])
