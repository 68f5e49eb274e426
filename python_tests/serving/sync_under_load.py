"""Run by vLLM's own Python: versions of a task are pushed into an engine that runs, and each sequence is compared with the
model's own numbers for every version.

    python sync_under_load.py FOLDER WAY        WAY: bank (the plugin) or slots (an engine without it); prints results as JSON
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from engine import SETTINGS, environment

PARAMS = {
    "temperature": 1.0,
    "seed": 7,
    "logprobs": 0,
    "detokenize": False,
    "max_tokens": 24,
    "min_tokens": 24,
    "ignore_eos": True,
}


def refused(call: Callable, *args: object, **options: object) -> str:
    """What a call raises or answers as its error; "nothing" if it does neither."""
    try:
        answer = call(*args, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return str(answer[0].get("error", "nothing")) if isinstance(answer, list) else "nothing"


def taken(output: SimpleNamespace) -> tuple[list[int], torch.Tensor]:
    """The tokens of a sequence of vLLM's, and their logprobs."""
    tokens = list(output.token_ids)
    return tokens, torch.tensor([at[token].logprob for at, token in zip(output.logprobs, tokens, strict=True)])


class Trial:
    """The base with adapted layers, vLLM with the same base, and a CoreSync from one to the other."""

    def __init__(self, folder: Path):
        from transformers import LlamaForCausalLM
        from vllm import LLM, SamplingParams

        from lotr_ext import load_adapter
        from lotr_ext.interop.vllm import CoreSync
        from lotr_ext.model.adapted import adapted_layers

        torch.manual_seed(1)
        self.folder = folder
        self.model = load_adapter(LlamaForCausalLM.from_pretrained(folder / "base").eval(), folder / "factors")
        self.layers = adapted_layers(self.model)
        options = {**SETTINGS, "enable_prefix_caching": True, "max_loras": 3, "max_num_batched_tokens": 64}
        worker = "lotr_ext.interop.vllm.worker.CoreWorker"
        self.llm = LLM(str(folder / "base"), **options, worker_extension_cls=worker)
        self.sync, self.params = CoreSync(self.model, self.llm), SamplingParams(**PARAMS)
        self.prompts = torch.randint(3, 250, (2, 9)).tolist()
        self.cores: dict[int, list[torch.Tensor]] = {}  # of each version

    def keep_cores(self, version: int) -> None:
        self.cores[version] = [layer.core.detach().clone() for layer in self.layers.values()]

    @torch.no_grad()
    def logprobs(self, version: int, ids: list[int], tokens: list[int]) -> torch.Tensor:
        """The model's own numbers for a version."""
        for layer, core in zip(self.layers.values(), self.cores[version], strict=True):
            layer.core.copy_(core)
        logits = self.model(torch.tensor([ids + tokens])).logits[0, len(ids) - 1 : -1]
        return logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]

    def push_under_load(self) -> tuple[list[dict], list[dict]]:
        """Pushes six versions while requests of earlier ones run. What was sent, and for each request how far its logprobs are
        from the model's, for every version."""
        engine, requests, finished, sent = self.llm.llm_engine, {}, {}, []

        def steps(count: int) -> None:
            for _ in range(count):
                for out in engine.step():
                    if out.finished:
                        finished[out.request_id] = out.outputs[0]
                        requests[out.request_id]["ended"] = len(sent)

        for version in range(1, 7):
            with torch.no_grad():
                for i, layer in enumerate(self.layers.values()):
                    if version == 1 or i % 2 == version % 2:  # the other layers stay
                        layer.core.copy_(0.7 * torch.randn_like(layer.core))
            pushed, again = self.sync.push(name="policy"), self.sync.push(name="policy")
            sent.append({"version": pushed.version, "layers": pushed.layers, "bytes": pushed.bytes, "again": again.layers})
            assert again.version == pushed.version and again.request == pushed.request
            self.keep_cores(version)
            for row, ids in enumerate(self.prompts):
                one = f"{version}-{row}"
                engine.add_request(one, {"prompt_token_ids": ids}, self.params, lora_request=pushed.request)
                requests[one] = {"version": version, "ids": ids, "began": len(sent)}
            steps(5)
        while engine.has_unfinished_requests():
            steps(1)
        rows = []
        for one, request in requests.items():
            tokens, got = taken(finished[one])
            gaps = {v: float((got - self.logprobs(v, request["ids"], tokens)).abs().max()) for v in self.cores}
            rows.append({key: request[key] for key in ("version", "began", "ended")} | {"gaps": gaps})
        return sent, rows

    def wrong_messages(self) -> dict[str, str]:
        from lotr_ext.interop.vllm.message import Message, pack

        whole, count = self.sync._cores(None), len(self.layers)

        def raw(layers: int, cores: torch.Tensor) -> bytes:
            return pack(Message("raw", 1, 0, self.sync._checksum, range(layers), cores))

        good = raw(count, whole)
        sent = {"cut": good[:-40], "header": good[:40], "empty": b"", "few": raw(count - 1, whole)}
        sent |= {"short": raw(count, whole[:-1]), "infinite": raw(count, whole / 0)}
        found = {what: refused(self.llm.collective_rpc, "lotr_push", args=(message,)) for what, message in sent.items()}
        return found | {what: refused(self.sync.push, name=name) for what, name in {"slash": "a/b", "at": "a@1"}.items()}

    def wrong_models(self) -> dict[str, str]:
        from transformers import LlamaConfig, LlamaForCausalLM

        from lotr_ext import apply_lotr
        from lotr_ext.interop.vllm import CoreSync

        first, found = next(iter(self.layers.values())), {}
        with torch.no_grad():
            first.core[0, 0] = float("nan")
            found["nan"] = refused(self.sync.push, name="policy")
            first.core[0, 0] = 0
            first.factors.A[0, 0] += 1
            found["factors"] = refused(self.sync.push, name="policy")
            found["others"] = refused(CoreSync(self.model, self.llm).push, name="other")
            first.factors.A[0, 0] -= 1
        for what, change in {"deeper": {"num_hidden_layers": 3}, "wider": {"intermediate_size": 160}}.items():
            config = LlamaConfig.from_pretrained(self.folder / "base", **change)
            other = apply_lotr(LlamaForCausalLM(config), self.model.lotr_config)
            found[what] = refused(CoreSync(other, self.llm).push, name="other")
        return found

    def end(self, way: str) -> dict:
        """After more versions than the worker keeps, and from a trainer that was started again."""
        from lotr_ext.interop.vllm import CoreSync
        from lotr_ext.interop.vllm.message import Message, pack
        from lotr_ext.interop.vllm.worker import KEPT, _versions

        for _ in range(KEPT + 4):
            with torch.no_grad():
                next(iter(self.layers.values())).core.add_(0.1)
            last = self.sync.push(name="policy")
        (versions,) = _versions.values()
        held = versions.held["policy"]
        found = {"held": len(held), "kept": KEPT, "newest": last.version in held, "last": last.version}
        fresh, prompt = CoreSync(self.model, self.llm).push(name="policy"), {"prompt_token_ids": self.prompts[0]}
        (out,) = self.llm.generate(prompt, self.params, lora_request=fresh.request, use_tqdm=False)
        self.keep_cores(0)
        tokens, got = taken(out.outputs[0])
        gap = float((got - self.logprobs(0, self.prompts[0], tokens)).abs().max())
        cores = self.sync._cores(None)[next(iter(self.sync._factors.spans.values()))]
        of_others = pack(Message("policy", fresh.version + 1, fresh.version, self.sync._checksum, [0], cores, None, "0"))
        found["other base"] = self.llm.collective_rpc("lotr_push", args=(of_others,))[0]
        self.sync.drop("policy")
        found["dropped"] = "policy" in versions.held, self.sync.push(name="policy").version
        return found | {"gap": gap, "fresh": fresh.version, "traced": way == "slots" or reads_no_values(self.llm)}


