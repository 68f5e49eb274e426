"""LoTR and other tools: PEFT (`lotr_ext.interop.peft`), LoRA adapters, the original implementation's checkpoints.

Only `lotr_ext.interop.peft` imports PEFT; everything else here reads and writes files. `python -m lotr_ext.convert` is the
command.
"""

from ..model.peft_files import lotr_to_peft
from .adapter import LoTRAdapter
from .expert_lora import ExpertLoRA, expert_lora_factors
from .from_lora import Conversion, lora_to_lotr
from .lora import export_lora, lora_factors, lotr_to_lora
from .lora_files import LoRAAdapter, LoRALayer, read_lora
from .original import original_to_lotr

__all__ = [
    "Conversion",
    "ExpertLoRA",
    "LoRAAdapter",
    "LoRALayer",
    "LoTRAdapter",
    "expert_lora_factors",
    "export_lora",
    "lora_factors",
    "lora_to_lotr",
    "lotr_to_lora",
    "lotr_to_peft",
    "original_to_lotr",
    "read_lora",
]
