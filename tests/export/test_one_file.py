"""A model in one file: all of it comes back, and what is damaged or hostile is one clear line."""

import json
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import bitnet
from bitnet.data.chat_template import ChatTemplate
from bitnet.data.tokenizer import Tokenizer
from bitnet.export.folder import load, load_model, read_config, save_model, sizes
from bitnet.export.one_file import save_one_file
from bitnet.qat.recipe import Recipe
from bitnet.schema import UserError
from tests.helpers.model_folders import (
    RECIPES,
    converted,
    make,
    packed,
    prepared,
    same_state,
    sha256,
    ternary_layers,
    tokens,
)


@pytest.fixture
def one(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    """A packed model's file."""
    return save_one_file(tmp_path / "model.safetensors", packed(make()), tokenizer)


@pytest.mark.parametrize("granularity", ["tensor", "row", "group"])
@pytest.mark.parametrize("tied", [True, False])
def test_all_of_a_model_comes_back(
    tmp_path: Path, tokenizer: Tokenizer, granularity: str, tied: bool
) -> None:
    ours = packed(make(granularity=granularity, tie_embeddings=tied))
    ours.document_separator = 2
    path = save_one_file(tmp_path / "a.safetensors", ours, tokenizer)
    back, read = bitnet.load(path)
    same_state(back, ours)
    assert (back.config, back.document_separator) == (ours.config, 2)
    assert read.model_bytes == tokenizer.model_bytes
    assert (back.lm_head.weight is back.embed_tokens.weight) == tied
    with torch.no_grad():
        assert torch.equal(back(tokens()), ours(tokens()))
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]
    again = save_one_file(tmp_path / "b.safetensors", back, read)
    assert again.read_bytes() == path.read_bytes()


def test_a_folder_and_a_file_hold_the_same(tmp_path: Path, folder: Path) -> None:
    model, tokenizer = load(folder)
    path = save_one_file(tmp_path / "one.safetensors", model, tokenizer)
    ours, theirs = read_config(path), read_config(folder)
    assert (ours.model, ours.weights) == (theirs.model, theirs.weights)
    assert sizes(path).fp32 == sizes(folder).fp32
    stored, of_folder = sizes(path).stored, sizes(folder).stored
    assert {k: v for k, v in stored.items() if k != "total"} == {
        k: v for k, v in of_folder.items() if k != "total"
    }
    back = save_model(tmp_path / "again", *load(path))
    for name in ("model.safetensors", "tokenizer.model", "config.json"):
        assert (back / name).read_bytes() == (folder / name).read_bytes()


