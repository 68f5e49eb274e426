"""Layers whose frozen weight is a DTensor, sharded over the processes of a mesh by rows or by columns (tensor parallelism).

    rows of W     (ColwiseParallel)   y_p = x W_p^T + bias_p + s ((x A) G) B_p^T        B_p: the same rows of B
    columns of W  (RowwiseParallel)   y = sum_p x_p W_p^T + s ((x_p A_p) G) B^T, + bias  A_p: the rows of A for x_p

Each process runs its layer on local tensors, with the same nodes as other layers. A, B and the cores are plain tensors with the
same values in all processes. Each process computes one term of their gradients:

    A, B, G_1 .. G_L --> [LoTRReplicas, one per forward] --> layers 1 .. L
    backward: LoTRReplicas adds the terms of all processes, in one all-reduce

A layer that is whole in all processes does not read the replicas, so its gradient is not added p times.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, is_grad_enabled, nn

from .. import ops
from ..compat import is_compiling, stream_of
from ..ops.composite import base_linear
from .bank import Scope, core_of, open_scope
from .sharing import Call, Group

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement

_PLAIN = (Tensor, nn.Parameter)


def is_dtensor(tensor: object) -> bool:
    """Whether tensor is a DTensor. Does not import torch.distributed.tensor, which takes a second."""
    return isinstance(tensor, getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ()))


class Cut(NamedTuple):
    """This process's part of a weight [n, k]: rows (dim 0) or columns (dim 1) start to stop. axis: of the mesh, None for a
    weight that is whole in all processes."""

    mesh: DeviceMesh
    axis: int | None
    dim: int
    start: int
    stop: int

    @property
    def rows(self) -> tuple[slice, slice]:
        """The rows of A and B that this process's part needs."""
        here, every = slice(self.start, self.stop), slice(None)
        return (every, here) if self.dim == 0 else (here, every)


