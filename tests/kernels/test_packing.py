from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from bitnet_kernels import bit_planes, pack_base3, pack_ternary, unpack_base3, unpack_ternary
from bitnet_kernels.packing import packed_columns

ODD_K = (1, 63, 64, 65, 300)


def random_codes(n: int, k: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * n + k)
    return torch.randint(-1, 2, (n, k), generator=generator, dtype=torch.int8)


def test_quarter_plane_bytes_by_hand() -> None:
    codes = torch.zeros(2, 64, dtype=torch.int8)
    codes[0, [0, 16, 32, 48]] = torch.tensor([1, -1, 0, 1], dtype=torch.int8)
    codes[1, 17] = -1
    packed = pack_ternary(codes)
    assert packed.shape == (2, 16)
    assert packed.dtype == torch.uint8
    # Column 0 in bits 0..1, then 16, 32, 48: codes + 1 = 2, 0, 1, 2.
    assert packed[0, 0] == 0b10_01_00_10
    assert packed[1, 1] == 0b01_01_00_01
    packed[0, 0] = packed[1, 1] = 0b01_01_01_01
    assert bool((packed == 0b01_01_01_01).all())


def test_padding_is_weight_zero() -> None:
    packed = pack_ternary(torch.tensor([[-1]], dtype=torch.int8))
    assert packed.tolist() == [[0b01_01_01_00] + 15 * [0b01_01_01_01]]
    assert packed_columns(1) == packed_columns(64) == 16
    assert packed_columns(65) == 32


def test_base3_bytes_by_hand() -> None:
    codes = torch.tensor([[1, 1, 1, 1, 1, -1], [-1, 0, 1, 0, -1, 1]], dtype=torch.int8)
    # 2 + 6 + 18 + 54 + 162; then digit 0 and padding digits 1: 3 + 9 + 27 + 81.
    # 0 + 3 + 18 + 27 + 0; then digit 2 and the padding.
    assert pack_base3(codes).tolist() == [[242, 120], [48, 122]]


