"""CoreSync against a real vLLM: versions are pushed into an engine that runs, in process and over HTTP."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from test_vllm import IDS, PYTHON, ROOT, banked, batch, load, run
from torch import nn

from lotr_ext.interop import export_lora
from lotr_ext.interop.vllm import CoreSync
from lotr_ext.interop.vllm.message import PATH, SIGNATURE, Message, pack, signature
from lotr_ext.model.adapted import adapted_layers

pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason=f"no vLLM: {PYTHON} is missing (make serve-test)")
SECRET = "a secret of 23 letters."
ENDPOINT = "lotr_ext.interop.vllm.server.CoreSyncEndpoint"
WORKER = "lotr_ext.interop.vllm.worker.CoreWorker"


def environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith("LOTR_")} | {"PYTHONPATH": str(ROOT)}


@pytest.mark.parametrize("way", ["bank", "slots"])
def test_a_sequence_is_of_one_version_while_versions_are_pushed(tmp_path: Path, way: str) -> None:
    banked("llama", tmp_path, 1)
    command = [PYTHON, Path(__file__).with_name("sync_under_load.py"), tmp_path, way]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    for row in found["rows"]:
        gaps = {int(version): gap for version, gap in row["gaps"].items()}
        assert gaps.pop(row["version"]) < 1e-4 and min(gaps.values()) > 0.1, row
    assert sum(row["ended"] > row["began"] for row in found["rows"]) >= 8  # pushes came while these ran
    layers = found["layers"]
    assert [one["layers"] for one in found["sent"]] == [layers] + [layers // 2] * 5
    assert [one["again"] for one in found["sent"]] == [0] * 6  # nothing has changed
    assert all(one["bytes"] < 0.8 * found["sent"][0]["bytes"] for one in found["sent"][1:])
    errors = found["errors"]
    others = "push: expected a task over the engine's factors"
    for name, message in {
        "cut": "push: expected a safetensors file",
        "header": "push: expected a whole message by CoreSync, got 40 bytes",
        "empty": "push: expected a whole message by CoreSync, got 0 bytes",
        "few": f"push: expected the cores of all {layers} layers, got {layers - 1}",
        "short": "floating numbers in cores, got torch.float32",
        "infinite": "push: expected finite values in model.layers.0.",
        "slash": "name: expected up to 128 letters, digits, '.', '_' and '-'",
        "at": "name: expected up to 128 letters, digits, '.', '_' and '-'",
        "nan": "push: expected finite values in model.layers.0.",
        "factors": "model: expected the factors that it had when CoreSync was made, got others",
        "no extension": "engine: expected one with worker_extension_cls='lotr_ext.interop.vllm.worker.CoreWorker'",
        "no adapters": "engine: expected one with enable_lora=True and max_loras slots, got one without slots",
        "no slots": "max_loras",  # vLLM's own
        "version": "vllm: expected version 0.1.*, 0.2.*, which lotr_ext is tested with, got 0.32.",
        "any version": "nothing",
        "others": others if way == "bank" else "nothing",  # slots take other factors too
        "deeper": others if way == "bank" else "factors: expected layers of the engine's model that take adapters",
        "wider": others
        if way == "bank"
        else "factors: expected (128, 96) features at model.layers.0.mlp.gate_proj, got (128, 160)",
    }.items():
        assert message in errors[name], (name, errors[name])
    end = found["end"]
    assert end["gap"] < 1e-4 and end["traced"]  # the engine serves on
    assert end["other base"] == {"need": "cores", "version": end["fresh"]}
    assert not end["dropped"][0] and end["dropped"][1] > end["fresh"]
    assert end["newest"] and end["held"] == end["kept"] and end["fresh"] > end["last"]


@contextmanager
def server(folder: Path) -> Iterator[int]:
    """vLLM's HTTP server on this machine; its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {"VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    own |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_HOST_IP": "127.0.0.1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    own |= {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "LOTR_SYNC_SECRET": SECRET, "LOTR_FACTORS": str(folder / "factors")}
    command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder / "base"), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--served-model-name", "base", "--skip-tokenizer-init", "--dtype", "float32"]
    command += ["--enforce-eager", "--max-model-len", "64", "--max-num-seqs", "8", "--enable-lora", "--max-loras", "3"]
    command += ["--max-lora-rank", "8", "--worker-extension-cls", WORKER, "--middleware", ENDPOINT]
    with open(folder / "server.log", "w") as log:
        process = subprocess.Popen(command, env=environment() | own, stdout=log, stderr=log, start_new_session=True)
    try:
        for _ in range(1500):
            if process.poll() is not None:
                raise RuntimeError((folder / "server.log").read_text()[-3000:])
            if ask(port, "/health", None)[0] == 200:
                break
            time.sleep(0.2)
        yield port
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # the engine's process too; on a busy machine their own end takes minutes
        process.wait()


