"""The rivals for one layer and for a stack of layers, on the same weights.

    Tensors       the weight, bias, factors, core and vectors that all rivals of a case get
    LAYERS        makes a `Rival` of them, by name: x -> y, and what it trains
    check_layer   compares its y, dx and gradients with `formula` in float64
    stack         the same for a stack of layers, with one pair of factors for LoTR

LoRA from library products has four forms:

    eager      as it is usually written
    in-place   a handwritten backward with as few passes as the library allows
    beta       in-place, with the adapter's product first: the base product accumulates onto it (its
               beta is 1). On a GPU this is the fastest LoRA that cuBLAS gives
    compiled   eager, in torch.compile

LoTR in three lines is README's formula in plain torch. Not here: transformers (model.py).

lotr_ext.core is imported inside functions that a CPU does not call by default: with --against, a
worker may measure an older lotr_ext that has no strategies.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from lotr_ext import LoTRConfig, LoTRFactors, LoTRLinear, apply_lotr

from .common import check_error, error_of

SCALING = 2.0
STRATEGIES = ("two_pass", "beta", "fused")  # values of LOTR_STRATEGY (docs/kernels.md)
# The largest accepted relative error of a layer's y, dx and gradients against float64.
TOLERANCE = {"fp32": 1e-5, "bf16": 1.5e-2, "fp16": 2e-3}


@dataclass
class Tensors:
    """The tensors of a layer, from which every rival takes those that it has.

    Attributes:
        weight: [n, k].
        bias: [n].
        A: [k, r].
        B: [n, r].
        core: [r, r].
        d: VeRA's vector [r].
        b: VeRA's vector [n].
    """

    weight: Tensor
    bias: Tensor
    A: Tensor
    B: Tensor
    core: Tensor
    d: Tensor
    b: Tensor

    @classmethod
    def random(
        cls, k: int, n: int, rank: int, dtype: torch.dtype, device: str, seed: int = 0
    ) -> "Tensors":
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, scale: float) -> Tensor:
            return (torch.randn(*shape, generator=generator) * scale).to(device, dtype)

        return cls(
            weight=normal(n, k, scale=k**-0.5),
            bias=normal(n, scale=0.1),
            A=normal(k, rank, scale=k**-0.5),
            B=normal(n, rank, scale=rank**-0.5),
            core=normal(rank, rank, scale=rank**-0.5),
            d=normal(rank, scale=1.0),
            b=normal(n, scale=1.0),
        )

    def double(self) -> "Tensors":
        return Tensors(**{name: t.double() for name, t in vars(self).items()})

    def adapter_in(self, dtype: torch.dtype) -> "Tensors":
        """Returns the same with A, B and core in another dtype."""
        return replace(self, A=self.A.to(dtype), B=self.B.to(dtype), core=self.core.to(dtype))


class Rival(nn.Module):
    """x [m, k] -> y [m, n] by a function or a module.

    Args:
        call: The function or the module.
        trained: Its parameters, by the names that `formula` has for them: A, B, core, d, b.
    """

    def __init__(self, call: Callable[[Tensor], Tensor], trained: dict[str, nn.Parameter]):
        super().__init__()
        self.call = call
        self.trained = nn.ParameterDict(trained)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x)


def random_tokens(m: int, k: int, n: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Returns an input x [m, k] of a layer, and a gradient g [m, n] of its output."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(m, k, generator=generator).to(device, dtype)
    g = torch.randn(m, n, generator=generator).to(device, dtype)
    return x, g


def copied(t: Tensor) -> nn.Parameter:
    return nn.Parameter(t.clone().contiguous())


def frozen_linear(t: Tensors) -> nn.Linear:
    """Returns the base layer as a module that uses these tensors, not copies."""
    n, k = t.weight.shape
    linear = nn.Linear(k, n, device="meta")
    linear.weight = nn.Parameter(t.weight, requires_grad=False)
    linear.bias = nn.Parameter(t.bias, requires_grad=False)
    return linear


# ---- one layer -----------------------------------------------------------------------------------


def frozen(t: Tensors) -> Rival:
    return Rival(lambda x: nnf.linear(x, t.weight, t.bias), {})


class InPlaceLoRA(torch.autograd.Function):
    """LoRA from library products only, with as few passes as they allow. A [r, k], B [n, r]."""

    @staticmethod
    def forward(ctx, beta, x, weight, bias, A, B):
        u = nnf.linear(x, A)
        if beta:
            y = torch.addmm(bias, u, B.T, alpha=SCALING).addmm_(x, weight.T)
        else:
            y = nnf.linear(x, weight, bias).addmm_(u, B.T, alpha=SCALING)
        ctx.save_for_backward(x, weight, A, B, u)
        ctx.beta = beta
        return y

    @staticmethod
    def backward(ctx, g):
        x, weight, A, B, u = ctx.saved_tensors
        du = (g @ B).mul_(SCALING)
        dx = (du @ A).addmm_(g, weight) if ctx.beta else (g @ weight).addmm_(du, A)
        return None, dx, None, None, du.T @ x, (g.T @ u).mul_(SCALING)


def eager_lora(x: Tensor, weight: Tensor, bias: Tensor, A: Tensor, B: Tensor) -> Tensor:
    return nnf.linear(x, weight, bias) + SCALING * nnf.linear(nnf.linear(x, A), B)


def lora(t: Tensors, layer: Callable[..., Tensor]) -> Rival:
    """LoRA by a function of (x, weight, bias, A [r, k], B [n, r])."""
    A = copied(t.A.T)
    B = copied(t.B)
    return Rival(lambda x: layer(x, t.weight, t.bias, A, B), {"A": A, "B": B})


def compiled(function: Callable) -> Callable:
    torch._dynamo.reset()  # otherwise the compiler generalizes over the previous cases
    return torch.compile(function, dynamic=False)


def lora_peft(t: Tensors) -> Rival:
    from peft import LoraConfig

    r = t.A.shape[1]
    layer = _peft_layer(t, LoraConfig(r=r, lora_alpha=SCALING * r, target_modules=["layer"]))
    A = layer.lora_A["default"].weight
    B = layer.lora_B["default"].weight
    A.data = t.A.T.contiguous().clone()
    B.data = t.B.clone()
    return Rival(layer, {"A": A, "B": B})


def vera_peft(t: Tensors) -> Rival:
    """y = x W^T + bias + b * (((x A) * d) B^T), A and B frozen."""
    from peft import VeraConfig

    layer = _peft_layer(t, VeraConfig(r=t.A.shape[1], target_modules=["layer"]))
    layer.vera_A["default"] = t.A.T.contiguous()
    layer.vera_B["default"] = t.B.clone()
    d = layer.vera_lambda_d["default"]
    b = layer.vera_lambda_b["default"]
    d.data = t.d.clone()
    b.data = t.b.clone()
    return Rival(layer, {"d": d, "b": b})


def _peft_layer(t: Tensors, config: object) -> nn.Module:
    from peft import get_peft_model

    model = nn.ModuleDict({"layer": frozen_linear(t)})
    return get_peft_model(model, config).base_model.model.layer


def three_lines(t: Tensors, pair: tuple[nn.Parameter, nn.Parameter] | None = None) -> Rival:
    """LoTR in plain torch, with its copy of A and B, or with a pair that several layers share."""
    A, B = pair or (copied(t.A), copied(t.B))
    core = copied(t.core)

    def call(x: Tensor) -> Tensor:
        u = x @ A
        h = u @ core
        return nnf.linear(x, t.weight, t.bias) + SCALING * h @ B.T

    return Rival(call, {"A": A, "B": B, "core": core})


def factors_of(layer: nn.Module) -> dict[str, nn.Parameter]:
    """Returns A and B of an adapted layer, by name."""
    # "A.value" here, and "A" in an older lotr_ext.
    parameters = layer.factors.named_parameters()
    return {name.partition(".")[0]: parameter for name, parameter in parameters}


def set_values(layer: nn.Module, t: Tensors) -> dict[str, nn.Parameter]:
    """Gives an adapted layer the values and dtype of t. Returns its parameters, by name."""
    parameters = factors_of(layer) | {"core": layer.core}
    for name, parameter in parameters.items():
        parameter.data = getattr(t, name).clone()
    return parameters


def our_layers(tensors: list[Tensors]) -> list[Rival]:
    """Returns a LoTRLinear for each of the tensors, all on the first one's A and B."""
    n, k = tensors[0].weight.shape
    A = tensors[0].A
    factors = LoTRFactors(k, n, A.shape[1], dtype=A.dtype, device=A.device)
    layers = [LoTRLinear.from_linear(frozen_linear(t), factors, scaling=SCALING) for t in tensors]
    return [Rival(layer, set_values(layer, t)) for layer, t in zip(layers, tensors)]


