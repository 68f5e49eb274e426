"""The model benchmark: sizes as the formulas say, our model's gradients equal to the eager formula's, results kept."""

from __future__ import annotations

import pytest
import torch

from bench import model, targets
from bench.measure.session import time_text
from bench.measure.store import Store
from bench.rivals import model as mr

QUICK = ["--device", "cpu", "--allocator", "system", "--threads", "1", "--rounds", "1", "--dtypes", "fp32", "--rank", "4"]
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["tiny-bert", "tiny-llama", "tiny-lm"])
def test_every_method_has_the_parameters_of_its_formula(name):
    base = mr.base_model(name, torch.float32, CPU)
    targets, r = mr.SHAPES[name].targets, 4
    widths = mr.adapted_widths(base, targets)
    lengths = sum(n for _, n in widths)  # a magnitude for each row
    count = {
        "lora-peft": mr.lora_parameters,
        "vera-peft": mr.vera_parameters,
        mr.DORA: lambda *given: mr.lora_parameters(*given) + lengths,
        mr.MAGNITUDE: lambda *given: mr.lotr_parameters(*given) + lengths,
        "lotr": mr.lotr_parameters,
    }
    for method, how in mr.METHODS.items():
        rank = how.rank(widths, r)
        made = how.make(mr.twin(base), targets, rank)
        got = sum(p.numel() for p in made.parameters() if p.requires_grad)
        if method == mr.FLOOR:
            assert got == 0
        elif method.endswith("-core"):
            assert got == len(widths) * r * r
        else:
            assert got == next(f for prefix, f in count.items() if method.startswith(prefix))(widths, rank), method
        if "-as-" in method:
            budget = (mr.lotr_parameters if method.endswith("lotr") else mr.lora_parameters)(widths, r)
            assert abs(got - budget) < 0.5 * budget, (method, got, budget)
    assert not any(p.requires_grad for p in base.parameters())
    shared = {p.data_ptr() for p in base.parameters()}
    kept = [p for p in made.parameters() if not p.requires_grad and p.dim() == 2 and p.shape[0] >= 32 and p.shape[1] >= 32]
    assert kept and all(p.data_ptr() in shared for p in kept)  # the copies hold the frozen weights together


def test_nearest_rank_is_nearest():
    widths = [(8, 8)] * 3
    for budget in (1, 100, 333):
        rank = mr.nearest_rank(mr.lotr_parameters, widths, budget)
        best = min(range(1, 40), key=lambda r: abs(mr.lotr_parameters(widths, r) - budget))
        assert rank == best
    # 12 x 16^2 + 2 x 16 x 384 parameters of LoTR are fewer than twice LoRA's rank-1 floor
    assert mr.lotr_parameters([(384, 384)] * 12, 16) == 15360 and mr.lora_parameters([(384, 384)] * 12, 1) == 9216


def test_gradients_of_each_sequence_are_compared_with_the_plain_step(tmp_path, capsys):
    methods = ["--methods", "lotr_ext,lotr_ext-per-example"]
    assert model.main([*QUICK, "--model", "tiny-bert", *methods, "--results", str(tmp_path)]) == 0
    by = {cell["rival"]: cell for cell in Store(tmp_path / "model.jsonl").read()}
    assert "lotr_ext, per example: " in capsys.readouterr().out and "over_ours" not in by["lotr_ext"]
    assert by["lotr_ext-per-example"]["over_ours"][1] == pytest.approx(
        by["lotr_ext-per-example"]["step"]["seconds"][1] / by["lotr_ext"]["step"]["seconds"][1] - 1  # of one round
    )
    base = mr.base_model("tiny-bert", torch.float32, CPU)
    kept = mr.KNOWN[mr.PER_EXAMPLE].make(mr.twin(base), ("query", "value"), 4)
    kept(input_ids=torch.zeros(3, 5, dtype=torch.long)).last_hidden_state.sum().backward()
    assert [gradient.shape for gradient in kept.gradients.values()] == [(3, 4, 4)] * 4


