"""Small ternary models that GGUF can hold, and readers of GGUF's types that are not ours."""

import ctypes
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bitnet.linear import TernaryLinear, pack
from bitnet.model import ModelConfig, Transformer, as_transformer

FITS: dict[str, Any] = {
    "d_model": 256,
    "n_layers": 2,
    "n_heads": 8,
    "n_kv_heads": 2,
    "d_ff": 512,
    "vocab_size": 300,
    "max_seq_len": 64,
    "norm_placement": "sub_norm",
    "activation": "silu",
    "rope_theta": 50_000.0,
    "norm_eps": 1e-6,
}


def model(packed: bool = True, **fields: Any) -> Transformer:
    """A ternary model with random norms. A matrix in the last layer has one block of 256 zeros, and
    one scale that fp16 holds exactly."""
    torch.manual_seed(0)
    made = Transformer(ModelConfig(**{**FITS, **fields}))
    for name, parameter in made.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    made.layers[-1].mlp.down_proj.weight.data[3, :256] = 0
    if packed and made.config.linear == "ternary":
        made = as_transformer(pack(made))
        made.layers[0].self_attn.v_proj.scale.fill_(2.0**-6)
    return made


def matrices(made: Transformer) -> dict[str, tuple[Tensor, Tensor]]:
    """Codes and scale of each packed layer."""
    layers = made.named_modules()
    return {n: (m.codes(), m.scale) for n, m in layers if isinstance(m, TernaryLinear)}


def i2_s(data: bytes, rows: int, columns: int) -> tuple[np.ndarray, float]:
    """Codes and scale of bitnet.cpp's i2_s, one weight after the other."""
    codes = np.empty((rows, columns), np.int8)
    for place in range(rows * columns):
        block, within = divmod(place, 128)
        group, byte = divmod(within, 32)
        codes.flat[place] = (data[32 * block + byte] >> (6 - 2 * group) & 3) - 1
    (scale,) = np.frombuffer(data[rows * columns // 4 :][:4], np.float32)
    assert len(data) == rows * columns // 4 + 32
    return codes, float(scale)


def quantized_by_llama_cpp(values: np.ndarray, number: int) -> bytes:
    """fp32 ``[N, K]`` in the GGUF type ``number``, by llama.cpp's own quantizer."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="pip install -e .[peers]")
    ggml = ctypes.CDLL(str(llama_cpp.llama_cpp._lib._name)).ggml_quantize_chunk
    ggml.restype = ctypes.c_size_t
    rows, columns = values.shape
    source = np.ascontiguousarray(values, np.float32)
    made = np.full(rows * columns * 4, 0xAA, np.uint8)
    pointer = ctypes.c_void_p
    ggml.argtypes = [ctypes.c_int, pointer, pointer, *(3 * [ctypes.c_int64]), pointer]
    size = ggml(number, source.ctypes.data, made.ctypes.data, 0, rows, columns, None)
    return made[:size].tobytes()
