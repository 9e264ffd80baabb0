"""Write a model as a Hugging Face folder, which transformers loads without our code.

A model with ``sub_norm`` becomes a BitNetForCausalLM, one with ``pre_norm`` a LlamaForCausalLM, or
with ``qk_norm`` a Qwen3ForCausalLM. All have a ``quantization_config``: without it transformers
would silently run the same weights in full precision. transformers has three ways to compute with a
ternary matrix W with scale gamma; they are our kinds:

    kind      in transformers          a file holds               y =
    online    autobitlinear, online    W, fp32                    codes(W) x_q * gamma(W)
    offline   autobitlinear, offline   codes, weight_scale = s    codes x_q * s,  s = gamma
    packed    bitlinear                codes, weight_scale = s    codes x_q / s,  s = 1 / gamma

The scale of ``packed`` is the *inverse*. Rounded to fp32, 1 / (1 / gamma) differs from gamma for
one number in six. So the scales themselves are also in the file's metadata, which transformers does
not read. Our own import (:mod:`bitnet.export.hf_quantization`) uses them to restore the exported
model bit for bit.

With ``qkv_bias`` these classes have a bias of o_proj too, which is written as zeros. (Qwen2's own
class has none, but transformers reads every tokenizer of that class by Qwen's rules.)

Codes: uint8 ``[N / 4, K]``; row i N/4 + j is in bits 2i and 2i + 1 of byte row j, as code + 1.
Embeddings and norms are fp32. N rows, K columns.
"""

import json
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from bitnet.data.tokenizer import Tokenizer
from bitnet.durable import new_folder, save_tensors
from bitnet.export.facts import Facts
from bitnet.export.hf_card import card
from bitnet.export.hf_quantization import SCALES
from bitnet.export.hf_tokenizer import save_tokenizer
from bitnet.export.verification import ternary_matrices
from bitnet.linear import BitLinear
from bitnet.model import ModelConfig, Transformer
from bitnet.schema import UserError

KINDS = {
    "offline": "codes in the file, made floats when loaded: transformers' fastest",
    "packed": "codes in the file and in memory, a byte for four weights: slower there",
    "online": "the fp32 weights of training, quantized in each forward: can be trained further",
}
_CARRIED: dict[str, tuple[Any, ...]] = {
    "linear": ("ternary",),
    "norm_placement": ("sub_norm", "pre_norm"),
    "granularity": ("tensor",),
}
"""Settings of a model -> the values that transformers' classes support."""


