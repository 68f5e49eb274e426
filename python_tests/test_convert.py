"""Conversions: LoTR to LoRA and back, many LoRAs to a bank, original checkpoints, the command.

A conversion is right if the model with the converted adapter computes the same.
"""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import peft
import pytest
import torch
import zoo
from helpers import OLD_FILES, relative
from models import same, trained, unchanged
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lotr_ext import (
    LoTRConfig,
    TaskBank,
    apply_lotr,
    load_adapter,
    save_adapter,
    use_tasks,
)
from lotr_ext.adapter_state import AdapterState
from lotr_ext.convert import (
    export_lora,
    lora_to_lotr,
    loras_to_bank,
    lotr_to_lora,
    original_to_lotr,
    read_lora,
)
from lotr_ext.convert.__main__ import COMMANDS, main
from lotr_ext.convert.lora import MORE_THAN_TWO_FACTORS
from lotr_ext.init import INIT_GAIN
from lotr_ext.peft import LoTRPeftConfig

CLOSE = 2e-5  # for outputs in float32
# (net, settings)
EXPORTS: dict[str, tuple[str, dict[str, Any]]] = {
    "shapes": ("mlp", {"rank": 3, "modules_to_save": ["head"], "dropout": 0.1}),
    "small out": ("attention", {"rank": (4, 2), "group_by": "width"}),
    "small in": ("attention", {"rank": (2, 4), "group_by": "block"}),
    "a pair per layer": ("llama", {"rank": 4, "group_by": "layer"}),
    "svd": ("mlp", {"rank": 3, "init": "svd"}),
    "conv1d": ("gpt2", {"rank": 4, "alpha": 2.0}),
    "half": ("llama", {"rank": 4, "scaling": 8.0, "adapter_dtype": torch.bfloat16}),
    "diagonal": ("bert", {"rank": 4, "core": "diagonal"}),
    "tied head": ("gpt2", {"rank": 2, "modules_to_save": ["lm_head"]}),
    "mixture": ("mixture", {"rank": (4, 2)}),
}


def adapted(net: str, **settings: object) -> nn.Module:
    """Returns an adapted network. Its modules_to_save have changed as well."""
    saved = tuple(settings.get("modules_to_save", ()))
    return zoo.fill(trained(net, **settings), 7, 0.3, lambda name: name.startswith(saved))


