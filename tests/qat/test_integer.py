"""Bit packing and the integer layers: equal to the QAT layers to the last bit."""

import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bitnet.linear import TernaryLinear
from bitnet.qat.grid import Codes
from bitnet.qat.integer import (
    IntEmbedding,
    IntLayer,
    IntLinear,
    integer_layer,
    pack_bits,
    unpack_bits,
)
from bitnet.qat.layers import QATConv1d, QATConv2d, QATEmbedding, QATLayer, QATLinear
from bitnet.qat.quantizers import WEIGHT_QUANTIZERS
from bitnet.qat.recipe import Recipe


def bit_string(codes: Tensor, bits: int, offset: int) -> np.ndarray[Any, Any]:
    """The packed bytes by way of a string of "0" and "1"."""
    rows = []
    for row in codes.tolist():
        string = "".join(format(code + offset, f"0{bits}b")[::-1] for code in row)
        string += "0" * (-len(string) % 8)
        rows.append([int(string[i : i + 8][::-1], 2) for i in range(0, len(string), 8)])
    return np.array(rows, np.uint8).reshape(len(codes), -1)


@pytest.mark.parametrize("bits", range(1, 9))
def test_packing_round_trips_without_gaps(bits: int) -> None:
    for n, k in [(1, 1), (3, 7), (2, 8), (5, 9), (2, 63), (1, 200), (0, 5), (3, 0)]:
        for offset in (0, 2 ** (bits - 1)):
            if offset == 0 and bits == 8:
                continue  # codes are int8
            lowest, highest = -offset, 2**bits - 1 - offset
            codes = torch.randint(lowest, highest + 1, (n, k), dtype=torch.int8)
            packed = pack_bits(codes, bits, offset)
            assert packed.dtype == torch.uint8
            assert packed.shape == (n, -(-k * bits // 8))
            if packed.numel():
                assert np.array_equal(packed.numpy(), bit_string(codes, bits, offset))
            assert torch.equal(unpack_bits(packed, bits, offset, k), codes)
    extremes = torch.tensor([[lowest, highest] * 9], dtype=torch.int8)
    assert torch.equal(
        unpack_bits(pack_bits(extremes, bits, 2 ** (bits - 1)), bits, 2 ** (bits - 1), 18),
        extremes,
    )


def test_packing_by_hand() -> None:
    codes = torch.tensor([[1, -2, 0, 3, -4, 2]], dtype=torch.int8)  # + 4: 5 2 4 7 0 6
    # from the lowest bit:      101 010 00|1 111 000 0|11
    assert pack_bits(codes, 3, 4).tolist() == [[0b00010101, 0b00001111, 0b00000011]]


def test_wrong_codes_are_not_packed() -> None:
    codes = torch.tensor([[2, -3]], dtype=torch.int8)
    with pytest.raises(ValueError, match=r"values in -2 .. 1 \(2 bits\), got -3 .. 2"):
        pack_bits(codes, 2, 2)
    with pytest.raises(TypeError, match="codes: expected int8"):
        pack_bits(codes.int(), 4, 8)
    with pytest.raises(ValueError, match="codes: expected shape"):
        pack_bits(codes[0], 4, 8)
    for bits in (0, 9):
        with pytest.raises(ValueError, match=r"bits: expected 1 .. 8"):
            pack_bits(codes, bits, 8)
    packed = pack_bits(codes, 4, 8)
    with pytest.raises(ValueError, match="packed: expected shape"):
        unpack_bits(packed, 4, 8, 3)
    with pytest.raises(TypeError, match="packed: expected uint8"):
        unpack_bits(packed.int(), 4, 8, 2)


def integer_linear(layer: QATLinear) -> IntLinear:
    """Of ternary recipes too, which convert() turns into a TernaryLinear."""
    return IntLinear(layer, layer.quantize())


def modules() -> list[tuple[Any, Any, Tensor]]:
    """(float layer, QAT class, input)"""
    return [
        (nn.Linear(13, 7), QATLinear, torch.randn(3, 4, 13)),
        (nn.Linear(1, 2, bias=False), QATLinear, torch.randn(5, 1)),
        (nn.Conv1d(4, 6, 4, padding="same", dilation=2), QATConv1d, torch.randn(3, 4, 11)),
        (nn.Conv1d(4, 8, 3, groups=4, bias=False), QATConv1d, torch.randn(4, 11)),
        (
            nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2), groups=2),
            QATConv2d,
            torch.randn(2, 4, 9, 7),
        ),
        (nn.Embedding(11, 7, padding_idx=2), QATEmbedding, torch.randint(0, 11, (3, 2))),
    ]


