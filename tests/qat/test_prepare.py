"""prepare, calibrate, convert, batch-norm folding and sizes on models of every kind."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitnet.linear import BitLinear, TernaryLinear, pack, replace_linear
from bitnet.model import ModelConfig, Transformer
from bitnet.qat.adapters import AdapterConfig, add_adapters, merge_adapters
from bitnet.qat.integer import IntConv1d, IntConv2d, IntEmbedding, IntLayer, IntLinear
from bitnet.qat.layers import QATConv1d, QATConv2d, QATEmbedding, QATLayer, QATLinear
from bitnet.qat.observers import Observer
from bitnet.qat.prepare import (
    batch_norm_pairs,
    bitlinear_twin,
    calibrate,
    convert,
    fold_batch_norm,
    prepare,
    size_report,
)
from bitnet.qat.recipe import Recipe

EVERYTHING = ["linear", "conv1d", "conv2d", "embedding"]


class Net(nn.Module):
    """A layer of every kind; float and integer inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 12)
        self.conv1 = nn.Conv1d(12, 8, 3, padding="same")
        self.norm = nn.LayerNorm(8)
        self.conv2 = nn.Conv2d(1, 4, 3, stride=2)
        self.mlp = nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 6))
        self.head = nn.Linear(6, 10, bias=False)

    def forward(self, ids: Tensor, shift: float = 0.0) -> Tensor:
        x = self.norm(self.conv1(self.embed(ids).mT).mT) + shift
        x = self.conv2(x.unsqueeze(1)).mean(-2).flatten(1)
        return self.head(self.mlp(x))


def ids(seed: int = 0) -> Tensor:
    return torch.randint(0, 10, (5, 7), generator=torch.Generator().manual_seed(seed))


def kinds(model: nn.Module) -> dict[str, str]:
    return {
        name: type(module).__name__
        for name, module in model.named_modules()
        if type(module).__name__.startswith(("QAT", "Int", "Ternary", "Linear", "Conv", "Emb"))
    }


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


def test_calibration_finds_ranges_in_full_precision() -> None:
    recipe = Recipe(weights="int", bits=2, activations="static", observer="minmax")
    model = Net()
    seen: dict[str, list[Tensor]] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: seen.setdefault(name, []).append(args[0])
        )
        for name, module in model.named_modules()
        if name in ("conv1", "conv2", "mlp.0", "mlp.2")
    ]
    batches = [ids(1), ids(2), (ids(3), 0.5)]
    for batch in batches:
        model(*batch) if isinstance(batch, tuple) else model(batch)
    for handle in handles:
        handle.remove()
    prepare(model, recipe)
    model.mlp.eval()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QATLayer)}
    layers["conv1"].lambda_w = 0.25
    calibrate(model, iter(batches))
    assert layers.keys() == seen.keys()
    for name, layer in layers.items():
        assert layer.input_observer is not None
        low, high = layer.input_observer.range()
        values = np.concatenate([x.detach().numpy().ravel() for x in seen[name]])
        assert (low.item(), high.item()) == (values.min(), values.max())
        assert layer.input_observer.n_seen.item() == 3
        assert not layer._forward_pre_hooks
    assert model.training
    assert not model.mlp.training
    assert (layers["conv1"].lambda_w, layers["conv1"].lambda_a) == (0.25, 1.0)


class TwoWays(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.mid, self.spare = (nn.Linear(3, 3) for _ in range(3))
        self.last = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.mid(input=self.first(x)))


def test_calibration_refuses() -> None:
    recipe = Recipe(weights="int", activations="static")
    x = torch.randn(2, 3)
    with pytest.raises(ValueError, match="has no QAT layers; prepare it first"):
        calibrate(TwoWays(), [x])
    model = prepare(TwoWays(), recipe)
    with pytest.raises(ValueError, match="batches: the calibration set is empty"):
        calibrate(model, [])
    with pytest.raises(ValueError, match="spare: was never called during calibration"):
        calibrate(model, [x])
    model = prepare(TwoWays(), Recipe(weights="int", activations="static", skip=["spare"]))
    with pytest.raises(ValueError, match="mid: its input held NaN or infinity"):
        calibrate(model, [x, x * float("nan")])
    calibrate(model, [x])  # what was wrong before does not count again
    model.eval()
    assert torch.equal(model(x), convert(copy.deepcopy(model))(x))
    broken = prepare(TwoWays(), recipe)
    with pytest.raises(RuntimeError):
        calibrate(broken, [torch.randn(2, 4)])
    assert broken.training
    assert not any(m._forward_pre_hooks for m in broken.modules())
    calibrate(prepare(TwoWays(), Recipe(weights="int")), [])  # dynamic: nothing to find


