"""Quantized layers in numpy: int64 products and fp32, one operation at a time.

Not a test module.
"""

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from bitnet.qat.grid import Codes

Array = np.ndarray[Any, np.dtype[Any]]
Activations = Literal["none", "absmax", "static"]
Granularity = Literal["tensor", "row", "group"]


def random_codes(*shape: int, low: int = -128, high: int = 127) -> Tensor:
    return torch.randint(low, high + 1, shape, dtype=torch.int8)


def centred(codes: Tensor, zero_point: Tensor | None, group_size: int = 1) -> Array:
    """codes - zero_point in int64; the zero point is per tensor, row or group."""
    values = codes.numpy().astype(np.int64)
    if zero_point is None:
        return values
    zero = zero_point.numpy().astype(np.int64)
    if zero.ndim == 1:
        zero = zero[:, None]
    elif zero.ndim == 2:
        zero = np.repeat(zero, group_size, 1)[:, : values.shape[1]]
    return values - zero


def oracle(x: Codes, w: Codes, bias: Tensor | None, group_size: int) -> Array:
    """The documented arithmetic in numpy: int64 sums, then fp32 operations one by one."""
    a, b = centred(x.codes, x.zero_point), centred(w.codes, w.zero_point, group_size)
    s_x = np.broadcast_to(x.scale.numpy(), a.shape[:1])[:, None]
    s_w = w.scale.numpy()
    if s_w.ndim < 2:
        y = ((a @ b.T).astype(np.float32) * s_x) * s_w
    else:
        y = np.zeros((len(a), len(b)), np.float32)
        for g in range(s_w.shape[1]):
            columns = slice(g * group_size, (g + 1) * group_size)
            acc = a[:, columns] @ b[:, columns].T
            y = y + (acc.astype(np.float32) * s_x) * s_w[:, g]
    return y if bias is None else y + bias.detach().numpy()


def conv_oracle(
    x: Codes, w: Codes, bias: Tensor | None, group_size: int, conv: nn.Conv1d | nn.Conv2d
) -> Array:
    """A convolution patch by patch: each output position is a token of a linear layer."""
    dims, (batch, n) = len(conv.kernel_size), (len(x.codes), conv.out_channels)
    values = centred(x.codes, x.zero_point)
    pads = []
    for axis in range(dims):
        if conv.padding == "same":
            total = conv.dilation[axis] * (conv.kernel_size[axis] - 1)
            pads.append((total // 2, total - total // 2))
        else:
            pads.append((0, 0) if conv.padding == "valid" else (int(conv.padding[axis]),) * 2)
    values = np.pad(values, [(0, 0), (0, 0), *pads])
    spans = [d * (k - 1) + 1 for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    size = [(values.shape[2 + i] - spans[i]) // conv.stride[i] + 1 for i in range(dims)]
    scales = np.broadcast_to(x.scale.numpy(), (batch,))
    per_group = conv.in_channels // conv.groups
    y = np.zeros((batch, n, *size), np.float32)
    for b, *position in np.ndindex(batch, *size):
        window = [slice(None)] + [
            slice(p * conv.stride[i], p * conv.stride[i] + spans[i], conv.dilation[i])
            for i, p in enumerate(position)
        ]
        patch = values[b][tuple(window)]
        for g in range(conv.groups):
            outputs = slice(g * n // conv.groups, (g + 1) * n // conv.groups)
            k = patch[g * per_group : (g + 1) * per_group].reshape(1, -1)
            token = Codes(torch.from_numpy(k), torch.tensor([scales[b]]), None)
            rows = Codes(*(t if t is None or t.dim() == 0 else t[outputs] for t in w))
            group_bias = None if bias is None else bias[outputs]
            y[(b, outputs, *position)] = oracle(token, rows, group_bias, group_size)[0]
    return y
