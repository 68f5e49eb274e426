"""What `import lotr_ext` does: it loads the operators, and reads no file, registers no hook, starts no thread and warns of
nothing besides. Neither it nor its modules import what only some users have, or torch's compiler (1.5 s)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import inspect, json, sys, threading
import numpy, safetensors.torch, torch, torch.library
before = threading.active_count()
opened = []
sys.addaudithook(lambda event, given: opened.append(str(given[0])) if event == "open" else None)
import lotr_ext
from torch.optim import optimizer
hooks = len(optimizer._global_optimizer_pre_hooks) + len(optimizer._global_optimizer_post_hooks)
threads = threading.active_count() - before
import lotr_ext.convert, lotr_ext.cores, lotr_ext.info, lotr_ext.init, lotr_ext.interop
inspect.stack()  # looks up names in each module
print(json.dumps({"opened": opened, "hooks": hooks, "threads": threads,
                  "heavy": sorted({"rich", "transformers", "peft", "torch._dynamo"} & set(sys.modules))}))
"""


def test_an_import_reads_no_files_registers_no_hooks_and_warns_of_nothing() -> None:
    done = subprocess.run([sys.executable, "-W", "always", "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert "lotr_ext" not in done.stderr, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    package = str(Path(__file__).parents[2] / "lotr_ext")
    data = [
        path
        for path in found["opened"]
        if path.startswith(package) and not path.endswith((".py", ".so")) and "__pycache__" not in path
    ]
    others = [
        path for path in found["opened"] if path.endswith((".json", ".txt", ".toml", ".cfg")) and "site-packages" not in path
    ]
    assert data == [] and others == []
    assert found["hooks"] == 0 and found["threads"] == 0 and found["heavy"] == []