def test_it_measures_keeps_and_resumes(tmp_path, capsys):
    arguments = [*QUICK, "--model", "tiny-bert", "--results", str(tmp_path)]
    assert model.main(arguments) == 0
    cells = Store(tmp_path / "model.jsonl").read()
    assert [cell["rival"] for cell in cells] == list(mr.METHODS)
    by = {cell["rival"]: cell for cell in cells}
    for cell in cells:
        parts = sum(cell[stage]["seconds"][1] for stage in ("forward", "backward")) + cell["optimizer_seconds"]
        assert parts == pytest.approx(cell["step"]["seconds"][1])
        assert cell["tokens_per_s"] == pytest.approx(16 / cell["step"]["seconds"][1])
        if cell["rival"] != mr.FLOOR:
            assert cell["last_loss"] < cell["first_loss"], cell["rival"]
            assert cell["adapter_bytes"] == 4 * cell["parameters"]
            assert cell["state_bytes"] == 4 * cell["adapter_bytes"]  # value, gradient, two moments
    assert by["frozen"]["last_loss"] == by["frozen"]["first_loss"]
    assert by["lotr_ext"]["error"] < 1e-5
    assert by["lotr_ext"]["peak_bytes"] < by["lotr-eager"]["peak_bytes"]
    capsys.readouterr()
    assert model.main(arguments) == 0
    out = capsys.readouterr().out
    low, _, high = (time_text(s) for s in by["lotr_ext-as-lora"]["step"]["seconds"])
    assert "1 of 1 cases are in" in out and "lotr_ext, size of LoRA" in out and f"{low}, {high}" in out


def test_a_language_model_has_all_its_linear_layers_adapted(tmp_path, capsys):
    base = mr.base_model("tiny-lm", torch.float32, CPU)
    linear = [name for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)]
    assert len(mr.adapted_widths(base, mr.SHAPES["tiny-lm"].targets)) == len(linear) - 1 and "lm_head" in linear
    assert base.lm_head.weight is base.model.embed_tokens.weight
    arguments = [*QUICK, "--model", "tiny-bert,tiny-lm", "--results", str(tmp_path)]
    assert model.main([*arguments, "--dtypes", "fp32,bf16"]) == 0
    cells = Store(tmp_path / "model.jsonl").read()
    own = [cell for cell in cells if cell["case"]["model"] == "tiny-lm"]
    assert [cell["rival"] for cell in own] == 2 * [
        "frozen",
        "lora-peft",
        "lotr-eager",
        "lotr_ext",
        "dora-peft",
        "lotr_ext-magnitude",
    ]
    assert {cell["rival"] for cell in cells if cell["case"]["model"] == "tiny-bert"} == set(mr.METHODS)
    for cell in own:
        assert cell["first_loss"] == pytest.approx(4.6, abs=0.2)  # log 100: nothing is known of 100 tokens
        if cell["rival"] != mr.FLOOR and cell["case"]["dtype"] == "fp32":
            assert cell["last_loss"] < cell["first_loss"], cell["rival"]
    assert next(cell for cell in own if cell["rival"] == "lotr_ext")["error"] < 1e-4


def test_the_model_of_the_language_model():
    """SmolLM2-135M: 134,515,008 parameters, its head tied to the embedding."""
    with torch.device("meta"):
        made = mr.base_model("smollm2-135m", torch.float32, torch.device("meta"))
    assert sum(p.numel() for p in made.parameters()) == 134515008
    assert model.case_of("smollm2-135m", "fp32", 1, model.arguments(QUICK)).sequence == 128


@pytest.mark.parametrize(
    ("name", "ours", "lora", "lines", "met"),
    [
        ("smollm2-135m", [9.4, 9.5, 9.6], [9.9, 10, 10.1], [9.6, 9.7, 9.8], ["yes", "yes"]),
        ("smollm2-135m", [9.7, 9.8, 9.9], [9.9, 10, 10.1], [9.7, 9.7, 9.8], ["within the spread", "yes, within the spread"]),
        ("smollm2-135m", [9.9, 9.9, 9.9], [9.9, 10, 10.1], [9.6, 9.7, 9.8], ["no", "no"]),
        ("minilm", [9.9, 9.9, 9.9], [9.9, 10, 10.1], [9.6, 9.7, 9.8], ["yes"]),
    ],
)
def test_the_targets_of_a_step(name, ours, lora, lines, met):
    case = {"model": name, "batch": 1, "sequence": 8, "r": 16, "dtype": "fp32", "threads": 1}
    cells = [
        {"case": case, "rival": rival, "label": rival, "step": {"seconds": seconds}, "peak_bytes": 1}
        for rival, seconds in (("lotr_ext", ours), ("lora-peft", lora), ("lotr-eager", lines))
    ]
    found = [verdict for verdict in targets.model_verdicts(cells) if verdict.what.startswith("step")]
    assert [verdict.met for verdict in found] == met


