"""The rivals: one layer, a stack of layers, and a whole transformer with each method of adaptation, on the same weights.

LoRA from library products has five forms: as it is usually written (eager); with a handwritten backward and as few passes as
the library allows (in-place); the same with the adapter's product first, onto which the base product accumulates (beta: on a
GPU the fastest LoRA that cuBLAS gives); compiled; PEFT's layer. LoTR in three lines is README's formula in plain torch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .common import DTYPES, Case, check_error, error_of

SCALING = 2.0
TOLERANCE = {
    "fp32": 1e-5,
    "bf16": 1.5e-2,
    "fp16": 2e-3,
}  # relative, of a layer's y, dx and gradients against float64


@dataclass
class Tensors:
    """A layer's tensors: weight [n, k], bias [n] or None, A [k, r], B [n, r], core [r, r], VeRA's vectors d [r], b [n]."""

    weight: Tensor
    bias: Tensor | None
    A: Tensor
    B: Tensor
    core: Tensor
    d: Tensor
    b: Tensor

    @classmethod
    def random(
        cls, k: int, n: int, rank: int, dtype: torch.dtype, device: str, seed: int = 0
    ) -> Tensors:
        g = torch.Generator().manual_seed(seed)

        def normal(*shape: int, scale: float) -> Tensor:
            return (torch.randn(*shape, generator=g) * scale).to(device, dtype)

        return cls(
            weight=normal(n, k, scale=k**-0.5),
            bias=normal(n, scale=0.1),
            A=normal(k, rank, scale=k**-0.5),
            B=normal(n, rank, scale=rank**-0.5),
            core=normal(rank, rank, scale=rank**-0.5),
            d=normal(rank, scale=1.0),
            b=normal(n, scale=1.0),
        )

    def double(self) -> Tensors:
        return Tensors(
            **{name: None if t is None else t.double() for name, t in vars(self).items()}
        )


class Rival(nn.Module):
    """x [m, k] -> y [m, n] by a formula or a module. trained: the parameters by the formula's names, each with whether it is
    stored transposed, as LoRA's modules keep A and B."""

    def __init__(
        self,
        call: Callable[[Tensor], Tensor],
        trained: dict[str, tuple[nn.Parameter, bool]] | None = None,
    ):
        super().__init__()
        self.call, self.trained = call, trained or {}
        if not isinstance(call, nn.Module):
            for name, (parameter, _) in self.trained.items():
                self.register_parameter(name, parameter)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x)


def parameter(t: Tensor) -> nn.Parameter:
    return nn.Parameter(t.clone().contiguous())


def frozen_linear(t: Tensors) -> nn.Linear:
    """The base layer as a module that uses these tensors, not copies."""
    linear = nn.Linear(t.weight.shape[1], t.weight.shape[0], bias=t.bias is not None, device="meta")
    linear.weight = nn.Parameter(t.weight, requires_grad=False)
    if t.bias is not None:
        linear.bias = nn.Parameter(t.bias, requires_grad=False)
    return linear


# ---- one layer -------------------------------------------------------------------------------------------------------


class InPlaceLoRA(torch.autograd.Function):
    """LoRA from library products alone, with as few passes as they allow. A [r, k], B [n, r]."""

    @staticmethod
    def forward(ctx, x, weight, bias, A, B, beta):
        u = F.linear(x, A)
        if beta:  # the base product accumulates onto the adapter's output
            y = (u * SCALING) @ B.T if bias is None else torch.addmm(bias, u, B.T, alpha=SCALING)
            y.addmm_(x, weight.T)
        else:
            y = F.linear(x, weight, bias)
            y.addmm_(u, B.T, alpha=SCALING)
        ctx.save_for_backward(x, weight, A, B, u)
        ctx.beta = beta
        return y

    @staticmethod
    def backward(ctx, g):
        x, weight, A, B, u = ctx.saved_tensors
        k = (g @ B).mul_(SCALING)
        dx = (k @ A).addmm_(g, weight) if ctx.beta else (g @ weight).addmm_(k, A)
        return dx, None, None, k.T @ x, (g.T @ u).mul_(SCALING), None


def _lora(t: Tensors, form: str) -> Rival:
    A, B = parameter(t.A.T), parameter(t.B)

    def eager(x: Tensor) -> Tensor:
        return F.linear(x, t.weight, t.bias) + SCALING * F.linear(F.linear(x, A), B)

    def in_place(x: Tensor) -> Tensor:
        return InPlaceLoRA.apply(x, t.weight, t.bias, A, B, form == "lora-beta")

    if form == "lora-compiled":
        torch._dynamo.reset()  # else the compiler generalises over the cases before
        eager = torch.compile(eager, dynamic=False)
    return Rival(
        in_place if form in ("lora-in-place", "lora-beta") else eager,
        {"A": (A, True), "B": (B, False)},
    )


