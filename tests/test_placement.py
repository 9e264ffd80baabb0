"""Quantized layers that somebody puts into torch's transformer modules by hand."""

import copy
import io
from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.ao.nn.quantizable import MultiheadAttention

from bitnet import placement
from bitnet.linear import BitLinear, pack
from bitnet.modules import hooked
from bitnet.qat.adapters import LoRALinear
from bitnet.qat.nf4 import NF4Linear
from bitnet.qat.prepare import convert, prepare
from bitnet.qat.recipe import Recipe

RECIPE = Recipe(weights="int", bits=4, keep_first_last=False)
KINDS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "bitlinear": lambda linear: BitLinear(linear.in_features, linear.out_features),
    "ternary": lambda linear: pack(BitLinear(linear.in_features, linear.out_features)),
    "qat": lambda linear: prepare(linear, RECIPE),
    "integer": lambda linear: convert(prepare(linear, RECIPE)),
    "nf4": NF4Linear,
    "lora": lambda linear: LoRALinear(linear, 2, 2.0),
}
PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])


def encoder_layer() -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)


def quantize(layer: nn.TransformerEncoderLayer, kind: str) -> None:
    layer._modules["linear1"] = KINDS[kind](layer.linear1)  # as libraries do it
    layer.add_module("linear2", KINDS[kind](layer.linear2))


def by_hand(layer: nn.TransformerEncoderLayer, x: Tensor) -> Tensor:
    """The layer as its paper has it, from the calls of its parts."""
    attended, _ = layer.self_attn(x, x, x, need_weights=False)
    x = layer.norm1(x + attended)
    return layer.norm2(x + layer.linear2(torch.relu(layer.linear1(x))))


@pytest.mark.parametrize("kind", KINDS)
def test_an_encoder_layer_calls_what_is_put_into_it(kind: str) -> None:
    layer = encoder_layer().eval()
    quantize(layer, kind)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        expected = by_hand(layer, x)
        for model in (layer, copy.deepcopy(layer), torch.load(buffer, weights_only=False)):
            assert torch.equal(model.eval()(x), expected)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own
def test_a_compiled_encoder_layer_calls_what_is_put_into_it() -> None:
    layer = encoder_layer().eval()
    layer.linear1 = BitLinear(16, 32)
    nn.init.zeros_(layer.self_attn.out_proj.weight)  # compiled, attention rounds in another way
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), by_hand(layer, x))


def test_an_encoder_layer_calls_one_that_was_pickled_without_the_mark() -> None:
    layer = encoder_layer().eval()
    linear = BitLinear(16, 32)
    state = linear.__getstate__() | {"_forward_pre_hooks": OrderedDict()}
    pickled = BitLinear.__new__(BitLinear)
    pickled.__setstate__(state)
    layer._modules["linear1"] = pickled  # so that only the mark protects it
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        assert torch.equal(layer(x), by_hand(layer, x))


def test_the_check_of_the_fused_path_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """The installed torch has the fused path; where a remedy loses its effect, placing raises."""
    assert not placement._is_called(hook=False, flag=False)
    state = torch.get_rng_state()
    placement._check_fused_path()
    assert torch.equal(torch.get_rng_state(), state)
    encoder_layer().linear1 = BitLinear(16, 32)
    for owner, name, broken, message in (
        (placement._CallMe, "__len__", lambda _: 0, "a forward hook"),
        (
            nn.TransformerEncoderLayer,
            "activation_relu_or_gelu",
            property(lambda _: 1, none),
            "gelu",
        ),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, broken, raising=False)
            with pytest.raises(RuntimeError, match=f"bypasses a layer despite .*{message}"):
                encoder_layer().linear1 = BitLinear(16, 32)


def none(*_: object) -> None:
    """Ignore an assignment."""


@pytest.mark.parametrize("kind", KINDS)
def test_the_mark_is_no_hook(kind: str) -> None:
    """A layer counts as hooked, and pays for hooks, only where somebody else has added one."""
    layer = KINDS[kind](nn.Linear(8, 8))
    assert not hooked(layer)
    ran: list[nn.Module] = []
    layer._forward_pre_hooks[placement.IDLE_HOOK] = lambda module, _: ran.append(module)
    layer(torch.randn(2, 8))
    assert not ran
    layer._forward_pre_hooks[placement.IDLE_HOOK] = placement._does_nothing
    seen: list[nn.Module] = []
    handle = copy.deepcopy(layer).register_forward_pre_hook(lambda module, _: seen.append(module))
    assert not hooked(layer)
    handle.remove()
    handle = layer.register_forward_pre_hook(lambda module, _: seen.append(module))
    layer(torch.randn(2, 8))
    assert seen == [layer]
    assert hooked(layer)
    handle.remove()
    assert not hooked(layer)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")  # torch's own
def test_an_encoder_takes_a_padded_batch(kind: str) -> None:
    """With nested tensors, which the encoder makes where its layers were replaced afterwards."""
    encoder = nn.TransformerEncoder(encoder_layer(), 1).eval()
    quantize(encoder.layers[0], kind)
    encoder.requires_grad_(False)
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        y = encoder(x, src_key_padding_mask=PADDING)
        for sample, padding, output in zip(x, PADDING, y, strict=True):
            part = sample[~padding].unsqueeze(0)
            expected = by_hand(encoder.layers[0], part)[0]
            # attention of a padded batch is another kernel, whose rounding may move a code or two
            assert (output[~padding] - expected).abs().mean() < 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_the_projection_of_an_attention_is_refused(kind: str) -> None:
    attention = nn.MultiheadAttention(8, 2)
    layer = KINDS[kind](nn.Linear(8, 8))
    for place in (
        lambda: setattr(attention, "out_proj", layer),
        lambda: attention.add_module("out_proj", layer),
    ):
        with pytest.raises(ValueError, match=r"out_proj: nn\.MultiheadAttention .* never calls it"):
            place()
    assert isinstance(attention.out_proj, nn.Linear)


def test_an_attention_that_calls_its_projection_may_have_one() -> None:
    attention = MultiheadAttention(8, 2)
    attention.out_proj = BitLinear(8, 8)
    x = torch.randn(3, 2, 8)
    assert attention(x, x, x)[0].shape == x.shape
    assert attention.out_proj.called
