"""The private names of torch that a layer's call uses, under names that say what for.

`python_tests/ops/test_compat.py` tests each of them for what it is used for: a torch that moves or drops one fails
there first, by name.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from functools import partial

import torch
from torch import Tensor, _guards, is_grad_enabled, nn
from torch._C import _dispatch_key_parse
from torch._C._dynamo import eval_frame as _eval_frame
from torch._subclasses import FakeTensor as FakeTensor  # tensors without values, of compilers that trace
from torch._subclasses import FakeTensorMode as FakeTensorMode
from torch.autograd import Function, Variable, forward_ad
from torch.autograd.function import BackwardCFunction
from torch.compiler import is_dynamo_compiling
from torch.nn.modules import module as _hooks_of_all
from torch.utils import checkpoint as _checkpoint

# ---- the state around a call ------------------------------------------------------------------------------------------

any_autocast = torch._C._is_any_autocast_enabled  # on any device: torch.is_autocast_enabled raises for some, meta among them
dispatch_modes = torch._C._len_torch_dispatch_stack  # how many: selective checkpointing, counters of operators
functorch_active = torch._C._are_functorch_transforms_active  # vmap, grad, jvp of torch.func
jit_tracing = torch._C._get_tracing_state  # None outside of torch.jit.trace and the older ONNX export
saved_tensor_hook = torch._C._autograd._top_saved_tensors_default_hooks  # (False): the innermost (pack, unpack), or None

_SKIP = _eval_frame._FrameAction.SKIP
_CHECKPOINT_FILE = _checkpoint.__file__
# functions of torch on the stack; checkpoint calls _checkpoint_impl since torch 2.15
_AROUND_REGIONS = frozenset(("forward", "backward", "checkpoint", "_checkpoint_impl", "unpack_hook"))

dispatch_key_included = torch._C._dispatch_tls_is_dispatch_key_included
OLD_VMAP = _dispatch_key_parse("VmapMode")  # included while gradients come in batches, by is_grads_batched


def is_compiling() -> bool:
    """Whether this thread compiles or exports what it runs. torch's own is True in all threads while any of them does (since
    torch 2.13): a layer that runs in another thread would take the state of the compiled code for its own. Code that runs in
    every call asks torch's first, which saves a call."""
    if not torch.compiler.is_compiling():
        return False
    own = is_dynamo_compiling() or dispatch_modes() > 0  # Dynamo reads no further
    return own or _guards.CompileContext.try_get() is not None or _guards.TracingContext.try_get() is not None


def recorded(g: Tensor) -> bool:
    """Whether the running backward of g must run torch's own products: it is being recorded (double backward, compiled
    autograd) or batched (is_grads_batched, vmap), or g may have a tangent of forward-mode AD. AOTAutograd traces a backward
    with tensors of its own type and takes the nodes."""
    compiled = torch.compiler.is_compiling() and is_compiling() and type(g) is Tensor
    batched = dispatch_key_included(OLD_VMAP) or functorch_active()
    return is_grad_enabled() or compiled or batched or forward_ad._current_level >= 0


def keeps_all_by_itself() -> bool:
    """Whether autograd itself keeps what is saved, or a checkpoint makes it anew: no hook of another kind packs it."""
    hooks = saved_tensor_hook(False)
    return hooks is None or getattr(hooks[0], "__module__", "") == "torch.utils.checkpoint"


def kept(t: Tensor) -> Tensor:
    """t for save_for_backward: a copy under hooks that pack what is saved, because autograd then does not check whether t was
    changed in place."""
    return t if keeps_all_by_itself() else t.detach().clone()


def running_function() -> object | None:
    """ctx of the innermost Python autograd Function that is running; None outside. Reentrant checkpointing is one: its forward
    and backward run the code of a region."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_varnames[:1] == ("ctx",) and isinstance(ctx := frame.f_locals.get("ctx"), BackwardCFunction):
            return ctx
        frame = frame.f_back
    return None


def checkpoint_regions() -> list[tuple[object, bool]]:
    """The regions of activation checkpointing around the calling code, the innermost first. Each is an object that is the same
    in forward and in backward, and whether backward runs the region again.

    A Function of another library that checkpoints is seen if its forward has ctx as its first argument. With setup_context
    there is no ctx yet while forward runs, so such a region is not seen.
    """
    found: list[tuple[object, bool]] = []
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        name = code.co_name
        if name in _AROUND_REGIONS:
            if name in ("forward", "backward"):
                if code.co_varnames[:1] == ("ctx",) and isinstance(ctx := frame.f_locals.get("ctx"), BackwardCFunction):
                    found.append((ctx, name == "backward"))  # reentrant, torch's or another's
            elif code.co_filename == _CHECKPOINT_FILE:
                again, local = name == "unpack_hook", frame.f_locals
                region = local["frame"] if again else _frame_of(local.get("gen"))
                if region is not None:
                    found.append((region, again))
        frame = frame.f_back
    pack = (saved_tensor_hook(False) or (None,))[0]
    if getattr(pack, "__qualname__", "") == "_checkpoint_hook.__init__.<locals>.pack_hook":  # that of a module's hooks, too
        region = dict(zip(pack.__code__.co_freevars, pack.__closure__))["frame"].cell_contents
        if all(region is not other for other, _ in found):
            found.insert(0, (region, False))
    return found


def _frame_of(generator: Generator | None) -> object | None:
    """The object by which non-reentrant checkpointing identifies a region."""
    inner = None if generator is None else generator.gi_frame
    return None if inner is None else inner.f_locals.get("new_frame")


def wraps_inputs(module: object) -> bool:
    """Whether backward hooks make nn.Module pass each input to module as a new tensor."""
    own = isinstance(module, nn.Module) and (module._backward_hooks or module._backward_pre_hooks)
    return bool(own or _hooks_of_all._global_backward_hooks or _hooks_of_all._global_backward_pre_hooks)


def transformed() -> bool:
    """Whether a transform of torch.func or forward-mode AD is active."""
    return functorch_active() or forward_ad._current_level >= 0


# ---- nodes -----------------------------------------------------------------------------------------------------------


class _Nodes(type(Function)):
    """Makes autograd's engine call `backward` directly. The method between them chooses at each call among the ways in which a
    Function can be written: 1 us per layer and step (bench.host, one token)."""

    def __init__(cls, name, bases, attributes):
        super().__init__(name, bases, attributes)
        cls._backward_cls.apply = cls.backward


class Node(Function, metaclass=_Nodes):
    """A Function with `run`: `apply` without the checks for functorch's transforms, which cost 5 us per layer and step
    (bench.host, one token). Call it only where no transform is active."""

    run = torch._C._FunctionBase.__dict__["apply"]


# ---- the running backward --------------------------------------------------------------------------------------------

keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph  # whether it was told retain_graph=True
graph_task = torch._C._current_graph_task_id  # of the running backward; below zero outside of one
_LOOKS_AT_EACH = hasattr(torch._C._autograd.SavedTensor, "unpack")
at_end_of_backward = Variable._execution_engine.queue_callback  # called once the running backward has ended; never if it fails


def carry(value: object) -> None:
    """Stores a value for this thread and for the backwards that it starts, in any of autograd's threads."""
    torch._C._stash_obj_in_tls("lotr_ext", value)