def _peft(t: Tensors, vera: bool) -> Rival:
    from peft import LoraConfig, VeraConfig, get_peft_model

    r, model = t.A.shape[1], nn.Sequential()
    model.add_module("layer", frozen_linear(t))
    lora = LoraConfig(r=r, lora_alpha=SCALING * r, target_modules=["layer"])
    layer = get_peft_model(
        model, VeraConfig(r=r, target_modules=["layer"]) if vera else lora
    ).base_model.model.layer
    if vera:  # y = x W^T + bias + b * (((x A) * d) B^T), A and B frozen
        layer.vera_A["default"], layer.vera_B["default"] = t.A.T.contiguous(), t.B.clone()
        d, b = layer.vera_lambda_d["default"], layer.vera_lambda_b["default"]
        d.data, b.data = t.d.clone(), t.b.clone()
        return Rival(layer, {"d": (d, False), "b": (b, False)})
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    A.data, B.data = t.A.T.contiguous().clone(), t.B.clone()
    return Rival(layer, {"A": (A, True), "B": (B, False)})


def three_lines(t: Tensors, A: nn.Parameter | None = None, B: nn.Parameter | None = None) -> Rival:
    """A, B: of a pair that several layers share; None: of this layer's own."""
    A, B, core = (
        A if A is not None else parameter(t.A),
        B if B is not None else parameter(t.B),
        parameter(t.core),
    )

    def call(x: Tensor) -> Tensor:
        u = x @ A
        h = u @ core
        return F.linear(x, t.weight, t.bias) + SCALING * h @ B.T

    return Rival(call, {"A": (A, False), "B": (B, False), "core": (core, False)})


def factors_of(layer: nn.Module) -> dict[str, nn.Parameter]:
    """A and B of an adapted layer."""
    return {
        name.partition(".")[0]: parameter for name, parameter in layer.factors.named_parameters()
    }


def set_values(layer: nn.Module, t: Tensors) -> dict[str, tuple[nn.Parameter, bool]]:
    """Gives an adapted layer the values and dtype of t. Returns its trained parameters."""
    own = factors_of(layer) | {"core": layer.core}
    for name, value in own.items():
        value.data = getattr(t, name).clone()
    return {name: (value, False) for name, value in own.items()}


def our_layers(tensors: list[Tensors]) -> list[Rival]:
    """LoTRLinear on one pair of factors."""
    from lotr_ext import LoTRFactors, LoTRLinear

    first = tensors[0]
    factors = LoTRFactors(
        *first.weight.shape[::-1], first.A.shape[1], dtype=first.A.dtype, device=first.A.device
    )
    layers = [LoTRLinear.from_linear(frozen_linear(t), factors, scaling=SCALING) for t in tensors]
    return [Rival(layer, set_values(layer, t)) for layer, t in zip(layers, tensors)]


def _compiled(t: Tensors) -> Rival:
    rival = our_layers([t])[0]
    torch._dynamo.reset()
    return Rival(torch.compile(rival.call, dynamic=False), rival.trained)


LAYERS: dict[str, Callable[[Tensors], Rival]] = {
    "frozen": lambda t: Rival(lambda x: F.linear(x, t.weight, t.bias)),
    **{
        form: partial(_lora, form=form)
        for form in ("lora-eager", "lora-in-place", "lora-beta", "lora-compiled")
    },
    "lora-peft": partial(_peft, vera=False),
    "vera-peft": partial(_peft, vera=True),
    "lotr-eager": three_lines,
    "lotr_ext": lambda t: our_layers([t])[0],
    "lotr_ext-compiled": _compiled,
}
COMPILED = ("lora-compiled", "lotr_ext-compiled")  # compiling takes seconds a case: on request


def adapter(x: Tensor, t: Tensors, values: dict[str, Tensor]) -> Tensor:
    """What a rival adds to the frozen layer: s x A B^T (LoRA), s x A G B^T (LoTR) or b * (((x A) * d) B^T) (VeRA)."""
    if "d" in values:
        return values["b"] * (((x @ t.A) * values["d"]) @ t.B.T)
    u = x @ values["A"]
    return SCALING * (u @ values["core"] if "core" in values else u) @ values["B"].T


def check_layer(rival: Rival, t: Tensors, x: Tensor, g: Tensor, limit: float) -> float:
    """The largest relative error of y, dx and the parameters' gradients against float64. Raises ArithmeticError above limit."""
    values = {
        name: (p.T if turned else p).detach().double().requires_grad_()
        for name, (p, turned) in rival.trained.items()
    }
    wide, exact = t.double(), x.detach().double().requires_grad_()
    expected = F.linear(exact, wide.weight, wide.bias)
    expected = expected + (adapter(exact, wide, values) if values else 0)
    expected.backward(g.double())
    x.grad = None
    y = rival(x)
    y.backward(g)
    pairs = [(y.detach(), expected.detach()), (x.grad, exact.grad)]
    for name, (p, turned) in rival.trained.items():
        pairs.append((p.grad.T if turned else p.grad, values[name].grad))
        p.grad = None
    x.grad = None
    return check_error("y, dx and gradients", max(error_of(*pair) for pair in pairs), limit)