def cut_of(weight: DTensor) -> Cut | None:
    """How weight is sharded; None for a layout without a local form of the layer (sharded over two axes, or a partial sum)."""
    from torch.distributed.tensor import Shard

    mesh, axes = weight.device_mesh, [i for i, placement in enumerate(weight.placements) if not placement.is_replicate()]
    if not axes:
        return Cut(mesh, None, 0, 0, weight.shape[0])
    placement = weight.placements[axes[0]]
    if len(axes) > 1 or type(placement) is not Shard:
        return None
    # as in torch.chunk: the last parts may be shorter or empty
    size, processes = weight.shape[placement.dim], mesh.size(axes[0])
    step = -(-size // processes)
    start = min(size, mesh.get_local_rank(axes[0]) * step)
    return Cut(mesh, axes[0], placement.dim, start, min(size, start + step))


class ExpertsCut(NamedTuple):
    """This process's part of a mixture's matrices [e, n, k], sharded over a mesh axis. by: "experts", "rows" or "columns".
    of_A, of_B: the rows of A and B that it needs, as arguments of `rows_of`."""

    mesh: DeviceMesh
    axis: int
    by: str
    of_A: tuple[int, ...]
    of_B: tuple[int, ...]

    def localise(self, A: Tensor, B: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """Stores the rows of A and B that a call on local tensors reads, and the core, in the call."""
        return localise(self.of_A, self.of_B, [self.mesh.get_group(self.axis)], A, B, call)


def experts_cut(stored: DTensor, transposed: bool = False) -> ExpertsCut | None:
    """How experts' matrices are sharded. stored: [e, n, k], or transposed [e, k, n]. None for a layout without a
    local form."""
    mesh, axes = stored.device_mesh, [i for i, placement in enumerate(stored.placements) if not placement.is_replicate()]
    if len(axes) != 1 or not hasattr(placement := stored.placements[axes[0]], "dim"):
        return None
    dim, split = placement.dim % 3, getattr(placement, "split_factor", 1)
    of_B, of_A = ((0, size) for size in (stored.shape[1:] if not transposed else stored.shape[:0:-1]))
    if dim == 0:
        return ExpertsCut(mesh, axes[0], "experts", of_A, of_B) if split == 1 else None
    size = stored.shape[dim] // split
    step = -(-size // mesh.size(axes[0]))  # as in torch.chunk
    start = min(size, mesh.get_local_rank(axes[0]) * step)
    own = (start, min(size, start + step), *((split,) if split > 1 else ()))
    if (dim == 1) != transposed:
        return ExpertsCut(mesh, axes[0], "rows", of_A, own)
    return ExpertsCut(mesh, axes[0], "columns", own, of_B)


def rows_of(t: Tensor, start: int = 0, stop: int | None = None, split: int = 1) -> Tensor:
    """Rows start to stop of each of split equal parts of t, one after the other."""
    return t[start:stop] if split == 1 else t.unflatten(0, (split, -1))[:, start:stop].flatten(0, 1)


# ---- gradients summed over processes ---------------------------------------------------------------------------------


class LoTRReplicas(torch.autograd.Function):
    """Tensors that all processes have, for layers of which each process computes a part.   backward: sums over processes.

    apply(groups, tensors ..) -> the same values as new tensors. groups: the process groups over which to sum.
    """

    @staticmethod
    def forward(ctx, groups: Sequence[dist.ProcessGroup], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.groups = groups
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx, *gradients: Tensor | None):
        if is_grad_enabled() and any(g is not None and g.requires_grad for g in gradients):
            raise RuntimeError(
                "tensor parallelism: expected a backward that is not itself recorded, got create_graph=True; the sum over the "
                "processes has no gradient"
            )
        found: list[Tensor | None] = list(gradients)
        for dtype in dict.fromkeys(g.dtype for g in gradients if g is not None):
            own = [i for i, g in enumerate(gradients) if g is not None and g.dtype == dtype]
            total = torch.cat([gradients[i].reshape(-1) for i in own])
            for group in ctx.groups:
                total = _summed(total, group)
            for i, part in zip(own, total.split([gradients[i].numel() for i in own])):
                found[i] = part.view(gradients[i].shape)
        return None, *found


def _summed(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    from torch.distributed import _functional_collectives as collectives

    return collectives.wait_tensor(collectives.all_reduce(part, "sum", group))


class Replicas:
    """The replicas that the layers of one forward read, and their rows."""

    def __init__(self, groups: Sequence[dist.ProcessGroup], tensors: Iterable[Tensor]):
        own = list({id(t): t for t in tensors}.values())
        made: Iterable[Tensor] = own
        if is_grad_enabled():
            trained = [t for t in own if t.requires_grad]
            aliases = dict(zip(map(id, trained), LoTRReplicas.apply(groups, *trained))) if trained else {}
            made = [aliases.get(id(t), t) for t in own]
        self.held = {id(t): (t, t._version if not t.is_inference() else 0, alias) for t, alias in zip(own, made)}
        self.parts: dict[tuple[int, ...], Tensor] = {}

    def add(self, more: Replicas) -> None:
        self.held |= more.held

    def has(self, t: Tensor) -> bool:
        found = self.held.get(id(t))
        return found is not None and found[0] is t and (t.is_inference() or found[1] == t._version)

    def of(self, t: Tensor, start: int = 0, stop: int | None = None, split: int = 1) -> Tensor:
        """The replica of t, or its rows start to stop: one tensor for all layers that read them. split: how many equal parts
        of t, one after the other, these are the rows."""
        replica = self.held[id(t)][2]
        if start == 0 and stop in (None, len(t) // split):
            return replica
        key = (id(t), start, stop, split)
        if key not in self.parts:
            self.parts[key] = rows_of(replica, start, stop, split)
        return self.parts[key]


def _replicas(groups: Sequence[dist.ProcessGroup], A: Tensor, B: Tensor, call: Call) -> Replicas:
    """The Replicas of the open forward scope, in which one node serves all layers, or new ones."""
    scope = None if call.group is None else open_scope()
    own = () if is_dtensor(call.core) else (call.core,)  # a process computes the whole gradient of its experts' cores
    if scope is None:
        return Replicas(groups, (A, B, *own))
    key = (tuple(map(id, groups)), is_grad_enabled(), torch.is_inference_mode_enabled(), stream_of(A))
    found = scope.replicas.get(key)
    if found is None or not (found.has(A) and found.has(B)):
        found = scope.replicas[key] = Replicas(groups, (A, B, *own, *_of_scope(scope)))
    if own and not found.has(call.core):  # a core that FSDP2 gathered with its block, or that exists only in this call
        gathered = call.owner._parameters.get("core") is call.core
        found.add(Replicas(groups, own if not gathered else (*own, *(t for t in _of_scope(scope) if not found.has(t)))))
    return found


def _of_scope(scope: Scope) -> list[Tensor]:
    """The A, B and cores, if currently plain tensors, of the sharded layers of a forward."""
    found = []
    for layer in (layer for same_B in scope.layers.values() for layer in same_B):
        core = core_of(layer)
        if is_dtensor(layer._parameters.get("weight")) or getattr(layer, "cut", None) is not None:
            mixture = layer.mixture  # a bank has the cores of all tasks in one tensor
            of_bank = mixture is not None and isinstance(mixture.cores, Tensor)
            found += [layer.factors.A, layer.factors.B, mixture.cores if of_bank else core]
    return [t for t in found if type(t) in _PLAIN]


def localise(
    of_A: tuple[int, ...], of_B: tuple[int, ...], groups: Sequence[dist.ProcessGroup], A: Tensor, B: Tensor, call: Call
) -> tuple[Tensor, Tensor]:
    """The rows of A and B that a call on local tensors reads, as `Replicas.of` names them; they, and the core, go into the
    call."""
    if not groups:
        return A, B
    replicas = _replicas(groups, A, B, call)
    call.core = call.core.to_local() if is_dtensor(call.core) else replicas.of(call.core)
    if call.group is not None:
        own = tuple(map(id, groups))
        call.group, call.shares = Group(call.group.A.part(*of_A, own), call.group.B.part(*of_B, own)), True
    return replicas.of(A, *of_A), replicas.of(B, *of_B)


def _traced(cut: Cut, axes: Sequence[int], A: Tensor, B: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """As `localise`, for Dynamo: DTensor sums the gradients of a layer, in one all-reduce."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    tensors = A, B, call.core
    flat = torch.cat([t.reshape(-1) for t in tensors])
    flat = DTensor.from_local(flat, cut.mesh, [Replicate()] * cut.mesh.ndim, run_check=False)
    flat = flat.to_local(grad_placements=[Partial() if i in axes else Replicate() for i in range(cut.mesh.ndim)])
    parts = flat.split([t.numel() for t in tensors])
    A, B, call.core = (part.view(t.shape).to(t.dtype) for part, t in zip(parts, tensors))
    of_A, of_B = cut.rows
    return A[of_A], B[of_B]


def local_operands(cut: Cut, x: Tensor, A: Tensor, B: Tensor, weight: DTensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """The x, A and weight that `plan_call` would get, for `explain`; x may be plain and whole."""
    if is_dtensor(x):
        x = x.full_tensor()
    x, A = x[..., cut.rows[0]], A[cut.rows[0]]
    call.shares = call.shares or cut.axis is not None
    local = weight.to_local()
    return x, A, local if local.requires_grad else local.detach()


# ---- the input -------------------------------------------------------------------------------------------------------


class _Newest(threading.local):
    """A thread's newest local input, the tensor that it aliases, and the same with dropout p, which some layers (users) have
    read."""

    input: Callable[[], Tensor | None] = staticmethod(lambda: None)
    root: Callable[[], Tensor | None] = staticmethod(lambda: None)
    key: tuple | None = None
    dropped: Callable[[], Tensor | None] = staticmethod(lambda: None)
    p = 0.0
    users: frozenset[int] = frozenset()


_newest = _Newest()


def _local_input(x: DTensor, gradient: Sequence[Placement]) -> Tensor:
    """x's local tensor. The same object for layers that are called on one tensor, each through its own DTensor, as the
    hooks of parallelize_module create them: so siblings share u and the pending gradient of x."""
    local = x.to_local(grad_placements=gradient)
    if local.is_inference():
        return local
    root = local if local._base is None else local._base
    node, place = local.grad_fn, local.output_nr
    while node is not None and type(node).__name__ in ("_ToTorchTensorBackward", "_FromTorchTensorBackward"):
        node, place = node.next_functions[0]
    of = None if node is None else (type(node).__name__, node._sequence_nr(), place)
    shape = local.shape, local.stride(), local.storage_offset()
    key = (local._version, *shape, local.requires_grad, of, tuple(gradient), stream_of(local))
    before = _newest.input()
    if before is not None and _newest.root() is root and _newest.key == key:
        return before
    _newest.input, _newest.root, _newest.key = weakref.ref(local), weakref.ref(root), key
    _newest.dropped = lambda: None  # of the input before
    return local


def _dropped(x: Tensor, cut: Cut, p: float, columns: int, user: object) -> Tensor:
    """drop(x) for a layer (user) with this process's columns of the mask of the whole x [.., columns]. Siblings share the mask;
    a second call of a layer draws a new one."""
    import torch.distributed as dist

    before = _newest.dropped()
    if _newest.input() is x and before is not None and _newest.p == p and id(user) not in _newest.users:
        _newest.users |= {id(user)}
        return before
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), device=x.device)
    if cut.axis is not None:
        dist.broadcast(seed, group=cut.mesh.get_group(cut.axis), group_src=0)
    mask = ops.dropout_mask(x.numel() // max(1, x.shape[-1]), columns, p, seed, x.dtype)
    if cut.axis is not None and cut.dim == 1:
        mask = mask[:, cut.start : cut.stop]
    dropped = x * mask.reshape(x.shape)
    _newest.dropped, _newest.p, _newest.users = weakref.ref(dropped), p, frozenset({id(user)})
    return dropped


# ---- one call --------------------------------------------------------------------------------------------------------


def _checked_cut(x: Tensor, weight: DTensor, call: Call) -> Cut:
    """How weight is sharded. Raises for an x or a call that `call_cut` cannot run."""
    if is_compiling() and call.p:
        raise RuntimeError(
            "dropout: expected 0 for a tensor parallel layer inside torch.compile, got more, since all processes draw one "
            "mask; train without dropout, or without torch.compile"
        )
    cut = cut_of(weight)
    if cut is None or not is_dtensor(x) or x.device_mesh != cut.mesh:
        got = f"a DTensor over {x.device_mesh}" if is_dtensor(x) else type(x).__name__
        raise TypeError(
            f"x, weight: expected DTensors over one mesh, the weight cut by rows or by columns over one axis of it, got {got} "
            f"and a weight cut by {tuple(weight.placements)} over {weight.device_mesh}; use ColwiseParallel or RowwiseParallel"
        )
    return cut


def call_cut(
    run: Callable[..., Tensor],
    add: Callable[..., Tensor],
    x: Tensor,
    weight: DTensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    call: Call,
) -> DTensor:
    """The call of a layer over a weight that is a DTensor, on local tensors. Returns a DTensor.

    run, add: `call_linear` and `add_adapter`, for local tensors.

    Raises:
        TypeError: x is not a DTensor, or weight has a layout in which the layer has no local form. RuntimeError: dropout inside
            torch.compile.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    tracing, cut = is_compiling(), _checked_cut(x, weight, call)
    last, placements = Shard(x.dim() - 1), [Replicate() if one.is_partial() else one for one in x.placements]
    of_y, gradient = placements.copy(), placements.copy()
    if cut.axis is not None:
        rows = cut.dim == 0
        placements[cut.axis] = Replicate() if rows else last
        gradient[cut.axis], of_y[cut.axis] = (Partial(), last) if rows else (last, Partial())
    if tuple(placements) != x.placements:
        x = x.redistribute(cut.mesh, placements)
    axes = [i for i, placement in enumerate(placements) if i == cut.axis or placement.is_shard()]
    if tracing:
        A_, B_ = _traced(cut, axes, A, B, call)
    else:
        of_A, of_B = (rows.indices(len(t))[:2] for rows, t in zip(cut.rows, (A, B)))
        A_, B_ = localise(of_A, of_B, [cut.mesh.get_group(i) for i in axes], A, B, call)
    weight_, bias_ = (t.to_local() if is_dtensor(t) else t for t in (weight, bias))
    if cut.axis is not None and cut.dim == 1 and cut.mesh.get_local_rank(cut.axis):
        bias_ = None  # only one term of the sum includes the bias
    x_ = x.to_local(grad_placements=gradient) if tracing else _local_input(x, gradient)
    if 0 in weight_.shape:  # more processes than rows or columns: no part of y, but a term in the sums of gradients
        nothing = 0 * sum(t.sum() for t in (A_, B_, call.core))
        y = base_linear(x_, weight_, bias_, call.dtype)
        y = y + nothing.to(y.dtype)
    elif call.p:
        p, call.p = call.p, 0.0
        y = add(_dropped(x_, cut, p, x.shape[-1], call.owner), base_linear(x_, weight_, bias_, call.dtype), A_, B_, call)
    else:
        y = run(x_, weight_, bias_, A_, B_, call)
    size = torch.Size((*x.shape[:-1], len(weight)))
    stride = tuple(size[i + 1 :].numel() for i in range(len(size)))
    return DTensor.from_local(y, cut.mesh, of_y, run_check=False, shape=size, stride=stride)
