"""Models of transformers from small configurations, without a network. Weights are random: seed torch before."""

from __future__ import annotations

import os

import pytest
from torch import nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
transformers.logging.set_verbosity_error()

SIZE = {"vocab_size": 67, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
LLAMA = {**SIZE, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 0}
DRY = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def bert(**settings) -> nn.Module:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**{**SIZE, "num_labels": 3, **settings}))


def roberta(**settings) -> nn.Module:
    config = transformers.RobertaConfig(**{**SIZE, "num_labels": 3, "pad_token_id": 1, **settings})
    return transformers.RobertaForSequenceClassification(config)


def gpt2(**settings) -> nn.Module:
    sizes = {"vocab_size": 67, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**sizes, **settings}))


def llama(**settings) -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**LLAMA, **settings}))


def vit(**settings) -> nn.Module:
    sizes = {name: size for name, size in SIZE.items() if name != "vocab_size"} | {"image_size": 8, "patch_size": 4}
    config = transformers.ViTConfig(**{**sizes, "num_channels": 1, "num_labels": 3, **settings})
    return transformers.ViTForImageClassification(config)