# ---- a stack of layers -----------------------------------------------------------------------------------------------


class Chain(nn.Module):
    """x_{l+1} = layer_l(x_l)"""

    def __init__(self, layers: Iterable[nn.Module]):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Siblings(Chain):
    """x_{b+1} = q_b(x_b) + k_b(x_b) + v_b(x_b)"""

    def forward(self, x: Tensor) -> Tensor:
        layers = iter(self.layers)
        for q, k, v in zip(layers, layers, layers):
            x = q(x) + k(x) + v(x)
        return x


FORMS: dict[str, type[Chain]] = {"chained": Chain, "siblings": Siblings}
STACKED = ("frozen", "lora-eager", "lora-peft", "lotr-eager", "lotr_ext", "lotr_ext-model")


def stack_values(count: int, k: int, rank: int, dtype: torch.dtype, device: str) -> list[Tensors]:
    """The tensors of each layer [k, k]; A and B are shared. Scaled so that values do not grow through many layers."""
    own = [Tensors.random(k, k, rank, dtype, device, seed) for seed in range(count)]
    return [
        replace(t, A=own[0].A, B=own[0].B, weight=t.weight * 0.5, core=t.core * 0.1) for t in own
    ]


def stack(rival: str, tensors: list[Tensors], form: str) -> Chain:
    """The rival's layers on one pair of factors (LoRA: on their own); "-model": adapted by apply_lotr."""
    if rival == "lotr-eager":
        A, B = parameter(tensors[0].A), parameter(tensors[0].B)
        return FORMS[form](three_lines(t, A, B) for t in tensors)
    if rival == "lotr_ext":
        return FORMS[form](own.call for own in our_layers(tensors))
    if rival != "lotr_ext-model":
        return FORMS[form](LAYERS[rival](t) for t in tensors)
    from lotr_ext import LoTRConfig, apply_lotr

    plain = FORMS[form](frozen_linear(t) for t in tensors)
    config = LoTRConfig(
        rank=tensors[0].A.shape[1], scaling=SCALING, target_modules=r".*layers\.\d+"
    )
    apply_lotr(plain, config)
    for layer, t in zip(plain.layers, tensors):
        set_values(layer, t)
    return plain


def check_stack(made: Chain, truth: Chain, x: Tensor, g: Tensor, limit: float) -> float:
    """The error of y and dx against the formula's in float64."""
    exact = x.detach().double().requires_grad_()
    expected = truth(exact)
    expected.backward(g.double())
    x.grad = None
    y = made(x)
    y.backward(g)
    return check_error(
        "y, dx", max(error_of(y.detach(), expected.detach()), error_of(x.grad, exact.grad)), limit
    )


# ---- a whole model ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """A transformers configuration: family, its arguments, the adapted layers, batch x sequence. equal: the ranks whose size is
    nearest to that of LoTR ("-as-lotr") or LoRA ("-as-lora") of rank 16."""

    family: str
    settings: dict
    targets: tuple[str, ...]
    batch: int
    sequence: int
    equal: dict[str, int] = field(default_factory=dict)


def _llama(hidden: int, layers: int, heads: int, inner: int, vocabulary: int, groups: int) -> dict:
    """groups: how many heads share a key and a value."""
    sizes = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": inner,
    }
    sizes |= {"num_key_value_heads": heads // groups, "vocab_size": vocabulary}
    return sizes | {
        "use_cache": False,
        "tie_word_embeddings": True,
        "max_position_embeddings": 8192,
    }


def _bert(hidden: int, layers: int, heads: int, vocabulary: int) -> dict:
    sizes = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden,
    }
    return sizes | {
        "vocab_size": vocabulary,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }


ALL_LINEAR = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
)  # not the tied head
EQUAL = {"lora-peft-as-lotr": 2, "vera-peft-as-lotr": 896, "lotr_ext-as-lora": 83}
MODELS = {
    "smollm2-135m": Shape("causal-lm", _llama(576, 30, 9, 1536, 49152, 3), ALL_LINEAR, 1, 128),
    "minilm": Shape("encoder", _bert(384, 6, 12, 30522), ("query", "value"), 16, 64, EQUAL),
    "llama-8x4096": Shape("causal-lm", _llama(4096, 8, 32, 14336, 32000, 4), ALL_LINEAR, 4, 2048),
    "tiny-lm": Shape("causal-lm", _llama(32, 2, 4, 64, 100, 4), ALL_LINEAR, 2, 8),
    "tiny-encoder": Shape("encoder", _bert(32, 2, 2, 100), ("query", "value"), 2, 8),
}


def base_model(name: str, dtype: torch.dtype, device: str) -> nn.Module:
    """The model of MODELS[name] with random weights, frozen. Its embeddings' output requires a gradient, so that every method,
    and the frozen model too, goes backward through all layers."""
    import transformers

    shape = MODELS[name]
    torch.manual_seed(0)
    with torch.device(device):
        if shape.family == "encoder":
            made = transformers.BertModel(
                transformers.BertConfig(**shape.settings), add_pooling_layer=False
            )
        else:
            made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape.settings))
    made = made.to(dtype).requires_grad_(False).train()
    made.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: output.requires_grad_()
    )
    return made


def twin(base: nn.Module) -> nn.Module:
    """A copy of base's modules that uses the same parameter and buffer objects."""
    return copy.deepcopy(base, {id(t): t for t in (*base.parameters(), *base.buffers())})


