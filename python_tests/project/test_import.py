"""What `import lotr_ext` does: it loads the operators, and reads no file, registers no hook and starts no thread besides."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import json, sys, threading, warnings
import numpy, safetensors.torch, torch, torch.library
from torch._dynamo import eval_frame
before = threading.active_count()
opened = []
sys.addaudithook(lambda event, given: opened.append(str(given[0])) if event == "open" else None)
import lotr_ext
from torch.optim import optimizer
hooks = len(optimizer._global_optimizer_pre_hooks) + len(optimizer._global_optimizer_post_hooks)
print(json.dumps({"opened": opened, "hooks": hooks, "threads": threading.active_count() - before,
                  "heavy": sorted({"rich", "transformers", "peft"} & set(sys.modules))}))
"""


def test_an_import_reads_no_files_and_registers_no_hooks() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
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
