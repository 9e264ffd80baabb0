"""Importing Llama-family checkpoints: the same logits and tokens as transformers'."""

import dataclasses
import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitnet.engine.engine import Engine
from bitnet.evaluate import evaluate_text
from bitnet.export.folder import load, save_model
from bitnet.export.hf import add_sub_norms, load_hf
from bitnet.export.hf_tokenizer import PROBES
from bitnet.generate import encode_prompt, generate
from bitnet.model import ModelConfig, Transformer
from bitnet.schema import UserError
from tests.helpers.hf_folder import TEXT, edit, llama, tokenizer_json, transformers, write
from tests.helpers.tokenizer_file import byte_pairs

pytest.importorskip("gguf")
EPS = torch.finfo(torch.float32).eps


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(llama(), tmp_path / "llama")


def greedy_tokens(theirs: Any, prompt: list[int], count: int) -> list[int]:
    """What transformers generates after a prompt, greedily."""
    generated = theirs.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    found: list[int] = generated[0, len(prompt) :].tolist()
    return found


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True, "num_key_value_heads": 4},
        {"num_key_value_heads": 1, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    ],
    ids=str,
)
@torch.no_grad()
def test_the_same_logits_and_tokens(tmp_path: Path, changes: dict[str, Any]) -> None:
    theirs = llama(**changes)
    model, tokenizer = load_hf(write(theirs, tmp_path / "llama"))
    assert tokenizer.eos_id == 2, "config.json's, not the first usual name"
    assert all(p.dtype == torch.float32 and p.requires_grad for p in model.parameters())
    tied = model.lm_head.weight is model.embed_tokens.weight
    assert tied == model.config.tie_embeddings == theirs.config.tie_word_embeddings
    tokens = torch.randint(0, 300, (2, 64))
    ours, expected = model(tokens), theirs(tokens).logits
    # fp32 sums of up to 76 products in another order: eps * sqrt(76) a product, 7 products and an
    # attention a layer, 3 layers; the residual stream carries it on. Measured: a tenth of this.
    bound = 3 * 8 * 76**0.5 * EPS * expected.std()
    assert (ours - expected).abs().max() < bound
    prompt = encode_prompt(tokenizer, "to be or")
    (new,) = generate(model, [prompt], 20)
    assert new == greedy_tokens(theirs, prompt, 20)


@torch.no_grad()
def test_mistral_without_a_window(tmp_path: Path) -> None:
    fields = {k: v for k, v in llama().config.to_dict().items() if k not in ("model_type",)}
    config = transformers.MistralConfig(**fields | {"sliding_window": None})
    theirs = transformers.MistralForCausalLM(config).eval()
    model, _ = load_hf(write(theirs, tmp_path / "mistral"))
    tokens = torch.randint(0, 300, (2, 64))
    torch.testing.assert_close(model(tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-6)
    edit(tmp_path / "mistral", lambda c: c.update(sliding_window=32))
    with pytest.raises(UserError, match="sliding_window of 32"):
        load_hf(tmp_path / "mistral")


@torch.no_grad()
def test_qwen3_with_norms_of_queries_and_keys(tmp_path: Path) -> None:
    fields = {k: v for k, v in llama().config.to_dict().items() if k not in ("model_type",)}
    theirs = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**fields)).eval()
    for parameter in theirs.parameters():
        torch.nn.init.uniform_(parameter, 0.5, 1.5) if parameter.dim() == 1 else None
    model, _ = load_hf(write(theirs, tmp_path / "qwen3"))
    assert model.config.qk_norm
    tokens = torch.randint(0, 300, (2, 64))
    torch.testing.assert_close(model(tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-6)
    edit(tmp_path / "qwen3", lambda c: c.update(head_dim=16))
    with pytest.raises(UserError, match="heads of 16"):
        load_hf(tmp_path / "qwen3")
    edit(tmp_path / "qwen3", lambda c: c.update(head_dim=12, attention_bias=True))
    with pytest.raises(UserError, match=r"missing tensor .*q_proj\.bias"):
        load_hf(tmp_path / "qwen3")


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_qwen2_with_biases_of_queries_keys_and_values(tmp_path: Path, tied: bool) -> None:
    fields = {k: v for k, v in llama().config.to_dict().items() if k not in ("model_type",)}
    config = transformers.Qwen2Config(**fields | {"tie_word_embeddings": tied})
    theirs = transformers.Qwen2ForCausalLM(config).eval()
    for parameter in theirs.parameters():
        if parameter.dim() == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            torch.nn.init.normal_(parameter, std=0.2)
    folder = write(theirs, tmp_path / "qwen2")
    model, tokenizer = load_hf(folder)
    assert model.config.qkv_bias
    assert model.config.num_parameters()["total"] == sum(p.numel() for p in theirs.parameters())
    tokens = torch.randint(0, 300, (2, 64))
    ours, expected = model(tokens), theirs(tokens).logits
    bound = 3 * 8 * 76**0.5 * EPS * expected.std()  # as above
    assert (ours - expected).abs().max() < bound
    without = Transformer(dataclasses.replace(model.config, qkv_bias=False))
    without.load_state_dict({k: v for k, v in model.state_dict().items() if ".bias" not in k})
    assert (without(tokens) - expected).abs().max() > 0.1 * expected.std(), "biases must matter"
    prompt = encode_prompt(tokenizer, "to be or")
    (new,) = Engine(model, tokenizer).generate([prompt], 20)
    assert new == greedy_tokens(theirs, prompt, 20)
    again, _ = load(save_model(tmp_path / "ours", model, tokenizer))
    assert torch.equal(again(tokens), ours)


def test_a_qwen2_without_its_biases_is_damaged(tmp_path: Path) -> None:
    fields = {k: v for k, v in llama().config.to_dict().items() if k not in ("model_type",)}
    theirs = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**fields)).eval()
    folder = write(theirs, tmp_path / "qwen2")
    stored = load_file(folder / "model.safetensors")
    bias = stored.pop("model.layers.1.self_attn.k_proj.bias")
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        UserError, match=r"missing tensor model\.layers\.1\.self_attn\.k_proj\.bias"
    ):
        load_hf(folder)
    stored["model.layers.1.self_attn.k_proj.bias"] = bias[:-1].clone()
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"k_proj\.bias is \[23\]; the config wants \[24\]"):
        load_hf(folder)
    edit(folder, lambda c: c.update(use_sliding_window=True, sliding_window=32))
    with pytest.raises(UserError, match="sliding_window of 32"):
        load_hf(folder)


