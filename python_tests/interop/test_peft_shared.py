"""PEFT adapters over the same factors: mixed batches and weighted sums, against each adapter alone and PEFT's LoRA."""

from __future__ import annotations

import json
import threading

import pytest
import torch
from peft.utils import merge_utils
from peft_toys import base, close, config, layers, loaded, peft, plain, randomize, trained, tuned, with_two
from toys import IDS, assert_unchanged, refused, snapshot

from lotr_ext.layers.request import NOW

NAMES = ["default", "fr", "de"]


def with_shared(**settings) -> peft.PeftModel:
    """Adapters "default", "fr" and "de" with values that matter, the last two over the factors of the first; each with a
    scaling of its own."""
    model = tuned(target_modules=["q", "v", "up"], **settings)
    for seed, name in enumerate(NAMES[1:]):
        shared = {"target_modules": ["q", "v", "up"], "share_factors": "default", "scaling": 0.5 + seed}
        model.add_adapter(name, config(**{**settings, **shared}))
        randomize(model, name, seed=20 + seed)
    return model.eval()


def delta(model: peft.PeftModel, name: str) -> list[torch.Tensor]:
    return [layer.lotr_adapter[name].delta().double() for layer in layers(model)]


# ---- shared factors --------------------------------------------------------------------------------------------------


def test_an_adapter_with_shared_factors_has_cores_alone_and_trains_them() -> None:
    model = with_shared()
    factors = model.base_model.lotr_factors
    assert factors["fr"] is factors["default"] and all("core" in n for n in trained(model) if ".fr." in n)
    before = {name: p.clone() for name, p in factors["default"].named_parameters()}
    for name in ("fr", "default", "fr"):
        model.set_adapter(name)
        parts = {"A", "B", "core"} if name == "default" else {"core"}
        assert {n.rpartition(".")[2] for n in trained(model)} == parts
        assert close(model(IDS), plain(model, [name])(IDS))
    model(IDS).square().sum().backward()
    assert all(p.grad is None for p in factors["default"].parameters())
    assert all(torch.equal(p, before[name]) for name, p in factors["default"].named_parameters())
    model.delete_adapter("default")
    assert close(model(IDS), plain(model, ["fr"])(IDS))


def test_a_forward_folds_the_cores_of_active_adapters_alone(counter, two_nodes, monkeypatch) -> None:
    from lotr_ext import ops

    model, folded, fold = with_shared(), [], ops.fold
    monkeypatch.setattr(ops, "fold", lambda B, cores, *rest: folded.append(len(cores)) or fold(B, cores, *rest))
    for name in ("default", "fr"):
        model.set_adapter(name)
        model(IDS)
        assert sorted(folded) == [2, 4], name  # up, and q and v, of two blocks
        folded.clear()


def test_saved_and_loaded_with_the_factors_of_the_first(tmp_path) -> None:
    model = with_shared()
    want = {}
    for name in NAMES:
        model.set_adapter(name)
        want[name] = model(IDS)
    model.save_pretrained(tmp_path)
    for low in (False, True):
        fresh = loaded(tmp_path, low_cpu_mem_usage=low)
        fresh.load_adapter(tmp_path / "fr", "fr", low_cpu_mem_usage=low)
        factors = fresh.base_model.lotr_factors
        assert factors["fr"] is factors["default"]
        for name in ("default", "fr"):
            fresh.set_adapter(name)
            assert torch.equal(fresh.eval()(IDS), want[name])
    alone = loaded(tmp_path / "fr")  # the first adapter of a model has factors of its own
    assert close(alone(IDS), want["fr"])
    other = tuned(target_modules=["q", "v", "up"])
    with torch.no_grad():
        next(iter(other.base_model.lotr_factors["default"].parameters())).mul_(2)
    with pytest.raises(ValueError, match="share_factors: expected the values of 'default' for"):
        other.load_adapter(tmp_path / "fr", "fr")


