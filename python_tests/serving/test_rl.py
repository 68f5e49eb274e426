"""examples/rl_cores.py with a tiny model, answers by a real vLLM."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from test_sync import environment
from test_vllm import PYTHON, ROOT
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason=f"no vLLM: {PYTHON} is missing (make serve-test)")


def tiny(folder: Path) -> None:
    """A Llama of random weights whose tokens are bytes."""
    letters = {letter: i for i, letter in enumerate(["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(letters, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    torch.manual_seed(0)
    size = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96, "vocab_size": 257}
    LlamaForCausalLM(LlamaConfig(**size, bos_token_id=0, eos_token_id=0)).save_pretrained(folder)


def test_each_step_is_of_the_version_that_was_pushed_before(tmp_path: Path) -> None:
    tiny(tmp_path / "model")
    words = "--steps 3 --prompts 2 --group 4 --rank 4 --lr 0.3".split()
    command = [PYTHON, ROOT / "examples" / "rl_cores.py", "--model", tmp_path / "model", "--results", tmp_path, *words]
    wide = environment() | {"COLUMNS": "200"}
    done = subprocess.run(command, env=wide, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    kept = json.loads((tmp_path / "rl-cores.json").read_text())
    assert len(kept["steps"]) == 3 and kept["trained"] == 2 * 7 * 4 * 4
    assert all(one["gap"] < 1e-4 and one["push_ms"] > 0 for one in kept["steps"])
    assert (len(kept["before"]), len(kept["after"])) == (200, 200)
    assert "largest difference between trainer and engine on a token" in done.stdout
    assert (tmp_path / "rl-cores.png").stat().st_size > 5000
