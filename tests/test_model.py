"""The transformer against a second, naive writing of it, and the shapes that depth chooses."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from bitnet.linear import BitLinear
from bitnet.model import KVCache, ModelConfig, Transformer
from bitnet.quant import absmean_ternary
from bitnet.schema import UserError
from tests.helpers.small_training import SMALL

VARIANTS: list[dict[str, Any]] = [
    {},
    {"norm_placement": "pre_norm", "activation": "silu", "tie_embeddings": False},
    {"norm_placement": "in_linear", "qk_norm": True},
    {"qk_norm": True, "granularity": "row", "n_kv_heads": 4},
    {"granularity": "group", "group_size": 16, "n_kv_heads": 1},
    {"qkv_bias": True},
    {"qkv_bias": True, "norm_placement": "in_linear", "granularity": "row"},
]


def small(**options: Any) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**(SMALL | options)))
    for parameter in model.parameters():  # norms too: a weight of 1 would hide a missing one
        if parameter.dim() == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def naive_norm(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    if name not in weights:
        return x
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weights[name]


def naive_linear(x: Tensor, weights: dict[str, Tensor], name: str, config: ModelConfig) -> Tensor:
    w = weights[f"{name}.weight"]
    x = naive_norm(x, weights, f"{name}.rms_norm.weight")
    bias = weights.get(f"{name}.bias", torch.zeros(len(w), dtype=torch.float64))
    if config.linear == "fp":
        return x @ w.t() + bias
    codes, gamma = absmean_ternary(w, config.granularity, config.group_size)
    g = gamma.double()
    if gamma.dim() == 1:
        g = g[:, None]
    if gamma.dim() == 2:
        columns = torch.arange(w.shape[1]) // config.group_size
        g = g[:, columns]
    s = x.abs().amax(-1, keepdim=True) / 127
    return ((x / s).round() * s) @ (codes.double() * g).t() + bias


def naive_forward(model: Transformer, tokens: Tensor) -> Tensor:
    """float64, one head and one position at a time; rotary as complex multiplication."""
    c = model.config
    w = {name: tensor.double() for name, tensor in model.state_dict().items()}
    x = w["embed_tokens.weight"][tokens]
    t, e, group = x.shape[0], c.head_dim, c.n_heads // c.n_kv_heads

    def turn(vector: Tensor, position: int) -> Tensor:
        half = e // 2
        angles = torch.tensor([position * c.rope_theta ** (-2 * i / e) for i in range(half)])
        turned = torch.complex(vector[:half], vector[half:]) * torch.exp(1j * angles.double())
        return torch.cat((turned.real, turned.imag))

    for i in range(c.n_layers):
        p = f"layers.{i}.self_attn."
        h = naive_norm(x, w, f"layers.{i}.input_layernorm.weight")
        q, k, v = (naive_linear(h, w, f"{p}{n}_proj", c) for n in "qkv")
        out = torch.zeros(t, c.d_model, dtype=torch.float64)
        for head in range(c.n_heads):
            kv = head // group
            qs = q[:, head * e : (head + 1) * e]
            ks, vs = (z[:, kv * e : (kv + 1) * e] for z in (k, v))
            qs, ks = naive_norm(qs, w, f"{p}q_norm.weight"), naive_norm(ks, w, f"{p}k_norm.weight")
            turned = [turn(key, s) for s, key in enumerate(ks)]
            for pos in range(t):
                query = turn(qs[pos], pos)
                scores = torch.stack([query @ turned[s] for s in range(pos + 1)]) / math.sqrt(e)
                out[pos, head * e : (head + 1) * e] = scores.softmax(0) @ vs[: pos + 1]
        out = naive_norm(out, w, f"{p}attn_sub_norm.weight")
        x = x + naive_linear(out, w, f"{p}o_proj", c)
        h = naive_norm(x, w, f"layers.{i}.post_attention_layernorm.weight")
        gate = naive_linear(h, w, f"layers.{i}.mlp.gate_proj", c)
        gate = gate.clamp(min=0) ** 2 if c.activation == "relu2" else gate * gate.sigmoid()
        h = gate * naive_linear(h, w, f"layers.{i}.mlp.up_proj", c)
        h = naive_norm(h, w, f"layers.{i}.mlp.ffn_sub_norm.weight")
        x = x + naive_linear(h, w, f"layers.{i}.mlp.down_proj", c)
    return naive_norm(x, w, "norm.weight") @ w["lm_head.weight"].t()


@pytest.mark.parametrize("variant", VARIANTS)
def test_full_precision_forward_is_the_naive_one(variant: dict[str, Any]) -> None:
    model = small(linear="fp", **variant)
    tokens = torch.randint(0, 50, (16,), generator=torch.Generator().manual_seed(1))
    expected = naive_forward(model, tokens)
    # fp32 against float64: about sqrt(K) roundings of 2^-24 in each of some 20 layers of products
    torch.testing.assert_close(model(tokens[None])[0].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_ternary_forward_is_the_naive_one(variant: dict[str, Any]) -> None:
    model = small(**variant)
    tokens = torch.randint(0, 50, (16,), generator=torch.Generator().manual_seed(1))
    difference = (model(tokens[None])[0].double() - naive_forward(model, tokens)).abs()
    # fp32 rounding may push an activation over a rounding threshold: a step of 1/127 of one input
    # of a row. Most logits see none, no logit sees more than a few.
    assert difference.median() < 1e-3
    assert difference.max() < 0.1 * model(tokens[None]).std()


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameter_counts_and_names(variant: dict[str, Any]) -> None:
    for linear in ("ternary", "fp"):
        model = small(linear=linear, **variant)
        total = sum(p.numel() for p in model.parameters())
        assert model.config.num_parameters()["total"] == total
        kinds = {type(m) for m in model.layers.modules() if isinstance(m, nn.Linear)}
        assert (BitLinear in kinds) == (linear == "ternary")
        assert len(kinds) == 1
    ternary = set(small(**variant).state_dict())
    assert ternary == set(model.state_dict())


def test_names_are_those_of_hugging_face_bitnet() -> None:
    names = set(small().state_dict())
    layer = {
        "input_layernorm",
        "post_attention_layernorm",
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "self_attn.attn_sub_norm",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
        "mlp.ffn_sub_norm",
    }
    assert {n.removeprefix("layers.0.") for n in names if n.startswith("layers.0.")} == {
        f"{name}.weight" for name in layer
    }
    assert {n for n in names if not n.startswith("layers.")} == {
        "embed_tokens.weight",
        "norm.weight",
        "lm_head.weight",
    }


def test_flops_by_hand() -> None:
    c = small().config
    matrices = 2 * (24 * 24 * 2 + 2 * 24 * 12 + 3 * 24 * 40)
    assert c.flops_per_token(8) == 6 * (matrices + 24 * 50) + 12 * 2 * 24 * 8


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("linear", ["fp", "ternary"])
def test_cache_gives_the_same_logits(variant: dict[str, Any], linear: str) -> None:
    model = small(linear=linear, **variant).eval()
    tokens = torch.randint(0, 50, (3, 13), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        whole = model(tokens)
        cache = KVCache(model.config, 3, 13)
        parts = [model(part, cache=cache) for part in tokens.split([5, 1, 1, 6], 1)]
    difference = (torch.cat(parts, 1) - whole).abs()
    if linear == "fp":
        assert difference.max() < 1e-5
    assert difference.median() < 1e-5
    assert difference.max() < 0.1 * whole.std()
    assert cache.length == 13


def test_left_padding_changes_nothing() -> None:
    model = small(linear="fp").eval()
    tokens = torch.randint(0, 50, (1, 9), generator=torch.Generator().manual_seed(3))
    padded = torch.cat((torch.full((1, 4), 7), tokens), 1)
    cache = KVCache(model.config, 1, 16)
    cache.pad[:] = 4
    with torch.no_grad():
        alone = model(tokens)
        assert (model(padded, cache=cache)[:, 4:] - alone).abs().max() < 1e-5
        more = model(tokens[:, :2], cache=cache)
        assert (more - model(torch.cat((tokens, tokens[:, :2]), 1))[:, -2:]).abs().max() < 1e-5


def test_causal() -> None:
    model = small().eval()
    tokens = torch.randint(0, 50, (1, 12))
    changed = tokens.clone()
    changed[0, 8:] = (changed[0, 8:] + 1) % 50
    assert torch.equal(model(tokens)[:, :8], model(changed)[:, :8])


def test_context_overflow_is_an_error() -> None:
    model = small()
    with pytest.raises(ValueError, match=r"tokens: 0 \+ 17 tokens exceed the context of 16"):
        model(torch.zeros(1, 17, dtype=torch.int64))
    cache = KVCache(model.config, 1, 4)
    model(torch.zeros(1, 3, dtype=torch.int64), cache=cache)
    with pytest.raises(ValueError, match=r"tokens: 3 \+ 2 tokens"):
        model(torch.zeros(1, 2, dtype=torch.int64), cache=cache)


def test_initial_weights() -> None:
    torch.manual_seed(0)
    model = Transformer(ModelConfig(depth=4, vocab_size=1000, max_seq_len=64))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            expected = 0.02 / math.sqrt(2 * 4) if residual else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.02)
    codes, _ = model.layers[0].mlp.up_proj.quantize()
    assert (codes == 0).float().mean().item() == pytest.approx(0.31, abs=0.01)
    logits = model(torch.randint(0, 1000, (2, 64)))
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), torch.randint(0, 1000, (128,)))
    assert loss.item() == pytest.approx(math.log(1000), rel=0.05)


@pytest.mark.parametrize(
    ("depth", "shape"),
    [
        (1, (1, 64, 1, 1, 192)),
        (4, (4, 256, 4, 1, 704)),
        (12, (12, 768, 12, 3, 2048)),
        (20, (20, 1280, 20, 5, 3456)),
        (24, (24, 1536, 24, 6, 4096)),
    ],
)
def test_the_dial(depth: int, shape: tuple[int, ...]) -> None:
    c = ModelConfig(depth=depth).resolve(vocab_size=100, seq_len=32)
    assert (c.n_layers, c.d_model, c.n_heads, c.n_kv_heads, c.d_ff) == shape
    assert (c.vocab_size, c.max_seq_len, c.head_dim) == (100, 32, 64)
    assert c.resolve() == c


def test_every_depth_and_width_resolves() -> None:
    for depth in range(1, 50):
        ModelConfig(depth=depth).resolve(100, 8)
    for d_model in range(2, 400, 2):
        c = ModelConfig(d_model=d_model).resolve(100, 8)
        assert c.n_heads * c.head_dim == d_model


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_model": 100, "n_heads": 3}, "n_heads = 3 does not divide model.d_model = 100"),
        ({"d_model": 12, "n_heads": 4}, "into heads of an even head_dim; the nearest .* is 3"),
        ({"d_model": 13}, "d_model = 13 is odd"),
        ({"d_model": 256, "n_heads": 4, "n_kv_heads": 3}, "n_kv_heads = 3 does not divide"),
        ({"vocab_size": 0}, "model.vocab_size is not set"),
        ({"linear": "fp", "int8_backward": "both"}, 'model.int8_backward = "both" needs model.lin'),
        (
            {"granularity": "group", "int8_backward": "input"},
            'model.int8_backward = "input" has no group-wise scales; set model.granularity = "row"',
        ),
    ],
)
def test_shapes_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ModelConfig(**({"max_seq_len": 8, "vocab_size": 9} | options)).resolve()


def test_the_config_is_strict() -> None:
    for bad in ({"depth": "6"}, {"depht": 6}, {"linear": "fp16"}, {"depth": 0}, {"qk_norm": 1}):
        with pytest.raises(ValidationError):
            ModelConfig(**bad)  # type: ignore[arg-type]


def test_every_parameter_gets_a_gradient() -> None:
    for variant in VARIANTS:
        model = small(**variant)
        model(torch.randint(0, 50, (2, 16))).square().mean().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


def test_hidden_is_what_the_head_reads() -> None:
    model = small(tie_embeddings=False)
    tokens = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(4))
    hidden = model.hidden(tokens)
    assert hidden.shape == (2, 9, 24)
    assert torch.equal(hidden @ model.lm_head.weight.t(), model(tokens))
    cache = KVCache(model.config, 2, 9)
    model.hidden(tokens, cache)
    assert cache.length == 9


def test_int8_backward_reaches_every_matrix() -> None:
    layers = [m for m in small(int8_backward="both").modules() if isinstance(m, BitLinear)]
    assert {layer.int8_backward for layer in layers} == {"both"}
    assert len(layers) == 14
    assert {m.int8_backward for m in small().modules() if isinstance(m, BitLinear)} == {"none"}


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own
@pytest.mark.parametrize("linear", ["fp", "ternary"])
def test_compiles_without_graph_break(linear: str) -> None:
    model = small(linear=linear, n_layers=1)
    tokens = torch.randint(0, 50, (2, 16))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens), model(tokens), rtol=1e-5, atol=1e-6)
    assert dataclasses.replace(model.config, depth=3).depth == 3