def main(folder: Path, way: str) -> dict:
    environment(str(folder / "factors") if way == "bank" else None)
    torch.set_num_threads(1)
    trial = Trial(folder)
    sent, rows = trial.push_under_load()
    errors = trial.wrong_messages() | around(trial.llm, trial.model) | trial.wrong_models()
    return {"layers": len(trial.layers), "sent": sent, "rows": rows, "errors": errors, "end": trial.end(way)}


def around(llm, model) -> dict[str, str]:
    """Engines that cannot take a push."""
    from vllm.config import LoRAConfig

    from lotr_ext.interop.vllm import CoreSync, engine
    from lotr_ext.interop.vllm.worker import CoreWorker

    def without_extension(method: str, **options):
        return llm.collective_rpc(f"no_{method}", **options)

    plain = SimpleNamespace(collective_rpc=without_extension, llm_engine=llm.llm_engine)
    worker = SimpleNamespace(model_runner=SimpleNamespace())
    found = {
        "no extension": refused(CoreSync(model, plain).push),
        "no adapters": CoreWorker.lotr_push(worker, b"")["error"],
        "no slots": refused(LoRAConfig, max_loras=0).replace("\n", " "),
    }
    tested, engine.TESTED = engine.TESTED, ("0.1.", "0.2.")
    found["version"] = refused(engine.check_version)
    os.environ["LOTR_VLLM_ANY"] = "1"
    found["any version"] = refused(engine.check_version)
    engine.TESTED = tested
    return found


def reads_no_values(llm) -> bool:
    """Whether the plugin's layers run on tensors without values, so that Python cannot have read the index of slots."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    def run(model) -> bool:
        layer = next(module for module in model.modules() if getattr(module, "lotr_parts", None))
        wrapper, before = layer.punica_wrapper, layer.punica_wrapper.no_lora
        wrapper.no_lora = False
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            index = mode.from_tensor(torch.zeros(5, dtype=torch.int64))
            layer.punica_wrapper = SimpleNamespace(no_lora=False, token_lora_indices=index)
            x, y = torch.zeros(5, layer.input_size), torch.zeros(5, sum(layer.output_slices))
            done = layer._apply_lora_to_output(x, y)
        layer.punica_wrapper, wrapper.no_lora = wrapper, before
        return done.shape == y.shape

    return llm.apply_model(run)[0]


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), sys.argv[2])), flush=True)
    os._exit(0)
