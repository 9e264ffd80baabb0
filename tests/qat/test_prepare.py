"""prepare: which layers it selects, what it keeps and refuses."""

from typing import Any

import pytest
import torch
from torch import nn

from bitnet.linear import BitLinear, pack, replace_linear
from bitnet.qat.integer import IntLinear
from bitnet.qat.layers import QATEmbedding, QATLayer, QATLinear
from bitnet.qat.prepare import convert, prepare
from bitnet.qat.recipe import Recipe
from tests.helpers.qat_net import EVERYTHING, Net, kinds


def test_which_layers_are_selected() -> None:
    assert kinds(prepare(Net(), Recipe(weights="int"))) == {
        "embed": "Embedding",
        "conv1": "QATConv1d",
        "conv2": "QATConv2d",
        "mlp.0": "QATLinear",
        "mlp.2": "QATLinear",
        "head": "Linear",
    }
    model = prepare(Net(), Recipe(weights="int", modules=EVERYTHING, keep_first_last=False))  # type: ignore[arg-type]
    assert set(kinds(model).values()) == {"QATEmbedding", "QATConv1d", "QATConv2d", "QATLinear"}
    model = prepare(Net(), Recipe(weights="int", modules=["linear"], include=["mlp.*"]))
    assert [n for n, kind in kinds(model).items() if kind[:3] == "QAT"] == ["mlp.0", "mlp.2"]
    model = prepare(Net(), Recipe(weights="int", skip=["conv?", "mlp.0", "head"]))
    assert [n for n, kind in kinds(model).items() if kind[:3] == "QAT"] == ["mlp.2"]


def test_parameters_modes_and_sharing_are_kept() -> None:
    model = Net()
    model.again = model.mlp  # type: ignore[assignment]
    model.mlp[2].eval()
    before = dict(model.named_parameters())
    prepared = prepare(model, Recipe(weights="int", keep_first_last=False))
    assert prepared is model
    after = dict(prepared.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)
    assert model.again is model.mlp
    assert isinstance(model.mlp[2], QATLinear)
    assert not model.mlp[2].training
    assert model.mlp[0].training
    assert prepared.state_dict().keys() == {*Net().state_dict(), *model.state_dict()}


def test_a_layer_itself() -> None:
    linear = nn.Linear(4, 3)
    recipe = Recipe(weights="int", keep_first_last=False)
    layer = prepare(linear, recipe)
    assert isinstance(layer, QATLinear)
    assert layer.weight is linear.weight
    assert isinstance(convert(layer), IntLinear)
    with pytest.raises(ValueError, match=r"selects none of the model's 1 .*keep_first_last"):
        prepare(nn.Linear(4, 3), Recipe(weights="int"))


def test_tied_weights_stay_tied_and_share_their_step() -> None:
    model = nn.ModuleDict(
        {"embed": nn.Embedding(10, 4), "mid": nn.Linear(4, 4), "head": nn.Linear(4, 10, bias=False)}
    )
    model["head"].weight = model["embed"].weight
    recipe = Recipe(weights="lsq", modules=["linear", "embedding"], keep_first_last=False)
    prepare(model, recipe)
    embed, head = model["embed"], model["head"]
    assert isinstance(embed, QATEmbedding)
    assert isinstance(head, QATLinear)
    assert embed.weight is head.weight
    assert embed.weight_step is head.weight_step
    assert len(list(model.parameters())) == 1 + 1 + 3
    convert(model)
    codes, scale, _ = model["embed"].quantize()
    assert torch.equal(model["head"].quantize()[0], codes)
    assert torch.equal(model["head"].quantize()[1], scale)


@pytest.mark.parametrize("key", ["include", "skip"])
def test_unknown_patterns_name_the_nearest_module(key: str) -> None:
    options: dict[str, Any] = {key: ["mpl.0"]}
    with pytest.raises(ValueError, match=rf"{key}: no module is named 'mpl.0'; the nearest is"):
        prepare(Net(), Recipe(weights="int", **options))


