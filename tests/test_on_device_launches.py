"""Operators one after the other, without a wait: races, streams, compiled code."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from bitnet_kernels import (
    KERNELS,
    add_rmsnorm_quant,
    bit_planes,
    pack_ternary,
    quantized_linear,
    relu2_mul_rmsnorm_quant,
)
from tests.helpers.on_device import EPS, OWN_WARNINGS, all_equal, device, here, size

__all__ = ["device"]  # a fixture
pytestmark = OWN_WARNINGS


class Layer(NamedTuple):
    """An MLP of the kernels, which gives the same bits on every device."""

    norm: Tensor
    up: Tensor
    up_scale: Tensor
    up_planes: Tensor
    inner_norm: Tensor
    down: Tensor
    down_scale: Tensor
    down_planes: Tensor

    def to(self, device: torch.device) -> "Layer":
        return Layer(*(tensor.to(device) for tensor in self))

    def __call__(self, x: Tensor, kernel: str) -> tuple[Tensor, Tensor]:
        """Three times in a row; its output and the residual stream."""
        y, h = x, x
        for _ in range(3):
            *tokens, h = add_rmsnorm_quant(y, h, self.norm, EPS)
            up = (self.up, self.up_scale, None, kernel, self.up_planes, x.dtype)
            gate, up = quantized_linear(*tokens, *up).chunk(2, -1)
            tokens = relu2_mul_rmsnorm_quant(gate, up, self.inner_norm, EPS)
            down = (self.down, self.down_scale, None, kernel, self.down_planes, x.dtype)
            y = quantized_linear(*tokens, *down)
        return y, h


@cache
def sequence(m: int) -> tuple[Layer, list[Tensor], list[tuple[Tensor, Tensor]]]:
    """On the CPU: a layer, inputs of m tokens, and what it makes of them."""
    generator = torch.Generator().manual_seed(m)
    d, f = size((70, 96), (2560, 6912))  # 6912: gemm splits K

    def packed(n: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
        codes = torch.randint(-1, 2, (n, k), generator=generator, dtype=torch.int8)
        packed = pack_ternary(codes)
        return packed, torch.rand(n, generator=generator) * k**-0.5, bit_planes(packed)

    norms = (torch.rand(n, generator=generator) + 0.5 for n in (d, f))
    layer = Layer(next(norms), *packed(2 * f, d), next(norms), *packed(d, f))
    inputs = [torch.randn(m, d, generator=generator).bfloat16() for _ in range(4)]
    return layer, inputs, [layer(x, "reference") for x in inputs]


def recorded(device: torch.device, function: Callable[[], Any]) -> Callable[[], Any]:
    """The function; on a GPU as a CUDA graph, each replay of which overwrites what it returned."""
    if device.type != "cuda":
        return function
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = function()

    def replay() -> Any:
        graph.replay()
        return output

    return replay


ROUNDS = size(4, 100)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("m", size([3], [1, 5, 64]))
def test_launches_without_a_wait(device: torch.device, m: int, kernel: str) -> None:
    """A kernel that reads before its predecessor has written, or writes where another still reads,
    meets other numbers: inputs change with every round, and memory is used again. Launched one by
    one, then as a graph."""
    on_cpu, inputs, wants = sequence(m)
    layer, inputs = on_cpu.to(device), [x.to(device) for x in inputs]
    layer(inputs[0], here(kernel))  # compiled
    kept = [layer(inputs[i % 4], here(kernel)) for i in range(ROUNDS)]
    static = inputs[0].clone()
    replay = recorded(device, lambda: layer(static, here(kernel)))
    for i in range(ROUNDS):
        static.copy_(inputs[i % 4])
        kept.append(tuple(tensor.clone() for tensor in replay()))
    for i, got in enumerate(kept):
        assert all_equal(got, wants[i % ROUNDS % 4]), i


@pytest.mark.parametrize("kernel", ["auto", "addsub", "gemm"])
def test_two_streams(device: torch.device, kernel: str) -> None:
    on_cpu, inputs, wants = sequence(5)
    layer, inputs = on_cpu.to(device), [x.to(device) for x in inputs]
    layer(inputs[0], here(kernel))
    kept: list[list[Any]] = [[], []]
    contexts: list[AbstractContextManager[Any]] = [nullcontext(), nullcontext()]
    streams = [torch.cuda.Stream() for _ in range(2)] if device.type == "cuda" else []
    for which, stream in enumerate(streams):
        stream.wait_stream(torch.cuda.current_stream())
        contexts[which] = torch.cuda.stream(stream)
    for i in range(ROUNDS):
        for which in range(2):
            with contexts[which]:
                kept[which].append(layer(inputs[(i + which) % 4], here(kernel)))
    for stream in streams:
        torch.cuda.current_stream().wait_stream(stream)
    for which in range(2):
        for i, got in enumerate(kept[which]):
            assert all_equal(got, wants[(i + which) % 4]), (which, i)


def test_compiled_operators(device: torch.device) -> None:
    on_cpu, inputs, wants = sequence(5)
    layer = on_cpu.to(device)
    torch._dynamo.reset()
    function = torch.compile(
        lambda x: layer(x, "auto"), fullgraph=True, backend=size("aot_eager", "inductor")
    )
    for x, want in zip(inputs, wants, strict=True):
        assert all_equal(function(x.to(device)), want)
