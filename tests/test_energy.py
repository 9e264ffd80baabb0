"""Arithmetic and energy of a token: against counts made by hand and by running the layers."""

import dataclasses
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from bitnet.cli.inspect_model import inspect_model
from bitnet.config import load_config
from bitnet.energy import (
    ATTENTION,
    DRAM,
    HEAD,
    MATRICES,
    NODES,
    REST,
    SCALES,
    Part,
    arithmetic,
    energy,
    memory,
    token_cost,
    zero_share,
)
from bitnet.export.folder import save_model
from bitnet.linear import BitLinear, pack
from bitnet.model import ModelConfig, Transformer
from bitnet.qat.prepare import convert, prepare
from bitnet.qat.recipe import Recipe
from bitnet.summary import energy_tables

LARGE = Path(__file__).parent.parent / "configs" / "700m.toml"
TINY = ModelConfig(
    n_layers=2, d_model=8, n_heads=2, n_kv_heads=1, d_ff=12, vocab_size=10, max_seq_len=5
).resolve()
# q, o 8x8; k, v 4x8; gate, up 12x8; down 8x12
WEIGHTS = 2 * (2 * 64 + 2 * 32 + 3 * 96)


def test_a_tiny_model_by_hand() -> None:
    cost = token_cost(TINY, 3, ternary=True, zeros=0.25)
    assert WEIGHTS == 960
    assert cost.part(MATRICES) == Part(MATRICES, {"int8_add": 720}, 240)
    # inputs of the seven: 8 x 6 + 12 = 60; outputs: 8 + 4 + 4 + 8 + 12 + 12 + 8 = 56; 2 layers
    assert cost.part(SCALES).operations == {"fp32_mul": 2 * (60 + 2 * 56), "fp32_add": 2 * 60}
    # a score: 4 products; 2 heads, 3 positions, Q K^T and P V, 2 layers
    assert cost.part(ATTENTION).operations == {"fp16_mul": 96, "fp16_add": 96}
    assert cost.part(HEAD).operations == {"fp16_mul": 80, "fp16_add": 80}
    # sub_norm: 8 + 8 + 8 + 12 a layer and 8 at the end = 80 elements; 12 scores;
    # rotated: 2 layers x (2 + 1) heads x 4 = 24; gates 2 x 12; stream 2 x 2 x 8
    assert cost.part(REST).operations == {
        "fp32_mul": 3 * 80 + 2 * 12 + 2 * 24 + 2 * 24,
        "fp32_add": 80 + 3 * 12 + 24 + 24 + 32,
    }
    # a row of up to 64 codes takes 16 bytes; 56 rows and 7 fp32 scales per layer
    assert cost.traffic[MATRICES] == 2 * (56 * 16 + 7 * 4)
    assert cost.traffic["head, embedding, norms"] == 2 * (80 + 80 + 8)
    assert cost.traffic["KV cache"] == 2 * (2 * 2 * 4) * 3
    assert memory(cost) == 162.5 * (1848 + 336 + 96)

    twin = token_cost(TINY, 3, ternary=False)
    assert twin.part(MATRICES) == Part(MATRICES, {"fp16_mul": 960, "fp16_add": 960})
    assert twin.part(SCALES).count("mul") == 0
    assert twin.traffic[MATRICES] == 1920
    assert [twin.part(p) for p in (ATTENTION, HEAD, REST)] == [
        cost.part(p) for p in (ATTENTION, HEAD, REST)
    ]


def test_energy_by_hand() -> None:
    part = Part("any", {"int8_add": 1000, "fp16_mul": 10, "fp16_add": 10, "fp32_mul": 1})
    assert energy(part, NODES["45 nm"], "narrow") == pytest.approx(30 + 11 + 4 + 3.7)
    assert energy(part, NODES["45 nm"]) == pytest.approx(100 + 11 + 9 + 3.7)
    assert energy(part, NODES["7 nm"], "narrow") == pytest.approx(7 + 3.4 + 1.6 + 1.31)
    assert energy(part, NODES["7 nm"], "wide") == pytest.approx(30 + 3.4 + 3.8 + 1.31)
    assert DRAM * 8 == 1300
    cost = token_cost(TINY, 1, ternary=True)
    by_part = [energy(part, NODES["7 nm"], "narrow") for part in cost.parts]
    assert arithmetic(cost, NODES["7 nm"], "narrow") == pytest.approx(sum(by_part))


