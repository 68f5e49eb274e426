"""LoTR and other tools: PEFT (`lotr_ext.interop.peft`), LoRA adapters, the original implementation's checkpoints.

Only `lotr_ext.interop.peft` imports PEFT; everything else here reads and writes files.
"""

from .lora import export_lora, lora_factors

__all__ = ["export_lora", "lora_factors"]
