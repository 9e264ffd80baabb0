"""Folders that are damaged, edited or of something else: named and refused."""

import json
import math
import os
import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from bitnet.data.tokenizer import Tokenizer, train_tokenizer
from bitnet.durable import each_tensor
from bitnet.export.folder import load, load_model, save_model
from bitnet.qat.prepare import convert, prepare
from bitnet.qat.recipe import Recipe
from bitnet.schema import UserError
from tests.helpers.model_folders import VOCAB, fails, make, packed, prepared, sign


def test_what_is_missing_is_named(folder: Path, tmp_path: Path) -> None:
    fails(tmp_path / "modle", "modle: no such model folder$")
    fails(tmp_path, rf"has no config\.json: not a model folder; did you mean {folder}\?")
    for name in ("model.safetensors", "tokenizer.model", "config.json"):
        shutil.copytree(folder, tmp_path / "copy")
        (tmp_path / "copy" / name).unlink()
        fails(tmp_path / "copy", name.replace(".", r"\."))
        shutil.rmtree(tmp_path / "copy")
    folder.rename(tmp_path / ".old-model")
    fails(folder, r"a crash while it was replaced left its previous version in .*\.old-model")


def test_a_folder_saved_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    fails(save_model(tmp_path / "model", make(), None), r"saved without a tokenizer")


def test_every_flipped_bit_is_named_or_harmless(folder: Path) -> None:
    expected = load(folder)[0].state_dict()
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        stride = 1 if path.name == "config.json" else len(data) // 50
        harmless = 0
        for i in range(0, len(data), stride):
            path.write_bytes(data[:i] + bytes([data[i] ^ (1 << i % 8)]) + data[i + 1 :])
            try:
                model, _ = load(folder)
            except UserError as error:
                assert str(path) in str(error) or "model.safetensors" in str(error)  # noqa: PT017
                continue
            harmless += 1  # whitespace, if anything
            for name, tensor in model.state_dict().items():
                assert torch.equal(tensor, expected[name])
        assert harmless < len(data) // stride / 10
        assert path.name == "config.json" or harmless == 0
        path.write_bytes(data)