def test_a_wrong_gradient_loses_its_case_alone(tmp_path, monkeypatch, capsys):
    right = mr.EagerLoTR.forward

    def wrong(self, x):
        return right(self, x) + (0.1 * x @ self.A @ self.core @ self.B.T if x.dtype == torch.float32 else 0.0)

    monkeypatch.setattr(mr.EagerLoTR, "forward", wrong)
    arguments = [*QUICK, "--model", "tiny-bert", "--methods", "lotr-eager,lotr_ext", "--results", str(tmp_path)]
    assert model.main([*arguments, "--dtypes", "fp32,bf16"]) == 1
    case = "not measured: tiny-bert (query,value) 2x8 r4 fp32 t1: "
    line = f"{case}ArithmeticError: lotr_ext's gradient of the cores: relative error expected <= 0.001, got "
    assert line in capsys.readouterr().out
    assert {cell["case"]["dtype"] for cell in Store(tmp_path / "model.jsonl").read()} == {"bf16"}


def test_a_loss_that_is_not_finite_is_kept_as_null(tmp_path, capsys):
    """AdamW's eps is 0 in fp16, and so is the square of a small gradient: the original's factors become NaN."""
    arguments = [*QUICK, "--model", "tiny-bert", "--methods", "lotr-eager,lotr_ext", "--results", str(tmp_path)]
    assert model.main([*arguments, "--dtypes", "fp16,fp32"]) == 0
    said = "tiny-bert (query,value) 2x8 r4 fp16 t1: the loss is not finite, kept as null: LoTR in three lines\n"
    assert said in capsys.readouterr().out
    losses = {(c["rival"], c["case"]["dtype"]): c["last_loss"] for c in Store(tmp_path / "model.jsonl").read()}
    assert [key for key, loss in losses.items() if loss is None] == [("lotr-eager", "fp16")] and len(losses) == 6


def test_dtypes_that_are_asked_for_are_measured(monkeypatch):
    plain = [a for a in QUICK if a not in ("--dtypes", "fp32")]
    assert model.arguments([*plain, "--quick"]).dtypes == ["fp32"]
    assert model.arguments([*plain, "--quick", "--dtypes", "fp32,bf16"]).dtypes == ["fp32", "bf16"]
    assert model.arguments(plain).dtypes == ["fp32", "bf16"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    gpu = ["--device", "cuda", "--model", "tiny-llama"]
    assert model.arguments(gpu).dtypes == ["bf16"]
    assert model.arguments([*gpu, "--dtypes", "fp32,bf16"]).dtypes == ["fp32", "bf16"]


def test_without_peft_the_rest_is_measured(monkeypatch):
    real = model.importlib.util.find_spec
    monkeypatch.setattr(model.importlib.util, "find_spec", lambda name: None if name == "peft" else real(name))
    options = model.arguments(QUICK)
    methods = model.methods_of("minilm", options)
    assert not set(methods) & set(mr.PEFTS) and {mr.FLOOR, mr.OURS, "lotr-eager"} <= set(methods)
    assert set(options.without) == {"lora-peft", "dora-peft", "vera-peft", "lora-peft-as-lotr", "vera-peft-as-lotr"}
    with pytest.raises(ValueError, match="methods: lora-peft needs the package peft, which is not installed"):
        model.arguments([*QUICK, "--methods", "lora-peft,lotr_ext"])
    monkeypatch.setattr(model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="model: needs the package transformers"):
        model.arguments(QUICK)


def test_unknown_targets_are_refused(tmp_path):
    with pytest.raises(ValueError, match="targets: expected names of linear layers in the model, got magic"):
        model.main([*QUICK, "--model", "tiny-bert", "--targets", "magic", "--results", str(tmp_path)])
