"""Write a ternary model as GGUF, with the model's own codes and scales.

A converter that starts from dense weights estimates the scales again, and gets different ones: the
mean of |W| over a ternary matrix counts its zeros. Nothing is estimated here, so llama.cpp
multiplies by our numbers. A scale is fp32, but most matrix types hold it in fp16 (gguf_types.py).
If fp16 holds it exactly, it is stored in the matrix. Otherwise the matrix holds the codes alone,
and the scale is stored beside it as ``<name>.scale``, by which llama.cpp multiplies the layer's
output. So nothing is rounded except the embedding, to fp16 (not in a file of kind f32).

The architecture computes the same as our model: "bitnet" for ``sub_norm`` and "llama" for
``pre_norm``, both with SiLU. Names, and the order of a head's rows, are as in the reader
(:mod:`bitnet.export.gguf`).
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from bitnet.data.tokenizer import Tokenizer
from bitnet.durable import new_file
from bitnet.export.gguf import ARCHITECTURES, LAYER_NAMES, SUB_NORM_NAMES
from bitnet.export.gguf_types import KINDS, TYPES, Kind
from bitnet.export.gguf_vocab import write_tokenizer
from bitnet.export.ternary import codes_and_scale
from bitnet.model import ModelConfig, Transformer
from bitnet.schema import UserError, nearest

_CARRIED: dict[str, tuple[Any, ...]] = {
    "linear": ("ternary",),
    "norm_placement": tuple(ARCHITECTURES),
    "activation": ("silu",),
    "qk_norm": (False,),
    "qkv_bias": (False,),
    "tie_embeddings": (True,),
    "granularity": ("tensor",),
}
"""Settings of a model -> the values that a file can hold."""
PRESET = "configs/gguf.toml"


class _Tensor(NamedTuple):
    """A tensor of the file, computed when it is written."""

    shape: tuple[int, ...]
    number: int
    """Number of its type."""
    size: int
    """Size in bytes."""
    make: Callable[[], Tensor]
    """Its bytes, uint8."""


def save_gguf(
    model: Transformer,
    tokenizer: Tokenizer | None,
    path: Path | str,
    kind: Kind = "tq2_0",
    name: str = "",
) -> Path:
    """Write a GGUF file, completely or not at all.

    Arguments:
        model: trained or packed, on any device; with the settings that :func:`unfit` accepts.
        tokenizer: the model's own. None: the file has only the vocabulary's size, which is enough
            for a benchmark.
        path: the file; an existing one is replaced.
        kind: how matrices are stored; see :mod:`bitnet.export.gguf_types`.
        name: the model's name, which programs show.
    Returns:
        The path.
    Raises:
        UserError: the file cannot hold a setting, a layer or a number of the model (named); or the
            `gguf` package is missing.
        OSError: the disk is full, ...; the old file is untouched.
    """
    path = Path(path)
    if kind not in KINDS:
        near = nearest(kind, KINDS, 0)
        raise UserError(f"{path}: unknown kind {kind!r}; the nearest is {near!r}")
    try:
        from gguf import GGUFWriter
    except ImportError as error:
        raise UserError(
            f'{path}: writing GGUF needs the gguf extra: pip install "bitnet-train[gguf]"'
        ) from error
    if why := unfit(model.config, kind):
        raise UserError(f"{path}: {why}")
    if tokenizer is not None and tokenizer.vocab_size != model.config.vocab_size:
        raise UserError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, the model "
            f"{model.config.vocab_size}"
        )
    tensors = dict(_tensors(model, kind, path))
    with new_file(path) as aside:
        writer: Any = GGUFWriter(aside, ARCHITECTURES[model.config.norm_placement])
        try:
            if name:
                writer.add_name(name)
            _describe(writer, model.config, kind)
            if tokenizer is None:
                writer.add_tokenizer_model("none")
            else:
                write_tokenizer(writer, tokenizer, path)
            for name, (shape, number, size, _) in tensors.items():
                writer.add_tensor_info(name, shape, np.dtype(np.int8), size, raw_dtype=number)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            (file,) = writer.fout
            writer.write_padding(file, file.tell())
            for tensor in tensors.values():
                file.write(tensor.make().numpy().data)
                writer.write_padding(file, tensor.size)
            file.flush()
        finally:
            writer.close()
    return path


def unfit(config: ModelConfig, kind: Kind = "tq2_0") -> str:
    """A sentence on the model's settings that a file cannot hold; "" if it can hold all."""
    found = []
    for key, carried in _CARRIED.items():
        if (value := getattr(config, key)) not in carried:
            found.append(f"model.{key} = {value!r} (it carries {' or '.join(map(repr, carried))})")
    block = TYPES[kind].columns
    for key in ("d_model", "d_ff"):
        if (width := getattr(config, key)) % block:
            whole = max(1, round(width / block)) * block
            found.append(f"model.{key} = {width} (rows are blocks of {block}; take {whole})")
    listed = ", ".join(found)
    return listed and f"GGUF ({kind}) cannot carry {listed}; {PRESET} has settings that it carries"


