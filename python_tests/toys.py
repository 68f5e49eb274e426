"""Small models for the tests of whole-model tools, and LoTR as three lines of plain torch: what they are compared with."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import resource
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.utils._python_dispatch import TorchDispatchMode

from lotr_ext.layers.layer import LoTRLayer
from lotr_ext.model.adapter_files import JSON_NAME
from lotr_ext.model.apply import apply_lotr
from lotr_ext.model.config import LoTRConfig
from lotr_ext.model.targets import select


class ToyBlock(nn.Module):
    """Names and shapes as in a small transformer: q, k, v, o [d, d], up [2d, d], down [d, 2d]."""

    def __init__(self, d: int):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(d, d) for _ in range(4))
        self.up, self.down = nn.Linear(d, 2 * d), nn.Linear(2 * d, d, bias=False)
        self.norm = nn.LayerNorm(d)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        x = x + self.o(torch.sigmoid(self.q(h)) * torch.tanh(self.k(h)) + self.v(h))
        return x + self.down(torch.relu(self.up(x)))


class Toy(nn.Module):
    """Token ids [b, t] -> logits [b, classes]."""

    def __init__(self, d: int = 16, layers: int = 2, classes: int = 3):
        super().__init__()
        self.embed = nn.Embedding(29, d)
        self.blocks = nn.ModuleList(ToyBlock(d) for _ in range(layers))
        self.head = nn.Linear(d, classes)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class Tied(Toy):
    """The output layer's weight is the embedding's."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(classes=29)
        self.head.weight = self.embed.weight


REPARAMETRISED: dict[str, Callable[[nn.Module], nn.Module]] = {  # ways in which something else computes a layer's weight
    "old weight_norm": nn.utils.weight_norm,
    "old spectral_norm": nn.utils.spectral_norm,
    "weight_norm": parametrizations.weight_norm,
    "orthogonal": parametrizations.orthogonal,
    "pruning": lambda layer: prune.random_unstructured(layer, "weight", 0.5),
}


class Seen(TorchDispatchMode):
    """The operators that pass through the dispatcher inside, below autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[str] = []  # such as aten.mm.default

    @property
    def names(self) -> list[str]:
        """Such as mm."""
        return [operator.split(".")[1] for operator in self.operators]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operators.append(str(func))
        return func(*args, **(kwargs or {}))


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that is made inside."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, Tensor) and not t.is_meta:
                self.elements = max(self.elements, t.numel())
        return out


IDS = torch.randint(0, 29, (4, 6), generator=torch.Generator().manual_seed(5))


def toy(seed: int = 0, **settings) -> Toy:
    """The same weights for the same seed."""
    torch.manual_seed(seed)
    return Toy(**settings)


def randomize(model: nn.Module, std: float = 0.3, seed: int = 7) -> None:
    """Gives every A, B and core values that matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".core", ".A", ".B", ".value")) or "lotr_cores." in name:
                values = torch.randn(parameter.shape, dtype=torch.float64, generator=generator) * std
                parameter.copy_(values.to(parameter.dtype))


def adapted(seed: int = 0, random: bool = True, **settings) -> Toy:
    """A toy with adapters, by default rank 4 on q and v and with values that matter."""
    settings = {"rank": 4, "target_modules": ["q", "v"], **settings}
    model = apply_lotr(toy(seed), LoTRConfig(**settings))
    if random:
        randomize(model)
    return model


def target_names(model: nn.Module, **settings) -> list[str]:
    """The layers that a configuration adapts."""
    return [t.name for t in select(model, LoTRConfig(**settings)).targets]


class PlainLoTR(nn.Module):
    """y = x W^T + bias + s ((x A) G) B^T by autograd alone."""

    def __init__(self, layer: LoTRLayer):
        super().__init__()
        self.base, self.core, self.scaling, self.pair = layer.to_base(), layer.core, layer.scaling, (layer.factors,)

    def forward(self, x: Tensor) -> Tensor:
        factors = self.pair[0]
        return self.base(x) + self.scaling * (((x @ factors.A) @ self.core) @ factors.B.T)


