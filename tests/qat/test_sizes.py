"""Bytes before and after conversion, counted by hand."""

from torch import nn

from bitnet.linear import TernaryLinear
from bitnet.qat.prepare import convert, prepare
from bitnet.qat.recipe import Recipe
from bitnet.qat.sizes import size_report
from tests.helpers.qat_net import EVERYTHING, Net


def test_sizes_before_and_after() -> None:
    recipe = Recipe(weights="int", bits=4, modules=EVERYTHING)  # type: ignore[arg-type]
    model = prepare(Net(), recipe)
    numel = sum(p.numel() for p in model.parameters())
    before = size_report(model)
    assert before.total == (4 * numel, 4 * numel)
    after = size_report(convert(model))
    assert after.total.fp32 == 4 * numel
    # 9 x 12 codes of 4 bits, a scale and a bias in fp32 an output
    assert after.layers["mlp.0"] == (4 * (9 * 12 + 9), 9 * 6 + 4 * 9 + 4 * 9)
    # 8 rows of 36 codes
    assert after.layers["conv1"] == (4 * (8 * 36 + 8), 8 * 18 + 4 * 8 + 4 * 8)
    assert after.layers["embed"] == (4 * 120, 4 * 120)
    stored = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert after.total.stored == stored
    ternary = convert(prepare(Net(), Recipe(weights="absmean", modules=["linear"])))
    assert isinstance(ternary.get_submodule("mlp.0"), TernaryLinear)
    assert size_report(ternary).layers["mlp.0"] == (4 * (9 * 12 + 9), 9 * 16 + 4 * 9 + 4 * 9)
    tied = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10, bias=False))
    tied[1].weight = tied[0].weight
    assert size_report(tied).total == (160, 160)
    static = prepare(Net(), Recipe(weights="lsq", activations="static"))
    assert size_report(static).total.fp32 == 4 * numel