ACTIVATIONS: list[dict[str, Any]] = [
    {"activations": "none"},
    {"activations": "absmax", "activation_bits": 8},
    {"activations": "absmax", "activation_bits": 5},
    {"activations": "static", "activation_bits": 4},
    {"activations": "static", "activation_bits": 8, "activation_symmetric": False},
]


@pytest.mark.parametrize("granularity", ["tensor", "row", "group"])
@pytest.mark.parametrize("weights", [*WEIGHT_QUANTIZERS, "affine"])
def test_integer_layers_equal_qat_layers_to_the_bit(weights: str, granularity: Any) -> None:
    options: dict[str, Any] = {"weights": weights}
    if weights == "affine":
        options = {"weights": "int", "symmetric": False}
    for case, activations in enumerate(ACTIVATIONS):
        recipe = Recipe(
            **options, bits=2 + (3 * case) % 7, granularity=granularity, group_size=5, **activations
        )
        for module, qat, x in modules():
            layer: QATLayer = qat.from_float(module, recipe)
            for batch in (x, x) if x.is_floating_point() else ():
                layer(batch)
            layer.eval()
            integer = integer_layer(layer, layer.quantize())
            assert not integer.training
            y = layer(x)
            assert torch.equal(integer(x), y), module
            with torch.autocast("cpu", torch.bfloat16):
                half = layer(x)
                assert half.dtype == (torch.float32 if qat is QATEmbedding else torch.bfloat16)
                assert torch.equal(integer(x), half), module
            if isinstance(integer, IntLayer):
                for found, expected in zip(integer.quantize(), layer.quantize(), strict=True):
                    assert (found is None) == (expected is None)
                    if found is not None and expected is not None:
                        assert found.dtype == expected.dtype
                        assert torch.equal(found, expected)


def test_random_shapes_and_extreme_inputs() -> None:
    generator = torch.Generator().manual_seed(3)
    for case in range(40):
        m, n, k = (int(v) for v in torch.randint(1, 150, (3,), generator=generator))
        recipe = Recipe(weights="int", bits=2 + case % 7, symmetric=bool(case % 2))
        layer = QATLinear.from_float(nn.Linear(k, n, bias=bool(case % 3)), recipe)
        x = torch.randn(m, k, generator=generator) * 10 ** float(case % 7 - 3)
        if case % 10 == 7:
            x.zero_()
        if case % 10 == 8:
            x.fill_(-3.3e38 if k == 1 else 1e30)
        if case % 10 == 9:
            x[0, 0] = float("inf")
            with torch.no_grad():
                layer.weight.zero_()
        y, integer = layer(x), integer_linear(layer)(x)
        assert torch.equal(integer.nan_to_num(7.0), y.nan_to_num(7.0)), (m, n, k)
        assert torch.equal(integer.isnan(), y.isnan())


@pytest.mark.parametrize("activations", ["none", "absmax", "static"])
def test_bf16_models_keep_fp32_scales(activations: Any) -> None:
    """bf16 weights and inputs; the scale of the integer layer stays fp32."""
    recipe = Recipe(weights="int", bits=4, activations=activations)
    for module, qat, x in modules():
        layer = qat.from_float(module.bfloat16(), recipe)
        if x.is_floating_point():
            x = x.bfloat16()
            layer(x)
        layer.eval()
        integer = integer_layer(layer, layer.quantize())
        assert integer(x).dtype == torch.bfloat16
        assert torch.equal(integer(x), layer(x))


