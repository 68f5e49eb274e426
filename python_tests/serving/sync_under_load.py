"""Run by vLLM's own Python: versions of a task are pushed into an engine that runs, and each sequence is compared with the
model's own numbers for every version.

    python sync_under_load.py FOLDER WAY        WAY: bank (the plugin) or slots (an engine without it); prints results as JSON
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

from engine import SETTINGS, environment


def main(folder: Path, way: str) -> dict:
    environment(str(folder / "factors") if way == "bank" else None)
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from vllm import LLM, SamplingParams

    from lotr_ext import apply_lotr, load_adapter
    from lotr_ext.interop.vllm import CoreSync
    from lotr_ext.interop.vllm.message import Message, pack
    from lotr_ext.interop.vllm.worker import KEPT, _versions
    from lotr_ext.model.adapted import adapted_layers

    torch.manual_seed(1)
    model = load_adapter(LlamaForCausalLM.from_pretrained(folder / "base").eval(), folder / "factors")
    layers = adapted_layers(model)
    options = {**SETTINGS, "enable_prefix_caching": True, "max_loras": 3, "max_num_batched_tokens": 64}
    worker = "lotr_ext.interop.vllm.worker.CoreWorker"
    llm = LLM(str(folder / "base"), **options, worker_extension_cls=worker)
    sync, engine = CoreSync(model, llm), llm.llm_engine
    prompts = torch.randint(3, 250, (2, 9)).tolist()
    length = {"max_tokens": 24, "min_tokens": 24, "ignore_eos": True}
    params = SamplingParams(temperature=1.0, seed=7, logprobs=0, detokenize=False, **length)
    cores, requests, finished, sent = {}, {}, {}, []

    def steps(count: int) -> None:
        for _ in range(count):
            for out in engine.step():
                if out.finished:
                    finished[out.request_id] = out.outputs[0]
                    requests[out.request_id]["ended"] = len(sent)

    for version in range(1, 7):
        with torch.no_grad():
            for i, layer in enumerate(layers.values()):
                if version == 1 or i % 2 == version % 2:  # the other layers stay
                    layer.core.copy_(0.7 * torch.randn_like(layer.core))
        pushed = sync.push(name="policy")
        again = sync.push(name="policy")
        sent.append({"version": pushed.version, "layers": pushed.layers, "bytes": pushed.bytes, "again": again.bytes})
        assert again.version == pushed.version and again.request == pushed.request
        cores[version] = [layer.core.detach().clone() for layer in layers.values()]
        for row, ids in enumerate(prompts):
            one = f"{version}-{row}"
            engine.add_request(one, {"prompt_token_ids": ids}, params, lora_request=pushed.request)
            requests[one] = {"version": version, "ids": ids, "began": len(sent)}
        steps(5)
    while engine.has_unfinished_requests():
        steps(1)

    @torch.no_grad()
    def logprobs(version: int, ids: list[int], tokens: list[int]) -> torch.Tensor:
        for layer, core in zip(layers.values(), cores[version], strict=True):
            layer.core.copy_(core)
        logits = model(torch.tensor([ids + tokens])).logits[0, len(ids) - 1 : -1]
        return logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]

    rows = []
    for one, request in requests.items():
        tokens = list(finished[one].token_ids)
        got = torch.tensor([at[token].logprob for at, token in zip(finished[one].logprobs, tokens, strict=True)])
        gaps = {v: float((got - logprobs(v, request["ids"], tokens)).abs().max()) for v in cores}
        rows.append({key: request[key] for key in ("version", "began", "ended")} | {"gaps": gaps})

    def refused(call, *args, **options) -> str:
        try:
            answer = call(*args, **options)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return str(answer[0].get("error", "nothing")) if isinstance(answer, list) else "nothing"

    whole = sync._cores(None)
    good = pack(Message("raw", 1, 0, sync._checksum, range(len(layers)), whole))
    few = pack(Message("raw", 1, 0, sync._checksum, range(len(layers) - 1), whole))
    short = pack(Message("raw", 1, 0, sync._checksum, range(len(layers)), whole[:-1]))
    infinite = pack(Message("raw", 1, 0, sync._checksum, range(len(layers)), whole / 0))
    first = next(iter(layers))
    errors = {
        "cut": refused(llm.collective_rpc, "lotr_push", args=(good[:-40],)),
        "header": refused(llm.collective_rpc, "lotr_push", args=(good[:40],)),
        "empty": refused(llm.collective_rpc, "lotr_push", args=(b"",)),
        "few": refused(llm.collective_rpc, "lotr_push", args=(few,)),
        "short": refused(llm.collective_rpc, "lotr_push", args=(short,)),
        "infinite": refused(llm.collective_rpc, "lotr_push", args=(infinite,)),
        "slash": refused(sync.push, name="a/b"),
        "at": refused(sync.push, name="a@1"),
    }
    errors |= around(llm, model, refused)
    with torch.no_grad():
        layers[first].core[0, 0] = float("nan")
    errors["nan"] = refused(sync.push, name="policy")
    with torch.no_grad():
        layers[first].core[0, 0] = 0
        factor = layers[first].factors.A
        factor[0, 0] += 1
        errors["factors"] = refused(sync.push, name="policy")
        other = CoreSync(model, llm)
        errors["others"] = refused(other.push, name="other")
        factor[0, 0] -= 1
    for what, change in {"deeper": {"num_hidden_layers": 3}, "wider": {"intermediate_size": 160}}.items():
        config = LlamaConfig.from_pretrained(folder / "base", **change)
        errors[what] = refused(CoreSync(apply_lotr(LlamaForCausalLM(config), model.lotr_config), llm).push, name="other")
    for _ in range(KEPT + 4):
        with torch.no_grad():
            layers[first].core += 0.1
        last = sync.push(name="policy")
    (versions,) = _versions.values()
    held, kept = versions.held["policy"], KEPT
    fresh = CoreSync(model, llm).push(name="policy")  # a trainer that was started again
    out = llm.generate({"prompt_token_ids": prompts[0]}, params, lora_request=fresh.request, use_tqdm=False)[0].outputs[0]
    cores[0] = [layer.core.detach().clone() for layer in layers.values()]
    got = torch.tensor([at[token].logprob for at, token in zip(out.logprobs, out.token_ids, strict=True)])
    gap = float((got - logprobs(0, prompts[0], list(out.token_ids))).abs().max())
    end = {
        "gap": gap,
        "held": len(held),
        "kept": kept,
        "newest": last.version in held,
        "fresh": fresh.version,
        "last": last.version,
    }
    end["traced"] = way == "slots" or reads_no_values(llm)
    return {"layers": len(layers), "sent": sent, "rows": rows, "errors": errors, "end": end}


def around(llm, model, refused) -> dict[str, str]:
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
    import torch
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
