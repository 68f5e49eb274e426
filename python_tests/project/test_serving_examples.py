"""The examples around serving, as far as they need no vLLM: python_tests/serving has the rest."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "examples"), str(Path(__file__).parent)]

import rl_cores  # noqa: E402
import serve_tasks  # noqa: E402
from test_examples import tiny_lm  # noqa: E402, F401

from lotr_ext import LoTRConfig, apply_lotr, lotr_parameters  # noqa: E402
from lotr_ext.interop.vllm.files import read_factors, read_task  # noqa: E402


def test_three_tasks_are_made_once(tiny_lm, tmp_path, capsys):  # noqa: F811
    model, _ = tiny_lm
    (tmp_path / "text.txt").write_text("\n".join(f"In the day {i} the king said unto all the people, " * 4 for i in range(9)))
    words = ["--model", str(model), "--text", str(tmp_path / "text.txt"), "--out", str(tmp_path / "out"), "--tasks-only"]
    serve_tasks.main([*words, "--steps", "2", "--threads", "1"])
    assert "made bible, shout, larger" in capsys.readouterr().out
    factors = read_factors(tmp_path / "out" / "factors")
    cores = [read_task(tmp_path / "out" / name, factors, factors.checksum) for name in serve_tasks.TASKS]
    assert all(core.abs().max() > 0.01 for core in cores)
    assert not torch.equal(cores[0], cores[1]) and not torch.equal(cores[1], cores[2])
    serve_tasks.main(words)
    assert capsys.readouterr().out == ""  # they are there
    with pytest.raises(SystemExit, match="serve: text: expected lines of more than 128 characters, got none"):
        (tmp_path / "short.txt").write_text("short\n")
        serve_tasks.main([*words[:2], "--text", str(tmp_path / "short.txt"), "--out", str(tmp_path / "no"), "--tasks-only"])
    assert not (tmp_path / "no").exists()


def test_what_is_learnt_of_a_text():
    def ids(text: str) -> dict[str, list[int]]:
        return {"input_ids": [*text.encode()]}

    draw = serve_tasks.random.Random(1)
    tokens, labels, index = serve_tasks.batch(ids, ["and the king said unto all his people that they"], draw)
    texts = [bytes(row[row > 0].tolist()).decode() for row in tokens]
    learnt = [bytes(row[row >= 0].tolist()).decode() for row in labels]
    first = [index.tolist().index(task) for task in range(3)]
    assert texts[first[0]] == learnt[first[0]] == "and the king said unto all his p"
    assert (texts[first[1]], learnt[first[1]]) == ("and the king said UNTO ALL HIS P", " UNTO ALL HIS P")
    pairs = [line.split(":") for line in texts[first[2]].split("\n") if line.count(" ") == 2]
    assert pairs and all(int(right) == max(map(int, left.split(","))) for left, right in pairs)
    assert learnt[first[2]].startswith(pairs[0][1] + "\n")


def test_advantages_are_within_a_group():
    assert rl_cores.advantages([1, 0, 1, 1], 2)[:2] == pytest.approx([1, -1], rel=1e-3)
    assert rl_cores.advantages([1, 0, 1, 1], 2)[2:] == [0, 0]


def test_no_step_has_a_held_out_prompt():
    apart = rl_cores.held_out()
    assert len(set(apart)) == len(apart) == rl_cores.HELD_OUT and apart == rl_cores.held_out()
    draw = rl_cores.random.Random(0)
    steps = rl_cores.trained_on(draw, 2000, set(apart))
    assert len(steps) == 2000 and not {*steps} & {*apart}
    prompt, right = steps[0]
    assert max(map(int, prompt.split("\n")[1].rstrip(":").split(", "))) == int(right)


@pytest.mark.parametrize(
    ("text", "right", "value"),
    [(" 71\n", "71", 1), ("71", "71", 1), (" 711", "71", 0), (" 25", "71", 0), ("is 71", "71", 0), ("", "71", 0)],
)
def test_a_reward_is_for_the_right_number(text, right, value):
    assert rl_cores.reward(text, right) == value


def tiny(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = apply_lotr(
        LlamaForCausalLM(LlamaConfig(**sizes)).eval(), LoTRConfig(rank=4, target_modules="all-linear", train=("core",))
    )
    with torch.no_grad():
        for core in lotr_parameters(model):
            core.normal_()
    return model


@torch.no_grad()
def answered(model: nn.Module, prompt: list[int], ids: list[int], reward: float) -> dict:
    """An answer as vLLM gives it, by the model itself, row by row and without padding."""
    logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return {"prompt": prompt, "ids": ids, "logprobs": [float(row[i]) for row, i in zip(logits, ids)], "reward": reward}


def test_rows_of_any_length_have_their_own_likelihoods():
    model = tiny()
    answers = [answered(model, p, ids, 0) for p, ids in (([3, 4, 5], [7]), ([6, 7, 8, 9, 10], [1, 2, 3, 4]), ([9], [5, 6]))]
    ours, theirs, tokens = rl_cores.likelihoods(model, answers)
    assert tokens.tolist() == [[0, 0, 0, 1], [1, 1, 1, 1], [0, 0, 1, 1]]
    torch.testing.assert_close(ours * tokens, theirs * tokens, atol=1e-5, rtol=0)


def test_a_step_makes_good_answers_likelier_and_sees_stale_ones():
    model = tiny()
    answers = [answered(model, [3, 4], [7, 8], 1.0), answered(model, [3, 4], [9, 1], 0.0)]
    optimizer = torch.optim.Adam(lotr_parameters(model), lr=0.02)
    assert rl_cores.update(model, optimizer, answers, 2) < 1e-5
    ours, theirs, _ = rl_cores.likelihoods(model, answers)
    assert ours[0].sum() > theirs[0].sum() and ours[1].sum() < theirs[1].sum()
    assert rl_cores.update(model, optimizer, answers, 2) > rl_cores.STALE  # these answers are of the version before


def test_the_gain_has_an_interval_over_the_same_prompts():
    mean, half = rl_cores.gained([0, 0, 1, 1], [1, 1, 1, 1])
    assert mean == 0.5 and half == pytest.approx(1.96 * (1 / 3) ** 0.5 / 2)
