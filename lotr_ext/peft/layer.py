"""A linear layer with LoTR adapters by name, as PEFT's layers have them.

    y = base(x) + the sum over active adapters of s ((drop(x) A) G) B^T

One call computes a plain base and the first active adapter. The others are added to its output.

Not here: the factors A and B, which the tuner owns (model.py).
"""

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ..core import dispatch, fallback
from ..core.call import LayerCall
from ..core.operators import DTYPES, accumulate_dtype
from ..factors import LoTRFactors, set_unregistered
from ..init import fill_core_
from ..layers import device_of, features, is_conv1d
from ..wrapped import LoTRWrapped, layer_class, matrix_of, mergeable_weight
from .config import LoTRPeftConfig


class LoTRPeftAdapter(nn.Module):
    """One adapter in one layer: its core, scaling and dropout, and the factors of its group.

    Args:
        factors: The pair of the group, which the tuner registers.
        config: The adapter's configuration.
        form: The module that computes the core [r_in, r_out]. None if it is a parameter.
    """

    def __init__(self, factors: LoTRFactors, config: LoTRPeftConfig, form: nn.Module | None = None):
        super().__init__()
        if form is None:
            self.core = nn.Parameter(factors.A.value.new_empty(factors.r_in, factors.r_out))
            fill_core_(self.core, config.core_init)
        self.scaling = config.to_lotr().s
        self.dropout = config.dropout
        self.trained = tuple(config.train)
        # The tuner registers them, so that state_dict has a factor once and not in every layer.
        set_unregistered(self, "factors", factors)
        set_unregistered(self, "form", form)
        for part, parameter in self.parts():
            # Permanently: PEFT switches requires_grad only of what `parameters` yields.
            if part not in self.trained:
                parameter.requires_grad_(False)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Yields the parameters of A, B and the core that are trained while the adapter is active.

        torch's method would yield only the core. PEFT switches requires_grad of what this method
        yields when the adapter becomes active or inactive. It has no other hook that could switch
        the factors, which the tuner registers, or skip a part that is not trained.
        `named_parameters` and state_dict are torch's.
        """
        return (parameter for part, parameter in self.parts() if part in self.trained)

    def forward(
        self,
        x: Tensor,
        *,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        base_output: Tensor | None = None,
    ) -> Tensor:
        """Returns x W^T + bias + s ((drop(x) A) G) B^T [.., n].

        ZeRO-3 gathers the core around this call.

        Args:
            x: [.., k].
            weight: W [n, k].
            bias: [n].
            base_output: Replaces x W^T + bias. weight is then None.
        """
        core = self.core_matrix()
        dropout = self.dropout if self.training else 0.0

        def compute(A: Tensor, B: Tensor) -> Tensor:
            call = LayerCall(x, weight, bias, A, B, core, self.scaling, dropout, base_output)
            return dispatch.linear(call, self.factors.caches, self)

        return self.factors.read(compute)

    def core_matrix(self) -> Tensor:
        """Returns G [r_in, r_out]."""
        return self.core if self.form is None else self.form()

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """Returns s B G^T A^T [n, k] in float32, or float64 for float64 factors."""
        core = self.core_matrix()
        return self.factors.read(lambda A, B: fallback.delta_weight(A, B, core, self.scaling))

    def modules_of_parts(self) -> dict[str, nn.Module]:
        """Returns the modules that have the parameters of the parts "A", "B" and "core"."""
        # All computed cores of an adapter have their parameters in one module (`CoreAt.cores`).
        owner_of_core = self if self.form is None else self.form.cores
        return {"A": self.factors.A, "B": self.factors.B, "core": owner_of_core}

    def parts(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields the parameters of "A", "B" and "core", each with the name of its part."""
        for part, module in self.modules_of_parts().items():
            # Not `parameters`, which this class overrides.
            for _, parameter in module.named_parameters():
                yield part, parameter

    def extra_repr(self) -> str:
        return f"rank={self.factors.rank}, scaling={self.scaling:g}, dropout={self.dropout}"