def test_calibration_that_would_do_nothing_is_refused() -> None:
    x = torch.randn(2, 3)
    model = prepare(TwoWays(), Recipe(weights="int", activations="static", skip=["spare"]))
    observer = model.get_submodule("mid.input_observer")
    assert isinstance(observer, Observer)
    calibrate(model, [x])
    before = observer.range()[1].clone()
    observer.freeze()
    with pytest.raises(ValueError, match=r"mid: its observer is frozen; unfreeze\(\) it"):
        calibrate(model, [100 * x])
    observer.unfreeze()
    observer.disable()
    with pytest.raises(ValueError, match=r"mid: its observer is disabled; enable\(\) it"):
        calibrate(model, [100 * x])
    observer.enable()
    with pytest.raises(ValueError, match=r"mid: its input was empty in every batch"):
        calibrate(model, [x[:0], x[:0]])
    assert torch.equal(observer.range()[1], before)
    calibrate(model, [x[:0], x])  # one that counts is enough
    assert int(observer.n_seen) == 2


@pytest.mark.parametrize("activations", ["absmax", "static"])
def test_a_batch_is_a_tensor_or_a_tuple(activations: Any) -> None:
    x = torch.randn(4, 3)
    model = prepare(TwoWays(), Recipe(weights="int", activations=activations, skip=["spare"]))
    with pytest.raises(TypeError, match=r"batches: .*got one Tensor; pass \[tensor\]"):
        calibrate(model, x)
    if activations == "static":
        for batch in ([x, x], {"x": x}):
            with pytest.raises(
                TypeError, match=r"a batch is a tensor or a tuple .*got a (list|dict)"
            ):
                calibrate(model, [batch])  # type: ignore[list-item]
        assert model.training
    calibrate(model, (x, (x,)))


def test_transformer_and_its_twin_of_bitlinears() -> None:
    torch.manual_seed(1)
    config = ModelConfig(
        vocab_size=40, d_model=16, n_layers=2, n_heads=2, d_ff=32, max_seq_len=16, linear="fp"
    )
    model = Transformer(config)
    recipe = Recipe(weights="absmean", granularity="tensor", modules=["linear"])
    prepared = prepare(copy.deepcopy(model), recipe)
    twin = bitlinear_twin(prepared)
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
    assert bitlinear_twin(model) is None
    assert bitlinear_twin(prepare(copy.deepcopy(model), Recipe(weights="int"))) is None
    assert bitlinear_twin(prepare(Net(), Recipe(weights="absmean"))) is None


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