def test_shared_factors_that_do_not_fit() -> None:
    model = tuned()
    for settings, match in [
        ({"share_factors": "it"}, "share_factors: expected one of default, got 'it'"),
        (
            {"share_factors": "default", "rank": 3},
            r"rank: expected \(4, 4\) as in the shared factors of 'default', got \(3, 3\)",
        ),
        ({"share_factors": "default", "target_modules": ["up"]}, "share_factors: expected an adapter with factors for 16x32"),
    ]:
        with refused(model, ValueError, match=match):
            model.add_adapter("fr", config(**settings))
    with pytest.raises(TypeError, match="share_factors: expected the name of an adapter or None, got 3"):
        config(share_factors=3)


# ---- mixed batches ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"core": "few"}, {"modules_to_save": ["head"]}, {"group_by": "width"}], ids=str)
def test_each_row_of_a_batch_has_its_adapter(settings) -> None:
    model = with_shared(**settings)
    names = ["fr", "__base__", "de", "fr"]
    with torch.no_grad():
        got = model(ids=IDS, adapter_names=names)
        for i, name in enumerate(names):
            if name == "__base__":
                with model.disable_adapter():
                    want = model(IDS[i : i + 1])
            else:
                model.set_adapter(name)
                want = model(IDS[i : i + 1])
            assert close(got[i : i + 1], want), name
    assert NOW.any is None and (got[0] - got[3]).abs().max() > 1e-3
    model.set_adapter("default")  # the active adapter has no part in it
    assert close(model(ids=IDS, adapter_names=names), got)


def test_mixed_batches_against_float64_and_pefts_lora() -> None:
    """The LoRAs are those that the adapters are: PEFT's own mixed batch of them gives the same rows."""
    model, names = with_shared(), ["de", "default", "__base__", "fr"]
    truth = {name: plain(model, [name]) for name in NAMES} | {"__base__": base().double()}
    got = model(ids=IDS, adapter_names=names)
    for i, name in enumerate(names):
        assert (got[i : i + 1] - truth[name](IDS[i : i + 1])).abs().max() < 1e-5
    lora = None
    for name in NAMES:
        settings = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["q", "v", "up"])
        if lora is None:
            lora = peft.get_peft_model(base(), settings, adapter_name=name)
        else:
            lora.add_adapter(name, settings)
    theirs = [m for m in lora.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    with torch.no_grad():
        for mine, its in zip(layers(model), theirs, strict=True):
            for name in NAMES:
                core = mine.lotr_adapter[name]
                its.lora_A[name].weight.copy_(core.factors.A.T)
                its.lora_B[name].weight.copy_(core.scaling * core.factors.B @ core.core.T)
    assert close(lora.eval()(ids=IDS, adapter_names=names), got)


def test_gradients_of_a_mixed_batch_are_those_of_its_rows() -> None:
    model = with_shared().double()
    model.set_adapter("fr")
    names = ["fr", "__base__", "fr", "de"]
    model(ids=IDS, adapter_names=names)[[0, 2]].square().sum().backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model(IDS[[0, 2]]).square().sum().backward()
    want = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert got.keys() == want.keys() and all(torch.allclose(got[name], want[name], atol=1e-12) for name in want)


def test_an_adapter_that_a_layer_has_not_is_the_base_there() -> None:
    model = with_shared()
    few = config(target_modules=["q"], share_factors="default")
    model.add_adapter("few", few)
    randomize(model, "few", seed=40)
    got = model.eval()(ids=IDS, adapter_names=["few"] * 4)
    assert close(got, plain(model, ["few"])(IDS))


def test_two_threads_have_batches_of_their_own() -> None:
    model, both = with_shared(), threading.Barrier(2)
    want = {name: plain(model, [name])(IDS) for name in ("fr", "de")}
    failed = []

    def run(name: str) -> None:
        both.wait()
        for _ in range(20):
            if not close(model(ids=IDS, adapter_names=[name] * 4), want[name]):
                failed.append(name)

    threads = [threading.Thread(target=run, args=(name,)) for name in want]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def language_model(kind: str) -> tuple[torch.nn.Module, list[str]]:
    """A model that generates, and the names of layers to adapt."""
    from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    special = {"pad_token_id": 0, "eos_token_id": None, "vocab_size": 50}
    if kind == "decoder":
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        return LlamaForCausalLM(LlamaConfig(**sizes, **special, bos_token_id=1)).eval(), ["q_proj", "v_proj"]
    sizes = {"d_model": 16, "d_kv": 8, "num_heads": 2, "d_ff": 32, "num_layers": 2}
    return T5ForConditionalGeneration(T5Config(**sizes, **special, decoder_start_token_id=1)).eval(), ["q", "v"]


def test_a_compiled_model_reads_the_names_of_each_call() -> None:
    model = with_shared()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        for names in (["fr", "__base__", "de", "fr"], ["de"] * 4, None):
            assert close(compiled(ids=IDS, adapter_names=names), model(ids=IDS, adapter_names=names)), names


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("kind", ["decoder", "encoder and decoder"])
def test_generate_with_names(kind: str, beams: int) -> None:
    """A beam search repeats the rows, but not those of an encoder."""
    bare, targets = language_model(kind)
    model = peft.get_peft_model(bare, config(target_modules=targets, scaling=4.0)).eval()
    model.add_adapter("fr", config(target_modules=targets, scaling=4.0, share_factors="default"))
    for seed, name in enumerate(("default", "fr")):
        randomize(model, name, seed=seed, std=3.0)
    ids, names = torch.randint(2, 50, (3, 5)), ["fr", "__base__", "default"]
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams}
    got = model.generate(input_ids=ids, adapter_names=names, **options)
    for i, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                want = model.generate(input_ids=ids[i : i + 1], **options)
        else:
            model.set_adapter(name)
            want = model.generate(input_ids=ids[i : i + 1], **options)
        assert torch.equal(got[i], want[0]), name


