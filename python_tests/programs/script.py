"""A program as source text: compiled to be run, or written as a script of its own over torch and lotr_ext."""

from __future__ import annotations

import re
from pathlib import Path

import torch

FOLDER = Path(__file__).parent
PARTS = ("given", "twin", "twin_model", "worlds", "plain_world", "operands", "our_world", "checking")
OURS = re.compile(r"^from programs\.\w+ import (\([^)]*\)|[^\n(]*)\n", re.MULTILINE)
IMPORTS = re.compile(r"^(?:from|import) [^\n]*\n", re.MULTILINE)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def compiled(source: str):
    """The function `program` of a source text."""
    space: dict = {}
    exec(compile(source, "<program>", "exec"), space)
    return space["program"]


def standalone(source: str, dtype: torch.dtype, fault: str) -> str:
    """The program in one file with the twin, the worlds and the comparison."""
    imports: set[str] = set()
    bodies = []
    for text in (*((FOLDER / f"{name}.py").read_text() for name in PARTS), source):
        text = OURS.sub("", text)
        imports.update(IMPORTS.findall(text))
        bodies.append(IMPORTS.sub("", text).strip() + "\n")
    imports.discard("from __future__ import annotations\n")
    head = ["# A random program on which lotr_ext and plain torch differed:", *(f"# {line}" for line in fault.splitlines())]
    head.append("# First the program, then plain torch's LoTR, what programs may use, and the comparison.")
    end = ["if __name__ == '__main__':", "    torch.set_num_threads(1)"]
    end.append(f"    print(check(program, torch.{dtype_name(dtype)}) or 'nothing is wrong')")
    top = "\n".join([*head, "from __future__ import annotations\n", *(line.strip() for line in sorted(imports))])
    return "\n\n\n".join([top, bodies[-1].strip(), *(body.strip() for body in bodies[:-1]), "\n".join(end)]) + "\n"