def plain(model: nn.Module) -> nn.Module:
    """The model with every adapted layer replaced by PlainLoTR, in place."""
    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, LoTRLayer)]:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, PlainLoTR(layer))
    return model


IN_A_FILES_PLACE: dict[str, Callable[[Path], object]] = {
    "deep nesting": lambda path: path.write_bytes(b'{"format":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    # can be read, but neither compared nor printed further down a stack
    "nesting": lambda path: path.write_bytes(b'{"format":' + b"[" * 600 + b"]" * 600 + b"}"),
    "a huge number": lambda path: path.write_text('{"format": ' + "9" * 5000 + "}"),
    "a FIFO": os.mkfifo,
    "a symlink to itself": lambda path: path.symlink_to(path.name),
    "a symlink to a device": lambda path: path.symlink_to("/dev/zero"),
}


@contextlib.contextmanager
def full_disk(size: int) -> Iterator[None]:
    """The kernel refuses files that are longer: RLIMIT_FSIZE."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def no_warnings() -> Iterator[None]:
    """Every warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def at_once(*tasks: Callable[[], object]) -> list[BaseException]:
    """Runs all at the same time, in threads; what they raised."""
    errors: list[BaseException] = []
    start = threading.Barrier(len(tasks))

    def guarded(task: Callable[[], object]) -> None:
        start.wait()
        try:
            task()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(task,)) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def copied(tensor: Tensor) -> Tensor:
    """Its values; none of a tensor without (meta, or a lazy module's)."""
    has_values = not nn.parameter.is_lazy(tensor) and not tensor.is_meta
    return tensor.detach().clone() if has_values else torch.empty(0)


def snapshot(model: nn.Module) -> dict[str, object]:
    """All that must not change when something is refused: modules, tensors, flags, hooks."""
    return {
        "modules": {name: (type(m), id(m), m.training) for name, m in model.named_modules()},
        "tensors": {name: copied(t) for name, t in model.state_dict(keep_vars=True).items()},
        "grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "attributes": {name: sorted(vars(m)) for name, m in model.named_modules()},
        "hooks": {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()},
        "settings": {
            n: (m.scaling, m.dropout, m.merged, m.disabled) for n, m in model.named_modules() if isinstance(m, LoTRLayer)
        },
    }


def assert_unchanged(model: nn.Module, before: dict[str, object]) -> None:
    now = snapshot(model)
    tensors, old = now.pop("tensors"), {k: v for k, v in before.items() if k != "tensors"}
    assert now == old
    assert tensors.keys() == before["tensors"].keys()
    for name, tensor in tensors.items():
        was = before["tensors"][name]
        assert tensor.dtype == was.dtype, name
        assert torch.equal(*(t.nan_to_num(1e30) if t.dtype.itemsize > 1 else t.view(torch.uint8) for t in (tensor, was))), name


@contextlib.contextmanager
def refused(model: nn.Module, error: type[Exception], *, match: str) -> Iterator[None]:
    """The block raises this error, and changes nothing of the model."""
    before = snapshot(model)
    with pytest.raises(error, match=match):
        yield
    assert_unchanged(model, before)


def tensors_file(directory: Path) -> Path:
    """That of a saved adapter."""
    return directory / json.loads((directory / JSON_NAME).read_text())["tensors_file"]


def edit_json(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """Another configuration of a saved adapter."""

    def edit(directory: Path) -> None:
        content = json.loads((directory / JSON_NAME).read_text())
        change(content)
        (directory / JSON_NAME).write_text(json.dumps(content))

    return edit


def edit_tensors(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """Other tensors of a saved adapter, in a file that is consistent in itself."""

    def edit(directory: Path) -> None:
        path = tensors_file(directory)
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)
        described = {n: {"shape": list(t.shape), "dtype": str(t.dtype)[6:]} for n, t in sorted(tensors.items())}
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        edit_json(lambda c: c.update(tensors_sha256=digest, tensors=described))(directory)

    return edit


def loss(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    """A cross entropy whose labels are fixed."""
    return F.cross_entropy(model(ids), torch.arange(len(ids)) % 3)
