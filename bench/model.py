"""A transformer trained with each method, at equal rank and at equal size: step time, tokens per second, memory, adapter bytes.

    python -m bench.model                     MiniLM's shape, q and v; SmolLM2-135M's, a causal language model with all linear
                                              layers adapted; rank 16. On a GPU eight layers of Llama-3's, both ways
    python -m bench.model --quick             the first of them, the main methods, few rounds
    python -m bench.model --model minilm --rank 8 --targets query,key,value --batch 16 --sequence 64
    python -m bench.model --model minilm --targets query,key,value,dense --batch 4 --sequence 128 --threads 1 --clock cpu \\
        --methods lotr_ext,frozen-compiled,lotr_ext-compiled
    python -m bench.model --model minilm --dtypes fp32 --clock cpu --methods lotr_ext,lotr_ext-per-example

Weights are random: times do not depend on them. One step is forward, a loss, backward, AdamW. The loss of a language model is
its own, the cross-entropy of the next tokens; that of an encoder the mean square of the last hidden states less a fixed random
target. All methods share the frozen weights and take their steps in turn, one a round; a time is the median over rounds, an
excess the median of per-round ratios to the frozen model, which goes forward and backward too. The gradient of our cores is
compared with the eager formula's first; a case where it is wrong is named and left out. Adapters have the dtype that their
users get: PEFT's and ours float32, the original's the model's own. Results go to bench/results/<machine>/model.jsonl.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .measure.counted import peak_bytes
from .measure.names import chosen
from .measure.session import ROUNDS, Session, Table, add_options, bytes_text, check_options, start, time_text
from .measure.shapes import DTYPES
from .measure.timing import Timed, against, check_error, interleave, with_sum
from .pictures import draw_measured
from .rivals import model as mr

RANK = 16
STAGES = ("forward", "backward", "optimizer", "step")
TOLERANCE = {"fp32": 1e-3, "bf16": 0.1, "fp16": 0.1}  # of our cores' gradients against the eager formula's, through all layers


class ModelCase(NamedTuple):
    """One model and batch, trained by all methods side by side."""

    model: str
    targets: str
    batch: int
    sequence: int
    r: int
    dtype: str
    threads: int

    def name(self) -> str:
        return f"{self.model} ({self.targets}) {self.batch}x{self.sequence} r{self.r} {self.dtype} t{self.threads}"


class Training:
    """One method's model, its optimizer and its steps on one fixed batch. target: of the last hidden states; None where the
    model, a language model, has a loss of its own."""

    def __init__(self, case: ModelCase, base: nn.Module, method: mr.Method, rank: int, ids: Tensor, target: Tensor | None):
        torch.manual_seed(1)
        self.model = method.make(mr.twin(base), tuple(case.targets.split(",")), rank)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-3) if self.parameters else None
        self.ids, self.target = ids, target
        self.loss: Tensor | None = None

    def forward(self, _: object = None) -> Tensor:
        if self.target is None:
            return self.model(input_ids=self.ids, labels=self.ids).loss
        return nn.functional.mse_loss(self.model(input_ids=self.ids).last_hidden_state.float(), self.target)

    def backward(self, loss: Tensor) -> Tensor:
        loss.backward()
        return loss

    def update(self, loss: Tensor) -> None:
        if self.optimizer is not None:
            self.optimizer.step()
        self.loss = loss.detach()

    def timed(self) -> Timed:
        return Timed((self.forward, self.backward, self.update), self.drop_gradients)

    def drop_gradients(self) -> None:
        for p in self.parameters:
            p.grad = None

    def step(self) -> None:
        self.drop_gradients()
        self.update(self.backward(self.forward()))

    def state_bytes(self) -> int:
        """Trained parameters, their gradients and the optimizer's state."""
        state = self.optimizer.state.values() if self.optimizer is not None else ()
        kept = [t for values in state for t in values.values() if isinstance(t, Tensor) and t.dim()]
        return sum(p.nbytes * 2 for p in self.parameters) + sum(t.nbytes for t in kept)


