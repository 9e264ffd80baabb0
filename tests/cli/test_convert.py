"""bitnet convert, and pack, generate and eval on every kind of folder, called as from a shell."""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bitnet.data.tokenizer import train_tokenizer
from bitnet.data.tokenizer_json import JsonTokenizer
from bitnet.evaluate import evaluate_text
from bitnet.export.folder import load, read_config, save_model
from bitnet.export.proof import prove
from bitnet.export.source import load_source
from bitnet.linear import TernaryLinear
from bitnet.model import ModelConfig, Transformer
from bitnet.qat.integer import IntLinear
from bitnet.qat.layers import QATLinear
from bitnet.qat.prepare import convert, prepare
from bitnet.qat.recipe import Recipe
from bitnet.schema import UserError

Bitnet = Callable[..., tuple[int, str, str]]
TEXT = "\n\n".join(f"def f{i}(x):\n    return x + {i}  # naïve ☃" for i in range(60))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """text.txt, full-precision models of ours in pre/ and sub/, a ternary one in ternary/."""
    root = tmp_path_factory.mktemp("convert")
    (root / "text.txt").write_text(TEXT, encoding="utf-8")
    tokenizer = train_tokenizer([TEXT] * 5, 320, root / "tokenizer.model", 1)
    shape = {"depth": 1, "n_layers": 2, "d_model": 48, "vocab_size": 320, "max_seq_len": 64}
    for name, linear, placement in (
        ("pre", "fp", "pre_norm"),
        ("sub", "fp", "sub_norm"),
        ("ternary", "ternary", "sub_norm"),
    ):
        torch.manual_seed(0)
        config = ModelConfig(**shape, linear=linear, norm_placement=placement)  # type: ignore[arg-type]
        model = Transformer(config)
        for parameter in model.parameters():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=0.2)
        save_model(root / name, model, tokenizer)
    return root


def losses(out: str) -> list[float]:
    """The loss column of the printed table."""
    return [float(loss) for loss in re.findall(r"│\s*([\d.]+)\s*│\s*[\d.]+\s*│\s*[\d.]+\s*│", out)]


RECIPES = [
    ("quant.weights=int", "quant.bits=4"),
    ("quant.weights=int", "quant.bits=4", "quant.granularity=group", "quant.group_size=16"),
    ("quant.weights=absmean", "quant.granularity=tensor"),
    (
        "quant.weights=int",
        "quant.bits=8",
        "quant.activations=static",
        "quant.keep_first_last=false",
    ),
    ("quant.weights=lsq", "quant.bits=3", "quant.activations=none"),
]


@pytest.mark.parametrize("keys", RECIPES, ids=" ".join)
def test_convert_then_pack_generate_and_eval(
    bitnet: Bitnet, root: Path, tmp_path: Path, keys: tuple[str, ...]
) -> None:
    """From full precision to proven integers; the losses of each form agree where they must."""
    text, latent, packed = root / "text.txt", tmp_path / "latent", tmp_path / "packed"
    extra = ("--calibration", text) if "quant.activations=static" in keys else ()
    code, out, err = bitnet("convert", root / "pre", *keys, "--out", latent, "--text", text, *extra)
    assert code == 0, err
    before, after = losses(out)
    assert before != after
    config = read_config(latent)
    assert config.weights == "latent"
    assert f"quant.weights={config.quant.weights}" == keys[0]
    model, _ = load(latent)
    assert isinstance(model.layers[0].mlp.up_proj, QATLinear)  # type: ignore[union-attr]
    source, _ = load(root / "pre")
    up = source.layers[0].mlp.up_proj  # type: ignore[union-attr]
    assert torch.equal(model.layers[0].mlp.up_proj.weight, up.weight)  # type: ignore[union-attr]

    code, out, err = bitnet("pack", latent, "--out", packed, "--tokens", "5")
    assert code == 0, out + err
    assert "proof: all equal, bit for bit" in out
    assert "15 greedy tokens" in out
    assert re.search(r"matrices\s*│.*│.*│\s*[3-9]\.\d\d|matrices\s*│.*│.*│\s*1\d\.\d\d", out)
    assert read_config(packed).weights == "integer"
    small, _ = load(packed)
    kind = TernaryLinear if "quant.weights=absmean" in keys else IntLinear
    assert isinstance(small.layers[1].self_attn.q_proj, kind)  # type: ignore[union-attr]
    code, out, err = bitnet("eval", packed, "--text", text)
    assert code == 0, err
    assert f"{after:.4f}" in out
    texts = []
    for folder in (latent, packed):
        code, out, err = bitnet("generate", folder, "--prompt", "def", "--max-new-tokens", "8")
        assert code == 0, err
        texts.append(out)
    assert texts[0] == texts[1]
    code, _, err = bitnet("pack", packed)
    assert code == 2
    assert "is integer already; there is nothing to pack" in err


