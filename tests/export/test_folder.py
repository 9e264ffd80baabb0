"""Model folders: what is saved comes back to the last bit, and nothing else is taken for it."""

import copy
import dataclasses
import hashlib
import json
import os
import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitnet.data.tokenizer import Tokenizer, train_tokenizer
from bitnet.durable import load_tensors
from bitnet.export.folder import load, load_model, read_config, save_model, sizes
from bitnet.linear import BitLinear, TernaryLinear, pack
from bitnet.model import ModelConfig, Transformer
from bitnet.qat.prepare import calibrate, convert, prepare
from bitnet.qat.recipe import Recipe
from bitnet.quant import absmean_ternary, dequantize
from bitnet.schema import UserError

VOCAB = 300


def make(seed: int = 0, **fields: Any) -> Transformer:
    """A tiny model with odd sizes (in_features 24 and 37: no multiple of 5 or 64)."""
    torch.manual_seed(seed)
    shape: dict[str, Any] = {"depth": 2, "d_model": 24, "n_heads": 2, "n_kv_heads": 1, "d_ff": 37}
    model = Transformer(ModelConfig(**shape, vocab_size=VOCAB, max_seq_len=32, **fields))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))  # norms are ones until trained
    return model


def packed(model: Transformer) -> Transformer:
    result = pack(copy.deepcopy(model))
    assert isinstance(result, Transformer)
    return result


def tokens() -> Tensor:
    return torch.randint(VOCAB, (3, 17), generator=torch.Generator().manual_seed(1))


def ternary_layers(model: Transformer) -> dict[str, TernaryLinear]:
    return {n: module for n, module in model.named_modules() if isinstance(module, TernaryLinear)}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sign(folder: Path, change: Callable[[dict[str, Any]], None] = lambda config: None) -> None:
    """Edit config.json and make every checksum agree, as a program of someone else's would."""
    config = json.loads((folder / "config.json").read_text())
    config["sha256"] = {
        name: sha256((folder / name).read_bytes()) for name in names(folder) - {"config.json"}
    }
    del config["config_sha256"]
    change(config)
    config["config_sha256"] = sha256(json.dumps(config, sort_keys=True).encode())
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    return train_tokenizer(["to be or not to be, that is the question\n" * 20], VOCAB, path)


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    """A packed model's."""
    return save_model(tmp_path / "model", packed(make()), tokenizer)


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


def test_loaded_model_trains(tmp_path: Path) -> None:
    model = load_model(save_model(tmp_path / "model", make(), None))
    model(tokens()).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_sizes(tmp_path: Path) -> None:
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


# Quantized by a recipe

RECIPES = [
    Recipe(weights="int", bits=4),
    Recipe(weights="int", bits=3, symmetric=False, granularity="group", group_size=16),
    Recipe(weights="int", bits=8, activations="static", activation_symmetric=False),
    Recipe(weights="absmean", granularity="tensor"),
    Recipe(weights="absmean", granularity="group", group_size=16, skip=["*.down_proj"]),
    Recipe(weights="sign", granularity="tensor", activations="none"),
    Recipe(weights="lsq", bits=3, keep_first_last=False, modules=["linear", "embedding"]),
    Recipe(weights="seq", activations="static", observer="mse", keep_first_last=False),
]


def prepared(recipe: Recipe, **fields: Any) -> Transformer:
    """A model in the middle of its QAT: observers have seen data, learned scales have moved."""
    model = make(**{"linear": "fp", **fields})
    prepare(model, recipe)
    if recipe.activations == "static":
        calibrate(model, [tokens()])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("weight_step"):
                parameter.mul_(1.1)
    return model


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_qat_round_trips(tmp_path: Path, recipe: Recipe, tied: bool) -> None:
    """Latent and integer form: every tensor and every logit to the last bit, at each turn."""
    model = prepared(recipe, tie_embeddings=tied).eval()
    expected = model(tokens())
    latent = load_model(save_model(tmp_path / "latent", model, None, recipe)).eval()
    same_state(latent, model)
    assert torch.equal(latent(tokens()), expected)
    assert all(p.requires_grad for p in latent.parameters())
    assert (latent.lm_head.weight is latent.embed_tokens.weight) == tied
    integer = convert(copy.deepcopy(latent))
    assert isinstance(integer, Transformer)
    for cycle in range(2):
        folder = save_model(tmp_path / str(cycle), integer, None, recipe)
        config = read_config(folder)
        assert (config.weights, config.quant) == ("integer", recipe)
        loaded = load_model(folder).eval()
        same_state(loaded, integer)
        assert torch.equal(loaded(tokens()), expected)
        integer = loaded
    first, second = (load_file(tmp_path / c / "model.safetensors") for c in "01")
    assert first.keys() == second.keys()
    matrices = sizes(tmp_path / "0").stored["matrices"]
    assert matrices < sizes(tmp_path / "latent").stored["matrices"] / 2


