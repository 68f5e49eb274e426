"""LoTR as a method of PEFT. Importing this package registers it:

    from lotr_ext.peft import LoTRPeftConfig
    model = peft.get_peft_model(model, LoTRPeftConfig(rank=16, target_modules=["query", "value"]))

PEFT's functions then work as for its methods: save_pretrained, from_pretrained, add_adapter,
set_adapter, delete_adapter, disable_adapter, merge_adapter, unmerge_adapter, merge_and_unload,
modules_to_save, adapter_names. A process that loads such an adapter must import this package first.
`register_peft_method` accepts only members of PEFT's enum, so this file fills the mappings itself.

    config.py   LoTRPeftConfig, and its form in a file
    layer.py    a layer with adapters by name
    model.py    PEFT's tuner, which owns the factors
"""

from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)

from .config import LoTRPeftConfig, PeftType
from .layer import LoTRPeftLinear
from .model import LoTRPeftModel

__all__ = ["LoTRPeftConfig", "LoTRPeftLinear", "LoTRPeftModel"]

PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LOTR] = LoTRPeftConfig
PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LOTR] = LoTRPeftModel
PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.LOTR] = LoTRPeftModel.prefix
