"""Converts adapters: LoTR to LoRA and back, many LoRAs to one bank, and the original checkpoints.

    python -m lotr_ext.convert lotr-to-lora SOURCE DESTINATION
    python -m lotr_ext.convert lora-to-lotr SOURCE DESTINATION --rank 16
    python -m lotr_ext.convert loras-to-bank SOURCE.. DESTINATION --rank auto=0.95
    python -m lotr_ext.convert original-to-lotr FILE DESTINATION

Files here. Each imports only from those above it:

    lora.py       PEFT's files: reads and checks a folder with a LoRA, writes one of any adapter
    hosts.py      the names and forms that servers expect for a mixture's experts
    to_lora.py    a LoTR adapter, or a task, becomes a LoRA
    to_lotr.py    a LoRA, or a checkpoint of the original implementation, becomes LoTR
    bank.py       many LoRAs become one adapter with a task for each
    __main__.py   the commands
"""

from .bank import BankConversion, loras_to_bank
from .lora import LoRA, read_lora
from .to_lora import export_lora, lotr_to_lora
from .to_lotr import Conversion, lora_to_lotr, original_to_lotr

__all__ = [
    "BankConversion",
    "Conversion",
    "LoRA",
    "export_lora",
    "lora_to_lotr",
    "loras_to_bank",
    "lotr_to_lora",
    "original_to_lotr",
    "read_lora",
]
