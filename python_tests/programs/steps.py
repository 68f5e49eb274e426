"""A whole program: layers, then rounds of forwards, backwards and all that users do between them."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import strategies as st
from hypothesis.control import current_build_context
from programs.backwards import backward, double, partial, separate
from programs.builder import Builder
from programs.changes import (
    change_parameter,
    copied,
    failing,
    freeze,
    hook,
    in_place,
    merged,
    merged_training,
    mode,
    off,
    optimizer_step,
    parametrized,
    reparametrized,
    replace,
    saved,
    state,
    switched,
    turn_off,
    unloaded,
)
from programs.contexts import bank, in_threads, mixed, nested, threaded
from programs.experts import experts, long_groups
from programs.forwards import bare, checkpointed, forward, functional, kept_elsewhere, siblings, unrecorded, view
from programs.making import make_layers, make_net
from programs.rare import gradient_start, interrupted, made_cores, refused

FORWARDS = (forward, forward, siblings, siblings, checkpointed, functional, bare, unrecorded, view, kept_elsewhere)
BACKWARDS = (backward, backward, separate, partial, double)
CHANGES = (
    *(in_place, in_place, change_parameter, replace, freeze, optimizer_step, turn_off, mode, hook, failing),
    *(merged, merged_training, reparametrized, parametrized, parametrized, state, threaded, copied),
    *(experts, long_groups, made_cores, gradient_start, refused, interrupted),
)
WHOLE = (saved, switched, switched, off, mixed, bank, nested, in_threads)


def programs() -> st.SearchStrategy[Builder]:
    """Whole programs."""
    return st.builds(whole)


def whole() -> Builder:
    """A program, whose choices are drawn below the level of strategies: from one strategy to another hypothesis copies what it
    has drawn, and half of all programs were others with a change."""
    b = Builder(current_build_context().data.draw_integer)
    # none is little; or about half of the calls, often of one program: one node, else two
    b.line(f"w.little_work({b.one_of(0, 10_000)})")
    in_net = b.chance(0.4)
    make_net(b) if in_net else make_layers(b)
    for _ in range(b.number(1, 6)):
        for step in steps_of_a_round(b):
            step(b)
    if b.net is not None and b.chance(0.1):
        unloaded(b)
    return b


def steps_of_a_round(b: Builder) -> list[Callable[[Builder], None]]:
    """A few changes between forwards, and then backwards, each perhaps none."""
    changes = (*CHANGES, *WHOLE) if b.net is not None else CHANGES
    chosen = [b.one_of(*changes)] if b.chance(0.5) else []
    chosen += [b.one_of(*FORWARDS) for _ in range(b.number(1, 2))]
    chosen += [b.one_of(*changes)] if b.chance(0.3) else []
    chosen += [b.one_of(*BACKWARDS) for _ in range(b.number(0, 2))]
    return chosen
