"""Model folders: what is saved comes back to the last bit, and nothing else is taken for it."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bitnet.data.tokenizer import Tokenizer
from bitnet.export.folder import load, load_model, save_model, sizes
from bitnet.linear import BitLinear, pack
from bitnet.model import ModelConfig, Transformer
from bitnet.quant import absmean_ternary, dequantize
from bitnet.schema import UserError
from tests.helpers.model_folders import VOCAB, make, names, packed, ternary_layers, tokens

KINDS: list[dict[str, Any]] = [
    {},
    {"tie_embeddings": False},
    {"norm_placement": "in_linear", "qk_norm": True},
    {"granularity": "row", "activation": "silu"},
    {"granularity": "group", "group_size": 16, "norm_placement": "pre_norm"},
    {"linear": "fp"},
    {"linear": "fp", "norm_placement": "in_linear", "tie_embeddings": False},
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@torch.no_grad()
def test_latent_round_trip(tmp_path: Path, tokenizer: Tokenizer, kind: dict[str, Any]) -> None:
    model = make(**kind)
    folder = save_model(tmp_path / "runs" / "model", model, tokenizer)
    assert names(folder) == {"model.safetensors", "config.json", "tokenizer.model"}
    assert names(folder.parent) == {"model"}
    before = torch.get_rng_state()
    loaded, same_tokenizer = load(folder)
    assert torch.equal(torch.get_rng_state(), before)
    assert same_tokenizer.hash == tokenizer.hash
    assert loaded.config == model.config
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert torch.equal(loaded(tokens()), model(tokens()))
    tied = loaded.lm_head.weight is loaded.embed_tokens.weight
    assert tied == model.config.tie_embeddings
    assert all(p.requires_grad and p.dtype == torch.float32 for p in loaded.parameters())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "linear" not in kind], ids=str)
@torch.no_grad()
def test_packed_round_trip(tmp_path: Path, kind: dict[str, Any]) -> None:
    """Saved, loaded, saved, loaded: codes and scales stay, where quantizing the dequantized
    weights again would shrink the scale by the share of nonzeros."""
    latent = make(**kind)
    model = packed(latent)
    expected = {
        name: module.quantize()
        for name, module in latent.named_modules()
        if isinstance(module, BitLinear)
    }
    assert len(expected) == 14
    for cycle in range(3):
        folder = save_model(tmp_path / str(cycle), model, None)
        assert names(folder) == {"model.safetensors", "config.json"}
        model = load_model(folder)
        layers = ternary_layers(model)
        assert layers.keys() == expected.keys()
        for name, (codes, scale) in expected.items():
            assert torch.equal(layers[name].codes(), codes), name
            assert torch.equal(layers[name].scale, scale), name
        assert torch.equal(model(tokens()), latent(tokens()))
    stored = {(tmp_path / str(cycle) / "model.safetensors").read_bytes() for cycle in range(3)}
    assert len(stored) == 1
    codes, scale = next(iter(expected.values()))
    again = absmean_ternary(
        dequantize(codes, scale, latent.config.group_size),
        latent.config.granularity,
        latent.config.group_size,
    )
    assert not torch.equal(again[1], scale), "the trap is real"


def test_the_file_holds_base_3_codes(folder: Path) -> None:
    """The first byte by hand: five codes, least significant first."""
    layers = ternary_layers(load_model(folder))
    stored = load_file(folder / "model.safetensors")
    name = "layers.1.mlp.down_proj"
    codes = layers[name].codes()
    assert stored[f"{name}.codes"].shape == (24, 8)  # ceil(37 / 5)
    assert stored[f"{name}.codes"].dtype == torch.uint8
    digits = [int(code) + 1 for code in codes[0, :5]]
    assert stored[f"{name}.codes"][0, 0] == sum(d * 3**i for i, d in enumerate(digits))
    assert stored[f"{name}.scale"].dtype == torch.float32
    assert "lm_head.weight" not in stored, "tied"


def test_kernel_is_passed_on(folder: Path) -> None:
    layers = ternary_layers(load_model(folder, kernel="reference"))
    assert {layer.kernel for layer in layers.values()} == {"reference"}


def test_a_loaded_model_has_gradients(tmp_path: Path) -> None:
    model = load_model(save_model(tmp_path / "model", make(), None))
    model(tokens()).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_sizes_by_hand(tmp_path: Path) -> None:
    model = make(tie_embeddings=False)
    matrices = 2 * (2 * 24 * 24 + 2 * 12 * 24 + 3 * 24 * 37)
    norms, embedding = 2 * (3 * 24 + 37) + 24, 2 * VOCAB * 24
    latent = sizes(save_model(tmp_path / "latent", model, None))
    total = matrices + norms + embedding
    assert latent.fp32 == {
        "embedding": 4 * embedding,
        "matrices": 4 * matrices,
        "norms": 4 * norms,
        "total": 4 * total,
    }
    assert {k: v for k, v in latent.stored.items() if k != "total"} == {
        k: v for k, v in latent.fp32.items() if k != "total"
    }
    small = sizes(save_model(tmp_path / "packed", packed(model), None))
    assert small.fp32 == latent.fp32
    rows = 24 + 12 + 12 + 24 + 37 + 37  # of 24 columns: 5 bytes; down_proj has 24 rows of 8
    assert small.stored["matrices"] == 2 * (rows * 5 + 24 * 8 + 7 * 4)
    assert small.stored["norms"] == latent.stored["norms"]
    for folder, stored in (("latent", latent.stored), ("packed", small.stored)):
        assert stored["total"] == (tmp_path / folder / "model.safetensors").stat().st_size
        assert stored["total"] > sum(v for k, v in stored.items() if k != "total")


def test_replacing_a_model_folder(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "model").mkdir()
    save_model(tmp_path / "model", make(0), tokenizer)
    save_model(str(tmp_path / "model"), make(1), None)
    assert names(tmp_path) == {"model"}
    assert names(tmp_path / "model") == {"model.safetensors", "config.json"}
    assert torch.equal(load_model(tmp_path / "model").norm.weight, make(1).norm.weight)


def test_only_model_folders_are_replaced(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "model.safetensors").write_text("")
    for name in ("file", "home", "theirs", "weights"):
        with pytest.raises(UserError, match=name):
            save_model(tmp_path / name, make(), None)
    assert names(tmp_path) == {"model", "file", "home", "theirs", "weights"}
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years of work"
    (folder / "config.json").write_text('{"format": "bitnet-train"} and damage')
    save_model(folder, make(), None)
    load_model(folder)


@pytest.mark.parametrize("existing", [False, True])
def test_full_disk_leaves_what_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool
) -> None:
    if existing:
        save_model(tmp_path / "model", make(0), None)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_model(tmp_path / "model", make(1), None)
    assert names(tmp_path) == ({"model"} if existing else set())
    if existing:
        assert torch.equal(load_model(tmp_path / "model").norm.weight, make(0).norm.weight)


def test_models_that_would_not_load_are_not_saved(tmp_path: Path, tokenizer: Tokenizer) -> None:
    half, head, coarse = make(), make(tie_embeddings=False), make()
    pack(half.get_submodule("layers.0.mlp"))
    head.lm_head = BitLinear(24, VOCAB, bias=False)  # the same tensors as a plain one
    coarse.layers[0].get_submodule("mlp.up_proj").granularity = "row"  # type: ignore[assignment]
    wrong = {
        "float32": make().bfloat16(),
        r"layers\.0\.self_attn\.q_proj is BitLinear; .* want TernaryLinear": half,
        "lm_head is BitLinear; the config and quant want Linear": head,
        r"layers\.0\.mlp\.up_proj has granularity = row; .* want tensor": coarse,
    }
    for message, model in wrong.items():
        with pytest.raises(ValueError, match=message):
            save_model(tmp_path / "model", model, None)
    torch.manual_seed(0)
    other = Transformer(ModelConfig(depth=1, vocab_size=299, max_seq_len=8))
    with pytest.raises(UserError, match="has 300 tokens, the model 299"):
        save_model(tmp_path / "model", other, tokenizer)
    assert names(tmp_path) == set()
