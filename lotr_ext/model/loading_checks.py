"""Checks of load_adapter: whether an adapter's layers and tensors are those of a model."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from ..layers.placement import home
from .adapter_files import LayerEntry, Manifest, describe

__all__ = ["by_factors", "check_names", "check_not_meta", "check_tensors", "expected_tensors"]


def by_factors(entries: dict[str, LayerEntry]) -> dict[str | tuple[str, str], list[str]]:
    """Layer names, grouped by factors."""
    groups: dict[str | tuple[str, str], list[str]] = {}
    for name, entry in entries.items():
        groups.setdefault(entry.factors, []).append(name)
    return groups


def check_tensors(expected: dict[str, Tensor], tensors: dict[str, Tensor], cast: bool) -> None:
    """Raises ValueError for tensors of other names, shapes or, without cast, dtypes than expected."""
    missing, foreign = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    if missing or foreign:
        raise ValueError(
            f"adapter: expected the model's {len(expected)} tensors, got {len(tensors)}: missing "
            f"{', '.join(missing[:5]) or 'none'}; not in the model {', '.join(foreign[:5]) or 'none'}"
        )
    for key, want in expected.items():
        got = tensors[key]
        if want.shape != got.shape or (want.dtype != got.dtype and not cast):
            advice = "; give cast=True" if want.shape == got.shape else ""
            raise ValueError(f"{key}: expected {describe(want)} as in the model, got {describe(got)} in the adapter{advice}")


def expected_tensors(
    manifest: Manifest, like: Callable[[str], tuple[Tensor | None, ...]], tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors that the file must contain. like: a layer's A, B, core and magnitude (or None), or empty ones of their
    shapes."""
    expected: dict[str, Tensor] = {}
    for names in by_factors(manifest.layers).values():
        starts = (*(manifest.layers[names[0]].tensor(f"start_{part}") for part in "AB"), *(f"{n}.start_core" for n in names))
        start = any(key in tensors for key in starts)
        for name in names:
            (A, B, core, magnitude), entry = like(name), manifest.layers[name]
            for part in ("", "start_") if start else ("",):
                expected |= {entry.tensor(f"{part}A"): A, entry.tensor(f"{part}B"): B, f"{name}.{part}core": core}
            if magnitude is not None:
                expected[f"{name}.magnitude"] = magnitude
    return expected


def check_not_meta(name: str, module: nn.Module) -> None:
    """Raises RuntimeError for a layer without values that accelerate does not offload. name: of the layer."""
    if any(t.is_meta for t in module.parameters()) and home(module).type == "meta":
        raise RuntimeError(f"load_adapter: expected a model with values, got {name!r} on the meta device; materialise it first")


def check_names(have: set[str], want: set[str]) -> None:
    """Raises ValueError unless the model has the layers of the adapter."""
    if have != want:
        missing, extra = sorted(want - have), sorted(have - want)
        raise ValueError(
            f"layers: expected the adapter's {len(want)} layers to be the model's, got {len(have)}: not in the model "
            f"{', '.join(missing[:5]) or 'none'}; not in the adapter {', '.join(extra[:5]) or 'none'}"
        )
