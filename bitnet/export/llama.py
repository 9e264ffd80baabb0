"""The required contents of a Llama-family checkpoint in any format: names, shapes, dtypes.

Llama computes the same as our ``pre_norm`` model, Qwen2 the same with ``qkv_bias``, Qwen3 the same
with ``qk_norm``, and BitNet the same as ``sub_norm``. Their tensor names are ours, so importing
means checking and renaming. Everything is checked from headers, in one pass over the names, before
a tensor is read or a layer is made: a config may claim 10^9 layers. Matrices are floats, or ternary
codes with a scale (bitnet/export/hf_quantization.py).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor

from bitnet.data.tokenizer import Tokenizer
from bitnet.linear import TernaryLinear
from bitnet.model import ModelConfig, Transformer
from bitnet.schema import UserError, nearest, user_input

MODEL_TYPES = ("bitnet", "llama", "mistral", "qwen2", "qwen3")
"""Model types of config.json that compute the same as our model."""
_O_PROJ = "self_attn.o_proj"
_EMBEDDING, _HEAD = "embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    name: str
    """Its name in the file, for messages."""
    shape: tuple[int, ...]
    read: Callable[[int], Tensor]
    """Returns a copy of its first ``n`` rows in fp32; int8 for codes."""


@dataclass(frozen=True)
class Shape:
    """A model's sizes, positive integers, and the numbers that its arithmetic needs."""

    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_ff: int
    vocab_size: int
    """Rows of the embedding, which may exceed the tokenizer's ids."""
    max_seq_len: int
    rope_theta: float
    norm_eps: float
    tied: bool
    """Whether the head may be the embedding."""
    activation: Literal["relu2", "silu"] = "silu"
    sub_norm: bool = False
    """BitNet's norms before o_proj and down_proj."""
    qk_norm: bool = False
    """Qwen3's norms of each head's queries and keys."""
    qkv_bias: bool = False
    """Qwen2's biases of q_proj, k_proj and v_proj."""
    o_bias: bool = False
    """Whether the file has biases of o_proj too, as transformers' other classes do. They must be 0:
    our model has none."""
    ternary: bool = False
    """Whether the layers' matrices are ternary: latent floats quantized in each forward, or, if
    ``coded``, codes and a scale."""
    coded: bool = False

    def matrices(self) -> dict[str, tuple[int, int]]:
        """A layer's matrices: name -> (rows, columns)."""
        d, kv = self.d_model, self.d_model // self.n_heads * self.n_kv_heads
        return {
            "self_attn.q_proj": (d, d),
            "self_attn.k_proj": (kv, d),
            "self_attn.v_proj": (kv, d),
            "self_attn.o_proj": (d, d),
            "mlp.gate_proj": (self.d_ff, d),
            "mlp.up_proj": (self.d_ff, d),
            "mlp.down_proj": (d, self.d_ff),
        }

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Our names and the shapes of all tensors. An iterator, since a damaged file may claim any
        number of layers."""
        d = self.d_model
        yield _EMBEDDING, (self.vocab_size, d)
        yield "norm.weight", (d,)
        yield _HEAD, (self.vocab_size, d)
        layer: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (d,),
            "post_attention_layernorm.weight": (d,),
        }
        if self.sub_norm:
            layer |= {
                "self_attn.attn_sub_norm.weight": (d,),
                "mlp.ffn_sub_norm.weight": (self.d_ff,),
            }
        if self.qk_norm:
            head = (d // self.n_heads,)
            layer |= {"self_attn.q_norm.weight": head, "self_attn.k_norm.weight": head}
        for name, size in self.matrices().items():
            layer[f"{name}.weight"] = size
            if self.coded:
                layer[f"{name}.weight_scale"] = (1,)
            if self.qkv_bias and name.endswith(("q_proj", "k_proj", "v_proj")):
                layer[f"{name}.bias"] = size[:1]
        if self.o_bias:
            layer[f"{_O_PROJ}.bias"] = (d,)
        for i in range(self.n_layers):
            for name, shape in layer.items():
                yield f"layers.{i}.{name}", shape


def check_type(source: Path, model_type: str) -> None:
    """Raise UserError, naming the nearest valid type, for a model type that cannot be imported."""
    if model_type not in MODEL_TYPES:
        raise UserError(
            f"{source}: model_type {model_type!r} cannot be imported; the nearest supported is "
            f"{nearest(model_type, MODEL_TYPES, 0)!r} (of {', '.join(MODEL_TYPES)})"
        )


def check_tensors(source: Path, shape: Shape, stored: Mapping[str, Stored]) -> None:
    """Compare a file's tensors, by our names, with those of a model of this shape.

    Raises:
        UserError: one is missing, unknown or of another shape.
    """
    left = dict(stored)
    for name, wanted in shape.tensors():
        tensor = left.pop(name, None)
        if tensor is None:
            if name == _HEAD and shape.tied:
                continue
            prefix = "" if name == _HEAD else "model."
            raise UserError(f"{source}: damaged: missing tensor {prefix}{name}")
        if tensor.shape != wanted:
            raise UserError(
                f"{source}: cannot be read: tensor {tensor.name} is {list(tensor.shape)}; the "
                f"config wants {list(wanted)}"
            )
    for tensor in left.values():
        raise UserError(
            f"{source}: damaged: unexpected tensor {tensor.name}, which our model has not"
        )


def build(
    source: Path, shape: Shape, stored: Mapping[str, Stored], tokenizer: Tokenizer
) -> Transformer:
    """Build the model, after :func:`check_tensors` has passed.

    Rows of the embedding beyond the tokenizer's ids are padding that no text uses. They are not
    read, so that model and tokenizer agree on the vocabulary. If the config ties the head to the
    embedding but the file has two different matrices, both are kept.

    Raises:
        UserError: sizes that our model cannot have, a tensor that cannot be read or is not finite,
            a scale of 0 or below, a tokenizer with more tokens than the model.
    """
    rows = tokenizer.vocab_size
    if rows > shape.vocab_size:
        raise UserError(
            f"{source}: the tokenizer has {rows} tokens, the model only {shape.vocab_size}: they "
            "do not belong together"
        )
    config = _config(source, shape, rows)
    tensors: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        with user_input(f"{source}: tensor {tensor.name}: cannot be read"):
            values = tensor.read(rows if name in (_EMBEDDING, _HEAD) else tensor.shape[0])
        if not bool(values.isfinite().all()):
            raise UserError(f"{source}: damaged: tensor {tensor.name} holds NaN or infinity")
        if name.endswith(".weight_scale") and not bool((values > 0).all()):
            raise UserError(f"{source}: damaged: tensor {tensor.name} is a scale of 0 or below")
        if name.endswith(f"{_O_PROJ}.bias"):
            if bool(values.any()):
                raise UserError(
                    f"{source}: the model has {tensor.name}, which our model does not have"
                )
            continue
        tensors[name] = values
    embedding = tensors[_EMBEDDING]
    head = tensors.setdefault(_HEAD, embedding)
    tied = shape.tied and (head is embedding or torch.equal(head, embedding))
    with torch.device("meta"):
        model = Transformer(replace(config, tie_embeddings=tied))
    if shape.coded:
        for i in range(shape.n_layers):
            for name in (f"layers.{i}.{matrix}" for matrix in shape.matrices()):
                codes, scale = tensors.pop(f"{name}.weight"), tensors.pop(f"{name}.weight_scale")
                bias = tensors.pop(f"{name}.bias", None)
                layer = TernaryLinear.from_codes(codes, scale.reshape(()), bias)
                model.set_submodule(name, layer)
                tensors |= {f"{name}.{part}": value for part, value in layer.state_dict().items()}
    model.load_state_dict(tensors, assign=True)
    if tied:
        model.lm_head.weight = model.embed_tokens.weight
    return model


def _config(source: Path, shape: Shape, vocab_size: int) -> ModelConfig:
    fields: dict[str, Any] = {
        "depth": min(1000, shape.n_layers),
        "linear": "ternary" if shape.ternary else "fp",
        "n_layers": shape.n_layers,
        "d_model": shape.d_model,
        "n_heads": shape.n_heads,
        "n_kv_heads": shape.n_kv_heads,
        "d_ff": shape.d_ff,
        "vocab_size": vocab_size,
        "max_seq_len": shape.max_seq_len,
        "norm_placement": "sub_norm" if shape.sub_norm else "pre_norm",
        "activation": shape.activation,
        "qk_norm": shape.qk_norm,
        "qkv_bias": shape.qkv_bias,
        "rope_theta": shape.rope_theta,
        "norm_eps": shape.norm_eps,
    }
    try:
        return ModelConfig(**fields).resolve()
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise UserError(f"{source}: model.{first['loc'][0]}: {first['msg']}") from error
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