def fused_reason(weight: Tensor, rank: int) -> str | None:
    """Returns why the fused strategy cannot run a layer of this weight [n, k], None if it can."""
    if weight.device.type != "cuda":
        return "it needs a GPU"
    from lotr_ext.core.strategy import fused_obstacle

    n, k = weight.shape
    return fused_obstacle(k, n, rank, weight.dtype, weight.device)


def with_strategy(
    strategy: str, call: Callable[..., Tensor], weight: Tensor, rank: int
) -> Callable[..., Tensor]:
    """Returns a function that runs `call` with a strategy.

    Its backward has the same strategy, which the autograd node of the forward stores.

    Args:
        strategy: One of STRATEGIES.
        call: A layer, or a model.
        weight: The weight [n, k] of one of its layers.
        rank: The rank of the adapter.

    Raises:
        ValueError: If the strategy cannot run here.
    """
    reason = fused_reason(weight, rank) if strategy == "fused" else None
    if reason is not None:
        raise ValueError(f"fused: {reason}")
    from lotr_ext.core import dispatch
    from lotr_ext.core.strategy import STRATEGIES as STRATEGY_CODES

    def run(*arguments: object, **keywords: object) -> Tensor:
        # LOTR_STRATEGY is read once per process, but the rivals of a case share a process.
        original = dispatch.choose_strategy
        dispatch.choose_strategy = lambda tokens, x: STRATEGY_CODES[strategy]
        try:
            return call(*arguments, **keywords)
        finally:
            dispatch.choose_strategy = original

    return run