@pytest.mark.parametrize("name", ["Llama", "Qwen3"])
@torch.no_grad()
def test_biases_of_other_classes_if_that_of_o_proj_is_zero(tmp_path: Path, name: str) -> None:
    fields = {k: v for k, v in llama().config.to_dict().items() if k not in ("model_type",)}
    config = getattr(transformers, f"{name}Config")(**fields | {"attention_bias": True})
    theirs = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for key, parameter in theirs.named_parameters():
        if key.endswith(".bias"):
            torch.nn.init.uniform_(parameter, *(0, 0) if "o_proj" in key else (0.5, 1.5))
    model, _ = load_hf(write(theirs, tmp_path / "hf"))
    tokens = torch.randint(0, 300, (2, 64))
    torch.testing.assert_close(model(tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-6)
    theirs.model.layers[2].self_attn.o_proj.bias[7] = 1e-6
    with pytest.raises(UserError, match=r"model\.layers\.2\.self_attn\.o_proj\.bias, which our"):
        load_hf(write(theirs, tmp_path / "other"))


def test_qwens_tokenizer_without_its_normal_form(tmp_path: Path) -> None:
    """Qwen's own class, which normalizes, has the same ids for text that is in normal form C; other
    text keeps its bytes."""
    base = json.loads(byte_pairs(TEXT + "don't 123 'LL\r\n\n  é ü"))
    split = {"Regex": transformers.models.qwen2.tokenization_qwen2.PRETOKENIZE_REGEX}
    steps = [
        {"type": "Split", "pattern": split, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
    ]
    base["normalizer"] = {"type": "NFC"}
    base["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    folder = write(llama(), tmp_path / "qwen2", json.dumps(base).encode())
    theirs = transformers.Qwen2Tokenizer.from_pretrained(folder)
    tokenizer = load_hf(folder)[1]
    for text in (*PROBES, "I'LL 2026\r\n\n x", "\u212b and A\u030a"):
        composed = unicodedata.normalize("NFC", text)
        if "<|endoftext|>" not in text:  # text here, and the token there
            assert tokenizer.encode(composed) == theirs.encode(composed)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("e\u0301") != tokenizer.encode("\xe9")
    base["normalizer"] = {"type": "NFKC"}
    (folder / "tokenizer.json").write_text(json.dumps(base))
    with pytest.raises(UserError, match="normalizer NFKC changes the text"):
        load_hf(folder)


@torch.no_grad()
def test_older_configs_and_half_precision(tmp_path: Path) -> None:
    """rope_theta at the top, as transformers 4 wrote it; bf16 weights become the same fp32."""
    folder = write(llama().bfloat16(), tmp_path / "llama")
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def old(config: dict[str, Any]) -> None:
        config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
        config["rope_scaling"] = None

    edit(folder, old)
    model, _ = load_hf(folder)
    assert model.config.rope_theta == 50_000.0
    tokens = torch.randint(0, 300, (2, 64))
    torch.testing.assert_close(model(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_head_of_its_own_is_kept(tmp_path: Path) -> None:
    """The config says tied, the file holds two matrices; equal ones, as older files have, tie."""
    folder = write(llama(tie_word_embeddings=False), tmp_path / "llama")
    edit(folder, lambda c: c.update(tie_word_embeddings=True))
    stored = load_file(folder / "model.safetensors")
    model, _ = load_hf(folder)
    assert not model.config.tie_embeddings
    assert torch.equal(model.lm_head.weight, stored["lm_head.weight"])
    assert torch.equal(model.embed_tokens.weight, stored["model.embed_tokens.weight"])
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    model, _ = load_hf(folder)
    assert model.config.tie_embeddings
    assert model.lm_head.weight is model.embed_tokens.weight


def test_end_of_document_token(folder: Path) -> None:
    for given, expected in (([1, 2], 1), (None, 0), ([], 0)):
        edit(folder, lambda c, given=given: c.update(eos_token_id=given))  # type: ignore[misc]
        assert load_hf(folder)[1].eos_id == expected
    for given in (70, [70, 2], 299):
        edit(folder, lambda c, given=given: c.update(eos_token_id=given))  # type: ignore[misc]
        with pytest.raises(UserError, match=r"eos_token_id \d+ is none of .* added tokens"):
            load_hf(folder)
    # transformers would have 2 for a config without the key; this tokenizer's own token is 0
    edit(folder, lambda c: c.pop("eos_token_id"))
    assert load_hf(folder)[1].eos_id == 0


def test_an_end_that_the_library_numbers_otherwise(tmp_path: Path) -> None:
    """An added token behind a gap has another id in the library than in the file."""
    content = json.loads(tokenizer_json())
    content["added_tokens"].append(content["added_tokens"][0] | {"id": 310, "content": "<end>"})
    folder = write(llama(vocab_size=320), tmp_path / "llama", json.dumps(content).encode())
    edit(folder, lambda c: c.update(eos_token_id=310))
    with pytest.raises(UserError, match=r"eos_token_id \[310, 2\] cannot be had"):
        load_hf(folder)


def test_every_end_of_a_text_is_kept(folder: Path, tmp_path: Path) -> None:
    """A list in config.json, more in generation_config.json (Llama 3 Instruct has both); the first
    of config.json stays the end of a document. Our folder of it has them too."""
    ends = folder / "generation_config.json"
    for config, generation, first, expected in (
        ([1, 2], None, 1, {1, 2}),
        ([2, 1], [1, 0], 2, {0, 1, 2}),
        (1, [2], 1, {1, 2}),
        (1, 1, 1, {1}),
        (None, [1, 2], 0, {0, 1, 2}),  # the tokenizer's own first, as without a list
        ([], [], 0, {0}),
    ):
        edit(folder, lambda c, config=config: c.update(eos_token_id=config))  # type: ignore[misc]
        ends.write_text(json.dumps({"eos_token_id": generation}))
        tokenizer = load_hf(folder)[1]
        assert tokenizer.eos_id == tokenizer.eos_ids[0] == first
        assert set(tokenizer.eos_ids) == expected
        assert len(tokenizer.eos_ids) == len(expected)
    edit(folder, lambda c: c.update(eos_token_id=[2, 1]))
    model, tokenizer = load_hf(folder)
    _, same = load(save_model(tmp_path / "ours", model, tokenizer))
    assert (same.eos_id, same.eos_ids) == (2, (2, 1))
    ends.unlink()
    assert load_hf(folder)[1].eos_ids == (2, 1)
    for content, message in (
        ({"eos_token_id": [2, 70]}, "eos_token_id 70 is none of .* added tokens"),
        ({"eos_token_id": "2"}, "generation_config.json: eos_token_id: cannot be read"),
        ({"eos_token_id": [True]}, "generation_config.json: eos_token_id: cannot be read"),
        ({"eos_token_id": [[2]]}, "generation_config.json: eos_token_id: cannot be read"),
        ([], "generation_config.json: damaged"),
    ):
        ends.write_text(json.dumps(content))
        with pytest.raises(UserError, match=message):
            load_hf(folder)


def test_any_end_and_a_special_token_by_name_stop_a_text(folder: Path) -> None:
    """Greedy steps of a model whose layers add nothing: token i is followed by i + 1 of 300."""
    edit(folder, lambda c: c.update(eos_token_id=[2, 0]))
    tokenizer = load_hf(folder)[1]
    start, im_start = tokenizer.encode("t")[0], tokenizer.special_id("<|im_start|>")
    assert (im_start, tokenizer.special_id("<|im_strat|>")) == (1, None)
    model = Transformer(
        ModelConfig(d_model=300, n_layers=1, vocab_size=300, max_seq_len=16, tie_embeddings=False)
    )
    with torch.no_grad():
        for parameter in model.layers.parameters():
            parameter.zero_()
        model.embed_tokens.weight.copy_(torch.eye(300))
        for follower, options, expected in (
            (2, {"eos_id": tokenizer.eos_ids}, "eos"),
            (0, {"eos_id": tokenizer.eos_ids}, "eos"),
            (0, {"eos_id": tokenizer.eos_id}, "length"),
            (1, {"eos_id": tokenizer.eos_ids}, "length"),
            (1, {"eos_id": tokenizer.eos_ids, "stop": ["<|im_start|>"]}, "stop"),
            (1, {"stop": ["never", "<|im_start|>"]}, "stop"),
            (0, {"eos_id": 0, "stop": ["<|endoftext|>"]}, "eos"),
            (5, {"stop": ["<|im_start|>"]}, "length"),
        ):
            model.lm_head.weight.copy_(torch.eye(300).roll(follower - start, 0))
            reasons: list[str] = []
            engine = Engine(model, tokenizer)
            (new,) = engine.generate(
                [[start]],
                1,
                on_stop=lambda _, reason, heard=reasons: heard.append(reason),  # type: ignore[misc]
                **options,  # type: ignore[arg-type]
            )
            assert reasons == [expected], (follower, options)
            assert new == ([follower] if expected == "length" else [])
    for bad in ([2, 300], [-1], ["2"], "2", [2.0], [True]):
        with pytest.raises(UserError, match="eos_id must be"):
            Engine(model, tokenizer).generate([[start]], 1, eos_id=bad)  # type: ignore[arg-type]


@torch.no_grad()
def test_padding_rows_of_the_vocabulary_are_dropped(tmp_path: Path) -> None:
    theirs = llama(vocab_size=320)
    model, tokenizer = load_hf(write(theirs, tmp_path / "llama"))
    assert model.config.vocab_size == tokenizer.vocab_size == 300
    tokens = torch.randint(0, 300, (2, 64))
    torch.testing.assert_close(
        model(tokens), theirs(tokens).logits[..., :300], rtol=1e-4, atol=1e-4
    )
    with pytest.raises(UserError, match="tokenizer has 300 tokens, the model only 290"):
        load_hf(write(llama(vocab_size=290), tmp_path / "few"))


def test_shards_load_as_one_file_does(tmp_path: Path, folder: Path) -> None:
    llama().save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    (tmp_path / "shards" / "tokenizer.json").write_bytes(tokenizer_json())
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    one, many = load_hf(folder)[0], load_hf(tmp_path / "shards")[0]
    for name, tensor in one.state_dict().items():
        assert torch.equal(many.state_dict()[name], tensor)


def test_our_folder_of_it(folder: Path, tmp_path: Path) -> None:
    """Saved as a model folder of ours, it is the same model with the same tokenizer."""
    model, tokenizer = load_hf(folder)
    loaded, same = load(save_model(tmp_path / "ours", model, tokenizer))
    assert {p.name for p in (tmp_path / "ours").iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    assert (same.hash, same.eos_id) == (tokenizer.hash, 2)
    assert evaluate_text(loaded, same, TEXT * 3) == evaluate_text(model, tokenizer, TEXT * 3)


@torch.no_grad()
def test_sub_norms_are_added_to_a_pre_norm_model_only(folder: Path) -> None:
    model, _ = load_hf(folder)
    before = model(torch.arange(20).unsqueeze(0))
    wider = add_sub_norms(model)
    assert wider.config.norm_placement == "sub_norm"
    assert set(wider.state_dict()) - set(model.state_dict()) == {
        f"layers.{i}.{name}.weight"
        for i in range(3)
        for name in ("self_attn.attn_sub_norm", "mlp.ffn_sub_norm")
    }
    assert wider.layers[0].mlp.up_proj.weight is not None
    after = wider(torch.arange(20).unsqueeze(0))
    assert after.isfinite().all()
    assert not torch.equal(before, after)
    with pytest.raises(UserError, match="only a 'pre_norm' model"):
        add_sub_norms(wider)


def test_what_transformers_says_is_shown_whole(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def says(*_: Any, **__: Any) -> None:
        raise ValueError("first line\n   second line: the cause")

    monkeypatch.setattr(transformers.LlamaConfig, "from_dict", says)
    with pytest.raises(UserError, match=r"config\.json: .*: first line second line: the cause$"):
        load_hf(folder)


def test_no_progress_bars_outside_a_terminal(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load_hf(folder)
    out, err = capsys.readouterr()
    assert out + err == ""
