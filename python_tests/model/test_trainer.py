"""transformers' Trainer and accelerate on adapted models of five kinds: train, stop, resume, as if never stopped."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny_models
import torch
from tiny_models import transformers
from torch import Tensor, nn
from toys import IDS as TOY_IDS
from toys import adapted, loss, randomize

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*", "ignore:.*torch.jit.*")

from lotr_ext import LoTRConfig, apply_lotr, disabled, load_adapter, merge, save_adapter, unload, unmerge  # noqa: E402
from lotr_ext.interop.trainer import AdapterCheckpoint, AdapterTrainer  # noqa: E402
from lotr_ext.model.adapted import adapted_layers, lotr_parameters  # noqa: E402

ADAPTER = {"rank": 4, "alpha": 8.0, "dropout": 0.1}
Make = Callable[[], nn.Module]


def classified(kind: str, **settings) -> Make:
    """An encoder with LoTR and a trained head."""
    config = LoTRConfig(**{**ADAPTER, "target_modules": ["query", "value"], "modules_to_save": ["classifier"], **settings})
    return lambda: apply_lotr(getattr(tiny_models, kind)(), config)


def gpt2() -> nn.Module:
    return apply_lotr(tiny_models.gpt2(), LoTRConfig(**ADAPTER, target_modules=["c_attn", "c_proj"]))


def llama() -> nn.Module:
    return apply_lotr(tiny_models.llama(), LoTRConfig(**ADAPTER, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))


bert, roberta = classified("bert"), classified("roberta")
vit = classified("vit", target_modules="all-linear", exclude_modules=["classifier"])


class Examples(torch.utils.data.Dataset):
    """24 examples that can be learnt: the class of the first token or of the mean pixel, or the text itself."""

    def __init__(self, kind: str):
        generator = torch.Generator().manual_seed(0)
        if kind == "pixels":
            x = torch.randn(24, 1, 8, 8, generator=generator) + torch.arange(24)[:, None, None, None] % 3 - 1
            self.rows = [{"pixel_values": x[i], "labels": i % 3} for i in range(24)]
        else:
            ids = torch.randint(3, 67, (24, 10), generator=generator)
            ids[:, 0] = 10 + torch.arange(24) % 3
            self.rows = [{"input_ids": ids[i], "labels": ids[i] if kind == "text" else i % 3} for i in range(24)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict:
        return self.rows[i]


REENTRANT, NON_REENTRANT = (
    {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": r}} for r in (True, False)
)
RUNS: dict[str, tuple[Make, str, dict]] = {
    "bert": (bert, "class", {"bf16": True}),
    "roberta": (roberta, "class", {"gradient_accumulation_steps": 2}),
    "gpt2, non-reentrant checkpointing": (gpt2, "text", NON_REENTRANT),
    "llama, reentrant checkpointing, bf16": (llama, "text", {**REENTRANT, "bf16": True}),
    "vit": (vit, "pixels", {}),
}


def trainer(
    make: Make,
    kind: str,
    folder: Path,
    callback: transformers.TrainerCallback | None = None,
    cls: type[transformers.Trainer] = transformers.Trainer,
    **options,
) -> transformers.Trainer:
    transformers.set_seed(0)
    model = make()
    if options.get("gradient_checkpointing"):
        model.enable_input_require_grads()
    quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False}
    pace = {"max_steps": 6, "save_steps": 3, "logging_steps": 1, "per_device_train_batch_size": 4, "learning_rate": 2e-2}
    arguments = transformers.TrainingArguments(str(folder), **quiet, **pace, **options)
    callbacks = [] if callback is None else [callback]
    return cls(model, arguments, train_dataset=Examples(kind), eval_dataset=Examples(kind), callbacks=callbacks)


def losses(of: transformers.Trainer) -> list[float]:
    return [entry["loss"] for entry in of.state.log_history if "loss" in entry]


@pytest.mark.parametrize("name", RUNS)
def test_trainer_resumes_to_the_same_losses(name: str, tmp_path: Path) -> None:
    make, kind, options = RUNS[name]
    if name == "vit":  # the names in Trainer's checkpoints are not those of the modules
        options = {"callback": AdapterCheckpoint()}
    whole = trainer(make, kind, tmp_path, **options)
    whole.train()
    curve = losses(whole)
    assert len(curve) == 6 and min(curve[3:]) < curve[0]
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6"]

    again = trainer(make, kind, tmp_path, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert losses(again) == curve
    want = dict(whole.model.named_parameters())
    assert all(torch.equal(p, want[n]) for n, p in again.model.named_parameters())
    frozen = dict(make_again(make).named_parameters())
    for n, p in again.model.named_parameters():
        assert torch.equal(p, frozen[n]) != p.requires_grad, n  # what is trained moved, and nothing else did


@pytest.mark.parametrize("name", RUNS)
def test_checkpoints_of_the_adapter_alone_resume_to_the_same_losses(name: str, tmp_path: Path) -> None:
    make, kind, options = RUNS[name]
    whole = trainer(make, kind, tmp_path, cls=AdapterTrainer, **options)
    whole.train()
    curve = losses(whole)
    checkpoint = tmp_path / "checkpoint-3"
    base = sum(p.nbytes for p in whole.model.parameters() if not p.requires_grad)
    assert not list(checkpoint.glob("*model*")) and sum(p.stat().st_size for p in checkpoint.glob("*.safetensors")) < base
    again = trainer(make, kind, tmp_path / "again", cls=AdapterTrainer, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="lotr_ext")
        again.train(resume_from_checkpoint=str(checkpoint))
    assert losses(again) == curve
    want = whole.model.state_dict()
    assert all(torch.equal(value, want[n]) for n, value in again.model.state_dict().items())
    loaded = load_adapter(unload(make_again(make), merge=False), tmp_path / "checkpoint-6")
    assert all(torch.equal(value, want[n]) for n, value in loaded.state_dict().items())


class Normed(nn.Module):
    """With statistics that move, a parameter that is trained beside the adapter, and tied to another name."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Linear(16, 3)
        self.scale = nn.Parameter(torch.ones(16))
        self.tied = nn.ParameterList([self.scale])

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.norm(self.first(pixel_values.flatten(1))) * self.scale)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def normed() -> nn.Module:
    model = apply_lotr(Normed(), LoTRConfig(rank=2, target_modules=["first"], modules_to_save=["head"]))
    model.scale.requires_grad_(True)
    return model