def test_the_published_ratio() -> None:
    """71.4 of arXiv 2402.17764: matrices alone, INT8 additions, no zero skipped."""
    model = load_config([LARGE]).resolve().model
    dense = token_cost(model, 1, ternary=True, zeros=0.0).part(MATRICES)
    fp16 = token_cost(model, 1, ternary=False).part(MATRICES)
    ratios = {
        node: energy(fp16, prices, "narrow") / energy(dense, prices, "narrow")
        for node, prices in NODES.items()
    }
    assert ratios["7 nm"] == pytest.approx(71.4, abs=0.05)
    assert ratios["45 nm"] == pytest.approx(50.0)
    # with memory, the whole saves what the bytes save
    costs = [token_cost(model, 1024, ternary=ternary) for ternary in (False, True)]
    total = [arithmetic(cost, NODES["7 nm"]) + memory(cost) for cost in costs]
    moved = [sum(cost.traffic.values()) for cost in costs]
    assert total[0] / total[1] == pytest.approx(moved[0] / moved[1], rel=0.01)


@pytest.mark.parametrize("placement", ["sub_norm", "pre_norm", "in_linear"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_counts_are_those_of_the_modules_that_run(placement: str, qk_norm: bool) -> None:
    """An oracle: hooks see what one decoded token sends through each module."""
    config = dataclasses.replace(TINY, norm_placement=placement, qk_norm=qk_norm)
    model = Transformer(config)
    seen = {"matrices": 0, "head": 0, "normed": 0}

    def count(module: nn.Module, args: tuple[torch.Tensor, ...], _: torch.Tensor) -> None:
        if isinstance(module, BitLinear):
            seen["matrices"] += module.weight.numel() * args[0].shape[1]
        elif isinstance(module, nn.Linear):
            seen["head"] += module.weight.numel() * args[0].shape[1]
        elif isinstance(module, nn.RMSNorm):
            seen["normed"] += args[0].numel()

    for module in model.modules():
        module.register_forward_hook(count)
    model(torch.zeros(1, 1, dtype=torch.int64))
    cost = token_cost(config, 1, ternary=True, zeros=0.5)
    matrices = cost.part(MATRICES)
    assert matrices.count("add") + matrices.skipped == seen["matrices"]
    assert cost.part(HEAD).count("mul") == seen["head"]
    elsewhere = 2 * 4 + 2 * 24 + 2 * 24  # 4 scores, 24 rotated, 24 gated
    assert cost.part(REST).operations["fp32_mul"] == 3 * seen["normed"] + elsewhere


def test_groups_are_scaled_one_by_one() -> None:
    config = dataclasses.replace(TINY, granularity="group", group_size=5)
    operations = token_cost(config, 1, ternary=True).part(SCALES).operations
    # 2 groups in 8 columns (48 rows), 3 in 12 (8 rows)
    assert operations["fp32_mul"] == 2 * (60 + 2 * (48 * 2 + 8 * 3))
    assert operations["fp32_add"] == 2 * (60 + 48 * 1 + 8 * 2)


def test_zeros_are_counted_from_the_codes() -> None:
    torch.manual_seed(0)
    layer = BitLinear(2, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -0.01], [0.02, 2.0]]))
    model = nn.Sequential(layer, nn.Linear(2, 2))
    assert zero_share(model) == 0.5
    assert zero_share(pack(model)) == 0.5
    assert zero_share(nn.Linear(2, 2)) is None
    for weights, expected in (("absmean", 0.5), ("int", None)):
        quantized = nn.Sequential(nn.Linear(2, 2, bias=False))
        quantized[0].weight = layer.weight
        prepare(quantized, Recipe(weights=weights, granularity="tensor", keep_first_last=False))
        assert zero_share(quantized) == expected
        assert zero_share(convert(quantized)) == expected
    gaussian = Transformer(dataclasses.replace(TINY, d_model=128, d_ff=256, n_heads=2))
    assert zero_share(gaussian) == pytest.approx(0.31, abs=0.01)


@pytest.mark.parametrize(
    ("context", "zeros", "name"), [(0, 0.3, "context"), (1, -0.1, "zeros"), (1, 1.1, "zeros")]
)
def test_what_is_refused(context: int, zeros: float, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        token_cost(TINY, context, ternary=True, zeros=zeros)


def test_tables_say_what_they_leave_out() -> None:
    model = load_config([LARGE]).resolve().model
    console = Console(width=200)
    with console.capture() as capture:
        for table in energy_tables(model, 1024):
            console.print(table)
    text = capture.get()
    for words in ("expected", "71.4", "no memory traffic", "Horowitz", "2112.00133", "skipped"):
        assert words in " ".join(text.split())
    row = next(line for line in text.splitlines() if "7 nm: layers' matrices, as published" in line)
    assert row.split("│")[-2].strip() == "71.4"


def test_inspect_a_model_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model = Transformer(TINY)
    share = zero_share(model)
    for folder, saved in (("latent", model), ("packed", pack(model))):
        inspect_model(save_model(tmp_path / folder, saved, None))
        text = capsys.readouterr().out
        assert f"{share:.1%}" in text
        assert "context 5" in text
    fp = Transformer(dataclasses.replace(TINY, linear="fp"))
    inspect_model(save_model(tmp_path / "fp", fp, None), 2)
    assert "(expected)" in capsys.readouterr().out
