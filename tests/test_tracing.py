"""What torch.jit.trace and torch.export make of a layer takes other batch sizes, as nn.Linear's."""

import copy
import io
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from bitnet.linear import BitLinear, pack
from bitnet.qat.prepare import calibrate, convert, prepare
from bitnet.qat.recipe import ActivationQuantizer, Recipe

# Checks of shapes, which a trace does not hold; and torch.jit's own notice.
TRACES = pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.*:DeprecationWarning"
)


def both(module: nn.Module, x: Tensor, recipe: Recipe) -> Iterator[nn.Module]:
    """The QAT layer and its integer form."""
    layer = prepare(module, recipe)
    calibrate(layer, [x])
    yield layer.eval()
    yield convert(copy.deepcopy(layer))


def linear_layers() -> Iterator[nn.Module]:
    yield nn.Linear(8, 5)
    for granularity in ("tensor", "row", "group"):
        layer = BitLinear(8, 5, granularity=granularity, group_size=3, norm=granularity == "row")
        yield layer
        yield pack(copy.deepcopy(layer))
    activations: list[ActivationQuantizer] = ["none", "absmax", "static"]
    for kind in activations:
        recipe = Recipe(
            weights="int",
            granularity="group",
            group_size=3,
            symmetric=False,
            activations=kind,
            keep_first_last=False,
        )
        yield from both(nn.Linear(8, 5), torch.randn(4, 8), recipe)
    recipe = Recipe(weights="lsq", granularity="row", keep_first_last=False)
    yield from both(nn.Linear(8, 5), torch.randn(4, 8), recipe)


def convolutions() -> Iterator[nn.Module]:
    activations: list[ActivationQuantizer] = ["none", "absmax", "static"]
    for kind in activations:
        recipe = Recipe(weights="int", activations=kind, modules=["conv2d"], keep_first_last=False)
        yield from both(nn.Conv2d(4, 6, 3, 2, 1, groups=2), torch.randn(2, 4, 5, 6), recipe)


def embeddings() -> Iterator[nn.Module]:
    recipe = Recipe(weights="int", granularity="row", modules=["embedding"], keep_first_last=False)
    yield from both(nn.Embedding(9, 5), torch.tensor([1]), recipe)


def inputs(kind: str) -> list[Tensor]:
    """The first is traced with, the others run."""
    if kind == "conv":
        return [torch.randn(shape) for shape in ((2, 4, 5, 6), (7, 4, 5, 6), (1, 4, 9, 8))]
    if kind == "embedding":
        return [torch.randint(9, shape) for shape in ((2, 3), (5, 3), (1, 4))]
    if kind == "3-d":
        return [
            torch.randn(shape) for shape in ((2, 3, 8), (7, 5, 8), (5, 3, 8), (1, 1, 8), (0, 3, 8))
        ]
    return [torch.randn(shape) for shape in ((3, 8), (7, 8), (1, 8), (0, 8))]


LAYERS = {"2-d": linear_layers, "3-d": linear_layers, "conv": convolutions, "embedding": embeddings}


@TRACES
@pytest.mark.parametrize("kind", LAYERS)
def test_traced(kind: str) -> None:
    example, *others = inputs(kind)
    for layer in LAYERS[kind]():
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                traced = torch.jit.trace(layer, (example,), check_trace=False)
                for x in (example, *others):
                    assert torch.equal(traced(x), layer(x)), (layer, x.shape)


@pytest.mark.slow
@pytest.mark.parametrize("kind", LAYERS)
def test_exported(kind: str) -> None:
    for layer in LAYERS[kind]():
        check_export(layer, *inputs(kind))


def test_exported_quickly() -> None:
    """A layer of each kind of those above."""
    static = Recipe(weights="int", activations="static", keep_first_last=False)
    quantized = both(nn.Linear(8, 5), torch.randn(4, 8), static)
    for layer in (BitLinear(8, 5), *quantized):
        check_export(layer, *inputs("3-d"))


def check_export(layer: nn.Module, example: Tensor, *others: Tensor) -> None:
    """By default (not strict), with a dynamic batch dimension."""
    batch = torch.export.Dim("batch", max=64)
    program = torch.export.export(layer, (example,), dynamic_shapes=({0: batch},)).module()
    for x in (example, *others):
        if x.shape[1:] == example.shape[1:] and len(x):
            assert torch.equal(program(x), layer(x)), (layer, x.shape)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own
def test_exported_strictly_with_two_dynamic_dimensions() -> None:
    example, *others = inputs("3-d")
    dims = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("time", max=64)}
    recipe = Recipe(weights="int", keep_first_last=False)
    for layer in (BitLinear(8, 5), *both(nn.Linear(8, 5), torch.randn(4, 8), recipe)):
        exported = torch.export.export(layer, (example,), dynamic_shapes=(dims,), strict=True)
        for x in (example, others[0]):
            assert torch.equal(exported.module()(x), layer(x))


@TRACES
def test_a_traced_layer_trains_with_another_batch() -> None:
    layer = BitLinear(8, 5)
    traced = torch.jit.trace(layer, (torch.randn(3, 8),), check_trace=False)
    x = torch.randn(7, 8)
    gradients = [
        torch.autograd.grad(model(x).square().sum(), list(layer.parameters()))
        for model in (layer, traced)
    ]
    assert all(map(torch.equal, *gradients))


@TRACES
def test_traces_of_packed_and_integer_layers_can_be_saved() -> None:
    recipe = Recipe(weights="int", modules=["linear", "conv2d"], keep_first_last=False)
    conv = nn.Conv2d(4, 6, 3)
    cases = [
        (pack(BitLinear(8, 5)), torch.randn(3, 8), torch.randn(7, 8)),
        (convert(prepare(nn.Linear(8, 5), recipe)), torch.randn(3, 8), torch.randn(7, 8)),
        (convert(prepare(conv, recipe)), torch.randn(2, 4, 5, 5), torch.randn(1, 4, 6, 9)),
    ]
    for layer, example, other in cases:
        buffer = io.BytesIO()
        torch.jit.save(torch.jit.trace(layer, example), buffer)  # type: ignore[no-untyped-call]
        buffer.seek(0)
        assert torch.equal(torch.jit.load(buffer)(other), layer(other))  # type: ignore[no-untyped-call]
