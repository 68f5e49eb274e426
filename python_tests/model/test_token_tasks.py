"""A task a token: `mixed` and the functions against plain torch, beside experts, in generation with a cache, and bad input."""

from __future__ import annotations

import copy

import pytest
import torch
from mixtures import IDS, adapted
from torch import Tensor, nn
from torch.nn import functional as nnf
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, MiniMaxConfig, MiniMaxForCausalLM

from lotr_ext import LoTRConfig, TaskBank, activated, apply_lotr, disabled, lotr_grouped_linear, lotr_linear, mixed
from nets import relative

B, T, TASKS = 3, 7, 3
INDEX = torch.tensor([[-1, -1, 2, 2, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1], [-1, 0, -1, 1, -1, 2, -1]])


def fill(bank: TaskBank) -> None:
    draw = torch.Generator().manual_seed(5)
    for _ in range(TASKS):
        for core in bank.cores_of(bank.add()).values():
            core.copy_(torch.randn(core.shape, generator=draw, dtype=torch.float64) * 0.5)


def llama(dtype: torch.dtype = torch.float64, **settings) -> tuple[nn.Module, TaskBank]:
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, max_position_embeddings=64, **settings)).eval()
    apply_lotr(model, LoTRConfig(rank=(4, 3), scaling=1.0, target_modules="all-linear", adapter_dtype=dtype))
    bank = TaskBank(model.to(dtype), TASKS)
    fill(bank)
    return model, bank


def written_out(model: nn.Module, bank: TaskBank, index: Tensor) -> nn.Module:
    """A copy without adapted layers: each is a function of plain torch that takes all tokens of the index."""
    layers = {name.removesuffix(".core"): i for i, name in enumerate(bank.cores_of(0))}
    plain = copy.deepcopy(model)
    for name, i in layers.items():
        layer, core = plain.get_submodule(name), bank.cores[i]
        A, B, table = layer.factors.A, layer.factors.B, torch.cat((core, torch.zeros_like(core[:1])))  # -1 takes the last

        def forward(x: Tensor, layer=layer, A=A, B=B, table=table) -> Tensor:
            h = ((x @ A).unsqueeze(-2) @ table[index]).squeeze(-2)
            return nnf.linear(x, layer.weight, layer.bias) + layer.scaling * h @ B.T

        layer.forward = forward
    return plain


def test_each_token_goes_through_its_task(either_path) -> None:
    model, bank = llama()
    with torch.no_grad():
        want = written_out(model, bank, INDEX)(IDS).logits
        with mixed(model, INDEX):
            assert relative(model(IDS).logits, want) < 1e-12
        with mixed(model, INDEX[:, :1].expand(B, T)):
            by_token = model(IDS).logits
        with mixed(model, INDEX[:, 0]):
            assert torch.equal(model(IDS).logits, by_token)  # a row's task, said once or for each token
        with mixed(model, torch.full((B, T), -1)):
            none = model(IDS).logits
        with disabled(model):
            assert torch.equal(model(IDS).logits, none)  # no task: the base model's bits
    assert relative(by_token, want) > 0.01


@pytest.mark.parametrize("checkpointing", [None, True, False])
def test_gradients_of_tasks_by_token(either_path, checkpointing: bool | None) -> None:
    """Of every task, of A and of B, against plain torch. checkpointing: use_reentrant."""
    model, bank = llama()
    bank.requires_grad_()
    plain = written_out(model, bank, INDEX)
    trained = [*bank.cores, *model.lotr_factors.parameters()]
    chosen = torch.randn(B, T, 61, dtype=torch.float64)
    loss = (plain(IDS).logits * chosen).sum()
    want = torch.autograd.grad(loss, [*bank.cores, *plain.lotr_factors.parameters()])
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
        model.train()
    with mixed(model, INDEX):
        loss = (model(IDS).logits * chosen).sum()
    loss.backward()
    for parameter, true in zip(trained, want, strict=True):
        assert relative(parameter.grad, true) < 1e-10