class LoTRPeftLinear(nn.Module, BaseTunerLayer):
    """A linear layer with LoTR adapters by name.

    x [..., in_features] -> [..., out_features]. state_dict: the base's keys under `base_layer.`,
    `lotr_adapter.<name>.core`.
    """

    adapter_layer_names: tuple[str, ...] = ("lotr_adapter",)
    # The weight before the first merge. A buffer, so that it moves with the layer.
    weight_backup: Tensor | None

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = features(base_layer)
        self.lotr_adapter = nn.ModuleDict()
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []
        self.merged_adapters: list[str] = []
        self.register_buffer("weight_backup", None, persistent=False)

    def device_and_dtype(self) -> tuple[torch.device, torch.dtype]:
        """Returns the device on which the base computes, and its dtype, float32 if quantized."""
        _, dtype = self._get_base_layer_device_and_dtype(self.base_layer)
        # A quantized weight has the dtype of its bytes.
        if dtype not in DTYPES.values():
            dtype = torch.float32
        return device_of(self.base_layer), dtype

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """Moves an adapter to the device of the base, as BaseTunerLayer does, but without a cast.

        With low_cpu_mem_usage, PEFT calls it when the values have been loaded.
        """
        if adapter_name not in self.lotr_adapter:
            return
        adapter = self.lotr_adapter[adapter_name]
        # A meta tensor, whose value was not loaded, cannot be moved.
        if not any(parameter.is_meta for _, parameter in adapter.parts()):
            for module in adapter.modules_of_parts().values():
                module.to(device or device_of(self.base_layer))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = kwargs.pop("adapter_names", None)  # from the tuner's forward hooks
        if self.disable_adapters:
            # As PEFT's layers do, because the weight would still contain the adapters.
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if names is not None:
            return self._per_row(x, names, self.base_layer(x, *args, **kwargs))
        # Merged adapters are in the weight.
        adapters = [
            self.lotr_adapter[name]
            for name in self.active_adapters
            if name in self.lotr_adapter and not self.merged
        ]
        # Further arguments are for the base's forward, which must then be called.
        has_plain_call = layer_class(self.base_layer) is not LoTRWrapped and not args and not kwargs
        if adapters and has_plain_call:
            # The first adapter also computes the product of the base.
            y = adapters.pop(0)(x, weight=matrix_of(self.base_layer), bias=self.base_layer.bias)
        else:
            y = self.base_layer(x, *args, **kwargs)
        for adapter in adapters:
            y = adapter(x, base_output=y)
        return y

    def _per_row(self, x: Tensor, names: Sequence[str], y: Tensor) -> Tensor:
        """Returns the base's output y, with the adapter names[i] added in row i."""
        if len(names) != len(x):
            raise ValueError(
                f"adapter_names: expected one name for each of the {len(x)} rows, got {len(names)}"
            )
        if self.merged:
            raise ValueError(
                "adapter_names: expected unmerged adapters, got merged ones. Call unmerge_adapter "
                "first."
            )
        for name in dict.fromkeys(names):
            if name in self.lotr_adapter:
                rows = torch.tensor(
                    [i for i, row_name in enumerate(names) if row_name == name], device=x.device
                )
                # Not in place: autograd may need the base's output as it was.
                y = y.index_copy(0, rows, self.lotr_adapter[name](x[rows], base_output=y[rows]))
        return y

    # ---- merging ---------------------------------------------------------------------------------

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds adapters to the weight that the layer had before its first merge.

        The sum is computed in float32 (float64 for float64), and is cast once.

        Args:
            safe_merge: Whether to check that the sum is finite before the weight is changed.
            adapter_names: The active ones if None.

        Raises:
            TypeError: If the weight is not plain, or the base returns more than x W^T + bias.
            ValueError: If the sum is not finite and safe_merge is set.
        """
        # PEFT merges in every layer, also in those that have no adapter of these names.
        names = [
            name
            for name in check_adapters_to_merge(self, adapter_names)
            if name in self.lotr_adapter
        ]
        if not names:
            return
        weight = mergeable_weight(self.base_layer).detach()
        backup = weight.clone() if self.weight_backup is None else self.weight_backup
        # Sums all adapters again, so that a second merge does not round the first one's result.
        total = backup.to(accumulate_dtype(backup.dtype))
        for name in (*self.merged_adapters, *names):
            total = total + self.lotr_adapter[name].delta_weight().to(total.device)
            if safe_merge and not bool(total.isfinite().all()):
                # PEFT's wording, for which its users may search. The sum may also be infinite.
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {name} seems to be broken"
                )
        self.weight_backup = backup
        weight.copy_(total)
        self.merged_adapters.extend(names)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restores the weight as it was before the first merge, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        mergeable_weight(self.base_layer).detach().copy_(self.weight_backup)
        self.weight_backup = None
        self.merged_adapters.clear()

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """Returns s B G^T A^T in the layout of the base's weight.

        [n, k], or [k, n] for a Conv1D, in the dtype that `device_and_dtype` returns.
        """
        delta = self.lotr_adapter[adapter_name].delta_weight().to(self.device_and_dtype()[1])
        return delta.mT.contiguous() if is_conv1d(self.base_layer) else delta

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True