@pytest.mark.parametrize("keys", RECIPES[::2], ids=" ".join)
def test_biases_of_qwen2_go_from_import_to_integers(
    bitnet: Bitnet, root: Path, tmp_path: Path, keys: tuple[str, ...]
) -> None:
    """They train with the matrices, and the proof of the packed model includes them."""
    latent, packed = tmp_path / "latent", tmp_path / "packed"
    source, tokenizer = load(root / "pre")
    torch.manual_seed(1)
    model = Transformer(dataclasses.replace(source.config, qkv_bias=True))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    save_model(tmp_path / "pre", model, tokenizer)
    code, _, err = bitnet("convert", tmp_path / "pre", *keys, "--out", latent)
    assert code == 0, err
    trained, _ = load(latent)
    bias = trained.get_parameter("layers.1.self_attn.v_proj.bias")
    assert torch.equal(bias, model.get_parameter("layers.1.self_attn.v_proj.bias"))
    tokens = torch.arange(33).unsqueeze(0)
    trained.train()(tokens[:, :-1], tokens[:, 1:]).backward()
    assert bias.grad is not None
    assert bool(bias.grad.any())
    code, out, err = bitnet("pack", latent, "--out", packed, "--tokens", "5")
    assert code == 0, out + err
    assert "proof: all equal, bit for bit" in out
    small, _ = load(packed)
    assert torch.equal(small.get_parameter("layers.1.self_attn.v_proj.bias"), bias)
    code, _, err = bitnet("generate", packed, "--prompt", "def", "--max-new-tokens", "8")
    assert code == 0, err
    source.config = dataclasses.replace(source.config, qkv_bias=True)
    with pytest.raises(ValueError, match=r"k_proj\.bias is missing"):
        save_model(tmp_path / "none", source, tokenizer)


def test_import_only_and_sub_norm(bitnet: Bitnet, root: Path, tmp_path: Path) -> None:
    text = root / "text.txt"
    code, out, err = bitnet("convert", root / "pre", "--out", tmp_path / "same", "--text", text)
    assert code == 0, err
    assert len(losses(out)) == 1
    same, _ = load(tmp_path / "same")
    for name, tensor in load(root / "pre")[0].state_dict().items():
        assert torch.equal(same.state_dict()[name], tensor)
    code, out, err = bitnet(
        *("convert", root / "pre", "--out", tmp_path / "sub", "--sub-norm"),
        *("quant.weights=absmean", "--text", text, "--context", "32"),
    )
    assert code == 0, err
    assert "train it before you judge it" in out
    config = read_config(tmp_path / "sub")
    assert (config.model.norm_placement, config.model.max_seq_len) == ("sub_norm", 32)
    assert "model.safetensors" in config.sha256


