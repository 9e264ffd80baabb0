"""Two ways to store ternary codes; both round-trip exactly.

Quarter-plane, 2 bits per code: the layout that the kernels read. Byte ``i`` of a row holds the
codes at columns ``i``, ``i + K/4``, ``i + 2K/4`` and ``i + 3K/4`` in its bit pairs 0..3 (K padded
to a multiple of 64). A lane that loads 16 bytes gets four runs of 16 *consecutive* weights, so
activations stay in natural order:

    byte i   [ w[i + 3K/4]+1 | w[i + 2K/4]+1 | w[i + K/4]+1 | w[i]+1 ]     bits 7..0

Base-3, 5 codes per byte (3^5 = 243 <= 256, 1.6 bits per code): the layout of files. It saves a
fifth of the bytes to store and send; on a GPU, decoding it costs more than the saved bytes gain.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from bitnet_kernels.checks import check_count, check_tensor

K_MULTIPLE = 64
"""K is padded to a multiple of this, so that a quarter-plane is a whole number of 16-byte loads."""
_POWERS_OF_3 = (1, 3, 9, 27, 81)


def packed_columns(in_features: int) -> int:
    """Bytes in a packed row of ``in_features`` codes: ``ceil(K / 64) * 16``."""
    return -(-in_features // K_MULTIPLE) * (K_MULTIPLE // 4)


def _check_codes(codes: Tensor) -> None:
    check_tensor("codes", codes)
    if codes.dtype != torch.int8:
        raise TypeError(f"codes: expected int8, got {codes.dtype}")
    if codes.dim() != 2 or codes.shape[1] == 0:
        raise ValueError(f"codes: expected shape [N, K] with K >= 1, got {list(codes.shape)}")
    if codes.numel() and not bool(((codes >= -1) & (codes <= 1)).all()):
        raise ValueError("codes: expected values in {-1, 0, +1}")


def check_packed(packed: Tensor, columns: int, in_features: int) -> None:
    """Raise TypeError or ValueError unless ``packed`` is uint8 ``[N, columns]``."""
    check_tensor("packed", packed)
    if packed.dtype != torch.uint8:
        raise TypeError(f"packed: expected uint8, got {packed.dtype}")
    if packed.dim() != 2 or packed.shape[1] != columns:
        raise ValueError(
            f"packed: expected shape [N, {columns}] for K = {in_features}, got {list(packed.shape)}"
        )


def pack_ternary(codes: Tensor) -> Tensor:
    """Pack codes into quarter-planes.

    Arguments:
        codes: int8 ``[N, K]`` with values in {-1, 0, +1}, K >= 1.
    Returns:
        uint8 ``[N, ceil(K/64)*16]``. Columns past K hold the code of weight 0.
    Raises:
        TypeError, ValueError: wrong dtype, shape or values.
    """
    _check_codes(codes)
    columns = packed_columns(codes.shape[1])
    digits = pad(codes, (0, 4 * columns - codes.shape[1])).to(torch.uint8) + 1  # -1 wraps to 0
    p0, p1, p2, p3 = digits.view(-1, 4, columns).unbind(1)
    return p0 | (p1 << 2) | (p2 << 4) | (p3 << 6)


def unpack_ternary(packed: Tensor, in_features: int) -> Tensor:
    """The inverse of :func:`pack_ternary`: uint8 ``[N, ceil(K/64)*16]`` -> int8 ``[N, K]``.

    Raises:
        TypeError, ValueError: wrong dtype, a shape that does not fit K = ``in_features``, or a bit
            pair 11, which encodes no code.
    """
    check_count("in_features", in_features)
    check_packed(packed, packed_columns(in_features), in_features)
    _check_pairs(packed)
    return codes_of(packed, in_features)


def _check_pairs(packed: Tensor) -> None:
    if packed.numel() and bool((packed & (packed >> 1) & 0x55).any()):
        raise ValueError("packed: a bit pair 11 is no ternary code; the data is damaged")


def codes_of(packed: Tensor, in_features: int) -> Tensor:
    """:func:`unpack_ternary` without a check of the values, which would wait for a GPU."""
    planes = [(packed >> shift) & 3 for shift in (0, 2, 4, 6)]
    return (torch.cat(planes, 1)[:, :in_features].to(torch.int8) - 1).contiguous()


def plane_words(packed_bytes: int) -> int:
    """Length, in int32 words, of one bit plane of a row of ``packed_bytes``: one bit per column,
    padded to a multiple of 128 columns, so that a plane is a whole number of 16-byte loads."""
    return -(-packed_bytes // 32) * 4


def bit_planes(packed: Tensor) -> Tensor:
    """The layout of the ``popcount`` kernel, made once from quarter-planes; it has the same size.

    Arguments:
        packed: uint8 ``[N, P]`` from :func:`pack_ternary`.
    Returns:
        int32 ``[N, 2, ceil(P/32)*4]``: bit ``i`` of word ``q`` says whether the weight in column
        ``32 q + i`` is not 0 (first plane) and whether it is -1 (second).
    Raises:
        TypeError, ValueError: not uint8 ``[N, P]`` with P a positive multiple of 16, or a bit pair
            11, which encodes no code.
    """
    check_tensor("packed", packed)
    if packed.dtype != torch.uint8:
        raise TypeError(f"packed: expected uint8, got {packed.dtype}")
    if packed.dim() != 2 or packed.shape[1] == 0 or packed.shape[1] % 16:
        raise ValueError(f"packed: expected shape [N, ceil(K/64)*16], got {list(packed.shape)}")
    if not packed.is_meta:
        _check_pairs(packed)
    n, p = packed.shape
    words = plane_words(p)
    out = packed.new_empty((n, 2, 4 * words))
    bits = torch.arange(8, dtype=torch.uint8, device=packed.device)
    for rows, part in zip(out.split(1024), packed.split(1024), strict=True):  # 8 times the bytes
        codes = torch.cat([(part >> shift) & 3 for shift in (0, 2, 4, 6)], 1)
        codes = pad(codes, (0, 32 * words - 4 * p), value=1).view(-1, 4 * words, 8)
        rows[:, 0] = ((codes != 1).to(torch.uint8) << bits).sum(-1, dtype=torch.uint8)
        rows[:, 1] = ((codes == 0).to(torch.uint8) << bits).sum(-1, dtype=torch.uint8)
    return out.view(torch.int32)


def pack_base3(codes: Tensor) -> Tensor:
    """Pack five codes per byte, least significant first: int8 ``[N, K]`` -> uint8
    ``[N, ceil(K/5)]``. Raises as :func:`pack_ternary`."""
    _check_codes(codes)
    columns = -(-codes.shape[1] // 5)
    digits = pad(codes, (0, 5 * columns - codes.shape[1])).to(torch.uint8) + 1
    powers = torch.tensor(_POWERS_OF_3, dtype=torch.uint8, device=codes.device)
    return (digits.view(-1, columns, 5) * powers).sum(-1, dtype=torch.uint8)


def unpack_base3(packed: Tensor, in_features: int) -> Tensor:
    """The inverse of :func:`pack_base3`: uint8 ``[N, ceil(K/5)]`` -> int8 ``[N, K]``.

    Raises:
        TypeError, ValueError: wrong dtype or shape, or a byte above 242, which encodes no codes.
    """
    check_count("in_features", in_features)
    check_packed(packed, -(-in_features // 5), in_features)
    if packed.numel() and int(packed.max()) >= 3**5:
        raise ValueError("packed: a byte above 242 is not five base-3 digits; the data is damaged")
    digits = torch.stack([packed // power % 3 for power in _POWERS_OF_3], -1).flatten(1)
    return (digits[:, :in_features].to(torch.int8) - 1).contiguous()