def test_moving_does_not_round_scales() -> None:
    recipe = Recipe(weights="int", symmetric=False, activations="static", observer="minmax")
    layer = QATLinear.from_float(nn.Linear(6, 3), recipe)
    layer(torch.randn(5, 6))
    integer = integer_linear(layer)
    before = {name: tensor.clone() for name, tensor in integer.state_dict().items()}
    integer.to(torch.bfloat16)
    after = integer.state_dict()
    assert after["bias"].dtype == torch.bfloat16
    for name in before.keys() - {"bias"}:
        assert torch.equal(after[name], before[name]), name
        assert after[name].dtype == before[name].dtype
    embedding = QATEmbedding.from_float(nn.Embedding(5, 4), Recipe(weights="int"))
    rows = IntEmbedding(embedding, embedding.quantize())
    assert rows.to(torch.bfloat16)(torch.tensor([1])).dtype == torch.bfloat16
    assert rows.scale.dtype == torch.float32
    assert rows.float()(torch.tensor([[1, 2]], dtype=torch.int32)).dtype == torch.float32


def test_ternary_linear_layers_get_kernels() -> None:
    for weights, activations in itertools.product(
        ["absmean", "absmedian", "twn", "seq_ternary", "int", "sign"], ACTIVATIONS
    ):
        recipe = Recipe(weights=weights, **activations)
        layer = QATLinear.from_float(nn.Linear(6, 3), recipe)
        layer(torch.randn(4, 6))
        integer = integer_layer(layer, layer.quantize())
        dynamic = (recipe.activations, recipe.activation_bits) == ("absmax", 8)
        expected = dynamic and weights not in ("int", "sign")
        assert type(integer) is (TernaryLinear if expected else IntLinear)