def test_an_adapter_checkpoint_has_all_else_that_training_changes(tmp_path: Path) -> None:
    whole = trainer(normed, "pixels", tmp_path, cls=AdapterTrainer)
    whole.train()
    again = trainer(normed, "pixels", tmp_path, cls=AdapterTrainer)
    (tmp_path / "checkpoint-6").rename(tmp_path / "last")
    again.train(resume_from_checkpoint=True)  # from checkpoint-3
    assert losses(again) == losses(whole) and losses(whole)[3:] != losses(whole)[:3]
    want = whole.model.state_dict()
    assert all(torch.equal(value, want[n]) for n, value in again.model.state_dict().items())
    assert not torch.equal(want["scale"], torch.ones(16)) and int(want["norm.num_batches_tracked"]) == 6

    def frozen() -> nn.Module:
        model = normed()
        model.scale.requires_grad_(False)
        return model

    other = trainer(frozen, "pixels", tmp_path / "other", cls=AdapterTrainer)
    before = [p.detach().clone() for p in other.model.parameters()]
    with pytest.raises(ValueError, match=r"expected the model's trained parameters .* got others at scale"):
        other.train(resume_from_checkpoint=str(tmp_path / "last"))
    assert all(torch.equal(p, q) for p, q in zip(before, other.model.parameters()))


