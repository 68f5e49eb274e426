"""A block of a transformer, its seven linear layers adapted by each rival, with the same weights and adapters.

    h = norm(x);  q, k, v = h W^T;  x += attention(q, k, v) W_o^T;  h = norm(x);  x += (silu(h W_gate^T) * (h W_up^T)) W_down^T

Of the benchmarks, only this one has siblings: q, k and v read one h, gate and up another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..measure.names import named
from ..measure.shapes import DTYPES
from .base import SCALING, parameter
from .registry import InPlaceLoRA

FLOOR, LORA_EAGER, LOTR_EAGER, OURS = "frozen", "lora-eager", "lotr-eager", "lotr_ext"
NAMES = ("q", "k", "v", "o", "gate", "up", "down")
QKV, GATE_UP = NAMES[:3], NAMES[4:6]
STACKED = (QKV, ("o",), GATE_UP, ("down",))  # layers that read one h become one product
SEQUENCE = 2048  # maximal length of a sequence, in tokens


class Sizes(NamedTuple):
    """A model's sizes: its width, the widths of q, of k and v, and of the feed-forward part; the heads of q, and of k and v."""

    hidden: int
    q: int
    kv: int
    inner: int
    heads: int
    kv_heads: int

    def of(self, name: str) -> tuple[int, int]:
        """(k, n) of a linear layer."""
        return {
            "q": (self.hidden, self.q),
            "k": (self.hidden, self.kv),
            "v": (self.hidden, self.kv),
            "o": (self.q, self.hidden),
            "gate": (self.hidden, self.inner),
            "up": (self.hidden, self.inner),
            "down": (self.inner, self.hidden),
        }[name]


MODELS = {
    "llama-3-8b": Sizes(4096, 4096, 1024, 14336, 32, 8),
    "qwen3-8b": Sizes(4096, 4096, 1024, 12288, 32, 8),
    "qwen3-0.6b": Sizes(1024, 2048, 1024, 3072, 16, 8),
    "smollm2-135m": Sizes(576, 576, 192, 1536, 9, 3),
    "tiny": Sizes(32, 32, 16, 48, 4, 2),
}


class BlockCase(NamedTuple):
    """A block of `model` on m tokens, adapted at rank r."""

    model: str
    m: int
    r: int
    dtype: str
    threads: int

    def name(self) -> str:
        return f"{self.model} block, {self.m} tokens r{self.r} {self.dtype} t{self.threads}"

    @property
    def sizes(self) -> Sizes:
        return MODELS[self.model]


class Values:
    """Weights and adapter values of a case: LoRA's A and B per layer, LoTR's A and B per shape and a core per layer."""

    def __init__(self, case: BlockCase, device: torch.device, dtype: torch.dtype | None = None):
        g, dtype = torch.Generator().manual_seed(0), dtype or DTYPES[case.dtype]

        def normal(*shape: int, scale: float) -> Tensor:
            rounded = (torch.randn(*shape, generator=g) * scale).to(DTYPES[case.dtype])
            return rounded.to(device, dtype)

        self.weight = {name: normal(n, k, scale=k**-0.5) for name in NAMES for k, n in [case.sizes.of(name)]}
        self.lora = {}
        for name in NAMES:
            k, n = case.sizes.of(name)
            self.lora[name] = normal(k, case.r, scale=k**-0.5), normal(n, case.r, scale=0.1 * case.r**-0.5)
        shapes = dict.fromkeys(case.sizes.of(name) for name in NAMES)
        self.pairs = {
            s: (normal(s[0], case.r, scale=s[0] ** -0.5), normal(s[1], case.r, scale=0.1 * case.r**-0.5)) for s in shapes
        }
        self.cores = {name: normal(case.r, case.r, scale=case.r**-0.5) for name in NAMES}


Linears = dict[str, Callable[[Tensor], Tensor]]


