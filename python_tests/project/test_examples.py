"""The examples run, short and on small inputs, and refuse bad input with one line."""

from __future__ import annotations

import csv
import importlib
import io
import json
import multiprocessing
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
from gloo import forks, values_of

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

MODEL = ROOT / "data" / "all-minilm-l6-v2"
needs_data = pytest.mark.skipif(not MODEL.is_dir(), reason="data/ is missing: run make setup")


def run(*arguments: str, timeout: int = 1500) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=timeout)


@pytest.fixture
def printed(capsys, monkeypatch) -> Callable[..., tuple[str, str]]:
    """(standard output, error) of a program that runs here: a process of its own imports for seconds."""

    def of(program: str, *arguments: str) -> tuple[str, str]:
        module = importlib.import_module(program)
        monkeypatch.setattr(sys, "argv", [program])
        with mock.patch.dict(os.environ):
            assert not (module.main(list(arguments)) if arguments else module.main())
        return capsys.readouterr()

    return of


@pytest.fixture
def forked(monkeypatch) -> None:
    """Each process that a program starts for a run is a fork of one that has torch."""
    context = forks()
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: context)


# ---- examples --------------------------------------------------------------------------------------------------------


def test_custom_model_runs(printed):
    out, _ = printed("custom_model")
    assert "608 of 26209 parameters are trained" in out and "the same outputs" in out


