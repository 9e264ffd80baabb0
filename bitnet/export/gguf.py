"""Import a model from one GGUF file.

    architecture   our model                  its matrices
    llama          pre_norm, SiLU             dequantized to fp32; ternary if stored as ternary
    qwen2          the same with qkv_bias     the same
    bitnet         sub_norm, SiLU, a tied     ternary: the codes and scales of the file
                   head

The file's names become our names. For llama the rows of q_proj and k_proj are reordered: llama.cpp
rotates neighbouring channels by one angle, our model rotates channels i and i + E/2, and
llama.cpp's converter interleaves the rows. (For the others llama.cpp does as we do.) Our model must
have every key of the architecture and every tensor, so that nothing is left out silently.

A matrix counts as ternary if its type is ternary (tq1_0, tq2_0, bitnet.cpp's i2_s), if the file has
a ``.scale`` for it (one number that multiplies its output), or if the architecture is bitnet. The
nonzero weights must then have one absolute value; times the ``.scale``, it is the scale. Nothing is
estimated, and a matrix with other values is an error.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitnet.data.tokenizer import Tokenizer
from bitnet.export.gguf_file import Keys, open_gguf
from bitnet.export.gguf_types import read_i2_s
from bitnet.export.gguf_vocab import read_tokenizer
from bitnet.export.llama import Shape, Stored, build, check_tensors
from bitnet.export.ternary import ternary_of
from bitnet.model import Transformer
from bitnet.schema import UserError, nearest

ARCHITECTURES = {"pre_norm": "llama", "sub_norm": "bitnet"}
"""``model.norm_placement`` -> architecture of a written file."""
_QWEN2 = "qwen2"
_NAMES = {
    "token_embd.weight": "embed_tokens.weight",
    "output_norm.weight": "norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Part of a layer in a file -> our name."""
SUB_NORM_NAMES = {
    "attn_sub_norm": "self_attn.attn_sub_norm",
    "ffn_sub_norm": "mlp.ffn_sub_norm",
}
"""The same, only for the architecture bitnet."""
_TERNARY = ("TQ1_0", "TQ2_0", "I2_S")
_READ = {
    *("context_length", "embedding_length", "block_count", "feed_forward_length", "vocab_size"),
    *("attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon"),
    *("rope.freq_base", "rope.dimension_count", "attention.key_length", "attention.value_length"),
    *("tensor_data_layout", "attention.sliding_window"),
}
"""Keys of the architecture that are read or checked, or do not affect the computation."""
_NEUTRAL: dict[str, Any] = {
    "attention.causal": True,
    "attention.clamp_kqv": 0,
    "attention.max_alibi_bias": 0,
    "embedding_scale": 1,
    "expert_count": 0,
    "expert_used_count": 0,
    "logit_scale": 1,
    "residual_scale": 1,
    "rope.scaling.factor": 1,
    "rope.scaling.finetuned": False,
    "rope.scaling.type": "none",
    "rope.scale_linear": 1,
    "use_parallel_residual": False,
}
"""Keys of other architectures -> the value with which they compute the same as ours."""


def load_gguf(source: Path) -> tuple[Transformer, Tokenizer]:
    """Import a .gguf file, as :func:`bitnet.export.hf.load_hf` does; ternary matrices become packed
    ternary layers."""
    reader = open_gguf(source)
    keys = Keys(source, reader)
    arch = _architecture(keys)
    tensors = [(str(tensor.name), tensor.tensor_type.name) for tensor in reader.tensors]
    ternary = arch == "bitnet" or any(
        name.startswith("blk.") and (name.endswith(".scale") or kind in _TERNARY)
        for name, kind in tensors
    )
    shape = _shape(keys, arch, ternary)
    stored = _stored(source, reader, shape)
    check_tensors(source, shape, stored)
    tokenizer = read_tokenizer(keys)
    return build(source, shape, stored, tokenizer), tokenizer


def _architecture(keys: Keys) -> str:
    """The file's architecture. Raises UserError unless it can be imported."""
    source = keys.source
    kind = keys.get("general.type", str, "model")
    if kind != "model":
        raise UserError(f"{source}: is a GGUF of type {kind!r}, not a model; it is not imported")
    if keys.get("split.count", int, 1) > 1:
        raise UserError(f"{source}: is one part of several; join them first (llama-gguf-split)")
    arch: str = keys.need("general.architecture", str)
    if arch not in (known := (*ARCHITECTURES.values(), _QWEN2)):
        raise UserError(
            f"{source}: model_type {arch[:60]!r} cannot be imported; the nearest supported "
            f"architecture of a GGUF is {nearest(arch, known, 0)!r} (of {', '.join(known)})"
        )
    return arch


