"""Ternary matrices in GGUF's types: bytes of other quantizers, values of other readers."""

import numpy as np
import pytest
import torch
from torch import Tensor

from bitnet.export.gguf_types import TYPES, Kind, i2_s_bytes, read_i2_s
from tests.helpers.gguf_models import i2_s, quantized_by_llama_cpp

gguf = pytest.importorskip("gguf", reason="the gguf extra is not installed")
SHAPES = [(1, 256), (3, 512), (7, 1280)]


def matrix(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Codes, one block of them zeros, and a number that fp16 holds."""
    codes = torch.randint(-1, 2, (rows, columns), dtype=torch.int8)
    codes[rows // 2, -256:] = 0
    codes[0, 0] = 1
    return codes, torch.tensor(0.0123).half().float()


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("kind", ["tq2_0", "tq1_0", "f16", "f32"])
def test_bytes_and_values_are_those_of_the_gguf_package(
    kind: Kind, rows: int, columns: int
) -> None:
    codes, d = matrix(rows, columns)
    made = TYPES[kind].encode(codes, d).numpy()
    values = (codes.float() * d).numpy()
    theirs = gguf.GGMLQuantizationType(TYPES[kind].number)
    assert theirs.name == kind.upper()
    assert made.size == TYPES[kind].bytes(rows, columns)
    assert made.tobytes() == gguf.quants.quantize(values, theirs).tobytes()
    stored = gguf.quants.quantize(values, theirs)
    read = gguf.quants.dequantize(made.view(stored.dtype).reshape(stored.shape), theirs)
    assert np.array_equal(read, values)


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("kind", ["tq2_0", "tq1_0"])
def test_bytes_are_those_of_llama_cpp(kind: Kind, rows: int, columns: int) -> None:
    codes, d = matrix(rows, columns)
    made = TYPES[kind].encode(codes, d).numpy().tobytes()
    assert made == quantized_by_llama_cpp((codes.float() * d).numpy(), TYPES[kind].number)


@pytest.mark.parametrize(("rows", "columns"), [(1, 128), (3, 256), (5, 384)])
def test_i2_s(rows: int, columns: int) -> None:
    codes = torch.randint(-1, 2, (rows, columns), dtype=torch.int8)
    scale = torch.tensor(0.1)
    made = TYPES["i2_s"].encode(codes, scale)
    theirs, d = i2_s(made.numpy().tobytes(), rows, columns)
    assert np.array_equal(theirs, codes.numpy())
    assert d == float(scale)
    assert made.numel() == i2_s_bytes(rows * columns) == TYPES["i2_s"].bytes(rows, columns)
    assert torch.equal(read_i2_s(made, (rows, columns)), codes * scale)


def test_i2_s_by_hand() -> None:
    """Weights 0, 32, 64 and 96 share the first byte, the first of them in its highest bits."""
    codes = torch.zeros(1, 128, dtype=torch.int8)
    codes[0, 0], codes[0, 96], codes[0, 33] = -1, 1, 1
    made = TYPES["i2_s"].encode(codes, torch.tensor(1.0)).tolist()
    assert made[:3] == [0b00_01_01_10, 0b01_10_01_01, 0b01_01_01_01]
    assert made[32:] == [0, 0, 0x80, 0x3F, *(28 * [0])]


def test_i2_s_refuses_what_is_none() -> None:
    made = TYPES["i2_s"].encode(torch.zeros(2, 128, dtype=torch.int8), torch.tensor(1.0))
    with pytest.raises(ValueError, match="of 64 are no blocks"):
        read_i2_s(made, (4, 64))
    with pytest.raises(ValueError, match="no blocks of 128"):
        i2_s_bytes(100)
    made[5] = 0b01_11_01_01
    with pytest.raises(ValueError, match="a code other than"):
        read_i2_s(made, (2, 128))
