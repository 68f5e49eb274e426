"""A short run of each example."""

import json
import shutil
from pathlib import Path

import pytest
from helpers import ROOT, run_python

MINILM = ROOT / "data" / "all-minilm-l6-v2"
QUICK = {  # program: (arguments, words in its output)
    "custom_model": ("", ["parameters are trained", "the same outputs"]),
    "finetune_text": (
        "--steps 2 --batch 4 --held-out 40 --out {out}",
        ["LoTR", "LoRA (PEFT)", "table.json"],
    ),
    "many_tasks": (
        "--tasks 70 --steps 2 --held-out 20 --rounds 1",
        ["70 tasks of 36 KiB", "64 tasks"],
    ),
    "per_example": ("--examples 3", ["relative difference to a loop", "gradient"]),
    "evolve": (
        "--generations 2 --pairs 2 --rows 4 --head-steps 2 --held-out 40",
        ["held-out accuracy", "of 768 parameters"],
    ),
    "causal_lm": (
        "--steps 2 --length 16 --new-tokens 3 {language} --out {out}",
        ["held-out loss", "fresh model"],
    ),
    "serve": ("--tasks-only --steps 2 {language} --out {out}", ["three tasks"]),
}


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Returns the options for a tiny language model with MiniLM's tokenizer, and for a text."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("language")
    config = LlamaConfig(
        vocab_size=30522,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    for file in MINILM.glob("*token*"):
        shutil.copy(file, folder / "model")
    # Long enough for the two tasks of serve.py that continue the first four words of a line.
    start = "A line that is long enough for a prompt of four words and an answer of many more, with"
    lines = [
        f"{start} numbers such as {i} and {i * i} and {7 * i} at its end.\n" for i in range(200)
    ]
    (folder / "text").write_text("".join(lines))
    return ["--model", str(folder / "model"), "--text", str(folder / "text")]


@pytest.mark.skipif(
    not MINILM.is_dir(), reason="the model is missing: python examples/data.py minilm snippets"
)
@pytest.mark.parametrize("program", QUICK)
def test_an_example_runs(program: str, language: list[str], tmp_path: Path) -> None:
    arguments, words = QUICK[program]
    options = arguments.format(out=tmp_path / "out", language=" ".join(language)).split()
    threads = ["--threads", "1"] if options else []  # custom_model.py has no options
    process = run_python(ROOT / "examples" / f"{program}.py", *options, *threads)
    assert process.returncode == 0, process.stderr[-3000:]
    output = process.stdout + process.stderr
    assert all(word in output for word in words), output[-3000:]
    if program == "finetune_text":
        runs = json.loads((tmp_path / "out" / "table.json").read_text())["runs"]
        assert {run["method"]: run["trained parameters"] for run in runs} == {
            "head only": 770,
            "LoTR": 16130,
            "LoRA (PEFT)": 148226,
        }