def our_layer(t: Tensors) -> Rival:
    return our_layers([t])[0]


def our_layer_compiled(t: Tensors) -> Rival:
    rival = our_layer(t)
    return Rival(compiled(rival.call), rival.trained)


def our_layer_by(strategy: str, t: Tensors) -> Rival:
    rival = our_layer(t)
    return Rival(with_strategy(strategy, rival.call, t.weight, t.A.shape[1]), rival.trained)


LAYERS: dict[str, Callable[[Tensors], Rival]] = {
    "frozen": frozen,
    "lora-eager": functools.partial(lora, layer=eager_lora),
    "lora-in-place": functools.partial(lora, layer=functools.partial(InPlaceLoRA.apply, False)),
    "lora-beta": functools.partial(lora, layer=functools.partial(InPlaceLoRA.apply, True)),
    "lora-compiled": lambda t: lora(t, compiled(eager_lora)),
    "lora-peft": lora_peft,
    "vera-peft": vera_peft,
    "lotr-eager": three_lines,
    "lotr_ext": our_layer,
    # A float32 adapter is the default of `apply_lotr`.
    "lotr_ext-fp32": lambda t: our_layer(t.adapter_in(torch.float32)),
    "lotr_ext-two_pass": functools.partial(our_layer_by, "two_pass"),
    "lotr_ext-beta": functools.partial(our_layer_by, "beta"),
    "lotr_ext-fused": functools.partial(our_layer_by, "fused"),
    "lotr_ext-compiled": our_layer_compiled,
}


def default_layers(t: Tensors) -> list[str]:
    """Returns the rivals of one layer that are measured by default."""
    is_on_cpu = t.weight.device.type == "cpu"
    # Whether these rivals run only if --rivals names them. All others always run.
    only_on_request = {
        "lora-compiled": is_on_cpu,  # compiling takes longer there than the rest of a case
        "lotr_ext-fp32": t.weight.dtype == torch.float32,  # the same as lotr_ext
        "lotr_ext-two_pass": is_on_cpu,  # there the strategies differ only in the order of products
        "lotr_ext-beta": is_on_cpu,
        "lotr_ext-fused": fused_reason(t.weight, t.A.shape[1]) is not None,
        "lotr_ext-compiled": True,
    }
    return [name for name in LAYERS if not only_on_request.get(name, False)]


