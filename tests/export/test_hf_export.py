"""Exports to Hugging Face: transformers computes what our model computes, in every kind."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from bitnet.data.chat_template import ChatTemplate, Message
from bitnet.data.tokenizer import Tokenizer
from bitnet.data.tokenizer_json import JsonTokenizer
from bitnet.export.facts import Facts
from bitnet.export.folder import load, save_model
from bitnet.export.hf import load_hf
from bitnet.export.hf_verify import verify_hf
from bitnet.export.hf_write import KINDS, save_hf
from bitnet.export.verification import ternary_matrices
from bitnet.generate import generate
from bitnet.linear import TernaryLinear
from bitnet.model import Transformer
from bitnet.schema import UserError
from tests.helpers.hf_export import (
    far_from_ties,
    greedy,
    load_theirs,
    spreads,
    tokenizer,
    trained,
    transformers,
)
from tests.helpers.hf_folder import tokenizer_json
from tests.helpers.model_folders import packed

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers, about itself
NO_FACTS = Facts("model")


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    """transformers' kernels without torch.compile, which takes a C++ compiler and 20 s."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("words")


def same_matrices(ours: Transformer, theirs: Transformer) -> int:
    """Codes and scales, bit for bit; returns their number."""
    count = 0
    for one, other in zip(ternary_matrices(ours), ternary_matrices(theirs), strict=True):
        assert one[0] == other[0]
        assert torch.equal(one[1], other[1]), one[0]
        assert torch.equal(one[2], other[2]), one[0]
        count += 1
    return count


MODELS: dict[str, dict[str, Any]] = {
    "tied": {"tie_embeddings": True},
    "untied": {"tie_embeddings": False, "activation": "silu", "norm_eps": 1e-6},
    "Llama": {"tie_embeddings": False, "norm_placement": "pre_norm"},
    "Qwen3": {"norm_placement": "pre_norm", "qk_norm": True},
    "biased": {"qkv_bias": True},
    "biased Llama": {"norm_placement": "pre_norm", "qkv_bias": True},
}
QUICK = {
    ("untied", "packed"),
    ("Llama", "online"),
    ("Qwen3", "offline"),
    ("biased", "online"),
    ("biased Llama", "packed"),
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(n, k, marks=[] if n == "tied" or (n, k) in QUICK else [pytest.mark.slow])
        for n in MODELS
        for k in KINDS
        if not (n.startswith("biased") and k == "offline")  # refused, see below
    ],
)
@torch.no_grad()
def test_transformers_computes_the_same(tmp_path: Path, words: Path, name: str, kind: str) -> None:
    model = trained(60, **MODELS[name])
    save_hf(model, tokenizer(words), tmp_path / "hf", kind, NO_FACTS)
    theirs = load_theirs(tmp_path / "hf")
    theirs_name = name if name in ("Llama", "Qwen3") else "BitNet"
    theirs_name = "Llama" if name == "biased Llama" else theirs_name
    assert type(theirs).__name__ == f"{theirs_name}ForCausalLM"
    down = theirs.model.layers[0].mlp.down_proj
    assert type(down).__name__ == ("BitLinear" if kind == "packed" else "AutoBitLinear")
    assert (down.weight.dtype == torch.uint8) == (kind == "packed")
    tokens = torch.randint(model.config.vocab_size, (150, 3))
    difference = spreads(model(tokens), theirs(tokens).logits)
    assert difference.median() < 1e-6
    far = far_from_ties(model, tokens)
    assert far.sum() > 75
    assert difference[far].max() < 1e-3  # of all: its 99.9% quantile, where there is no tie
    prompt = [0, 37, 74]
    (new,) = generate(model, [prompt], 64)
    assert greedy(theirs, prompt, 64) == new
    assert len(new) == 64
    # back into ours
    again, same = load_hf(tmp_path / "hf")
    assert same_matrices(model, again) == 14
    assert same.hash == tokenizer(words).hash
    assert again.config == model.config
    latent = {name for name, _ in again.named_parameters() if name.endswith("_proj.weight")}
    assert bool(latent) == (kind == "online")
    rest = dict(again.named_parameters())
    for key, parameter in model.named_parameters():
        if kind == "online" or not key.endswith("_proj.weight"):
            assert torch.equal(rest[key], parameter), key


