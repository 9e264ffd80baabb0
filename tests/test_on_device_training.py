"""Training on the device that is here: held codes, autocast, compiled steps."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from bitnet.linear import BitLinear, pack, weights_quantized
from bitnet.model import Transformer
from tests.helpers.on_device import OWN_WARNINGS, device, size
from tests.helpers.small_training import assert_same, plain_path, small

__all__ = ["device"]  # a fixture
pytestmark = OWN_WARNINGS


TRAINED = size(
    {},
    {"d_model": 256, "d_ff": 700, "vocab_size": 1000, "max_seq_len": 128},
)
Wrap = Callable[[Transformer], Callable[[Tensor, Tensor], Tensor]]


def trained(
    device: torch.device,
    steps: int = 3,
    *,
    once: bool = True,
    wrap: Wrap = lambda model: model,
    change: Callable[[Transformer], None] = lambda model: None,
    **options: Any,
) -> tuple[list[Tensor], list[Tensor]]:
    """Losses, and gradients, of optimizer steps of two micro-batches, as in train.py. ``once``:
    weights and shared inputs are quantized once a step."""
    model = small(**(TRAINED | options)).to(device)
    change(model)
    torch.manual_seed(1)
    vocab_size, length = model.config.vocab_size, model.config.max_seq_len
    forward = wrap(model)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses, gradients = [], []
    for step in range(steps):
        with weights_quantized(model) if once else plain_path():
            for micro in range(2):
                generator = torch.Generator().manual_seed(2 * step + micro)
                tokens = torch.randint(vocab_size, (2, length + 1), generator=generator).to(device)
                loss = forward(tokens[:, :-1], tokens[:, 1:])
                (loss / 2).backward()
                losses.append(loss.detach())
        gradients += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        optimizer.step()
        optimizer.zero_grad()
    return losses, gradients


def distance(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Of all gradients together, relative."""
    a, b = (torch.cat([t.cpu().double().flatten() for t in one]) for one in (ours, theirs))
    return float((a - b).norm() / b.norm())


def in_order() -> AbstractContextManager[None]:
    """Attention by plain products, whose backward adds in one order on a GPU too."""
    return sdpa_kernel(SDPBackend.MATH)


@pytest.mark.parametrize(
    "options",
    [{}, {"granularity": "row", "activation": "silu"}, {"granularity": "group", "group_size": 16}],
    ids=str,
)
def test_quantized_once_is_quantized_every_time(
    device: torch.device, options: dict[str, Any]
) -> None:
    with in_order():
        once, plain = trained(device, **options), trained(device, once=False, **options)
    assert_same(once[0] + once[1], plain[0] + plain[1])
    assert all(value.any() for value in once[1])


def test_first_step_is_the_cpus(device: torch.device) -> None:
    """Sums in another order are off by 1e-6, which moves about one int8 code in 10^4 by one, of
    127: a token's logits, 0.3 at the start, by 1e-3 of themselves, and the mean loss by less."""
    losses, gradients = trained(device, 1)
    cpu_losses, cpu_gradients = trained(torch.device("cpu"), 1)
    for ours, theirs in zip(losses, cpu_losses, strict=True):
        assert float(ours) == pytest.approx(float(theirs), abs=3e-4)
    assert distance(gradients, cpu_gradients) < 2e-2


@pytest.mark.parametrize("int8_backward", ["input", "both"])
def test_int8_backward(device: torch.device, int8_backward: str) -> None:
    """The forward does not change; gradients are noisy, and the seed's."""
    with in_order():
        exact = trained(device, 1)
        ours, again = (trained(device, 1, int8_backward=int8_backward) for _ in range(2))
    assert_same(ours[0], exact[0])
    assert_same(ours[1], again[1])
    assert 0 < distance(ours[1], exact[1]) < 0.1
    losses, gradients = trained(device, 3, int8_backward=int8_backward)
    assert all(value.isfinite().all() for value in losses + gradients)


@pytest.mark.parametrize("int8_backward", ["none", "both"])
def test_bf16_autocast(device: torch.device, int8_backward: str) -> None:
    """Logits of 8 bits: 2^-8 of a loss of 4 to 7."""
    with torch.autocast(device.type, torch.bfloat16):
        losses, gradients = trained(device, 3, int8_backward=int8_backward)
    assert all(value.isfinite().all() for value in losses + gradients)
    for ours, theirs in zip(losses[:2], trained(device, 1)[0], strict=True):
        assert float(ours) == pytest.approx(float(theirs), abs=2e-2)


@pytest.mark.parametrize("int8_backward", ["none", "both"])
def test_compiled_step(device: torch.device, int8_backward: str) -> None:
    """Forward and loss as one graph, as train.py compiles it. 1e-5 until an int8 code moves by one
    (test_first_step_is_the_cpus); a GPU's compiler divides approximately, which moves some."""
    torch._dynamo.reset()
    compiled = partial(torch.compile, fullgraph=True, backend=size("aot_eager", "inductor"))
    options = {"int8_backward": int8_backward, "n_layers": size(1, 2)}
    losses, gradients = trained(device, wrap=compiled, **options)
    assert all(value.isfinite().all() for value in losses + gradients)
    exact, exact_gradients = trained(device, 1, **options)
    for ours, theirs in zip(losses[:2], exact, strict=True):
        assert float(ours) == pytest.approx(float(theirs), abs=size(1e-5, 1e-4))
    noise = 2e-2 if int8_backward == "none" else 0.2
    assert distance(gradients[: len(exact_gradients)], exact_gradients) < noise


def test_activations_computed_again(device: torch.device) -> None:
    def recompute(model: Transformer) -> None:
        for layer in model.layers:
            inner = layer.forward
            layer.forward = lambda *args, inner=inner: checkpoint(  # type: ignore[method-assign]
                inner, *args, use_reentrant=False
            )

    with in_order():
        kept, again = trained(device), trained(device, change=recompute)
    assert_same(kept[0] + kept[1], again[0] + again[1])


@torch.no_grad()
def test_packed_is_trained(device: torch.device) -> None:
    """To the last bit, by every family of kernels."""
    tokens = torch.randint(50, (3, 16), device=device)
    want = small(**TRAINED).to(device)(tokens)
    for kernel in ("auto", "addsub", "dot", "reference"):
        model = pack(small(**TRAINED).to(device), kernel=size("auto", kernel))
        assert torch.equal(model(tokens), want), kernel


def test_a_layers_bad_and_missing_tokens(device: torch.device) -> None:
    """A token with NaN spoils its own outputs and its gradient's row; no token, no gradient."""
    layer: nn.Module = BitLinear(70, 33).to(device)
    x = torch.randn(5, 70, device=device)
    want = layer(x)
    x[2, 3] = torch.nan
    bad = F.pad(torch.ones(1, 33, dtype=torch.bool), (0, 0, 2, 2)).to(device)
    y = layer(x)
    assert torch.equal(y.isnan(), bad)
    assert torch.equal(y[~bad], want[~bad])
    none = torch.randn(2, 0, 70, device=device, requires_grad=True)
    layer(none).sum().backward()
    for parameter in layer.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()
