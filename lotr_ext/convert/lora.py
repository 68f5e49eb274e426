"""PEFT's files: an adapter's folder with adapter_config.json and adapter_model.safetensors.

Reads and checks a LoRA. Writes the two files of any adapter in PEFT's form.

Not here: what LoTR writes into these files (to_lora.py, ../vllm).
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checks import check_number
from ..storage import FilePath, json_in, put_file, put_tensors
from ..targets import name_matches

CONFIG_NAME = "adapter_config.json"
TENSORS_NAME = "adapter_model.safetensors"

FACTOR_KEY = re.compile(r"(?P<name>.+)\.lora_(?P<part>[AB])(?:\.[^.]+)?\.weight")
# Settings with which a LoRA adds more to W than the product of two factors.
MORE_THAN_TWO_FACTORS = (
    "use_dora",
    "lora_bias",
    "target_parameters",
    "trainable_token_indices",
    "layer_replication",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "bias",
)
INITS_THAT_MOVE_WEIGHTS = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class LoRA:
    """The factors of one layer. B A is added to W [n, k].

    Attributes:
        A: [r, k], or [e, r, k] for a 3-D weight [e, n, k] of experts.
        B: [n, r], or [e, n, r] for experts. One of A and B may be [1, ..], shared by all experts.
        experts: The number of experts, 0 for a linear layer.
    """

    A: Tensor
    B: Tensor
    experts: int = 0

    @property
    def rank(self) -> int:
        return self.A.shape[-2]

    @property
    def sizes(self) -> tuple[int, int]:
        """(in_features, out_features)."""
        return self.A.shape[-1], self.B.shape[-2]

    @property
    def norm(self) -> float:
        """|B A|, without the product: it is |R S^T|, of the QR factors B = Q R and A^T = P S."""
        S = torch.linalg.qr(self.A.mT, mode="r").R
        R = torch.linalg.qr(self.B, mode="r").R
        return float((R @ S.mT).norm())


# ---- reading -------------------------------------------------------------------------------------


def read_tensors(path: Path) -> Mapping[str, Tensor]:
    """Returns the tensors in a file of safetensors or torch.save. No code in it is executed."""
    from safetensors.torch import load_file

    if not path.is_file():
        raise ValueError(f"source: expected a file of tensors, got {path}, which is not a file")
    try:
        if path.suffix == ".safetensors":
            # Maps the file into memory, so that values are read only when they are used.
            return load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    # A damaged pickle makes torch.load raise errors of any kind.
    except Exception as error:
        raise ValueError(
            f"source: expected tensors by safetensors or torch.save in {path}, got "
            f"{type(error).__name__} {error}"
        ) from None
    if not isinstance(tensors, Mapping) or not all(
        isinstance(tensor, Tensor) for tensor in tensors.values()
    ):
        raise ValueError(f"{path}: expected a dictionary of tensors, got {type(tensors).__name__}")
    return tensors


def read_peft_tensors(directory: Path) -> Mapping[str, Tensor]:
    """Returns the tensors in the file of an adapter that PEFT saved."""
    path = directory / TENSORS_NAME
    old_path = directory / "adapter_model.bin"  # of PEFT before it had safetensors
    return read_tensors(old_path if old_path.is_file() and not path.is_file() else path)


def base_name(key: str) -> str:
    """Returns a tensor's name without PEFT's prefix.

    "base_model.model." for tensors in the base model, "base_model." for those of the tuner.
    """
    return key.removeprefix("base_model.").removeprefix("model.")


def modules_of(names: Iterable[str], endings: Iterable[str] | None) -> list[str]:
    """Returns the modules that hold tensors of these names and match one of the endings.

    Args:
        names: The names of tensors, such as "model.score.weight".
        endings: Name endings, as in modules_to_save.
    """
    modules = set()
    for name in names:
        parts = name.split(".")
        modules |= {".".join(parts[:length]) for length in range(1, len(parts))}
    return sorted(module for module in modules if name_matches(module, endings))


def read_config(directory: Path, peft_type: str) -> dict[str, Any]:
    """Returns PEFT's configuration in a folder.

    Raises:
        ValueError: If there is none, or one of another method.
    """
    path = directory / CONFIG_NAME
    config = json_in(path, "source")
    # Old files have "PeftType.LORA".
    method = str(config.get("peft_type", "LORA")).rpartition(".")[2]
    if method != peft_type:
        raise ValueError(f"{path}: expected peft_type {peft_type}, got {method!r:.80}")
    return config


def check_two_factors(config: Mapping[str, Any]) -> None:
    """Checks that a LoRA only adds the product of two factors.

    Raises:
        ValueError: If it does more.
    """
    for name in MORE_THAN_TWO_FACTORS:
        value = config.get(name)
        # PEFT writes one of these values for a setting that is not used.
        if value not in (None, False, "none", [], {}):
            raise ValueError(
                f"{name}: expected a LoRA of two factors per layer, which LoTR can hold, "
                f"got {value!r:.80}"
            )
    init = config.get("init_lora_weights")
    if str(init).lower().startswith(INITS_THAT_MOVE_WEIGHTS):
        raise ValueError(
            f"init_lora_weights: expected an init that leaves the base weights as they are, got "
            f"{init!r}. Save the adapter with PEFT's path_initial_model_for_weight_conversion "
            f"first."
        )


class LoRAFolder:
    """A LoRA that PEFT saved. Its layers are read one at a time, by `layer`.

    Attributes:
        path: The folder.
        config: The content of adapter_config.json.
        names: The names of the layers.
        saved: The tensors of modules_to_save by name.

    Raises:
        ValueError: If there is no such adapter, if it is of another method, or if it has more
            than its two factors (DoRA, biases, embeddings, base weights moved by its init).
    """

    def __init__(self, source: FilePath):
        self.path = Path(source)
        self.config = read_config(self.path, "LORA")
        check_two_factors(self.config)
        self._tensors = read_peft_tensors(self.path)
        self._keys: dict[str, dict[str, str]] = {}  # of tensors, by layer and then by "A" or "B"
        self.saved: dict[str, Tensor] = {}
        for key in self._tensors:
            name = base_name(key)
            if match := FACTOR_KEY.fullmatch(name):
                self._keys.setdefault(match["name"], {})[match["part"]] = key
            elif modules_of([name], self.config.get("modules_to_save")):
                self.saved[name] = self._tensors[key]
            else:
                raise ValueError(
                    f"adapter: expected lora_A, lora_B and modules_to_save, got also {name}"
                )
        if not self._keys:
            raise ValueError(
                "adapter: expected tensors <layer>.lora_A.weight and .lora_B.weight, got none"
            )
        self.names = self._keys.keys()

    def layer(self, name: str) -> LoRA:
        """Reads a layer, in float64, with the scaling multiplied into B.

        Raises:
            TypeError, ValueError: If its factors are incomplete, of shapes that do not fit, or not
                finite, or if lora_alpha is not a finite number.
        """
        keys = self._keys[name]
        if len(keys) < 2:
            raise ValueError(f"{name}: expected lora_A and lora_B, got only lora_{min(keys)}")
        A = self._tensors[keys["A"]]
        B = self._tensors[keys["B"]]
        if A.dim() != 2 or B.dim() != 2 or len(A) != B.shape[1] or not A.numel() or not B.numel():
            raise ValueError(
                f"{name}: expected lora_A [r, k] and lora_B [n, r], "
                f"got {tuple(A.shape)} and {tuple(B.shape)}"
            )
        if not all(t.is_floating_point() and bool(t.isfinite().all()) for t in (A, B)):
            raise ValueError(
                f"{name}: expected finite floating values, got {A.dtype}, {B.dtype} or values that "
                f"are not finite"
            )
        alpha = self._alpha(name)
        check_number("lora_alpha", alpha)
        # Not r of the configuration, because rank_pattern may give this layer another one.
        rank = len(A)
        divisor = math.sqrt(rank) if self.config.get("use_rslora") else rank
        return LoRA(A.double(), alpha / divisor * B.double())

    def _alpha(self, name: str) -> object:
        patterns = self.config.get("alpha_pattern") or {}
        # The first match, as in PEFT.
        alphas = (a for pattern, a in patterns.items() if re.match(rf"(.*\.)?({pattern})$", name))
        return next(alphas, self.config.get("lora_alpha"))


def read_lora(source: FilePath) -> tuple[dict[str, LoRA], dict[str, Tensor], dict[str, Any]]:
    """Reads and checks a LoRA that PEFT saved.

    Returns:
        The layers by name in float64, with the scaling multiplied into B; the tensors of
        modules_to_save by name; and the configuration.

    Raises:
        TypeError, ValueError: As `LoRAFolder`, or as its `layer`.
    """
    folder = LoRAFolder(source)
    return {name: folder.layer(name) for name in folder.names}, folder.saved, folder.config


# ---- writing -------------------------------------------------------------------------------------


def put_folder(
    directory: Path,
    name: str,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes both files of an adapter.

    Readers look for the configuration first. It is removed before the tensors are replaced and
    written after them, so a process that is killed never leaves it with tensors of another adapter.

    Args:
        directory: Created if it does not exist.
        name: The name of the tensors' file.
        tensors: The tensors by name.
        config: The content of adapter_config.json.
        metadata: For the header of the tensors' file.
    """
    if directory.is_dir():
        (directory / CONFIG_NAME).unlink(missing_ok=True)
    put_tensors(directory / name, tensors, dict(metadata or {"format": "pt"}))
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    put_file(directory / CONFIG_NAME, text.encode())
