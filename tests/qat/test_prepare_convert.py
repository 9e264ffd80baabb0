"""convert: whole models to the bit, on the meta device, and what it refuses."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitnet.linear import BitLinear
from bitnet.model import ModelConfig, Transformer
from bitnet.qat.adapters import AdapterConfig, add_adapters, merge_adapters
from bitnet.qat.integer import IntConv1d, IntConv2d, IntEmbedding, IntLayer, IntLinear
from bitnet.qat.layers import QATConv1d, QATConv2d, QATLayer, QATLinear
from bitnet.qat.prepare import (
    convert,
    prepare,
    with_bitlinears,
)
from bitnet.qat.recipe import Recipe
from tests.helpers.qat_net import EVERYTHING, Net, ids, kinds


@pytest.mark.parametrize("base", ["lora", "qlora"])
def test_adapters_are_merged_before_conversion(base: Any) -> None:
    model = prepare(Net(), Recipe(weights="int", modules=["linear"], include=["mlp.0"]))
    target = "mlp.0" if base == "lora" else "mlp.2"
    add_adapters(model, AdapterConfig(kind=base, rank=2, targets=[target]))
    with pytest.raises(ValueError, match=rf"{target}: has an adapter; merge_adapters\(\) first"):
        convert(model)
    assert isinstance(model.get_submodule("mlp.0.base" if base == "lora" else "mlp.0"), QATLinear)
    merge_adapters(model)
    assert isinstance(convert(model).get_submodule("mlp.0"), IntLinear)


@pytest.mark.parametrize("activations", ["none", "absmax", "static"])
@pytest.mark.parametrize("weights", ["int", "absmean", "lsq"])
def test_whole_models_convert_to_the_bit(weights: Any, activations: Any) -> None:
    recipe = Recipe(weights=weights, activations=activations, modules=EVERYTHING)  # type: ignore[arg-type]
    model = prepare(Net(), recipe)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    losses = []
    for step in range(30):
        loss = F.cross_entropy(model(ids(step % 3)), ids(step % 3)[:, 0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-3:]) < sum(losses[:3])
    model.eval()
    y = model(ids(9))
    assert torch.equal(convert(model)(ids(9)), y)
    found = {kind for kind in kinds(model).values() if kind.startswith(("Int", "Ternary"))}
    ternary = weights == "absmean" and activations == "absmax"
    assert found == {"IntConv1d", "IntConv2d", "TernaryLinear" if ternary else "IntLinear"}
    with pytest.raises(ValueError, match="model: is converted already"):
        convert(model)


@pytest.mark.parametrize("weights", ["int", "absmean", "sign", "lsq", "seq"])
@pytest.mark.parametrize("activations", ["none", "absmax", "static"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_structure_on_the_meta_device(weights: Any, activations: Any, symmetric: bool) -> None:
    """Names, shapes and dtypes as of the real model, whose tensors it loads."""
    recipe = Recipe(
        weights=weights,
        activations=activations,
        symmetric=symmetric,
        activation_symmetric=symmetric,
        granularity="group",
        group_size=5,
        modules=EVERYTHING,  # type: ignore[arg-type]
        keep_first_last=False,
    )
    real = prepare(Net(), recipe)
    real(ids())
    real.eval()
    with torch.device("meta"):
        structure = Net()
    prepare(structure, recipe)
    for _ in range(2):
        expected, found = real.state_dict(), structure.state_dict()
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].is_meta, name
            assert (found[name].shape, found[name].dtype) == (tensor.shape, tensor.dtype), name
        loaded = copy.deepcopy(structure)
        loaded.load_state_dict(expected, assign=True)
        assert torch.equal(loaded.eval()(ids()), real(ids()))
        if isinstance(real.get_submodule("conv1"), QATLayer):
            real, structure = convert(real), convert(structure)


def test_convert_names_the_layer_that_is_wrong() -> None:
    with pytest.raises(ValueError, match="model: is not prepared"):
        convert(Net())
    model = prepare(Net(), Recipe(weights="int"))
    with torch.no_grad():
        model.mlp[2].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"mlp.2.weight: holds NaN or infinity"):
        convert(model)
    assert isinstance(model.conv1, QATConv1d)  # nothing was replaced
    model = prepare(Net(), Recipe(weights="absmean"))
    with torch.no_grad():
        model.mlp[2].weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"mlp.2.weight: holds NaN or infinity"):
        convert(model)
    model = prepare(Net(), Recipe(weights="int", activations="static"))
    with pytest.raises(ValueError, match=r"conv1.input_observer: has seen no input; run calibrate"):
        convert(model)


def test_transformer_and_its_twin_of_bitlinears() -> None:
    torch.manual_seed(1)
    config = ModelConfig(
        vocab_size=40, d_model=16, n_layers=2, n_heads=2, d_ff=32, max_seq_len=16, linear="fp"
    )
    model = Transformer(config)
    recipe = Recipe(weights="absmean", granularity="tensor", modules=["linear"])
    prepared = prepare(copy.deepcopy(model), recipe)
    twin = with_bitlinears(prepared)
    assert twin is not None
    layers = [m for m in prepared.modules() if isinstance(m, QATLinear)]
    assert sum(isinstance(m, BitLinear) for m in twin.modules()) == len(layers) == 14
    for (name, a), (_, b) in zip(prepared.named_parameters(), twin.named_parameters(), strict=True):
        assert a is b, name
    assert isinstance(prepared.get_submodule("layers.0.mlp.up_proj"), QATLinear)
    tokens = torch.randint(0, 40, (2, 9))
    y = prepared.eval()(tokens)
    assert torch.equal(twin.eval()(tokens), y)
    assert torch.equal(convert(prepared)(tokens), y)
    assert with_bitlinears(model) is None
    assert with_bitlinears(prepare(copy.deepcopy(model), Recipe(weights="int"))) is None
    assert with_bitlinears(prepare(Net(), Recipe(weights="absmean"))) is None


def test_degenerate_layers() -> None:
    """All-zero weights, a constant channel, one input feature."""
    for weights in ("int", "absmean", "sign", "lsq", "seq"):
        for symmetric in (True, False):
            model = nn.Sequential(nn.Linear(1, 3), nn.Linear(3, 4), nn.Linear(4, 1))
            with torch.no_grad():
                model[0].weight.fill_(0.3)
                model[1].weight.zero_()
                model[2].weight[0, 1:] = model[2].weight[0, 0]
            recipe = Recipe(weights=weights, symmetric=symmetric, keep_first_last=False)  # type: ignore[arg-type]
            prepare(model, recipe)
            x = torch.randn(5, 1)
            y = model(x)
            assert y.isfinite().all()
            assert torch.equal(convert(model)(x), y)


def test_every_kind_of_layer_converts() -> None:
    recipe = Recipe(weights="int", modules=EVERYTHING, keep_first_last=False)  # type: ignore[arg-type]
    model = prepare(Net(), recipe)
    assert isinstance(model.get_submodule("conv2"), QATConv2d)
    convert(model)
    expected = {"embed": IntEmbedding, "conv1": IntConv1d, "conv2": IntConv2d, "head": IntLinear}
    for name, kind in expected.items():
        assert type(model.get_submodule(name)) is kind


@pytest.mark.parametrize("kind", ["linear", "conv1d", "embedding"])
def test_parametrized_layers_are_converted(kind: Any) -> None:
    recipe = Recipe(weights="int", bits=4, modules=[kind], keep_first_last=False)
    layers = {
        "linear": nn.Linear(8, 4),
        "conv1d": nn.Conv1d(8, 4, 1),
        "embedding": nn.Embedding(9, 8),
    }
    model = prepare(nn.Sequential(layers[kind]), recipe).eval()
    nn.utils.parametrizations.weight_norm(model[0])  # type: ignore[index]
    x = torch.tensor([[1, 7]]) if kind == "embedding" else torch.randn(2, 8, 8)
    y = model(x)
    assert torch.equal(convert(model)(x), y)
    assert isinstance(model[0], IntLayer)  # type: ignore[index]


def test_conversion_does_not_lose_a_forward() -> None:
    class Shifted(QATLinear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + 1

    layer = Shifted.from_float(nn.Linear(4, 4), Recipe(weights="int"))
    with pytest.raises(ValueError, match=r"^0\.forward: Shifted overrides it"):
        convert(nn.Sequential(layer))
