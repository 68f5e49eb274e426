"""One name and one colour for each method, in every table and picture."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

NAMES = {
    "lora-eager": "LoRA eager",
    "lora-in-place": "LoRA in-place",
    "lora-in-place-beta": "LoRA in-place, beta",
    "lora-compiled": "LoRA compiled",
    "lora-peft": "LoRA PEFT",
    "dora-peft": "DoRA PEFT",
    "lora-unsloth": "LoRA Unsloth",
    "lora-lorafusion": "LoRA LoRAFusion",
    "vera-peft": "VeRA PEFT",
    "lotr-eager": "LoTR in three lines",
    "lotr_ext": "lotr_ext",
}
VARIANTS = {
    "-as-lotr": ", size of LoTR",
    "-as-lora": ", size of LoRA",
    "-core": ", cores only",
    "-magnitude": ", with magnitudes",
    "-compiled": ", compiled",
    "-per-example": ", per example",
}  # model
COLOURS = {
    "lotr_ext": "tab:blue",
    "lora-eager": "tab:orange",
    "lora-in-place": "tab:green",
    "lora-in-place-beta": "tab:olive",
    "lora-compiled": "tab:cyan",
    "lora-peft": "tab:red",
    "dora-peft": "goldenrod",
    "vera-peft": "tab:pink",
    "lotr-eager": "0.55",
    "lora-unsloth": "tab:brown",
    "lora-lorafusion": "tab:purple",
}
FROZEN, LIGHT_BLUE, DARK_BLUE = "0.85", "#9ecae1", "#08306b"
SHARED_COLOURS = {"autograd": COLOURS["lotr-eager"], "lotr_ext": LIGHT_BLUE, "lotr_ext-scope": COLOURS["lotr_ext"]}
PROJECTED_COLOURS = {
    **{rival: COLOURS[rival] for rival in ("lotr-eager", "lora-eager", "lora-in-place", "lora-in-place-beta")},
    "lotr_ext beta": COLOURS["lotr_ext"],
    "lotr_ext fused": DARK_BLUE,
}
EXTRA_FLOPS = "extra FLOPs"  # the adapter's operations over the frozen layer's


def chosen(option: str, text: str | None, known: Collection[str], usual: Iterable[str] | None = None) -> list[str]:
    """The names of an option, comma-separated; None: the usual ones, or all. ValueError for one that is not known."""
    names = list(known if usual is None else usual) if text is None else text.split(",")
    for name in names:
        if name not in known:
            raise ValueError(f"{option}: expected some of {', '.join(known)}, got {name!r}")
    return names


def numbers(option: str, text: str | None, usual: Iterable[int]) -> list[int]:
    """The positive numbers of an option, comma-separated; None: the usual ones."""
    if text is None:
        return list(usual)
    if not all(part.isdigit() and int(part) > 0 for part in text.split(",")):
        raise ValueError(f"{option}: expected positive numbers, comma-separated, got {text!r}")
    return [int(part) for part in text.split(",")]


def sizes(option: str, text: str, form: str) -> list[tuple[int, ...]]:
    """Groups of positive numbers as "8x16,4x16", comma-separated; form: their names, as "MxN". ValueError for another form."""
    groups = [part.split("x") for part in text.split(",")]
    count = len(form.split("x"))
    if not all(len(group) == count and all(part.isdigit() and int(part) > 0 for part in group) for group in groups):
        raise ValueError(f"{option}: expected {form}, comma-separated, got {text!r}")
    return [tuple(map(int, group)) for group in groups]


def _parts(rival: str) -> tuple[str, str]:
    """A method and, in the model benchmark, what is varied of it."""
    if rival in NAMES:
        return rival, ""
    variant = next((end for end in VARIANTS if rival.endswith(end)), "")
    return rival.removesuffix(variant), variant


def named(rival: str) -> str:
    """A method by the name it has everywhere, with what is varied of it. KeyError where it has none."""
    method, variant = _parts(rival)
    return NAMES[method] + VARIANTS.get(variant, "")


def name_of(cell: dict) -> str:
    """The method of a result; one that has no name is called what its result calls it."""
    return named(cell["rival"]) if _parts(cell["rival"])[0] in NAMES else cell["label"]


def colour_of(rival: str) -> str:
    return COLOURS.get(_parts(rival)[0], FROZEN)


def bold(name: str) -> str:
    """name in Markdown, with ours in bold up to a comma."""
    return re.sub(r"^lotr_ext[^,]*", r"**\g<0>**", name)