def test_prepare_refuses() -> None:
    recipe = Recipe(weights="int")
    with pytest.raises(ValueError, match='weights = "none" quantizes nothing'):
        prepare(Net(), Recipe())
    model = prepare(Net(), recipe)
    with pytest.raises(ValueError, match="already quantized: conv1 is a QATConv1d"):
        prepare(model, recipe)
    with pytest.raises(ValueError, match="already quantized: conv1 is a IntConv1d"):
        prepare(convert(model), recipe)
    with pytest.raises(ValueError, match=r"already quantized: mlp.0 is a TernaryLinear"):
        prepare(pack(replace_linear(Net())), recipe)
    model = Net()
    model.conv2 = nn.Conv2d(1, 4, 3, padding=1, padding_mode="circular")
    with pytest.raises(ValueError, match="conv2: padding_mode: only 'zeros'"):
        prepare(model, recipe)
    assert type(model.conv1) is nn.Conv1d  # nothing was replaced
    normed = Net()
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(normed.mlp[0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"mlp.0: its weight is computed by a hook"):
        prepare(normed, recipe)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_parametrized_layers_are_refused_not_left_out(name: str) -> None:
    """torch makes them instances of a subclass, which selection by exact type would not see."""
    recipe = Recipe(weights="int")
    model = Net()
    nn.utils.parametrizations.weight_norm(model.mlp[0], name)
    assert type(model.mlp[0]) is not nn.Linear
    with pytest.raises(ValueError, match=rf"mlp.0: its {name} is computed by a hook"):
        prepare(model, recipe)
    prepare(model, Recipe(weights="int", skip=["mlp.0"]))
    model = Net()
    nn.utils.parametrizations.weight_norm(model.head)
    prepare(model, recipe)  # stays in full precision in any case
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3), name))
    with pytest.raises(ValueError, match=rf"0: its {name} is computed by a hook"):
        replace_linear(model)


def test_patterns_match_whole_paths_or_own_names() -> None:
    """A pattern that would skip nothing is no silent success."""
    model = nn.ModuleDict({"block": nn.ModuleDict({"q_proj": nn.Linear(3, 3)})})
    model["o_proj"] = nn.Linear(3, 3)
    recipe = Recipe(weights="int", skip=["q_*"], keep_first_last=False)
    for change in (lambda: replace_linear(model, skip="q_*"), lambda: prepare(model, recipe)):
        with pytest.raises(ValueError, match=r"skip: no module is named 'q_\*'"):
            change()
    replace_linear(model, skip="*.q_*")
    assert type(model.get_submodule("block.q_proj")) is nn.Linear


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"include": ["mlp.0", "head"]}, "'head' selects nothing: head is the first or last layer"),
        (
            {"include": ["mlp.0", "emb*"]},
            r"'emb\*' selects nothing: embed is a Embedding, which mod",
        ),
        ({"include": ["conv?", "mlp.*"], "modules": ["conv1d", "conv2d"]}, "mlp.0 is a Linear, wh"),
        ({"include": ["mlp.0", "mlp.2"], "skip": ["mlp.2"]}, "'mlp.2' .*: mlp.2 is in skip"),
        ({"include": ["mlp.0", "norm"]}, "'norm' selects nothing: norm is a LayerNorm"),
        ({"include": ["mlp"]}, "'mlp' selects nothing: mlp is a Sequential"),
        ({"include": ["con*", "co"]}, "include: no module is named 'co'"),
    ],
)
def test_every_include_pattern_selects_something(options: dict[str, Any], why: str) -> None:
    model = Net()
    with pytest.raises(ValueError, match=why):
        prepare(model, Recipe(weights="int", **options))
    assert not any(isinstance(module, QATLayer) for module in model.modules())


def test_the_last_layer_may_be_the_first() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.Linear(4, 4), nn.Linear(4, 4), shared)
    prepare(model, Recipe(weights="int"))
    assert [type(m) for m in model] == [nn.Linear, QATLinear, QATLinear, nn.Linear]


@pytest.mark.parametrize("weights", ["int", "absmean", "sign", "lsq", "seq"])
def test_empty_weights_are_refused(weights: Any) -> None:
    for shape in ((0, 3), (3, 0)):
        with pytest.warns(UserWarning, match="zero-element"):
            empty = nn.Linear(*shape)
        model = nn.Sequential(nn.Linear(3, 3), empty, nn.Linear(3, 3))
        with pytest.raises(ValueError, match=r"1: its weight \[\d, \d\] is empty; skip the layer"):
            prepare(model, Recipe(weights=weights))
        assert type(model[1]) is nn.Linear


def test_subclasses_and_attention_are_left_alone() -> None:
    class Mine(nn.Linear):
        pass

    model = nn.Sequential(Mine(4, 4), BitLinear(4, 4), nn.Linear(4, 4), Mine(4, 4))
    prepare(model, Recipe(weights="int"))
    assert [type(m) for m in model] == [Mine, BitLinear, QATLinear, Mine]
    attention = nn.MultiheadAttention(8, 2)
    with pytest.raises(ValueError, match="selects none"):
        prepare(attention, Recipe(weights="int", keep_first_last=False))


def test_transformer_encoder_does_not_read_past_the_forward() -> None:
    """Its fused inference path would take the float weights and skip the quantization."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    x = torch.randn(2, 5, 8)
    recipe = Recipe(weights="int", bits=2, keep_first_last=False)
    prepare(model, recipe)
    trained = model(x)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(x), trained, rtol=1e-5, atol=1e-6)
        y = model(x)
        assert torch.equal(convert(model)(x), y)