def save_hf(model: Transformer, tokenizer: Tokenizer, path: Path, kind: str, facts: Facts) -> None:
    """Write a Hugging Face folder, completely or not at all.

    Arguments:
        model: ternary, latent or packed (not as ``online``), on any device.
        path: the folder, which must not exist. kind: one of :data:`KINDS`.
    Raises:
        UserError: a setting of the model that transformers does not support, a packed model as
            ``online``, a tokenizer that cannot be written; or the `hf` extra is missing.
        OSError: the disk is full, ...; nothing is left at ``path``.
    """
    if why := unfit(model, kind):
        raise UserError(f"{path}: {why}")
    tensors, scales = _tensors(model, kind)
    with new_folder(path) as aside:
        metadata = {SCALES: json.dumps(scales)} if kind == "packed" else {}
        save_tensors(aside / "model.safetensors", tensors, {"format": "pt"} | metadata)
        config = _config(model.config, tokenizer, kind)
        for name, content in (
            ("config.json", config),
            ("generation_config.json", _generation(tokenizer)),
        ):
            (aside / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        save_tokenizer(aside, tokenizer)
        (aside / "README.md").write_text(card(model, kind, KINDS[kind], facts), encoding="utf-8")


def unfit(model: Transformer, kind: str) -> str:
    """A sentence on why transformers cannot run a model; "" if it can."""
    config = model.config
    for key, carried in _CARRIED.items():
        if (value := getattr(config, key)) not in carried:
            values = " or ".join(map(repr, carried))
            return f"transformers' BitNet carries model.{key} = {values}, not {value!r}"
    if config.qk_norm and config.norm_placement == "sub_norm":
        return "transformers' BitNet carries model.qk_norm = False with 'sub_norm', not True"
    if config.qkv_bias and kind == "offline":
        return (
            "has model.qkv_bias, and transformers multiplies biases by the scale in this kind; "
            "export it with --kind packed or online"
        )
    known = {name for name, _, _ in ternary_matrices(model)}
    for i in range(config.n_layers):
        for name in config.matrices():
            if f"layers.{i}.{name}" not in known:
                return f"layers.{i}.{name} is quantized by a recipe ([quant]), not a ternary matrix"
    latent = any(isinstance(module, BitLinear) for module in model.modules())
    if kind == "online" and not latent:
        return "is packed and has no weights to train; export it as offline or packed"
    for name, (rows, _) in config.matrices().items():
        if kind != "online" and rows % 4:
            return (
                f"{name} has {rows} rows, and four share a byte: no multiple of 4 ({_KEYS[name]})"
            )
    return ""


_KEYS = {
    "self_attn.q_proj": "model.d_model",
    "self_attn.k_proj": "model.n_kv_heads",
    "self_attn.v_proj": "model.n_kv_heads",
    "self_attn.o_proj": "model.d_model",
    "mlp.gate_proj": "model.d_ff",
    "mlp.up_proj": "model.d_ff",
    "mlp.down_proj": "model.d_model",
}
"""Matrix -> the setting that determines its number of rows."""


def pack_rows(codes: Tensor) -> Tensor:
    """Codes int8 ``[N, K]``, N a multiple of 4 -> uint8 ``[N / 4, K]``, four rows in a byte."""
    digits = rearrange((codes + 1).to(torch.uint8), "(i j) k -> i j k", i=4)
    return digits[0] | digits[1] << 2 | digits[2] << 4 | digits[3] << 6


def _tensors(model: Transformer, kind: str) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The file's tensors by name, and the scale of each matrix."""
    matrices = {name: (codes, scale) for name, codes, scale in ternary_matrices(model)}
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        layer = name.rpartition(".")[0]
        if kind == "online" or layer not in matrices or name.endswith(".bias"):
            tensors[_theirs(name)] = parameter.detach()
    if model.config.qkv_bias:
        zeros = torch.zeros(model.config.d_model, dtype=torch.float32, device="cpu")
        for i in range(model.config.n_layers):
            tensors[f"model.layers.{i}.self_attn.o_proj.bias"] = zeros.clone()
    scales = {f"model.{name}": float(scale) for name, (_, scale) in matrices.items()}
    if kind == "online":
        return tensors, scales
    for name, (codes, scale) in matrices.items():
        tensors[f"model.{name}.weight"] = pack_rows(codes)
        stored = scale if kind == "offline" else scale.reciprocal()
        tensors[f"model.{name}.weight_scale"] = stored.reshape(1)
    return tensors, scales


def _theirs(name: str) -> str:
    return name if name.startswith("lm_head.") else f"model.{name}"


def _config(config: ModelConfig, tokenizer: Tokenizer, kind: str) -> dict[str, Any]:
    """The content of config.json, for transformers 4 and 5."""
    name = (
        "BitNet" if config.norm_placement == "sub_norm" else "Qwen3" if config.qk_norm else "Llama"
    )
    ends = tokenizer.eos_ids
    return {
        "architectures": [f"{name}ForCausalLM"],
        "model_type": name.lower(),
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": config.activation,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,  # read by version 4
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_bias": config.qkv_bias,
        "mlp_bias": False,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": 0.02,
        "bos_token_id": tokenizer.eos_id,
        "eos_token_id": list(ends) if len(ends) > 1 else tokenizer.eos_id,
        "torch_dtype": "float32",
        "quantization_config": {
            "quant_method": "bitnet",
            "linear_class": "bitlinear" if kind == "packed" else "autobitlinear",
            "quantization_mode": "online" if kind == "online" else "offline",
            "modules_to_not_convert": ["lm_head"],
            "use_rms_norm": False,
            "rms_norm_eps": config.norm_eps,
        },
    }


def _generation(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of generation_config.json: a prompt begins with the end-of-document token."""
    ends = tokenizer.eos_ids
    return {
        "bos_token_id": tokenizer.eos_id,
        "eos_token_id": list(ends) if len(ends) > 1 else tokenizer.eos_id,
        "pad_token_id": tokenizer.eos_id,
    }
