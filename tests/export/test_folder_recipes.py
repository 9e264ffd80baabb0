"""Folders of models quantized by a recipe: round trips, old names, what is refused."""

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from bitnet.data.tokenizer import Tokenizer
from bitnet.export.contents import structure_of
from bitnet.export.folder import load, load_model, read_config, save_model, sizes
from bitnet.model import Transformer
from bitnet.qat.prepare import convert
from bitnet.qat.recipe import Recipe
from tests.helpers.model_folders import (
    RECIPES,
    converted,
    fails,
    make,
    names,
    packed,
    prepared,
    same_state,
    sign,
    ternary_layers,
    tokens,
)


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


class Operators(TorchDispatchMode):
    """Names of the operators that run within the block."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_a_structure_has_the_shapes_of_the_model_and_computes_nothing(recipe: Recipe) -> None:
    """On the meta device torch computes in Python and imports its compiler, which takes seconds."""
    latent, integer = prepared(recipe), converted(recipe)
    for model, weights in ((latent, "latent"), (integer, "integer")):
        with Operators() as seen:
            structure = structure_of(model.config, weights, recipe)  # type: ignore[arg-type]
        described = [
            {name: (tensor.shape, tensor.dtype) for name, tensor in one.state_dict().items()}
            for one in (structure, model)
        ]
        assert described[0] == described[1]
        computing = ("abs", "mean", "sum", "amax", "clamp", "div", "mul", "where", "round")
        assert not seen.names & set(computing)


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
