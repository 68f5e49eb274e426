"""LoTR as a method of PEFT. Importing this module registers it:

    from lotr_ext.interop.peft import LoTRPeftConfig
    model = peft.get_peft_model(model, LoTRPeftConfig(rank=16, target_modules=["query", "value"]))

and get_peft_model, save_pretrained, from_pretrained, add_adapter, set_adapter, disable_adapter, merge_adapter,
merge_and_unload, modules_to_save and get_model_status work as for PEFT's own methods, on this package's operators: the shared
gradient, one u = x A for siblings, the kernels. A and B are saved once for each group. A process that loads such an adapter
must import this module first. docs/peft.md lists what is checked and what PEFT cannot do here.

PEFT's registry is a closed enum, so `register_peft_method` refuses "lotr"; the mappings behind it take any string.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["MINIMUM_PEFT", "LoTRPeftConfig", "LoTRPeftLinear", "LoTRPeftModel"]

MINIMUM_PEFT = (0, 21)  # the first whose tuners define the names of their tensors on disk


def _check_version() -> None:
    want = f"expected PEFT {'.'.join(map(str, MINIMUM_PEFT))} or later"
    try:
        import peft
    except ImportError as error:
        raise ImportError(f"lotr_ext.interop.peft: {want}, got none that can be imported ({error})") from error
    found = re.match(r"(\d+)\.(\d+)", peft.__version__)
    if found is None or tuple(map(int, found.groups())) < MINIMUM_PEFT:
        raise ImportError(f"lotr_ext.interop.peft: {want}, got {peft.__version__}")


_check_version()

from ..model.adapter_files import JSON_NAME  # noqa: E402
from ..model.peft_files import CONFIG_NAME  # noqa: E402
from .peft_config import LOTR, LoTRPeftConfig  # noqa: E402
from .peft_layer import LoTRPeftLinear  # noqa: E402
from .peft_model import LoTRPeftModel  # noqa: E402


def _register() -> None:
    from peft.config import PeftConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

    found = PEFT_TYPE_TO_CONFIG_MAPPING.get(LOTR)
    if found is not None and found is not LoTRPeftConfig:
        raise RuntimeError(f"lotr_ext.interop.peft: expected PEFT without a method LOTR, got one by {found.__module__}")
    PEFT_TYPE_TO_CONFIG_MAPPING[LOTR] = LoTRPeftConfig
    PEFT_TYPE_TO_TUNER_MAPPING[LOTR] = LoTRPeftModel
    PEFT_TYPE_TO_PREFIX_MAPPING[LOTR] = LoTRPeftModel.prefix

    PeftConfig._get_peft_type = classmethod(_naming_our_folders(PeftConfig._get_peft_type.__func__))


def _naming_our_folders(get_peft_type: Callable[..., str]) -> Callable[..., str]:
    """Wraps PEFT's reader of a folder's configuration: its error explains a folder of `lotr_ext.save_adapter`."""

    @functools.wraps(get_peft_type)
    def look(cls: type, model_id: str, **options: Any) -> str:
        directory = Path(model_id, options.get("subfolder") or "")
        if (directory / JSON_NAME).is_file() and not (directory / CONFIG_NAME).is_file():
            raise ValueError(
                f"model_id: expected a folder that PEFT has saved, got {directory}, saved by lotr_ext.save_adapter; "
                f"python -m lotr_ext.convert lotr-to-peft {directory} DESTINATION makes one of it, and "
                "lotr_ext.load_adapter(model, directory) loads it without PEFT"
            )
        return get_peft_type(cls, model_id, **options)

    return look


_register()
