"""CoreES: evolution strategies over cores, which train an adapter with forward passes only.

    g = 1 / (p s) sum_i w_i e_i      members G + s e_i, i = 1 .. p; w_i: the centred rank of member i's reward

g estimates the gradient of the expected reward with respect to the mean core G. The estimate, the ranks, the pairs G + s e,
G - s e and the exchange of rewards only between processes are from Salimans et al. 2017, arXiv 1703.03864.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ..layers.checks import check_dimension, check_number
from .tasks import Source, TaskBank, _changes

__all__ = ["CoreES"]

_AT_ONCE = 1 << 20  # numbers in the buffer that ask fills before it writes to the bank


class CoreES:
    """An evolution strategy whose members are tasks of a bank: one forward evaluates one member per row.

        es = CoreES(TaskBank(model, 256), population=256, sigma=0.05, lr=0.02)
        for _ in range(generations):
            index = es.ask()                              # [256], the slot of each member in the bank
            with torch.no_grad(), mixed(model, index):
                rewards = score(model(x))                 # [256], higher is better; x has a row for each member
            es.tell(rewards)
        bank.replace(int(index[0]), es.mean())            # a task of its own, for bank.save

    Only the order of the rewards matters, so a reward may be any number: an accuracy, an exact match, a preference. The model
    may be quantised, compiled or not differentiable. A, B and the other tasks of the bank do not change.

    The members are stored only in the bank. `tell` draws their directions again: those of generation t and pair j are standard
    normal numbers of numpy's Philox with the key (seed, t 2^32 + j), in the order of the bank's layers. Sums are computed in
    float64 in the order of the pairs, so the update has the same bits with any number of threads and processes.

    With several processes, each has a bank and a copy of the model and evaluates a part of the population. `tell` takes the
    rewards of this process's members, gathers those of all, and every process makes the same step.

    Attributes:
        generation (int): the number of steps so far.
        optimizer (torch.optim.Optimizer): of the mean core, for a schedule of its learning rate.
        sigma (float): the standard deviation of the perturbations. It may be changed between tell and ask.

    Args:
        bank: the members take free slots. Its cores [tasks, r_in, r_out] may be of experts, and the model's own cores of any
            form: the bank's are dense.
        population: members, at least 2; an even number if antithetic.
        sigma: above 0.
        lr: the optimizer's learning rate.
        optimizer: "adam" or "sgd" (torch.optim, maximising).
        antithetic: members 2 j and 2 j + 1 are G + sigma e_j and G - sigma e_j.
        seed: from 0 to 2^64 - 1, the same in all processes.
        start: the mean core at the beginning, a task as `TaskBank.add` takes it. None: zero, the base model.
        processes: (number of this process, how many), if the caller gathers the rewards: `tell` then takes those of all
            members. None: torch.distributed's default group if it is initialised, else one process.

    Raises:
        TypeError, ValueError: an invalid argument, more members than the bank has free slots, or a start that does not fit the
            bank. The bank is unchanged then.
    """

    def __init__(
        self,
        bank: TaskBank,
        population: int,
        sigma: float,
        *,
        lr: float,
        optimizer: Literal["adam", "sgd"] = "adam",
        antithetic: bool = True,
        seed: int = 0,
        start: Source | None = None,
        processes: tuple[int, int] | None = None,
    ):
        if not isinstance(bank, TaskBank):
            raise TypeError(f"bank: expected a TaskBank, got {type(bank).__name__}")
        check_dimension("population", population)
        if population < 2 or (antithetic and population % 2):
            even = ", an even number with antithetic=True" if antithetic else ""
            raise ValueError(f"population: expected at least 2 members{even}, got {population}")
        for name, value in (("sigma", sigma), ("lr", lr)):
            check_number(name, value)
            if value <= 0:
                raise ValueError(f"{name}: expected a number above 0, got {value}")
        if optimizer not in ("adam", "sgd"):
            raise ValueError(f'optimizer: expected "adam" or "sgd", got {optimizer!r}')
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed: expected an int, got {type(seed).__name__} {seed!r}")
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed: expected 0 to 2^64 - 1, got {seed}")
        self._gathers = processes is None and dist.is_available() and dist.is_initialized()
        rank, world = _processes(processes)
        if population < world:
            raise ValueError(f"population: expected at least one member for each of {world} processes, got {population}")
        self.bank, self.population, self.sigma = bank, population, float(sigma)
        self.antithetic, self.seed, self.generation = antithetic, seed, 0
        self._members = range(rank * population // world, (rank + 1) * population // world)
        self._slots, self._asked = _take(bank, len(self._members), start), False
        self._shapes = {name: core.shape for name, core in bank.cores_of(int(self._slots[0])).items()}
        parts = [core.detach().flatten().cpu() for core in bank.cores_of(int(self._slots[0])).values()]
        wide = torch.float64 if any(part.dtype == torch.float64 for part in parts) else torch.float32
        with torch.inference_mode(False):  # an inference tensor could not be written outside of inference mode
            self._mean = torch.cat([part.to(wide) for part in parts])
        kind = torch.optim.Adam if optimizer == "adam" else torch.optim.SGD
        self.optimizer = kind([self._mean], lr=lr, maximize=True)

    @torch.no_grad()
    def ask(self) -> Tensor:
        """Writes this process's members of the generation into the bank. A second call before tell writes the same members.

        Returns their slots [members] (int64), in the order of the members: the index for `mixed`. With n rows per member, use
        `index.repeat_interleave(n)`.

        Raises:
            RuntimeError: a member's slot was dropped from the bank.
        """
        if not bool(self.bank.taken[self._slots].all()):
            raise RuntimeError("ask: expected the members' slots in the bank, got one that was dropped; create a new CoreES")
        at_once = max(1, _AT_ONCE // len(self._mean))
        with torch.inference_mode(self.bank.cores[0].is_inference()), _changes:  # else the version counter would not change
            for first in range(0, len(self._members), at_once):
                members, slots = self._members[first : first + at_once], self._slots[first : first + at_once]
                values = self._mean.new_empty(len(members), len(self._mean))
                for member, value in zip(members, values, strict=True):
                    sign = -1 if self.antithetic and member % 2 else 1
                    torch.add(self._mean, self._direction(member), alpha=sign * self.sigma, out=value)
                for core, part in zip(self.bank.cores, self._by_layer(values), strict=True):
                    core.index_copy_(0, slots.to(core.device), part.to(core.device, core.dtype))
        self._asked = True
        return self._slots.clone()

    @torch.inference_mode(False)  # optimizer state made in inference mode could not be written outside of it
    def tell(self, rewards: Tensor | Sequence[float]) -> None:
        """Moves the mean core by one step, from the members' rewards.

        rewards: [members], a number for each member of the last `ask`, in its order; higher is better. Use -inf for a member
        that failed. Equal rewards share the mean of their ranks. If `processes` was given: [population].

        Raises:
            RuntimeError: no ask since the last tell, or processes with different seeds, settings or means. TypeError,
                ValueError: no numbers, NaN among them, or another shape. No process changes anything then.
        """
        if not self._asked:
            raise RuntimeError("tell: expected a call of ask before it, got none; call ask and evaluate its members")
        weights = _centred_ranks(self._gathered(rewards))
        if self.antithetic:
            weights = weights[0::2] - weights[1::2]
        total, step = torch.zeros_like(self._mean, dtype=torch.float64), 1 + self.antithetic
        for pair, weight in enumerate(weights.tolist()):
            if weight:
                total.add_(self._direction(step * pair).double(), alpha=weight)
        self._mean.grad = (total / (self.population * self.sigma)).to(self._mean.dtype)
        self.optimizer.step()
        self._mean.grad = None
        self.generation, self._asked = self.generation + 1, False

    def mean(self) -> dict[str, Tensor]:
        """A copy of the mean core [r_in, r_out] of each layer (experts: [e, r_in, r_out]) in float32 or float64, by the names
        that `TaskBank.add` and `replace` take."""
        return dict(zip(self._shapes, self._by_layer(self._mean.clone()), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """The state for torch.save: numbers, strings and tensors. A resumed run continues with `ask`."""
        same = {"population": self.population, "antithetic": self.antithetic, "optimizer": type(self.optimizer).__name__}
        moving = {"seed": self.seed, "sigma": self.sigma, "generation": self.generation, "mean": self._mean.clone()}
        return same | moving | {"moments": self.optimizer.state_dict(), "bank": self._bank()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a state: the run continues with the same bits as one that was never interrupted.

        The number of processes may differ. seed, sigma and the learning rate are taken from the state.

        Raises:
            TypeError, ValueError: no state of a CoreES, or one of another population, optimizer, or bank (other layers, shapes,
                factors or scalings). Nothing is changed then.
        """
        own = self.state_dict()
        if not isinstance(state, Mapping) or set(state) != set(own):
            raise TypeError(f"state: expected a dictionary from CoreES.state_dict, got {type(state).__name__}")
        for name in ("population", "antithetic", "optimizer", "bank"):
            if state[name] != own[name]:
                raise ValueError(f"state: expected {name} {own[name]!s:.200}, got {state[name]!s:.200}")
        self.optimizer.load_state_dict(state["moments"])
        self._mean.copy_(state["mean"])
        self.seed, self.sigma, self.generation = state["seed"], state["sigma"], state["generation"]
        self._asked = False

    # ---- details -----------------------------------------------------------------------------------------------------

    def _direction(self, member: int) -> Tensor:
        """The direction e of a member [numbers of a task], without its sign."""
        pair = member // 2 if self.antithetic else member
        draw = np.random.Generator(np.random.Philox(key=np.array([self.seed, (self.generation << 32) + pair], dtype=np.uint64)))
        return torch.from_numpy(draw.standard_normal(len(self._mean), dtype=np.float32)).to(self._mean.dtype)

    def _by_layer(self, values: Tensor) -> Iterator[Tensor]:
        """Splits [..., numbers of a task] into [..., r_in, r_out] for each layer."""
        parts = values.split([shape.numel() for shape in self._shapes.values()], dim=-1)
        return (part.unflatten(-1, shape) for part, shape in zip(parts, self._shapes.values(), strict=True))

    def _gathered(self, rewards: Tensor | Sequence[float]) -> Tensor:
        """The rewards [population] of all members in float64. An error is raised only after all processes have sent."""
        if not self._gathers:
            return _checked(rewards, self.population)
        wrong, own = None, []
        try:
            own = _checked(rewards, len(self._members)).tolist()
        except (TypeError, ValueError) as error:
            wrong = error
        digest = hashlib.sha256(self._mean.numpy().tobytes()).hexdigest()
        sent = (self.seed, self.generation, self.sigma, self.population, digest), own
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, sent)
        if wrong is not None:
            raise wrong
        if bad := [rank for rank, (_, part) in enumerate(found) if not part]:
            raise ValueError(f"rewards: expected rewards of all processes, got an error in process {bad[0]}; see its message")
        if others := [rank for rank, (settings, _) in enumerate(found) if settings != sent[0]]:
            raise RuntimeError(
                f"tell: expected the same seed, generation, sigma, population and mean in all processes, got different ones in "
                f"process {others[0]}; give all processes the same arguments and state"
            )
        return torch.tensor([reward for _, part in found for reward in part], dtype=torch.float64, device="cpu")

    def _bank(self) -> dict[str, Any]:
        """The properties of the bank that must equal those of a state's bank."""
        return {**self.bank._metadata(), "shapes": {name: tuple(shape) for name, shape in self._shapes.items()}}


