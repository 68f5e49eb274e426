"""Tries PEFT's method comparison without a GPU, the model or the data: a tiny random Llama on the CPU, ten made-up problems in
the form of MetaMathQA and GSM8K, and a few steps. Only the check of PEFT's script that refuses a CPU is removed."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import sys
import tempfile
import types
from pathlib import Path

import torch

STEPS, LETTERS = 4, "abcde"
# functions that PEFT's script calls in torch's module of the accelerator
COUNTERS = (
    "memory_allocated",
    "memory_reserved",
    "max_memory_reserved",
    "reset_peak_memory_stats",
    "empty_cache",
    "manual_seed_all",
)


def prepare(theirs: Path, experiment: str) -> Path:
    """Returns a folder with experiments/lotr/<experiment> for a tiny model, and makes PEFT's modules run on the CPU.

    Args:
        theirs: PEFT's folder method_comparison/MetaMathQA.
        experiment: One of experiments/lotr.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    folder = Path(tempfile.mkdtemp(prefix="lotr-comparison-"))
    texts = problems()
    tiny_model(folder / "model", texts)
    ours, made = (
        Path(__file__).resolve().parent / "experiments" / "lotr" / experiment,
        folder / "experiments" / "lotr" / experiment,
    )
    made.mkdir(parents=True)
    settings = json.loads((ours / "adapter_config.json").read_text())
    made.joinpath("adapter_config.json").write_text(json.dumps({**settings, "rank": 4, "r": 4}))
    given = json.loads((ours / "training_params.json").read_text())
    short = {
        "dtype": "float32",
        "max_seq_length": 96,
        "batch_size": 2,
        "batch_size_eval": 5,
        "max_steps": STEPS,
        "eval_steps": 2,
    }
    lengths = {"generation_kwargs": {"max_length": 120, "max_new_tokens": 6}}
    made.joinpath("training_params.json").write_text(
        json.dumps({**given, **short, **lengths, "model_id": str(folder / "model")})
    )
    _data(texts)
    _on_a_cpu(theirs)
    return folder


def problems() -> list[dict[str, str]]:
    """Ten sums, with the columns of both data sets."""
    rows = []
    for i in range(10):
        question, answer = f"What is {i} plus {2 * i + 1}?", str(3 * i + 1)
        rows.append({"query": question, "response": f"{i} + {2 * i + 1} = {answer}. The answer is: {answer}", "type": "sum"})
        rows[-1] |= {"original_question": question, "question": question, "answer": f"{answer} apples\n#### {answer}"}
    return rows


def tiny_model(folder: Path, texts: list[dict[str, str]]) -> None:
    """A Llama of two layers whose loss over random letters is near log 5: PEFT's check of the base model requires 1 to 2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    symbols = sorted(
        {letter for row in texts for text in row.values() for letter in text}
        | set(LETTERS)
        | set("Question: {} Think step by step.\nAnswer:")
    )
    tokens = Tokenizer(
        models.WordLevel({symbol: i for i, symbol in enumerate([*symbols, "<eos>", "<unk>"])}, unk_token="<unk>")
    )
    tokens.pre_tokenizer, tokens.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="<eos>", unk_token="<unk>")
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, bos_token_id=None, **sizes)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rows = tokenizer(letters(8), return_tensors="pt").input_ids
    for _ in range(40):
        optimizer.zero_grad()
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def letters(rows: int, length: int = 60) -> list[str]:
    draw = torch.randint(len(LETTERS), (rows, length), generator=torch.Generator().manual_seed(rows)).tolist()
    return ["".join(LETTERS[i] for i in line) for line in draw]


def _data(texts: list[dict[str, str]]) -> None:
    """Replaces load_dataset: it returns the made-up problems under the names of MetaMathQA and GSM8K."""
    import datasets

    def columns(*names: str) -> datasets.Dataset:
        return datasets.Dataset.from_list([{name: row[name] for name in names} for row in texts])

    def load_dataset(name: str, *_: object, **__: object) -> object:
        if name == "meta-math/MetaMathQA":
            return {"train": columns("type", "query", "original_question", "response")}
        if name == "openai/gsm8k":
            both = columns("question", "answer")
            return datasets.DatasetDict({"train": both, "test": both})
        return types.SimpleNamespace(take=lambda count: [{"text": text} for text in letters(4)])

    datasets.load_dataset = load_dataset


def _on_a_cpu(theirs: Path) -> None:
    """Loads PEFT's utils.py without the statement that refuses a CPU, and adds a GPU's counters, all 0, to torch.cpu."""
    for name in COUNTERS:
        setattr(torch.cpu, name, lambda *_: 0)
    torch.cpu.get_device_name = lambda *_: "CPU"
    if importlib.util.find_spec("bitsandbytes") is None:  # PEFT imports it for quantised bases, which this try does not use
        absent = types.ModuleType("bitsandbytes")
        absent.__version__, absent.__path__, absent.__file__ = "absent", ["site-packages"], __file__
        sys.modules["bitsandbytes"] = absent
    path = theirs / "utils.py"
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if not (isinstance(node, ast.If) and isinstance(node.body[0], ast.Raise))]
    module = types.ModuleType("utils")
    module.__file__ = str(path)
    sys.modules["utils"] = module
    exec(compile(tree, str(path), "exec"), module.__dict__)
    module.get_peft_branch, module.get_peft_worktree_is_dirty = lambda: "try", lambda: False  # PEFT may come without a clone