@pytest.mark.parametrize(
    ("weights", "bits", "expected"),
    [("int", 3, 3), ("lsq", 5, 5), ("absmean", 4, 2), ("seq", 4, 2), ("sign", 4, 1)],
)
def test_stored_bytes_by_hand(weights: Any, bits: int, expected: int) -> None:
    recipe = Recipe(weights=weights, bits=bits, activations="none", granularity="group")
    layer = QATLinear.from_float(nn.Linear(300, 5), recipe)
    integer = integer_linear(layer)
    assert integer.packed.shape == (5, -(-300 * expected // 8))
    assert integer.weight_bytes == 5 * -(-300 * expected // 8) + 4 * 5 * 3
    affine = Recipe(weights="int", bits=bits, symmetric=False)
    integer = integer_linear(QATLinear.from_float(nn.Linear(300, 5), affine))
    assert integer.weight_bytes == 5 * -(-300 * bits // 8) + 5 * (4 + 1)
    assert f"weight_bytes={integer.weight_bytes}" in repr(integer)


def test_given_codes_by_hand() -> None:
    codes = torch.tensor([[1, -2, 3], [-4, 7, 0]], dtype=torch.int8)
    scale, zero = torch.tensor([0.5, 2.0]), torch.tensor([1, -1], dtype=torch.int32)
    found = Codes(codes, scale, zero)
    affine: dict[str, Any] = {"weights": "int", "bits": 4, "symmetric": False}
    linear = nn.Linear(3, 2)
    with torch.no_grad():
        linear.bias.copy_(torch.tensor([0.25, 0.0]))
    integer = integer_layer(QATLinear.from_float(linear, Recipe(**affine)), found)
    x = torch.tensor([[127.0, 0.0, -127.0], [0.0, 254.0, 2.0]])  # scales 1 and 2
    # weights [0, -3, 2] * 0.5 and [-3, 8, 1] * 2; codes [127, 0, -127] and [0, 127, 1]
    expected = [[-126.75, -1016.0], [-378.75, 4068.0]]
    assert integer(x).tolist() == expected
    dequantized = torch.tensor([[0.0, -1.5, 1.0], [-6.0, 16.0, 2.0]])
    weights_only = Recipe(**affine, activations="none")
    linear = nn.Linear(3, 2, bias=False)
    integer = integer_layer(QATLinear.from_float(linear, weights_only), found)
    assert torch.equal(integer(torch.eye(3)), dequantized.t())
    row = nn.Conv1d(1, 2, 3, padding=1, bias=False)
    conv = integer_layer(QATConv1d.from_float(row, weights_only), found)
    assert torch.equal(
        conv(torch.tensor([[1.0, 0.0, 0.0]])),
        dequantized[:, [1, 0]].new_tensor([[-1.5, 0.0, 0.0], [16.0, -6.0, 0.0]]),
    )
    flat = nn.Conv2d(1, 2, (1, 3), bias=False)
    image = integer_layer(QATConv2d.from_float(flat, weights_only), found)
    assert image(torch.ones(1, 1, 3)).flatten().tolist() == [-0.5, 12.0]
    static = QATLinear.from_float(
        linear, Recipe(weights="int", bits=4, activations="static", observer="minmax")
    )
    static(torch.tensor([[63.5, 0.0, 0.0]]))  # the input's scale: 0.5
    fixed = integer_layer(static, Codes(codes, scale, None))
    assert fixed(torch.tensor([[1.0, 0.26, -0.74]])).tolist() == [[-0.75, -1.0]]


def test_codes_that_do_not_fit_are_refused() -> None:
    codes, scale = torch.ones(3, 4, dtype=torch.int8), torch.ones(3)
    zero = torch.zeros(3, dtype=torch.int32)

    def make(codes: Tensor, scale: Tensor, zero: Tensor | None, **options: Any) -> None:
        layer = QATLinear.from_float(nn.Linear(4, 3), Recipe(weights="int", **options))
        integer_layer(layer, Codes(codes, scale, zero))

    with pytest.raises(ValueError, match=r"scale: expected float32 \[3\] for granularity 'row'"):
        make(codes, torch.ones(()), None)
    with pytest.raises(ValueError, match="scale: expected float32"):
        make(codes, scale.double(), None)
    with pytest.raises(ValueError, match="zero_point: expected for affine weights"):
        make(codes, scale, zero)
    with pytest.raises(ValueError, match="zero_point: expected for affine weights"):
        make(codes, scale, None, symmetric=False)
    with pytest.raises(ValueError, match=r"zero_point: expected the scale's shape \[3\]"):
        make(codes, scale, zero[:1], symmetric=False)
    with pytest.raises(ValueError, match=r"zero_point: expected values in -128 .. 127"):
        make(codes, scale, zero + 128, symmetric=False)
    with pytest.raises(ValueError, match=r"codes: expected values in -8 .. 7"):
        make(codes + 7, scale, None)
    with pytest.raises(ValueError, match=r"codes: expected shape \[N, K\]"):
        make(codes[0], scale, None)
    with pytest.raises(ValueError, match="input_observer: has seen no input"):
        make(codes, scale, None, activations="static")
    with pytest.raises(ValueError, match="weight: holds NaN or infinity"):
        make(codes, scale * float("nan"), None)


def test_embedding_unpacks_rows() -> None:
    for granularity in ("tensor", "row", "group"):
        recipe = Recipe(
            weights="int", bits=3, symmetric=False, granularity=granularity, group_size=4
        )
        layer = QATEmbedding.from_float(nn.Embedding(6, 9), recipe)
        integer = integer_layer(layer, layer.quantize())
        for ids in (torch.tensor(4), torch.tensor([5, 0, 5]), torch.zeros(0, 2, dtype=torch.int64)):
            assert torch.equal(integer(ids), layer(ids))
        for wrong in (-1, 6):
            with pytest.raises((IndexError, RuntimeError)):
                integer(torch.tensor([wrong]))


def test_copies_and_state_dicts() -> None:
    recipe = Recipe(weights="lsq", bits=3, activations="static")
    for module, qat, x in modules():
        layer = qat.from_float(module, recipe)
        layer(x)
        layer.eval()
        integer = integer_layer(layer, layer.quantize())
        again = copy.deepcopy(integer)
        assert torch.equal(again(x), integer(x))
        state = integer.state_dict()
        assert all(torch.equal(again.state_dict()[name], state[name]) for name in state)
        assert not any(p.requires_grad for p in integer.parameters())
