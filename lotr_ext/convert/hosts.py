"""The names and forms that servers expect for the LoRA of a mixture's experts.

With e experts of intermediate size i:

    "peft"          PEFT's target_parameters: <experts>.lora_A.weight [e r, k] and .lora_B.weight
                    [n, r e], where the expert is the last index. These are of the module's last
                    parameter; of the one before it, <experts>.base_layer.lora_A.weight, ..
    "vllm-shared"   vLLM with enable_moe_shared_loras: <experts>.w1 (gate) and .w3 (up) have
                    .lora_A.weight [1, r, k] and .lora_B.weight [e, i, r]; .w2 (down) has
                    .lora_A.weight [e, r, i] and .lora_B.weight [1, k, r]
    "per-expert"    vLLM without flags: <experts>.<c>.gate_proj, .up_proj and .down_proj each have
                    .lora_A.weight [r, k] and .lora_B.weight [i, r]
"""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from .lora import LoRA

Factors = tuple[Tensor, Tensor]  # lora_A, lora_B


class Host(NamedTuple):
    """A server's names for the experts of a model type.

    Attributes:
        rename: A part of the module's name, and its replacement.
        projections: The names of gate, up and down of one expert.
        interleaved: Whether the rows of gate_up_proj alternate between gate and up.
    """

    rename: tuple[str, str] = ("", "")
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    interleaved: bool = False


HOSTS = {  # by transformers' model_type
    "mixtral": Host(("mlp.experts", "block_sparse_moe.experts"), ("w1", "w3", "w2")),
    "gpt_oss": Host(interleaved=True),
}


def expert_tensors(layers: Mapping[str, LoRA], form: str, host: Host) -> dict[str, Tensor]:
    """Returns the tensors of the experts, as a server expects them, by name.

    Args:
        layers: The LoRAs by the full name of their parameter, in the order of each module.
        form: One of EXPERT_FORMS.
        host: The server's names.
    """
    modules: dict[str, dict[str, LoRA]] = {}
    for name, layer in layers.items():
        module, _, parameter = name.rpartition(".")
        modules.setdefault(module.replace(*host.rename), {})[parameter] = layer
    tensors = {}
    for module, parameters in modules.items():
        for name, (A, B) in EXPERT_FORMS[form](parameters, host).items():
            tensors[f"{module}{name}.lora_A.weight"] = A
            tensors[f"{module}{name}.lora_B.weight"] = B
    return tensors


# ---- one function per form: the factors of one module by what follows the module's name ----------


def _peft(parameters: Mapping[str, LoRA], host: Host) -> dict[str, Factors]:
    pairs = {}
    name = ""
    # PEFT wraps the module once per parameter, so the last parameter is in the outermost wrapper.
    for layer in reversed(parameters.values()):
        A, B = _expanded(layer)
        pairs[name] = (A.flatten(0, 1), B.permute(1, 2, 0).flatten(1))
        name += ".base_layer"
    return pairs


def _vllm_shared(parameters: Mapping[str, LoRA], host: Host) -> dict[str, Factors]:
    pairs = {}
    for parameter, layer in parameters.items():
        if parameter not in ("gate_up_proj", "down_proj"):
            raise ValueError(
                f"experts: expected 'per-expert' or 'peft' for experts that are not gated, got "
                f"'vllm-shared' for {parameter}"
            )
        factors = (layer.A, layer.B)
        # vLLM's names in this form, for every model.
        pairs |= _projections(parameter, factors, ("w1", "w3", "w2"), host.interleaved)
    return pairs


def _per_expert(parameters: Mapping[str, LoRA], host: Host) -> dict[str, Factors]:
    pairs = {}
    for parameter, layer in parameters.items():
        for index, factors in enumerate(zip(*_expanded(layer), strict=True)):
            split = _projections(parameter, factors, host.projections, host.interleaved)
            pairs |= {f".{index}{name}": pair for name, pair in split.items()}
    return pairs


EXPERT_FORMS = {
    "peft": _peft,
    "vllm-shared": _vllm_shared,
    "per-expert": _per_expert,
}


def _expanded(layer: LoRA) -> Factors:
    """Returns A [e, r, k] and B [e, n, r], also if all experts share one of them."""
    return layer.A.expand(layer.experts, -1, -1), layer.B.expand(layer.experts, -1, -1)


def _projections(
    parameter: str, factors: Factors, names: tuple[str, str, str], interleaved: bool
) -> dict[str, Factors]:
    """Splits a parameter into gate, up and down, by the server's names. B is [.., n, r]."""
    gate, up, down = (f".{name}" for name in names)
    A, B = factors
    if parameter == "down_proj":
        return {down: factors}
    if parameter != "gate_up_proj":
        return {up: factors}
    if interleaved:
        return {gate: (A, B[..., ::2, :]), up: (A, B[..., 1::2, :])}
    gate_B, up_B = B.chunk(2, -2)
    return {gate: (A, gate_B), up: (A, up_B)}
