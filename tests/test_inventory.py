"""What replace_linear and prepare replace in other people's models, and what they say of others."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitnet import BitLinear, TernaryLinear, coverage, pack, replace_linear
from bitnet.qat import Recipe, convert, prepare
from bitnet.qat.adapters import AdapterConfig, add_adapters
from bitnet.qat.layers import QATLinear
from bitnet.quant import ternary_linear_ste

transformers: Any = pytest.importorskip("transformers")
SMALL = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def hf(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**options)
    kind = {"GPT2": "GPT2LMHeadModel"}.get(name, f"{name}ForCausalLM")
    return getattr(transformers, kind)(config).eval()


def gpt2() -> Any:
    return hf("GPT2", vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2)


def weights(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.dim() >= 2)


def test_conv1d_is_replaced_by_its_transposed() -> None:
    model, original = gpt2(), gpt2()
    replace_linear(model)
    for name, module in original.named_modules():
        if type(module).__name__ != "Conv1D":
            continue
        new = model.get_submodule(name)
        assert type(new) is BitLinear
        assert (new.in_features, new.out_features) == module.weight.shape
        assert torch.equal(new.weight, module.weight.t())
        x = torch.randn(3, new.in_features)
        weight = module.weight.t().contiguous()
        assert torch.equal(new(x), ternary_linear_ste(x, weight, module.bias))
    found = coverage(model)
    assert len(found.replaced) == 8
    assert found.share == sum(found.replaced.values()) / weights(model)
    assert sum(found.replaced.values()) == weights(original.transformer.h)
    logits = model(IDS).logits
    assert torch.equal(pack(model)(IDS).logits, logits)
    assert coverage(model).replaced == found.replaced


def test_conv1d_keeps_what_a_parameter_has() -> None:
    conv1d = transformers.pytorch_utils.Conv1D
    model = nn.ModuleList([conv1d(6, 4), conv1d(6, 4), conv1d(4, 4), conv1d(4, 4)])
    model[0].weight.requires_grad_(False)
    model[2].weight = model[3].weight
    bias = model[0].bias
    replace_linear(model)
    assert not model[0].weight.requires_grad
    assert model[1].weight.requires_grad
    assert model[0].bias is bias
    assert model[2].weight is model[3].weight
    assert all(layer.weight.is_contiguous() for layer in model)


def test_conv1d_under_qat() -> None:
    model = prepare(gpt2(), Recipe(weights="int", bits=4, skip=["*.h.1.*"]))
    assert type(model.transformer.h[0].attn.c_attn) is QATLinear
    assert type(model.transformer.h[1].attn.c_attn).__name__ == "Conv1D"
    assert torch.equal(
        model.transformer.h[0].attn.c_attn.weight, gpt2().transformer.h[0].attn.c_attn.weight.t()
    )
    logits = model(IDS).logits
    assert torch.equal(convert(model)(IDS).logits, logits)


def test_nothing_replaced_is_an_error_that_says_why() -> None:
    model = hf("Falcon", **SMALL)
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=r"no layer was replaced.*8 FalconLinear of \d.* weights "):
        replace_linear(model)
    assert {name: type(module) for name, module in model.named_modules()} == before
    kind = type(model.transformer.h[0].mlp.dense_h_to_4h)
    x, layer = torch.randn(2, 16), model.transformer.h[0].mlp.dense_h_to_4h
    replace_linear(model, also=(kind,))
    assert len(coverage(model).replaced) == 8
    new = model.transformer.h[0].mlp.dense_h_to_4h
    assert torch.equal(new(x), ternary_linear_ste(x, layer.weight, layer.bias))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()), "1 Conv2d of 18 weights"),
        (nn.Sequential(nn.ReLU()), "no weights"),
        (nn.ModuleDict({"lm_head": nn.Linear(3, 4)}), r"1 Linear of 12 weights \(in skip"),
        (nn.LSTM(3, 4), "1 LSTM of 112 weights"),
        (nn.MultiheadAttention(4, 2), "MultiheadAttention of 48 weights.*in_proj_weight"),
        (nn.Embedding(3, 2), "a lookup table"),
    ],
)
def test_why_nothing_was_replaced(model: nn.Module, words: str) -> None:
    with pytest.raises(ValueError, match=f"no layer was replaced; it has .*{words}"):
        replace_linear(model)


def test_nothing_prepared_is_an_error_that_says_why() -> None:
    with pytest.raises(ValueError, match="no layer can be quantized; it has 1 LSTM of 112 weights"):
        prepare(nn.LSTM(3, 4), Recipe(weights="int"))


def test_lazy_and_empty_layers_are_named() -> None:
    with pytest.raises(ValueError, match="1: a LazyLinear has no weights yet: run the model once"):
        replace_linear(nn.Sequential(nn.Linear(3, 3), nn.LazyLinear(4)))
    with pytest.raises(ValueError, match="1: a LazyLinear has no weights yet: run the model once"):
        prepare(nn.Sequential(nn.Linear(3, 3), nn.LazyLinear(4)), Recipe(weights="int"))
    with pytest.warns(UserWarning, match="zero-element"):  # torch's own
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 0))
    with pytest.raises(ValueError, match=r"1: in_features, out_features: expected >= 1, got 4, 0"):
        replace_linear(model)
    assert type(model[0]) is nn.Linear
    replace_linear(model, skip="1")
    with pytest.raises(ValueError, match=r"^granularity: expected one of"):
        replace_linear(nn.Sequential(nn.Linear(3, 4)), granularity="rows")


def test_little_replaced_is_a_warning() -> None:
    mixtral = hf(
        "Mixtral", **SMALL, intermediate_size=32, num_key_value_heads=2, num_local_experts=4
    )
    with pytest.warns(UserWarning, match="others are not.*coverage"):
        replace_linear(mixtral)
    found = coverage(mixtral)
    (experts,) = {kept.reason for kept in found.kept.values() if kept.kind == "MixtralExperts"}
    assert "gate_up_proj, down_proj" in experts
    assert found.share == sum(found.replaced.values()) / weights(mixtral)
    assert "MixtralExperts model.layers.0.mlp.experts" in str(found)


def test_a_layer_that_is_never_called_is_named() -> None:
    """Mamba multiplies with dt_proj.weight itself."""
    mamba = hf("Mamba", vocab_size=40, hidden_size=16, num_hidden_layers=2, state_size=4)
    replace_linear(mamba)
    assert coverage(mamba).never_called == []  # nothing has run yet
    with torch.no_grad():
        mamba(IDS)
    idle = [f"backbone.layers.{i}.mixer.dt_proj" for i in range(2)]
    assert coverage(mamba).never_called == idle
    assert f"never called: {idle[0]}, {idle[1]}: " in str(coverage(mamba))
    with pytest.warns(UserWarning, match=rf"{idle[0]}.*never called.*full precision"):
        pack(mamba)


class ReadsWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) @ self.second.weight


@pytest.mark.parametrize("compiled", [False, True])
def test_never_called_under_qat_and_compile(compiled: bool) -> None:
    model = prepare(ReadsWeight(), Recipe(weights="int", keep_first_last=False))
    model.first(torch.randn(2, 4))
    if compiled:
        model.compile(backend="eager")  # whose calls leave no trace
        assert coverage(model).never_called == []
        convert(model)
    else:
        assert coverage(model).never_called == ["second"]
        with pytest.warns(UserWarning, match="second: never called"):
            convert(model)


def test_coverage_of_every_form() -> None:
    """Counted by hand: 12 + 20 weights in linear layers, 18 in a kernel, 21 in a table."""
    model = nn.ModuleDict(
        {
            "table": nn.Embedding(7, 3),
            "kernel": nn.Conv2d(1, 2, 3),
            "a": nn.Linear(3, 4),
            "b": nn.Linear(4, 5),
            "norm": nn.LayerNorm(5),
        }
    )
    model["tied"] = nn.Linear(3, 7)
    model["tied"].weight = model["table"].weight
    assert coverage(model).share == 0
    assert "0.0% of all" in str(coverage(model))
    replace_linear(model, skip="tied")
    for found in (coverage(model), coverage(pack(model))):
        assert found.replaced == {"a": 12, "b": 20}
        assert {name: kept.weights for name, kept in found.kept.items()} == {
            "table": 21,
            "kernel": 18,
        }
        assert found.share == 32 / (32 + 18 + 21)
    assert coverage(nn.ReLU()).share == 0


def test_coverage_of_integer_and_adapted_layers() -> None:
    """30 + 42 weights, and 12 + 14 of a LoRA adapter of rank 2 on the second layer."""
    layers = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 7))
    recipe = Recipe(weights="int", bits=4, keep_first_last=False)
    assert coverage(convert(prepare(copy.deepcopy(layers), recipe))).replaced == {"0": 30, "1": 42}
    for base in ("nf4", "ternary"):
        config = AdapterConfig(kind="qlora", base=base, rank=2, targets=["1"])  # type: ignore[arg-type]
        found = coverage(add_adapters(copy.deepcopy(layers), config))
        assert found.replaced == {"1.base": 42}
        assert {name: kept.weights for name, kept in found.kept.items()} == {"0": 30, "1": 26}
        assert found.share == 42 / 98


def test_reasons_begin_with_the_largest() -> None:
    model = nn.Sequential(nn.Embedding(2, 3), nn.Conv2d(1, 2, 3), nn.Embedding(1, 3))
    with pytest.raises(ValueError, match=r"it has 1 Conv2d of 18 .*; 2 Embedding of 9 weights"):
        replace_linear(model)


def test_replacing_again_is_no_error() -> None:
    model = replace_linear(nn.Sequential(nn.Linear(3, 3)))
    assert replace_linear(model) is model
    assert isinstance(replace_linear(pack(model))[0], TernaryLinear)  # type: ignore[index]
