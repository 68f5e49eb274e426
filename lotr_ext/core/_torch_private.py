"""Every private name of torch that the core uses, with its reason and what happens without it.

A new torch version can remove any of them. Look here first if an import fails after an upgrade.

Two kinds:

- Needed for correct results. torch has no public name for these. If it removes one, a feature has
  to go.
- Faster than a public name. If torch removes one, the public name replaces it.

Not here: the dictionaries of nn.Module (`_parameters`, `_modules`) and `Tensor._version`, which
other files read as well.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function, forward_ad

# ---- needed for correct results ------------------------------------------------------------------

# The id of the running backward, -1 if none is running. Gradient sums are stored under this id.
# Without it, two threads that train one model would mix their gradients.
current_backward = torch._C._current_graph_task_id

# Whether the running backward will execute a node. Without it, `torch.autograd.grad` of some inputs
# would leave gradients in the sums of nodes that never run, and the next backward would add them.
will_execute = torch._C._will_engine_execute_node

# The innermost saved-tensor hooks, which identify a checkpointed region. Without them, a checkpoint
# would reuse u = x A from outside its region, and its recomputation would fail. With
# ignore_is_tracing False, there are none while torch.compile traces, which defers the hooks to run
# time.
saved_tensor_hooks = functools.partial(torch._C._autograd._top_saved_tensors_default_hooks, False)

# Whether vmap, grad or jvp of torch.func is active. Kernels cannot run on their wrapped tensors.
functorch_is_active = torch._C._are_functorch_transforms_active

# Whether `torch.autograd.grad(.., is_grads_batched=True)` runs. Its gradients are wrapped as well.
vmap_is_active = functools.partial(
    torch._C._dispatch_tls_is_dispatch_key_included, torch._C._dispatch_key_parse("VmapMode")
)

# How many dispatch modes are active. Selective checkpointing is one. It must see PyTorch operators,
# because it selects them by name.
dispatch_mode_count = torch._C._len_torch_dispatch_stack

# The dispatch keys after the one that bumps version counters. Without them, `expand_add_` would not
# bump the version of y, and a backward that saved y would silently compute a wrong gradient.
keys_after_version_counters = torch._C._after_ADInplaceOrView_keyset

# A thread-local dictionary that autograd copies into its backward threads. Without it, a checkpoint
# that is recomputed on a backward thread would not know the tasks of its request.
set_thread_local = torch._C._stash_obj_in_tls
get_thread_local = torch._C._get_obj_in_tls
has_thread_local = torch._C._is_key_in_tls


def forward_ad_is_active() -> bool:
    """Whether a dual level of forward-mode AD is open. Kernels would drop the tangents."""
    return forward_ad._current_level >= 0


def storage_id(tensor: Tensor) -> int:
    """Identifies the storage of a tensor: `tensor.data = other` changes it but not the version.

    The address is not enough: FSDP2 frees the memory of a storage and fills it again elsewhere.
    Returns 0 for the tensors that torch.compile traces, which may have no storage.
    """
    if type(tensor) not in (Tensor, nn.Parameter):
        return 0
    return tensor.untyped_storage()._cdata


# ---- faster than the public name -----------------------------------------------------------------
# Times are per call on one CPU core, torch 2.13.

# If no autocast is on, this saves the 1.5 us of torch.amp.is_autocast_available and
# torch.is_autocast_enabled. Without it, both are called each time.
any_autocast_is_enabled = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)

# torch.cuda.current_stream is slower, because it creates an object. A build without CUDA lacks the
# private name, and never calls this.
raw_cuda_stream = getattr(
    torch._C,
    "_cuda_getCurrentRawStream",
    lambda device: torch.cuda.current_stream(device).cuda_stream,
)


def direct_call(overload: torch._ops.OpOverload) -> Callable[..., Any]:
    """Returns a function that calls an operator without a search for `__torch_function__`.

    The operator itself is 2 us slower with 10 arguments and 8 us with 19. The function accepts
    positional arguments only.
    """
    if not hasattr(torch._C, "_dispatch_call_boxed"):
        return overload
    return functools.partial(torch._C._dispatch_call_boxed, overload._handle)


def direct_apply(function: type[Function]) -> Callable[..., Any]:
    """Returns `function.apply` without its checks for torch.func, which `fallback_reason` has made.

    It is the method of the C++ base class. `function.apply` itself is 4 us slower.
    """
    return super(Function, function).apply
