"""Each format gives back what went in, whichever way a model goes through them."""

from pathlib import Path

import pytest
import torch

from bitnet.data.tokenizer import Tokenizer
from bitnet.export.facts import Facts
from bitnet.export.folder import load, save_model
from bitnet.export.formats import FORMATS
from bitnet.export.source import import_model
from bitnet.model import Transformer
from bitnet.schema import UserError
from tests.helpers.gguf_models import matrices, model
from tests.helpers.model_folders import RECIPES, make, prepared

pytest.importorskip("gguf", reason="the gguf extra is not installed")
FACTS = Facts("a model")


def test_a_way_through_all_formats_loses_nothing(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """hf needs transformers to be read, and has tests of its own."""
    ours: Transformer = model(packed=False)
    expected = {
        name: layer.quantize()[:2] for name, layer in ours.named_modules() if "proj" in name
    }
    read = tokenizer
    for step, (name, kind, path) in enumerate(
        (
            ("file", "packed", "a.safetensors"),
            ("gguf", "f32", "b.gguf"),
            ("folder", "packed", "c"),
            ("gguf", "tq1_0", "d.gguf"),
            ("gguf", "i2_s", "e.gguf"),
            ("gguf", "tq2_0", "f.gguf"),
            ("file", "packed", "g.safetensors"),
        )
    ):
        FORMATS[name].save(ours, read, tmp_path / path, kind, FACTS)
        ours, read = FORMATS[name].load(tmp_path / path)
        found = matrices(ours)
        assert found.keys() == expected.keys()
        for layer, (codes, scale) in expected.items():
            assert torch.equal(found[layer][0], codes), (step, layer)
            assert torch.equal(found[layer][1], scale), (step, layer)
    assert read.encode("to be\n  x") == tokenizer.encode("to be\n  x")
    back, _ = load(save_model(tmp_path / "h", *import_model(tmp_path / "f.gguf")))
    assert matrices(back).keys() == expected.keys()


@pytest.mark.parametrize("name", ["file", "folder"])
def test_verification_of_our_own_formats(tmp_path: Path, tokenizer: Tokenizer, name: str) -> None:
    trained, path = make(), tmp_path / "model"
    FORMATS[name].save(trained, tokenizer, path, "packed", FACTS)
    result = FORMATS[name].verify(trained, tokenizer, path)
    assert result.holds, result.differences
    assert any("14 matrices read back" in line for line in result.compared)
    trained.layers[0].mlp.up_proj.weight.data.neg_()
    trained.norm.weight.data.add_(1)
    result = FORMATS[name].verify(trained, tokenizer, path)
    assert any("layers.0.mlp.up_proj: codes differ" in line for line in result.differences)
    assert any("norm.weight: differs" in line for line in result.differences)
    assert any("logits of" in line for line in result.differences)


def test_verification_of_gguf(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """With llama.cpp where it is installed; where not, a line says what to install."""
    trained, path = model(packed=False), tmp_path / "model.gguf"
    for kind in ("tq2_0", "i2_s"):
        FORMATS["gguf"].save(trained, tokenizer, path, kind, FACTS)
        result = FORMATS["gguf"].verify(trained, tokenizer, path)
        assert result.holds, result.differences
        assert "within fp16" in result.compared[0]
        skipped = {"i2_s": "bitnet.cpp"}.get(kind, "peers")
        assert len(result.compared) == 3 or skipped in result.skipped[0]
    trained.layers[1].self_attn.k_proj.weight.data.mul_(1.5)
    trained.embed_tokens.weight.data.add_(0.01)
    result = FORMATS["gguf"].verify(trained, tokenizer, path)
    assert any("layers.1.self_attn.k_proj: scales differ" in line for line in result.differences)
    assert any("embed_tokens.weight: differs" in line for line in result.differences)


@pytest.mark.parametrize("name", ["file", "folder"])
def test_what_cannot_be_packed(tmp_path: Path, tokenizer: Tokenizer, name: str) -> None:
    for made, said in (
        (make(linear="fp"), "the model is full precision"),
        (prepared(RECIPES[0]), "is quantized by a recipe"),
    ):
        with pytest.raises(UserError, match=said):
            FORMATS[name].save(made, tokenizer, tmp_path / "model", "packed", FACTS)
    assert not list(tmp_path.iterdir())
