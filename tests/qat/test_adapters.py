"""LoRA against its formula and autograd, merging against arithmetic, training of tiny models."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from bitnet.linear import BitLinear, pack
from bitnet.model import ModelConfig, Transformer
from bitnet.qat.adapters import (
    AdapterConfig,
    FrozenTernaryLinear,
    LoRALinear,
    add_adapters,
    merge_adapters,
)
from bitnet.qat.layers import QATLinear
from bitnet.qat.nf4 import NF4Linear
from bitnet.qat.prepare import prepare
from bitnet.qat.recipe import Recipe
from bitnet.quant import absmean_ternary

SHAPES = [(1, 1), (7, 13), (33, 65), (5, 200)]  # (N, K)
KINDS = {
    "lora": AdapterConfig("lora", rank=4),
    "nf4": AdapterConfig("qlora", rank=4),
    "ternary": AdapterConfig("qlora", rank=4, base="ternary"),
}
W4 = Recipe(weights="int", bits=4)
W2 = Recipe(weights="seq", bits=2, granularity="row")
TERNARY = Recipe(weights="absmean", granularity="tensor")


def lora(**keys: Any) -> AdapterConfig:
    return AdapterConfig(kind="lora", **keys)


def adapters_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if name.endswith(("lora_a", "lora_b"))}


def transformer(linear: str = "fp", **keys: Any) -> Transformer:
    torch.manual_seed(1)
    shape = {"d_model": 32, "n_layers": 2, "n_heads": 2, "d_ff": 48, "vocab_size": 67}
    config = ModelConfig(depth=1, linear=linear, max_seq_len=24, **shape | keys)  # type: ignore[arg-type]
    model = Transformer(config)
    nn.init.normal_(model.embed_tokens.weight, std=0.3)  # a frozen head of 0.02 could say little
    return model


def stack(*linears: nn.Module) -> nn.Sequential:
    return nn.Sequential(*linears)


def shake(model: nn.Module, std: float = 0.1) -> None:
    """B starts at 0, where an adapter does nothing: make it do something."""
    for module in model.modules():
        if isinstance(module, LoRALinear):
            nn.init.normal_(module.lora_b, std=std)


# The layer ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("rank", [1, 3, 40])  # 40 is more than some N and K: allowed
def test_forward_and_gradients_are_the_formulas(n: int, k: int, rank: int) -> None:
    layer = LoRALinear(nn.Linear(k, n), rank, 7.0)
    shake(layer, 1.0)
    assert isinstance(layer.base, nn.Linear)
    leaves = [layer.lora_a, layer.lora_b, layer.base.weight, layer.base.bias]
    a, b, weight, bias = (leaf.detach().double().requires_grad_(True) for leaf in leaves)
    x = torch.randn(2, 5, k, requires_grad=True)
    x2 = x.detach().double().requires_grad_(True)
    y = layer(x)
    y2 = x2 @ (weight + 7.0 / rank * b @ a).T + bias
    dy = torch.randn_like(y)
    y.backward(dy)
    y2.backward(dy.double())
    for ours, theirs in zip([x, *leaves], [x2, a, b, weight, bias], strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        scale = float(theirs.grad.abs().max()) + 1e-9
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-5 * scale)
    torch.testing.assert_close(y.double(), y2, rtol=1e-4, atol=1e-4)


def test_an_initial_adapter_changes_nothing() -> None:
    """A uniform in +-1/sqrt(K) (Kaiming with a = sqrt(5)), B zero: the layer is its base."""
    base = nn.Linear(400, 30)
    layer = LoRALinear(base, 50, 32.0)
    assert not layer.lora_b.any()
    assert 0.99 / 20 < float(layer.lora_a.detach().abs().max()) <= 1 / 20
    assert float(layer.lora_a.detach().std()) == pytest.approx(1 / 20 / math.sqrt(3), rel=0.02)
    x = torch.randn(3, 400)
    assert torch.equal(layer(x), base(x))


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_and_low_precision(kind: str) -> None:
    model = add_adapters(stack(nn.Linear(64, 64), nn.Linear(64, 8)), target(kind))
    shake(model)
    x = torch.randn(3, 64)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        if "lora" in name:
            assert parameter.grad is not None
            assert parameter.grad.dtype == torch.float32
            assert bool(parameter.grad.any())
    model.to(torch.bfloat16)  # the whole model in bf16, without autocast
    assert model(x.bfloat16()).dtype == torch.bfloat16


def target(kind: str) -> AdapterConfig:
    """The config of that kind, for models whose layers have no names of a Transformer."""
    config = KINDS[kind]
    return AdapterConfig(config.kind, rank=config.rank, base=config.base, targets=["*"])


# Frozen ternary base (NF4's tests are in test_nf4.py) --------------------------------------------


@pytest.mark.parametrize("granularity", ["tensor", "row", "group"])
def test_a_frozen_ternary_linear_holds_absmean_codes(granularity: Any) -> None:
    recipe = Recipe(weights="absmean", granularity=granularity, group_size=24)
    linear = nn.Linear(70, 9)
    layer = FrozenTernaryLinear(linear, recipe)
    codes, gamma = absmean_ternary(linear.weight.detach(), granularity, 24)
    spread = gamma.view(-1, 1) if gamma.dim() == 1 else gamma
    if granularity == "group":
        spread = gamma.repeat_interleave(24, 1)[:, :70]
    weight = codes.float() * spread
    assert torch.equal(layer.codes(), codes)
    assert torch.equal(layer.dequantize(), weight)
    x = torch.randn(4, 70, requires_grad=True)
    dy = torch.randn(4, 9)
    layer(x).backward(dy)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, dy @ weight)
    torch.testing.assert_close(layer(x), F.linear(x, weight, linear.bias))
    assert layer.weight_bytes == 9 * 32 + 4 * gamma.numel()  # K padded to 128: 32 bytes per row
    scale = layer.scale.clone()
    assert torch.equal(layer.to(torch.bfloat16).scale, scale)  # type: ignore[arg-type]


# Adding ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_adding_to_a_transformer(kind: str) -> None:
    model = transformer()
    tokens = torch.randint(67, (2, 9))
    before = model(tokens)
    assert add_adapters(model, KINDS[kind]) is model
    layers = [module for module in model.modules() if isinstance(module, LoRALinear)]
    bases = {"lora": nn.Linear, "nf4": NF4Linear, "ternary": FrozenTernaryLinear}
    assert len(layers) == 14
    assert {type(layer.base) for layer in layers} == {bases[kind]}
    assert type(model.lm_head) is nn.Linear
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == set(adapters_of(model))
    stored = {"lora": ["weight"], "nf4": ["absmax", "packed"], "ternary": ["packed", "scale"]}
    prefix = "layers.1.mlp.down_proj."
    keys = sorted(key.removeprefix(prefix) for key in model.state_dict() if key.startswith(prefix))
    assert keys == [*(f"base.{key}" for key in stored[kind]), "lora_a", "lora_b"]
    if kind == "lora":  # full precision and B = 0: nothing has changed
        assert torch.equal(model(tokens), before)


def test_train_base_leaves_everything_trainable() -> None:
    model = transformer()
    model.norm.weight.requires_grad_(False)  # what the user froze stays frozen
    add_adapters(model, lora(train_base=True, rank=2))
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["norm.weight"]


def test_a_config_without_adapters_changes_nothing() -> None:
    model = transformer()
    before = str(model)
    assert str(add_adapters(model, AdapterConfig())) == before
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_module_used_twice_gets_one_adapter() -> None:
    linear = nn.Linear(6, 6)
    model = add_adapters(stack(linear, nn.ReLU(), linear), lora(targets=["0"]))
    assert isinstance(model, nn.Sequential)
    assert model[0] is model[2]
    merge_adapters(model)
    assert model[0] is model[2] is linear


def test_patterns_choose_the_layers() -> None:
    model = add_adapters(transformer(), lora(targets=["layers.0.mlp.*", "q_proj"]))
    names = {name.rpartition(".")[0] for name in adapters_of(model)}
    assert names == {
        *(f"layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")),
        "layers.0.self_attn.q_proj",
        "layers.1.self_attn.q_proj",
    }


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (lambda m: m, lora(targets=["q_prj"]), "targets: .*'q_prj'; the nearest is 'q_proj'"),
        (lambda m: m, lora(targets=["norm"]), "targets: 'norm' names no linear layer"),
        (lambda m: m, lora(targets=["lm_head"]), "lm_head: .*shared by embed_tokens, lm_head"),
        (lambda m: add_adapters(m, lora()), lora(), "model: already has adapters"),
        (lambda m: add_adapters(m, lora()), KINDS["nf4"], "model: already has adapters"),
        (lambda m: m.lm_head, lora(targets=["*"]), "model: is a linear layer itself"),
        (lambda m: m, AdapterConfig("qlora", train_base=True), "train_base: "),
        (
            lambda m: transformer("ternary"),
            KINDS["nf4"],
            r"layers\.0\.self_attn\.q_proj: qlora stands beside a Linear.*not BitLinear",
        ),
        (
            lambda m: transformer(norm_placement="in_linear"),
            lora(),
            "without a norm inside, not NormLinear",
        ),
        (
            lambda m: transformer("ternary", norm_placement="in_linear"),
            lora(),
            "without a norm inside, not BitLinear",
        ),
    ],
)
def test_what_is_refused(
    change: Callable[[Any], nn.Module], config: AdapterConfig, message: str
) -> None:
    model = change(transformer(tie_embeddings="lm_head" in config.targets))
    before = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        add_adapters(model, config)
    assert list(model.state_dict()) == before  # nothing is half done


def test_a_recipe_that_is_not_absmean() -> None:
    with pytest.raises(ValueError, match="by 'absmean', not by 'int'"):
        add_adapters(transformer(), KINDS["ternary"], W4)
    add_adapters(transformer(), KINDS["nf4"], W4)  # which does not look at it


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite(kind: str, value: float) -> None:
    model = transformer()
    with torch.no_grad():
        model.layers[1].mlp.up_proj.weight[3, 5] = value  # type: ignore[union-attr, index, operator]
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight: holds NaN or inf"):
        add_adapters(model, KINDS[kind])


@pytest.mark.parametrize("key", ["rank", "alpha", "targets", "base", "kind"])
def test_config_is_strict(key: str) -> None:
    wrong = {"rank": 0, "alpha": math.inf, "targets": [], "base": "int8", "kind": "dora"}
    with pytest.raises(ValidationError, match=key):
        AdapterConfig(**{key: wrong[key]})  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_structure_on_the_meta_device_takes_values(kind: str) -> None:
    """The structure without values, then the values of another: the same model."""
    with torch.device("meta"):
        empty = add_adapters(transformer(), KINDS[kind])
    full = add_adapters(transformer(), KINDS[kind])
    shake(full)
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    empty.load_state_dict(full.state_dict(), assign=True)
    tokens = torch.randint(67, (2, 9))
    assert torch.equal(empty(tokens), full(tokens))


# Merging -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_merging_into_full_precision_changes_nothing(shape: tuple[int, int]) -> None:
    """y is a sum of K + r products in fp32, added in another order: eps sqrt(K + r) of its size."""
    n, k = shape
    linear = nn.Linear(k, n)
    parameter = linear.weight
    model = add_adapters(stack(linear), lora(targets=["0"], rank=3))
    shake(model, 1.0)
    x = torch.randn(11, k)
    expected = model(x)
    report = merge_adapters(model)
    assert model[0] is linear  # type: ignore[index]
    assert linear.weight is parameter  # optimizers go on
    atol = 4 * 2**-23 * math.sqrt(k + 3) * float(expected.detach().abs().max())
    torch.testing.assert_close(model(x), expected, rtol=0, atol=atol)
    assert report.layers["0"] == (0.0, 0.0, 4 * n * k, 4 * n * k)


def test_an_adapter_of_zeros_costs_nothing() -> None:
    model = prepare(transformer(), W4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = merge_adapters(add_adapters(model, lora()))
    assert {merge.error for merge in report.layers.values()} == {0.0}
    assert {merge.codes_changed for merge in report.layers.values()} == {0.0}
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)


@pytest.mark.parametrize("recipe", [W4, W2, TERNARY], ids=str)
def test_merging_under_a_quantizer_reports_its_cost(recipe: Recipe) -> None:
    """Against the definition, with the weights that the layers themselves multiply by."""
    model = prepare(transformer(), recipe)
    add_adapters(model, lora(rank=4))
    shake(model, 0.01)
    name = "layers.0.mlp.gate_proj"
    layer = model.get_submodule(name)
    assert isinstance(layer, LoRALinear)
    assert isinstance(layer.base, QATLinear)
    codes, hat = layer.base.quantize()[0], effective(layer.base)
    wanted = hat + layer.alpha / layer.rank * layer.lora_b.detach() @ layer.lora_a.detach()
    latent = layer.base.weight.detach() + wanted - hat
    report = merge_adapters(model)
    merged = model.get_submodule(name)
    assert type(merged) is QATLinear
    torch.testing.assert_close(merged.weight.detach(), latent)
    error = (effective(merged) - wanted).norm() / wanted.norm()
    assert report.layers[name].error == pytest.approx(float(error), rel=1e-4)
    changed = (merged.quantize()[0] != codes).double().mean()
    assert report.layers[name].codes_changed == pytest.approx(float(changed), rel=1e-5)
    assert all(merge.error > 0 for merge in report.layers.values())
    assert all(merge.codes_changed > 0 for merge in report.layers.values())
    worst = max(report.layers, key=lambda key: report.layers[key].error)
    assert "14 layers merged and rounded anew: weights off by " in str(report)
    assert worst in str(report)


def effective(layer: QATLinear) -> Tensor:
    """The weight by which a layer multiplies: its outputs for the unit vectors, in weight-only
    form."""
    recipe = layer.recipe
    weights_only = Recipe(
        weights=recipe.weights,
        bits=recipe.bits,
        granularity=recipe.granularity,
        activations="none",
    )
    plain = nn.Linear(layer.in_features, layer.out_features, bias=False)
    plain.weight = layer.weight
    twin = QATLinear.from_float(plain, weights_only)
    twin.weight_step = layer.weight_step
    with torch.no_grad():
        return twin(torch.eye(layer.in_features)).T


def test_merging_into_a_bitlinear() -> None:
    model = transformer("ternary")
    add_adapters(model, lora())
    shake(model)
    report = merge_adapters(model)
    assert type(model.layers[0].mlp.up_proj) is BitLinear  # type: ignore[union-attr]
    assert all(0 < merge.codes_changed < 1 for merge in report.layers.values())


@pytest.mark.parametrize("kind", ["nf4", "ternary"])
def test_merging_a_qlora_gives_a_full_precision_layer(kind: str) -> None:
    """Full precision again: W_hat + s B A, in the dtype the layer came with."""
    model = stack(nn.Linear(70, 9), nn.Linear(9, 5, bias=False, dtype=torch.bfloat16))
    first = model[0]
    add_adapters(model, target(kind))
    shake(model)
    layer = model[0]
    assert isinstance(layer, LoRALinear)
    base = layer.base
    assert isinstance(base, NF4Linear | FrozenTernaryLinear)
    x = torch.randn(3, 70)
    expected, hat, codes = layer(x), base.dequantize(), base.codes()
    wanted = hat + 32 / 4 * layer.lora_b.detach() @ layer.lora_a.detach()
    report = merge_adapters(model)
    merged = model[0]
    assert type(merged) is nn.Linear
    assert merged.bias is first.bias
    assert model[1].weight.dtype == torch.bfloat16
    assert "merged exactly" in str(report), "what rounding would cost is not what merging did"
    torch.testing.assert_close(merged.weight.detach(), wanted)
    torch.testing.assert_close(merged(x), expected, rtol=1e-4, atol=1e-5)
    again = NF4Linear(merged) if kind == "nf4" else FrozenTernaryLinear(merged)
    error = (again.dequantize() - wanted).norm() / wanted.norm()
    assert report.layers["0"].error == pytest.approx(float(error), rel=1e-4)
    changed = (again.codes() != codes).double().mean()
    assert report.layers["0"].codes_changed == pytest.approx(float(changed), rel=1e-5)
    stored = 9 * 35 + 4 * 10 if kind == "nf4" else 9 * 32 + 4
    assert report.layers["0"][2:] == (stored, 4 * 9 * 70)


def test_what_cannot_be_merged() -> None:
    with pytest.raises(ValueError, match="model: has no adapters"):
        merge_adapters(transformer())
    with pytest.raises(ValueError, match="model: is an adapter itself"):
        merge_adapters(LoRALinear(nn.Linear(3, 4), 2, 1.0))
    model = add_adapters(transformer(), lora())
    shake(model)
    layer = model.get_submodule("layers.1.mlp.up_proj")
    assert isinstance(layer, LoRALinear)
    with torch.no_grad():
        layer.lora_b[2, 1] = math.nan
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj: .*NaN"):
        merge_adapters(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.nan_to_num(7.0), before[name].nan_to_num(7.0))
    packed = pack(add_adapters(transformer("ternary"), lora()))
    with pytest.raises(ValueError, match=r"q_proj: its base is a TernaryLinear, .*before pack"):
        merge_adapters(packed)


# Training ----------------------------------------------------------------------------------------


def train(model: nn.Module, steps: int = 30) -> tuple[float, float, torch.optim.Optimizer]:
    """First and last loss on one batch, repeated."""
    tokens = torch.randint(67, (4, 17), generator=torch.Generator().manual_seed(3))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-2)
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses[0], losses[-1], optimizer


def models() -> dict[str, Callable[[], nn.Module]]:
    return {
        "lora": lambda: add_adapters(transformer(), KINDS["lora"]),
        "lora-qat int4": lambda: add_adapters(prepare(transformer(), W4), KINDS["lora"]),
        "lora-qat ternary": lambda: add_adapters(prepare(transformer(), TERNARY), KINDS["lora"]),
        "bitlinear": lambda: add_adapters(transformer("ternary"), KINDS["lora"]),
        "qlora nf4": lambda: add_adapters(transformer(), KINDS["nf4"]),
        "qlora ternary": lambda: add_adapters(transformer(), KINDS["ternary"]),
    }


@pytest.mark.parametrize("name", models())
def test_training_moves_the_adapters_and_nothing_else(name: str) -> None:
    model = models()[name]()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    first, last, optimizer = train(model)
    assert last < 0.5 * first
    adapters = set(adapters_of(model))
    for key, tensor in model.state_dict().items():  # bit for bit
        assert torch.equal(tensor, before[key]) == (key not in adapters), key
    kept = sum(state["exp_avg"].numel() for state in optimizer.state.values())
    assert kept == sum(tensor.numel() for tensor in adapters_of(model).values())


@pytest.mark.parametrize("recipe", [W4, TERNARY], ids=str)
def test_merging_after_lora_qat_costs_something(recipe: Recipe) -> None:
    model = add_adapters(prepare(transformer(), recipe), KINDS["lora"])
    _, trained, _ = train(model)
    report = merge_adapters(model)
    assert all(merge.error > 0 for merge in report.layers.values())
    model.requires_grad_(True)
    merged, _, _ = train(model, 1)
    assert math.isfinite(merged)
    assert merged != trained


def test_training_the_base_too() -> None:
    model = add_adapters(prepare(transformer(), W4), lora(rank=4, train_base=True))
    before = {key: tensor.clone() for key, tensor in model.named_parameters()}
    first, last, _ = train(model)
    assert last < 0.5 * first
    for key, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[key]), key
