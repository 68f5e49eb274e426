"""A program as source text: compiled to be run, or written as a script of its own that imports torch and lotr_ext alone."""

from __future__ import annotations

import linecache
from pathlib import Path

import torch

FOLDER = Path(__file__).parent
HEAD = """# A random program on which lotr_ext and plain torch differ. Run it: python {name}
from __future__ import annotations

"""


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def compiled(source: str):
    """The function `program` of a source text."""
    name = f"<program {abs(hash(source))}>"
    space: dict = {}
    exec(compile(source, name, "exec"), space)
    linecache.cache.pop(name, None)
    return space["program"]


def standalone(source: str, dtype: torch.dtype, fault: str) -> str:
    """The program with the twin, the worlds and the comparison in one file."""
    parts = [HEAD.format(name="FILE"), *(f"# {line}\n" for line in fault.splitlines())]
    parts.append(
        "import sys\nimport types\n\n\ndef module(name, text):\n    made = sys.modules[name] = types.ModuleType(name)\n"
    )
    parts.append('    exec(compile(text, name, "exec"), made.__dict__)\n    return made\n\n\n')
    parts.append('module("programs", "")\n')
    for name in ("twin", "worlds", "checking"):
        text = (FOLDER / f"{name}.py").read_text()
        parts.append(f"sys.modules[\"programs\"].{name} = module(\"programs.{name}\", r'''{text}''')\n\n")
    parts.append("# ---- the program " + "-" * 100 + "\n\n")
    parts.append(source)
    parts.append('\n\nif __name__ == "__main__":\n    from programs.checking import check\n\n')
    parts.append("    torch.set_num_threads(1)\n")
    parts.append(f'    print(check(program, torch.{dtype_name(dtype)}) or "nothing is wrong")\n')
    return "".join(parts)