def test_a_hugging_face_folder(bitnet: Bitnet, tmp_path: Path) -> None:
    """Import, quantize, pack: with the tokenizer.json that the checkpoint came with."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([TEXT], trainer)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=304, eos_token_id=0, **shape, **heads)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "hf")
    backend.save(str(tmp_path / "hf" / "tokenizer.json"))
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")

    ours = tmp_path / "ours"
    code, out, err = bitnet(
        *("convert", tmp_path / "hf", "quant.weights=int", "--out", ours),
        *("--text", tmp_path / "text.txt"),
    )
    assert code == 0, err
    assert len(losses(out)) == 2
    assert (ours / "tokenizer.json").exists()
    code, out, err = bitnet("pack", ours)
    assert code == 0, out + err
    assert "bit for bit" in out
    _, tokenizer = load(tmp_path / "ours-packed")
    assert isinstance(tokenizer, JsonTokenizer)
    assert tokenizer.vocab_size == 300
    assert bitnet("generate", tmp_path / "ours-packed", "--max-new-tokens", "5")[0] == 0


def test_mistakes_are_one_line(bitnet: Bitnet, root: Path, tmp_path: Path) -> None:
    pre, out, text = root / "pre", ("--out", tmp_path / "out"), root / "text.txt"
    shutil.copytree(pre, tmp_path / "latent")
    recipe = Recipe(weights="int")
    model, tokenizer = load(pre)
    save_model(tmp_path / "qat", as_model(prepare(model, recipe)), tokenizer, recipe)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    for args, message in [
        ((pre,), "name the folder to write with --out"),
        ((pre, "model.depth=3", *out), "expected quant.KEY=VALUE"),
        ((pre, "quant.bits=4", *out), "quantizes nothing without quant.weights"),
        ((pre, "quant.weights=itn", *out), "'itn': expected 'none', 'int'"),
        ((pre, "quant.weights=int", "quant.bit=4", *out), "the nearest is quant.bits"),
        ((pre, "quant.weights=int", "quant.bits=17", *out), "quant.bits = 17"),
        ((pre, "quant.weights=int", 'quant.include=["q_porj"]', *out), "'q_porj'; the nearest"),
        ((pre, "quant.weights=int", "quant.activations=static", *out), "--calibration FILE"),
        ((pre, "quant.weights=int", "--calibration", text, *out), "only quant.activations=static"),
        ((pre, "--text", tmp_path / "no.txt", *out), "no.txt: No such file"),
        ((pre, "--context", "128", *out), "was trained for 64 at most"),
        ((root / "sub", "--sub-norm", *out), "only a 'pre_norm' model"),
        ((root / "ternary", "quant.weights=int", *out), "expected a full-precision model"),
        ((tmp_path / "qat", "quant.weights=int", *out), "expected a full-precision model"),
        ((root / "prr", *out), "prr: no such model folder"),
        ((tmp_path / "elsewhere", *out), "elsewhere: has no tokenizer.json"),
        ((tmp_path / "no.gguf", *out), "no such model"),
        ((pre, "quant.weights=int", "--out", tmp_path / "elsewhere"), "exists already"),
        ((pre, "--out", tmp_path / "latent"), "exists already"),
        ((pre, "--out", pre), "exists already"),
    ]:
        code, _, err = bitnet("convert", *args)
        assert (code, err.count("\n")) == (2, 1), err
        assert message in err
    assert not (tmp_path / "out").exists()
    code, _, err = bitnet("pack", tmp_path / "qat", "--out", tmp_path / "latent")
    assert code == 2
    assert "holds a trained model" in err


def test_blank_texts_are_refused_before_anything_is_loaded(
    bitnet: Bitnet, root: Path, tmp_path: Path
) -> None:
    static = ("quant.weights=int", "quant.activations=static", "--calibration")
    for content in ("", " \n\t"):
        (tmp_path / "blank.txt").write_text(content)
        for args in ((*static, tmp_path / "blank.txt"), ("--text", tmp_path / "blank.txt")):
            code, _, err = bitnet("convert", root / "pre", *args, "--out", tmp_path / "out")
            assert (code, err) == (2, f"error: {tmp_path / 'blank.txt'}: is empty\n")
            assert not (tmp_path / "out").exists()


def test_progress_and_the_same_losses(
    bitnet: Bitnet, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a terminal, stderr shows how far it is; a file gets nothing, and the numbers are those of
    the evaluation elsewhere."""
    text = root / "text.txt"
    args = ("quant.weights=int", "quant.activations=static", "--calibration", text, "--text", text)
    code, out, err = bitnet("convert", root / "pre", *args, "--out", tmp_path / "quiet")
    assert (code, err) == (0, "")
    for folder, loss in zip((root / "pre", tmp_path / "quiet"), losses(out), strict=True):
        assert f"{evaluate_text(*load(folder), TEXT).loss:.4f}" == f"{loss:.4f}"
    monkeypatch.setenv("FORCE_COLOR", "1")
    code, out, err = bitnet("convert", root / "pre", *args, "--out", tmp_path / "shown")
    assert code == 0
    for stage in ("evaluation before", "calibration", "evaluation after"):
        assert stage in err
        assert stage not in out


def as_model(module: torch.nn.Module) -> Transformer:
    assert isinstance(module, Transformer)
    return module


def test_load_source_takes_full_precision_only(root: Path) -> None:
    model, tokenizer = load_source(root / "pre")
    assert (model.config.linear, tokenizer.vocab_size) == ("fp", 320)
    with pytest.raises(UserError, match="full-precision"):
        load_source(root / "ternary")


@torch.no_grad()
def test_the_proof_names_what_differs(root: Path) -> None:
    """Every kind of damage to the integer form, and an uncovered layer."""
    source, _ = load(root / "pre")
    recipe = Recipe(weights="int", bits=4, symmetric=False)
    latent = as_model(prepare(source, recipe))
    folder = root / "proof"

    def small() -> Transformer:
        save_model(folder, latent, None, recipe)
        from bitnet.export.folder import load_model

        return as_model(convert(load_model(folder)))

    whole = prove(latent, small(), [[2, 5, 7]], 3)
    assert whole.holds
    assert (whole.matrices, whole.tokens) == (14, 3)
    assert whole.accumulators > 0
    damages: list[tuple[str, Callable[[IntLinear], object]]] = [
        ("codes differ", lambda layer: layer.packed.bitwise_xor_(1)),
        ("scales differ", lambda layer: layer.scale.mul_(1.01)),
        ("zero points differ", lambda layer: layer.zero_point.add_(1)),  # type: ignore[union-attr]
    ]
    for message, damage in damages:
        broken = small()
        layer = broken.get_submodule("layers.1.mlp.up_proj")
        assert isinstance(layer, IntLinear)
        damage(layer)
        differences = prove(latent, broken, [[2, 5, 7]], 3).differences
        assert f"layers.1.mlp.up_proj: {message}" in differences
        assert "prompt 0: logits differ" in differences
    broken = small()
    broken.norm.weight.mul_(2)
    assert "norm.weight: differs" in prove(latent, broken, [[2]], 1).differences
    broken = small()
    broken.set_submodule("layers.0.mlp.up_proj", latent.get_submodule("layers.0.mlp.up_proj"))
    assert "layers.0.mlp.up_proj: is not packed" in prove(latent, broken, [[2]], 1).differences
