"""A recipe with embeddings all the way: generated from, packed, evaluated, started from."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bitnet.data.tokenizer import Tokenizer, train_tokenizer
from bitnet.engine.decoder import Decoder
from bitnet.export import folder as folders
from bitnet.export.folder import load, load_model, save_model
from bitnet.generate import generate
from bitnet.model import ModelConfig, Transformer, as_transformer
from bitnet.qat.adapters import AdapterConfig, LoRALinear, add_adapters, merge_adapters
from bitnet.qat.integer import IntEmbedding
from bitnet.qat.layers import QATEmbedding
from bitnet.qat.prepare import calibrate, convert, prepare
from bitnet.qat.recipe import Recipe
from bitnet.schema import UserError

Bitnet = Callable[..., tuple[int, str, str]]
TEXT = "\n\n".join(f"def f{i}(x):\n    return x + {i}" for i in range(300))
BOTH: dict[str, Any] = {"modules": ["linear", "embedding"], "keep_first_last": False}
RECIPES = {
    "int4": Recipe(weights="int", bits=4, **BOTH),
    "ternary": Recipe(weights="absmean", granularity="tensor", **BOTH),
    "groups": Recipe(weights="int", bits=3, granularity="group", group_size=24, **BOTH),
    "affine": Recipe(weights="int", bits=4, symmetric=False, **BOTH),
    "weights only": Recipe(weights="int", bits=4, activations="none", **BOTH),
    "static": Recipe(weights="int", bits=8, activations="static", **BOTH),
    "learned": Recipe(weights="lsq", bits=4, **BOTH),
    "head kept": Recipe(weights="int", bits=4, skip=["lm_head"], **BOTH),
    "embedding only": Recipe(weights="int", bits=4, **(BOTH | {"modules": ["embedding"]})),
    "embedding kept": Recipe(weights="int", bits=4, skip=["embed_tokens"], **BOTH),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer([TEXT], 300, tmp_path_factory.mktemp("t") / "tokenizer.model", 1)


def prepared(recipe: Recipe, tied: bool) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(
        ModelConfig(
            d_model=40,
            n_layers=2,
            n_heads=2,
            d_ff=56,
            vocab_size=300,
            max_seq_len=64,
            linear="fp",
            tie_embeddings=tied,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(torch.rand_like(parameter) + 0.5)
    prepare(model, recipe)
    calibrate(model, [torch.randint(0, 300, (1, 40))])
    return model.eval()


def greedy(model: Transformer, prompt: list[int], n: int) -> list[int]:
    """The slow and obvious way: the whole text again for each token."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(n):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_generate_save_load_and_convert(
    recipe: Recipe, tied: bool, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model, prompt = prepared(recipe, tied), [2, 5, 77, 130]
    tokens = torch.tensor([[*prompt, 9, 260]])
    with torch.no_grad():
        expected = model(tokens)
    text = greedy(model, prompt, 6)
    assert generate(model, [prompt], 6) == [text]
    save_model(tmp_path / "latent", model, tokenizer, recipe)
    latent = load_model(tmp_path / "latent").eval()
    packed = convert(prepared(recipe, tied))
    assert isinstance(packed, Transformer)
    save_model(tmp_path / "packed", packed, tokenizer, recipe)
    integer = load_model(tmp_path / "packed").eval()
    quantized = "embed_tokens" not in recipe.skip
    assert isinstance(latent.embed_tokens, QATEmbedding) == quantized
    assert isinstance(integer.embed_tokens, IntEmbedding) == quantized
    for loaded in (latent, integer):
        with torch.no_grad():
            assert torch.equal(loaded(tokens), expected)
        assert generate(loaded, [prompt], 6) == [text]


def test_the_decoder_reads_the_rows_that_the_embedding_gives() -> None:
    model = prepared(RECIPES["int4"], tied=True)
    codes, scale, _ = model.embed_tokens.quantize()  # type: ignore[operator]
    rows = Decoder(model, 1, 8)._weights.embedding
    assert torch.equal(rows, codes.float() * scale[:, None])
    model.embed_tokens.lambda_w = 0.0  # type: ignore[assignment]
    assert torch.equal(Decoder(model, 1, 8)._weights.embedding, model.embed_tokens.weight)