def _tensors(model: Transformer, kind: Kind, path: Path) -> Iterator[tuple[str, _Tensor]]:
    """The file's tensors by name, in the order of llama.cpp's own files."""
    embedding = model.embed_tokens.weight
    if kind != "f32" and not bool(embedding.detach().half().isfinite().all()):
        raise UserError(f"{path}: embed_tokens: holds values that fp16 cannot")
    yield "token_embd.weight", _floats(embedding, "f32" if kind == "f32" else "f16")
    names, heads = LAYER_NAMES, {}
    if model.config.norm_placement == "sub_norm":
        names = LAYER_NAMES | SUB_NORM_NAMES
    else:
        heads = {"attn_q": model.config.n_heads, "attn_k": model.config.n_kv_heads}
    for i, layer in enumerate(model.layers):
        for theirs, ours in names.items():
            module, name = layer.get_submodule(ours), f"blk.{i}.{theirs}"
            if ours.endswith("norm"):
                yield f"{name}.weight", _floats(module.weight, "f32")
            else:
                where = f"{path}: layers.{i}.{ours}"
                yield from _matrix(name, module, kind, heads.get(theirs, 0), where)
    yield "output_norm.weight", _floats(model.norm.weight, "f32")


def _floats(weight: Tensor | nn.Module, kind: Kind) -> _Tensor:
    """A tensor that is not ternary."""
    assert isinstance(weight, Tensor)
    stored = TYPES[kind]
    one = torch.ones((), dtype=torch.float32, device="cpu")
    rows, columns = weight.numel() // weight.shape[-1], weight.shape[-1]
    return _Tensor(
        tuple(weight.shape),
        stored.number,
        stored.bytes(rows, columns),
        lambda: stored.encode(weight.detach().float().cpu(), one),
    )


def _matrix(
    name: str, layer: nn.Module, kind: Kind, heads: int, where: str
) -> Iterator[tuple[str, _Tensor]]:
    """A ternary matrix, and its scale if that is stored beside it. ``heads``: number of heads if
    llama.cpp has the rows in another order."""
    codes, scale = codes_and_scale(layer, where)
    exact = kind in ("f32", "i2_s") or torch.equal(scale.half().float(), scale)
    inside = exact and bool(codes.any())  # zeros alone have no scale
    d = scale if inside else torch.ones((), dtype=torch.float32, device="cpu")
    rows, columns = codes.shape
    stored = TYPES[kind]

    def make() -> Tensor:
        codes, _ = codes_and_scale(layer, where)
        if heads:  # llama.cpp's order of a head's rows: 0, E/2, 1, E/2 + 1, ...
            codes = rearrange(codes, "(h two e) k -> (h e two) k", h=heads, two=2)
        return stored.encode(codes, d)

    size = stored.bytes(rows, columns)
    yield f"{name}.weight", _Tensor((rows, columns), stored.number, size, make)
    if not inside:
        yield f"{name}.scale", _floats(scale.reshape(1), "f32")


def _describe(writer: Any, config: ModelConfig, kind: Kind) -> None:
    """Write the model's shape and the numbers that its arithmetic needs."""
    writer.add_type("model")
    writer.add_file_type(TYPES[kind].file_type)
    writer.add_quantization_version(2)
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