def ask(port: int, path: str, body: object, headers: dict[str, str] | None = None) -> tuple[int, str]:
    """Status and text of an answer; 0 without a server."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    data = body if isinstance(body, bytes) else json.dumps(body)
    try:
        connection.request(
            "GET" if body is None else "POST", path, data, {"content-type": "application/json", **(headers or {})}
        )
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    except ConnectionError:
        return 0, ""
    finally:
        connection.close()


def complete(port: int, name: str, tokens: int = 12) -> tuple[list[int], list[float]]:
    """Token ids and their logprobs."""
    request = {"model": name, "prompt": IDS[0].tolist(), "max_tokens": tokens, "min_tokens": tokens, "ignore_eos": True}
    request |= {"temperature": 1.0, "logprobs": 0, "return_token_ids": True, "return_tokens_as_token_ids": True}
    status, text = ask(port, "/v1/completions", request)
    assert status == 200, text
    choice = json.loads(text)["choices"][0]
    return choice["token_ids"], choice["logprobs"]["token_logprobs"]


@torch.no_grad()
def logprobs(model: nn.Module, tokens: list[int]) -> torch.Tensor:
    ids = IDS[0].tolist()
    logits = model(torch.tensor([ids + tokens])).logits[0, len(ids) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]


def test_a_server_takes_versions_while_it_answers(tmp_path: Path) -> None:
    model = banked("llama", tmp_path, 2)
    export_lora(model, tmp_path / "lora", base_model="base")
    layers = adapted_layers(model)
    torch.manual_seed(1)
    found: list[tuple[int, list[int], list[float]]] = []
    cores = []
    with server(tmp_path) as port:
        sync = CoreSync(model, f"http://127.0.0.1:{port}", secret=SECRET)
        threads = []
        for version in range(1, 5):
            with torch.no_grad():
                for layer in layers.values():
                    layer.core.copy_(0.7 * torch.randn_like(layer.core))
            cores.append([layer.core.detach().clone() for layer in layers.values()])
            pushed = sync.push(name="policy")
            assert (pushed.name, pushed.request) == (f"policy@{version}", None)
            for _ in range(2):
                of = (version, pushed.name)
                threads.append(threading.Thread(target=lambda v, n: found.append((v, *complete(port, n, 40))), args=of))
                threads[-1].start()
            time.sleep(0.05)
        for thread in threads:
            thread.join()
        assert sync.push(0).name == "task-0@1"  # a task of the bank
        refusals(port, model, sync, tmp_path)
        assert len(complete(port, "policy@4")[0]) == len(complete(port, "base")[0]) == 12
    assert len(found) == 8
    for version, tokens, got in found:
        for other, values in enumerate(cores, 1):
            with torch.no_grad():
                for layer, core in zip(layers.values(), values, strict=True):
                    layer.core.copy_(core)
            gap = float((torch.tensor(got) - logprobs(model, tokens)).abs().max())
            assert gap < 1e-4 if other == version else gap > 0.1


def refusals(port: int, model: nn.Module, sync: CoreSync, folder: Path) -> None:
    """Whatever is wrong is refused by name."""
    with pytest.raises(ValueError, match="secret: expected a whole message signed with the server's LOTR_SYNC_SECRET"):
        CoreSync(model, f"http://127.0.0.1:{port}", secret="another of 23 letters..").push(name="x")
    whole = sync._cores(None)
    data = pack(Message("x", 1, 0, sync._checksum, range(len(adapted_layers(model))), whole))
    signed = {SIGNATURE: signature(SECRET.encode(), data)}
    assert ask(port, PATH, data, {})[0] == ask(port, PATH, data[:-40], signed)[0] == 401
    cut = {SIGNATURE: signature(SECRET.encode(), data[:-40])}
    status, text = ask(port, PATH, data[:-40], cut)
    assert status == 422 and "push: expected a safetensors file" in text
    assert ask(port, PATH, None)[0] == 405
    for name, path in {"a/b": folder / "task-0", "lora": folder / "lora"}.items():
        status, text = ask(port, "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path)})
        assert (status == 200) == (name == "a/b"), text  # vLLM allows any name for folders
    assert "expected a task by export_task, got an adapter of LORA" in text


def test_a_task_is_no_adapter_of_an_engine_without_the_plugin(tmp_path: Path) -> None:
    banked("llama", tmp_path, 1)
    found = run(tmp_path, [load(tmp_path / "task-0", 1), batch([None] * 5)], factors=False, max_loras=2)
    assert "doesn't contain tensors" in found[0]["error"] and len(found[1]) == 5
