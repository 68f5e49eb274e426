"""The linear layers of a transformer's block together, in which siblings share u = x A and the pass over
x for its gradient. A projection like that of a single layer (`projection`), without norms, attention and activations.

LoTR's layers of one shape are a group, so k and v are siblings, and gate and up. LoRA is adapted layer by layer, or with q, k
and v, and gate and up, stacked into one product each (`rivals.block`).
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

import torch
from torch import Tensor

from ..measure.bounds import Work
from ..measure.shapes import Case, Shape
from ..rivals.base import parameter
from ..rivals.block import GATE_UP, MODELS, QKV, RIVALS, Sizes, stacked_lora
from .cards import CARDS, Card
from .counts import ELEMENT, Key, Row
from .layer import (
    BETA,
    CountedOperators,
    Step,
    Steps,
    base_step,
    expand_step,
    kernel_step,
    library_steps,
    our_steps,
    pack_steps,
)
from .layer_time import Excess, Levels, over_frozen, table_of

Block = tuple[str, int, int]  # model, tokens, rank
LAYERS = 32  # of a group, as in Llama-3-8B: fold and fold_grad are one launch for all of them
BLOCKS = "llama-3-8b:8192:16"  # counted by default
INPUTS = (QKV, ("o",), GATE_UP, ("down",))  # layers that read one x
PER_LAYER = ("lora-eager", "lora-in-place-beta")
STACKED, UNSHARED, SHARED = "lora-stacked", "lotr_ext beta, siblings off", BETA


def parse(text: str) -> list[Block]:
    """MODEL:TOKENS:RANK, comma-separated; none of "". Raises ValueError for anything else."""
    found = []
    for part in text.split(",") if text else ():
        model, *sizes = part.split(":")
        if model not in MODELS or len(sizes) != 2 or not all(size.isdigit() and int(size) > 0 for size in sizes):
            raise ValueError(f"blocks: expected MODEL:TOKENS:RANK with MODEL of {', '.join(MODELS)}, got {part!r}")
        m, r = map(int, sizes)
        if r > 256:
            raise ValueError(f"blocks: expected ranks up to 256, what the CUDA kernels take, got {r}")
        found.append((model, m, r))
    return found


def shapes(block: Block) -> list[Shape]:
    """The shapes of the block's layers, each once."""
    model, m, r = block
    return list(dict.fromkeys((m, *MODELS[model].of(name), r) for names in INPUTS for name in names))


def _added(m: int, k: int) -> Step:
    """Autograd's sum of dx for one more reader of x."""
    return Step("add", Work(0, 3 * ELEMENT * m * k))


def _joined(parts: Iterable[Steps]) -> Steps:
    """Joins steps, in this order in forward and in reverse order in backward."""
    found: Steps = {"forward": [], "backward": []}
    for steps in parts:
        found["forward"] += steps["forward"]
        found["backward"] = steps["backward"] + found["backward"]
    return found


def _apart(sizes: Sizes, m: int, r: int, rival: str) -> Steps:
    """The steps of separate layers."""
    parts = []
    for names in INPUTS:
        for i, name in enumerate(names):
            k, n = sizes.of(name)
            own = library_steps(rival, Case(m, k, n, r, "bf16", 1))
            parts.append({"forward": own["forward"], "backward": own["backward"] + [_added(m, k)] * (i < len(names) - 1)})
    return _joined(parts)


def _stacked(sizes: Sizes, m: int, r: int) -> Steps:
    """torch's operators for stacked layers, recorded on tensors without data."""
    parts = []
    for names in INPUTS:
        k, widths = sizes.of(names[0])[0], [sizes.of(name)[1] for name in names]

        def empty(*shape: int) -> Tensor:
            return torch.empty(*shape, dtype=torch.bfloat16, device="meta")

        call = stacked_lora(
            empty(sum(widths), k), [parameter(empty(r, k)) for _ in names], [parameter(empty(n, r)) for n in widths]
        )
        x = empty(m, k).requires_grad_()
        with CountedOperators() as forward:
            outputs = call(x).split(widths, -1)
        with CountedOperators() as backward:
            torch.autograd.backward(outputs, [empty(m, n) for n in widths])
        parts.append({"forward": forward.steps, "backward": backward.steps})
    return _joined(parts)


def sibling_steps(m: int, k: int, widths: list[int], r: int, rows: dict[Key, Row], multiprocessors: int) -> Steps:
    """Layers of one group on one x, as LoTRShrink and LoTRExpand run them: u once; k and dx are summed from layer to layer, the
    last of which makes the one pass over x, and puts k A^T before its g W."""
    if len(widths) == 1:
        return our_steps(BETA, (m, k, widths[0], r), rows, multiprocessors, LAYERS)

    def kernel(name: str, rows_of: int, width: int) -> Step:
        return kernel_step((name, rows_of, width, r, multiprocessors), rows, layers=LAYERS)

    forward, backward = [*pack_steps(k, r), kernel("shrink", m, k)], []
    for n in widths:
        forward += [kernel("fold", 1, n), expand_step(m, n, r), base_step(m, k, n, accumulate=True)]
    for i, n in enumerate(reversed(widths)):
        backward += [kernel("shrink_grad", m, n), kernel("fold_grad", 1, n)]
        backward += [Step("sum of k", Work(0, 3 * ELEMENT * m * r))] * (i > 0)
        if i == len(widths) - 1:
            backward += [kernel("factor_grad", m, k), *pack_steps(k, r), kernel("expand_add", m, k)]
        backward.append(base_step(m, n, k, accumulate=i > 0))
    return {"forward": forward, "backward": backward}


def _ours(sizes: Sizes, m: int, r: int, rows: dict[Key, Row], multiprocessors: int, shared: bool) -> Steps:
    parts = []
    for names in INPUTS:
        groups = [list(own) for _, own in groupby(names, sizes.of)] if shared else [[name] for name in names]
        for i, own in enumerate(groups):
            k = sizes.of(own[0])[0]
            steps = sibling_steps(m, k, [sizes.of(name)[1] for name in own], r, rows, multiprocessors)
            more = [_added(m, k)] * (i < len(groups) - 1)
            parts.append({"forward": steps["forward"], "backward": steps["backward"] + more})
    return _joined(parts)


def all_steps(block: Block, rows: dict[Key, Row], multiprocessors: int) -> dict[str, Steps]:
    """Every way of the block, by name."""
    model, m, r = block
    sizes = MODELS[model]
    found = {rival: _apart(sizes, m, r, rival) for rival in ("frozen", *PER_LAYER)}
    found[STACKED] = _stacked(sizes, m, r)
    found[UNSHARED] = _ours(sizes, m, r, rows, multiprocessors, shared=False)
    found[SHARED] = _ours(sizes, m, r, rows, multiprocessors, shared=True)
    return found


def excess(block: Block, rows: dict[Key, Row], card: Card, levels: Levels) -> Excess:
    """Projected time over the frozen linear layers less one."""
    return over_frozen(all_steps(block, rows, card.multiprocessors), card, levels)


def label_of(name: str) -> str:
    return RIVALS[name][0] if name in RIVALS else name


def table(block: Block, rows: dict[Key, Row], levels: dict[str, Levels]):
    """Every way on every GPU of levels."""
    model, m, r = block
    columns = {gpu: excess(block, rows, CARDS[gpu], own) for gpu, own in levels.items()}
    labels = {name: label_of(name) for column in columns.values() for name in column}
    return table_of(f"Time over a {model} block's frozen linear layers in %, {m} tokens, r = {r}, bf16", columns, labels)
