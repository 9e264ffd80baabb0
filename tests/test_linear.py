"""BitLinear, TernaryLinear, replace_linear and pack on modules of every kind."""

import copy
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

import bitnet_kernels
from bitnet.linear import BitLinear, TernaryLinear, pack, replace_linear
from bitnet.quant import absmean_ternary, ternary_linear_ste
from bitnet_kernels import bit_planes
from bitnet_kernels.cpu import int_mm

Granularity = Literal["tensor", "row", "group"]


def test_same_constructor_and_state_dict_as_linear() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(6, 4)
    torch.manual_seed(0)
    layer = BitLinear(6, 4)
    assert torch.equal(layer.weight, linear.weight)
    layer.load_state_dict(linear.state_dict())
    linear.load_state_dict(layer.state_dict())
    assert BitLinear(6, 4, False, "meta", torch.bfloat16).weight.dtype == torch.bfloat16
    assert layer(input=torch.ones(2, 6)).shape == (2, 4)


@pytest.mark.parametrize("leading", [(), (0,), (3,), (2, 0, 5), (2, 3, 5)])
def test_leading_dimensions(leading: tuple[int, ...]) -> None:
    layer = BitLinear(7, 5)
    x = torch.randn(*leading, 7, requires_grad=True)
    y = layer(x)
    assert y.shape == (*leading, 5)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    assert layer.weight.grad is not None
    packed = pack(copy.deepcopy(layer))
    assert torch.equal(packed(x.detach()), y.detach())


def test_non_contiguous_input() -> None:
    layer = BitLinear(6, 4)
    x = torch.randn(6, 10).t()
    assert not x.is_contiguous()
    assert torch.equal(layer(x), layer(x.contiguous()))
    assert torch.equal(pack(layer)(x), pack(layer)(x.contiguous()))


def test_bias_is_added_after_the_rescale() -> None:
    layer = BitLinear(8, 3)
    with torch.no_grad():
        layer.bias.copy_(torch.tensor([1.0, -2.0, 1e6]))
    x = torch.randn(4, 8)
    without = ternary_linear_ste(x, layer.weight)
    assert torch.equal(layer(x), without + layer.bias)
    assert torch.equal(layer(torch.zeros(1, 8)), layer.bias.unsqueeze(0))


def test_norm_inside() -> None:
    layer = BitLinear(8, 3, norm=True)
    x = torch.randn(4, 8) * 5 + 1
    normed = x * (x.double().square().mean(1, keepdim=True) + 1e-5).rsqrt().float()
    plain = ternary_linear_ste(normed, layer.weight, layer.bias)
    # the norm's own rounding may move a few activations by one code of 1/127
    assert (layer(x) - plain).abs().max() <= 2 * layer.quantize()[1] * normed.abs().max() / 127
    assert "rms_norm.weight" in layer.state_dict()
    assert torch.equal(pack(copy.deepcopy(layer))(x), layer(x))


@pytest.mark.parametrize(
    "options",
    [{}, {"granularity": "row"}, {"granularity": "group", "group_size": 16}, {"norm": True}],
)
def test_training_and_packed_agree_to_the_bit(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """60 random shapes an option: the accumulators of the trained layer are those of an int64
    oracle, and the packed layer has the same, or no torch operator computes them."""
    accumulators: list[Tensor] = []
    exact = int_mm.codes_matmul

    def spy(a: Tensor, b: Tensor) -> Tensor:
        acc = exact(a, b)
        assert torch.equal(acc.long(), a.long() @ b.long().t())
        accumulators.append(acc)
        return acc

    monkeypatch.setattr(int_mm, "codes_matmul", spy)
    generator = torch.Generator().manual_seed(11)
    for case in range(60):
        m, n, k = (int(v) for v in torch.randint(1, 301, (3,), generator=generator))
        layer = BitLinear(k, n, bias=bool(case % 2), **options)
        x = torch.randn(m, k, generator=generator) * 10 ** float(case % 7 - 3)
        if case % 10 == 7:
            x.zero_()
        if case % 10 == 8:
            x.fill_(-3.3e38 if k == 1 else 1e30)
        accumulators.clear()
        trained = layer(x)
        first = list(accumulators)
        accumulators.clear()
        packed = pack(copy.deepcopy(layer))(x)
        assert len(first) > 0
        assert len(accumulators) in (0, len(first))
        if accumulators:
            same = [torch.equal(a, b) for a, b in zip(first, accumulators, strict=True)]
            assert all(same), (m, n, k)
        assert torch.equal(trained, packed), (m, n, k)


def test_a_bad_token_spoils_only_itself() -> None:
    layer = BitLinear(6, 4)
    x = torch.randn(3, 6)
    x[1, 2] = float("nan")
    good = layer(torch.stack((x[0], x[2])))
    for module in (layer, pack(copy.deepcopy(layer))):
        y = module(x)
        assert y[1].isnan().all()
        assert torch.equal(y[[0, 2]], good)


def test_constructor_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match="in_features, out_features"):
        BitLinear(0, 4)
    with pytest.raises(ValueError, match="granularity: expected one of tensor, row, group"):
        BitLinear(4, 4, granularity="column")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="grad_mask"):
        BitLinear(4, 4, grad_mask="on")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="group_size"):
        BitLinear(4, 4, group_size=0)


