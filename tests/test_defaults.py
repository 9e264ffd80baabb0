"""torch's default dtype and default device belong to the caller: the library's numbers do not
depend on them. Each case runs under fp32 first; another default must give the same bits."""

import ast
import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitnet.bitlinear import BitLinear
from bitnet.engine.engine import Engine
from bitnet.evaluate import evaluate_windows
from bitnet.export.folder import load_model, save_model
from bitnet.export.proof import prove
from bitnet.linear import TernaryLinear, pack, replace_linear
from bitnet.loss import linear_cross_entropy
from bitnet.model import ModelConfig, Transformer, as_transformer, rotary
from bitnet.qat import Recipe, calibrate, convert, prepare
from bitnet.qat.adapters import AdapterConfig, add_adapters, merge_adapters
from bitnet.qat.awq import awq
from bitnet.qat.gptq import gptq
from bitnet.qat.layers import QATLayer
from bitnet.qat.smoothquant import smoothquant
from bitnet.quant import stochastic_int8
from bitnet.training.distill import DistillConfig, Distiller
from bitnet.training.optim import OptimConfig, build_optimizer
from bitnet.training.telemetry import Telemetry
from bitnet_kernels import pack_base3, unpack_base3
from bitnet_kernels.reference import decode_attention, rope_append
from tests.helpers.source_trees import FILES, MODULES, tree

DTYPES = [torch.bfloat16, torch.float16, torch.float64]
HERE: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def randn(*shape: int, grad: bool = False) -> Tensor:
    return torch.randn(*shape, **HERE).requires_grad_(grad)


def train_step(model: nn.Module, *shape: int) -> list[Tensor]:
    """The output for random input, and the gradients of its sum weighted at random."""
    x = randn(*shape, grad=True)
    y = model(x)
    (y * randn(*y.shape)).sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert x.grad is not None
    assert gradients
    return [y.detach(), x.grad, *gradients]


def small_model(**fields: Any) -> Transformer:
    shape = {"d_model": 16, "n_layers": 2, "n_heads": 2, "d_ff": 24}
    with (
        default_dtype(torch.float32),
        torch.device("cpu"),
    ):  # parameters follow the default, as nn.Linear's do
        return Transformer(ModelConfig(**shape | fields, vocab_size=30, max_seq_len=16))


TOKENS = torch.randint(30, (3, 13), generator=torch.Generator().manual_seed(3))


def bit_linear(**options: Any) -> Callable[[], object]:
    def case() -> object:
        layer = BitLinear(24, 6, **HERE, **options)
        trained = train_step(layer, 5, 24)
        return trained, pack(layer)(randn(5, 24))

    return case


def qat(**options: Any) -> Callable[[], object]:
    """A convolution, an embedding and linear layers: a step, and the converted model."""

    def case() -> object:
        recipe = Recipe(**options, group_size=10, keep_first_last=False)
        model = nn.Sequential(nn.Conv1d(4, 6, 3, **HERE), nn.Flatten(), nn.Linear(36, 5, **HERE))
        prepare(model, recipe)
        if recipe.activations == "static":
            calibrate(model, [randn(2, 4, 8), 3 * randn(2, 4, 8)])
        layers = [module for module in model.modules() if isinstance(module, QATLayer)]
        steps = [layer.weight_step for layer in layers if layer.weight_step is not None]
        first = [step.detach().clone() for step in steps]
        trained = train_step(model, 2, 4, 8)
        for layer in layers:
            layer.initialize_step()
        return first, trained, steps, convert(model)(randn(2, 4, 8))

    return case


def embedding() -> object:
    model = prepare(
        nn.Embedding(9, 12, **HERE),
        Recipe(weights="twn", modules=["embedding"], keep_first_last=False),
    )
    rows = torch.tensor([1, 8, 1], device="cpu")
    y = model(rows)
    (y * randn(*y.shape)).sum().backward()
    return y, model.weight.grad, convert(model)(rows)


def adapters(kind: str, base: str) -> Callable[[], object]:
    def case() -> object:
        model = nn.Sequential(nn.Linear(70, 6, **HERE))
        config = AdapterConfig(kind=kind, base=base, rank=2, targets=["0"])  # type: ignore[arg-type]
        add_adapters(model, config)
        nn.init.normal_(model[0].lora_b)
        trained = train_step(model, 3, 70)
        report = merge_adapters(model)
        return trained, str(report), model[0].weight

    return case


def ptq(method: Callable[..., Transformer], **options: Any) -> Callable[[], object]:
    def case() -> object:
        recipe = Recipe(weights="int", bits=4, group_size=10, **options)
        return method(small_model(linear="fp"), recipe, TOKENS[:, :-1]).state_dict()

    return case


