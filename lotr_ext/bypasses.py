"""Modules that read the weight of a linear layer and do not call it, so an adapter is ignored.

nn.MultiheadAttention              reads out_proj.weight: that layer cannot be adapted
nn.TransformerEncoderLayer         its fast path reads linear1 and linear2: turned off
nn.TransformerEncoder              makes nested tensors for that fast path: turned off
attention of diffusers             fuse_projections copies the weights of to_q, to_k and to_v
                                   into a new layer: refused. If it has run, to_q cannot be adapted
models of transformers             resize_token_embeddings copies the weight of the output layer
                                   into a new layer: refused if the output layer is adapted
"""

from typing import Any, NoReturn

from torch import nn

from .layers import LoTRLayer

# The attributes on which the fast paths depend. Nothing else reads them.
_FAST_PATH_ATTRIBUTES = {
    nn.TransformerEncoderLayer: "activation_relu_or_gelu",
    nn.TransformerEncoder: "use_nested_tensor",
}
# diffusers' fused layers, and the layers that each of them replaces.
_FUSED_LAYERS = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}


def call_obstacle(parent: nn.Module, child: str) -> str | None:
    """Returns why parent does not call its linear layer of this name, None if nothing is known."""
    if child == "out_proj" and isinstance(parent, nn.MultiheadAttention):
        return "nn.MultiheadAttention reads its weight and does not call it"
    if getattr(parent, "fused_projections", False):
        for fused, replaced in _FUSED_LAYERS.items():
            if child in replaced and hasattr(parent, fused):
                return f"fuse_qkv_projections has replaced it with {fused}"
    return None


def block_bypasses(model: nn.Module, layer_type: type[nn.Module] = LoTRLayer) -> None:
    """Turns off, or refuses, what would read the weights of adapted layers.

    Args:
        model: An adapted model.
        layer_type: The class of its adapted layers.
    """
    for module in model.modules():
        for cls, attribute in _FAST_PATH_ATTRIBUTES.items():
            # Already off if another adapter of PEFT was added before.
            is_off = "lotr_fast_path" in vars(module)
            if isinstance(module, cls) and not is_off and _contains(module, layer_type):
                module.lotr_fast_path = (attribute, getattr(module, attribute))
                setattr(module, attribute, False)
        if callable(getattr(module, "fuse_projections", None)) and _contains(module, layer_type):
            module.fuse_projections = _refuse_to_fuse
        # The method also resizes the output layer. Without an adapter there, its result is right.
        if callable(getattr(module, "resize_token_embeddings", None)):
            # Not every class with such a method is one of transformers.
            output = getattr(module, "get_output_embeddings", lambda: None)()
            if output is not None and _contains(output, layer_type):
                module.resize_token_embeddings = _refuse_to_resize


def restore_bypasses(model: nn.Module) -> None:
    """Undoes `block_bypasses`."""
    for module in model.modules():
        for name, refusal in _REFUSALS.items():
            if vars(module).get(name) is refusal:
                delattr(module, name)
        if "lotr_fast_path" in vars(module):
            # The attribute and the value that it had.
            setattr(module, *vars(module).pop("lotr_fast_path"))


def _contains(module: nn.Module, layer_type: type[nn.Module]) -> bool:
    return any(isinstance(child, layer_type) for child in module.modules())


def _refuse_to_fuse(*args: Any, **kwargs: Any) -> NoReturn:
    """Takes the place of diffusers' method in attention with adapted layers."""
    raise RuntimeError(
        "fuse_projections: expected attention without an adapter, got an adapted one. The fused "
        "layer would not contain the adapter. Call unload(model, merge=True) first."
    )


def _refuse_to_resize(*args: Any, **kwargs: Any) -> NoReturn:
    """Takes the place of transformers' method in a model with an adapted output layer."""
    raise RuntimeError(
        "resize_token_embeddings: expected an output layer without an adapter, got an adapted one. "
        "The new layer would not contain the adapter. Resize before the model is adapted, or call "
        "unload(model, merge=True) first."
    )


# Functions of this module, so that an adapted model can be pickled.
_REFUSALS = {
    "fuse_projections": _refuse_to_fuse,
    "resize_token_embeddings": _refuse_to_resize,
}
