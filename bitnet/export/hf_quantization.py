"""Read a Hugging Face checkpoint's ternary matrices as its ``quantization_config`` says.

    linear_class    quantization_mode   a matrix is stored as                 our model is
    autobitlinear   online              float weights, quantized each forward latent (trainable)
    autobitlinear   offline             codes, and the scale                  packed
    bitlinear       (either)            codes, and 1 / the scale              packed

bitnet/export/hf_write.py explains the layout of the codes. A scale is taken as it is. From an
inverse s, the scale is 1 / s, rounded to fp32. But if the file's metadata has a scale whose inverse
is s, that scale is used: it is the number from which our export computed s.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor

from bitnet.schema import UserError, user_input

Kind = Literal["online", "offline", "packed"]
SCALES = "bitnet_scales"
"""Key of a safetensors file's metadata: JSON, the name of each matrix -> its scale."""
_NOT_MATRICES = {"lm_head", "embed_tokens", "model.embed_tokens"}
"""Modules that ``modules_to_not_convert`` may name: our model has them in full precision too."""


def read_kind(source: Path, content: Mapping[str, Any], master_weights: bool) -> Kind | None:
    """How the matrices of a checkpoint are stored; None: in full precision.

    Arguments:
        content: of config.json.
        master_weights: take the weights of a checkpoint without ``quantization_config`` as the
            master weights of a ternary model.
    Raises:
        UserError: a quantization that our model does not have, or a BitNet without quantization.
    """
    quantization = content.get("quantization_config")
    if quantization is None:
        if master_weights:
            return "online"
        if content.get("model_type") == "bitnet":
            raise UserError(
                f"{source}: its config.json has no quantization_config, without which transformers "
                "runs a BitNet in full precision; if its weights are those of a ternary model's "
                "training, say --master-weights"
            )
        return None
    where = f"{source}: quantization_config"
    method = quantization.get("quant_method")
    if method != "bitnet":
        raise UserError(f"{where}: quant_method {_shown(method)} cannot be imported; only 'bitnet'")
    linear = quantization.get("linear_class", "bitlinear")
    mode = quantization.get("quantization_mode", "offline")
    if linear not in ("bitlinear", "autobitlinear") or mode not in ("online", "offline"):
        raise UserError(
            f"{where}: linear_class {_shown(linear)}, quantization_mode {_shown(mode)}: expected "
            "'bitlinear' or 'autobitlinear', 'online' or 'offline'"
        )
    if quantization.get("use_rms_norm", False):
        raise UserError(
            f"{where}: use_rms_norm: norms inside the layers beside those outside of them, which "
            "our model does not have"
        )
    kept = quantization.get("modules_to_not_convert")
    names = set(kept) if isinstance(kept, list) and all(isinstance(k, str) for k in kept) else None
    if kept is not None and (names is None or "lm_head" not in names or names - _NOT_MATRICES):
        raise UserError(
            f"{where}: modules_to_not_convert {_shown(kept)}: our ternary model has exactly its "
            "head and its embedding in full precision"
        )
    if linear == "bitlinear":
        return "packed"
    return "online" if mode == "online" else "offline"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def unpack_rows(packed: Tensor) -> Tensor:
    """uint8 ``[N / 4, K]``, four rows in a byte -> codes int8 ``[N, K]``.

    Raises:
        ValueError: a code is not -1, 0 or +1.
    """
    digits = torch.stack([packed >> 2 * i & 3 for i in range(4)])
    if bool((digits == 3).any()):
        raise ValueError("holds a code that is none of -1, 0, +1")
    return rearrange(digits, "i j k -> (i j) k").to(torch.int8) - 1


def read_scales(path: Path, metadata: Mapping[str, str] | None) -> dict[str, float]:
    """The scales in a file's metadata, by the names of their matrices."""
    text = (metadata or {}).get(SCALES, "{}")
    with user_input(f"{path}: metadata {SCALES}: cannot be read"):
        scales = json.loads(text)
        return {str(name): float(scale) for name, scale in scales.items()}


def of_inverse(inverse: Tensor, known: float | None) -> Tensor:
    """The scale fp32 ``[1]`` for an inverse: ``known``, if the inverse is that of ``known``."""
    if known is not None:
        scale = torch.tensor([known], dtype=torch.float32, device="cpu")
        if torch.equal(scale.reciprocal(), inverse):
            return scale
    return inverse.reciprocal()


def with_inverse(read: Callable[[int], Tensor], known: float | None) -> Callable[[int], Tensor]:
    """A reader of the scale, from a reader of its inverse."""
    return lambda rows: of_inverse(read(rows), known)
