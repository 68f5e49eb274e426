"""An adapted SentenceTransformer, tiny and random: saved, loaded, trained, resumed. Run by test_sentence_transformers.py."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss
from sentence_transformers.sentence_transformer.modules import Dense, Pooling, Transformer
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from lotr_ext import LoTRConfig, apply_lotr, load_adapter, lotr_parameters, save_adapter, trainable_summary, unload
from lotr_ext.interop.trainer import AdapterTrainer

WORDS = "a b c d e f g h i j k l".split()
TEXTS = [" ".join(WORDS[(i * j) % 12] for j in range(1, 7)) for i in range(1, 9)]
CONFIG = {"rank": 4, "target_modules": ["query", "value"]}
STEPS = 6


def base(folder: Path) -> Path:
    """A folder with a model and a tokenizer, the same each time."""
    if not (path := folder / "base").exists():
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        BertModel(BertConfig(vocab_size=16, initializer_range=0.3, **sizes)).save_pretrained(path)
        special = ["<pad>", "<s>", "</s>", "<unk>"]
        words = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*special, *WORDS])}, unk_token="<unk>"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), special))
        PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(path)
    return path


def sentences(folder: Path, dense: bool = False) -> SentenceTransformer:
    transformer = Transformer(str(base(folder)))
    torch.manual_seed(1)
    further = [Dense(16, 8)] if dense else []
    return SentenceTransformer(modules=[transformer, Pooling(16), *further], device="cpu")


def adapted(folder: Path, how: str, **settings) -> SentenceTransformer:
    """how: what apply_lotr is called with, the whole, its first module or the model inside."""
    model = sentences(folder)
    inside = {"whole": model, "module": model[0], "model": model[0].auto_model}[how]
    assert apply_lotr(inside, LoTRConfig(**{**CONFIG, **settings})) is inside
    generator = torch.Generator().manual_seed(3)
    for parameter in lotr_parameters(model):
        parameter.data.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def out(model: SentenceTransformer) -> Tensor:
    return model.encode(TEXTS, convert_to_tensor=True, show_progress_bar=False)


def saved_and_loaded(rank: int, folder: Path) -> bool:
    """However it was adapted, SentenceTransformer(folder) has the adapter, or refuses without the flag for foreign classes."""
    for how in ("whole", "module", "model"):
        model, path = adapted(folder, how), folder / how
        assert not torch.allclose(out(model), out(sentences(folder)), atol=1e-2)
        model.save(str(path))
        again = SentenceTransformer(str(path), trust_remote_code=True, device="cpu")
        assert torch.equal(out(again), out(model)), how
        assert sorted(again.state_dict()) == sorted(model.state_dict())
        try:
            SentenceTransformer(str(path), device="cpu")
        except ValueError as error:
            assert "lotr_ext.model.sentence_transformers.Transformer" in str(error)
        else:
            raise AssertionError("loaded without the adapter and without an error")
        again.save(str(folder / "second"))
        second = SentenceTransformer(str(folder / "second"), trust_remote_code=True, device="cpu")
        assert torch.equal(out(second), out(model))
        onto = load_adapter(sentences(folder), path)  # the adapter alone, onto the base
        assert torch.equal(out(onto), out(model))
    return True


def other_ways(rank: int, folder: Path) -> bool:
    """save_adapter and load_adapter, init svd, wrapped layers, unload, what is frozen, what is trained whole."""
    model = adapted(folder, "whole")
    save_adapter(model, folder / "alone")
    assert torch.equal(out(load_adapter(sentences(folder), folder / "alone")), out(model))
    assert trainable_summary(model).layers == 4
    y, plain = out(model), unload(model, merge=True)
    torch.testing.assert_close(out(plain), y)
    plain.save(str(folder / "plain"))
    torch.testing.assert_close(out(SentenceTransformer(str(folder / "plain"), device="cpu")), y)
    types = [module["type"] for module in json.loads((folder / "plain" / "modules.json").read_text())]
    assert all(kind.startswith("sentence_transformers.") for kind in types)
    for name, change in (("svd", {"init": "svd"}), ("hooked", {})):
        model = sentences(folder)
        if name == "hooked":
            for layer in model[0].auto_model.encoder.layer:
                layer.attention.self.query.register_forward_hook(lambda module, args, y: None)
        apply_lotr(model, LoTRConfig(**CONFIG, **change))
        for parameter in lotr_parameters(model):
            parameter.data.add_(0.1)
        model.eval().save(str(folder / name))
        again = SentenceTransformer(str(folder / name), trust_remote_code=True, device="cpu")
        torch.testing.assert_close(out(again), out(model), msg=name)
    model = apply_lotr(sentences(folder, dense=True), LoTRConfig(**CONFIG))
    assert not any(p.requires_grad for p in model[2].parameters())
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == {id(p) for p in lotr_parameters(model)}
    return True


def trainer(folder: Path, name: str, cls: type = SentenceTransformerTrainer, **options) -> SentenceTransformerTrainer:
    torch.manual_seed(0)
    model = sentences(folder)
    apply_lotr(model, LoTRConfig(**CONFIG))
    pairs = {"first": TEXTS * 2, "second": TEXTS[::-1] * 2, "score": [(i % 3) / 2 for i in range(16)]}
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder / name), max_steps=STEPS, save_steps=STEPS // 2, per_device_train_batch_size=4, logging_steps=1,
        learning_rate=0.05, report_to=[], use_cpu=True, disable_tqdm=True, **options,
    )  # fmt: skip
    return cls(model, arguments, train_dataset=Dataset.from_dict(pairs), loss=CosineSimilarityLoss(model))


def losses(one: SentenceTransformerTrainer) -> list[float]:
    return [entry["loss"] for entry in one.state.log_history if "loss" in entry]


class AdapterSentenceTrainer(AdapterTrainer, SentenceTransformerTrainer):
    pass


def trained(rank: int, folder: Path) -> bool:
    """sentence-transformers' Trainer saves at its checkpoints, and goes on from one to the same losses."""
    for cls in (SentenceTransformerTrainer, AdapterSentenceTrainer):
        first = trainer(folder, cls.__name__, cls)
        first.train()
        curve = losses(first)
        assert len(curve) == STEPS and min(curve[3:]) < curve[0], curve
        checkpoint = folder / cls.__name__ / f"checkpoint-{STEPS // 2}"
        again = trainer(folder, "again", cls)
        again.train(resume_from_checkpoint=str(checkpoint))
        assert losses(again) == curve, (cls, losses(again), curve)
        want = first.model.state_dict()
        assert all(torch.equal(value, want[name]) for name, value in again.model.state_dict().items())
        last, y = checkpoint.with_name(f"checkpoint-{STEPS}"), out(first.model.eval())
        if cls is SentenceTransformerTrainer:
            assert torch.equal(out(SentenceTransformer(str(last), trust_remote_code=True, device="cpu")), y)
        else:
            assert not list(last.glob("model*"))
        assert torch.equal(out(load_adapter(sentences(folder), last)), y)
    return True


def refused(rank: int, folder: Path) -> bool:
    """A module of a class that is not known to load an adapter is warned of when it is saved."""

    class Mine(Transformer):
        pass

    model = SentenceTransformer(modules=[Mine(str(base(folder))), Pooling(16)], device="cpu")
    apply_lotr(model, LoTRConfig(**CONFIG))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.save(str(folder / "mine"))
    assert any("will load this Mine without its adapter" in str(w.message) for w in caught)
    assert isinstance(model[0], nn.Module)
    return True