def optimizer(kind: str) -> Callable[[], object]:
    def case() -> object:
        model = small_model()
        config = OptimConfig(optimizer=kind, lr=1e-2, muon_lr=0.02)  # type: ignore[arg-type]
        optimizers = build_optimizer(model, config)
        for _ in range(3):
            hidden = model.hidden(TOKENS[:, :-1]).flatten(0, 1)
            loss = linear_cross_entropy(hidden, model.lm_head.weight, TOKENS[:, 1:].flatten())
            loss.backward()
            optimizers.step()
            optimizers.zero_grad()
        return loss, model.state_dict()

    return case


def telemetry() -> object:
    model = nn.Sequential(BitLinear(24, 6, **HERE, granularity="group", group_size=10))
    reader = Telemetry(model)
    readings = [reader.read(randn(4, 24)) for _ in range(2)]
    return str(readings)


def evaluation() -> object:
    return str(evaluate_windows(small_model().eval(), list(TOKENS), len))


def generation(**fields: Any) -> Callable[[], object]:
    def case() -> object:
        model = as_transformer(pack(small_model(**fields))).eval()
        engine = Engine(model, max_batch=2, chunk=4)
        prompts = [TOKENS[0, :3].tolist(), TOKENS[1, :7].tolist()]
        greedy = engine.generate(prompts, 4, temperature=0.0)
        return greedy, engine.generate(prompts, 4, temperature=1.0, seed=1)

    return case


def distillation() -> object:
    teacher, student = small_model(linear="fp"), small_model()
    config = DistillConfig(teacher="x", logits=1.0, attention=1.0, relation_heads=2)
    distiller = Distiller(teacher, student, config, bf16=False)
    logits = student(TOKENS[:, :-1])
    targets = TOKENS[:, 1:].flatten()
    cross_entropy = nn.functional.cross_entropy(logits.flatten(0, 1), targets)
    distiller.begin(0)
    loss = distiller.lesson(TOKENS[:, :-1], logits, cross_entropy)
    loss.backward()
    return loss, [parameter.grad for parameter in student.parameters()]


def decoding() -> object:
    cos, sin = rotary(torch.arange(8, device="cpu"), 4, 10000.0)
    lengths, valid = (torch.tensor(n, device="cpu") for n in ([2, 0], [3, 2]))
    k, v = randn(2, 1, 8, 4), randn(2, 1, 8, 4)
    q = rope_append(randn(2, 3, 16), cos, sin, k, v, lengths, valid)
    return cos, sin, k, v, q, decode_attention(randn(2, 3, 2, 4), k, v, lengths)


def proof() -> object:
    model = small_model()
    return str(prove(model, as_transformer(pack(copy.deepcopy(model))), [[1, 2, 3]], 4))


def packed_constructor() -> object:
    layer = TernaryLinear(24, 6, device="cpu", norm=True)
    assert layer.bias is not None
    assert layer.rms_norm is not None
    return layer.bias, layer.rms_norm.weight, layer(randn(2, 24))


def normed() -> object:
    model = replace_linear(nn.Linear(8, 4, **HERE), norm=True)
    return train_step(model, 3, 8)


CASES: dict[str, Callable[[], object]] = {
    "tensor": bit_linear(),
    "group": bit_linear(granularity="group", group_size=10, grad_mask="trust"),
    "int8 backward": bit_linear(int8_backward="both"),
    "int8 backward, rows": bit_linear(int8_backward="both", granularity="row"),
    "norm inside": normed,
    "packed constructor": packed_constructor,
    **{f"twn, {g}": qat(weights="twn", granularity=g) for g in ("tensor", "row", "group")},
    "absmedian": qat(weights="absmedian", granularity="group", grad_mask="clip"),
    "sign": qat(weights="sign", granularity="group"),
    "lsq": qat(weights="lsq", granularity="row", bits=3),
    "lsq, group": qat(weights="lsq", granularity="group", bits=3),
    "seq": qat(weights="seq", granularity="group"),
    "seq_ternary": qat(weights="seq_ternary", granularity="tensor"),
    "int": qat(weights="int", granularity="group", bits=3, activations="none"),
    "affine": qat(weights="int", granularity="group", symmetric=False),
    **{
        f"observer {kind}": qat(
            weights="int", activations="static", activation_symmetric=False, observer=kind
        )
        for kind in ("minmax", "moving_average", "percentile", "mse")
    },
    "embedding": embedding,
    "lora": adapters("lora", "nf4"),
    "nf4": adapters("qlora", "nf4"),
    "ternary base": adapters("qlora", "ternary"),
    "gptq": ptq(gptq),
    "gptq, group": ptq(gptq, granularity="group"),
    "awq": ptq(awq, granularity="group"),
    "smoothquant": ptq(smoothquant, activations="static"),
    "adamw": optimizer("adamw"),
    "muon": optimizer("muon"),
    "telemetry": telemetry,
    "evaluation": evaluation,
    "generation": generation(),
    "generation, group": generation(granularity="group", group_size=8),
    "distillation": distillation,
    "decoding operators": decoding,
    "proof": proof,
    "stochastic": lambda: stochastic_int8(randn(4, 9)),
    "base 3": lambda: unpack_base3(pack_base3(BitLinear(7, 3, **HERE).quantize()[0]), 7),
}


