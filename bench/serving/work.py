"""Runs one way to serve in its own process: reads requests as JSON lines, and answers each with a line.

    python -m bench.serving.work WAY SHAPE        SHAPE: the JSON of `Shape`; run by a Python with the way's packages

Requests: {"tasks": n, "turn": i} measures a batch, {"pushes": n} pushes versions into an engine that decodes.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SIGMA = 0.06  # of random cores: enough to change texts, not to break them
SWAP_ROWS = 16  # rows that decode while versions are pushed
WORKER = "lotr_ext.interop.vllm.worker.CoreWorker"


@dataclass(frozen=True)
class Shape:
    """The sizes of the measurement. folder: for the factors. slots: tasks in an engine, one more than rows, because vLLM's
    CPU path applies the last slot's adapter to rows without an adapter if all slots are used."""

    model: str
    folder: str
    rows: int
    prompt: int
    new: int
    rank: int
    tasks: int
    threads: int

    @property
    def slots(self) -> int:
        return self.rows + 1


def task_of_row(shape: Shape, tasks: int, turn: int) -> list[int]:
    """The task of each row, in rotation; -1 for none if tasks is 0."""
    if not tasks:
        return [-1] * shape.rows
    return [(turn * shape.rows + row) % tasks for row in range(shape.rows)]


def prompts(shape: Shape) -> list[list[int]]:
    return [[(7 * row + 13 * at) % 200 + 30 for at in range(shape.prompt)] for row in range(shape.rows)]


def adapted(shape: Shape, tasks: int) -> Any:
    """The model with a bank of random tasks; the factors are the same in each process."""
    import torch
    from transformers import AutoModelForCausalLM

    from lotr_ext import LoTRConfig, TaskBank, apply_lotr

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(shape.model, dtype=torch.float32).eval()
    apply_lotr(model, LoTRConfig(rank=shape.rank, target_modules="all-linear", group_by="width"))
    bank = TaskBank(model, tasks)
    for _ in range(tasks):
        bank.add()
    with torch.no_grad():
        for core in bank.cores:
            for task, one in enumerate(core):
                one.normal_(0, SIGMA, generator=torch.Generator().manual_seed(task))
    return model


class Clock:
    """Wall and CPU seconds since its construction."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        return {"wall": time.perf_counter() - self.wall, "cpu": time.process_time() - self.cpu}


class Eager:
    """transformers' model; prefill and decode as in generate."""

    def __init__(self, shape: Shape):
        self.shape = shape

    def run(self, tasks: int, turn: int) -> dict[str, Any]:
        import torch

        with torch.no_grad(), self.chosen(task_of_row(self.shape, tasks, turn)) as options:
            clock = Clock()
            out = self.model(input_ids=torch.tensor(prompts(self.shape)), use_cache=True, logits_to_keep=1, **options)
            tokens = [out.logits[:, -1].argmax(-1)]
            prefill, clock = clock.read(), Clock()
            for _ in range(self.shape.new - 1):
                out = self.model(input_ids=tokens[-1][:, None], past_key_values=out.past_key_values, use_cache=True, **options)
                tokens.append(out.logits[:, -1].argmax(-1))
            return {"prefill": prefill, "decode": clock.read(), "tokens": torch.stack(tokens, 1).tolist()}


class Own(Eager):
    """lotr_ext's `mixed`."""

    def __init__(self, shape: Shape):
        super().__init__(shape)
        self.model = adapted(shape, shape.tasks)
        self.bytes_a_task = sum(core[0].numel() * core.element_size() for core in self.model.lotr_tasks.cores)

    @contextlib.contextmanager
    def chosen(self, rows: list[int]) -> Iterator[dict[str, Any]]:
        import torch

        from lotr_ext import disabled, mixed

        with disabled(self.model) if max(rows) < 0 else mixed(self.model, torch.tensor(rows)):
            yield {}