class Block(nn.Module):
    """The block over `linears`, one callable per name; parameters: the trained tensors by their names in the formula."""

    def __init__(self, case: BlockCase, linears: Linears, parameters: dict[str, Tensor]):
        super().__init__()
        self.sizes, self.sequence = case.sizes, min(case.m, SEQUENCE)
        modules = {name: layer for name, layer in linears.items() if isinstance(layer, nn.Module)}
        self.layers = nn.ModuleDict({f"{name}_proj": layer for name, layer in modules.items()})
        self.linears, self.trained = linears, parameters

    def linear(self, name: str) -> Callable[[Tensor], Tensor]:
        key = f"{name}_proj"
        return self.layers[key] if key in self.layers else self.linears[name]

    def together(self, names: tuple[str, ...], h: Tensor) -> tuple[Tensor, ...]:
        """Runs the layers that read one h."""
        return tuple(self.linear(name)(h) for name in names)

    def forward(self, x: Tensor) -> Tensor:
        h = F.rms_norm(x, x.shape[-1:])
        x = x + self.linear("o")(self.attend(*self.together(QKV, h)))
        h = F.rms_norm(x, x.shape[-1:])
        gate, up = self.together(GATE_UP, h)
        return x + self.linear("down")(F.silu(gate) * up)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        m = q.shape[0]
        batch = -(-m // self.sequence)
        if m % self.sequence:
            raise ValueError(f"tokens: expected a multiple of {self.sequence} above it, got {m}")

        def heads(t: Tensor, count: int) -> Tensor:
            return t.view(batch, self.sequence, count, -1).transpose(1, 2)

        group = self.sizes.heads // self.sizes.kv_heads
        k, v = (heads(t, self.sizes.kv_heads).repeat_interleave(group, 1) for t in (k, v))
        a = F.scaled_dot_product_attention(heads(q, self.sizes.heads), k, v, is_causal=True)
        return a.transpose(1, 2).reshape(m, -1)


class Aliased(Block):
    """Each sibling gets its own h object, so that u is not shared."""

    def together(self, names: tuple[str, ...], h: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.linear(name)(h.view(h.shape)) for name in names)


class Stacked(Block):
    """q, k and v as one product, gate and up as one: a linear layer with the stacked weights, split."""

    def together(self, names: tuple[str, ...], h: Tensor) -> tuple[Tensor, ...]:
        return self.linear("".join(names))(h).split([self.sizes.of(name)[1] for name in names], -1)


def frozen_linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def _frozen(case: BlockCase, v: Values) -> Block:
    return Block(case, {name: lambda x, w=w: F.linear(x, w) for name, w in v.weight.items()}, {})


def _stacked_weights(v: Values) -> dict[str, Tensor]:
    return {"".join(names): torch.cat([v.weight[name] for name in names]) for names in STACKED}


def _frozen_stacked(case: BlockCase, v: Values) -> Block:
    return Stacked(case, {name: lambda x, w=w: F.linear(x, w) for name, w in _stacked_weights(v).items()}, {})


def lora_parameters(v: Values) -> dict[str, nn.Parameter]:
    """Under names like "q.A" [r, k] and "q.B" [n, r]."""
    found = {}
    for name, (A, B) in v.lora.items():
        found |= {f"{name}.A": parameter(A.T), f"{name}.B": parameter(B)}
    return found


def _lora(layer: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Callable[[BlockCase, Values], Block]:
    """A LoRA for each layer: layer(x, weight, A [r, k], B [n, r]) -> y."""

    def make(case: BlockCase, v: Values) -> Block:
        p = lora_parameters(v)
        own = {name: (v.weight[name], p[f"{name}.A"], p[f"{name}.B"]) for name in NAMES}
        return Block(case, {name: lambda x, own=own[name]: layer(x, *own) for name in NAMES}, p)

    return make


_lora_eager = _lora(lambda x, w, A, B: F.linear(x, w) + SCALING * F.linear(F.linear(x, A), B))
# the fastest form of library products: expand first, the base product accumulates, the backward is written by hand
_lora_in_place = _lora(lambda x, w, A, B: InPlaceLoRA.apply(x, w, None, A, B, True))


def stacked_lora(weight: Tensor, As: list[Tensor], Bs: list[Tensor]) -> Callable[[Tensor], Tensor]:
    """Three products: with the stacked weights, with the stacked A, and with a block diagonal of the B."""

    def call(x: Tensor) -> Tensor:
        if len(As) == 1:
            return torch.addmm(F.linear(x, weight), F.linear(x, As[0]), Bs[0].T, alpha=SCALING)
        u = F.linear(x, torch.cat(As))
        return torch.addmm(F.linear(x, weight), u, torch.block_diag(*Bs).T, alpha=SCALING)

    return call


def _lora_stacked(case: BlockCase, v: Values) -> Block:
    p, weights = lora_parameters(v), _stacked_weights(v)

    def layer(names: tuple[str, ...]) -> Callable[[Tensor], Tensor]:
        w = weights["".join(names)]
        return stacked_lora(w, [p[f"{name}.A"] for name in names], [p[f"{name}.B"] for name in names])

    return Stacked(case, {"".join(names): layer(names) for names in STACKED}, p)


def _lora_peft(case: BlockCase, v: Values) -> Block:
    from peft import LoraConfig, get_peft_model

    block = Block(case, {name: frozen_linear(w) for name, w in v.weight.items()}, {})
    targets = [f"{name}_proj" for name in NAMES]
    get_peft_model(block, LoraConfig(r=case.r, lora_alpha=SCALING * case.r, target_modules=targets))
    for name, (A, B) in v.lora.items():
        layer = block.layers[f"{name}_proj"]
        for own, value, kind in ((layer.lora_A, A.T, "A"), (layer.lora_B, B, "B")):
            own["default"].weight.data = value.contiguous().clone()
            block.trained[f"{name}.{kind}"] = own["default"].weight
    return block


def _lotr_eager(case: BlockCase, v: Values) -> Block:
    """As the original computes it."""
    pairs = {shape: (parameter(A), parameter(B)) for shape, (A, B) in v.pairs.items()}
    cores = {name: parameter(core) for name, core in v.cores.items()}

    def layer(name: str) -> Callable[[Tensor], Tensor]:
        (A, B), core, w = pairs[case.sizes.of(name)], cores[name], v.weight[name]
        return lambda x: F.linear(x, w) + SCALING * (((x @ A) @ core) @ B.T)

    named = {f"{name}.core": core for name, core in cores.items()}
    for (k, n), pair in pairs.items():
        named |= {f"{k}x{n}.{kind}": value for kind, value in zip("AB", pair)}
    return Block(case, {name: layer(name) for name in NAMES}, named)


def _ours(kind: type[Block]) -> Callable[[BlockCase, Values], Block]:
    def make(case: BlockCase, v: Values) -> Block:
        from lotr_ext import LoTRConfig, apply_lotr

        block = kind(case, {name: frozen_linear(w) for name, w in v.weight.items()}, {})
        adapter_dtype = next(iter(v.weight.values())).dtype
        targets = [f"{name}_proj" for name in NAMES]
        config = LoTRConfig(rank=case.r, scaling=SCALING, target_modules=targets, adapter_dtype=adapter_dtype)
        apply_lotr(block, config)
        for name in NAMES:
            layer, (k, n) = block.layers[f"{name}_proj"], case.sizes.of(name)
            factors = dict(layer.factors.named_parameters())
            layer.core.data = v.cores[name].clone()
            block.trained[f"{name}.core"] = layer.core
            for letter, value in zip("AB", v.pairs[k, n]):
                factors[letter].data = value.clone()
                block.trained[f"{k}x{n}.{letter}"] = factors[letter]
        return block

    return make


RIVALS: dict[str, tuple[str, Callable[[BlockCase, Values], Block]]] = {
    FLOOR: ("frozen", _frozen),
    "frozen-stacked": ("frozen, stacked", _frozen_stacked),
    LORA_EAGER: (named(LORA_EAGER), _lora_eager),
    "lora-in-place-beta": (named("lora-in-place-beta"), _lora_in_place),
    "lora-stacked": ("LoRA, q k v and gate up stacked", _lora_stacked),
    "lora-peft": (named("lora-peft"), _lora_peft),
    LOTR_EAGER: (named(LOTR_EAGER), _lotr_eager),
    "lotr_ext-unshared": (f"{named(OURS)}, siblings off", _ours(Aliased)),
    OURS: (named(OURS), _ours(Block)),
}
TRUTHS = {"lora": _lora_eager, "lotr": _lotr_eager, "frozen": _frozen}  # in float64, by a rival's first letters


def gradients(block: Block, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    """y, dx and the gradients of all trained tensors, by name."""
    leaf = x.detach().clone().requires_grad_()
    for p in block.trained.values():
        p.grad = None
    y = block(leaf)
    y.backward(g)
    return {"y": y.detach(), "dx": leaf.grad} | {name: p.grad for name, p in block.trained.items()}


def errors(rival: str, case: BlockCase, device: torch.device) -> tuple[float, float]:
    """(largest relative error of a rival, and of the plain formula in the same dtype) against float64."""
    g = torch.Generator().manual_seed(2)
    x, dy = (torch.randn(case.m, case.sizes.hidden, generator=g).to(DTYPES[case.dtype]).to(device) for _ in range(2))
    plain = TRUTHS[rival[:4] if rival[:4] in TRUTHS else "frozen"]
    truth = gradients(plain(case, Values(case, device, torch.float64)), x.double(), dy.double())
    # with one token the gradients of q and k are zero up to rounding
    vanishing = [n for n, t in truth.items() if t.norm() < 1e-12 * truth["dx"].norm()]
    found = []
    for make in (RIVALS[rival][1], plain):
        own = gradients(make(case, Values(case, device)), x, dy)
        if set(own) != set(truth):
            raise ArithmeticError(f"{rival}: expected gradients of {', '.join(truth)}, got {', '.join(own)}")
        found.append(max(((own[n].double() - t).norm() / t.norm()).item() for n, t in truth.items() if n not in vanishing))
    return found[0], found[1]