def test_ternary_linear_keeps_its_scale_in_fp32() -> None:
    layer = pack(BitLinear(64, 8, granularity="row"))
    scale = layer.scale.clone()
    for cast in (layer.bfloat16(), layer.half(), layer.to(torch.float64), layer.float()):
        assert cast.scale.dtype == torch.float32
        assert torch.equal(cast.scale, scale)
        assert cast.packed.dtype == torch.uint8


def test_from_codes_takes_the_scale_as_it_is() -> None:
    codes = torch.tensor([[1, 0, -1], [0, 0, 1]], dtype=torch.int8)
    layer = TernaryLinear.from_codes(codes, torch.tensor(0.37))
    assert torch.equal(layer.codes(), codes)
    y = layer(torch.tensor([[127.0, 3.0, -127.0]]))
    assert y.tolist() == [[pytest.approx(254 * 0.37), pytest.approx(-127 * 0.37)]]
    with pytest.raises(ValueError, match="scale: expected"):
        TernaryLinear.from_codes(codes, torch.ones(3))
    with pytest.raises(ValueError, match="scale: expected"):
        TernaryLinear.from_codes(codes, torch.tensor(1.0, dtype=torch.float64))


def test_packed_state_dict_round_trip() -> None:
    layer = pack(BitLinear(70, 9, granularity="group", group_size=32))
    other = TernaryLinear(70, 9, granularity="group", group_size=32)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, 70)
    assert torch.equal(layer(x), other(x))


