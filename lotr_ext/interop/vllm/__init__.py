"""LoTR in vLLM: A and B once in the engine, and a task as r_in r_out numbers a layer, loaded by vLLM's own means.

    export_factors(model, "factors")                      once: an adapter's folder, whose A and B the engine holds
    export_task(model, "legal", task=3)                   a task of the model's TaskBank, a few hundred kB

    LOTR_FACTORS=factors  vllm serve BASE --enable-lora --max-loras 64 --max-lora-rank 16 --lora-modules legal=legal

The plugin (`vllm.general_plugins`, which vLLM calls in each of its processes) does nothing unless LOTR_FACTORS is set. With it,
every adapter that the engine loads has to be a task over these factors.

    files     what export_task writes and the engine checks; needs no vLLM
    sync      CoreSync: new cores into an engine that runs; needs no vLLM for a server
    message   what it sends
    worker    what takes it in the engine's workers
    server    what takes it in vLLM's HTTP server
    layers    vLLM's linear layers with cores in the place of LoRA's factors
    loading   cores as one of vLLM's adapters
    engine    every private name of vLLM that this package uses
    plugin    the entry point
"""

from .files import export_factors, export_task
from .sync import CoreSync, Pushed

__all__ = ["CoreSync", "Pushed", "export_factors", "export_task"]
