"""Starts a vLLM engine with tasks and runs a list of steps, in the Python of vLLM.

    python engine.py SPEC     SPEC: JSON of {"model", "factors", "options", "steps"}

The last printed line has the results, one per step. A step is one of
    {"load": [name, id, folder], "inplace": bool}
    {"generate": [[token ids, id or null], ...], "tokens": n}
Its result is null, a list of token lists, or {"error": text}.
"""

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


ENVIRONMENT = {  # one thread, one process and no network
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


def main(spec: dict) -> None:
    os.environ |= {**ENVIRONMENT, "LOTR_FACTORS": spec["factors"]}
    # Imported here, because vLLM reads the environment when it is imported.
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm = LLM(spec["model"], **{**SETTINGS, **spec["options"]})
    loaded: dict[int, LoRARequest] = {}

    def run_step(step: dict) -> object:
        if "load" in step:
            name, number, folder = step["load"]
            request = LoRARequest(name, number, folder, load_inplace=step.get("inplace", False))
            llm.llm_engine.add_lora(request)
            loaded[number] = LoRARequest(name, number, folder)
            return None
        count = step["tokens"]
        params = SamplingParams(
            temperature=0, max_tokens=count, min_tokens=count, ignore_eos=True, detokenize=False
        )
        prompts = [{"prompt_token_ids": ids} for ids, _ in step["generate"]]
        requests = [None if number is None else loaded[number] for _, number in step["generate"]]
        outputs = llm.generate(prompts, params, lora_request=requests, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    results = []
    for step in spec["steps"]:
        try:
            results.append(run_step(step))
        except Exception as error:
            results.append({"error": f"{type(error).__name__}: {error}"})
    print(json.dumps(results), flush=True)
    os._exit(0)  # after an error in a step, vLLM's shutdown can hang


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
