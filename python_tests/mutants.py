"""One-line faults of lotr_ext, and a command that shows which tests catch them: the proof that the suite has power.

    python python_tests/mutants.py            all, one after another (an hour and more)
    python python_tests/mutants.py 3 17 files those numbers, and those whose file or description has that word

Each is put into a copy of the package, and the tests of its file run until one fails. A mutant that survives is a missing test,
or a line that is not needed. `python_tests/kernels/test_planted.py` does the same for the kernels' sources.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import hypothesis.stateful  # noqa: F401  (here, so that no fork needs to)
import pytest
import torch._dynamo
import torch.testing
import transformers  # noqa: F401

LIMIT = 1200  # seconds of one file of tests
LEFT_OUT = "not instruction and not libraries"  # tests that start this suite again
ROOT = Path(__file__).resolve().parents[1]
LAYERS, MERGING, COMPILE = "test_layers.py", "test_merging.py", "test_compile.py"
PROGRAMS, BAD = "test_programs.py", "test_bad_input.py"
TESTS = {  # file: the tests that are run, in this order
    "autograd.py": (LAYERS, PROGRAMS, "test_tasks.py", COMPILE, "test_frames.py"),
    "ops.py": (LAYERS, MERGING, "test_operators.py", BAD, "test_experts.py"),
    "functional.py": (BAD, LAYERS),
    "linear.py": (MERGING, LAYERS, BAD, "test_models.py"),
    "init.py": ("test_init.py", MERGING, "test_models.py"),
    "config.py": (BAD, "test_models.py"),
    "targets.py": ("test_models.py", BAD),
    "model.py": ("test_models.py", "test_init.py", "test_files.py", BAD),
    "tasks.py": ("test_tasks.py", "test_models.py", BAD),
    "files.py": ("test_files.py", "test_models.py", BAD, "test_peft.py"),
    "wrapped.py": (MERGING, "test_quantised.py"),
    "cores.py": ("test_cores.py", "test_models.py", "test_files.py"),
    "experts.py": ("test_experts.py", "test_models.py"),
    "peft.py": ("test_peft.py",),
    "convert.py": ("test_convert.py",),
}


class Mutant(NamedTuple):
    file: str
    old: str  # occurs once
    new: str
    fault: str


MUTANTS = [
    # the nodes
    Mutant(
        "autograd.py",
        "t.view_as(t) for t in inputs)",
        "t for t in inputs)",
        "a gradient of u follows u back to the cores",
    ),
    Mutant(
        "autograd.py",
        "found = factor.sums.get(task := _graph_task())",
        "found = factor.sums.get(task := 0)",
        "sums not keyed by backward",
    ),
    Mutant(
        "autograd.py",
        "    if not _will_run(node):\n        return False, None\n",
        "",
        "sums for a node that does not run",
    ),
    Mutant(
        "autograd.py",
        "if ctx.after is not None and _will_run(ctx.after):",
        "if ctx.after is not None:",
        "k and dx for a Shrink that does not run",
    ),
    Mutant("autograd.py", "hooks and weakref.ref(hooks[0])", "0", "checkpoint regions share u"),
    Mutant(
        "autograd.py",
        "key = x._version, A._version,",
        "key = 0, A._version,",
        "u of a changed x is reused",
    ),
    Mutant(
        "autograd.py",
        "key = x._version, A._version, _storage(A)",
        "key = x._version, 0, 0",
        "u of a changed A is reused",
    ),
    Mutant("autograd.py", "and id(user) not in users and", "and", "a layer gets one u twice"),
    Mutant(
        "autograd.py",
        "    return torch.is_grad_enabled(), hooks and",
        "    return 0, hooks and",
        "u without a graph is reused in one",
    ),
    Mutant(
        "autograd.py",
        "A._version, _storage(A), A.requires_grad, p,",
        "A._version, _storage(A), p,",
        "u of a frozen A is reused for a trained one",
    ),
    Mutant(
        "autograd.py",
        "now = factor._version, _storage(factor)",
        "now = factor._version, 0",
        "A.data replaced: the old Shared is used",
    ),
    Mutant(
        "autograd.py",
        "        if not need_x:\n            ctx.mark_non_differentiable(route)",
        "        if need_x:\n            pass",
        "route differentiable where x is not",
    ),
    Mutant(
        "autograd.py",
        "adds_k = sums is not None and core is not None and need_u",
        "adds_k = sums is not None and need_u",
        "RowCore's k joins the siblings'",
    ),
    Mutant(
        "autograd.py",
        "or _batched() or _functorch()",
        "or _functorch()",
        "batched gradients run kernels",
    ),
    Mutant(
        "autograd.py",
        "return torch.is_grad_enabled() or _batched()",
        "return _batched()",
        "create_graph=True runs kernels",
    ),
    Mutant(
        "autograd.py",
        "    return torch.is_grad_enabled() or _batched() or _functorch() or tangents or compiled",
        "    return torch.is_grad_enabled() or _batched() or _functorch() or compiled",
        "a gradient's tangent is lost",
    ),
    Mutant(
        "autograd.py",
        "return factor.detach()  # not a view",
        "return factor.view_as(factor)  # not a view",
        "Shared returns a view",
    ),
    Mutant(
        "autograd.py",
        "if _functorch() or forward_ad._current_level >= 0:",
        "if _functorch():",
        "kernels under forward-mode AD",
    ),
    Mutant(
        "autograd.py", "if _functorch() or forward_ad", "if forward_ad", "kernels under functorch"
    ),
    Mutant(
        "autograd.py",
        "elif half:  # not folded",
        "elif False:  # not folded",
        "float16 folded after Shrink",
    ),
    Mutant(
        "autograd.py",
        "if half or (known and tokens < FEW_TOKENS):",
        "if known and tokens < FEW_TOKENS:",
        "float16 folded in one node",
    ),
    Mutant(
        "autograd.py",
        "dx = _added(dx, (k @ A.to(k.dtype).mT) * mask if need_x else None)",
        "dx = _added(dx, (k @ A.to(k.dtype).mT) if need_x else None)",
        "recorded dx without the mask",
    ),
    Mutant(
        "autograd.py",
        "dA = ((x.reshape(-1, x.shape[-1]) * mask).mT @ k)",
        "dA = ((x.reshape(-1, x.shape[-1])).mT @ k)",
        "recorded dA without the mask",
    ),
    Mutant(
        "autograd.py",
        "ctx.save_for_backward(x if need_A else None, A if need_x else None, seed)",
        "ctx.save_for_backward(x, A if need_x else None, seed)",
        "x kept where A is frozen",
    ),
    Mutant(
        "autograd.py",
        "sums[1], new_dx = new_dx if dx is None else dx, None",
        "sums[1], new_dx = new_dx, None",
        "siblings' dx lost",
    ),
    Mutant(
        "autograd.py", "k, dx = sums[0] if adds_k else None,", "k, dx = None,", "siblings' k lost"
    ),
    Mutant(
        "autograd.py",
        "keeps_x = x.requires_grad and not A.requires_grad and not half",
        "keeps_x = False",
        "one node keeps x for a frozen A",
    ),
    Mutant(
        "autograd.py",
        "if x.dtype == dtype or x.is_inference():\n            return x.to(dtype)",
        "if True:\n            return x.to(dtype)",
        "siblings cast x apart under autocast",
    ),
    Mutant("autograd.py", "or x.dtype not in _CAST ", "", "autocast casts float64"),
    Mutant("autograd.py", "ctx.shrunk = None\n", "pass\n", "u is reused after a backward began"),
    Mutant(
        "autograd.py",
        "g.shape, g if need_y else None,",
        "g.shape, None,",
        "the base's gradient lost",
    ),
    Mutant(
        "autograd.py",
        '        torch._C._stash_obj_in_tls("lotr", before)',
        "        pass",
        "a request outlives its context",
    ),
    Mutant(
        "autograd.py", "{**before, **states}", "dict(states)", "an inner request ends the outer one"
    ),
    Mutant(
        "autograd.py",
        "return torch.is_grad_enabled(), hooks and",
        "return 0, hooks and",
        "u of no_grad is reused with a graph",
    ),
    Mutant(
        "autograd.py",
        "(W.requires_grad or (bias is not None and bias.requires_grad))",
        "W.requires_grad",
        "a trained bias alone",
    ),
    Mutant(
        "autograd.py",
        "expand(u, B, core, scaling), (u, B, core)",
        "expand(u, B, core, 1.0), (u, B, core)",
        "recorded without the scaling",
    ),
    Mutant(
        "ops.py",
        "torch.where(index.unsqueeze(1) < 0, torch.zeros_like(h), h)",
        "h",
        "torch's products: -1 gets core 0",
    ),
    Mutant(
        "linear.py",
        "return tuple(module.weight.shape)",
        "return tuple(module.weight.mT.shape)",
        "a Conv1D's sizes are swapped",
    ),
    Mutant(
        "ops.py",
        "if core is None or u.dtype == torch.float16:",
        "if core is None:",
        "torch's products fold float16",
    ),
    Mutant(
        "ops.py",
        "    wide = accumulate_dtype(B.dtype)\n    return ((B.to(wide) @ core",
        "    wide = B.dtype\n    return ((B.to(wide) @ core",
        "F computed in half precision",
    ),
    Mutant(
        "ops.py",
        "return torch.where(index < count, index, -1)",
        "return index.clamp(max=count - 1)",
        "rows behind the last group get its core",
    ),
    Mutant(
        "ops.py",
        "index.view(*index.shape, *(1,) * (len(lead) - index.dim()))",
        "index.view(*(1,) * (len(lead) - index.dim()), *index.shape)",
        "an index of rows is read as of tokens",
    ),
    Mutant(
        "ops.py",
        "torch.autograd.graph.increment_version(y)",
        "pass",
        "in-place operators bump no version",
    ),
    Mutant(
        "ops.py",
        "return y + expand(h.view(*x.shape[:-1], B.shape[1]), B, None, 1.0)",
        "return y + expand(h.view(*x.shape[:-1], B.shape[1]), B, None, scaling)",
        "torch's products scale rows twice",
    ),
    Mutant(
        "ops.py",
        'raise RuntimeError(f"{label}: expected the device',
        'print(f"{label}: expected the device',
        "an operand on meta: nothing is written",
    ),
    Mutant(
        "functional.py", "if least < -1 or most >= count:", "if most >= count:", "an index below -1"
    ),
    Mutant(
        "functional.py",
        "p = dropout_p if training else 0.0",
        "p = dropout_p",
        "dropout in evaluation",
    ),
    Mutant(
        "functional.py",
        'if isinstance(value, bool) or not isinstance(value, int):\n        raise TypeError(f"{name}: expected an int',
        'if not isinstance(value, int):\n        raise TypeError(f"{name}: expected an int',
        "True is a rank",
    ),
    # layers
    Mutant(
        "linear.py",
        "self.dropout if self.training else 0.0",
        "self.dropout",
        "dropout of a layer in eval mode",
    ),
    Mutant(
        "linear.py",
        "        if self.merged:\n            return self.base(input)\n",
        "",
        "a merged layer adds its adapter again",
    ),
    Mutant(
        "linear.py",
        "return (weight.to(wide) + delta.to(weight.device, wide)).to(weight.dtype)",
        "return weight + delta.to(weight.device, weight.dtype)",
        "merge rounds delta first",
    ),
    Mutant(
        "linear.py",
        "self.weight_backup = weight.detach().clone() if keep_backup else None",
        "self.weight_backup = None",
        "unmerge is not exact",
    ),
    Mutant(
        "linear.py",
        'if safe and not bool(merged.isfinite().all()):\n            raise ValueError("merge: expected a finite',
        'if False:\n            raise ValueError("merge: expected a finite',
        "safe merge writes infinities",
    ),
    Mutant(
        "linear.py",
        "        for parameter in self.parameters():\n            parameter.requires_grad_(False)\n",
        "",
        "the base is not frozen",
    ),
    Mutant(
        "linear.py",
        "return alpha / (math.sqrt(r) if rslora else r)",
        "return alpha / r",
        "rslora ignored",
    ),
    Mutant(
        "linear.py",
        "        return self.weight.t()\n",
        "        return self.weight\n",
        "Conv1D not transposed",
    ),
    Mutant(
        "wrapped.py",
        "if not same_shape or not torch.allclose(",
        "if not same_shape and not torch.allclose(",
        "merges into a base that returns something else",
    ),
    Mutant(
        "wrapped.py",
        'self.__dict__["quantized_base"] = self.base_layer if keep_backup else None',
        'self.__dict__["quantized_base"] = None',
        "the quantised base does not come back",
    ),
    Mutant(
        "linear.py",
        '        if self.merged:\n            raise RuntimeError(\n                f"state_dict',
        '        if False:\n            raise RuntimeError(\n                f"state_dict',
        "a merged state_dict",
    ),
    # starts
    Mutant(
        "init.py",
        "torch.where(upper.diagonal() < 0, -1.0, 1.0)",
        "torch.where(upper.diagonal() < 0, 1.0, 1.0)",
        "orthonormal: not uniform",
    ),
    Mutant("init.py", "/ math.sqrt(d)", "/ math.sqrt(r)", "kaiming bound of the wrong side"),
    Mutant(
        "init.py",
        "torch.stack([A.T @ half for half in left(B)])",
        "torch.stack([A.T @ half for half in left(B)[:1]])",
        "svd: the first layer's core for all",
    ),
    Mutant(
        "init.py",
        "            for buffer, value in buffers:\n                buffer.copy_(value)",
        "            pass",
        "init_from_gradient changes buffers",
    ),
    # computed cores, experts
    Mutant(
        "cores.py",
        "l, k = divmod(index, len(self.kinds))\n        return torch.diag_embed",
        "k, l = divmod(index, len(self.layers))\n        return torch.diag_embed",
        "CP: layer and kind confused",
    ),
    Mutant(
        "cores.py",
        "for layer in self.layers for kind in self.kinds]",
        "for kind in self.kinds for layer in self.layers]",
        "a place's index in a grid",
    ),
    Mutant(
        "experts.py",
        "torch.where((tasks < 0) | (expert < 0), -1, tasks * cores.shape[1] + expert)",
        "torch.where((tasks < 0) | (expert < 0), -1, tasks + expert * len(cores))",
        "experts of tasks: the order of cores",
    ),
    Mutant(
        "experts.py",
        "tasks = tasks if tokens is None else tasks[tokens]",
        "tasks = tasks if tokens is None else tasks[: len(tokens)]",
        "experts: a row's task is another token's",
    ),
    Mutant(
        "experts.py",
        "torch.where((index < 0).unsqueeze(1), 0, bias[index.clamp(min=0)])",
        "bias[index.clamp(min=0)]",
        "experts: rows behind the last get a bias",
    ),
    Mutant(
        "experts.py",
        "        if self.merged or state is OFF:\n            return grouped_linear",
        "        if state is OFF:\n            return grouped_linear",
        "merged experts add their adapter again",
    ),
    # other forms
    Mutant(
        "convert.py",
        "        return (A @ core).mT, scaling * B\n",
        "        return (A @ core).mT, B\n",
        "an exported LoRA without the scaling",
    ),
    Mutant(
        "convert.py",
        'alpha / (math.sqrt(A.shape[0]) if config.get("use_rslora") else A.shape[0])',
        "alpha / A.shape[0]",
        "a converted LoRA: rslora ignored",
    ),
    Mutant(
        "peft.py",
        '        return {**super().to_dict(), "scaling": self.to_lotr().s, "alpha": None, "rslora": False}',
        "        return super().to_dict()",
        "PEFT: a saved adapter depends on what auto means",
    ),
    Mutant(
        "peft.py",
        "parameter.requires_grad_(requires_grad and part in core.trained)",
        "parameter.requires_grad_(requires_grad)",
        "PEFT: config.train ignored",
    ),
    # whole models
    Mutant(
        "model.py",
        "    model.requires_grad_(False)\n    for module in selection",
        "    for module in selection",
        "the rest of the model is not frozen",
    ),
    Mutant(
        "model.py",
        "        layer.set_trained(config.train)\n    if callable",
        "        pass\n    if callable",
        "config.train ignored",
    ),
    Mutant(
        "model.py", "    layer.leave_factors_to_owner()\n", "", "factors registered in every layer"
    ),
    Mutant(
        "model.py",
        "{features if config.group_by == 'width' else group}",
        "{group}",
        "by width: no shared factors",
    ),
    Mutant(
        "model.py",
        'if part == "B" and config.core_init == "identity":',
        "if False:",
        "identity cores start with an effect",
    ),
    Mutant(
        "model.py",
        '    expect_unmerged(layers, "disabled")\n',
        "",
        "disabled accepts a merged model",
    ),
    Mutant(
        "model.py",
        "    elif any(layer.merged for layer in layers.values()):\n        unmerge(model)\n",
        "",
        "unload keeps a merged adapter",
    ),
    Mutant(
        "model.py",
        "return START * A, START * B, cores / (START**2 * config.s)",
        "return START * A, START * B, cores / config.s",
        "svd: the start is not the weights' part",
    ),
    Mutant(
        "targets.py",
        "        if id(module) in inside:",
        "        if False:",
        "modules_to_save are adapted too",
    ),
    # tasks
    Mutant(
        "tasks.py",
        "self._write(self._slot(task), self._values(None), taken=False)",
        "self._write(self._slot(task), self._values(None), taken=True)",
        "a removed slot stays taken",
    ),
    Mutant("tasks.py", "core.grad[slot].zero_()", "pass", "a slot's gradient moves the next task"),
    Mutant(
        "tasks.py",
        "            if (got := metadata.get(key)) != want:",
        '            if (got := metadata.get(key)) != want and key != "factors":',
        "tasks of other factors are loaded",
    ),
    Mutant(
        "tasks.py",
        "        if not bool(bank.taken[own].all()):",
        "        if False:",
        "an index may name a free slot",
    ),
    Mutant(
        "tasks.py",
        "            if value.shape != core.shape[1:]:",
        "            if False:",
        "a task's shapes are not checked",
    ),
    Mutant(
        "tasks.py",
        "+ past).clamp(max=t - 1)",
        ").clamp(max=t - 1)",
        "generation: an index per token ignores the cache",
    ),
    Mutant(
        "tasks.py",
        "if torch.compiler.is_compiling() or autograd._graph_task() < 0:",
        "if True:",
        "a recomputation without its request",
    ),
    # files
    Mutant(
        "files.py",
        "if sha256 is not None and (got := hashlib.sha256(data).hexdigest()) != sha256:",
        "if False:",
        "a damaged file is read",
    ),
    Mutant(
        "files.py",
        'if kind != "lotr" or version not in (1, VERSION):',
        'if kind != "lotr" or version is None:',
        "a newer format is read",
    ),
    Mutant(
        "files.py",
        'found["scaling"] = 1.0 if found.get("alpha") is None and',
        'found["scaling"] = "auto" if found.get("alpha") is None and',
        "old files: None means auto",
    ),
    Mutant(
        "files.py", '    expect_unmerged(layers, "load_adapter")\n', "", "loads into a merged model"
    ),
    Mutant(
        "files.py",
        "        os.replace(temporary, directory / name)\n",
        "        (directory / name).write_bytes(data)\n",
        "files are written in place",
    ),
    Mutant(
        "model.py",
        "            without_adapters(model, layers_in(model))\n",
        "            pass\n",
        "a failed load leaves an adapter",
    ),
    Mutant(
        "files.py",
        "if not len({file for file, _ in pairs}) == len({here for _, here in pairs}) == len(pairs):",
        "if False:",
        "factors shared in another way are loaded",
    ),
    Mutant(
        "targets.py",
        "elif any(_matches(name, config.exclude_modules) for name in names):",
        "elif False:",
        "exclude_modules ignored",
    ),
    Mutant(
        "targets.py",
        "if t.sizes != want.sizes:",
        "if False:",
        "groups of mixed shapes are accepted",
    ),
    Mutant(
        "model.py",
        'owners.get(id(parameter), "other")',
        'owners.get(id(parameter), "factors")',
        "a head is in the factors' group",
    ),
    Mutant(
        "files.py",
        'layers[name].scaling = document["layers"][name]["scaling"]',
        "pass",
        "the scaling is not loaded",
    ),
    Mutant(
        "files.py",
        '    expect_names("layers", layers, entries)\n',
        "",
        "another model's layers are not refused",
    ),
]


def run(mutant: Mutant, folder: Path) -> str:
    """The test that catches it; SURVIVES if none does."""
    path = folder / "lotr_ext" / mutant.file
    source = path.read_text()
    if source.count(mutant.old) != 1:
        return f"STALE: its text occurs {source.count(mutant.old)} times"
    path.write_text(source.replace(mutant.old, mutant.new))
    try:
        for tests in TESTS[mutant.file]:
            if (folder / "python_tests" / tests).is_file() and (found := caught(folder, tests)):
                return found
    finally:
        path.write_text(source)
    return "SURVIVES"


def caught(folder: Path, tests: str, which: str = LEFT_OUT) -> str | None:
    """Runs some of a file's tests until one fails, in a fork: torch is imported once for all of them."""
    output = folder / "output"
    child = os.fork()
    if not child:
        with output.open("w") as file:
            os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
        os.chdir(folder)
        sys.path[:0] = [str(folder), str(folder / "python_tests")]
        options = ["-x", "-q", "-n", "0", "--tb=no", "-p", "no:cacheprovider", "-k", which]
        code = pytest.main([*options, f"python_tests/{tests}"])
        sys.stdout.flush()
        os._exit(int(code))
    deadline = time.time() + LIMIT
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.time() > deadline:
            os.kill(child, signal.SIGKILL), os.waitpid(child, 0)
            return f"caught by {tests}, which hangs"
        time.sleep(0.2)
    if os.waitstatus_to_exitcode(ended[1]) in (0, 5):  # 5: no test was selected
        return None
    lines = [
        line for line in output.read_text().splitlines() if line.startswith(("FAILED", "ERROR"))
    ]
    return "caught by " + (
        lines[0].split(" - ")[0].removeprefix("FAILED python_tests/") if lines else tests
    )


def main() -> None:
    words = sys.argv[1:]
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = True
    torch.set_num_threads(1)
    sys.path[:] = [p for p in sys.path if Path(p).resolve() not in (ROOT, ROOT / "python_tests")]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "mutated"
        for one in ("lotr_ext", "python_tests"):
            shutil.copytree(ROOT / one, folder / one, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        found = []
        for number, mutant in enumerate(MUTANTS):
            text = f"{mutant.file} {mutant.fault}"
            if words and not any(
                word == str(number) if word.isdigit() else word in text for word in words
            ):
                continue
            start = time.time()
            found.append(run(mutant, folder))
            print(
                f"{number:3} {mutant.file:14} {mutant.fault:52} {found[-1]} ({time.time() - start:.0f} s)",
                flush=True,
            )
    print(f"{sum(f.startswith('caught') for f in found)} of {len(found)} caught")


if __name__ == "__main__":
    main()