def tensors_in(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def config_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def lora_model(folder: Path, net: str = "attention") -> nn.Module:
    return peft.PeftModel.from_pretrained(zoo.net(net), folder).eval()


def output(model: nn.Module, net: str = "attention") -> Tensor:
    return zoo.output(model, zoo.inputs(net))


def deltas_of(
    adapter: AdapterState, tensors: dict[str, Tensor], cores: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Returns the change of each layer's weight, s B G^T A^T, in float64."""
    return {
        layer: entry.scaling
        * tensors[entry.B].double()
        @ cores[f"{layer}.core"].double().mT
        @ tensors[entry.A].double().mT
        for layer, entry in adapter.layers.items()
    }


# ---- LoTR to LoRA --------------------------------------------------------------------------------


@pytest.mark.parametrize("case", EXPORTS)
def test_an_export_is_the_same_adapter_with_an_ordinary_alpha(case: str, tmp_path: Path) -> None:
    net, settings = EXPORTS[case]
    model = adapted(net, **settings)
    expected = output(model, net)
    export_lora(model, tmp_path / "lora", base_model="base")
    bound = 0.05 if case == "half" else CLOSE  # bfloat16 has 8 bits
    assert relative(output(lora_model(tmp_path / "lora", net), net), expected) < bound
    assert relative(output(zoo.net(net), net), expected) > bound
    written = config_in(tmp_path / "lora")
    # With svd, the LoRA's rank is the sum of the adapter's and its start's, which it subtracts.
    rank = 3 + 3 if case == "svd" else min(model.lotr_config.ranks)
    assert written["lora_alpha"] == written["r"] == rank
    assert written["lora_dropout"] == settings.get("dropout", 0.0)
    assert written["base_model_name_or_path"] == "base"
    save_adapter(model, tmp_path / "lotr")
    lotr_to_lora(tmp_path / "lotr", tmp_path / "again")
    assert same(tensors_in(tmp_path / "lora"), tensors_in(tmp_path / "again"))


def test_a_task_is_exported(tmp_path: Path) -> None:
    model = adapted("attention")
    bank = TaskBank(model, 1)
    for core in bank.cores_of(bank.add()).values():  # views of the bank
        core.fill_(0.5)
    with unchanged(model):
        export_lora(model, tmp_path, task=0)
    with use_tasks(model, torch.tensor([0, 0, 0])):
        assert relative(output(lora_model(tmp_path)), output(model)) < CLOSE


def test_a_folder_of_peft_is_exported(tmp_path: Path) -> None:
    settings = LoTRPeftConfig(rank=3, target_modules=["q", "v"], modules_to_save=["head"])
    tuned = peft.get_peft_model(zoo.net("attention"), settings)
    zoo.fill(tuned, 7, 0.1, lambda name: name.endswith("core") or "modules_to_save" in name)
    tuned.save_pretrained(tmp_path / "peft")
    lotr_to_lora(tmp_path / "peft", tmp_path / "lora")
    assert relative(output(lora_model(tmp_path / "lora")), output(tuned)) < CLOSE
    with pytest.raises(ValueError, match=r"directory: expected another one than source"):
        lotr_to_lora(tmp_path / "peft", tmp_path / "peft")


def test_a_folder_of_peft_of_the_first_version_is_exported(tmp_path: Path) -> None:
    lotr_to_lora(OLD_FILES / "peft", tmp_path)
    expected = load_file(OLD_FILES / "peft" / "expected.safetensors")
    assert relative(zoo.output(lora_model(tmp_path, "gpt2"), expected["x"]), expected["y"]) < CLOSE


VLLM_NAMES = ("w1", "w3", "w2")  # of gate, up and down
GPT_OSS = {"hosts": "gpt_oss"}


@pytest.mark.parametrize(
    ("form", "options", "module", "names"),
    [
        ("vllm-shared", {}, "block_sparse_moe.experts", VLLM_NAMES),  # by the model's type, mixtral
        ("per-expert", {}, "block_sparse_moe.experts", VLLM_NAMES),
        ("vllm-shared", GPT_OSS, "mlp.experts", VLLM_NAMES),
        ("per-expert", GPT_OSS, "mlp.experts", ("gate_proj", "up_proj", "down_proj")),
    ],
)
def test_experts_in_the_forms_of_servers(
    form: str, options: dict, module: str, names: tuple[str, ...], tmp_path: Path
) -> None:
    """Each form's tensors are the change of each expert's gate, up and down."""
    model = adapted("mixture", rank=(2, 3))
    export_lora(model, tmp_path, experts=form, **options)
    tensors = tensors_in(tmp_path)
    for i, layer in enumerate(model.model.layers):
        gate_up = layer.mlp.experts.lotr.gate_up_proj.delta_weight()
        is_interleaved = options == GPT_OSS
        halves = (gate_up[:, ::2], gate_up[:, 1::2]) if is_interleaved else gate_up.chunk(2, 1)
        deltas = (*halves, layer.mlp.experts.lotr.down_proj.delta_weight())
        for name, delta in zip(names, deltas, strict=True):
            inner = [f"{c}.{name}" for c in range(3)] if form == "per-expert" else [name]
            keys = [f"base_model.model.model.layers.{i}.{module}.{key}" for key in inner]
            A = torch.stack([tensors[f"{key}.lora_A.weight"] for key in keys])
            B = torch.stack([tensors[f"{key}.lora_B.weight"] for key in keys])
            if form == "vllm-shared":  # one of the two factors is shared by all experts
                assert {A.shape[1], B.shape[1]} == {1, 3}
            assert relative((B @ A).view_as(delta), delta) < 1e-5


def nested() -> nn.Module:
    """Layers with names that are the ends of other names, and a head in a head."""
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
    head = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), inner, head)


def test_an_export_names_only_its_own_modules(tmp_path: Path) -> None:
    config = LoTRConfig(rank=2, target_modules=r"0", modules_to_save=["3", "3.1"])
    model = apply_lotr(nested(), config)
    zoo.fill(model, 7, 0.3, lambda name: ".core" in name or name.startswith("3."))
    export_lora(model, tmp_path)
    tuned = peft.PeftModel.from_pretrained(nested(), tmp_path).eval()
    modules = tuned.base_model.model.named_modules()
    assert [name for name, module in modules if hasattr(module, "lora_A")] == ["0"]
    x = torch.randn(3, 8)
    assert relative(tuned(x), model(x)) < CLOSE


