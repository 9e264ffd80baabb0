"""A ternary matrix in the tensor types of GGUF, from its codes and one number ``d``.

    f32, f16   code * d, in 4 or 2 bytes per weight
    tq2_0      2.06 bits per weight. A block is 256 weights of a row in 66 bytes: two halves of 32
               bytes, then d in fp16. Byte m of half h holds the weights 128 h + 32 j + m, j = 0 ..
               3, in its bits 2j and 2j + 1, as code + 1.
    tq1_0      1.69 bits per weight. A block is 256 weights in 54 bytes: 32 bytes of 5 weights each
               (m + 32 j), 16 bytes of 5 (160 + m + 16 j), 4 bytes of 4 (240 + m + 4 j), then d in
               fp16. A byte is the number whose base-3 digits are its codes + 1, the first one the
               highest, as a fraction of 243, rounded up to 256ths: multiplying the byte by 3
               carries its first digit out.
    i2_s       2 bits per weight, of bitnet.cpp on x86. 128 weights in 32 bytes; byte m holds the
               weights m + 32 j in its bits 6 - 2j and 7 - 2j, as code + 1. 32 bytes follow the last
               row: d in fp32, then zeros. On ARM bitnet.cpp reads blocks of 64.

llama.cpp's quantizer takes the largest value of a block as its d. So a block of zeros has d = 0
there, and here too, so that the bytes are equal.

Source of the layouts: llama.cpp, ggml/src/ggml-quants.c; microsoft/BitNet, src/ggml-bitnet-mad.cpp.
N rows, K columns.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

Kind = Literal["tq2_0", "tq1_0", "f16", "f32", "i2_s"]
KINDS: dict[Kind, str] = {
    "tq2_0": "2.06 bits per weight, the fastest in llama.cpp",
    "tq1_0": "1.69 bits per weight, the smallest; the same numbers",
    "f16": "16 bits per weight, for programs that read no ternary type",
    "f32": "32 bits per weight, and a 32-bit embedding; no activation is rounded",
    "i2_s": "2 bits per weight, for bitnet.cpp on x86",
}
"""The purpose of each kind."""
I2_S = 36
"""Type number of i2_s in a file. In llama.cpp it belonged to a type that was removed."""
_I2_S_TAIL = 32


@dataclass(frozen=True)
class TensorType:
    """How a file stores a matrix."""

    number: int
    """Type number in the header of a tensor."""
    file_type: int
    """``general.file_type`` of a file with matrices of this type."""
    columns: int
    """Weights per block; a row has whole blocks."""
    block_bytes: int
    encode: Callable[[Tensor, Tensor], Tensor]
    """Codes int8 ``[N, K]`` and fp32 ``d`` -> the bytes, uint8 ``[n]``."""
    tail: int = 0
    """Bytes after the last row."""

    def bytes(self, rows: int, columns: int) -> int:
        """Size of a matrix."""
        return rows * columns // self.columns * self.block_bytes + self.tail


def _bytes(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.uint8).flatten()


def _f32(codes: Tensor, d: Tensor) -> Tensor:
    return _bytes(codes * d)


def _f16(codes: Tensor, d: Tensor) -> Tensor:
    return _bytes((codes * d).half())


def _tq2_0(codes: Tensor, d: Tensor) -> Tensor:
    digits = rearrange((codes + 1).byte(), "n (b h j m) -> j n b (h m)", h=2, j=4, m=32)
    bits = digits[0] | digits[1] << 2 | digits[2] << 4 | digits[3] << 6
    return torch.cat((bits, _block_scales(codes, d)), 2).flatten()


def _tq1_0(codes: Tensor, d: Tensor) -> Tensor:
    blocks = rearrange((codes + 1).short(), "n (b k) -> n b k", k=256)
    parts = []
    for values, digits in zip(blocks.split((160, 80, 16), 2), (5, 5, 4), strict=True):
        weights = torch.tensor([81, 27, 9, 3, 1][:digits], dtype=torch.int16, device="cpu")
        number = rearrange(values, "n b (j m) -> n b m j", j=digits).mul(weights).sum(3)
        parts.append(((number * 256 + 242) // 243).byte())
    return torch.cat((*parts, _block_scales(codes, d)), 2).flatten()


def _block_scales(codes: Tensor, d: Tensor) -> Tensor:
    """fp16 ``d`` of each block, 0 if all its codes are 0: uint8 ``[N, K / 256, 2]``."""
    used = rearrange(codes, "n (b k) -> n b k", k=256).any(2, keepdim=True)
    return torch.where(used, d, 0.0).half().view(torch.uint8)


def _i2_s(codes: Tensor, d: Tensor) -> Tensor:
    digits = rearrange((codes + 1).byte(), "n (b j m) -> j (n b m)", j=4, m=32)
    bits = digits[0] << 6 | digits[1] << 4 | digits[2] << 2 | digits[3]
    tail = torch.zeros(_I2_S_TAIL, dtype=torch.uint8, device="cpu")
    tail[:4] = d.reshape(1).view(torch.uint8)
    return torch.cat((bits, tail))


TYPES: dict[Kind, TensorType] = {
    "tq2_0": TensorType(35, 37, 256, 66, _tq2_0),
    "tq1_0": TensorType(34, 36, 256, 54, _tq1_0),
    "f16": TensorType(1, 1, 1, 2, _f16),
    "f32": TensorType(0, 0, 1, 4, _f32),
    "i2_s": TensorType(I2_S, 40, 128, 32, _i2_s, _I2_S_TAIL),
}


def i2_s_bytes(weights: int) -> int:
    """Bytes of a matrix in i2_s. Raises ValueError unless its weights fill whole blocks."""
    if weights % TYPES["i2_s"].columns:
        raise ValueError(f"{weights} weights are no blocks of 128")
    return TYPES["i2_s"].bytes(1, weights)


def read_i2_s(data: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The weights fp32 ``[N, K]`` of a matrix in i2_s, uint8 ``[n]``.

    Raises:
        ValueError: a weight has none of the three codes, or K is not a multiple of 128.
    """
    if shape[-1] % TYPES["i2_s"].columns:
        raise ValueError(f"its rows of {shape[-1]} are no blocks of 128")
    bits, tail = data[:-_I2_S_TAIL], data[-_I2_S_TAIL:]
    digits = torch.stack([bits >> shift & 3 for shift in (6, 4, 2, 0)])
    if bool((digits == 3).any()):
        raise ValueError("holds a code other than -1, 0 and 1")
    codes = rearrange(digits.to(torch.int8), "j (b m) -> (b j m)", m=32) - 1
    return codes.reshape(shape) * tail[:4].clone().view(torch.float32)