@pytest.mark.parametrize("name", ["Mixtral", "Qwen2Moe"])
def test_experts_take_the_task_of_each_token(either_path, name: str) -> None:
    """A token's output depends on the tokens before it alone: so with one task from each place on, it is checked by steps."""
    model = adapted(name, torch.float64, target_modules="all-linear" if name == "Qwen2Moe" else ["q_proj", "v_proj"])
    bank = TaskBank(model, TASKS)
    fill(bank)
    with torch.no_grad(), mixed(model, INDEX):
        got = model(IDS).logits
    cache, steps = DynamicCache(config=model.config), []
    with torch.no_grad():
        for j in range(T):
            with mixed(model, INDEX[:, j]):  # one task a row, for this token of it
                steps.append(model(IDS[:, j : j + 1], past_key_values=cache).logits)
    assert relative(got, torch.cat(steps, 1)) < 1e-12
    with torch.no_grad(), mixed(model, INDEX[:, 0]):
        assert relative(model(IDS).logits, got) > 0.01


# ---- generation ------------------------------------------------------------------------------------------------------

INVOCATION = [7, 9]
PROMPTS = torch.tensor([[3, 7, 9, 4, 5, 7, 9, 8], [11, 12, 7, 9, 13, 7, 14, 15], [20, 21, 22, 23, 24, 25, 26, 7]])
ROWS = torch.tensor([2, 0, 1])
STARTS = (5, 2, None)  # the last invocation; none in the last row
SETTINGS = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
LOGITS = SETTINGS | {"output_logits": True, "return_dict_in_generate": True}
EPSILON = {torch.float64: 1e-6, torch.float32: 1e-4}  # generate rounds its logits to float32


def test_activated_begins_at_the_last_invocation() -> None:
    index = activated(PROMPTS, ROWS, INVOCATION)
    for row, start, task in zip(index.tolist(), STARTS, ROWS.tolist(), strict=True):
        assert row == [-1] * 8 if start is None else row == [-1] * start + [task] * (8 - start)
    one = activated(PROMPTS, 1, INVOCATION)
    assert torch.equal(one, torch.where(index == -1, -1, 1))
    own = activated(PROMPTS, ROWS, {2: [7, 9, 4], 0: [13], 1: [26, 7]})
    assert own.tolist() == [[-1] + [2] * 7, [-1] * 4 + [0] * 4, [-1] * 6 + [1] * 2]
    assert activated(PROMPTS, torch.tensor([2, -1, 1]), INVOCATION)[1].tolist() == [-1] * 8
    assert activated(PROMPTS[:, :1], ROWS, INVOCATION).tolist() == [[-1]] * 3  # shorter than the invocation
    assert activated(PROMPTS[:0], ROWS[:0], INVOCATION).shape == (0, 8)