@pytest.mark.parametrize("k", ODD_K)
@pytest.mark.parametrize("n", [0, 1, 7])
def test_round_trips(n: int, k: int) -> None:
    codes = random_codes(n, k)
    assert torch.equal(unpack_ternary(pack_ternary(codes), k), codes)
    assert torch.equal(unpack_base3(pack_base3(codes), k), codes)
    assert pack_ternary(codes).shape == (n, -(-k // 64) * 16)
    assert pack_base3(codes).shape == (n, -(-k // 5))


def test_every_byte_unpacks_to_its_digits() -> None:
    """Against Python integers, for each of the 81 valid quarter-plane and 243 base-3 bytes."""
    valid = [b for b in range(256) if all((b >> s) & 3 != 3 for s in (0, 2, 4, 6))]
    packed = torch.tensor(valid, dtype=torch.uint8).unsqueeze(1).repeat(1, 16)
    want = [[((b >> s) & 3) - 1 for s in (0, 2, 4, 6) for _ in range(16)] for b in valid]
    assert unpack_ternary(packed, 64).tolist() == want
    packed = torch.arange(243, dtype=torch.uint8).unsqueeze(1)
    want = [[b // 3**i % 3 - 1 for i in range(5)] for b in range(243)]
    assert unpack_base3(packed, 5).tolist() == want


def test_non_contiguous_codes() -> None:
    codes = random_codes(65, 12)
    assert torch.equal(unpack_ternary(pack_ternary(codes.t()), 65), codes.t())
    assert torch.equal(unpack_base3(pack_base3(codes.t()), 65), codes.t())
    packed = pack_ternary(codes).t().contiguous().t()
    assert torch.equal(unpack_ternary(packed, 12), codes)


@pytest.mark.parametrize("pack", [pack_ternary, pack_base3])
@pytest.mark.parametrize("value", [-128, -2, 2, 127])
def test_invalid_codes(pack: object, value: int) -> None:
    codes = torch.zeros(3, 70, dtype=torch.int8)
    codes[2, 69] = value
    assert callable(pack)
    with pytest.raises(ValueError, match="codes: expected values"):
        pack(codes)


@pytest.mark.parametrize("pack", [pack_ternary, pack_base3])
def test_invalid_code_tensors(pack: object) -> None:
    assert callable(pack)
    with pytest.raises(TypeError, match=r"codes: expected int8, got torch\.float32"):
        pack(torch.zeros(2, 64))
    for shape in ((64,), (2, 0), (1, 2, 64)):
        with pytest.raises(ValueError, match="codes: expected shape"):
            pack(torch.zeros(shape, dtype=torch.int8))


def test_invalid_packed() -> None:
    packed = pack_ternary(random_codes(3, 100))
    with pytest.raises(TypeError, match="packed: expected uint8"):
        unpack_ternary(packed.to(torch.int8), 100)
    for in_features in (64, 129):
        with pytest.raises(ValueError, match=rf"packed: .* K = {in_features}"):
            unpack_ternary(packed, in_features)
    with pytest.raises(ValueError, match="packed: expected shape"):
        unpack_base3(pack_base3(random_codes(3, 100)), 101)


def test_bytes_that_no_code_makes_are_refused() -> None:
    packed = pack_base3(random_codes(3, 7))
    packed[1, 1] = 243
    with pytest.raises(ValueError, match="a byte above 242"):
        unpack_base3(packed, 7)
    for pair in range(4):
        packed = pack_ternary(random_codes(3, 100))
        packed[2, 31] |= 3 << (2 * pair)
        with pytest.raises(ValueError, match="bit pair 11"):
            unpack_ternary(packed, 100)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 64), (5, 65), (2, 128), (7, 300), (1100, 70)])
def test_bit_planes_hold_every_column(n: int, k: int) -> None:
    """The two planes of every column, read bit by bit; columns past K have weight 0."""
    codes = random_codes(n, k)
    planes = bit_planes(pack_ternary(codes))
    words = -(-k // 128) * 4
    assert planes.dtype == torch.int32
    assert planes.shape == (n, 2, words)
    bits = np.unpackbits(planes.numpy().view(np.uint8), axis=-1, bitorder="little")
    columns = np.zeros((n, 32 * words), dtype=np.int8)
    columns[:, :k] = codes.numpy()
    assert np.array_equal(bits[:, 0], columns != 0)
    assert np.array_equal(bits[:, 1], columns == -1)


def test_bit_planes_of_nothing_and_of_something_else() -> None:
    assert bit_planes(torch.zeros(0, 16, dtype=torch.uint8)).shape == (0, 2, 4)
    assert bit_planes(torch.zeros(3, 32, dtype=torch.uint8, device="meta")).shape == (3, 2, 4)
    with pytest.raises(TypeError, match="packed: expected uint8"):
        bit_planes(torch.zeros(3, 16, dtype=torch.int8))
    for shape in ((3, 0), (3, 8), (16,)):
        with pytest.raises(ValueError, match="packed: expected shape"):
            bit_planes(torch.zeros(shape, dtype=torch.uint8))
    with pytest.raises(ValueError, match="bit pair 11"):
        bit_planes(torch.full((3, 16), 0b01_11_01_01, dtype=torch.uint8))


@pytest.mark.parametrize("function", [bit_planes, pack_ternary, pack_base3])
def test_what_is_no_tensor_is_refused(function: Callable[[object], Tensor]) -> None:
    for value in (None, 3, "x", np.ones((2, 2))):
        with pytest.raises(TypeError, match=r"(packed|codes): expected a tensor, got"):
            function(value)


@pytest.mark.parametrize("function", [unpack_ternary, unpack_base3])
def test_no_number_of_columns(function: Callable[[object, object], Tensor]) -> None:
    packed = torch.zeros(2, 16, dtype=torch.uint8)
    for value in (None, 1.0, "64", True):
        with pytest.raises(TypeError, match="in_features: expected an integer"):
            function(packed, value)
    for value in (0, -1, 2**40):
        with pytest.raises(ValueError, match="in_features: expected at least 1"):
            function(packed, value)
    with pytest.raises(TypeError, match="packed: expected a tensor"):
        function(None, 64)