def gradient_error(eager: Training, ours: Training) -> float:
    """Relative error of our cores' gradients against the eager formula's, at the same factors and cores. Changes eager's and
    ours' values, so they are trained from there on."""
    from lotr_ext.model.adapted import adapted_layers

    wrapped = [m for m in eager.model.modules() if isinstance(m, mr.EagerLoTR)]
    layers = list(adapted_layers(ours.model).values())
    with torch.no_grad():
        for theirs, layer in zip(wrapped, layers):
            factors = dict(layer.factors.named_parameters())
            theirs.core.normal_(std=0.1)
            for mine, value in ((factors["A"], theirs.A), (factors["B"], theirs.B), (layer.core, theirs.core)):
                mine.copy_(value)
    for training in (eager, ours):
        training.drop_gradients()
        training.backward(training.forward())
    expected = torch.cat([theirs.core.grad.double().flatten() for theirs in wrapped])
    found = torch.cat([layer.core.grad.double().flatten() for layer in layers])
    return ((found - expected).norm() / expected.norm()).item()


def measure(case: ModelCase, names: list[str], session: Session) -> list[dict]:
    """One result per method."""
    device, dtype = session.device, DTYPES[case.dtype]
    base = mr.base_model(case.model, dtype, device)
    widths = mr.adapted_widths(base, tuple(case.targets.split(",")))
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, base.config.vocab_size, (case.batch, case.sequence), generator=generator).to(device)
    target = None
    if case.model not in mr.CAUSAL:
        target = torch.randn(case.batch, case.sequence, base.config.hidden_size, generator=generator).to(device)
    group = {}
    for name in names:
        rank = mr.KNOWN[name].rank(widths, case.r)
        group[name] = Training(case, base, mr.KNOWN[name], rank, ids, target), rank
    error = None
    if mr.OURS in group and "lotr-eager" in group:
        error = gradient_error(group["lotr-eager"][0], group[mr.OURS][0])
        check_error("lotr_ext's gradient of the cores: ", error, TOLERANCE[case.dtype])
    results = []
    for name, (training, rank) in group.items():
        training.step()
        first = finite(training.loss)
        count = sum(p.numel() for p in training.parameters)
        result = {"rival": name, "label": mr.KNOWN[name].label, "rank": rank, "parameters": count, "first_loss": first}
        result |= {"adapter_bytes": sum(p.nbytes for p in training.parameters), "state_bytes": training.state_bytes()}
        training.drop_gradients()
        training.loss = None
        result["peak_bytes"] = peak_bytes(training.step, device)
        results.append(result | ({"error": error} if name == mr.OURS else {}))
    trainings = [training for training, _ in group.values()]
    times = interleave([t.timed() for t in trainings], session.clock, session.options.rounds, 0.0)
    totals = [with_sum(stages) for stages in times]
    floor = totals[names.index(mr.FLOOR)]
    ours = totals[names.index(mr.OURS)] if mr.OURS in names else None
    for result, own, training in zip(results, totals, trainings):
        result |= {"last_loss": finite(training.loss), "optimizer_seconds": sorted(own[2])[len(own[2]) // 2]}
        result |= {stage: against(own[i], floor[i]) for i, stage in enumerate(STAGES) if stage != "optimizer"}
        if result["rival"] == mr.PER_EXAMPLE and ours is not None:
            result["over_ours"] = against(own[-1], ours[-1])["excess"]
        result["tokens_per_s"] = case.batch * case.sequence / result["step"]["seconds"][1]
    lost = [result["label"] for result in results if None in (result["first_loss"], result["last_loss"])]
    if lost:
        session.say(f"{case.name()}: the loss is not finite, kept as null: {', '.join(lost)}")
    return results


def finite(loss: Tensor) -> float | None:
    """The value, or None if it is not finite, since JSON has no NaN. That happens in fp16, where AdamW's eps of 1e-8 is 0."""
    value = loss.item()
    return value if math.isfinite(value) else None


def show(case: ModelCase, results: list[dict], session: Session) -> None:
    lora = next((r for r in results if r["rival"] == mr.LORA), None)
    heads = ["", "rank", "parameters", "adapter", "forward", "backward", "optimizer", "step", "(quartiles)", "over frozen"]
    table = Table(case.name(), *heads, "x LoRA's step", "tokens/s", "peak", "x LoRA's peak", "state")
    for r in results:
        times = [time_text(r[s]["seconds"][1]) for s in ("forward", "backward")] + [time_text(r["optimizer_seconds"])]
        low, step, high = r["step"]["seconds"]
        spread = f"{time_text(low)}, {time_text(high)}"
        over = "" if r["rival"] == mr.FLOOR else f"{r['step']['excess'][1]:.1%}"
        ratio = f"{step / lora['step']['seconds'][1]:.3f}" if lora else ""
        peak = f"{r['peak_bytes'] / lora['peak_bytes']:.3f}" if lora else ""
        sizes = [str(r["rank"] or ""), f"{r['parameters']:,}", bytes_text(r["adapter_bytes"])]
        memory = [bytes_text(r["peak_bytes"]), peak, bytes_text(r["state_bytes"])]
        steps = [time_text(step), spread, over, ratio]
        table.add_row(r["label"], *sizes, *times, *steps, f"{r['tokens_per_s']:,.0f}", *memory)
        if "over_ours" in r:
            table.caption = "{label}: {0:.3f} x lotr_ext's step, per round ({1:.3f} to {2:.3f})".format(
                *(1 + r["over_ours"][i] for i in (1, 0, 2)), label=r["label"]
            )
    print(table)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.model", description=__doc__.split("\n")[0])
    add_options(parser, dtypes="fp32,bf16; quick: fp32; GPU: bf16")
    parser.add_argument("--quick", action="store_true", help="the main methods, few rounds")
    parser.add_argument("--model", help=f"some of {', '.join(mr.SHAPES)}")
    parser.add_argument("--targets", help="names of the adapted layers, comma-separated (q and v; of a language model all)")
    parser.add_argument("--batch", type=int, help="sequences per step")
    parser.add_argument("--sequence", type=int, help="tokens per sequence")
    parser.add_argument("--rank", type=int, default=RANK, help=f"of every method at equal rank ({RANK})")
    parser.add_argument("--methods", help=f"some of {', '.join(mr.KNOWN)}")
    options = parser.parse_args(argv)
    dtypes = "bf16" if options.device == "cuda" else "fp32" if options.quick else "fp32,bf16"
    check_options(options, rounds=3 if options.quick else ROUNDS["model"], dtypes=dtypes)
    if options.model is None:
        large = options.device == "cuda" and torch.cuda.get_device_properties(0).total_memory > 60 * 2**30
        usual = ("minilm", "smollm2-135m")
        if options.device == "cuda":
            usual = ("llama-8x4096", "llama-lm-8x4096") if large else ("llama-8x2048", "llama-lm-8x2048")
        options.model = ",".join(usual[:1] if options.quick else usual)
    options.models = options.model.split(",")
    for name in options.models:
        if name not in mr.SHAPES:
            raise ValueError(f"model: expected one of {', '.join(mr.SHAPES)}, or some, got {name!r}")
    given = [size for size in (options.batch, options.sequence, options.rank) if size is not None]
    if min(given) < 1:
        raise ValueError(f"batch, sequence, rank: expected at least 1, got {', '.join(map(str, given))}")
    if options.targets is not None and not all(options.targets.split(",")):
        raise ValueError(f"targets: expected names of layers, comma-separated, got {options.targets!r}")
    names = chosen("methods", options.methods, mr.KNOWN, ())
    if importlib.util.find_spec("transformers") is None:
        raise ValueError("model: needs the package transformers, which is not installed (pip install transformers)")
    options.without = mr.PEFTS if importlib.util.find_spec("peft") is None else ()
    lost = [name for name in names if name in options.without]
    if lost:
        raise ValueError(f"methods: {lost[0]} needs the package peft, which is not installed (pip install peft)")
    options.methods = names
    return options


def methods_of(model: str, options: argparse.Namespace) -> list[str]:
    """The chosen methods, or the model's default ones, that can run here; always the frozen model."""
    usual = mr.SHAPES[model].methods or (mr.QUICK if options.quick else tuple(mr.METHODS))
    names = options.methods or usual
    return [name for name in mr.KNOWN if (name in names or name == mr.FLOOR) and name not in options.without]


def case_of(model: str, dtype: str, threads: int, options: argparse.Namespace) -> ModelCase:
    """The case of a model, with its defaults for the options that are not given."""
    shape = mr.SHAPES[model]
    targets = ",".join(shape.targets) if options.targets is None else options.targets
    batch = shape.batch if options.batch is None else options.batch
    sequence = shape.sequence if options.sequence is None else options.sequence
    return ModelCase(model, targets, batch, sequence, options.rank, dtype, threads)


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    session = Session(options, "model.jsonl")
    session.introduce()
    for name in options.without:
        session.say(f"{name}: left out, the package peft is not installed")
    groups = [(dtype, threads) for threads in options.threads for dtype in options.dtypes]
    cases = [case_of(name, *group, options) for name in options.models for group in groups]
    session.run(
        cases,
        lambda case: methods_of(case.model, options),
        lambda case: measure(case, methods_of(case.model, options), session),
        show,
    )
    return session.finish(draw_measured)


if __name__ == "__main__":
    start("bench.model", main)