def test_many_tasks_keeps_its_numbers_and_a_picture(tmp_path, printed):
    sizes = "--tasks 20 --rows 8 --tokens 2 --hidden 64 --layers 1 --rank 4 --rounds 2 --threads 1 --peft 8 --results"
    out, _ = printed("many_tasks", *sizes.split(), str(tmp_path))
    kept = json.loads((tmp_path / "many-tasks-2-tokens.json").read_text())
    assert {"LoTR, 8 tasks in the batch", "LoRA PEFT, 8 tasks in the batch", "no adapter"} <= set(kept["ways"])
    assert kept["bytes_a_task"] == {"LoTR": 4 * 4 * 4 * 4, "LoRA": 4 * 2 * 64 * 4 * 4}
    assert "a task of LoTR: 256 bytes" in out
    assert (tmp_path / "many-tasks-2-tokens.png").stat().st_size > 5000


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> tuple[Path, Path]:
    """(a one-layer encoder folder with MiniLM's tokenizer, a labelled file that one word decides)"""
    if not MODEL.is_dir():
        pytest.skip("data/ is missing: run make setup")
    from transformers import AutoTokenizer, BertConfig, BertModel

    folder = tmp_path_factory.mktemp("tiny")
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    BertModel(BertConfig(**size)).save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(MODEL, local_files_only=True).save_pretrained(folder / "model")
    rows = [("good", f"a fine film, number {i}") if i % 2 else ("bad", f"a dull film, number {i}") for i in range(60)]
    with open(folder / "text.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("label", "text"), *rows])
    return folder / "model", folder / "text.csv"


@pytest.fixture(scope="module")
def tiny_lm(tmp_path_factory) -> tuple[Path, Path]:
    """(a one-layer Llama folder whose tokens are bytes, a text of one sentence)"""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-lm")
    letters = {letter: i for i, letter in enumerate(["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(letters, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder / "model")
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    torch.manual_seed(0)
    config = LlamaConfig(**size, intermediate_size=64, vocab_size=257, bos_token_id=0, eos_token_id=0)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    (folder / "text.txt").write_text("And it was so, and the evening and the morning were the first day. " * 80)
    return folder / "model", folder / "text.txt"


SNIPPETS = ROOT / "data" / "movie_snippets.tsv"
needs_snippets = pytest.mark.skipif(not SNIPPETS.is_file(), reason="data/ is missing: run make setup")


@pytest.mark.slow
@needs_snippets
@pytest.mark.skipif(not (Path(sys.prefix) / "frameworks" / "opacus").is_dir(), reason="opacus is missing: run make setup")
def test_private_text_keeps_its_numbers_and_a_picture(tiny, tmp_path, printed, forked):
    sizes = "--epsilons 8 --seeds 1 --steps 2 --batch 8 --rank 2 --tokens 8 --held-out 20"
    printed("private_text", "--model", str(tiny[0]), *sizes.split(), "--results", str(tmp_path))
    kept = json.loads((tmp_path / "private-text.json").read_text())
    head, core, pair = 32 * 2 + 2, 2 * 2, 2 * 32 * 2
    assert {method: row["numbers"] for method, row in kept["summary"]["cost"].items()} == {
        "lotr": head + 2 * core,
        "lora": head + 2 * pair,
    }
    assert len(kept["runs"]) == 2 and all(7 < one["epsilon"] < 8.01 for one in kept["runs"])
    by_method = {m: [one["rows"] for one in kept["runs"] if one["settings"]["method"] == m] for m in ("lotr", "lora")}
    assert by_method["lotr"] == by_method["lora"], "the same batches at equal seeds"
    assert (tmp_path / "private-text.png").stat().st_size > 5000


@pytest.mark.slow
@needs_snippets
def test_influence_text_keeps_its_numbers_and_a_picture(tiny, tmp_path):
    sizes = "--texts 40 --held-out 5 --epochs 0.5 --seeds 1 --rank 2"
    kron = [] if (Path(sys.prefix) / "frameworks" / "kronfluence").is_dir() else ["--without-kronfluence"]
    result = run("examples/influence_text.py", "--model", str(tiny[0]), *sizes.split(), *kron, "--results", str(tmp_path))
    assert result.returncode == 0, result.stderr
    kept = json.loads((tmp_path / "influence-text.json").read_text())
    assert len(kept["ways"]) == 5 - bool(kron)
    for way in kept["ways"].values():
        assert 0 <= way["auroc"][0] <= 1 and way["curve"] == sorted(way["curve"]) and way["curve"][-1] == 1
    assert (tmp_path / "influence-text.png").stat().st_size > 5000


def test_an_evaluation_shows_a_bar_on_a_terminal(tiny, tmp_path, monkeypatch):
    import finetune_text

    model, text = tiny
    seen = io.StringIO()
    seen.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", seen)
    options = finetune_text.arguments(["--model", str(model), "--text", str(text), "--steps", "1", "--out", str(tmp_path)])
    shared = {k: v for k, v in vars(options).items() if k not in ("methods", "seed", "seeds", "quiet")}
    finetune_text.run(finetune_text.Job(method="lotr", seed=0, show=True, **(shared | {"threads": 1})))
    for name in ("LoTR, held out", "LoTR, loaded", "LoTR, merged"):
        assert re.search(rf"{name}.*12/12", seen.getvalue())


@needs_data
def test_evolve_keeps_its_numbers_and_a_picture(tiny, tiny_lm, tmp_path, printed):
    models = ("--model", str(tiny[0]), "--language-model", str(tiny_lm[0]))
    printed("evolve", "--quick", *models, "--threads", "1", "--results", str(tmp_path))
    kept = json.loads((tmp_path / "evolve.json").read_text())
    (accuracy,), (sums,) = kept["accuracy"], kept["sums"]
    assert accuracy["numbers"] == 2 * 4 * 4 and len(accuracy["members"]) == 3  # query and value at rank 4
    assert sums["numbers"] == 2 * 2 * 2 and len(sums["members"]) == 1
    for run_of, ways in ((accuracy, ("start", "CoreES", "Adam")), (sums, ("start", "CoreES"))):
        assert all(0 <= value <= 1 for way in ways for value in (run_of[way] if run_of is sums else [run_of[way]]))
    assert kept["speed"]["by_members"]["64"]["over_base"] > 0 and kept["commit"]
    assert (tmp_path / "evolve.png").read_bytes().startswith(b"\x89PNG")


def test_finetune_text_on_another_model_and_file(tiny, tmp_path, printed, forked):
    model, text = tiny
    options = "--steps 3 --batch 8 --rank 2 --threads 1 --init gradient --out".split()
    out, _ = printed("finetune_text", "--model", str(model), "--text", str(text), *options, str(tmp_path))
    assert "the same 12 predictions" in out
    table = json.loads((tmp_path / "table.json").read_text())
    rows = {row["method"]: row for row in table["rows"]}
    head, core, pair = 32 * 2 + 2, 2 * 2, 2 * 32 * 2
    assert rows["head only"]["trained_parameters"] == head
    assert rows["LoTR"]["trained_parameters"] == head + 2 * core + pair
    assert rows["LoRA PEFT"]["trained_parameters"] == head + 2 * pair
    assert all(len(run["losses"]) == 3 and run["peak_memory_bytes"] > 50e6 for run in table["runs"])
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG") and (tmp_path / "lotr-r2").is_dir()


@pytest.mark.full
@needs_data
def test_finetune_text_trains_on_the_snippets(tmp_path):
    options = ("--methods", "lotr", "--steps", "4", "--held-out", "60", "--threads", "1", "--quiet", "--out", str(tmp_path))
    result = run("examples/finetune_text.py", *options)
    assert result.returncode == 0, result.stderr
    (row,) = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert row["trained_parameters"] == 12 * 16 * 16 + 2 * 384 * 16 + 384 * 2 + 2 == 16_130


@needs_data
def test_finetune_text_refuses_what_only_the_model_can_tell(tiny, tmp_path):
    import finetune_text

    text = tiny[1]
    options = ("--text", str(text), "--steps", "1", "--threads", "1", "--methods", "lotr", "--out", str(tmp_path))
    result = run("examples/finetune_text.py", "--model", str(tmp_path), *options)
    assert result.returncode == 1 and result.stderr.startswith("finetune_text: model: expected a Hugging Face model folder")
    assert "Traceback" not in result.stderr
    chosen = finetune_text.arguments(["--model", str(tiny[0]), *options])
    shared = {k: v for k, v in vars(chosen).items() if k not in ("methods", "seed", "seeds", "quiet", "targets")}
    for target, message in (("absent", "absent"), ("LayerNorm", "target_modules: expected nn.Linear")):
        with pytest.raises((ValueError, TypeError), match=message):
            finetune_text.run(finetune_text.Job(method="lotr", seed=0, show=False, targets=(target,), **shared))


REFUSED = [
    ("finetune_text", "--rank 0", "rank: expected at least 1, got 0"),
    ("finetune_text", "--methods lotr,magic", "methods: expected some of head, lotr, lora, got magic"),
    ("finetune_text", "--lr nan", "lr: expected a positive number, got nan"),
    ("finetune_text", "--targets ,", "targets: .* none"),
    ("finetune_text", "--text nowhere.tsv", "text: .*nowhere.tsv, which is no file"),
    ("finetune_text", "--held-out 9000", "held-out.*9000"),
    ("finetune_text", f"--seed {'9' * 23}", f"seed: expected 0 to 4294967295, got {'9' * 23}"),
    ("finetune_text", "--out Makefile", "out: expected a folder .* where Makefile is a file"),
    ("finetune_text", "--out Makefile/results", "out: expected a folder .* where Makefile is a file"),
    ("train_ddp", "--batch 0", "batch: expected at least 1"),
    ("train_ddp", "--targets ,", "targets: "),
    ("train_ddp", "--seed -1", "seed: expected 0 to 4294967295, got -1"),
    ("train_ddp", "--out Makefile", "out: expected a folder or a new path"),
    ("train_ddp", "", "started by torchrun"),
    ("train_pp", "--micro-batches 0", "micro-batches: expected at least 1"),
    ("train_pp", "--batch 6", "batch: expected a multiple of 4 micro-batches, got 6"),
    ("train_pp", "", "torchrun --nproc-per-node 2 examples/train_pp.py"),
    ("causal_lm", "--rank 0", "rank: expected at least 1, got 0"),
    ("causal_lm", "--length 1", "length: expected at least 2"),
    ("causal_lm", "--lr -1", "lr: expected a positive number, got -1"),
    ("causal_lm", "--targets ,", "targets: .* none"),
    ("causal_lm", "--prompt ' '", "prompt: expected some text"),
    ("causal_lm", f"--seed {'9' * 23}", "seed: expected 0 to 4294967295"),
    ("causal_lm", "--out Makefile", "out: expected a folder .* is a file"),
    ("causal_lm", "--text nowhere.txt", "text: .*nowhere.txt.*causal_data.py"),
    ("private_text", "--epsilons 1,x", "--epsilons: expected numbers with commas, got '1,x'"),
    ("private_text", "--epsilons 0", "--epsilons: expected positive numbers"),
    ("private_text", "--seeds 11", "--seeds: expected at most 10, got 11"),
    ("influence_text", "--flipped 1", "--flipped: expected a share between 0 and 1, got 1.0"),
    ("private_text", "--delta 1", "--delta: expected a number between 0 and 1, got 1.0"),
    ("private_text", "--clip 0", "--clip: expected a positive number, got 0.0"),
    ("influence_text", "--texts 3", "expected at least 10 texts"),
    ("influence_text", "--epochs 0", "--epochs: expected a positive number, got 0.0"),
    ("evolve", "--members 8,x", "--members: expected whole numbers of 1 or more with commas, got '8,x'"),
    ("loras_to_bank", "--ranks layer:0", "--ranks: expected groupings layer, shape, block, name and ranks of 1 or more"),
    ("loras_to_bank", "--length 1", "--length: expected at least 2 tokens, got 1"),
    ("many_tasks", "--peft -1", "--peft: expected 0 or more, got -1"),
]
PARSED = ("private_text", "influence_text", "evolve", "loras_to_bank", "many_tasks")  # argparse refuses: SystemExit


@pytest.mark.parametrize(("program", "arguments", "message"), REFUSED)
def test_bad_options_are_refused(program, arguments, message, tmp_path, monkeypatch, capsys):
    module, words = importlib.import_module(program), shlex.split(arguments)
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("RANK", raising=False)
    if arguments == "--batch 6":
        monkeypatch.setenv("RANK", "0")
    if program == "causal_lm":
        monkeypatch.setattr(module, "TEXT", tmp_path)
    if program in PARSED:
        with pytest.raises(SystemExit):
            module.main(words)
        assert message in capsys.readouterr().err
        return
    with pytest.raises((ValueError, OSError), match=message):
        module.main(["--out", str(tmp_path / "out"), *words])
    assert not (tmp_path / "out").exists() or "finetune" in program


@pytest.mark.parametrize("program", ["evolve", "influence_text", "loras_to_bank", "many_tasks", "private_text", "rl_cores"])
def test_a_folder_that_cannot_be_written_is_refused_before_the_work(program, tmp_path, monkeypatch):
    """These run for minutes, and wrote their results last: all of it was lost."""
    module, model = importlib.import_module(program), tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    words = ["--results", str(tmp_path / "results"), *(("--model", str(model)) if program == "rl_cores" else ())]
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    monkeypatch.setattr(module, "FRAMEWORKS", tmp_path, raising=False)
    (tmp_path / "opacus").mkdir()
    with pytest.raises(
        ValueError, match=r"results: expected a folder that can be written, got .*; name another one with --results"
    ):
        module.main(words)
    assert not (tmp_path / "results").exists()


# ---- several processes -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("how", ["", pytest.param("--shard", marks=pytest.mark.full)])
def test_train_ddp_by_torchrun(tiny, tmp_path, how):
    model, text = tiny
    command = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--local-addr", "127.0.0.1", "examples/train_ddp.py")
    options = ("--model", str(model), "--text", str(text), "--steps", "3", "--batch", "4", "--rank", "2", "--out")
    result = run(*command, *options, str(tmp_path), *([how] if how else []))
    assert result.returncode == 0, result.stderr
    reached, loaded = re.findall(r": ([\d.]+)%|accuracy ([\d.]+)%", result.stdout)
    assert "".join(reached) == "".join(loaded) and "3 steps of 2 x 4" in result.stdout
    assert result.stdout.count("LoTR: 2 layers") == 1 and (tmp_path / "lotr_adapter.json").is_file()


@pytest.fixture(scope="module")
def by_gloo(tiny) -> tuple[Path, dict[str, list]]:
    """The folder, and what the two other programs of torchrun print in each of two processes."""
    from transformers import BertConfig, BertModel

    folder = tiny[0].parent
    shutil.copytree(tiny[0], folder / "two layers")
    BertModel(BertConfig.from_pretrained(tiny[0], num_hidden_layers=2)).save_pretrained(folder / "two layers")
    return folder, values_of(["gloo_examples:train_tp", "gloo_examples:train_pp"], folder)


@pytest.mark.slow
def test_train_tp_in_two_processes(by_gloo):
    folder, printed = by_gloo
    out = "".join(printed["gloo_examples:train_tp"])
    assert "2 x W (32, 32) here (16, 32)" in out and "tensor parallel, 2 processes, 3 steps of 4" in out
    reached, loaded = re.search(r"accuracy ([\d.]+%); a whole model with the saved adapter: ([\d.]+%)", out).groups()
    assert reached == loaded and (folder / "tp" / "lotr_adapter.json").is_file()


def test_train_pp_in_two_processes(by_gloo):
    folder, printed = by_gloo
    out = "".join(printed["gloo_examples:train_pp"])
    assert "1F1B, 2 stages, 3 steps of 4" in out and "held-out accuracy of a whole model" in out
    saved = json.loads((folder / "pp" / "lotr_adapter.json").read_text())
    assert {name.split(".")[3] for name in saved["layers"]} == {"0", "1"} and saved["modules_to_save"] == ["head"]


# ---- causal_lm -------------------------------------------------------------------------------------------------------


def test_causal_lm_on_another_model_and_text(tiny_lm, tmp_path, printed):
    model, text = tiny_lm
    options = "--steps 12 --batch 2 --length 16 --rank 4 --threads 1 --new-tokens 5 --init gradient"
    targets = ("--targets", "q_proj,k_proj,v_proj,o_proj", "--prompt", "And", "--out", str(tmp_path))
    out, error = printed("causal_lm", "--model", str(model), "--text", str(text), *options.split(), *targets)
    before, after, merged = (float(value) for value in re.findall(r"held-out loss ([\d.]+)", out))
    assert after < before - 0.05 and abs(merged - after) < 1e-3
    assert len(re.findall(r"^  'And.+'$", out, re.MULTILINE)) == 2
    assert "step   12/12" in error and (tmp_path / "lotr_adapter.json").is_file()


def test_causal_lm_refuses_what_only_the_files_can_tell(tiny_lm, tmp_path):
    import causal_lm

    model, text = tiny_lm
    (tmp_path / "short.txt").write_text("In the beginning")
    (tmp_path / "latin.txt").write_bytes(b"\xe9t\xe9")
    ours = ["--model", str(model), "--out", str(tmp_path / "out"), "--threads", "1", "--text"]
    for name, message in (("short.txt", "at least 512 tokens .two batches., got 16"), ("latin.txt", "expected UTF-8")):
        with pytest.raises(ValueError, match=message):
            causal_lm.main([*ours, str(tmp_path / name)])
    with pytest.raises(ValueError, match="absent"):
        causal_lm.main([*ours, str(text), "--targets", "absent"])
    result = run("examples/causal_lm.py", "--model", str(tmp_path), "--text", str(text))
    assert result.returncode == 1 and result.stderr.startswith("causal_lm: model: expected a Hugging Face model folder")
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_loras_to_bank_keeps_its_numbers_and_a_picture(tiny_lm, tmp_path, printed):
    """Three tasks and a new one on a tiny model. At the sum of the LoRAs' ranks a bank has their losses."""
    model, _ = tiny_lm
    texts = {"a": "And it was so. ", "b": "Let there be light: ", "c": "My son, hear me. ", "d": "Now these are "}
    for name, words in texts.items():
        (tmp_path / f"{name}.txt").write_text(words * 60)
    options = "--steps 6 --batch 2 --length 16 --held-out 3 --lora-rank 2 --threads 1 --lr 1e-2 --ranks layer:6,shape:2"
    command = ["--model", str(model), "--texts", str(tmp_path), *options.split(), "--results", str(tmp_path)]
    out, _ = printed("loras_to_bank", *command)
    kept = json.loads((tmp_path / "loras-to-bank.json").read_text())
    assert kept["tasks"] == ["a", "b", "c"] and kept["new"] == "d"
    whole, small = kept["ways"]["layer, rank 6"], kept["ways"]["shape, rank 2"]
    assert whole["error"] < 1e-5 and abs(whole["over_lora"]) < 1e-4 and 0.1 < small["error"] < 1
    assert kept["lora"]["loss"] < kept["base"]["loss"] and kept["lora_numbers"] == 3 * 2 * (32 + 32 + 32 + 16)
    assert kept["new_task"]["shape, rank 2"]["numbers"] == 2 * 2 * 2 and "cores, by layer, rank 6" in out
    assert (tmp_path / "loras-to-bank.png").stat().st_size > 5000
    (tmp_path / "short.txt").write_text("And")
    with pytest.raises(ValueError, match="texts: expected 5 rows of 16 tokens, got 0"):
        printed("loras_to_bank", *command)
