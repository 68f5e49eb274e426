"""Heads: warned of once while frozen, trained by a task's name, left out of "all-linear"."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from toys import no_warnings, target_names, toy

from lotr_ext import LoTRConfig, add_adapter, apply_lotr, load_adapter, save_adapter

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
transformers.logging.set_verbosity_error()

SIZE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 67}
QV = ["query", "value"]


def bert(task: str) -> nn.Module:
    return getattr(transformers, f"BertFor{task}")(transformers.BertConfig(**SIZE, num_labels=3))


def distilbert() -> nn.Module:
    config = transformers.DistilBertConfig(vocab_size=67, dim=32, n_layers=1, n_heads=4, hidden_dim=48, num_labels=3)
    return transformers.DistilBertForSequenceClassification(config)


class Timm(nn.Module):
    """A classifier as timm's: get_classifier gives the head, of whatever name; a distilled one has two."""

    def __init__(self, heads: int = 1, classes: int = 3) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 8), nn.Linear(8, 8)
        self.top = nn.Linear(8, classes) if classes else nn.Identity()
        self.top_dist = nn.Linear(8, classes) if heads > 1 else None

    def get_classifier(self) -> nn.Module | tuple[nn.Module, ...]:
        return self.top if self.top_dist is None else (self.top, self.top_dist)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc2(torch.relu(self.fc1(x)))
        return self.top(x) if self.top_dist is None else self.top(x) + self.top_dist(x)


@pytest.mark.parametrize(
    ("make", "targets", "heads"),
    [
        (lambda: bert("SequenceClassification"), QV, ["classifier"]),
        (lambda: bert("QuestionAnswering"), QV, ["qa_outputs"]),
        (distilbert, ["q_lin"], ["pre_classifier", "classifier"]),
        (Timm, "all-linear", ["top"]),
        (lambda: Timm(2), ["fc1"], ["top", "top_dist"]),
        (lambda: nn.ModuleDict({"inside": Timm()}), ["fc1"], ["inside.top"]),
    ],
)
def test_a_frozen_head_is_warned_of_once_and_modules_to_save_trains_it(make, targets, heads: list[str]) -> None:
    with pytest.warns(UserWarning) as caught:
        apply_lotr(make(), LoTRConfig(rank=2, target_modules=targets))
    (message,) = [str(w.message) for w in caught if "frozen" in str(w.message)]
    assert message.startswith(f"lotr_ext: {', '.join(heads)} stays frozen") and str(heads) in message
    with no_warnings():
        model = apply_lotr(make(), LoTRConfig(rank=2, target_modules=targets, modules_to_save=heads))
    assert all(p.requires_grad for head in heads for p in model.get_submodule(head).parameters())


def test_no_head_is_no_warning() -> None:
    with no_warnings():
        apply_lotr(transformers.BertModel(transformers.BertConfig(**SIZE)), LoTRConfig(rank=2, target_modules=QV))
        apply_lotr(bert("MaskedLM"), LoTRConfig(rank=2, target_modules=QV))
        apply_lotr(Timm(classes=0), LoTRConfig(rank=2))
        apply_lotr(bert("SequenceClassification"), LoTRConfig(rank=2, target_modules=[*QV, "classifier"]))


@pytest.mark.parametrize(
    ("task", "name", "head"),
    [
        ("SEQ_CLS", "SequenceClassification", "classifier"),
        ("TOKEN_CLS", "TokenClassification", "classifier"),
        ("QUESTION_ANS", "QuestionAnswering", "qa_outputs"),
    ],
)
def test_a_task_trains_the_head_and_it_comes_back(task: str, name: str, head: str, tmp_path: Path) -> None:
    model = apply_lotr(bert(name), LoTRConfig(rank=2, target_modules=QV, task_type=task))
    assert model.lotr_config.modules_to_save == (head,)
    weight = model.get_submodule(head).weight
    assert weight.requires_grad and not model.bert.embeddings.word_embeddings.weight.requires_grad
    with torch.no_grad():
        weight.add_(1)
    save_adapter(model, tmp_path)
    fresh = load_adapter(bert(name), tmp_path)
    assert torch.equal(fresh.get_submodule(head).weight, weight) and fresh.lotr_config == model.lotr_config
    add_adapter(model, "other", LoTRConfig(rank=2, target_modules=QV, task_type=task))


def test_tasks_by_pefts_own_type_and_those_without_a_head() -> None:
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    model = apply_lotr(bert("SequenceClassification"), LoTRConfig(rank=2, target_modules=QV, task_type=peft.TaskType.SEQ_CLS))
    assert model.classifier.weight.requires_grad
    assert LoTRConfig.from_dict(LoTRConfig(task_type=peft.TaskType.SEQ_CLS).to_dict()) == LoTRConfig(task_type="SEQ_CLS")
    assert {t.value for t in peft.TaskType if not LoTRConfig(task_type=t).task_type} == set()
    with pytest.warns(UserWarning, match="classifier stays frozen"):
        apply_lotr(bert("SequenceClassification"), LoTRConfig(rank=2, target_modules=QV, task_type="FEATURE_EXTRACTION"))
    kept = LoTRConfig(rank=2, target_modules=["fc1"], task_type="SEQ_CLS", modules_to_save=["fc2"])
    assert apply_lotr(Timm(), kept).lotr_config.modules_to_save == ("fc2", "top")


def test_an_unknown_task_and_a_task_without_a_head_are_refused() -> None:
    with pytest.raises(ValueError, match=r"task_type: expected one of SEQ_CLS, .*got 'CLS'"):
        LoTRConfig(task_type="CLS")
    with pytest.raises(ValueError, match=r"task_type: expected a model with a head for 'SEQ_CLS', got Toy"):
        apply_lotr(toy(), LoTRConfig(task_type="SEQ_CLS"))
    named = apply_lotr(toy(), LoTRConfig(rank=2, task_type="SEQ_CLS", modules_to_save=["head"]))
    assert named.head.weight.requires_grad


def test_all_linear_leaves_timms_head_out() -> None:
    assert target_names(Timm()) == ["fc1", "fc2"] == target_names(Timm(2))
    assert target_names(Timm(), target_modules=["top"]) == ["top"]