def test_mixed_batches_that_are_refused() -> None:
    model = with_shared()
    model.add_adapter("own", config(target_modules=["q"]))
    model.eval()
    for names, error, match in [
        (
            ["default", "own", "fr", "fr"],
            ValueError,
            "adapter_names: expected adapters over the same factors, got 'default' and",
        ),
        (["it"] * 4, ValueError, "adapter_names: expected some of default, fr, de, own, got 'it'"),
        ("default", TypeError, "adapter_names: expected a list of names"),
        ([1, 2, 3, 4], TypeError, "adapter_names: expected a list of names"),
        ([], ValueError, "adapter_names: expected a name for each row"),
        (["fr"] * 3, ValueError, "x: expected a batch of 3 rows"),
    ]:
        with pytest.raises(error, match=match):
            model(ids=IDS, adapter_names=names)
        assert NOW.any is None
    with pytest.raises(ValueError, match="adapter_names: expected a model in eval mode"):
        model.train()(ids=IDS, adapter_names=["fr"] * 4)
    model.eval().merge_adapter(["default"])
    with pytest.raises(ValueError, match=r"adapter_names: expected unmerged adapters, got 'blocks\.0\.q' merged"):
        model(ids=IDS, adapter_names=["fr"] * 4)
    with pytest.raises(ValueError, match="adapter_names: expected None in a call of a layer"):
        layers(model)[0](torch.zeros(1, 16), adapter_names=["fr"])


# ---- weighted sums ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "cat", "svd"])
def test_a_weighted_sum_is_exact(kind: str) -> None:
    """As PEFT's "cat" and "svd" are, and its "linear" is not."""
    model = with_shared().double()
    want = [0.7 * a - 1.5 * b for a, b in zip(delta(model, "fr"), delta(model, "de"))]
    before = model(IDS)
    model.add_weighted_adapter(["fr", "de"], [0.7, -1.5], "both", combination_type=kind)
    for got, own in zip(delta(model, "both"), want, strict=True):
        assert (got - own).norm() < 1e-12 * own.norm()
    assert torch.equal(model(IDS), before) and model.base_model.lotr_factors["both"] is model.base_model.lotr_factors["default"]
    assert not [name for name in trained(model) if ".both." in name]
    model.add_weighted_adapter(["fr", "de"], [9.0, 9.0], "both")  # a name that exists: nothing, as PEFT's
    assert (delta(model, "both")[0] - want[0]).norm() < 1e-12 * want[0].norm()


