"""GGUF files as llama.cpp's converter writes them, of a small random model. Not a test module."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bitnet.model import ModelConfig, Transformer

gguf = pytest.importorskip("gguf")
D, HEADS, KV, FF, LAYERS, CONTEXT = 32, 4, 2, 64, 2, 64
SPECIALS = ("<|start|>", "<|end|>", "<|eot|>")
Fields = dict[str, Any]


def bytes_to_marks() -> dict[int, str]:
    """GPT-2's alphabet, as openai/gpt-2 writes it (encoder.py)."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1)]
    kept += range(ord("®"), ord("ÿ") + 1)
    marks, extra = {b: chr(b) for b in kept}, 0
    for byte in range(256):
        if byte not in marks:
            marks[byte], extra = chr(256 + extra), extra + 1
    return marks


@cache
def vocabulary() -> tuple[list[str], list[str]]:
    """Tokens and merges: bytes, a few pairs that span each kind of border, then control tokens."""
    marks = bytes_to_marks()
    tokens, merges = [marks[b] for b in range(256)], []
    words = ["to", " be", " the", "12", "123", "34", " 1", "'t", "n't", "\n\n", "  ", " x", "//"]
    words += ["é", "café", "漢", "漢字", "10", "00", "_0", ", ", "n'", " don", "N'", "ï", "²½"]
    for word in words:
        parts = [marks[b] for b in word.encode()]
        while len(parts) > 1:
            pair = parts[0] + parts[1]
            if pair not in tokens:
                tokens.append(pair)
                merges.append(f"{parts[0]} {parts[1]}")
            parts[:2] = [pair]
    return [*tokens, *SPECIALS], merges


VOCAB = len(vocabulary()[0])


def model() -> Transformer:
    """Our model, with random weights and norms: the oracle for names, order of rows and math."""
    torch.manual_seed(0)
    shape: Fields = {"d_model": D, "n_heads": HEADS, "n_kv_heads": KV, "d_ff": FF}
    shape |= {"depth": LAYERS, "n_layers": LAYERS, "vocab_size": VOCAB, "max_seq_len": CONTEXT}
    maths: Fields = {"linear": "fp", "norm_placement": "pre_norm", "activation": "silu"}
    maths |= {"tie_embeddings": False, "rope_theta": 50_000.0, "norm_eps": 1e-6}
    made = Transformer(ModelConfig(**shape, **maths))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.2)
    return made


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's permutation (convert_hf_to_gguf.py, LlamaModel.permute)."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
        .swapaxes(1, 2)
        .reshape(weight.shape)
    )


@cache
def tensors() -> dict[str, np.ndarray]:
    state = {name: t.detach().numpy().copy() for name, t in model().state_dict().items()}
    names = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
    result = {f"{theirs}.weight": state[f"{ours}.weight"] for ours, theirs in names.items()}
    for i in range(LAYERS):
        for ours, theirs in (
            ("input_layernorm", "attn_norm"),
            ("self_attn.q_proj", "attn_q"),
            ("self_attn.k_proj", "attn_k"),
            ("self_attn.v_proj", "attn_v"),
            ("self_attn.o_proj", "attn_output"),
            ("post_attention_layernorm", "ffn_norm"),
            ("mlp.gate_proj", "ffn_gate"),
            ("mlp.up_proj", "ffn_up"),
            ("mlp.down_proj", "ffn_down"),
        ):
            weight = state[f"layers.{i}.{ours}.weight"]
            if theirs in ("attn_q", "attn_k"):
                weight = interleaved(weight, HEADS if theirs == "attn_q" else KV)
            result[f"blk.{i}.{theirs}.weight"] = weight
    return result


def fields() -> Fields:
    tokens, merges = vocabulary()
    return {
        "llama.context_length": CONTEXT,
        "llama.embedding_length": D,
        "llama.block_count": LAYERS,
        "llama.feed_forward_length": FF,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV,
        "llama.attention.layer_norm_rms_epsilon": 1e-6,
        "llama.rope.freq_base": 50_000.0,
        "llama.rope.dimension_count": D // HEADS,
        "llama.vocab_size": VOCAB,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": [1] * (VOCAB - len(SPECIALS)) + [3] * len(SPECIALS),
        "tokenizer.ggml.eos_token_id": VOCAB - 2,
    }


def write(
    path: Path, change: Callable[[Fields], object] = lambda f: None, kind: str = "F32", **more: Any
) -> Path:
    """A GGUF of the model; ``change`` edits its metadata, ``more`` its tensors (None: left out)."""
    keys = fields()
    change(keys)
    writer = gguf.GGUFWriter(path, keys.pop("general.architecture", "llama"))
    for key, value in keys.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            (writer.add_uint64 if value >= 2**31 else writer.add_int32)(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    quantized = gguf.GGMLQuantizationType[kind]
    for name, tensor in (tensors() | {k.replace("__", "."): v for k, v in more.items()}).items():
        if tensor is None:
            continue
        if tensor.ndim == 2 and kind != "F32":
            data = gguf.quants.quantize(tensor, quantized)
            writer.add_tensor(name, data, raw_dtype=quantized)
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