def formula(x: Tensor, t: Tensors, values: dict[str, Tensor]) -> Tensor:
    """Returns y of a layer with the rival's trained parameters, which tell the methods apart.

    nothing       the frozen layer
    A, B          LoRA: + s (x A^T) B^T with A [r, k]
    A, B, core    LoTR: + s ((x A) G) B^T
    d, b          VeRA: + b * (((x A) * d) B^T) with A and B of t
    """
    y = nnf.linear(x, t.weight, t.bias)
    if not values:
        return y
    if "d" in values:
        return y + values["b"] * (((x @ t.A) * values["d"]) @ t.B.T)
    h = x @ values["A"] @ values["core"] if "core" in values else x @ values["A"].T
    return y + SCALING * h @ values["B"].T


def forward_backward(
    model: Callable[[Tensor], Tensor], x: Tensor, g: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns y and dx. The gradients of parameters are in their .grad."""
    leaf = x.detach().requires_grad_()
    y = model(leaf)
    y.backward(g)
    return y.detach(), leaf.grad


def check_layer(rival: Rival, t: Tensors, x: Tensor, g: Tensor, limit: float) -> float:
    """Returns the largest error of y, dx and the parameters' gradients against float64.

    Raises:
        ArithmeticError: If it is above the limit.
    """
    values = {
        name: parameter.detach().double().requires_grad_()
        for name, parameter in rival.trained.items()
    }
    truth = forward_backward(lambda x: formula(x, t.double(), values), x.double(), g.double())
    errors = list(map(error_of, forward_backward(rival, x, g), truth))
    for name, parameter in rival.trained.items():
        errors.append(error_of(parameter.grad, values[name].grad))
        parameter.grad = None
    return check_error("y, dx and gradients", max(errors), limit)


# ---- a stack of layers ---------------------------------------------------------------------------


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
        for q, k, v in zip(layers, layers, layers):  # each takes the next of the same iterator
            x = q(x) + k(x) + v(x)
        return x


WIRINGS: dict[str, type[Chain]] = {"chained": Chain, "siblings": Siblings}
STACKED = ("frozen", "lora-eager", "lora-peft", "lotr-eager", "lotr_ext", "lotr_ext-model")


def stack_values(count: int, k: int, rank: int, dtype: torch.dtype, device: str) -> list[Tensors]:
    """Returns the tensors of each layer [k, k], with one A and B.

    They are scaled so that values do not grow through many layers.
    """
    tensors = [Tensors.random(k, k, rank, dtype, device, seed) for seed in range(count)]
    return [
        replace(t, weight=t.weight * 0.5, A=tensors[0].A, B=tensors[0].B, core=t.core * 0.1)
        for t in tensors
    ]


def stack(rival: str, tensors: list[Tensors], wiring: str) -> Chain:
    """Returns the layers of a rival on one pair of factors; each LoRA layer has its A and B.

    "lotr_ext-model" is adapted by `apply_lotr`.
    """
    chain = WIRINGS[wiring]
    if rival == "lotr-eager":
        pair = (copied(tensors[0].A), copied(tensors[0].B))
        return chain(three_lines(t, pair) for t in tensors)
    if rival == "lotr_ext":
        return chain(layer.call for layer in our_layers(tensors))
    if rival != "lotr_ext-model":
        return chain(LAYERS[rival](t) for t in tensors)
    model = chain(frozen_linear(t) for t in tensors)
    config = LoTRConfig(
        rank=tensors[0].A.shape[1], scaling=SCALING, target_modules=r".*layers\.\d+"
    )
    apply_lotr(model, config)
    for layer, t in zip(model.layers, tensors):
        set_values(layer, t)
    return model


def gradients(model: nn.Module) -> Tensor:
    """Returns the gradients of a LoTR stack in one vector: of the cores, then of A and B.

    They are sorted by size, because the order in which modules have them differs between rivals.
    Tensors of one size keep their order: cores by layer, A before B.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.cat([p.grad.flatten() for p in sorted(trained, key=torch.numel)])


def check_stack(model: Chain, truth: Chain, x: Tensor, g: Tensor, limit: float) -> float:
    """Returns the largest error of y, dx and the gradients against the formula's in float64.

    Raises:
        ArithmeticError: If it is above the limit.
    """
    truth.zero_grad()
    results = (*forward_backward(model, x, g), gradients(model))
    expected = (*forward_backward(truth, x.double(), g.double()), gradients(truth))
    return check_error("y, dx and gradients", max(map(error_of, results, expected)), limit)
