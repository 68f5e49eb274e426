"""Runs a program in all worlds and says what is wrong with lotr_ext's, if anything.

Where plain torch works ours must work, and be as near to float64 as plain torch in the same dtype, up to a small factor. Where
plain torch raises (a saved tensor was changed in place) ours must raise at the same line, or give the number that a copy of
everything would have given.
"""

from __future__ import annotations

import math
import traceback
import warnings
from typing import NamedTuple

import torch
from programs.given import Decisions, Undecided
from programs.our_world import Ours
from programs.plain_world import Plain
from programs.worlds import World
from torch import Tensor

TIMES, SPACINGS, NOISE = 4.0, 16.0, 4.0  # of plain torch's error, of the dtype's spacing there, of what rounded inputs do


class Fault(NamedTuple):
    """kind: few words, the same for the same defect as far as can be told; text: for people."""

    kind: str
    text: str


class Run(NamedTuple):
    """What a world saw, and where it stopped: line None if at the end. finite: how much it saw before a layer's output left the
    dtype's range, None for all."""

    seen: list[tuple[str, Tensor | None, bool]]
    line: int | None
    error: BaseException | None
    finite: int | None = None


def run(program, world: World) -> Run:
    torch.default_generator.manual_seed(0)  # torch.manual_seed seeds every device, slowly
    try:
        program(world)
    except Exception as error:
        name = program.__code__.co_filename
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == name]
        error.__traceback__ = None
        return Run(world.seen, lines[0] if lines else 0, error, world.finite)
    return Run(world.seen, None, None, world.finite)


def check(program, dtype: torch.dtype) -> Fault | None:
    """dtype: the coarsest in which the program computes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _check(program, torch.finfo(dtype))


def _check(program, dtype: torch.finfo) -> Fault | None:
    decisions = Decisions()
    ours = run(program, Ours(decisions))
    plain, truth = run(program, Plain(decisions)), run(program, Plain(decisions, exact=True))
    for world in (plain, truth):
        if world.error is not None and not isinstance(world.error, (RuntimeError, Undecided)):
            return Fault(f"bad program: {world.error!r}"[:100], f"line {world.line}: no world can run it: {world.error!r}")
        if isinstance(world.error, Undecided) and (ours.line is None or ours.line > world.line):
            return Fault("another path", f"line {world.line}: plain torch drops there, or may be refused, ours does neither")
    # casts copy, so in half precision plain torch may work where in one dtype throughout it raises
    stops = [world.line for world in (plain, truth) if isinstance(world.error, RuntimeError)]
    if ours.line is not None and (not stops or ours.line < min(stops)):
        kind = f"raises {type(ours.error).__name__} where plain torch works"
        return Fault(kind, f"line {ours.line}: {kind}: {ours.error}")
    if not stops:
        return _compare_all(program, decisions, ours, plain, truth, dtype)
    right = run(program, Plain(decisions, exact=True, keep=True))
    fault = _compare_all(program, decisions, ours, plain, right, dtype)
    if fault is None and ours.line is None:
        # what plain torch would have reached in this dtype, without what it raised for
        same = run(program, Plain(decisions, keep=True, once=True))
        same = same if same.error is None and len(same.seen) == len(right.seen) else right
        loose = [(label, t if t is None else t.detach(), False) for label, t, _ in same.seen]
        fault = _compare_all(
            program, decisions, ours, same._replace(seen=loose), right, dtype, after=len(plain.seen), loose=True
        )
        if fault is not None:
            text = f"line {min(stops)}: plain torch raises there, ours gives another number: {fault.text}"
            return Fault("wrong where plain torch raises", text)
    return fault


def _compare_all(
    program, decisions: Decisions, ours: Run, plain: Run, truth: Run, dtype: torch.finfo, after: int = 0, loose: bool = False
) -> Fault | None:
    """The first number that is not as it should be. after: how many were compared with plain torch already.
    loose: whatever their dtypes."""
    allowed: list[float] = []
    for i, seen in enumerate(zip(ours.seen, plain.seen, truth.seen)):
        if i < after:
            continue
        if plain.finite is not None and i >= plain.finite:
            return None
        if seen[0][0] == seen[1][0] != seen[2][0]:
            return None  # casts and the twin's `read` decide whether there is a second gradient: from here on there is no truth
        fault = _compare(*seen, dtype, 0.0, loose)
        if fault is not None and fault.kind.startswith("wrong number"):
            allowed = allowed or _noise(program, decisions, truth, dtype.eps)
            fault = _compare(*seen, dtype, allowed[i], loose)
        if fault is not None:
            return fault
    if ours.line is None and plain.line is None and len(ours.seen) != len(plain.seen):
        return Fault("another path", f"ours shows {len(ours.seen)} tensors, plain torch {len(plain.seen)}")
    return None


def _noise(program, decisions: Decisions, truth: Run, eps: float) -> list[float]:
    """How far each number moves when every value of the program moves by a rounding."""
    moved = [0.0] * len(truth.seen)
    for seed in range(6):
        other = run(program, Plain(decisions, exact=True, keep=True, jitter=eps, jitter_seed=seed))
        for i, ((label, a, _), (other_label, b, _)) in enumerate(zip(truth.seen, other.seen)):
            if a is not None and b is not None and label == other_label and a.shape == b.shape:  # else threads took turns anew
                moved[i] = max(moved[i], _distance(a, b))
    return moved


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max()) if a.numel() else 0.0


def _compare(ours, plain, truth, dtype: torch.finfo, noise: float, loose: bool) -> Fault | None:
    (label, got, got_grad), (plain_label, same, same_grad), (truth_label, want, _) = ours, plain, truth
    part = "grad" if "grad" in label else "value"
    if not label == plain_label == truth_label:
        return Fault("another path", f"ours shows {label}, plain torch {plain_label}, float64 {truth_label}")
    if (want is None) != (same is None):
        return None  # a cast decides whether plain torch has one
    if want is None:
        if got is not None:
            return Fault(f"{part} where plain torch has none", f"{label}: expected none, got {got}")
        return None
    if got is None:
        if bool((want != 0).any()) and bool((same != 0).any()):
            return Fault(f"no {part}", f"{label}: expected a gradient, got None")
        return None
    if got.shape != same.shape or (got.dtype != same.dtype and not loose):
        what = f"expected {same.dtype} {tuple(same.shape)}, got {got.dtype} {tuple(got.shape)}"
        return Fault(f"another shape or dtype of a {part}", f"{label}: {what}")
    if got_grad != same_grad and not loose:
        return Fault("requires_grad", f"{label}: expected requires_grad {same_grad}, got {got_grad}")
    if not got.numel():
        return None
    error, plain_error, size = _distance(got, want), _distance(same, want), float(want.abs().max())
    if not math.isfinite(plain_error) or (loose and not math.isfinite(error)):
        return None  # beyond the dtype's range in plain torch too, or for all that is known
    # numbers of a dtype lie eps apart in proportion to their size, but below its smallest normal one no closer
    spacing = dtype.eps * max(size, dtype.smallest_normal)
    most = TIMES * plain_error + SPACINGS * spacing + NOISE * noise
    if error <= most or (
        not math.isfinite(error) and NOISE * noise >= size
    ):  # where roundings decide all, they decide this too
        return None
    what = f"{label}: error {error:.3g} where |truth| is {size:.3g} and plain torch's error {plain_error:.3g}"
    return Fault(f"wrong number: {part if math.isfinite(error) else 'not finite'}", what)
