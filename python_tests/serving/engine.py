"""Run by the Python of vLLM: starts an engine with tasks and runs the steps of a list.

    python engine.py SPEC     SPEC: JSON of {"model", "factors", "options", "steps"}

The last line that is printed has the results, one per step. A step is one of
    {"load": [name, id, folder], "inplace": bool}
    {"generate": [[token ids, id or null], ...], "tokens": n}
Its result is null, a list of token lists, or {"error": text}.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

SETTINGS = {
    "skip_tokenizer_init": True,
    "dtype": "float32",
    "max_model_len": 64,
    "max_num_seqs": 8,
    "enforce_eager": True,
    "enable_prefix_caching": False,
    "enable_lora": True,
    "max_lora_rank": 8,
}


def environment(factors: str | None) -> None:
    """Sets one thread, one process and no network. Call it before vLLM is imported."""
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
    if factors:
        os.environ["LOTR_FACTORS"] = factors


def main(spec: dict) -> None:
    environment(spec["factors"])
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm = LLM(spec["model"], **{**SETTINGS, **spec["options"]})
    loaded: dict[int, LoRARequest] = {}

    def step(one: dict) -> object:
        if "load" in one:
            name, number, folder = one["load"]
            request = LoRARequest(name, number, folder, load_inplace=one.get("inplace", False))
            llm.llm_engine.add_lora(request)
            loaded[number] = LoRARequest(name, number, folder)
            return None
        count = one["tokens"]
        params = SamplingParams(
            temperature=0, max_tokens=count, min_tokens=count, ignore_eos=True, detokenize=False
        )
        prompts = [{"prompt_token_ids": ids} for ids, _ in one["generate"]]
        requests = [None if number is None else loaded[number] for _, number in one["generate"]]
        found = llm.generate(prompts, params, lora_request=requests, use_tqdm=False)
        return [list(one.outputs[0].token_ids) for one in found]

    results = []
    for one in spec["steps"]:
        try:
            results.append(step(one))
        except Exception as error:
            results.append({"error": f"{type(error).__name__}: {error}"})
    print(json.dumps(results), flush=True)
    os._exit(0)  # after an error inside of a step vLLM's own end can wait for ever


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