class EagerLoTR(nn.Module):
    """y = base(x) + ((x A) G) B^T as the original implementation computes it; all layers of a shape share A and B."""

    def __init__(self, base: nn.Linear, A: nn.Parameter, B: nn.Parameter):
        super().__init__()
        self.base, self.A, self.B = base, A, B
        self.core = nn.Parameter(
            torch.zeros(A.shape[1], B.shape[1], dtype=A.dtype, device=A.device)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + ((x @ self.A) @ self.core) @ self.B.T


def _eager_lotr(model: nn.Module, targets: list[str], r: int) -> nn.Module:
    """In the weights' dtype: the original cannot mix dtypes."""
    pairs: dict[tuple[int, int], list[nn.Parameter]] = {}
    for name, module in list(model.named_modules()):
        if name.rpartition(".")[2] in targets:
            width, like = (module.in_features, module.out_features), module.weight
            if width not in pairs:
                pairs[width] = [
                    parameter(torch.randn(size, r, device=like.device).to(like.dtype) * size**-0.5)
                    for size in width
                ]
            model.set_submodule(name, EagerLoTR(module, *pairs[width]))
    return model


def _our_lotr(model: nn.Module, targets: list[str], r: int, **settings: object) -> nn.Module:
    from lotr_ext import LoTRConfig, apply_lotr

    return apply_lotr(model, LoTRConfig(rank=r, scaling=1.0, target_modules=targets, **settings))


def _peft_model(model: nn.Module, targets: list[str], r: int, vera: bool = False) -> nn.Module:
    from peft import LoraConfig, VeraConfig, get_peft_model

    lora = LoraConfig(r=r, lora_alpha=r, target_modules=targets)
    return get_peft_model(model, VeraConfig(r=r, target_modules=targets) if vera else lora)


METHODS = (
    "frozen", "lora-peft", "vera-peft", "lotr-eager", "lotr_ext", "lora-peft-as-lotr", "vera-peft-as-lotr", "lotr_ext-as-lora",
    "lotr_ext-core", "lotr_ext-compiled",
)  # fmt: skip


def rank_of(method: str, case: Case) -> int | None:
    """The rank of a method in a case, None where it is not known: at equal size it is known for the model's own targets."""
    shape = MODELS[case["model"]]
    if method.endswith(("-as-lotr", "-as-lora")):
        usual = case["r"] == 16 and case["targets"] == ",".join(shape.targets)
        return shape.equal.get(method) if usual else None
    return 0 if method == "frozen" else case["r"]


def adapted_model(method: str, base: nn.Module, targets: Iterable[str], rank: int) -> nn.Module:
    """A twin of base, adapted."""
    model, targets = twin(base), list(targets)
    if method == "frozen":
        return model
    if method.startswith(("lora-peft", "vera-peft")):
        return _peft_model(model, targets, rank, vera=method.startswith("vera"))
    if method == "lotr-eager":
        return _eager_lotr(model, targets, rank)
    made = _our_lotr(
        model, targets, rank, **({"train": ("core",)} if method.endswith("-core") else {})
    )
    return torch.compile(made, dynamic=False) if method.endswith("-compiled") else made


def our_layers_in(model: nn.Module) -> list[nn.Module]:
    return [
        module
        for module in model.modules()
        if hasattr(module, "core") and hasattr(module, "factors")
    ]


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def chosen(names: list[str] | None, usual: Iterable[str], known: Iterable[str]) -> list[str]:
    """The names that an option gives, or the usual ones, in the order of the known ones. Raises ValueError for another one."""
    names, known = list(names or usual), list(known)
    if bad := [name for name in names if name not in known]:
        raise ValueError(f"expected some of {', '.join(known)}, got {bad[0]!r}")
    return [name for name in known if name in names]


def dtype_of(case: Case) -> torch.dtype:
    return DTYPES[case["dtype"]]