def carried() -> object | None:
    """The value that this thread stored last; in a thread of autograd, the one of the thread that started the backward."""
    return torch._C._get_obj_in_tls("lotr_ext") if torch._C._is_key_in_tls("lotr_ext") else None


def run_unseen(function: Callable) -> None:
    """Dynamo runs function, and what it calls, as it is, also where code that it has compiled calls it."""
    _eval_frame.set_code_exec_strategy(function.__code__, _eval_frame._FrameExecStrategy(_SKIP, _SKIP))


not_compiled = torch._disable_dynamo  # torch.compiler.disable would import the compiler here: 1.5 s of `import lotr_ext`


def constant_while_compiled(function: Callable) -> Callable:
    """torch.compiler.assume_constant_result without the import of the compiler: a compiled graph holds what function returned
    when it was traced."""
    function._dynamo_marked_constant = True
    return function


def saved_if(ctx, *wanted: bool) -> tuple[Tensor | None, ...]:
    """ctx.saved_tensors, None for those that are not wanted. These are not unpacked, so an in-place write to them does not
    raise; torch 2.10 unpacks all of them."""
    if _LOOKS_AT_EACH:
        return tuple(saved.unpack() if want else None for saved, want in zip(ctx._raw_saved_tensors, wanted))
    return tuple(saved if want else None for saved, want in zip(ctx.saved_tensors, wanted))


def saved_or_changed(ctx, i: int) -> tuple[Tensor, RuntimeError | None]:
    """Saved tensor number i; where it was changed in place (with torch 2.10 any of them) the tensor as it is now, and what
    autograd says of that."""
    saved = ctx._raw_saved_tensors[i]
    try:
        return (saved.unpack() if _LOOKS_AT_EACH else ctx.saved_tensors[i]), None
    except RuntimeError as error:
        if not isinstance(saved.data, Tensor):  # hooks keep it: another error
            raise
        return saved.data, error


def wants(ctx, i: int) -> bool:
    """Whether the running backward needs the gradient of edge i of a node. Each tensor argument has an edge, None has none."""
    node = ctx.next_functions[i][0]
    try:
        return node is not None and torch._C._will_engine_execute_node(node)
    except RuntimeError:  # raised at a leaf that was an input of autograd.grad
        return True


def post_accumulate_hooks(leaf: Tensor) -> bool:
    """Whether a leaf has hooks that run once its gradient is summed up, as an optimizer's step inside backward does."""
    return bool(leaf._post_accumulate_grad_hooks)


# ---- operators -------------------------------------------------------------------------------------------------------


def straight(operator: torch._ops.OpOverload) -> Callable:
    """operator, called through the dispatcher with its modes and the profiler, but without the check for __torch_function__,
    which costs 2 us per layer and step (bench.host, one token). No tensor that reaches a kernel has one."""
    return partial(torch._C._dispatch_call_boxed, operator._handle)


# ---- tensors ---------------------------------------------------------------------------------------------------------

# for writes into tensors that no other code holds: in-place operators then move no version counter
private_write = torch._C._AutoDispatchBelowADInplaceOrView
below_in_place = torch._C._after_ADInplaceOrView_keyset  # the dispatch keys after the one at which version counters move


_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # a torch without CUDA has none


def stream_of(t: Tensor) -> int:
    """The CUDA stream on which operators on t's device run now; 0 is the default stream, and the answer without a GPU.

    A value that is computed once for several calls may be read on this stream alone: other streams wait for a tensor only
    where the user makes them, and the user does not see it.
    """
    if not t.is_cuda or not torch.cuda.is_initialized():  # fake tensors are on a GPU that need not exist
        return 0
    return _raw_stream(t.device.index)


def same_storage(one: torch.UntypedStorage, other: torch.UntypedStorage) -> bool:
    """Whether two storages, both held, are one: sharded training moves a storage's memory, not the storage."""
    return one._cdata == other._cdata