@torch.no_grad()
def test_biases_where_transformers_would_compute_something_else(
    tmp_path: Path, words: Path
) -> None:
    """transformers multiplies the biases of the kind offline by the scale: not exported, and not
    imported."""
    model = trained(**MODELS["biased Llama"])
    with pytest.raises(UserError, match=r"model\.qkv_bias, .* --kind packed or online"):
        save_hf(model, tokenizer(words), tmp_path / "hf", "offline", NO_FACTS)
    assert not (tmp_path / "hf").exists()
    save_hf(model, tokenizer(words), tmp_path / "hf", "packed", NO_FACTS)
    assert verify_hf(model, tokenizer(words), tmp_path / "hf").holds
    changed = load(save_model(tmp_path / "ours", model, tokenizer(words)))[0]
    changed.layers[1].self_attn.v_proj.bias[3] += 1e-3
    result = verify_hf(changed, tokenizer(words), tmp_path / "hf")
    assert "layers.1.self_attn.v_proj.bias: differs" in result.differences
    path = tmp_path / "hf" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["linear_class"] = "autobitlinear"
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match="biases beside codes"):
        load_hf(tmp_path / "hf")


CHATML = (
    "{%- for m in messages %}\n{{ bos_token + m.role + '\n' + m.content + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ bos_token }}assistant\r\n{% endif %}"
)
CHATS: list[list[Message]] = [
    [{"role": "user", "content": "to be? — <|im_end|> <x>"}],
    [
        {"role": "system", "content": " two  spaces "},
        {"role": "user", "content": "whether"},
        {"role": "assistant", "content": "'tis"},
        {"role": "user", "content": "nobler\n"},
    ],
]


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_a_chat_template_goes_out_and_comes_back(tmp_path: Path, words: Path, kind: str) -> None:
    """transformers renders the same text, to the same ids; imported, it is the same template."""
    path = words / "tokenizer.model"
    coder: Tokenizer = JsonTokenizer(Path("tokenizer.json"), tokenizer_json())
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    if kind == "sentencepiece":
        tokenizer(words)
        coder, names = Tokenizer(path), {"bos_token": "<s>", "eos_token": "</s>"}
    coder.chat_template = template = ChatTemplate(CHATML, names)
    model = trained(vocab_size=coder.vocab_size)
    save_hf(model, coder, tmp_path / "hf", "online", NO_FACTS)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    for chat in CHATS:
        for answer in (True, False):
            text = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=answer)
            assert text == template.render(chat, answer)
        if "<|im_end|>" in chat[0]["content"] and kind == "byte-level":
            continue  # a message's own <|im_end|> is text here, and the token there
        ids = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        assert ids == coder.encode_chat(template, chat)
    assert len(theirs) == coder.vocab_size
    assert theirs("to be")["input_ids"] == [coder.eos_id, *coder.encode("to be")]
    again = load_hf(tmp_path / "hf")[1].chat_template
    assert again is not None
    assert again.source == CHATML
    assert again.tokens.items() >= names.items()
    result = verify_hf(model, coder, tmp_path / "hf")
    assert result.holds, result.differences
    assert any("3 chats have the same text and ids" in line for line in result.compared)
    (tmp_path / "hf" / "chat_template.jinja").write_text(CHATML.replace("role", "content"))
    assert any("a chat of 1" in d for d in verify_hf(model, coder, tmp_path / "hf").differences)
    coder.chat_template = ChatTemplate("{{ bos_token }}", {"bos_token": "<none>"})
    with pytest.raises(UserError, match="bos_token '<none>', which is no special token"):
        save_hf(model, coder, tmp_path / "other", "online", NO_FACTS)
    assert not (tmp_path / "other").exists()


@torch.no_grad()
def test_a_wrong_scale_convention_would_be_seen(tmp_path: Path, words: Path) -> None:
    """The two packed kinds differ in one word of the config and in the inverse; swapped, the
    model still loads. So the comparison above is not vacuous."""
    model = trained()
    save_hf(model, tokenizer(words), tmp_path / "hf", "offline", NO_FACTS)
    path = tmp_path / "hf" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["linear_class"] = "bitlinear"
    path.write_text(json.dumps(config))
    tokens = torch.randint(model.config.vocab_size, (1, 32))
    assert spreads(model(tokens), load_theirs(path.parent)(tokens).logits).median() > 0.1
    result = verify_hf(model, tokenizer(words), path.parent)
    assert not result.holds
    assert any("logits" in line for line in result.differences)
    assert any("scales differ" in line for line in result.differences)


