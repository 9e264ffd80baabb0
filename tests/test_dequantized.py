"""The ``weight`` of layers that hold codes, and models that ask for it."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from bitnet.linear import BitLinear, TernaryLinear, pack, replace_linear
from bitnet.qat import Recipe, convert, prepare
from bitnet.qat.adapters import AdapterConfig, add_adapters

transformers: Any = pytest.importorskip("transformers")

BASES = {
    "linear": lambda: nn.Linear(12, 6),
    "conv1d": lambda: nn.Conv1d(4, 6, 3, groups=2),
    "conv2d": lambda: nn.Conv2d(4, 6, (2, 3)),
    "embedding": lambda: nn.Embedding(6, 12),
}
RECIPES = [
    Recipe(weights="int", bits=4, symmetric=False, granularity="group", group_size=5),
    Recipe(weights="absmean", granularity="row"),
    Recipe(weights="seq", granularity="tensor"),
    Recipe(weights="int", bits=3, activations="none"),
]


def converted(kind: str, recipe: Recipe) -> tuple[nn.Module, Tensor]:
    """A converted layer, and the matrix that its codes stand for, written out in Python floats."""
    recipe = dataclasses.replace(recipe, modules=[kind], keep_first_last=False)  # type: ignore[list-item]
    layer = prepare(BASES[kind](), recipe)
    shape = layer.weight.shape
    codes, scale, zero = layer.quantize()  # type: ignore[operator]
    rows, columns = codes.shape
    group = recipe.group_size if recipe.granularity == "group" else columns
    spread = scale.reshape(-1, scale.shape[-1] if scale.dim() == 2 else 1)
    spread = spread.expand(rows, -1).tolist()
    zeros = None if zero is None else zero.reshape(rows, -1).tolist()
    matrix = [
        [
            (int(codes[n, k]) - (zeros[n][k // group] if zeros else 0)) * spread[n][k // group]
            for k in range(columns)
        ]
        for n in range(rows)
    ]
    return convert(layer), torch.tensor(matrix, dtype=torch.float32).reshape(shape)


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_the_weight_is_the_dequantized_one(kind: str, recipe: Recipe) -> None:
    layer, matrix = converted(kind, recipe)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    assert (weight.shape, weight.dtype, weight.device) == (
        matrix.shape,
        matrix.dtype,
        matrix.device,
    )
    assert torch.equal(weight, matrix)
    assert "weight" not in layer.state_dict()
    assert "weight" not in dict(layer.named_parameters()) | dict(layer.named_buffers())
    half = copy.deepcopy(layer).bfloat16()
    assert half.weight.dtype == torch.bfloat16
    assert torch.equal(half.weight, matrix.bfloat16())
    assert torch.equal(half.float().weight, matrix)  # the codes lost nothing


@pytest.fixture
def packed() -> TernaryLinear:
    return TernaryLinear.from_bitlinear(BitLinear(7, 5, granularity="group", group_size=3))


def test_metadata_need_no_codes(packed: TernaryLinear, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> Tensor:
        raise AssertionError("unpacked")

    monkeypatch.setattr("bitnet.linear.codes_of", refuse)
    weight = packed.weight
    assert weight.dtype == torch.float32
    assert weight.device.type == "cpu"
    assert weight.shape == weight.size() == (5, 7)
    assert weight.size(1) == 7
    assert (weight.dim(), weight.ndim, weight.numel()) == (2, 2, 35)
    assert weight.is_floating_point()
    assert not weight.requires_grad
    assert not weight.is_meta
    with pytest.raises(AssertionError, match="unpacked"):
        weight.sum()
    assert TernaryLinear(7, 5, device="meta").weight.is_meta


X = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
USES: dict[str, Callable[[Tensor], Any]] = {
    "linear": lambda w: F.linear(X, w),
    "matmul": lambda w: X @ w.T,
    "einsum": lambda w: torch.einsum("mk,nk->mn", X, w),
    "data": lambda w: w.data.t() + 1,
    "detach": lambda w: w.detach().abs().mean(),
    "clone": lambda w: w.clone(),
    "to": lambda w: w.to(torch.float64),
    "numpy": lambda w: torch.from_numpy(w.detach().numpy()),
    "tolist": lambda w: w.tolist(),
    "item": lambda w: w[1, 2].item(),
    "repr": repr,
    "iteration": lambda w: torch.stack(list(w)),
    "deepcopy": copy.deepcopy,
    "embedding": lambda w: F.embedding(torch.tensor([1, 4]), w),
    "operator": lambda w: torch.ops.aten.mm(X, w.t()),
    "parameter": lambda w: nn.Parameter(w.clone()).data,
    "new": lambda w: w.new_zeros(2),
    "vector": lambda w: torch.nn.utils.parameters_to_vector([w]),
}


@pytest.mark.parametrize("use", USES)
def test_any_use_gets_the_values(use: str, packed: TernaryLinear) -> None:
    codes, scale = packed.codes().float(), packed.scale.repeat_interleave(3, 1)[:, :7]
    expected, got = USES[use](codes * scale), USES[use](packed.weight)
    assert type(got) is type(expected)
    assert torch.equal(got, expected) if isinstance(got, Tensor) else got == expected


WRITES: dict[str, Callable[[TernaryLinear], Any]] = {
    "mul_": lambda layer: layer.weight.mul_(2),
    "init": lambda layer: nn.init.normal_(layer.weight),
    "data": lambda layer: layer.weight.data.copy_(torch.ones(5, 7)),
    "item": lambda layer: layer.weight.__setitem__(0, 1.0),
    "detached": lambda layer: layer.weight.detach().zero_(),
    "out": lambda layer: torch.add(torch.ones(5, 7), 1, out=layer.weight),
    "requires_grad_": lambda layer: layer.weight.requires_grad_(),
    "set data": lambda layer: setattr(layer.weight, "data", torch.ones(5, 7)),
    "set": lambda layer: setattr(layer, "weight", nn.Parameter(torch.ones(5, 7))),
    "set a tensor": lambda layer: setattr(layer, "weight", torch.ones(5, 7)),
    "+=": lambda layer: layer.weight.__iadd__(1),
    "foreach": lambda layer: torch._foreach_mul_([layer.weight], 2.0),
    "row": lambda layer: layer.weight[1].zero_(),
    "row of data": lambda layer: layer.weight.data[1].zero_(),
    "item of a view": lambda layer: layer.weight.view(-1).__setitem__(0, 1.0),
    "transposed": lambda layer: layer.weight.T.copy_(torch.ones(7, 5)),
    "view of a view": lambda layer: layer.weight.detach().t()[2:].t().mul_(2),
    "same dtype": lambda layer: layer.weight.float().mul_(2),
    "contiguous": lambda layer: layer.weight.contiguous().add_(1),
    "other dtype": lambda layer: layer.weight.view(torch.int32).zero_(),
    "chunk": lambda layer: layer.weight.chunk(2)[1].zero_(),
    "iterated": lambda layer: [row.zero_() for row in layer.weight],
    "out=view": lambda layer: torch.add(torch.ones(7), 1, out=layer.weight[0]),
    "inplace=True": lambda layer: F.relu(layer.weight, inplace=True),
    "past __torch_function__": lambda layer: without_torch_function(layer.weight.zero_),
}


def without_torch_function(write: Callable[[], Any]) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        return write()


@pytest.mark.parametrize("write", WRITES)
def test_writing_is_loud(write: str, packed: TernaryLinear) -> None:
    before = packed.weight.clone()
    with pytest.raises(
        (RuntimeError, KeyError, AttributeError), match=r"cannot be written|weight|sett"
    ):
        WRITES[write](packed)
    assert torch.equal(packed.weight, before)
    assert "weight" not in packed._parameters


READS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "copy_": lambda target, w: target.copy_(w),
    "+=": lambda target, w: target.__iadd__(w),
    "out": lambda target, w: torch.add(w, 0, out=target),
    "item": lambda target, w: target.__setitem__(slice(None), w),
    "item of a view": lambda target, w: target.__setitem__(0, w[0]),
    "foreach": lambda target, w: torch._foreach_add_([target], [w]),
    "past __torch_function__": lambda target, w: without_torch_function(lambda: target.copy_(w)),
}


@pytest.mark.parametrize("read", READS)
def test_it_can_be_written_into_other_tensors(read: str, packed: TernaryLinear) -> None:
    target, expected = torch.zeros(5, 7), torch.zeros(5, 7)
    READS[read](target, packed.weight)
    READS[read](expected, packed.weight.clone())
    assert type(target) is Tensor
    assert expected.any()
    assert torch.equal(target, expected)


def test_a_copy_is_a_plain_tensor_and_a_view_is_not(packed: TernaryLinear) -> None:
    for copied in (packed.weight.clone(), packed.weight + 0, packed.weight.to(torch.float64)):
        assert type(copied) is Tensor
        copied.zero_()
    view = packed.weight.t()[1:]
    assert type(view) is type(packed.weight)
    assert (view.shape, view.stride(), view.dtype) == ((6, 5), (1, 7), torch.float32)
    assert torch.equal(view, packed.weight.clone().t()[1:])
    assert TernaryLinear(7, 5, device="meta").weight.t().is_meta


def test_writes_that_are_not_seen_change_nothing(packed: TernaryLinear) -> None:
    """Compiled code and numpy write into a copy."""
    before = packed.weight.clone()

    def write(x: Tensor) -> Tensor:
        return x + packed.weight.mul_(2).sum()

    compiled = torch.compile(write, fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.zeros(())), before.mul(2).sum())
    packed.weight.numpy()[:] = 3
    assert torch.equal(packed.weight, before)


def test_fake_tensors() -> None:
    with FakeTensorMode():
        weight = TernaryLinear(7, 5).weight
        assert (weight.shape, weight.dtype) == ((5, 7), torch.float32)
        assert weight.t()[1:].sum(1).shape == (6,)


def test_assigning_it_to_data_makes_nan(packed: TernaryLinear) -> None:
    """torch passes the assignment to nobody: without memory to read, the process would crash."""
    target = nn.Parameter(torch.zeros(5, 7))
    target.data = packed.weight
    assert target.isnan().all()
    target.data = packed.weight.clone()
    assert torch.equal(target, packed.weight)


def test_a_gradient_flows_past_the_weight(packed: TernaryLinear) -> None:
    x = torch.randn(2, 7, requires_grad=True)
    F.linear(x, packed.weight).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, packed.weight.sum(0).expand(2, 7))


@pytest.mark.parametrize("base", ["nf4", "ternary"])
def test_frozen_and_adapted_layers_have_one_too(base: str) -> None:
    model = nn.Sequential(nn.Linear(12, 6))
    add_adapters(model, AdapterConfig(kind="qlora", base=base, rank=2, targets=["0"]))  # type: ignore[arg-type]
    frozen = model[0].base
    assert torch.equal(frozen.weight, frozen.dequantize())
    assert (model[0].weight.dtype, model[0].weight.shape) == (torch.float32, (6, 12))
    with pytest.raises(TypeError, match="adapter it cannot be used by itself; merge_adapters"):
        F.linear(torch.ones(1, 12), model[0].weight)


T5: dict[str, Any] = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2}
T5 |= {"num_layers": 1, "num_decoder_layers": 1, "decoder_start_token_id": 0, "dropout_rate": 0.0}
FAMILIES: dict[str, dict[str, Any]] = {
    "T5": {},
    "UMT5": {"feed_forward_proj": "gated-gelu"},
    "LongT5": {"local_radius": 3},
    "SwitchTransformers": {"num_experts": 2, "expert_capacity": 8, "num_sparse_encoder_layers": 1},
}
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def family(name: str) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**T5 | FAMILIES[name])
    return getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()


@pytest.mark.filterwarnings("ignore:replace_linear")  # Switch's experts are few
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
def test_models_that_ask_for_the_weight(name: str, dtype: torch.dtype) -> None:
    model = replace_linear(family(name)).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    with torch.no_grad():
        logits = model(input_ids=IDS, labels=IDS).logits
        packed = pack(copy.deepcopy(model))
        assert torch.equal(packed(input_ids=IDS, labels=IDS).logits, logits)
        if dtype == torch.bfloat16:  # its wo stay fp32, as transformers keeps them
            for module in model.modules():
                if isinstance(wo := getattr(module, "wo", None), BitLinear):
                    wo.float()
            logits = model(input_ids=IDS, labels=IDS).logits
            assert torch.equal(pack(model)(input_ids=IDS, labels=IDS).logits, logits)


def test_a_t5_of_integers_and_a_t5_with_adapters() -> None:
    model = prepare(family("T5"), Recipe(weights="int", bits=4, skip=["lm_head"]))
    with torch.no_grad():
        logits = model(input_ids=IDS, labels=IDS).logits
        assert torch.equal(convert(model)(input_ids=IDS, labels=IDS).logits, logits)
    model = add_adapters(family("T5"), AdapterConfig(kind="lora", rank=2, targets=["wi", "wo"]))
    model(input_ids=IDS, labels=IDS).loss.backward()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own
def test_compiled_code_asks_without_a_graph_break(packed: TernaryLinear) -> None:
    def forward(x: Tensor) -> Tensor:
        return packed(x.to(packed.weight.dtype)) + x @ packed.weight.t()

    compiled = torch.compile(forward, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(X), forward(X))


def test_the_fused_encoder_does_not_take_it() -> None:
    """In eval it would multiply with the dequantized weight, past the layer's forward."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    layer.linear1, layer.linear2 = BitLinear(16, 32), BitLinear(32, 16)
    x = torch.randn(2, 5, 16)
    trained = layer.train()(x)
    packed = pack(layer).eval()
    with torch.no_grad():
        y = packed(x)
        packed.activation_relu_or_gelu = 0  # type: ignore[assignment]
        assert torch.equal(packed(x), y)
    assert (y - trained).abs().max() < 0.1
