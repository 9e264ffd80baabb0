"""Write a packed model as GGUF, with the codes and the scale that it has.

llama.cpp reads such a file as the architecture "llama", which computes what our ``pre_norm`` model
with SiLU computes. A ternary matrix becomes TQ2_0: blocks of 256 weights of a row, 2 bits each, and
a scale in fp16 per block, here always the matrix's own. A converter that starts from dense weights
would estimate the scales again; nothing is estimated here, so both programs multiply by the same
numbers. The embedding, which is the head too, is F16; norms are F32. The file has no vocabulary,
only its size: that is enough for a benchmark.

    a block, 66 bytes: two halves of 32 bytes, then the scale. Byte m of half h holds the weights
    128 h + 32 j + m of the block, j = 0 .. 3, in its bits 2j and 2j + 1, as code + 1.

Source of the layout: llama.cpp, ggml/src/ggml-quants.c. The names and the order of a head's rows
are those of the reader (:mod:`bitnet.export.gguf`). N rows, K columns.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from bitnet.export.gguf import LAYER_NAMES
from bitnet.linear import TernaryLinear
from bitnet.model import ModelConfig, Transformer
from bitnet.schema import UserError

BLOCK = 256
"""Weights of a row that share a scale."""
_CARRIED: dict[str, Any] = {
    "linear": "ternary",
    "norm_placement": "pre_norm",
    "activation": "silu",
    "qk_norm": False,
    "tie_embeddings": True,
    "granularity": "tensor",
}
"""Settings of a model -> the value that the file can carry."""


def save_gguf(model: Transformer, path: Path) -> None:
    """Write a GGUF file for llama.cpp, whole or not at all.

    Arguments:
        model: packed, on any device; ``pre_norm``, SiLU, a tied head, widths that are multiples of
            256, and one scale per matrix that fp16 holds exactly. The embedding is rounded to fp16.
        path: the file; one that exists is replaced.
    Raises:
        UserError: the model has a setting, a layer or a number that the file cannot carry, which
            the message names; or the `gguf` package is missing.
    """
    try:
        from gguf import GGMLQuantizationType, GGUFWriter
    except ImportError as error:
        raise UserError(
            f'{path}: writing GGUF needs the gguf extra: pip install "bitnet-train[gguf]"'
        ) from error
    if why := unfit(model.config):
        raise UserError(f"{path}: {why}")
    plain, ternary = _tensors(model, path)
    aside = path.with_name(f".tmp-{path.name}")
    writer: Any = GGUFWriter(aside, "llama")
    try:
        _describe(writer, model.config)
        for name, values in plain.items():
            writer.add_tensor(name, values)
        for name, blocks in ternary.items():
            writer.add_tensor(name, blocks, raw_dtype=GGMLQuantizationType.TQ2_0)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        aside.replace(path)
    finally:
        writer.close()
        aside.unlink(missing_ok=True)


def tq2_0(codes: Tensor, scale: Tensor) -> Tensor:
    """Codes int8 ``[N, K]``, K a multiple of 256, and one scale, rounded to fp16, as TQ2_0:
    uint8 ``[N, K / 256 * 66]``."""
    digits = rearrange((codes + 1).byte(), "n (b h j m) -> j n b (h m)", h=2, j=4, m=32)
    bits = digits[0] | digits[1] << 2 | digits[2] << 4 | digits[3] << 6
    d = scale.half().reshape(1).view(torch.uint8).expand(*bits.shape[:2], 2)
    return torch.cat((bits, d), 2).flatten(1)


def unfit(config: ModelConfig) -> str:
    """The setting of a model that the file cannot carry, as a sentence; "" if it can carry all."""
    for key, wanted in _CARRIED.items():
        if (value := getattr(config, key)) != wanted:
            return f"GGUF carries model.{key} = {wanted!r}, not {value!r}"
    for key in ("d_model", "d_ff"):
        if (width := getattr(config, key)) % BLOCK:
            nearest = max(1, round(width / BLOCK)) * BLOCK
            return (
                f"model.{key} = {width} is no multiple of {BLOCK}, the columns that share a scale "
                f"in GGUF's TQ2_0; the nearest is {nearest}"
            )
    return ""


def _tensors(model: Transformer, path: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The file's tensors by name: floats ``[K]`` or ``[N, K]``, and matrices in TQ2_0."""
    embedding = model.embed_tokens.weight.detach().half()
    if not bool(embedding.isfinite().all()):
        raise UserError(f"{path}: embed_tokens: holds values that fp16 cannot")
    plain = {"token_embd.weight": embedding.cpu().numpy()}
    plain["output_norm.weight"] = _norm(model.norm)
    ternary = {}
    heads = {"attn_q": model.config.n_heads, "attn_k": model.config.n_kv_heads}
    for i, layer in enumerate(model.layers):
        for theirs, ours in LAYER_NAMES.items():
            module, name = layer.get_submodule(ours), f"blk.{i}.{theirs}.weight"
            if ours.endswith("norm"):
                plain[name] = _norm(module)
                continue
            where = f"{path}: layers.{i}.{ours}"
            if not isinstance(module, TernaryLinear) or module.bias is not None:
                raise UserError(f"{where}: expected a packed ternary layer without a bias")
            if not torch.equal(module.scale.half().float(), module.scale):
                raise UserError(f"{where}: its scale {float(module.scale)!r} is no fp16 number")
            codes = module.codes().cpu()
            if theirs in heads:  # llama.cpp's order of a head's rows: 0, E/2, 1, E/2 + 1, ...
                codes = rearrange(codes, "(h two e) k -> (h e two) k", h=heads[theirs], two=2)
            ternary[name] = tq2_0(codes, module.scale.cpu()).numpy()
    return plain, ternary


def _norm(module: nn.Module) -> np.ndarray:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach().float().cpu().numpy()


def _describe(writer: Any, config: ModelConfig) -> None:
    """Write the file's metadata: the shape, and that there is no vocabulary."""
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
