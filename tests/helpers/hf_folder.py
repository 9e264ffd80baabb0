"""Folders as transformers saves them, of a small random Llama. Not a test module."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.tokenizer_file import byte_pairs

transformers = pytest.importorskip("transformers")
TEXT = "to be or not to be, that is the question: whether 'tis nobler — naïve café\n"


@cache
def tokenizer_json() -> bytes:
    return byte_pairs(TEXT)


def llama(**changes: Any) -> Any:
    """A tiny random LlamaForCausalLM: grouped queries, odd sizes, all norm weights different."""
    fields: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": 48,
        "intermediate_size": 76,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "eos_token_id": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 50_000.0},
    }
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields | changes)).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def write(model: Any, folder: Path, tokenizer: bytes = b"") -> Path:
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(tokenizer or tokenizer_json())
    return folder


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