def test_codes_have_five_to_a_byte(one: Path) -> None:
    stored = load_file(one)
    for name, layer in ternary_layers(load_model(one)).items():
        codes = stored[f"{name}.codes"]
        digits = torch.stack([codes // 3**j % 3 for j in range(5)], 2).flatten(1)
        unpacked = digits.to(torch.int8)[:, : layer.in_features] - 1
        assert torch.equal(unpacked, layer.codes()), name
        assert codes.shape == (layer.out_features, -(-layer.in_features // 5))


def test_other_forms(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Latent weights, and what a recipe made."""
    for quant, model in ((Recipe(), make()), (RECIPES[0], prepared(RECIPES[0]))):
        back, _ = load(save_one_file(tmp_path / "latent", model, tokenizer, quant))
        same_state(back, model)
    recipe = RECIPES[1]
    model = converted(recipe)
    back, _ = load(save_one_file(tmp_path / "integer", model, tokenizer, recipe))
    same_state(back, model)
    with pytest.raises(ValueError, match="quant"):
        save_one_file(tmp_path / "integer", model, tokenizer, RECIPES[0])


def test_without_a_tokenizer(tmp_path: Path) -> None:
    path = save_one_file(tmp_path / "model.safetensors", packed(make()), None)
    same_state(load_model(path), packed(make()))
    with pytest.raises(UserError, match=r"model\.safetensors: was saved without a tokenizer"):
        load(path)


def test_a_chat_template_comes_along(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "model.safetensors"
    tokenizer.chat_template = ChatTemplate("{{ bos_token }}hello", {"bos_token": "<s>"})
    try:
        save_one_file(path, packed(make()), tokenizer)
    finally:
        tokenizer.chat_template = None
    assert load(path)[1].chat_template == ChatTemplate("{{ bos_token }}hello", {"bos_token": "<s>"})


def test_a_tokenizer_of_another_vocabulary(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = packed(make())
    tokenizer.vocab_size += 1
    try:
        with pytest.raises(UserError, match="tokenizer has 301 tokens, the model 300"):
            save_one_file(tmp_path / "model.safetensors", model, tokenizer)
    finally:
        tokenizer.vocab_size -= 1
    assert not list(tmp_path.iterdir())


def edit(
    path: Path,
    change: Callable[[dict[str, Tensor]], Any] = lambda tensors: None,
    description: Callable[[dict[str, Any]], Any] = lambda config: None,
    *,
    sign: bool = True,
) -> None:
    """Change tensors and description; ``sign``: the description's own checksum, too."""
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["bitnet"])
    change(tensors)
    description(config)
    if sign:
        config.pop("config_sha256", None)
        config["config_sha256"] = sha256(json.dumps(config, sort_keys=True).encode())
    save_file(tensors, path, {"bitnet": json.dumps(config)})


def fails(path: Path, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        bitnet.load(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


Q, K = "layers.0.self_attn.q_proj.codes", "layers.1.self_attn.q_proj.codes"


def test_damage_to_tensors(one: Path) -> None:
    whole = one.read_bytes()
    for change, message in (
        (lambda t: t[Q].view(-1)[3:4].fill_(121), f"tensor {Q} is not that of its sha256"),
        (lambda t: t["norm.weight"].add_(1), "norm.weight is not that of its sha256"),
        (lambda t: t["tokenizer.model"][900:901].add_(1), "tokenizer.model is not that of its"),
        (lambda t: t.update({Q: t[K], K: t[Q]}), "is not that of its sha256"),
        (lambda t: t.pop(Q), f"tensor {Q} is missing"),
        (lambda t: t.update(extra=t[Q].clone()), "unknown tensor extra"),
        (lambda t: t.update({Q: t[Q].reshape(-1)}), f"tensor {Q} is torch.uint8 .*config wants"),
        (lambda t: t.update({Q: t[Q].to(torch.int8)}), f"tensor {Q} is torch.int8"),
    ):
        one.write_bytes(whole)
        edit(one, change)  # type: ignore[arg-type]
        fails(one, message)


def test_damage_to_the_description(one: Path) -> None:
    whole = one.read_bytes()
    for change, message, sign in (
        (lambda c: c["model"].update(rope_theta=5.0), "damaged or edited", False),
        (lambda c: c["model"].update(rope_tetha=5.0), "unknown key model.rope_tetha", True),
        (lambda c: c["model"].update(n_layers=3), r"layers\.2\.\* is missing", True),
        (lambda c: c["model"].update(n_layers=2**24), r"layers\.2\.\* is missing", True),
        (lambda c: c["model"].update(n_layers=1), "unknown tensor layers.1", True),
        (lambda c: c["model"].update(d_model=2**24), "heads|wants", True),
        (lambda c: c.update(weights="latent"), r"layers\.\d.* is missing|unknown tensor", True),
        (lambda c: c.update(version=2), "has format version 2", True),
        (lambda c: c.update(format="other"), "not a model", True),
        (lambda c: c["sha256"].pop(Q), f"unknown tensor {Q}", True),
        (lambda c: c["sha256"].update({"../x": "0"}), r"tensor \.\./x is missing", True),
        (lambda c: c["sha256"].update({"x\0y": "0"}), r"tensor x\\x00y is missing", True),
    ):
        one.write_bytes(whole)
        edit(one, description=change, sign=sign)  # type: ignore[arg-type]
        fails(one, message)


def test_what_is_no_such_file(tmp_path: Path, one: Path, folder: Path) -> None:
    data = one.read_bytes()
    for content, message in (
        (b"", "not a safetensors file"),
        (data[:7], "not a safetensors file"),
        (data[: len(data) // 2], "not a safetensors file"),
        (data[:-1], "not a safetensors file"),
        ((2**63 - 1).to_bytes(8, "little") + data[8:], "not a safetensors file"),
        ((10**8).to_bytes(8, "little") + data[8:], "not a safetensors file"),
        (b"[" * 100_000, "not a safetensors file"),
    ):
        one.write_bytes(content)
        fails(one, message)
    torch.save(make().state_dict(), one)
    fails(one, "not a safetensors file")
    fails(folder / "model.safetensors", "has no description of a model in its header")
    save_file({"a": torch.ones(2)}, one, {"bitnet": "[" * 100_000})
    fails(one, "damaged: not JSON")
    save_file({"a": torch.ones(2)}, one, {"bitnet": json.dumps({"format": "x" * 2**24})})
    fails(one, "description is larger than")
    fails(tmp_path / "none.safetensors", "no such model folder")


def test_a_full_disk_leaves_the_old_file(one: Path, tokenizer: Tokenizer) -> None:
    before, model = one.read_bytes(), packed(make(seed=1))
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_one_file(one, model, tokenizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert one.read_bytes() == before
    assert [file.name for file in one.parent.iterdir()] == [one.name]
