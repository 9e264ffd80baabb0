"""``bitnet generate``, called as from a shell."""

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import bitnet.cli.generate as bitnet_generate
from bitnet.cli.common import packed_bf16
from bitnet.engine.engine import Engine
from bitnet.export.folder import load
from bitnet.generate import encode_prompt, generate
from bitnet.linear import BitLinear, TernaryLinear
from bitnet.model import Transformer

Bitnet = Callable[..., tuple[int, str, str]]


def test_generate_streams_what_it_returns(bitnet: Bitnet, folders: Path) -> None:
    args = ("generate", folders / "model", "--prompt", "def f", "--max-new-tokens", "20")
    code, out, _ = bitnet(*args)
    assert code == 0
    assert out.startswith("def f")
    assert len(out) > len("def f\n")
    assert bitnet(*args)[1] == out
    assert bitnet(*args, "--seed", "5")[1] != out
    code, both, _ = bitnet(*args, "--prompt", "x = ☃", "--temperature", "0")
    assert code == 0
    assert "--- 1\ndef f" in both
    assert "--- 2\nx = ☃" in both


def test_extreme_sampling_is_greedy(bitnet: Bitnet, folders: Path) -> None:
    args = ("generate", folders / "model", "--prompt", "def f", "--max-new-tokens", "8")
    greedy = bitnet(*args, "--temperature", "0")[1]
    for options in (("--temperature", "5e-324"), ("--top-p", "1e-300"), ("--top-k", "1")):
        assert bitnet(*args, *options)[:2] == (0, greedy)


def test_generation_prints_a_replacement_character_once(bitnet: Bitnet, folders: Path) -> None:
    prompt = "def f1\N{REPLACEMENT CHARACTER}"
    args = ("generate", folders / "model", "--prompt", prompt, "--max-new-tokens", "0")
    assert bitnet(*args)[:2] == (0, prompt + "\n")
    _, out, _ = bitnet(*args[:-1], "8", "--temperature", "0")
    assert out.startswith(prompt)
    _, again, _ = bitnet(*args[:-1], "8", "--temperature", "0", "--prompt", "x")
    assert again.startswith(f"--- 1\n{out}--- 2\n")
    model, tokenizer = load(folders / "model")
    ids = encode_prompt(tokenizer, prompt)
    (new,) = generate(model, [ids], 8, eos_id=tokenizer.eos_id)
    assert out == tokenizer.decode([*ids, *new]) + "\n"


def test_a_gpu_generates_in_bf16_with_the_codes_of_the_fp32_weights(folders: Path) -> None:
    """The cast itself, which works on any device."""
    model, _ = load(folders / "model")
    expected = load(folders / "model")[0].layers[0].self_attn.q_proj
    assert isinstance(expected, BitLinear)
    codes, scale = expected.quantize()
    cast = packed_bf16(model, "auto")
    layer = cast.layers[0].self_attn.q_proj
    assert isinstance(layer, TernaryLinear)
    assert torch.equal(layer.codes(), codes)
    assert layer.scale.dtype == torch.float32
    assert torch.equal(layer.scale, scale)
    floats = {p.dtype for name, p in cast.named_parameters() if not name.endswith("scale")}
    assert floats == {torch.bfloat16}
    assert {p.dtype for p in packed_bf16(load(folders / "fp")[0], "auto").parameters()} == {
        torch.bfloat16
    }


def test_a_bf16_head_frees_the_fp32_embedding(
    bitnet: Bitnet, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When text begins, nothing but the engine holds what was loaded."""
    made: list[weakref.ref[Any]] = []
    alive: list[bool] = []
    loaded, generated = bitnet_generate.load_for_inference, Engine.generate

    def load_for_inference(*args: Any) -> Any:
        model, tokenizer = loaded(*args)
        assert isinstance(model, Transformer)
        made.extend([weakref.ref(model), weakref.ref(model.embed_tokens.weight)])
        return model, tokenizer

    def generate(*args: Any, **options: Any) -> Any:
        alive.extend(reference() is not None for reference in made)
        return generated(*args, **options)

    monkeypatch.setattr(bitnet_generate, "load_for_inference", load_for_inference)
    monkeypatch.setattr(Engine, "generate", generate)
    options = ("--prompt", "def f", "--max-new-tokens", "2", "--head", "bf16")
    assert bitnet("generate", folders / "model", *options)[0] == 0
    assert alive == [False, False]