@pytest.mark.parametrize("name", ["int4", "head kept", "static", "weights only"])
def test_the_commands_take_such_a_folder(
    name: str, bitnet: Bitnet, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    folder, text = tmp_path / "model", tmp_path / "text.txt"
    text.write_text(TEXT[:400], encoding="utf-8")
    save_model(folder, prepared(RECIPES[name], tied=True), tokenizer, RECIPES[name])
    code, out, err = bitnet("pack", folder, "--tokens", "3")
    assert (code, "proof: all equal, bit for bit" in out) == (0, True), err + out
    results = []
    for one in (folder, tmp_path / "model-packed"):
        code, out, err = bitnet("eval", one, "--text", text)
        assert code == 0, err
        results.append(out.replace("model-packed", "model").split("│")[2:4])
        code, _, err = bitnet("generate", one, "--prompt", "def", "--max-new-tokens", "3")
        assert code == 0, err
    assert results[0] == results[1]
    assert load(tmp_path / "model-packed")[0].config.tie_embeddings
    for command in (["ptq", folder, "--text", text], ["inspect", "model", folder]):
        code, _, err = bitnet(*command)
        assert (code, "Traceback" in err) == (2, False)  # it says that it is quantized already


@pytest.mark.parametrize("name", ["int4", "head kept", "embedding only"])
def test_adapters_beside_a_quantized_embedding(
    name: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model, prompt, tokens = prepared(RECIPES[name], True), [2, 5, 77], torch.tensor([[2, 5, 77]])
    with torch.no_grad():
        before = model(tokens)
    add_adapters(model, AdapterConfig(kind="lora", rank=2), RECIPES[name])
    with torch.no_grad():
        assert torch.equal(model(tokens), before)  # an adapter begins as nothing
        for layer in model.modules():
            if isinstance(layer, LoRALinear):
                layer.lora_b.normal_(std=0.1)
        assert not torch.equal(model(tokens), before)
    assert generate(model, [prompt], 4) == [greedy(model, prompt, 4)]
    merge_adapters(model)
    text = greedy(model, prompt, 4)
    save_model(tmp_path / "merged", model, tokenizer, RECIPES[name])
    assert generate(load_model(tmp_path / "merged"), [prompt], 4) == [text]


@pytest.mark.parametrize("converted", [False, True], ids=["latent", "integer"])
@pytest.mark.parametrize("name", ["int4", "groups", "static", "embedding only"])
def test_in_bfloat16(name: str, converted: bool) -> None:
    model, prompt = prepared(RECIPES[name], tied=True), [2, 5, 77, 130]
    model = as_transformer(convert(model)) if converted else model
    model.to(torch.bfloat16)
    with torch.no_grad():
        assert model(torch.tensor([prompt])).dtype == torch.bfloat16
    assert generate(model, [prompt], 3) == [greedy(model, prompt, 3)]


def test_the_benchmark_of_ternary_models_refuses_such_a_folder(
    bitnet: Bitnet, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    save_model(tmp_path / "m", prepared(RECIPES["int4"], True), tokenizer, RECIPES["int4"])
    code, _, err = bitnet("bench", "decode", "--quick", "--model", tmp_path / "m")
    assert (code, len(err.splitlines())) == (2, 1)
    assert err.startswith(f"error: --model: {tmp_path / 'm'} is not ternary")


def test_packing_that_is_ended_leaves_nothing(
    bitnet: Bitnet, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM once the tensors are written, before the folder has its name."""
    save_model(tmp_path / "m", prepared(RECIPES["int4"], True), tokenizer, RECIPES["int4"])
    save_tensors = folders.save_tensors

    def ended(*args: Any) -> Any:
        result = save_tensors(*args)
        assert (tmp_path / ".tmp-m-packed" / "model.safetensors").exists()
        signal.raise_signal(signal.SIGTERM)
        return result

    monkeypatch.setattr(folders, "save_tensors", ended)
    code, out, err = bitnet("pack", tmp_path / "m", "--tokens", "2")
    assert (code, out, "Traceback" in err) == (143, "", False)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_another_class_of_embedding_is_still_refused() -> None:
    class Doubled(torch.nn.Embedding):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    model = prepared(RECIPES["embedding kept"], tied=False)
    model.embed_tokens = Doubled(300, 40)
    with pytest.raises((ValueError, UserError), match="embed_tokens"):
        generate(model, [[1, 2]], 2)