def test_truncation_is_named(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        for length in (0, 1, len(data) // 2, len(data) - 2):
            path.write_bytes(data[:length])
            fails(folder, rf"{path.name}.*damaged")
        path.write_bytes(data)


def test_edits_and_strangers_are_refused(folder: Path) -> None:
    path = folder / "config.json"
    good = json.loads(path.read_text())
    path.write_text(json.dumps(good, indent=8))
    load(folder)  # layout is free
    path.write_text(json.dumps(good | {"model": good["model"] | {"rope_theta": 5e5}}))
    fails(folder, r"config\.json: damaged or edited")
    path.write_text("[" * 100_000)
    fails(folder, r"config\.json: damaged: not JSON")
    path.write_text("[]")
    fails(folder, "not a model folder of this project")
    path.write_text(json.dumps({"model_type": "bitnet"}))
    fails(folder, "not a model folder of this project")
    path.write_text(" " * (2**20 + 1))
    fails(folder, "larger than")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(version=2), "format version 2, this program reads 1"),
        (lambda c: c.update(weihgts="latent"), "unknown key weihgts; the nearest is weights"),
        (
            lambda c: c["model"].update(rope_tetha=1.0),
            "rope_tetha; the nearest is rope_theta",
        ),
        (lambda c: c["model"].update(d_model="24"), r"model\.d_model: Input should be a valid int"),
        (lambda c: c["model"].update(n_heads=7), "n_heads = 7 does not divide"),
        (lambda c: c["model"].update(d_ff=38), r"ffn_sub_norm.weight is .*\[37\]; .* \[38\]"),
        (lambda c: c["model"].update(n_layers=1), r"unknown tensor layers\.1\."),
        (lambda c: c["model"].update(n_layers=3), r"tensor layers\.2\..* is missing"),
        (lambda c: c["model"].update(granularity="row"), r"scale is torch\.float32 \[\]"),
        (lambda c: c["model"].update(tie_embeddings=False), "lm_head.weight is missing"),
        (lambda c: c["model"].update(linear="fp"), "down_proj.weight is missing"),
        (lambda c: c["model"].update(vocab_size=301), r"embed_tokens.weight is .*\[300, 24\]"),
        (lambda c: c.update(weights="latent"), "down_proj.weight is missing"),
        (lambda c: c.update(weights="ternary"), "weights: Input should be 'latent', 'packed' or"),
        (lambda c: c["sha256"].pop("model.safetensors"), "does not list model.safetensors"),
        (lambda c: c["sha256"].update({"../model/config.json": "0"}), "missing"),
        (lambda c: c.pop("model"), "model: "),
    ],
)
def test_signed_nonsense_is_refused(
    folder: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    sign(folder)
    load(folder)
    sign(folder, change)
    fails(folder, message)


def test_signed_garbage_tensors_are_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    good = dict(each_tensor(path))  # not mapped: the file is about to be overwritten
    header = b'{"a":{"dtype":"F32","shape":[99999999999],"data_offsets":[0,4]}}'
    for garbage in (
        b"",
        b"\xff" * 64,
        (2**40).to_bytes(8, "little") + b"{}",
        len(header).to_bytes(8, "little") + header + b"1234",
    ):
        path.write_bytes(garbage)
        sign(folder)
        fails(folder, "model.safetensors: damaged")
    name = "layers.0.mlp.up_proj.codes"
    save_file({k: v for k, v in good.items() if k != name}, path)
    sign(folder)
    fails(folder, f"{name} is missing")
    save_file(good | {name: torch.full_like(good[name], 243)}, path)
    sign(folder)
    fails(folder, f"tensor {name}: .*damaged")


HUGE = 2**24
INFINITE = (math.inf, -math.inf)


SIZES: list[dict[str, int]] = [
    {"n_layers": HUGE},
    {"n_layers": HUGE, "d_model": HUGE, "d_ff": HUGE, "vocab_size": HUGE, "n_heads": 1},
    {"d_model": HUGE},
    {"d_model": HUGE, "n_heads": HUGE // 2, "n_kv_heads": 1},
    {"vocab_size": HUGE},
    {"n_layers": 0, "depth": 1000},
    {"n_heads": 0, "n_kv_heads": 0, "d_model": 0, "depth": 1000},
]


@pytest.mark.parametrize("kind", ["latent", "packed", "integer"])
def test_sizes_are_compared_before_anything_is_built(
    tmp_path: Path, tokenizer: Tokenizer, kind: str
) -> None:
    model, recipe = make(), Recipe(weights="int", granularity="group", group_size=1)
    if kind == "packed":
        model = packed(model)
    if kind == "integer":
        model = convert(prepare(make(linear="fp"), recipe))  # type: ignore[assignment]
    quant = recipe if kind == "integer" else Recipe()
    folder = save_model(tmp_path / "model", model, tokenizer, quant)
    sign(folder)
    load(folder)
    config = (folder / "config.json").read_text()
    for sizes in SIZES:
        (folder / "config.json").write_text(config)
        sign(folder, lambda config, sizes=sizes: config["model"].update(sizes))  # type: ignore[misc]
        begun = time.process_time()
        fails(folder, "tensor .* is missing|; the config wants")
        seconds = time.process_time() - begun
        assert seconds < 1, f"{sizes}: no layer is built, no long list of divisors made"


def test_huge_sparse_files_are_refused_unread(folder: Path) -> None:
    """20 GB of zeros, and 20 GB behind a header that claims them."""
    header = b'{"a":{"dtype":"U8","shape":[19999999900],"data_offsets":[0,19999999900]}}'
    for name in ("model.safetensors", "tokenizer.model", "config.json"):
        good = (folder / name).read_bytes()
        begun = time.process_time()
        for start in (b"", len(header).to_bytes(8, "little") + header):
            with (folder / name).open("wb") as file:
                file.write(start)
                file.truncate(len(start) + 19_999_999_900)
            fails(folder, rf"{name}: .*(at most|larger)")
        assert time.process_time() - begun < 1
        (folder / name).write_bytes(good)
    load(folder)


@pytest.mark.parametrize("weights", ["ternary", "int", "absmean"])
def test_impossible_scales_are_refused(tmp_path: Path, weights: Any) -> None:
    """Both packed forms, weights and activations; NaN and infinity in any other tensor too."""
    model, recipe = make(), Recipe()
    if weights == "ternary":
        model = packed(model)
    else:
        recipe = Recipe(weights=weights, granularity="group", group_size=7, activations="static")
        model = convert(prepared(recipe))  # type: ignore[assignment]
    folder = save_model(tmp_path / "model", model, None, recipe)
    good = dict(each_tensor(folder / "model.safetensors"))
    scales = [name for name in good if name.endswith("scale") and "layers.1.mlp.up" in name]
    assert len(scales) == (1 if weights == "ternary" else 2)
    cases = [(name, value) for name in scales for value in (math.nan, *INFINITE, -1.0, 0.0)]
    for name, value in cases + [("norm.weight", value) for value in (math.nan, *INFINITE)]:
        bad = good[name].clone()
        bad.view(-1)[-1] = value
        save_file(good | {name: bad}, folder / "model.safetensors")
        sign(folder)
        with pytest.raises(UserError, match=rf"tensor {name} holds (NaN|a scale of 0 or below)"):
            load_model(folder)


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(weights="absmean", activations="none"),  # ternary in 2 bits: -2
        Recipe(weights="int", bits=2),
        Recipe(weights="int", bits=4),  # symmetric: -7 .. 7
        Recipe(weights="int", bits=8),
    ],
    ids=str,
)
def test_codes_that_no_quantizer_makes_are_refused(tmp_path: Path, recipe: Recipe) -> None:
    folder = save_model(tmp_path / "model", convert(prepared(recipe)), None, recipe)  # type: ignore[arg-type]
    good, name = dict(each_tensor(folder / "model.safetensors")), "layers.1.mlp.up_proj.packed"
    bad = good[name].clone()
    bad[0, 0] &= ~(2**recipe.quantizer.storage_bits - 1)  # the first code: all bits 0
    save_file(good | {name: bad}, folder / "model.safetensors")
    sign(folder)
    with pytest.raises(UserError, match=rf"tensor {name}: holds a code outside of -\d+ "):
        load_model(folder)


def test_another_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    train_tokenizer(["to be or not to be\n" * 20], VOCAB - 20, folder / "tokenizer.model")
    fails(folder, r"tokenizer\.model: damaged")
    sign(folder)
    fails(folder, "the tokenizer has 280 tokens, the model 300")


class Bomb:
    """Unpickling one creates the file named in BOMB."""

    def __reduce__(self) -> tuple[Callable[..., int], tuple[str, int]]:
        return (os.open, (os.environ["BOMB"], os.O_CREAT))


def test_no_pickle_is_ever_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    bomb = pickle.dumps(Bomb())
    for name in ("pytorch_model.bin", "model.pt"):
        (folder / name).write_bytes(bomb)
        load(folder)
    for name in ("tokenizer.model", "model.safetensors"):
        good = (folder / name).read_bytes()
        (folder / name).write_bytes(bomb)
        sign(folder)
        fails(folder, name)
        (folder / name).write_bytes(good)
    (folder / "config.json").write_bytes(bomb)
    fails(folder, "config.json")
    assert not (tmp_path / "exploded").exists()