def same_state(ours: Transformer, theirs: Transformer) -> None:
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name


def test_a_loaded_qat_model_trains_on(tmp_path: Path) -> None:
    recipe = Recipe(weights="lsq", bits=3, activations="static", keep_first_last=False)
    model = load_model(save_model(tmp_path / "model", prepared(recipe), None, recipe))
    seen = {n: m.clone() for n, m in model.state_dict().items() if n.endswith("n_seen")}
    model(tokens()).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    for name, count in seen.items():
        assert model.state_dict()[name] > count, "the observers go on"


def test_a_learned_scale_of_tied_layers_stays_one(tmp_path: Path) -> None:
    recipe = Recipe(weights="lsq", bits=4, modules=["linear", "embedding"], keep_first_last=False)
    model = prepared(recipe)
    assert model.lm_head.weight_step is model.embed_tokens.weight_step
    loaded = load_model(save_model(tmp_path / "model", model, None, recipe))
    assert loaded.lm_head.weight_step is loaded.embed_tokens.weight_step


@torch.no_grad()
def test_ternary_matrices_and_a_recipe_for_the_rest(tmp_path: Path) -> None:
    """BitLinear matrices, an int8 embedding and head: two kinds of packing in one folder."""
    recipe = Recipe(weights="int", bits=8, modules=["linear", "embedding"], keep_first_last=False)
    model = prepared(recipe, linear="ternary").eval()
    expected = model(tokens())
    same_state(load_model(save_model(tmp_path / "latent", model, None, recipe)), model)
    small = convert(packed(model))
    assert isinstance(small, Transformer)
    loaded = load_model(save_model(tmp_path / "small", small, None, recipe)).eval()
    assert torch.equal(loaded(tokens()), expected)
    assert len(ternary_layers(loaded)) == 14


def test_old_folders_have_no_quant_and_new_plain_ones_neither(folder: Path) -> None:
    assert "quant" not in json.loads((folder / "config.json").read_text())
    assert not read_config(folder).quant.enabled


