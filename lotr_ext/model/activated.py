"""`activated`: an index with a task per token, for adapters that begin within a row (activated LoRA, arXiv 2504.12397)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

__all__ = ["activated"]


def activated(input_ids: Tensor, tasks: Tensor | int, invocation: Sequence[int] | Mapping[int, Sequence[int]]) -> Tensor:
    """Returns an index [b, t] for `mixed`: in row i the tokens before the last occurrence of the invocation have no task, the
    tokens from its first token on have tasks[i]. A row without the invocation has no task.

        with mixed(model, activated(input_ids, task, invocation)):
            model.generate(input_ids)

    input_ids [b, t] (integers): all tokens of each row, including those in a cache. tasks: one for all rows, or [b] (int64), -1
    for none. invocation: the tokens that begin a task: one sequence for all tasks, or a mapping from task to sequence. The
    index is int64, on the device of input_ids.

    Raises:
        TypeError: input_ids or tasks of another type, or an invocation that is no sequence of ints. ValueError: other shapes,
            an empty invocation, or a task without one.
    """
    if not isinstance(input_ids, Tensor) or input_ids.is_floating_point() or input_ids.dtype == torch.bool:
        got = input_ids.dtype if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise TypeError(f"input_ids: expected a tensor of integers, got {got}")
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids: expected shape [b, t], got {tuple(input_ids.shape)}")
    (b, t), device = input_ids.shape, input_ids.device
    if isinstance(tasks, int) and not isinstance(tasks, bool):
        tasks = torch.full((b,), tasks, device=device)
    if not isinstance(tasks, Tensor) or tasks.dtype != torch.int64:
        got = tasks.dtype if isinstance(tasks, Tensor) else type(tasks).__name__
        raise TypeError(f"tasks: expected an int or an int64 tensor, got {got}")
    if tasks.shape != (b,):
        raise ValueError(f"tasks: expected one per row, shape ({b},), got {tuple(tasks.shape)}")
    tasks = tasks.to(device)
    position, index = torch.arange(t, device=device), torch.full((b, t), -1, device=device)
    for task, tokens in _by_task(tasks, invocation).items():
        found = _starts(input_ids, torch.tensor(tokens, device=device))
        first = torch.where(found, position[: found.shape[1]], -1).amax(1) if found.shape[1] else tasks.new_full((b,), -1)
        own = (first >= 0) & (tasks >= 0 if task is None else tasks == task)
        index = torch.where(own.unsqueeze(1) & (position >= first.unsqueeze(1)), tasks.unsqueeze(1), index)
    return index


def _by_task(tasks: Tensor, invocation: object) -> dict[int | None, list[int]]:
    """The invocation of each task, or under None the one of all tasks."""
    given = invocation if isinstance(invocation, Mapping) else {None: invocation}
    found = {}
    for task, tokens in given.items():
        if isinstance(tokens, str) or not isinstance(tokens, Sequence) or not all(type(token) is int for token in tokens):
            raise TypeError(f"invocation: expected a sequence of token ids, got {type(tokens).__name__} {tokens!r:.80}")
        if not tokens:
            raise ValueError("invocation: expected at least one token, got none")
        found[task] = list(tokens)
    if isinstance(invocation, Mapping) and (missing := set(tasks.tolist()) - {-1, *found}):
        raise ValueError(f"invocation: expected one for each task, got none for {min(missing)}")
    return found


def _starts(input_ids: Tensor, tokens: Tensor) -> Tensor:
    """[b, starts]: whether the tokens begin at each position."""
    if input_ids.shape[1] < len(tokens):
        return input_ids.new_zeros(len(input_ids), 0, dtype=torch.bool)
    return (input_ids.unfold(1, len(tokens), 1) == tokens).all(-1)