class Branchy(nn.Module):
    """Batch norms that fold and batch norms that must not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.plain = nn.Conv2d(6, 6, 1)
        self.bn_plain = nn.BatchNorm2d(6, affine=False)
        self.shared = nn.Conv2d(6, 6, 1)
        self.bn_a, self.bn_b = nn.BatchNorm2d(6), nn.BatchNorm2d(6)
        self.used = nn.Conv2d(6, 6, 1)
        self.bn_used = nn.BatchNorm2d(6)
        self.bn_alone = nn.BatchNorm2d(6)
        self.batch_only = nn.Conv2d(6, 6, 1)
        self.bn_batch = nn.BatchNorm2d(6, track_running_stats=False)
        self.tied_a, self.tied_b = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)
        self.tied_b.weight = self.tied_a.weight
        self.bn_tied = nn.BatchNorm2d(6)
        self.conv1d, self.bn1d = nn.Conv1d(6, 5, 1, groups=1), nn.BatchNorm1d(5)
        self.fc, self.bn_fc = nn.Linear(5, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x)).relu()
        x = self.bn_plain(self.plain(x))
        x = self.bn_a(self.shared(x)) + self.bn_b(self.shared(x.relu()))
        y = self.used(x)
        x = self.bn_alone((self.bn_used(y) + y).relu())
        x = self.bn_batch(self.batch_only(x))
        x = self.tied_b(self.bn_tied(self.tied_a(x)))
        x = self.bn1d(self.conv1d(x.flatten(2)))
        return self.bn_fc(self.fc(x.mean(-1)))


FOLDABLE = [("conv", "bn"), ("plain", "bn_plain"), ("conv1d", "bn1d"), ("fc", "bn_fc")]


def trained_branchy() -> Branchy:
    model = Branchy().double()
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)) and module.affine:
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    for _ in range(3):
        model(torch.randn(4, 3, 8, 8).double() * 2 + 1)
    return model.eval()


def test_batch_norms_fold() -> None:
    """A dozen float64 roundings of values of size 1 to 10 in a chain of ten layers."""
    model = trained_branchy()
    x = torch.randn(2, 3, 8, 8).double()
    y = model(x)
    pairs, left = batch_norm_pairs(model)
    assert pairs == FOLDABLE
    assert {name: reason.split(" ", 3)[:3] for name, reason in left.items()} == {
        "bn_a": ["shared", "or", "it"],
        "bn_b": ["shared", "or", "it"],
        "bn_used": ["the", "output", "of"],
        "bn_alone": ["what", "comes", "before"],
        "bn_batch": ["it", "has", "no"],
        "bn_tied": ["the", "weight", "of"],
    }
    weight = model.conv.weight
    folded = fold_batch_norm(model)
    assert folded is model
    assert model.conv.weight is weight
    assert model.conv.bias is not None
    assert isinstance(model.bn, nn.Identity)
    assert isinstance(model.bn_a, nn.BatchNorm2d)
    torch.testing.assert_close(model(x), y, rtol=1e-12, atol=1e-12)
    assert batch_norm_pairs(model)[0] == []


def test_batch_norm_without_statistics_yet_and_in_fp32() -> None:
    model = nn.Sequential(nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3)).eval()
    x = torch.randn(4, 2, 6)
    y = model(x)
    fold_batch_norm(model)
    torch.testing.assert_close(model(x), y, rtol=1e-6, atol=1e-6)
    prepared = prepare(model, Recipe(weights="int", keep_first_last=False))
    with pytest.raises(ValueError, match="fold batch norms before prepare"):
        fold_batch_norm(prepared)


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x))
        return y if x.sum() > 0 else -y


def test_pairs_by_name_where_fx_cannot_trace() -> None:
    model = Untraceable().eval()
    x = torch.rand(4, 2, 6)
    y = model(x)
    with pytest.raises(ValueError, match=r'pairs=\[\("conv1", "bn1"\)\]'):
        fold_batch_norm(model)
    for pairs, message in [
        ([("conv1", "bn2")], "pairs: no module is named 'bn2'"),
        ([("bn1", "conv1")], "pairs: conv1: a Conv1d does not fold into a BatchNorm1d"),
        ([("conv1", "bn1")] * 2, "pairs: a layer or batch norm is named twice"),
    ]:
        with pytest.raises(ValueError, match=message):
            fold_batch_norm(model, pairs)
    fold_batch_norm(model, [("conv1", "bn1")])
    assert isinstance(model.bn1, nn.Identity)
    torch.testing.assert_close(model(x), y, rtol=1e-6, atol=1e-6)


def test_every_kind_of_layer_converts() -> None:
    recipe = Recipe(weights="int", modules=EVERYTHING, keep_first_last=False)  # type: ignore[arg-type]
    model = prepare(Net(), recipe)
    assert isinstance(model.get_submodule("conv2"), QATConv2d)
    convert(model)
    expected = {"embed": IntEmbedding, "conv1": IntConv1d, "conv2": IntConv2d, "head": IntLinear}
    for name, kind in expected.items():
        assert type(model.get_submodule(name)) is kind


class Normed(nn.Module):
    """Batch norms behind a convolution and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn1 = nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6)
        self.fc, self.bn2 = nn.Linear(24, 40, bias=False), nn.BatchNorm1d(40)
        self.head = nn.Linear(40, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv(x)).relu().flatten(1)
        return self.head(self.bn2(self.fc(x)).relu())


def normed() -> Normed:
    torch.manual_seed(3)
    model = Normed()
    for norm in (model.bn1, model.bn2):
        assert norm.running_mean is not None
        assert norm.running_var is not None
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return model.eval()


@pytest.mark.parametrize("pairs", [None, [("conv", "bn1"), ("fc", "bn2")]])
@pytest.mark.parametrize("options", [{}, {"granularity": "row"}, {"norm": True}])
def test_batch_norms_fold_before_and_after_replace_linear(
    pairs: list[tuple[str, str]] | None, options: dict[str, Any]
) -> None:
    before = replace_linear(fold_batch_norm(normed(), pairs), **options)
    replaced = replace_linear(normed(), **options)
    x = torch.randn(5, 3, 6)
    after = fold_batch_norm(replaced, pairs)
    assert type(after.bn1) is type(after.bn2) is nn.Identity
    assert type(after.fc) is BitLinear
    assert before.state_dict().keys() == after.state_dict().keys()
    for name, tensor in before.state_dict().items():
        assert torch.equal(tensor, after.state_dict()[name]), name
    assert torch.equal(before(x), after(x))
    if options.get("granularity") == "row":  # codes only change their sign, scales their size
        codes, scale = replace_linear(normed(), **options).fc.quantize()
        new_codes, new_scale = after.fc.quantize()
        norm = normed().bn2
        factor = norm.weight / (norm.running_var + norm.eps).sqrt()  # type: ignore[operator]
        assert torch.equal(new_codes, codes * factor.sign()[:, None].to(torch.int8))
        torch.testing.assert_close(new_scale, scale * factor.abs().detach())


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
    with pytest.raises(ValueError, match=r"^0\.forward: Shifted has one of its own"):
        convert(nn.Sequential(layer))