def test_the_best_adapter_comes_back_and_whole_checkpoints_resume(tmp_path: Path) -> None:
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 3, "metric_for_best_model": "eval_loss"}
    done = trainer(normed, "pixels", tmp_path / "best", cls=AdapterTrainer, **best, greater_is_better=True)
    done.train()
    assert done.state.best_model_checkpoint.endswith("checkpoint-3")
    state = done.model.state_dict()
    assert int(state["norm.num_batches_tracked"]) == 3
    saved = load_adapter(make_again(normed), tmp_path / "best" / "checkpoint-3").state_dict()
    assert all(torch.equal(value, state[n]) for n, value in saved.items() if n.startswith(("lotr_", "first", "head")))
    whole = trainer(bert, "class", tmp_path / "whole")
    whole.train()
    again = trainer(bert, "class", tmp_path / "again", cls=AdapterTrainer)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert losses(again) == losses(whole)
    again.save_model(str(tmp_path / "last"))
    assert sorted(p.name.split(".")[0] for p in (tmp_path / "last").iterdir()) == [
        "lotr_adapter",
        "lotr_adapter",
        "lotr_rest",
        "training_args",
    ]


def test_what_is_pushed_during_training_has_the_adapter(tmp_path: Path, monkeypatch) -> None:
    one, pushed = trainer(normed, "pixels", tmp_path, cls=AdapterTrainer), []

    def push(self: transformers.Trainer, folder: str) -> None:  # which uploads output_dir but for the checkpoints in it
        pushed.append((dict(self.model.state_dict()), load_adapter(make_again(normed), tmp_path).state_dict()))

    monkeypatch.setattr(transformers.Trainer, "_push_from_checkpoint", push)
    one.train()
    one._push_from_checkpoint(str(tmp_path / "checkpoint-6"))
    ((want, got),) = pushed
    assert all(torch.equal(got[name], want[name]) for name in got if name.startswith(("lotr_", "first", "head")))
    assert (tmp_path / "lotr_rest.safetensors").read_bytes() == (tmp_path / "checkpoint-6/lotr_rest.safetensors").read_bytes()


def test_a_trainer_of_adapters_refuses_a_model_without(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="expected one with a LoTR adapter, got Normed without"):
        trainer(Normed, "pixels", tmp_path, cls=AdapterTrainer)


def make_again(make: Make) -> nn.Module:
    transformers.set_seed(0)
    return make()


def test_the_callback_brings_the_best_adapter_back_and_refuses_a_checkpoint_without(tmp_path: Path) -> None:
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 3, "metric_for_best_model": "eval_loss"}
    done = trainer(vit, "pixels", tmp_path, AdapterCheckpoint(), **best, greater_is_better=True)  # the first, surely
    done.train()
    assert done.state.best_model_checkpoint.endswith("checkpoint-3")
    saved = load_adapter(make_again(vit), tmp_path / "checkpoint-3" / "lotr_adapter")
    want = dict(saved.named_parameters())
    assert all(torch.equal(p, want[n]) for n, p in done.model.named_parameters())
    moved = tmp_path / "moved"
    (tmp_path / "checkpoint-3").rename(moved)
    elsewhere = trainer(vit, "pixels", tmp_path / "new", AdapterCheckpoint(moved))
    elsewhere.train(resume_from_checkpoint=str(moved))
    with pytest.raises(FileNotFoundError, match=r"checkpoint-3: expected a folder lotr_adapter.*give resume_from"):
        trainer(vit, "pixels", tmp_path / "other", AdapterCheckpoint()).train(resume_from_checkpoint=str(moved))


@pytest.mark.full
def test_trainer_compiles(tmp_path: Path) -> None:
    torch.compiler.reset()
    plainly = trainer(vit, "pixels", tmp_path / "eager", weight_decay=0.01)
    for layer in adapted_layers(plainly.model).values():
        layer.dropout = 0.0
    compiled = trainer(vit, "pixels", tmp_path / "compiled", weight_decay=0.01, torch_compile_backend="aot_eager")
    for layer in adapted_layers(compiled.model).values():
        layer.dropout = 0.0
    for of in (plainly, compiled):
        of.model.config.hidden_dropout_prob = of.model.config.attention_probs_dropout_prob = 0.0
        of.train()
    assert losses(compiled) == pytest.approx(losses(plainly), rel=1e-4)
    torch.compiler.reset()


