"""A layer or block on a GPU in three forms: timed by the device's clock, eagerly, and as CUDA graphs."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from .bounds import DIRECTIONS
from .session import Session
from .timing import Clock, Timed, against, captured, interleave, with_sum

Stages = dict[str, dict]  # of each direction: quartiles of seconds, and of the ratio to the floor
FORMS = {"eager": "with Python and launches", "graph": "as CUDA graphs"}


def stages(own: Sequence[Sequence[float]], floor: Sequence[Sequence[float]], names: Sequence[str] = DIRECTIONS) -> Stages:
    """Each stage of one rival and their sum ("step") against the floor, from times[stage][round]; names: of them all."""
    return {name: against(*times) for name, *times in zip(names, with_sum(own), with_sum(floor))}


def more_forms(
    session: Session,
    names: Sequence[str],
    calls: Sequence[Timed],
    floor: str,
    slice_s: float,
    deal: Callable[[random.Random], None] = lambda draw: None,
) -> dict[str, dict[str, Stages]]:
    """{rival: {"eager": Stages, "graph": Stages}} where the clock is a GPU's events; {} elsewhere.

    eager: from an idle device to an idle one, a direction. graph: each direction captured and replayed; a rival that cannot be
    captured is named and lacks it. Everything starts with a cold L2.
    """
    found: dict[str, dict[str, Stages]] = {name: {} for name in names}
    if session.clock.kind != "events":
        return found
    ways: dict[str, tuple[Clock, dict[str, Timed]]] = {"eager": (Clock(session.device, "wall"), dict(zip(names, calls)))}
    graphs: dict[str, Timed] = {}
    for name, call in zip(names, calls):
        with session.attempt(f"{name} as a CUDA graph", ends=()):
            graphs[name] = captured(call, session.device)
    ways["graph"] = (session.clock, graphs)
    for form, (clock, ready) in ways.items():
        if floor not in ready:
            continue
        with session.attempt(f"as {form}", ends=()):  # the device's own times are measured already, and kept
            times = interleave(list(ready.values()), clock, session.options.rounds, slice_s, True, deal)
            own = dict(zip(ready, times))
            for name in ready:
                found[name][form] = stages(own[name], own[floor])
    return found
