"""LoTR and other tools. `lotr_ext.interop.peft` imports PEFT, `lotr_ext.interop.trainer` transformers,
`lotr_ext.interop.opacus` Opacus and `lotr_ext.interop.vllm` vLLM. All other modules read and write files, as the command
`python -m lotr_ext.convert` does. The files:

peft.py            what a program for PEFT imports
  peft_config.py     LoTRPeftConfig;  peft_model.py, peft_layer.py, peft_experts.py, peft_shared.py: the method and its layers
lora.py            export as LoRA;  expert_lora.py: of experts;  gguf.py: for llama.cpp
from_lora.py       a LoRA as LoTR;  loras_to_bank.py: many as tasks;  lora_files.py: reading LoRA;  tucker.py: the decomposition
original.py        checkpoints of the original implementation;  adapter.py: what a conversion makes
packed.py          checkpoints with quantised experts, kept packed
trainer.py         AdapterTrainer and callbacks;  opacus.py: private training
vllm               a plugin that serves tasks, and sends new versions of them
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