class Peft(Eager):
    """PEFT's LoRA adapters by `adapter_names`, of the same rank."""

    def __init__(self, shape: Shape):
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        super().__init__(shape)
        model = AutoModelForCausalLM.from_pretrained(shape.model, dtype=torch.float32).eval()
        config = LoraConfig(r=shape.rank, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        self.model = get_peft_model(model, config, adapter_name="t0")
        for task in range(1, min(shape.rows, shape.tasks)):
            self.model.add_adapter(f"t{task}", config)
        self.model.eval()
        own = (p for name, p in self.model.named_parameters() if ".t0." in name)
        self.bytes_a_task = sum(p.numel() * p.element_size() for p in own)

    @contextlib.contextmanager
    def chosen(self, rows: list[int]) -> Iterator[dict[str, Any]]:
        with self.model.disable_adapter() if max(rows) < 0 else contextlib.nullcontext():
            yield {} if max(rows) < 0 else {"adapter_names": [f"t{task}" for task in rows]}


class Engine:
    """vLLM in this process: "off" without LoRA, "native" with the plugin, "lora" with adapters in LoRA's slots."""

    def __init__(self, shape: Shape, way: str):
        import torch

        self.shape, self.way, self.requests, self.count = shape, way, [], 0
        most = {"off": 0, "native": shape.tasks, "lora": min(shape.rows, shape.tasks)}[way]
        self.model = None if way == "off" else adapted(shape, most)
        if way == "native":
            from lotr_ext.interop.vllm import export_factors

            export_factors(self.model, Path(shape.folder) / "factors")
            os.environ["LOTR_FACTORS"] = str(Path(shape.folder) / "factors")
        from vllm import LLM

        from lotr_ext.model.adapted import adapted_layers

        options: dict[str, Any] = {"skip_tokenizer_init": True, "dtype": "float32", "enforce_eager": True, "seed": 0}
        options |= {"max_model_len": 64 + shape.prompt + shape.new, "max_num_seqs": shape.rows, "enable_prefix_caching": False}
        options |= {"max_num_batched_tokens": max(shape.rows * shape.prompt, 64 + shape.prompt + shape.new)}
        if way != "off":
            stored = max(most, shape.slots) + 8
            options |= {"enable_lora": True, "max_loras": shape.slots, "max_cpu_loras": stored, "worker_extension_cls": WORKER}
            if way == "lora":  # without it vLLM also computes LoRA of embeddings and the head
                names = {name.rpartition(".")[2] for name in adapted_layers(self.model)}
                options["lora_target_modules"] = sorted(names)
            options |= {"max_lora_rank": next(rank for rank in (8, 16, 32, 64, 128, 256) if rank >= shape.rank)}
        self.engine = LLM(shape.model, **options)
        torch.set_num_threads(shape.threads)
        if way != "off":
            from lotr_ext import lotr_parameters
            from lotr_ext.interop.vllm import CoreSync

            self.sync = CoreSync(self.model, self.engine)
            self.requests = [self.sync.push(task).request for task in range(most)]
            own = {id(p) for p in (*lotr_parameters(self.model), *self.model.lotr_tasks.cores)}
            for parameter in self.model.parameters():
                if id(parameter) not in own:
                    parameter.data = torch.empty(0)  # only the cores are needed from here
        self.bytes_a_task = self._bytes()

    def _bytes(self) -> int:
        """The bytes per slot: the engine's tensors that grow with max_loras, over max_loras."""
        if self.way == "off":
            return 0

        def slot(model: Any) -> int:
            seen: dict[int, int] = {}
            for module in model.modules():
                parts = [part.cores for part in getattr(module, "lotr_parts", ()) if part is not None]
                for stack in parts or (*getattr(module, "lora_a_stacked", ()), *getattr(module, "lora_b_stacked", ())):
                    seen[stack.untyped_storage().data_ptr()] = stack.untyped_storage().nbytes() // self.shape.slots
            return sum(seen.values())

        return self.engine.apply_model(slot)[0]

    def _begin(self, requests: list[Any], new: int) -> None:
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=new, min_tokens=new, ignore_eos=True, detokenize=False)
        for request, ids in zip(requests, prompts(self.shape)):
            self.engine.llm_engine.add_request(str(self.count), {"prompt_token_ids": ids}, params, lora_request=request)
            self.count += 1

    def run(self, tasks: int, turn: int) -> dict[str, Any]:
        engine, first, found = self.engine.llm_engine, self.count, {}
        rows = task_of_row(self.shape, tasks, turn)
        self._begin([None if task < 0 else self.requests[task] for task in rows], self.shape.new)
        clock = Clock()
        engine.step()
        prefill, clock = clock.read(), Clock()
        while engine.has_unfinished_requests():
            found |= {int(out.request_id): list(out.outputs[0].token_ids) for out in engine.step() if out.finished}
        return {"prefill": prefill, "decode": clock.read(), "tokens": [found[first + row] for row in range(self.shape.rows)]}

    def push(self, count: int) -> dict[str, Any]:
        """Milliseconds of each push of all cores, between two steps of a decoding engine; one row uses the new version."""
        import torch

        from lotr_ext.model.adapted import adapted_layers

        layers, engine, seconds = adapted_layers(self.model).values(), self.engine.llm_engine, []
        rows = [self.requests[row % len(self.requests)] for row in range(min(SWAP_ROWS, self.shape.rows))]
        pushed = self.sync.push(name="policy")
        while len(seconds) < count:
            if not engine.has_unfinished_requests():
                self._begin([pushed.request, *rows[1:]], self.shape.new + 48)
            engine.step()
            with torch.no_grad():
                for layer in layers:
                    layer.core.normal_(0, SIGMA)
            pushed = self.sync.push(name="policy")
            seconds.append(pushed.seconds)
        while engine.has_unfinished_requests():
            engine.step()
        return {"milliseconds": [1000 * one for one in seconds], "bytes": pushed.bytes}


def main(way: str, shape: Shape) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keep the output of libraries out of the answers
    os.environ |= {"OMP_NUM_THREADS": str(shape.threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1"}
    os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_HOST_IP": "127.0.0.1"}
    os.environ |= {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    import torch

    torch.set_num_threads(shape.threads)
    begin: dict[str, Callable[[], Any]] = {"own": lambda: Own(shape), "peft": lambda: Peft(shape)}
    server = begin.get(way, lambda: Engine(shape, way))()
    print(json.dumps({"bytes_a_task": server.bytes_a_task}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        found = server.push(request["pushes"]) if "pushes" in request else server.run(request["tasks"], request["turn"])
        print(json.dumps(found), file=answers, flush=True)
    os._exit(0)  # vLLM's shutdown can hang


if __name__ == "__main__":
    main(sys.argv[1], Shape(**json.loads(sys.argv[2])))