def test_the_layout_of_a_packed_file(tmp_path: Path, words: Path) -> None:
    """Four rows a byte, worked out by hand from the codes; one scale and one inverse."""
    model = trained()
    for kind, power in (("offline", 1), ("packed", -1)):
        save_hf(model, tokenizer(words), tmp_path / kind, kind, NO_FACTS)
        stored = load_file(tmp_path / kind / "model.safetensors")
        assert "lm_head.weight" not in stored
        for name, codes, scale in ternary_matrices(model):
            bytes_ = stored[f"model.{name}.weight"]
            rows, columns = codes.shape
            assert bytes_.dtype == torch.uint8
            assert bytes_.shape == (rows // 4, columns)
            for row, column in ((0, 0), (rows // 4, 1), (rows - 1, columns - 1), (5, 7)):
                i, j = divmod(row, rows // 4)
                digit = int(bytes_[j, column]) // 4**i % 4
                assert digit - 1 == int(codes[row, column])
            weight_scale = stored[f"model.{name}.weight_scale"]
            assert weight_scale.shape == (1,)
            assert float(weight_scale) == pytest.approx(float(scale) ** power, rel=1e-6)
    theirs = transformers.integrations.bitnet.pack_weights(codes.clone().float())
    assert torch.equal(bytes_, theirs)


def test_scales_survive_an_inverse_that_rounds(tmp_path: Path, words: Path) -> None:
    """For one scale in six 1 / (1 / scale) is another number, and the export keeps the scale; what
    another program has written over wins."""
    model = packed(trained())
    layers = [m for m in model.modules() if isinstance(m, TernaryLinear)]
    lossy = [
        scale for i in range(400) if float(1 / (1 / (scale := _fp32(1.5 + i / 7919)))) != scale
    ]
    assert len(lossy) > len(layers)
    for layer, scale in zip(layers, lossy, strict=False):
        layer.scale = scale
    save_hf(model, tokenizer(words), tmp_path / "hf", "packed", NO_FACTS)
    assert same_matrices(model, load_hf(tmp_path / "hf")[0]) == 14
    theirs = load_theirs(tmp_path / "hf")
    theirs.save_pretrained(tmp_path / "again")
    for name in ("tokenizer.json", "tokenizer.model"):
        (tmp_path / "again" / name).write_bytes((tmp_path / "hf" / name).read_bytes())
    with safe_open(tmp_path / "again" / "model.safetensors", "pt") as file:
        assert set(file.metadata()) == {"format"}
    again, _ = load_hf(tmp_path / "again")
    for one, other in zip(ternary_matrices(model), ternary_matrices(again), strict=True):
        assert torch.equal(one[1], other[1])
        assert torch.equal(other[2], one[2].reciprocal().reciprocal())
        assert not torch.equal(one[2], other[2])


def _fp32(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float32)


def test_a_packed_folder_exports_as_the_latent_one_does(tmp_path: Path, words: Path) -> None:
    model = trained()
    save_model(tmp_path / "ours", packed(model), tokenizer(words))
    again, same = load(tmp_path / "ours")
    for kind in ("offline", "packed"):
        save_hf(model, tokenizer(words), tmp_path / f"latent-{kind}", kind, NO_FACTS)
        save_hf(again, same, tmp_path / f"packed-{kind}", kind, NO_FACTS)
        for file in sorted((tmp_path / f"latent-{kind}").iterdir()):
            other = tmp_path / f"packed-{kind}" / file.name
            if file.suffix != ".safetensors":
                assert other.read_bytes() == file.read_bytes(), file.name
                continue
            with safe_open(file, "pt") as one, safe_open(other, "pt") as two:  # of any order
                assert one.metadata() == two.metadata()
                assert set(one.keys()) == set(two.keys())
                for key in one.keys():  # noqa: SIM118
                    assert torch.equal(one.get_tensor(key), two.get_tensor(key)), key
    with pytest.raises(UserError, match="is packed and has no weights to train; export it as off"):
        save_hf(again, same, tmp_path / "online", "online", NO_FACTS)
    assert not (tmp_path / "online").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"linear": "fp"}, "carries model.linear = 'ternary', not 'fp'"),
        ({"norm_placement": "in_linear"}, "'sub_norm' or 'pre_norm', not 'in_linear'"),
        ({"qk_norm": True}, "carries model.qk_norm = False with 'sub_norm'"),
        ({"granularity": "row"}, "carries model.granularity = 'tensor', not 'row'"),
        ({"d_ff": 78}, r"mlp.gate_proj has 78 rows, .* no multiple of 4 \(model.d_ff\)"),
        ({"n_heads": 24, "n_kv_heads": 1}, r"k_proj has 2 rows, .* \(model.n_kv_heads\)"),
    ],
)
def test_what_transformers_cannot_carry_is_refused(
    tmp_path: Path, words: Path, fields: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        save_hf(trained(**fields), tokenizer(words), tmp_path / "hf", "offline", NO_FACTS)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_the_files_say_what_transformers_must_know(tmp_path: Path, words: Path) -> None:
    facts = Facts("my-run", "[model]\n", {"step": 10, "tokens": 2560, "val_loss": 2.5}, ("a|b",))
    save_hf(trained(), tokenizer(words), tmp_path / "hf", "online", facts)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 50_000.0
    assert config["quantization_config"]["quantization_mode"] == "online"
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "hf")
    assert generation.bos_token_id == generation.eos_token_id == 2
    card = (tmp_path / "hf" / "README.md").read_text()
    assert card.startswith("---\n")
    for part in ("# my-run", "2,560 in 10 steps", "2.5000 nats", "a\\|b", "[model]", "| online: "):
        assert part in card
    assert "bits per byte |" not in card  # this run has none
