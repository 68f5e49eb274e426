"""LoTR in vLLM: the engine holds A and B once, and vLLM loads a task as r_in r_out numbers per layer.

    export_factors(model, "factors")                      once: the folder of an adapter; the engine holds its A and B
    export_task(model, "legal", task=3)                   a task of the model's TaskBank, a few hundred kB

    LOTR_FACTORS=factors  vllm serve BASE --enable-lora --max-loras 64 --max-lora-rank 16 --lora-modules legal=legal

The plugin (`vllm.general_plugins`, which vLLM calls in each of its processes) does nothing unless LOTR_FACTORS is set. With it,
every adapter that the engine loads must be a task over these factors.

    files     what export_task writes and the engine checks; needs no vLLM
    sync      CoreSync: sends new cores to a running engine; needs no vLLM for a server
    message   the messages of CoreSync
    worker    receives them in the engine's workers
    server    receives them in vLLM's HTTP server
    layers    vLLM's linear layers with cores instead of LoRA's factors
    loading   cores as one of vLLM's adapters
    engine    all private names of vLLM that this package uses
    plugin    the entry point
"""

from .files import export_factors, export_task
from .sync import CoreSync, Pushed

__all__ = ["CoreSync", "Pushed", "export_factors", "export_task"]