def test_folders_with_the_old_names_of_keys_load(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """config.json as it was written when ``grad_mask`` was ``gradient``."""
    recipe = Recipe(weights="absmean", granularity="row", grad_mask="trust", grad_mask_c=0.75)
    model = prepared(recipe)
    folder = save_model(tmp_path / "model", model, tokenizer, recipe)

    def rename(config: dict[str, Any]) -> None:
        new = {"grad_mask": "gradient", "grad_mask_c": "gradient_c"}
        config["quant"] = {new.get(key, key): value for key, value in config["quant"].items()}

    sign(folder, rename)
    assert '"gradient_c": 0.75' in (folder / "config.json").read_text()
    assert read_config(folder).quant == recipe
    same_state(load_model(folder), model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["quant"].update(bitz=3), r"unknown key quant\.bitz; the nearest is bits"),
        (lambda c: c["quant"].update(bits=9), r"quant\.bits: Input should be less than"),
        (lambda c: c["quant"].update(bits="4"), r"quant\.bits: Input should be a valid int"),
        (lambda c: c["quant"].update(bits=3), r"packed is .*; the config wants"),
        (
            lambda c: c["quant"].update(granularity="tensor"),
            r"scale is .*; the config wants .*\[\]",
        ),
        (lambda c: c["quant"].update(symmetric=False), r"zero_point is missing"),
        (lambda c: c["quant"].update(activations="static"), "input_scale is missing"),
        (lambda c: c["quant"].update(skip=["*.up_proj"]), "up_proj.weight is missing"),
        (lambda c: c["quant"].update(skip=["up_prjo"]), "quant: skip: no module .*'up_proj'"),
        (lambda c: c["quant"].update(modules=["conv1d"]), "quant: recipe: selects none"),
        (lambda c: c["quant"].update(weights="none"), 'weights "integer" and quant.* disagree'),
        (lambda c: c.pop("quant"), 'weights "integer" and quant.weights "none" disagree'),
        (lambda c: c.update(weights="packed"), 'weights "packed" and quant.weights "int" disag'),
        (lambda c: c.update(weights="latent"), r"proj\.weight is missing"),
        (lambda c: c["model"].update(d_ff=40), r"; the config wants"),
    ],
)
def test_quantized_nonsense_is_refused(
    tmp_path: Path, tokenizer: Tokenizer, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    recipe = RECIPES[0]
    model = convert(prepared(recipe))
    assert isinstance(model, Transformer)
    folder = save_model(tmp_path / "model", model, tokenizer, recipe)
    load(folder)
    sign(folder, change)
    fails(folder, message)


def test_a_recipe_that_is_not_the_model_s_is_not_saved(tmp_path: Path) -> None:
    """Also where all tensors would fit: the loaded model would compute something else."""
    recipe = RECIPES[0]
    latent, integer, ternary = prepared(recipe), converted(recipe), converted(RECIPES[3])
    q_proj = r"model: layers\.0\.self_attn\.q_proj "
    wrong: list[tuple[str, Transformer, Recipe]] = [
        (q_proj + "is QATLinear; .* Linear", latent, Recipe()),
        (q_proj + r"has quant\.bits = 4; .* 2", latent, change(recipe, bits=2)),
        ("activation_bits = 8; .* 4", latent, change(recipe, activation_bits=4)),
        ("activations = absmax; .* static", latent, change(recipe, activations="static")),
        (r"quant\.grad_mask = none; .* clip", latent, change(recipe, grad_mask="clip")),
        (r"skip = \[\]; .* \['k_proj'\]", latent, change(recipe, skip=["k_proj"])),
        (q_proj + "is IntLinear; .* Linear", integer, Recipe()),
        ("quant.bits = 4; .* 5", integer, change(recipe, bits=5)),
        ("activation_bits = 8; .* 4", integer, change(recipe, activation_bits=4)),
        ("weights = int; .* lsq", integer, change(recipe, weights="lsq")),
        (q_proj + "is IntLinear; .* TernaryLinear", integer, RECIPES[3]),
        (q_proj + "is TernaryLinear; .* Linear", ternary, Recipe()),
        ("granularity = tensor; .* row", ternary, change(RECIPES[3], granularity="row")),
        (q_proj + "is Linear; .* QATLinear", make(linear="fp"), recipe),
        (q_proj + "is Linear; .* QATLinear", make(linear="fp"), Recipe(weights="lsq")),
        ("selects none", make(linear="fp"), Recipe(weights="int", modules=["conv2d"])),
    ]
    for message, model, other in wrong:
        with pytest.raises(ValueError, match=message) as caught:
            save_model(tmp_path / "model", model, None, other)
        assert "\n" not in str(caught.value)
    assert names(tmp_path) == set()


def change(recipe: Recipe, **fields: Any) -> Recipe:
    return dataclasses.replace(recipe, **fields)


def converted(recipe: Recipe) -> Transformer:
    model = convert(prepared(recipe))
    assert isinstance(model, Transformer)
    return model


# Saving


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


# Loading what is damaged, edited or something else


def fails(folder: Path, message: str) -> None:
    """Loading ends in one line that says so."""
    with pytest.raises(UserError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


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


def test_without_tokenizer(tmp_path: Path) -> None:
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
    good = load_tensors(path)  # not mapped: the file is about to be overwritten
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


@pytest.mark.parametrize(
    "sizes",
    [
        {"n_layers": HUGE},
        {"n_layers": HUGE, "d_model": HUGE, "d_ff": HUGE, "vocab_size": HUGE, "n_heads": 1},
        {"d_model": HUGE},
        {"d_model": HUGE, "n_heads": HUGE // 2, "n_kv_heads": 1},
        {"vocab_size": HUGE},
        {"n_layers": 0, "depth": 1000},
        {"n_heads": 0, "n_kv_heads": 0, "d_model": 0, "depth": 1000},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["latent", "packed", "integer"])
def test_sizes_are_compared_before_anything_is_built(
    tmp_path: Path, tokenizer: Tokenizer, sizes: dict[str, int], kind: str
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
    sign(folder, lambda config: config["model"].update(sizes))
    begun = time.process_time()
    fails(folder, "tensor .* is missing|; the config wants")
    assert time.process_time() - begun < 1, "no layer is built, no long list of divisors made"


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


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), -1.0, 0.0])
@pytest.mark.parametrize("weights", ["ternary", "int", "absmean"])
def test_impossible_scales_are_refused(tmp_path: Path, weights: Any, value: float) -> None:
    """Both packed forms, weights and activations; NaN and infinity in any other tensor too."""
    model, recipe = make(), Recipe()
    if weights == "ternary":
        model = packed(model)
    else:
        recipe = Recipe(weights=weights, granularity="group", group_size=7, activations="static")
        model = convert(prepared(recipe))  # type: ignore[assignment]
    folder = save_model(tmp_path / "model", model, None, recipe)
    good = load_tensors(folder / "model.safetensors")
    scales = [name for name in good if name.endswith("scale") and "layers.1.mlp.up" in name]
    assert len(scales) == (1 if weights == "ternary" else 2)
    for name in (*scales, *([] if value <= 0 and value > -2 else ["norm.weight"])):
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
    good, name = load_tensors(folder / "model.safetensors"), "layers.1.mlp.up_proj.packed"
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
