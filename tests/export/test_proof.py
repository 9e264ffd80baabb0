"""The proof holds for what pack makes, and any difference, however small, breaks it."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitnet.export import proof as proof_module
from bitnet.export.proof import RANDOM_TOKENS, prove
from bitnet.linear import TernaryLinear, pack
from bitnet.model import ModelConfig, Transformer
from bitnet.schema import UserError

PROMPTS = [[5], [7, 8, 9, 10, 11, 12, 13], [3, 60, 2]]
NAME = "layers.1.mlp.down_proj"


def make(**fields: Any) -> Transformer:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"depth": 2, "d_model": 24, "n_heads": 2, "n_kv_heads": 1, "d_ff": 37}
    model = Transformer(ModelConfig(**shape, vocab_size=61, max_seq_len=32, **fields))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def packed(model: Transformer) -> Transformer:
    result = pack(copy.deepcopy(model))
    assert isinstance(result, Transformer)
    return result


@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"tie_embeddings": False, "norm_placement": "in_linear", "qk_norm": True},
        {"granularity": "row", "activation": "silu"},
        {"granularity": "group", "group_size": 16, "norm_placement": "pre_norm"},
    ],
    ids=str,
)
def test_holds_for_a_packed_model(kind: dict[str, Any]) -> None:
    latent = make(**kind)
    model = packed(latent).eval()
    before = copy.deepcopy(latent.state_dict())
    result = prove(latent, model, PROMPTS, 6)
    assert result.differences == []
    assert result.holds
    assert result.matrices == 14
    assert result.weights == 2 * (2 * 24 * 24 + 2 * 12 * 24 + 3 * 24 * 37)
    rows_out = 2 * (24 + 12 + 12 + 24 + 37 + 37 + 24)
    assert result.accumulators == (RANDOM_TOKENS + 11) * rows_out
    assert result.logits == 11 * 61
    assert result.tokens == 3 * 6
    assert latent.training
    assert not model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in latent.state_dict().items())
    assert not any(module._forward_pre_hooks for module in latent.modules())


def _layer(model: Transformer) -> TernaryLinear:
    layer = model.get_submodule(NAME)
    assert isinstance(layer, TernaryLinear)
    return layer


def _flip_a_code(model: Transformer) -> None:
    _layer(model).packed[3, 2] ^= 1  # whatever it was, it is another one now


def _next_scale(model: Transformer) -> None:
    layer = _layer(model)
    layer.scale.copy_(torch.nextafter(layer.scale, torch.tensor(1.0)))


def _unpack_a_layer(model: Transformer) -> None:
    model.set_submodule(NAME, make().get_submodule(NAME))


def _next_norm(model: Transformer) -> None:
    with torch.no_grad():
        weight = model.norm.weight
        weight[5] = torch.nextafter(weight[5], torch.tensor(9.0))


def _other_embedding(model: Transformer) -> None:
    with torch.no_grad():
        model.embed_tokens.weight.neg_()


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (_flip_a_code, {f"{NAME}: codes differ", f"{NAME}: integer accumulators differ"}),
        (_next_scale, {f"{NAME}: scales differ"}),
        (_unpack_a_layer, {f"{NAME}: is not packed"}),
        (_next_norm, {"norm.weight: differs"}),
        (_other_embedding, {"embed_tokens.weight: differs", "prompt 0: logits differ"}),
    ],
)
def test_any_difference_is_found_and_named(
    damage: Callable[[Transformer], None], expected: set[str]
) -> None:
    latent = make()
    model = packed(latent)
    damage(model)
    result = prove(latent, model, PROMPTS, 4)
    assert not result.holds
    assert expected <= set(result.differences)


def test_other_greedy_tokens_are_found() -> None:
    latent = make()
    model = packed(latent)
    _other_embedding(model)
    result = prove(latent, model, PROMPTS, 4)
    assert any(line.startswith("prompt 1: greedy tokens differ") for line in result.differences)


@pytest.mark.parametrize("function", ["ternary_matmul", "int8_matmul", "both"])
def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    """Off by one in one accumulator of 24 x 27; if both paths are wrong alike, by float64."""

    def break_it(name: str) -> None:
        right = getattr(proof_module, name)

        def wrong(*args: Any) -> Tensor:
            acc: Tensor = right(*args).clone()
            acc[-1, -1] += 1
            return acc

        monkeypatch.setattr(proof_module, name, wrong)

    for name in ("ternary_matmul", "int8_matmul") if function == "both" else (function,):
        break_it(name)
    latent = make()
    result = prove(latent, packed(latent), PROMPTS, 1)
    what = {
        "ternary_matmul": {"differ"},
        "int8_matmul": {"differ", "are not the exact product"},
        "both": {"are not the exact product"},
    }[function]
    named = [line for line in result.differences if line.startswith(NAME)]
    assert named == [f"{NAME}: integer accumulators {w}" for w in sorted(what, reverse=True)]


def test_the_proof_sees_extreme_activations() -> None:
    """Random int8 reach -128, which no quantized activation does."""
    seen: list[int] = []
    right = proof_module.int8_matmul

    def watch(x_q: Tensor, codes: Tensor) -> Tensor:
        seen.append(int(x_q.min()))
        return right(x_q, codes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proof_module, "int8_matmul", watch)
        latent = make()
        prove(latent, packed(latent), PROMPTS, 1)
    assert min(seen) == -128


def test_what_cannot_be_proven_is_refused() -> None:
    latent = make()
    model = packed(latent)
    for prompts in ([], [[1], []]):
        with pytest.raises(ValueError, match="prompts"):
            prove(latent, model, prompts, 1)
    twin = make(linear="fp")
    with pytest.raises(UserError, match="no ternary layers"):
        prove(twin, twin, PROMPTS, 1)


def test_a_nan_does_not_pass() -> None:
    latent = make()
    model = packed(latent)
    for each in (latent, model):
        nn.init.constant_(each.norm.weight, torch.nan)
    with pytest.raises(UserError, match="finite"):
        prove(latent, model, PROMPTS, 1)