def _shape(keys: Keys, arch: str, ternary: bool) -> Shape:
    """The model's sizes. Raises UserError for anything that our model cannot have."""
    source = keys.source
    context = keys.size(f"{arch}.context_length")
    d_model, heads = (
        keys.size(f"{arch}.embedding_length"),
        keys.size(f"{arch}.attention.head_count"),
    )
    kv_heads = keys.size(f"{arch}.attention.head_count_kv", heads)
    refused = {
        f"heads of another size ({heads} in an embedding_length of {d_model})": d_model % heads,
        f"{kv_heads} key-value heads for {heads} heads": heads % kv_heads,
    }
    for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        size = keys.get(f"{arch}.{key}", int, d_model // heads)
        refused[f"{arch}.{key} = {size} ({heads} heads in {d_model} channels)"] = (
            size * heads != d_model
        )
    window = keys.get(f"{arch}.attention.sliding_window", int, 0)
    refused[f"{arch}.attention.sliding_window = {window}"] = 0 < window < context
    unscaled = keys.get(f"{arch}.rope.scaling.factor", float, 0.0) == 1
    for key in keys:
        name = key.removeprefix(f"{arch}.")
        if name == key or name in _READ:
            continue
        value = keys.get(key, object)
        scaled = ", scaled rotary positions are not supported" if "rope.scal" in name else ""
        shown = repr(value) if len(repr(value)) < 40 else "..."
        neutral = name in _NEUTRAL and value == _NEUTRAL[name]
        neutral |= name == "rope.scaling.type" and value == "linear" and unscaled
        refused[f"{key} = {shown}{scaled}"] = not neutral
    for what, present in refused.items():
        if present:
            raise UserError(f"{source}: the model has {what}, which our model does not have")
    vocab = len(keys.need("tokenizer.ggml.tokens", list))
    return Shape(
        n_layers=keys.size(f"{arch}.block_count"),
        d_model=d_model,
        n_heads=heads,
        n_kv_heads=kv_heads,
        d_ff=keys.size(f"{arch}.feed_forward_length"),
        vocab_size=keys.size(f"{arch}.vocab_size", vocab),
        max_seq_len=context,
        rope_theta=keys.real(f"{arch}.rope.freq_base", 10_000.0),
        norm_eps=keys.real(f"{arch}.attention.layer_norm_rms_epsilon"),
        tied=True,
        sub_norm=arch == "bitnet",
        qkv_bias=arch == _QWEN2,
        ternary=ternary,
        coded=ternary,
    )


def _stored(source: Path, reader: Any, shape: Shape) -> dict[str, Stored]:
    """Every tensor of the file, under our names; unknown tensors under their own. A ternary matrix
    is two tensors: codes and ``weight_scale``."""
    stored: dict[str, Stored] = {}
    used: set[str] = set()
    names = LAYER_NAMES | SUB_NORM_NAMES if shape.sub_norm else LAYER_NAMES
    interleaved = not (shape.sub_norm or shape.qkv_bias)
    heads = {"attn_q": shape.n_heads, "attn_k": shape.n_kv_heads} if interleaved else {}
    tensors = {str(tensor.name): tensor for tensor in reader.tensors}
    for name, tensor in tensors.items():
        kind = tensor.tensor_type.name
        if name.endswith(".bias") and not shape.qkv_bias:
            raise UserError(f"{source}: has biases ({name}), which our model does not have")
        if name.startswith("rope_freqs") or ".rope_freqs" in name:
            raise UserError(f"{source}: has {name}: scaled rotary positions are not supported")
        if kind in ("I8", "I16", "I32", "I64"):
            raise UserError(f"{source}: tensor {name} is {kind}; expected a float weight")
        ours, dims = _NAMES.get(name, name), _dims(tensor)
        block, _, rest = name.removeprefix("blk.").partition(".")
        part, _, what = rest.rpartition(".")
        if not (name.startswith("blk.") and what in ("weight", "bias") and _is_number(block)):
            part = ""
        if part in names:
            ours = f"layers.{block}.{names[part]}.{what}"
        if not (shape.coded and ours.endswith("_proj.weight")):
            stored[ours] = Stored(name, dims, partial(_read, tensor, heads.get(part, 0)))
            continue
        beside = tensors.get(name.removesuffix("weight") + "scale")
        if beside is not None and _dims(beside) != (1,):
            raise UserError(
                f"{source}: cannot be read: tensor {beside.name} is {list(_dims(beside))}; "
                "expected [1]"
            )
        used.add(name.removesuffix("weight") + "scale")
        matrix = _Ternary(tensor, beside, heads.get(part, 0))
        stored[ours] = Stored(name, dims, matrix.codes)
        stored[f"{ours}_scale"] = Stored(name, (1,), matrix.scale)
    return {name: tensor for name, tensor in stored.items() if name not in used}


def _dims(tensor: Any) -> tuple[int, ...]:
    """The shape of a tensor, in torch's order."""
    return tuple(int(n) for n in reversed(tensor.shape.tolist()))


def _is_number(text: str) -> bool:
    """Whether a text is a layer number: no sign, no leading zero."""
    return text.isascii() and text.isdecimal() and (text == "0" or text[0] != "0")


def _read(tensor: Any, heads: int, rows: int) -> Tensor:
    """The first rows of a tensor in fp32. ``heads``: number of heads if the rows are in llama.cpp's
    order."""
    from gguf.quants import dequantize

    if tensor.tensor_type.name == "I2_S":
        values = read_i2_s(torch.from_numpy(tensor.data.copy()), _dims(tensor))[:rows]
    else:
        values = torch.from_numpy(dequantize(tensor.data[:rows], tensor.tensor_type).copy())
    if heads:  # undo llama.cpp's order of a head's rows, 0, E/2, 1, E/2 + 1, ...
        values = values.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()
    return values


class _Ternary:
    """A ternary matrix of a file. Its scale is read after its codes, from the same values."""

    def __init__(self, tensor: Any, beside: Any, heads: int) -> None:
        self._tensor, self._beside, self._heads = tensor, beside, heads
        self._scale: Tensor | None = None

    def codes(self, rows: int) -> Tensor:
        """All codes, int8 ``[N, K]``."""
        codes, self._scale = ternary_of(_read(self._tensor, self._heads, rows))
        return codes

    def scale(self, rows: int) -> Tensor:
        """The scale, fp32 ``[1]``."""
        assert self._scale is not None
        if self._beside is None:
            return self._scale.reshape(1)
        return self._scale * _read(self._beside, 0, 1)