def test_a_killed_export_leaves_no_configuration(tmp_path: Path) -> None:
    model = adapted("mlp")
    export_lora(model, tmp_path)
    with (
        mock.patch("lotr_ext.convert.lora.put_file", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        export_lora(model, tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()


# ---- LoRA to LoTR --------------------------------------------------------------------------------


def save_lora(
    net: str, folder: Path, *, seed: int = 5, filled: str = "lora_", **settings: object
) -> nn.Module:
    """Saves a LoRA of PEFT with values that matter in the filled tensors. Returns its model."""
    settings = {"r": 2, "lora_alpha": 3, "target_modules": zoo.TARGETS[net], **settings}
    model = peft.get_peft_model(zoo.net(net), peft.LoraConfig(**settings)).eval()
    zoo.fill(model, seed, 0.3, lambda name: filled in name or "modules_to_save" in name)
    model.save_pretrained(folder)
    return model


# (net, settings of the LoRA, options of the conversion)
EXACT: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "rslora and a head": (
        "attention",
        {"use_rslora": True, "modules_to_save": ["head"]},
        {"rank": 16},
    ),
    "two ranks": ("mlp", {}, {"rank": (4, 5)}),
    "a pair per layer": ("attention", {"r": 4}, {"rank": 4, "group_by": "layer"}),
    "patterns": (
        "llama",
        {
            "rank_pattern": {"q_proj": 3},
            "alpha_pattern": {"layers.1.self_attn.v_proj": 7},
            "lora_dropout": 0.1,
        },
        {"rank": 8, "group_by": "block"},
    ),
    "conv1d": ("gpt2", {"target_modules": ["c_attn"], "r": 1}, {"rank": 2, "group_by": "name"}),
    "a mapping, and a rank above the width": (
        "mlp",
        {},
        {"rank": 20, "group_by": {f"blocks.{i}.{n}": n for i in (0, 1) for n in ("up", "down")}},
    ),
    "a head that the model does not have": (
        "attention",
        {"modules_to_save": ["head", "score"]},
        {"rank": 16},
    ),
}


@pytest.mark.parametrize(("net", "settings", "options"), EXACT.values(), ids=EXACT)
def test_loras_are_exact_at_the_sum_of_their_ranks(
    net: str, settings: dict, options: dict, tmp_path: Path
) -> None:
    expected = output(save_lora(net, tmp_path / "lora", **settings), net)
    converted = lora_to_lotr(tmp_path / "lora", **options)
    assert max(converted.errors.values()) < 1e-6
    converted.save(tmp_path / "lotr")
    model = load_adapter(zoo.net(net), tmp_path / "lotr")
    assert relative(output(model, net), expected) < CLOSE
    assert model.lotr_config.dropout == settings.get("lora_dropout", 0.0)
    # The columns of A have the same norm as in a new adapter.
    A = converted.adapter.tensors[next(iter(converted.adapter.layers.values())).A]
    assert (A.norm(dim=0) - INIT_GAIN).abs().max() < 1e-5
    lotr_to_lora(tmp_path / "lotr", tmp_path / "back")
    assert relative(output(lora_model(tmp_path / "back", net), net), expected) < CLOSE


def test_a_lora_in_a_pickle_and_one_of_zeros(tmp_path: Path) -> None:
    """Files of PEFT before it had safetensors, in bfloat16; an adapter without effect."""
    expected = output(save_lora("attention", tmp_path))
    tensors = tensors_in(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save({key: t.bfloat16() for key, t in tensors.items()}, tmp_path / "adapter_model.bin")
    lora_to_lotr(tmp_path, rank=16).save(tmp_path / "lotr")
    loaded = load_adapter(zoo.net("attention"), tmp_path / "lotr")
    assert 1e-5 < relative(output(loaded), expected) < 0.05
    torch.save({key: t.zero_() for key, t in tensors.items()}, tmp_path / "adapter_model.bin")
    converted = lora_to_lotr(tmp_path, rank=4)
    assert set(converted.errors.values()) == {0.0}
    converted.save(tmp_path / "zeros")
    loaded = load_adapter(zoo.net("attention"), tmp_path / "zeros")
    assert torch.equal(output(loaded), output(zoo.net("attention")))


def test_at_a_lower_rank_the_error_is_reported(tmp_path: Path) -> None:
    save_lora("attention", tmp_path)
    deltas = {name: layer.B @ layer.A for name, layer in read_lora(tmp_path)[0].items()}
    converted = lora_to_lotr(tmp_path, rank=3, dtype=torch.float64)
    tensors = converted.adapter.tensors
    for name, kept in deltas_of(converted.adapter, tensors, tensors).items():
        assert relative(kept, deltas[name]) == pytest.approx(converted.errors[name], abs=1e-6)


# ---- many LoRAs to a bank ------------------------------------------------------------------------

# The settings of LoRAs of the zoo's attention net, by the names of their folders.
LORAS: dict[str, dict[str, Any]] = {
    # A collection that differs in layers, ranks, alphas and rslora.
    "german": {"r": 2, "target_modules": ["q", "k"]},
    "french": {"r": 3, "lora_alpha": 7, "use_rslora": True, "alpha_pattern": {"blocks.1.q": 5}},
    "legal": {"r": 1, "rank_pattern": {"blocks.0.v": 2}},
    # With changes a hundred times larger.
    "loud": {"r": 1, "lora_alpha": 300, "rank_pattern": {"blocks.0.v": 2}},
    # Three of rank 1 that meet in the first block.
    "of all layers": {"r": 1, "target_modules": r"blocks\.\d\..*"},
    "of one block": {"r": 1, "target_modules": r"blocks\.0\..*"},
    "also of one block": {"r": 1, "target_modules": r"blocks\.0\..*"},
    # With B = 0, and the only one of its collection that adapts the head.
    "untrained": {"filled": "lora_A", "target_modules": ["q", "head"]},
    # What `loras_to_bank` refuses.
    "with a head": {"modules_to_save": ["head"]},
    "of two shapes": {"target_modules": ["q", "head"]},
    "of a wider base": {},
    "dora": {"use_dora": True},
}
COLLECTION = ["german", "french", "legal"]


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with the folders of LORAS."""
    folder = tmp_path_factory.mktemp("loras")
    for seed, (name, settings) in enumerate(LORAS.items()):
        save_lora("attention", folder / name, seed=seed, **settings)
    tensors = tensors_in(folder / "of a wider base")
    key = next(key for key in tensors if "lora_B" in key)
    tensors[key] = torch.cat([tensors[key]] * 2)
    save_file(tensors, folder / "of a wider base" / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("group_by", "rank", "names"),
    [
        ("layer", 8, COLLECTION),
        ("shape", 16, COLLECTION),
        ("block", (16, 15), COLLECTION),
        ("layer", 8, ["german", "untrained", "legal"]),
        ("layer", "auto=1", ["german", "untrained", "legal"]),
    ],
)
def test_a_bank_has_each_lora_as_a_task(
    group_by: str, rank: int | tuple[int, int] | str, names: list[str], loras: Path, tmp_path: Path
) -> None:
    sources = [loras / name for name in names]
    bank = loras_to_bank(sources, tmp_path, rank=rank, group_by=group_by)
    is_exact = rank != (16, 15)  # of the 16 directions of a block's outputs, one is lost
    assert list(bank.errors) == names == list(bank.files)
    assert (max(bank.errors.values()) < 1e-6) == is_exact
    model = load_adapter(zoo.net("attention"), tmp_path)
    assert relative(output(model), output(zoo.net("attention"))) < 1e-6
    tasks = TaskBank(model, 4).requires_grad_()
    slots = torch.tensor([tasks.add(file) for file in bank.files.values()])
    with use_tasks(model, slots):
        mixed = output(model)
    for row, source in enumerate(sources):
        assert relative(mixed[row], output(lora_model(source))[row]) < (1e-5 if is_exact else 0.3)
    with use_tasks(model, torch.full((3,), tasks.add())):  # a new task trains as cores
        output(model).square().mean().backward()
    assert all(core.grad[3].any() for core in tasks.cores)


@pytest.mark.parametrize("group_by", ["layer", "shape"])
def test_the_error_of_each_lora_is_that_of_its_task(
    group_by: str, loras: Path, tmp_path: Path
) -> None:
    sources = [loras / name for name in ("german", "french", "loud")]
    bank = loras_to_bank(sources, tmp_path, rank=2, group_by=group_by, dtype=torch.float64)
    adapter = AdapterState.read(tmp_path)
    total = 0.0
    stacks: dict[str, list[Tensor]] = {}  # of each group, the changes by all LoRAs
    for source in sources:
        deltas = {name: layer.B @ layer.A for name, layer in read_lora(source)[0].items()}
        # Each LoRA counts by its relative change, so its changes are divided by their norm.
        norm = sum(float(delta.square().sum()) for delta in deltas.values()) ** 0.5
        kept = deltas_of(adapter, adapter.tensors, load_file(bank.files[source.name]))
        rest = [delta - deltas.get(name, 0) for name, delta in kept.items()]
        lost = sum(float(delta.square().sum()) for delta in rest) / norm**2
        assert bank.errors[source.name] == pytest.approx(lost**0.5, abs=1e-7)
        total += lost
        for name, delta in deltas.items():
            stacks.setdefault(name if group_by == "layer" else "all", []).append(delta / norm)
    # A matrix of a group's changes loses, at rank 2, the squared singular values after the second.
    # One matrix has the changes one below the other, and one has them side by side.
    bounds = []
    for dimension in (0, 1):
        joined = [torch.cat(matrices, dimension) for matrices in stacks.values()]
        bounds.append(sum(float(torch.linalg.svdvals(m)[2:].square().sum()) for m in joined))
    # A pair of rank 2 loses at least the larger loss (Eckart-Young), and HOSVD at most both.
    assert max(bounds) - 1e-9 <= total <= sum(bounds)


def test_a_share_sets_the_rank(loras: Path, tmp_path: Path) -> None:
    """Three LoRAs of rank 1 per layer need rank 3 for all of them, and a lower one for a share.

    The last layers have only one of them, and need no more than rank 1.
    """
    sources = [loras / name for name in ("of all layers", "of one block", "also of one block")]
    errors = {}
    for share in ("0.5", "0.9", "1"):
        bank = loras_to_bank(sources, tmp_path, rank=f"auto={share}")
        errors[bank.config.rank] = max(bank.errors.values())
        kept = 1 - sum(error**2 for error in bank.errors.values()) / len(sources)
        assert kept >= float(share) - 1e-9
    assert list(errors) == sorted(errors)  # a larger share needs a larger rank
    assert max(errors) == 3
    assert errors[3] < 1e-6
    assert errors[min(errors)] > 1e-6


SHARE = "rank: expected a number, a pair, or auto=SHARE"
# (names of the sources, options, the message)
UNFIT: dict[str, tuple[list[str], dict[str, object], str]] = {
    "none": ([], {}, "sources: expected a list of folders"),
    "one name twice": (
        ["legal", "legal"],
        {},
        "sources: expected folders of different names.* got 'legal' twice",
    ),
    "a head": (
        ["legal", "with a head"],
        {},
        "sources: expected LoRAs without modules_to_save.* got head.bias",
    ),
    "another base": (
        ["french", "of a wider base"],
        {},
        "sources: expected LoRAs of one base model, got 'blocks.0",
    ),
    "dora": (["legal", "dora"], {}, "use_dora: expected a LoRA of two factors"),
    "no share": (["legal"], {"rank": "auto"}, SHARE),
    "too large a share": (["legal"], {"rank": "auto=1.5"}, SHARE),
    "width": (
        ["legal"],
        {"group_by": "width"},
        "group_by: expected shape, block, name, layer or a mapping",
    ),
    "a group of two shapes": (
        ["of two shapes"],
        {"group_by": {"blocks.0.q": "all", "blocks.1.q": "all", "head": "all"}},
        "group_by: expected layers of one shape in group 'all'",
    ),
}


@pytest.mark.parametrize("case", UNFIT)
def test_a_collection_that_does_not_fit_is_refused(case: str, loras: Path, tmp_path: Path) -> None:
    names, options, message = UNFIT[case]
    with pytest.raises(ValueError, match=message):
        loras_to_bank([loras / name for name in names], tmp_path / "bank", **{"rank": 2, **options})
    assert not (tmp_path / "bank").exists()


# ---- the original implementation -----------------------------------------------------------------


def save_original(
    folder: Path, suffix: str = "pt", shared_part: str | None = None, **replaced: Tensor
) -> tuple[Path, dict[str, Tensor]]:
    """Saves a checkpoint of the original implementation, with a new head.

    q of block 1 has other factors than the other layers, but for `shared_part`.

    Returns:
        The file, and its tensors.
    """
    generator = torch.Generator().manual_seed(3)
    state = dict(zoo.net("attention").state_dict())
    state["head.weight"] = torch.randn(29, 16, generator=generator)
    factors = [torch.randn(2, 16, generator=generator) for _ in range(4)]
    for name in ("blocks.0.q", "blocks.0.v", "blocks.1.q"):
        rhs, lhs = factors[2:] if name == "blocks.1.q" else factors[:2]
        state |= {
            f"{name}.linear.weight": state.pop(f"{name}.weight"),
            f"{name}.linear.bias": state.pop(f"{name}.bias"),
            f"{name}.lotr.rhs": rhs.T.contiguous(),
            f"{name}.lotr.lhs": lhs.clone(),
            f"{name}.lotr.mid": torch.randn(2, 2, generator=generator),
        }
    if shared_part is not None:
        state[f"blocks.1.q.lotr.{shared_part}"] = state[f"blocks.0.q.lotr.{shared_part}"].clone()
    state |= replaced
    path = folder / f"model.{suffix}"
    {"pt": torch.save, "safetensors": save_file}[suffix](state, path)
    return path, state


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("shared_part", [None, "rhs", "lhs"])
def test_an_original_checkpoint_computes_the_same(
    suffix: str, shared_part: str | None, tmp_path: Path
) -> None:
    path, state = save_original(tmp_path, suffix, shared_part)
    converted = original_to_lotr(path, scale=3.0, modules_to_save=["head"])
    assert converted.adapter.config.scaling == 1.5
    assert len({entry.A for entry in converted.adapter.layers.values()}) == 2
    plain = zoo.net("attention")
    plain.head.weight.data.copy_(state["head.weight"])
    for name in converted.adapter.layers:
        rhs, mid, lhs = (state[f"{name}.lotr.{part}"] for part in ("rhs", "mid", "lhs"))
        plain.get_submodule(name).weight.data.add_(1.5 * (rhs @ mid @ lhs).mT)
    converted.save(tmp_path / "lotr")
    model = load_adapter(zoo.net("attention"), tmp_path / "lotr")
    assert relative(output(model), output(plain)) < 1e-5


# ---- refusals ------------------------------------------------------------------------------------

Change = Callable[[dict, dict], object]  # of a LoRA's configuration c and tensors t
Q = "base_model.model.blocks.0.q.lora_A.weight"
# (a change, the message)
HOSTILE: dict[str, tuple[Change, str]] = {
    "another method": (
        lambda c, t: c.update(peft_type="IA3"),
        "expected peft_type LORA, got 'IA3'",
    ),
    **{
        name: (
            lambda c, t, n=name: c.update({n: {"a": 1}}),
            f"{name}: expected a LoRA of two factors",
        )
        for name in MORE_THAN_TWO_FACTORS
    },
    "moved weights": (
        lambda c, t: c.update(init_lora_weights="pissa_niter_4"),
        "init_lora_weights: expected an init that leaves",
    ),
    "no alpha": (lambda c, t: c.pop("lora_alpha"), "lora_alpha: expected a number, got None"),
    "a word as alpha": (lambda c, t: c.update(lora_alpha="8"), "lora_alpha: expected a number"),
    "infinite alpha": (
        lambda c, t: c.update(lora_alpha=float("inf")),
        "lora_alpha: expected a finite number",
    ),
    "no factors": (
        lambda c, t: t.clear(),
        "expected tensors <layer>.lora_A.weight and .lora_B.weight, got none",
    ),
    "half a layer": (
        lambda c, t: t.pop(Q),
        "blocks.0.q: expected lora_A and lora_B, got only lora_B",
    ),
    "other shapes": (
        lambda c, t: t.update({Q: t[Q][:1]}),
        r"blocks.0.q: expected lora_A \[r, k\] and lora_B",
    ),
    "a vector": (
        lambda c, t: t.update({Q: t[Q][0]}),
        r"blocks.0.q: expected lora_A \[r, k\] and lora_B",
    ),
    "NaN": (lambda c, t: t[Q].fill_(float("nan")), "blocks.0.q: expected finite floating values"),
    "integers": (
        lambda c, t: t.update({Q: t[Q].int()}),
        "blocks.0.q: expected finite floating values",
    ),
    "a foreign tensor": (
        lambda c, t: t.update(x=torch.ones(1)),
        "expected lora_A, lora_B and modules_to_save, got also x",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_folder_that_is_not_a_lora_is_refused(case: str, tmp_path: Path) -> None:
    folder = tmp_path / "lora"
    save_lora("attention", folder)
    config = config_in(folder)
    tensors = tensors_in(folder)
    change, message = HOSTILE[case]
    change(config, tensors)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises((TypeError, ValueError), match=message):
        lora_to_lotr(folder, rank=8)
    assert main(["lora-to-lotr", str(folder), str(tmp_path / "out"), "--rank", "8"]) == 2
    assert not (tmp_path / "out").exists()


DAMAGES = {
    "missing": Path.unlink,
    "empty": partial(Path.write_bytes, data=b""),
    "garbage": partial(Path.write_bytes, data=b"\x80\x05garbage"),
}


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_files_are_one_clear_error(
    name: str, damage: Callable[[Path], object], tmp_path: Path
) -> None:
    save_lora("attention", tmp_path)
    damage(tmp_path / name)
    with pytest.raises(ValueError, match=re.escape(name) + "|source: expected"):
        lora_to_lotr(tmp_path, rank=4)


def test_code_in_a_checkpoint_is_not_executed(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple:
            return (tmp_path.joinpath("exploded").touch, ())

    torch.save({"blocks.0.q.lotr.rhs": Bomb()}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"source: expected tensors by safetensors or torch.save"):
        original_to_lotr(tmp_path / "model.pt")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        (
            {"blocks.0.q.lotr.mid": torch.ones(3, 2)},
            r"blocks.0.q: expected lotr.lhs \[r, out\], .mid \[r, r\]",
        ),
        (
            {"blocks.0.q.lotr.lhs": torch.tensor(1.0)},
            r"blocks.0.q: expected lotr.lhs .*, got \[\[\], \[2, 2\], \[16, 2\]\]",
        ),
        (
            {
                "blocks.0.q.lotr.lhs": torch.ones(0, 16),
                "blocks.0.q.lotr.mid": torch.ones(0, 0),
                "blocks.0.q.lotr.rhs": torch.ones(16, 0),
            },
            r"blocks.0.q: expected lotr.lhs .*, got \[\[0, 16\], \[0, 0\], \[16, 0\]\]",
        ),
        (
            {"other.lotr.mid": torch.ones(2, 2)},
            r"other: expected lotr.lhs .*, got \[\[0\], \[2, 2\], \[0\]\]",
        ),
        (
            {"blocks.0.q.lotr.mid": torch.ones(2, 2).double()},
            r"source: expected layers of one rank and dtype",
        ),
    ],
)
def test_an_original_checkpoint_that_does_not_fit_is_refused(
    replaced: dict, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        original_to_lotr(save_original(tmp_path, **replaced)[0])


# ---- the command ---------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = output(save_lora("attention", tmp_path / "lora"))
    save_original(tmp_path)
    save_adapter(adapted("attention", rank=2), tmp_path / "saved")
    runs = [
        "lora-to-lotr lora lotr --rank 16 15 --dtype float64",
        "lotr-to-lora lotr back --base-model base",
        "lotr-to-lora saved also",
        "original-to-lotr model.pt original --scale 2 --modules-to-save head",
        "loras-to-bank lora bank --rank auto=0.95 --group-by block",
        "loras-to-bank lora bank --rank 3",
    ]
    for run in runs:
        command, source, destination, *options = run.split()
        assert main([command, str(tmp_path / source), str(tmp_path / destination), *options]) == 0
    printed = capsys.readouterr().out
    for line in ("blocks.0.q  error", "blocks.0.q  16 x 16  rank 15", "lora  error"):
        assert line in printed
    # One of the 16 directions is lost.
    assert relative(output(lora_model(tmp_path / "back")), expected) < 0.2
    assert AdapterState.read(tmp_path / "original").config.scaling == 1.0


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("place", ["nowhere", "."])
def test_the_command_says_what_is_missing(
    command: str, place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rank = ["--rank", "4"] if command.startswith("lora") else []
    assert main([command, str(tmp_path / place), str(tmp_path / "out"), *rank]) == 2
    message = capsys.readouterr().err
    assert re.match(r"error: \w+: expected a .*, got ", message), message
    assert "Errno" not in message and not (tmp_path / "out").exists()