def test_generate_samples_with_a_cache_under_checkpointing_and_autocast() -> None:
    """generate() as it is called between training steps: with the adapter, merged, disabled."""
    for make in (gpt2, llama):
        torch.manual_seed(0)
        model = make().eval()
        randomize(model, std=0.5)
        prompt = torch.randint(3, 67, (2, 4), generator=torch.Generator().manual_seed(2))
        options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(prompt)}
        tokens = model.generate(prompt, **options)
        assert torch.equal(model.generate(prompt, use_cache=False, **options), tokens)
        beams = model.generate(prompt, num_beams=2, **options)
        model.gradient_checkpointing_enable()
        assert torch.equal(model.generate(prompt, **options), tokens)
        with torch.autocast("cpu", torch.bfloat16):
            assert model.generate(prompt, **options).shape[0] == 2
        merge(model)
        assert torch.equal(model.generate(prompt, **options), tokens)
        assert torch.equal(model.generate(prompt, num_beams=2, **options), beams)
        unmerge(model)
        with disabled(model):
            assert not torch.equal(model.generate(prompt, **options), tokens)


# ---- accelerate and mixed precision -----------------------------------------------------------------------------------


def stepped(net: nn.Module, optimizer: torch.optim.Optimizer, backward: Callable[[Tensor], None], steps: range) -> list[float]:
    found = []
    for _ in steps:
        optimizer.zero_grad()
        value = loss(net)
        backward(value)
        optimizer.step()
        found.append(value.item())
    return found


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(list(lotr_parameters(model)), lr=1e-2)


@pytest.fixture
def one_accelerator() -> Iterator[None]:
    """accelerate's state is one for the process, and Trainer's runs leave theirs."""
    from accelerate.state import AcceleratorState, GradientState

    for state in (AcceleratorState._reset_state, GradientState._reset_state):
        state()
    yield
    for state in (AcceleratorState._reset_state, GradientState._reset_state):
        state()


def test_accelerate_trains_saves_its_state_and_goes_on(tmp_path: Path, one_accelerator: None) -> None:
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = adapted()
    reference = adapted()
    net, optimizer = accelerator.prepare(model, adam(model))
    with_plain = adam(reference)
    for _ in range(2):
        with accelerator.accumulate(net):
            accelerator.backward(loss(net))
            optimizer.step()
            optimizer.zero_grad()
    loss(reference).backward()  # twice half of it
    with_plain.step()
    for got, want in zip(lotr_parameters(model), lotr_parameters(reference), strict=True):
        torch.testing.assert_close(got, want)
    accelerator.save_state(str(tmp_path))
    accelerator.gradient_accumulation_steps = 1
    after = stepped(net, optimizer, accelerator.backward, range(3))
    accelerator.load_state(str(tmp_path))
    assert stepped(net, optimizer, accelerator.backward, range(3)) == after
    save_adapter(accelerator.unwrap_model(net), tmp_path / "adapter")


def test_accelerate_in_bfloat16(one_accelerator: None) -> None:
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    model = adapted()
    net, optimizer = accelerator.prepare(model, adam(model))
    curve = stepped(net, optimizer, accelerator.backward, range(8))
    assert curve[-1] < curve[0] and {p.grad.dtype for p in lotr_parameters(model)} == {torch.float32}
    assert net(TOY_IDS).dtype == torch.float32  # accelerate casts what it returns


def test_a_grad_scaler_skips_a_step_that_meets_infinity_and_goes_on(either_path: str) -> None:
    model, reference = adapted(), adapted()
    optimizer, alone = adam(model), adam(reference)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=10**6)
    for i in range(4):
        before = [p.detach().clone() for p in lotr_parameters(model)]
        optimizer.zero_grad()
        value = loss(model)
        scaler.scale(value * (float("inf") if i == 1 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        same = [torch.equal(p, q) for p, q in zip(lotr_parameters(model), before, strict=True)]
        assert all(same) if i == 1 else not any(same)
        if i != 1:
            alone.zero_grad()
            loss(reference).backward()
            alone.step()
    assert scaler.get_scale() == 2.0**9
    for got, want in zip(lotr_parameters(model), lotr_parameters(reference), strict=True):
        assert got.isfinite().all()
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