def tensors(value: object) -> list[object]:
    if isinstance(value, dict):
        return [item for key, part in value.items() for item in (key, *tensors(part))]
    if isinstance(value, list | tuple):
        return [item for part in value for item in tensors(part)]
    return [value]


def run(case: Callable[[], object]) -> list[object]:
    torch.manual_seed(7)
    return tensors(case())


def assert_same(result: list[object], expected: list[object]) -> None:
    assert len(result) == len(expected) > 0
    for got, want in zip(result, expected, strict=True):
        if isinstance(want, Tensor):
            assert isinstance(got, Tensor)
            assert got.dtype == want.dtype
            assert torch.equal(got, want)
        else:
            assert got == want


@pytest.mark.parametrize("name", CASES)
def test_the_default_dtype_changes_no_bit(name: str) -> None:
    expected = run(CASES[name])
    for dtype in DTYPES:
        with default_dtype(dtype):
            assert_same(run(CASES[name]), expected)
    with torch.device("meta"):
        assert_same(run(CASES[name]), expected)


@pytest.mark.parametrize("form", ["latent", "packed", "integer"])
def test_a_folder_loads_under_any_default(form: str, tmp_path: Path) -> None:
    """With the bits, dtypes and device that were saved, and not as "damaged"."""
    recipe = Recipe(weights="int", bits=4) if form == "integer" else Recipe()
    model = small_model(linear="fp" if form == "integer" else "ternary")
    if form == "packed":
        pack(model)
    elif form == "integer":
        convert(prepare(model, recipe))
    save_model(tmp_path / "model", model, None, recipe)
    expected = [*tensors(dict(model.state_dict())), model(TOKENS)]
    contexts = [default_dtype(dtype) for dtype in DTYPES] + [torch.device("meta")]
    for context in contexts:
        with context:
            loaded = load_model(tmp_path / "model")
            assert_same([*tensors(dict(loaded.state_dict())), loaded(TOKENS)], expected)
            save_model(tmp_path / "again", loaded, None, recipe)
            assert_same(tensors(dict(load_model(tmp_path / "again").state_dict())), expected[:-1])


def test_latent_weights_follow_the_default_as_those_of_nn_linear_do() -> None:
    with default_dtype(torch.bfloat16):
        assert BitLinear(4, 3).weight.dtype == nn.Linear(4, 3).weight.dtype == torch.bfloat16


NAMES_DTYPE = {"zeros", "ones", "empty", "full", "arange", "tensor", "linspace", "logspace"}
NAMES_DTYPE |= {"rand", "randn", "normal", "eye", "scalar_tensor", "empty_strided", "as_tensor"}
NAMES_DEVICE = NAMES_DTYPE | {"randint", "randperm"}


def unnamed(source: ast.AST) -> list[str]:
    """The calls that make a tensor of the default dtype or on the default device."""
    found = []
    for node in ast.walk(source):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        owner, _, name = called.rpartition(".")
        given = {keyword.arg for keyword in node.keywords}
        wanted = {"dtype"} if name in NAMES_DTYPE else set[str]()
        wanted |= {"device"} if name in NAMES_DEVICE else set[str]()
        if owner == "torch" and not wanted <= given:
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
        if called.startswith("torch.") and called.endswith("Tensor"):  # torch.FloatTensor(...)
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize("module", MODULES)
def test_every_new_tensor_names_its_dtype_and_device(module: str) -> None:
    assert not unnamed(tree(module)), FILES[module].name


@pytest.mark.parametrize(
    "line",
    [
        "torch.zeros(3, device=x.device)",
        "nn.Parameter(torch.empty(3, dtype=torch.float32))",
        "torch.arange(5, device='cpu')",
        "torch.tensor([0.5], **options)",
        "torch.randint(3, (2,))",
        "torch.Tensor(3)",
    ],
)
def test_the_rule_finds(line: str) -> None:
    assert unnamed(ast.parse(line))
    assert not unnamed(
        ast.parse("torch.zeros(3, dtype=torch.int8, device=x.device); x.new_ones(3)")
    )