class Tied(nn.Module):
    """Shares a module, ties a head to an embedding and skips by name."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.first = nn.Linear(8, 8)
        self.second = self.first
        self.gate = nn.Linear(8, 2)
        self.lm_head = nn.Linear(8, 10, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lm_head(self.second(self.first(self.embed(tokens))))


def test_replace_linear_keeps_parameters_and_sharing() -> None:
    model = Tied()
    before = dict(model.named_parameters())
    assert replace_linear(model) is model
    assert {name: id(p) for name, p in model.named_parameters()} == {
        name: id(p) for name, p in before.items()
    }
    assert isinstance(model.first, BitLinear)
    assert model.first is model.second
    assert type(model.lm_head) is nn.Linear
    assert model.lm_head.weight is model.embed.weight
    assert replace_linear(model) is model  # nothing left to replace
    packed = pack(copy.deepcopy(model))
    assert packed.first is packed.second
    tokens = torch.randint(0, 10, (2, 5))
    assert torch.equal(packed(tokens), model(tokens))


def test_replace_linear_skip_by_name_path_and_pattern() -> None:
    def kinds(skip: tuple[str, ...]) -> list[bool]:
        model = nn.Sequential(nn.Linear(4, 4), nn.ModuleDict({"gate": nn.Linear(4, 4)}))
        replace_linear(model, skip=skip)
        return [isinstance(m, BitLinear) for m in (model[0], model[1]["gate"])]

    assert kinds(("gate",)) == [True, False]
    assert kinds(("1.gate",)) == [True, False]
    assert kinds(("1.*",)) == [True, False]
    assert kinds(()) == [True, True]
    with pytest.raises(ValueError, match="no module is named 'gats'; the nearest is 'gate'"):
        kinds(("gats",))


def test_replace_linear_of_a_linear_and_with_options() -> None:
    linear = nn.Linear(4, 3, bias=False).eval()
    layer = replace_linear(linear, granularity="row", norm=True)
    assert isinstance(layer, BitLinear)
    assert layer.weight is linear.weight
    assert layer.bias is None
    assert not layer.training
    assert layer.granularity == "row"
    assert layer.rms_norm is not None
    assert layer.rms_norm.weight.device.type == "cpu"
    assert isinstance(pack(layer), TernaryLinear)


def encoder(nested: bool) -> nn.Module:
    torch.manual_seed(5)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)


def test_transformer_encoder_fast_path_is_off() -> None:
    """In eval mode nn.TransformerEncoderLayer reads linear1.weight past its forward: the outputs
    would silently be full precision."""
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    model = replace_linear(encoder(nested=True))
    kept = ~padding
    for mask in (None, padding):
        trained = model.train()(x, src_key_padding_mask=mask)
        with torch.no_grad():
            full = encoder(nested=False).eval()(x, src_key_padding_mask=mask)
            evaluated = model.eval()(x, src_key_padding_mask=mask)
            packed = pack(copy.deepcopy(model)).eval()(x, src_key_padding_mask=mask)
        # nn.MultiheadAttention (not replaced) has its own fused path, whose rounding may
        # move an activation by a code or two; full precision is much further away
        distance = (evaluated - trained)[kept].abs().max()
        assert distance < 0.1 * (full - trained)[kept].abs().max()
        assert torch.equal(packed, evaluated)


def test_pack_refuses_weights_that_are_not_finite() -> None:
    model = nn.Sequential(BitLinear(3, 3), BitLinear(3, 3))
    with torch.no_grad():
        model[1].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"1\.weight: holds NaN or infinity"):
        pack(model)


def test_pack_of_a_model_without_ternary_layers_says_why() -> None:
    with pytest.raises(ValueError, match=r"^model: no layer was packed: .* no BitLinear, but 1 Li"):
        pack(nn.Sequential(nn.Linear(3, 4), nn.ReLU()))
    with pytest.raises(ValueError, match=r"no BitLinear, but no weights; replace_linear\(\) makes"):
        pack(nn.ReLU())


def test_pack_of_a_packed_model_changes_nothing() -> None:
    model = nn.Sequential(BitLinear(3, 4), nn.Linear(4, 2))
    layer = pack(model)[0]
    assert isinstance(layer, TernaryLinear)
    assert pack(model) is model
    assert model[0] is layer
    assert pack(layer) is layer


def test_quantize_is_what_the_forward_uses() -> None:
    layer = BitLinear(9, 5, granularity="row")
    codes, gamma = layer.quantize()
    expected_codes, expected_gamma = absmean_ternary(layer.weight, "row")
    assert torch.equal(codes, expected_codes)
    assert torch.equal(gamma, expected_gamma)
    assert not gamma.requires_grad


def test_autocast_gives_the_same_packed_output() -> None:
    layer = BitLinear(40, 12)
    x = torch.randn(3, 40)
    with torch.autocast("cpu", torch.bfloat16):
        y, packed = layer(x), pack(copy.deepcopy(layer))(x)
    assert y.dtype == packed.dtype == torch.bfloat16
    assert torch.equal(y, packed)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own
def test_compile_without_graph_break() -> None:
    torch.manual_seed(0)
    layer = BitLinear(24, 8)
    x = torch.randn(5, 24, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y = compiled(x)
    assert torch.equal(y, layer(x))
    y.sum().backward()
    assert layer.weight.grad is not None
    assert bitnet_kernels.pack_ternary(layer.quantize()[0]).dtype == torch.uint8


def test_also_takes_one_class_and_refuses_what_is_no_linear_class() -> None:
    class Mine(nn.Linear):
        pass

    assert type(replace_linear(nn.Sequential(Mine(4, 4)), also=Mine)[0]) is BitLinear
    for wrong in ("Mine", [nn.Conv2d], [Mine(4, 4)]):
        with pytest.raises(TypeError, match=r"also: expected subclasses of nn\.Linear, got"):
            replace_linear(nn.Sequential(nn.Linear(4, 4)), also=wrong)


def test_skip_takes_one_name_and_any_name_of_a_shared_module() -> None:
    model = nn.Module()
    model.proj = model.lm_head = nn.Linear(3, 3)
    model.gate = nn.Linear(3, 3)
    replace_linear(model)
    assert type(model.proj) is nn.Linear
    assert type(model.gate) is BitLinear
    assert type(replace_linear(Tied(), skip="gate").gate) is nn.Linear


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_a_computed_weight_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.utils.weight_norm(nn.Linear(3, 3)))
    with pytest.raises(ValueError, match="1: its weight is computed by a hook"):
        replace_linear(model)


def test_ternary_linear_on_meta_and_under_another_default_dtype() -> None:
    assert TernaryLinear(70, 8, device="meta").packed.shape == (8, 32)
    torch.set_default_dtype(torch.bfloat16)
    try:
        layer = TernaryLinear(70, 8, bias=False)
    finally:
        torch.set_default_dtype(torch.float32)
    assert layer.scale.dtype == torch.float32
    assert torch.equal(layer.codes(), torch.zeros(8, 70, dtype=torch.int8))
    with pytest.raises(ValueError, match="granularity"):
        TernaryLinear(4, 4, granularity="rows")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="kernel"):
        TernaryLinear(4, 4, kernel="fast")  # type: ignore[arg-type]


def test_addsub_keeps_bit_planes_of_the_weights_it_has() -> None:
    """Made when weights are set, loaded or moved; not saved; none for the other kernels."""
    linear = BitLinear(70, 8)
    layer = TernaryLinear.from_bitlinear(linear, "addsub")
    assert layer.planes is not None
    assert torch.equal(layer.planes, bit_planes(layer.packed))
    assert set(layer.state_dict()) == {"packed", "scale", "bias"}
    assert f"weight_bytes={8 * 32 + 8 * 2 * 16}" in repr(layer)

    other = TernaryLinear(70, 8, kernel="addsub")
    assert other.planes is not None
    assert not other.planes.any()
    nn.Sequential(other).load_state_dict({f"0.{k}": v for k, v in layer.state_dict().items()})
    assert torch.equal(other.planes, layer.planes)
    meta = TernaryLinear(70, 8, device="meta", kernel="addsub")
    meta.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(meta.planes, layer.planes)
    assert copy.deepcopy(layer).to(torch.bfloat16).planes.dtype == torch.int32

    for kernel in ("auto", "dot", "reference"):
        assert TernaryLinear.from_bitlinear(linear, kernel).planes is None


def test_packed_layers_refuse_other_widths_and_group_scales_without_a_kernel() -> None:
    layer = TernaryLinear(200, 96)
    for width in (193, 199, 201, 256):
        with pytest.raises(ValueError, match=r"input: expected shape \[..., 200\]"):
            layer(torch.ones(2, width))
    with pytest.raises(ValueError, match=r"input: expected shape \[..., 200\]"):
        layer(torch.tensor(1.0))
    for kernel in ("addsub", "dot"):
        with pytest.raises(ValueError, match=f"kernel: '{kernel}' has no group-wise scales"):
            TernaryLinear(200, 96, granularity="group", kernel=kernel)  # type: ignore[arg-type]


def test_packing_does_not_lose_a_forward() -> None:
    """A subclass that overrides forward is refused by name; a parametrized layer is packed."""

    class Shifted(BitLinear):
        def forward(self, input: Any) -> Tensor:
            return super().forward(input) + 1

    with pytest.raises(ValueError, match=r"^1\.forward: Shifted overrides it"):
        pack(nn.Sequential(BitLinear(4, 4), Shifted(4, 4)))
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(BitLinear(4, 4)))
    x = torch.randn(3, 4)
    y = model(x)
    assert torch.equal(pack(model)(x), y)
    assert isinstance(model[0], TernaryLinear)


def test_a_model_without_weights() -> None:
    with pytest.raises(ValueError, match=r"^model: no layer was replaced; it has no weights$"):
        replace_linear(nn.ReLU())
