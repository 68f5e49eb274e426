"""What conversion refuses: each with the name, what was expected and what came."""

from __future__ import annotations

import re

import pytest
import torch

from lotr_ext.interop import lora_to_lotr, original_to_lotr

GOOD = {"x.lora_A.weight": torch.ones(2, 5), "x.lora_B.weight": torch.ones(4, 2)}
PLAIN = {"r": 2, "lora_alpha": 2}


@pytest.mark.parametrize(
    ("state", "config", "options", "message"),
    [
        (GOOD, None, {}, "config: expected r, lora_alpha"),
        (GOOD, {"r": 2}, {}, "lora_alpha: expected a number"),
        (GOOD, {**PLAIN, "r": 3}, {}, "x: expected rank 3 as configured, got lora_A (2, 5)"),
        (GOOD, {**PLAIN, "peft_type": "LOHA"}, {}, "peft_type: expected LORA, got 'LOHA'"),
        (GOOD, {**PLAIN, "use_dora": True}, {}, "use_dora: expected a LoRA of two factors a layer, got a norm"),
        (GOOD, {**PLAIN, "lora_bias": True}, {}, "lora_bias: expected"),
        (GOOD, {**PLAIN, "bias": "all"}, {}, "bias: expected 'none'"),
        (GOOD, {**PLAIN, "init_lora_weights": "pissa_niter_4"}, {}, "init_lora_weights: expected an init that leaves"),
        (GOOD, {**PLAIN, "init_lora_weights": "lora_ga"}, {}, "init_lora_weights: expected an init that leaves"),
        (GOOD, {**PLAIN, "init_lora_weights": "OLoRA"}, {}, "init_lora_weights: expected an init that leaves"),
        (GOOD, {**PLAIN, "use_qalora": True}, {}, "use_qalora: expected a LoRA of two factors a layer, got an input that is"),
        (GOOD, {**PLAIN, "use_bdlora": {"nblocks": 2}}, {}, "use_bdlora: expected a LoRA of two factors"),
        (GOOD, {**PLAIN, "arrow_config": {"top_k": 3}}, {}, "arrow_config: expected a LoRA of two factors"),
        (GOOD, {**PLAIN, "kasa_config": {"beta": 1e-4}}, {}, "kasa_config: expected a LoRA of two factors"),
        (GOOD, {**PLAIN, "monteclora_config": {"x": 1}}, {}, "monteclora_config: expected a LoRA of two factors"),
        ({}, PLAIN, {}, "adapter: expected tensors <layer>.lora_A.weight"),
        ({"x.lora_A.weight": torch.ones(2, 5)}, PLAIN, {}, "x: expected lora_A and lora_B, got only lora_A"),
        ({**GOOD, "x.lora_B.weight": torch.ones(4, 3)}, PLAIN, {}, "x: expected lora_A [r, K] and lora_B [N, r], got (2, 5)"),
        ({**GOOD, "x.lora_A.weight": torch.full((2, 5), torch.nan)}, PLAIN, {}, "x: expected finite floating values in lora_A"),
        ({**GOOD, "x.lora_magnitude_vector": torch.ones(4)}, PLAIN, {}, "got also x.lora_magnitude_vector"),
        ({**GOOD, "e.lora_embedding_A": torch.ones(4)}, PLAIN, {}, "got also e.lora_embedding_A"),
        (GOOD, PLAIN, {"error": 0.1, "rank": 2}, "rank, error, parameters: expected exactly one"),
        (GOOD, PLAIN, {"rank": None}, "rank, error, parameters: expected exactly one"),
        (GOOD, PLAIN, {"error": 0.0, "rank": None}, "error: expected a number between 0 and 1"),
        (GOOD, PLAIN, {"parameters": 2.5, "rank": None}, "parameters: expected an int"),
        (GOOD, PLAIN, {"rank": 1.5}, "rank: expected an int"),
        (GOOD, PLAIN, {"dtype": torch.int8}, "dtype: expected one of"),
        (GOOD, PLAIN, {"group_by": "layer"}, "group_by: expected"),
        (GOOD, PLAIN, {"group_by": "width"}, 'group_by: expected "shape", "block", "name" or a mapping, got "width"'),
        (GOOD, PLAIN, {"group_by": lambda name, module: "g"}, "group_by: expected"),
        (GOOD, PLAIN, {"group_by": {"x": "g.h"}}, "group_by: expected a name that can be a module's"),
        (
            GOOD,
            PLAIN,
            {"group_by": {"y": "g"}},
            "group_by: expected a group for each adapted layer and no other, got none for x",
        ),
        (
            {**GOOD, "y.lora_A.weight": torch.ones(2, 6), "y.lora_B.weight": torch.ones(4, 2)},
            PLAIN,
            {"group_by": {"x": "g", "y": "g"}},
            "group_by: expected layers of one shape in group 'g', got 'x' (5, 4) and 'y' (6, 4)",
        ),
    ],
)
def test_loras_that_cannot_be_converted(state, config, options, message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        lora_to_lotr(state, config=config, **{"rank": 2, **options})


LAYER = {"x.lotr.lhs": torch.ones(2, 4), "x.lotr.mid": torch.ones(2, 2), "x.lotr.rhs": torch.ones(5, 2)}


@pytest.mark.parametrize(
    ("state", "options", "message"),
    [
        ({"x.weight": torch.ones(2)}, {}, "source: expected tensors <layer>.lotr.lhs, .mid and .rhs, got 1 others"),
        ({k: v for k, v in LAYER.items() if "mid" not in k}, {}, "x: expected lotr.lhs, .mid and .rhs, got none of mid"),
        ({**LAYER, "x.lotr.rhs": torch.ones(5, 3)}, {}, "x: expected lhs [r, out], mid [r, r], rhs [in, r], got lhs (2, 4)"),
        ({**LAYER, "x.lotr.mid": torch.ones(2, 2).half()}, {}, "expected adapter tensors of one dtype"),
        (
            LAYER | {"y.lotr.lhs": torch.ones(1, 4), "y.lotr.mid": torch.ones(1, 1), "y.lotr.rhs": torch.ones(5, 1)},
            {},
            "source: expected layers of one rank, got [1, 2]",
        ),
        (LAYER, {"scale": float("inf")}, "scale: expected a finite number"),
        (LAYER, {"modules_to_save": ["head"]}, "modules_to_save: expected names of modules in the checkpoint, got 'head'"),
    ],
)
def test_original_checkpoints_that_cannot_be_converted(state, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        original_to_lotr(state, **options)
