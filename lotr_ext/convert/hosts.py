"""The names and forms that servers expect for the LoRA of a mixture's experts.

    "peft"          PEFT's target_parameters: all experts in one pair of tensors
    "vllm-shared"   vLLM with enable_moe_shared_loras: gate, up and down, with a factor that all
                    experts share
    "per-expert"    vLLM without flags: gate, up and down of each expert

Each form has one function below. There are e experts, in which gate and up map k features to i, and
down maps i to k. transformers has two parameters for all experts: gate_up_proj and down_proj.
"""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from .lora import LoRA

LoRAPair = tuple[Tensor, Tensor]  # lora_A, lora_B


class ServerNames(NamedTuple):
    """A server's names for the experts of a model type.

    Attributes:
        rename: A part of the module's name, and its replacement.
        projections: The names of gate, up and down of one expert.
        interleaved: Whether the rows of gate_up_proj alternate between gate and up.
    """

    rename: tuple[str, str] = ("", "")
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    interleaved: bool = False


SERVER_NAMES = {  # by transformers' model_type
    "mixtral": ServerNames(("mlp.experts", "block_sparse_moe.experts"), ("w1", "w3", "w2")),
    "gpt_oss": ServerNames(interleaved=True),
}


def expert_tensors(layers: Mapping[str, LoRA], form: str, server: ServerNames) -> dict[str, Tensor]:
    """Returns the tensors of the experts, as a server expects them, by name.

    Args:
        layers: The LoRAs by the full name of their parameter, in the order of the parameters.
        form: One of EXPERT_FORMS.
        server: The server's names.
    """
    modules: dict[str, dict[str, LoRA]] = {}
    for name, layer in layers.items():
        module, _, parameter = name.rpartition(".")
        modules.setdefault(module.replace(*server.rename), {})[parameter] = layer
    tensors = {}
    for module, parameters in modules.items():
        # A form names each pair by what follows the module's name, such as ".w1".
        for name, (A, B) in EXPERT_FORMS[form](parameters, server).items():
            tensors[f"{module}{name}.lora_A.weight"] = A
            tensors[f"{module}{name}.lora_B.weight"] = B
    return tensors


# ---- the forms: the LoRAs of one module by parameter -> pairs by what follows the module's name --


def _peft(parameters: Mapping[str, LoRA], server: ServerNames) -> dict[str, LoRAPair]:
    """Returns A [e r, k] and B [n, r e]: the expert is the outer index in A, the inner one in B.

    PEFT wraps the module once per parameter, so its last parameter is in the outermost wrapper. The
    pair of down_proj is then named "", and the pair of gate_up_proj ".base_layer".
    """
    pairs = {}
    name = ""
    for layer in reversed(parameters.values()):
        A, B = _of_all_experts(layer)
        pairs[name] = (A.flatten(0, 1), B.permute(1, 2, 0).flatten(1))
        name += ".base_layer"
    return pairs


def _vllm_shared(parameters: Mapping[str, LoRA], server: ServerNames) -> dict[str, LoRAPair]:
    """Returns .w1 (gate) and .w3 (up) with A [1, r, k] and B [e, i, r], and .w2 (down).

    .w2 has A [e, r, i] and B [1, k, r].
    """
    # In this form vLLM has the same names for every model.
    vllm = server._replace(projections=("w1", "w3", "w2"))
    pairs = {}
    for parameter, layer in parameters.items():
        if parameter not in ("gate_up_proj", "down_proj"):
            raise ValueError(
                f"experts: expected 'per-expert' or 'peft' for experts that are not gated, got "
                f"'vllm-shared' for {parameter}"
            )
        pairs |= _projections(parameter, layer.A, layer.B, vllm)
    return pairs


def _per_expert(parameters: Mapping[str, LoRA], server: ServerNames) -> dict[str, LoRAPair]:
    """Returns .<c>.gate_proj, .up_proj and .down_proj of each expert c, A [r, k] and B [n, r]."""
    pairs = {}
    for parameter, layer in parameters.items():
        for index, (A, B) in enumerate(zip(*_of_all_experts(layer), strict=True)):
            split = _projections(parameter, A, B, server)
            pairs |= {f".{index}{name}": pair for name, pair in split.items()}
    return pairs


EXPERT_FORMS = {
    "peft": _peft,
    "vllm-shared": _vllm_shared,
    "per-expert": _per_expert,
}


def _of_all_experts(layer: LoRA) -> LoRAPair:
    """Returns A [e, r, k] and B [e, n, r], also if all experts share one of them."""
    return layer.A.expand(layer.experts, -1, -1), layer.B.expand(layer.experts, -1, -1)


def _projections(parameter: str, A: Tensor, B: Tensor, server: ServerNames) -> dict[str, LoRAPair]:
    """Splits the pair of a parameter into gate, up and down, by the server's names.

    Args:
        parameter: Its name in transformers.
        A: [.., r, k].
        B: [.., n, r].
        server: The server's names.
    """
    gate, up, down = (f".{name}" for name in server.projections)
    if parameter == "down_proj":
        return {down: (A, B)}
    if parameter != "gate_up_proj":  # experts that are not gated
        return {up: (A, B)}
    if server.interleaved:
        return {gate: (A, B[..., ::2, :]), up: (A, B[..., 1::2, :])}
    gate_B, up_B = B.chunk(2, -2)
    return {gate: (A, gate_B), up: (A, up_B)}
