"""A mixture's quantised experts: the peak memory of a training step, compared with dense experts.

    python -m bench.packed                        mxfp4, fp8; 256 tokens, 32 experts H 1024, I 1024, top 4, r = 16
    PYTHONPATH=.venv/quantized python -m bench.packed --formats mxfp4,fp8,nf4,int8

A shape is tokens x hidden x intermediate x experts x top k x rank. For each format the same adapted experts run packed and
dense, in bfloat16: weights, the most that a step of forward and backward allocates beyond them, and the step's time (medians
over interleaved rounds). The gradients of both must be equal, bit for bit. Results go to bench/results/<machine>/packed.jsonl.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .measure.counted import peak_bytes
from .measure.names import chosen, sizes
from .measure.session import Session, Table, add_options, bytes_text, check_options, start, time_text
from .measure.timing import against, interleave, training, with_sum

RIVALS = ("packed", "dense")
SHAPE = "256x1024x1024x32x4x16"


class PackedCase(NamedTuple):
    """m tokens, each to top_k of e experts of [2 i, h] and [h, i]."""

    m: int
    h: int
    i: int
    e: int
    top_k: int
    r: int
    format: str
    dtype: str
    threads: int

    def name(self) -> str:
        return f"{self.format}, {self.m} tokens, {self.e} experts {self.h}x{self.i} top {self.top_k} r{self.r} t{self.threads}"


def _config(case: PackedCase) -> Any:
    from transformers import GptOssConfig, MixtralConfig

    made = GptOssConfig if case.format == "mxfp4" else MixtralConfig
    config = made(hidden_size=case.h, intermediate_size=case.i, num_local_experts=case.e)
    config._experts_implementation = "eager"
    return config


def _mxfp4(case: PackedCase) -> nn.Module:
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    with torch.device("meta"):
        module = GptOssExperts(_config(case))
    for name, n, k in (("gate_up_proj", 2 * case.i, case.h), ("down_proj", case.h, case.i)):
        delattr(module, name)
        blocks = torch.randint(0, 256, (case.e, n, k // 32, 16), dtype=torch.uint8)
        scales = torch.randint(118, 124, (case.e, n, k // 32), dtype=torch.uint8)
        for part, tensor in ((f"{name}_blocks", blocks), (f"{name}_scales", scales)):
            module.register_parameter(part, nn.Parameter(tensor, requires_grad=False))
        module.register_parameter(f"{name}_bias", nn.Parameter(torch.zeros(case.e, n, dtype=torch.bfloat16)))
    return module


def _fp8(case: PackedCase) -> nn.Module:
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS, FP8Experts
    from transformers.integrations.moe import use_experts_implementation

    made = use_experts_implementation(FP8Experts, experts_interface=ALL_FP8_EXPERTS_FUNCTIONS)
    module = made(_config(case), block_size=(128, 128))
    for name, parameter in module.named_parameters():
        value = torch.rand(parameter.shape) * 1e-3 if name.endswith("_scale_inv") else torch.randn(parameter.shape) * 30
        parameter.data = value.to(parameter.dtype)
    return module


def _plain(case: PackedCase) -> nn.Module:
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    module = MixtralExperts(_config(case)).to(torch.bfloat16)
    for parameter in module.parameters():
        nn.init.normal_(parameter, 0, 0.02)
    return module


def _nf4(case: PackedCase) -> nn.Module:
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    module = _plain(case)
    for name in ("gate_up_proj", "down_proj"):
        replace_parameter_4bit(module, name, quant_type="nf4")
    return module


def _int8(case: PackedCase) -> nn.Module:
    from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig, quantize_

    module = _plain(case)
    quantize_(module, FqnToConfig({name: Int8WeightOnlyConfig() for name in ("gate_up_proj", "down_proj")}), filter_fn=None)
    return module


MAKE: dict[str, Callable[[PackedCase], nn.Module]] = {"mxfp4": _mxfp4, "fp8": _fp8, "nf4": _nf4, "int8": _int8}


def _dense(module: nn.Module, case: PackedCase) -> nn.Module:
    """The same experts, dense, in a class of transformers with the same gate."""
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    from lotr_ext.layers.packed import weight_of

    with torch.device("meta"):
        twin = (GptOssExperts if case.format == "mxfp4" else MixtralExperts)(_config(case))
    for name in list(twin._parameters):
        if name.endswith("_bias"):
            value = getattr(module, name).detach()
        else:
            value = weight_of(module, name, module.is_transposed).dense(0, case.e, torch.bfloat16)
            value = value.mT if twin.is_transposed else value
        twin.register_parameter(name, nn.Parameter(value.contiguous(), requires_grad=False))
    if case.format == "fp8":
        twin._apply_gate = module._apply_gate
    return twin


def _adapted(module: nn.Module, case: PackedCase) -> nn.Module:
    from lotr_ext import LoTRFactors
    from lotr_ext.model.experts import adapt_parameter, expert_sizes

    torch.manual_seed(1)
    for name in ("gate_up_proj", "down_proj"):
        layer = adapt_parameter(module, name, LoTRFactors(*expert_sizes(module, name)[1:], case.r))
        nn.init.normal_(layer.core, 0, 0.1)
    return module


def weight_bytes(module: nn.Module) -> int:
    """Of the frozen weights, packed or dense: the storages behind them."""
    tensors: list[Tensor] = []
    for name in ("gate_up_proj", "down_proj"):
        for key, parameter in module.named_parameters():
            if name in key and not parameter.requires_grad and not key.endswith("_bias"):
                parts = getattr(type(parameter), "tensor_data_names", None)
                tensors += [parameter] if parts is None else [getattr(parameter, part) for part in parts]
        if name in getattr(module, "parametrizations", ()):
            tensors.append(module.parametrizations[name][0].quant_state.absmax)
    return sum(t.nbytes for t in tensors)


def measure(case: PackedCase, session: Session) -> list[dict]:
    """One result of the packed and one of the dense experts."""
    torch.manual_seed(0)
    module = MAKE[case.format](case)
    dense = _adapted(_dense(module, case), case)
    modules = {"packed": _adapted(module, case), "dense": dense}
    x = torch.randn(case.m, case.h, dtype=torch.bfloat16, requires_grad=True)
    index, weights = torch.rand(case.m, case.e).topk(case.top_k)[1], torch.rand(case.m, case.top_k, dtype=torch.bfloat16)
    g, grads, results, calls = torch.randn(case.m, case.h, dtype=torch.bfloat16), {}, [], []
    for rival, one in modules.items():
        timed = training(lambda one=one: one(x, index, weights), g, (x, *one.parameters()))
        timed.prepare()
        timed.run()
        grads[rival] = [t.grad.clone() for t in (x, *one.parameters()) if t.requires_grad]
        timed.prepare()
        peak = peak_bytes(timed.run, session.device)
        results.append({"rival": rival, "label": rival, "weight_bytes": weight_bytes(one), "peak_bytes": peak})
        calls.append(timed)
    if not all(torch.equal(a, b) for a, b in zip(*grads.values(), strict=True)):
        raise ArithmeticError(f"{case.format}: expected the gradients over dense experts, got others")
    times = interleave(calls, session.clock, session.options.rounds, 0.0)
    steps = [with_sum(stages)[-1] for stages in times]
    for result, step in zip(results, steps):
        result["step"] = against(step, steps[1])
        result["one_expert_bytes"] = 2 * case.i * case.h * 2
    return results


def show(case: PackedCase, results: list[dict], session: Session) -> None:
    table = Table(case.name(), "experts", "weights", "a step beyond them", "both", "one expert's largest matrix", "step")
    for result in results:
        weights, peak, one = (result[name] for name in ("weight_bytes", "peak_bytes", "one_expert_bytes"))
        sizes = [bytes_text(n) for n in (weights, peak, weights + peak, one)]
        table.add_row(result["label"], *sizes, time_text(result["step"]["seconds"][1]))
    print(table)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.packed", description=__doc__.split("\n")[0])
    add_options(parser, dtypes="bf16")
    parser.add_argument("--formats", default="mxfp4,fp8", help=f"some of {','.join(MAKE)} (mxfp4,fp8)")
    parser.add_argument("--shape", default=SHAPE, help=f"tokens x hidden x intermediate x experts x top k x rank ({SHAPE})")
    options = parser.parse_args(argv)
    check_options(options, rounds=5, dtypes="bf16")
    (shape,) = sizes("shape", options.shape, "MxHxIxExKxR")
    formats = chosen("formats", options.formats, MAKE)
    session = Session(options, "packed.jsonl")
    session.introduce()
    cases = [PackedCase(*shape, each, "bf16", t) for t in options.threads for each in formats]
    session.run(cases, lambda case: RIVALS, lambda case: measure(case, session), show)
    return session.finish()


if __name__ == "__main__":
    start("bench.packed", main)
