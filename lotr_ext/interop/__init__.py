"""LoTR and other tools: PEFT, transformers' Trainer, Opacus, LoRA adapters, the original implementation's checkpoints.

`lotr_ext.interop.peft` imports PEFT, `lotr_ext.interop.trainer` transformers and `lotr_ext.interop.opacus` Opacus. All other
modules here read and write files, as the command `python -m lotr_ext.convert` does.
"""

from ..model.peft_files import lotr_to_peft
from .adapter import LoTRAdapter
from .expert_lora import ExpertLoRA, expert_lora_factors
from .from_lora import Conversion, lora_to_lotr
from .gguf import lotr_to_gguf
from .lora import export_lora, lora_factors, lotr_to_lora
from .lora_files import LoRAAdapter, LoRALayer, read_lora
from .loras_to_bank import BankConversion, loras_to_bank
from .original import original_to_lotr

__all__ = [
    "BankConversion",
    "Conversion",
    "ExpertLoRA",
    "LoRAAdapter",
    "LoRALayer",
    "LoTRAdapter",
    "expert_lora_factors",
    "export_lora",
    "lora_factors",
    "lora_to_lotr",
    "loras_to_bank",
    "lotr_to_gguf",
    "lotr_to_lora",
    "lotr_to_peft",
    "original_to_lotr",
    "read_lora",
]