def _take(bank: TaskBank, members: int, start: Source | None) -> Tensor:
    """Takes a slot for each member; the first one gets the start."""
    with _changes:
        free = int((~bank.taken).sum())
        if members > free:
            raise ValueError(
                f"population: expected at most {free} members in this process, the bank's free slots, got {members}"
            )
        return torch.tensor([bank.add(start), *(bank.add() for _ in range(members - 1))], device="cpu")


def _processes(processes: tuple[int, int] | None) -> tuple[int, int]:
    """(number of this process, how many there are)"""
    if processes is None:
        return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)
    if not isinstance(processes, tuple) or [type(n) for n in processes] != [int, int]:
        raise TypeError(f"processes: expected (number of this process, how many), got {processes!r}")
    if not 0 <= processes[0] < processes[1]:
        raise ValueError(f"processes: expected a number below {processes[1]}, how many there are, got {processes[0]}")
    return processes


def _checked(rewards: Tensor | Sequence[float], members: int) -> Tensor:
    """rewards as float64 [members] on the CPU."""
    try:
        found = torch.as_tensor(rewards, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"rewards: expected a tensor or a list of numbers, got {type(rewards).__name__}") from None
    if found.is_complex():
        raise TypeError(f"rewards: expected real numbers, got {found.dtype}")
    if found.shape != (members,):
        raise ValueError(f"rewards: expected shape ({members},), one per member, got {tuple(found.shape)}")
    found = found.double()
    if bool(found.isnan().any()):
        raise ValueError(f"rewards: expected numbers, got nan for member {int(found.isnan().nonzero()[0])}; use -inf instead")
    return found


def _centred_ranks(rewards: Tensor) -> Tensor:
    """[n] -> [n] from -1/2 for the lowest to 1/2; equal rewards have the mean of their ranks."""
    _, which, counts = torch.unique(rewards, return_inverse=True, return_counts=True)
    ranks = counts.cumsum(0).double() - (counts + 1) / 2
    return ranks[which] / (len(rewards) - 1) - 0.5