@pytest.mark.parametrize("majority", ["total", "frequency"])
@pytest.mark.parametrize("kind", ["ties", "dare_linear", "dare_ties", "magnitude_prune"])
def test_sums_by_pefts_definitions(kind: str, majority: str) -> None:
    model = with_shared()
    scaled = [[x.lotr_adapter[name].scaling * x.lotr_adapter[name].core.detach() for name in NAMES] for x in layers(model)]
    weights, options = [0.5, 1.0, -0.75], {"density": 0.4, "majority_sign_method": majority}
    torch.manual_seed(5)
    model.add_weighted_adapter(NAMES, weights, "sum", combination_type=kind, **options)
    torch.manual_seed(5)
    torch.manual_seed(int(torch.randint(2**62, ())))
    for layer, cores in zip(layers(model), scaled, strict=True):
        arguments = [cores, torch.tensor(weights), 0.4] + ([majority] if kind.endswith("ties") else [])
        want = getattr(merge_utils, kind)(*arguments)
        torch.testing.assert_close(layer.lotr_adapter["sum"].scaling * layer.lotr_adapter["sum"].core.detach(), want)


def test_a_sum_is_saved_loaded_and_merged(tmp_path) -> None:
    model = with_shared()
    model.add_weighted_adapter(NAMES, [0.5, 1.0, -0.75], "sum", combination_type="linear")
    model.set_adapter("sum")
    want = model(IDS)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    assert json.loads((tmp_path / "sum" / "adapter_config.json").read_text())["share_factors"] == "default"
    assert close(loaded(tmp_path / "sum")(IDS), want)
    assert close(model.merge_and_unload()(IDS), want)


def test_sums_that_are_refused_change_nothing() -> None:
    model = with_shared()
    model.add_adapter("own", config(target_modules=["q"]))
    model.add_adapter("few", config(target_modules=["q"], share_factors="default"))
    two, one = ["fr", "de"], [1.0, 1.0]
    before = snapshot(model)
    for arguments, options, match in [
        ((["fr", "own"], one, "new"), {}, "adapters: expected adapters over the same factors, got 'fr' and 'own'"),
        ((["fr", "it"], one, "new"), {}, "adapters: expected some of default, fr, de, own, few, got 'it'"),
        ((["fr", "few"], one, "new"), {}, "adapters: expected adapters of the same layers, got target_modules"),
        (([], [], "new"), {}, "weights: expected one for each of the adapters"),
        ((two, [1.0], "new"), {}, "weights: expected one for each of the adapters"),
        ((["fr", "fr"], one, "new"), {}, "adapters: expected each once"),
        ((two, [1.0, float("nan")], "new"), {}, r"weights\['de'\]: expected a finite number, got nan"),
        (
            (two, one, "new"),
            {"combination_type": "ties_svd", "density": 0.5},
            "combination_type: expected one of linear, cat, svd",
        ),
        ((two, one, "new"), {"combination_type": "ties"}, 'density: expected the fraction of elements that "ties" keeps'),
        ((two, one, "new"), {"combination_type": "ties", "density": 0.0}, r"density: expected a number in \(0, 1\]"),
        (
            (two, one, "new"),
            {"combination_type": "ties", "density": 0.5, "majority_sign_method": "x"},
            "majority: expected one",
        ),
        ((two, one, "new"), {"svd_rank": 2}, "svd_rank: expected None or 4, at which the sum is exact, got 2"),
        ((two, one, "blocks"), {}, "adapter_name: expected a name that no adapted module or group has"),
    ]:
        with pytest.raises(ValueError, match=match):
            model.add_weighted_adapter(*arguments, **options)
        assert_unchanged(model, before)
        assert list(model.peft_config) == ["default", "fr", "de", "own", "few"]


def test_different_heads_are_refused() -> None:
    model = with_shared(modules_to_save=["head"])
    with pytest.raises(ValueError, match="adapters: expected at most one with modules_to_save"):
        model.add_weighted_adapter(["fr", "de"], [1.0, 1.0], "both")


def test_adapters_with_factors_of_their_own_are_not_added() -> None:
    with pytest.raises(ValueError, match="adapters: expected adapters over the same factors"):
        with_two().add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")