def uncached(model: nn.Module, ids: Tensor, index: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Tokens and logits of greedy generation that runs each step over the whole row."""
    found = []
    for _ in range(steps):
        with mixed(model, index):
            found.append(model(ids, use_cache=False).logits[:, -1])
        ids, index = torch.cat((ids, found[-1].argmax(-1, keepdim=True)), 1), torch.cat((index, index[:, -1:]), 1)
    return ids, torch.stack(found)


def check_generation_with_a_cache(model: nn.Module, dtype: torch.dtype) -> None:
    index = activated(PROMPTS, ROWS, INVOCATION)
    with torch.no_grad():
        want, logits = uncached(model, PROMPTS, index, 6)
        with mixed(model, index):
            got = model.generate(PROMPTS, **LOGITS)
    assert torch.equal(got.sequences, want) and relative(torch.stack(got.logits), logits) < EPSILON[dtype]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_generation_with_a_cache_is_that_without(dtype: torch.dtype) -> None:
    model, _ = llama(dtype)
    index = activated(PROMPTS, ROWS, INVOCATION)
    with torch.no_grad():
        want, logits = uncached(model, PROMPTS, index, 6)
        with mixed(model, index):
            got = model.generate(PROMPTS, **LOGITS)
            chunks = model.generate(PROMPTS, **LOGITS, prefill_chunk_size=3)
            static = model.generate(PROMPTS, **LOGITS, cache_implementation="static", disable_compile=True)
        with mixed(model, ROWS):
            other = model.generate(PROMPTS, **LOGITS)
    for run in (got, chunks, static):
        assert torch.equal(run.sequences, want) and relative(torch.stack(run.logits), logits) < EPSILON[dtype]
    assert relative(torch.stack(other.logits), logits) > 0.01


def test_a_cache_whose_first_layer_keeps_no_tokens() -> None:
    """MiniMax's cache says that it is empty: layer 0 has linear attention, whose state has no length."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    kinds = ["linear_attention", "full_attention"]
    config = MiniMaxConfig(**sizes, num_key_value_heads=2, head_dim=8, num_local_experts=2, layer_types=kinds)
    model = apply_lotr(MiniMaxForCausalLM(config).eval(), LoTRConfig(rank=4, target_modules=["q_proj", "v_proj"]))
    fill(TaskBank(model, TASKS))
    check_generation_with_a_cache(model, torch.float32)


def test_steps_of_several_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guesses of the next tokens run beside the prompt or the last token, and go out of the cache where they are wrong."""
    model, _ = llama()
    ids, steps, forward = PROMPTS[:1, :7], [], model.forward
    index = activated(ids, 2, INVOCATION)
    with torch.no_grad():
        want, _ = uncached(model, ids, index, 6)
    monkeypatch.setattr(model, "forward", lambda *args, **kw: steps.append(kw["input_ids"].shape[1]) or forward(*args, **kw))
    with mixed(model, index):
        got = model.generate(ids, **SETTINGS, prompt_lookup_num_tokens=2)
    assert torch.equal(got, want) and steps[0] > ids.shape[1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_base_models_cache_serves_an_activated_task(dtype: torch.dtype) -> None:
    """Bit for bit: the cache of the tokens before the invocation, and all that follows from it."""
    model, _ = llama(dtype)
    ids, start = PROMPTS[:1], STARTS[0]
    index, caches, results = activated(ids, 2, INVOCATION), [], []
    for by_base in (True, False):
        cache = DynamicCache(config=model.config)
        with torch.no_grad(), disabled(model) if by_base else mixed(model, index):
            model(ids[:, :start], past_key_values=cache)
        caches.append([t.clone() for layer in cache.layers for t in (layer.keys, layer.values)])
        with mixed(model, index):
            results.append(model.generate(ids, past_key_values=cache, **LOGITS))
    assert all(torch.equal(a, b) for a, b in zip(*caches, strict=True)) and len(caches[0]) == 4
    one, other = results
    assert torch.equal(one.sequences, other.sequences) and torch.equal(torch.stack(one.logits), torch.stack(other.logits))
    with torch.no_grad():
        want, logits = uncached(model, ids, index, 6)
    assert torch.equal(one.sequences, want)
    assert relative(torch.stack(one.logits), logits) < EPSILON[dtype]


def test_one_cache_of_the_base_serves_several_tasks_at_once() -> None:
    """A document is read once by the base; each task then goes on from a copy of its cache, in one batch."""
    model, _ = llama()
    document, question = PROMPTS[:1, :5], torch.tensor([[7, 9]])
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), disabled(model):
        model(document, past_key_values=cache)
    cache.batch_repeat_interleave(3)
    ids = torch.cat((document, question), 1).expand(3, -1)
    with mixed(model, activated(ids, torch.tensor([0, 1, 2]), INVOCATION)):
        together = model.generate(ids, past_key_values=cache, **LOGITS)
    for task in range(3):
        with torch.no_grad():
            want, logits = uncached(model, ids[:1], activated(ids[:1], task, INVOCATION), 6)
        assert torch.equal(together.sequences[task], want[0])
        assert relative(torch.stack(together.logits)[:, task], logits[:, 0]) < EPSILON[torch.float64]


def test_left_padding_and_beams() -> None:
    """Columns of the index are those of input_ids, padding too; beams have the rows' index repeated."""
    model, _ = llama()
    ids, mask = torch.cat((torch.zeros(3, 2).long(), PROMPTS), 1), torch.ones(3, 10).long()
    mask[:, :2] = 0
    with mixed(model, activated(PROMPTS, ROWS, INVOCATION)):
        want = model.generate(PROMPTS, **SETTINGS)
    with mixed(model, activated(ids, ROWS, INVOCATION)):
        assert torch.equal(model.generate(ids, attention_mask=mask, **SETTINGS)[:, 2:], want)
    index = activated(PROMPTS, ROWS, INVOCATION)
    with mixed(model, index.repeat_interleave(2, 0)):
        together = model.generate(PROMPTS, num_beams=2, **SETTINGS)
    with mixed(model, index[:1].repeat_interleave(2, 0)):
        assert torch.equal(model.generate(PROMPTS[:1], num_beams=2, **SETTINGS)[0], together[0])


def test_experts_generate_by_token_with_a_cache() -> None:
    model = adapted("Mixtral", torch.float64, target_modules=["q_proj", "v_proj"])
    fill(TaskBank(model, TASKS))
    check_generation_with_a_cache(model, torch.float64)


# ---- functions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(5,), (5, 3), (5, 0), (0, 3)], ids=str)
def test_lotr_linear_by_row_or_token(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    x, W, A, B, core = (torch.randn(*s, dtype=dtype) for s in ((*shape[:1], 3, 12), (7, 12), (12, 4), (7, 2), (3, 4, 2)))
    x, index = x[:, : shape[1]] if len(shape) > 1 else x, torch.randint(-1, 3, shape)
    given = [t.requires_grad_(t is not W) for t in (x, W, A, B, core)]
    y = lotr_linear(x, W, None, A, B, core, 0.5, core_index=index)
    y.double().sin().sum().backward()
    x, W, A, B, core = (t.detach().double().requires_grad_() for t in given)
    each = torch.cat((core, torch.zeros_like(core[:1])))[index.view(*shape, *[1] * (2 - len(shape)))]
    want = x @ W.T + 0.5 * ((x @ A).unsqueeze(-2) @ each).squeeze(-2) @ B.T
    want.sin().sum().backward()
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.2}[dtype]
    for got, true in (
        (y, want),
        *((g.grad, t.grad) for g, t in zip(given, (x, W, A, B, core), strict=True) if g.requires_grad),
    ):
        torch.testing.assert_close(got.double(), true, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("by_token", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_lotr_grouped_linear_takes_tasks(either_path, by_token: bool, padded: bool) -> None:
    torch.manual_seed(2)
    m, e, end = 6, 3, 8 if padded else 10  # rows from `end` on are of no expert
    W, A, B, cores = (torch.randn(*s, dtype=torch.float64) for s in ((e, 7, 12), (12, 4), (7, 2), (2, e, 4, 2)))
    offs = torch.tensor([3, 3, end], dtype=torch.int32)
    tokens = torch.randint(0, m, (10,)) if by_token else None
    x = torch.randn(m if by_token else 10, 12, dtype=torch.float64)
    tasks = torch.randint(-1, 2, x.shape[:1])
    trained = [t.requires_grad_() for t in (x, A, B, cores)]
    y = lotr_grouped_linear(x, W, offs, A, B, cores, 0.5, tokens=tokens, core_index=tasks)
    rows = []
    for i in range(10):
        t, c = int(tokens[i]) if by_token else i, int((offs <= i).sum())
        row = x.new_zeros(7) if c == e else x[t] @ W[c].T
        if c < e and tasks[t] >= 0:
            row = row + 0.5 * x[t] @ A @ cores[tasks[t], c] @ B.T
        rows.append(row)
    want = torch.stack(rows)
    assert relative(y, want) < 1e-12
    chosen = torch.randn_like(y)
    for got, true in zip(*(torch.autograd.grad((one * chosen).sum(), trained) for one in (y, want)), strict=True):
        assert relative(got, true) < 1e-12


# ---- refused ---------------------------------------------------------------------------------------------------------


class Pooled(nn.Module):
    """A pooler on the first token, a layer on a list of all rows' tokens, and one whose tokens are cut."""

    def __init__(self, which: str) -> None:
        super().__init__()
        self.which, self.layer = which, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer({"pool": x[:, 0], "flat": x.flatten(0, 1), "cut": x[:, :2], "more": x.unsqueeze(1)}[self.which])


@pytest.mark.parametrize("which", ["pool", "flat", "cut", "more"])
def test_layers_with_other_tokens_are_refused(which: str) -> None:
    model = apply_lotr(Pooled(which), LoTRConfig(rank=2, target_modules=["layer"]))
    TaskBank(model, 1).add()
    shape = {
        "pool": r"\[2, tokens, k\] .* got \(2, 4\)",
        "flat": r"\[2, tokens, k\] .* got \(6, 4\)",
        "cut": "3 tokens per row.*got 2",
    }
    shape["more"] = r"got \(2, 1, 3, 4\)"
    with mixed(model, torch.zeros(2, 3, dtype=torch.int64)), pytest.raises(ValueError, match=f"x: expected .*{shape[which]}"):
        model(torch.zeros(2, 3, 4))


def test_bad_input() -> None:
    model, _ = llama(torch.float32)
    cache = DynamicCache(config=model.config)
    cases = [
        (TypeError, "index of tasks, got torch.int32", lambda: run(INDEX.int())),
        (ValueError, r"got shape \(3, 7, 1\)", lambda: run(INDEX[..., None])),
        (ValueError, r"got shape \(3, 0\)", lambda: run(INDEX[:, :0])),
        (ValueError, r"expected tasks in \[-1, 3\), got -1 to 3", lambda: run(INDEX.masked_fill(INDEX == 2, 3))),
        (ValueError, r"x: expected shape \[2, tokens, k\].*got \(3, 7, 32\)", lambda: run(INDEX[:2])),
        (ValueError, "x: expected 6 tokens per row, as in the index of tasks, got 7", lambda: run(INDEX[:, :6])),
        (ValueError, "x: expected 7 tokens per row, as in the index of tasks, got 8", lambda: run(INDEX, PROMPTS)),
        (TypeError, "core_index: expected an int64 tensor, got torch.int32", lambda: linear(INDEX.int())),
        (ValueError, r"per token of x \(3, 7, 5\), got shape \(3, 6\)", lambda: linear(INDEX[:, :6])),
        (ValueError, r"per token of x \(3, 7, 5\), got shape \(3, 7, 1\)", lambda: linear(INDEX[..., None])),
        (ValueError, r"core_index: expected indices in \[-1, 2\), got -1 to 2", lambda: linear(INDEX, tasks=2)),
        (TypeError, "input_ids: expected a tensor of integers, got torch.float32", lambda: activated(IDS.float(), 0, [1])),
        (ValueError, r"input_ids: expected shape \[b, t\], got \(7,\)", lambda: activated(IDS[0], 0, [1])),
        (TypeError, "tasks: expected an int or an int64 tensor, got torch.int32", lambda: activated(IDS, ROWS.int(), [1])),
        (ValueError, r"tasks: expected one per row, shape \(3,\), got \(2,\)", lambda: activated(IDS, ROWS[:2], [1])),
        (TypeError, "invocation: expected a sequence of token ids, got str", lambda: activated(IDS, 0, "go")),
        (ValueError, "invocation: expected at least one token", lambda: activated(IDS, 0, [])),
        (ValueError, "invocation: expected one for each task, got none for 1", lambda: activated(IDS, ROWS, {0: [1], 2: [3]})),
    ]

    def run(index: Tensor, ids: Tensor = IDS) -> None:
        with mixed(model, index):
            model(ids)

    def linear(index: Tensor, tasks: int = 3) -> None:
        x, W, A, B = torch.zeros(3, 7, 5), torch.zeros(6, 5), torch.zeros(5, 2), torch.zeros(6, 2)
        lotr_linear(x, W, None, A, B, torch.zeros(tasks, 2, 2), 1.0, core_index=index)

    for kind, message, call in cases:
        with pytest.raises(kind, match=message):
            call()
    with torch.no_grad(), mixed(model, INDEX):  # layers on which the cache's tokens are not those of the model
        model.model.layers[0].mlp.gate_proj.register_forward_pre_hook(lambda module, args: (args[0][:, -1:],))
        with pytest.raises(ValueError, match="x: expected the 7 tokens per row that the model was called with, got 1"):
            model(IDS, past_key_values=cache)
    model.config.is_encoder_decoder = True
    with pytest.raises(ValueError, match=r"an encoder and a decoder, whose tokens differ, got shape \(3, 7\)"):
        run(INDEX)
