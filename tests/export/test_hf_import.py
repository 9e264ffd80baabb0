"""Importing Llama-family checkpoints: the same logits and tokens as transformers', or a refusal."""

import json
import pickle
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitnet.cli.convert import load_source
from bitnet.engine.engine import Engine
from bitnet.evaluate import evaluate_text
from bitnet.export.folder import load, save_model
from bitnet.export.hf import add_sub_norms, load_hf
from bitnet.generate import encode_prompt, generate
from bitnet.model import ModelConfig, Transformer
from bitnet.schema import UserError
from tests.helpers.hf_folder import TEXT, llama, tokenizer_json, transformers, write

pytest.importorskip("gguf")
EPS = torch.finfo(torch.float32).eps


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(llama(), tmp_path / "llama")


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


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
    generated = theirs.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=20,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert new == generated[0, len(prompt) :].tolist()


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


def test_shards(tmp_path: Path, folder: Path) -> None:
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
def test_sub_norms(folder: Path) -> None:
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


# What our maths does not have


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(model_type="qwen2"), "'qwen2' cannot be imported; the nearest .* is "),
        (lambda c: c.update(model_type="lama"), "the nearest supported is 'llama'"),
        (lambda c: c.update(attention_bias=True), "attention_bias"),
        (lambda c: c.update(mlp_bias=True), "mlp_bias"),
        (lambda c: c.update(hidden_act="gelu"), "hidden_act 'gelu'"),
        (lambda c: c.update(head_dim=16), r"heads of 16 \(4 of them in a hidden_size of 48\)"),
        (
            lambda c: c.update(rope_parameters={"rope_type": "linear", "factor": 2.0}),
            "rotary positions of type 'linear'",
        ),
        (
            lambda c: c["rope_parameters"].update(partial_rotary_factor=0.5),
            "partial_rotary_factor",
        ),
        (
            lambda c: c.update(quantization_config={"quant_method": "bitsandbytes"}),
            "quantization_config",
        ),
        (lambda c: c.update(num_hidden_layers=4), "damaged: missing tensor .*layers.3"),
        (lambda c: c.update(num_hidden_layers=2), "damaged: unexpected tensor .*layers.2"),
        (lambda c: c.update(intermediate_size=80), "cannot be read"),
        (lambda c: c.update(max_position_embeddings=2**30), "max_seq_len: .* less than or equal"),
        (lambda c: c.update(hidden_size="x"), "cannot be read"),
        (lambda c: c.update(auto_map={"AutoConfig": "evil.Config"}, model_type="evil"), "'evil'"),
    ],
)
def test_refusals(folder: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    (folder / "evil.py").write_text("raise SystemExit('remote code ran')")
    edit(folder, change)
    with pytest.raises(UserError, match=message) as caught:
        load_hf(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


WRONG = ("x", [1], {"a": 1}, -1, 0, 1.5, float("nan"), float("inf"), 10**400, True)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("rope_theta", ("x", [1], -1, 0, float("nan"), float("inf"), 10**400, True)),
        ("rms_norm_eps", ("x", None, [1], -1, 0, float("nan"), float("inf"), True)),
        ("sliding_window", WRONG),
        ("num_hidden_layers", (*WRONG, None)),
        ("hidden_size", (*WRONG, None)),
        ("intermediate_size", (*WRONG, None)),
        ("num_attention_heads", (*WRONG, None)),
        ("num_key_value_heads", WRONG),
        ("head_dim", WRONG),
        ("vocab_size", (*WRONG, None)),
        ("max_position_embeddings", (*WRONG, None)),
        ("eos_token_id", ("x", {"a": 1}, -1, 1.5, float("nan"), True, [None], [[1]], ["x"])),
        ("rope_parameters", ("x", 1, [1], True)),
        ("rope_scaling", ("x", 1, [1], True)),
        ("hidden_act", (1, None, ["silu"])),
        ("attention_bias", ("x", 1, [])),
        ("mlp_bias", ("x", 1, [])),
        ("tie_word_embeddings", ("x", 1, [])),
    ],
)
def test_wrong_types_name_the_key(folder: Path, key: str, values: tuple[Any, ...]) -> None:
    original = (folder / "config.json").read_text()
    for value in values:
        edit(folder, lambda c, value=value: c.update({key: value}))  # type: ignore[misc]
        with pytest.raises(UserError, match=rf"config\.json: {key}: cannot be read: is ") as caught:
            load_hf(folder)
        assert len(str(caught.value)) < 300 + len(str(folder))
        (folder / "config.json").write_text(original)
    if key == "rope_theta":
        for value in (*values, None):
            edit(folder, lambda c, value=value: c["rope_parameters"].update(rope_theta=value))  # type: ignore[misc]
            with pytest.raises(
                UserError, match=r"config\.json: rope_parameters\.rope_theta: cannot"
            ):
                load_hf(folder)


def test_what_transformers_says_is_shown_whole(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def says(*_: Any, **__: Any) -> None:
        raise ValueError("first line\n   second line: the cause")

    monkeypatch.setattr(transformers.LlamaConfig, "from_dict", says)
    with pytest.raises(UserError, match=r"config\.json: .*: first line second line: the cause$"):
        load_hf(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", 2**31),
        ("vocab_size", 2**24 + 1),
        ("vocab_size", 10**11),
        ("intermediate_size", 10**9),
        ("max_position_embeddings", 10**9),
    ],
)
def test_sizes_are_compared_before_anything_is_built(folder: Path, key: str, value: int) -> None:
    edit(folder, lambda c: c.update({key: value}))
    begun = time.process_time()
    with pytest.raises(UserError, match=r"missing tensor|the config wants|max_seq_len"):
        load_source(folder)
    assert time.process_time() - begun < 1


def test_sizes_that_agree_with_themselves(folder: Path) -> None:
    edit(folder, lambda c: c.update(hidden_size=2**24, num_attention_heads=2**23, head_dim=2))
    begun = time.process_time()
    with pytest.raises(UserError, match="the config wants"):
        load_source(folder)
    assert time.process_time() - begun < 1


@pytest.mark.parametrize(
    "dtype",
    [torch.complex64, torch.int8, torch.uint8, torch.int64, torch.bool, torch.float8_e4m3fn],
    ids=str,
)
def test_only_floats_are_weights(folder: Path, dtype: torch.dtype) -> None:
    stored = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    stored[name] = stored[name].to(dtype)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=rf"tensor {name} is .*; expected a float weight"):
        load_hf(folder)


ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "someone/model"}


@pytest.mark.parametrize("peft", [False, True])
@pytest.mark.parametrize(
    "files",
    [
        ("adapter_config.json", "adapter_model.safetensors", "whole"),
        ("adapter_config.json", "adapter_model.safetensors"),
        ("adapter_config.json", "whole"),
        ("adapter_model.safetensors", "whole"),
        ("adapter_model.safetensors",),
        ("adapter_model.bin",),
        ("adapter_config.json",),
    ],
)
def test_adapters_are_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: tuple[str, ...], peft: Any
) -> None:
    """Alone, and beside a model: whether it is merged into that one cannot be seen."""
    monkeypatch.setitem(sys.modules, "peft", types.ModuleType("peft") if peft else None)
    place = folder if "whole" in files else tmp_path / "alone"
    place.mkdir(exist_ok=True)
    for name in files:
        if name.endswith(".json"):
            (place / name).write_text(json.dumps(ADAPTER))
        elif name != "whole":
            save_file({"lora_A.weight": torch.ones(2, 2)}, place / name)
    with pytest.raises(UserError, match=r"holds an adapter \(adapter_.*merge") as caught:
        load_source(place)
    assert "\n" not in str(caught.value)
    model, tokenizer = load_hf(write(llama(), tmp_path / "plain"))
    ours = save_model(tmp_path / "ours", model, tokenizer)
    (ours / files[0]).write_text(json.dumps(ADAPTER))
    with pytest.raises(UserError, match="holds an adapter"):
        load_source(ours)


def test_stray_tensors(folder: Path) -> None:
    """A name twice, with and without the leading "model."; a constant of old checkpoints."""
    stored = load_file(folder / "model.safetensors")
    inv_freq = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}
    save_file(stored | inv_freq, folder / "model.safetensors", {"format": "pt"})
    load_hf(folder)
    twice = {"norm.weight": torch.ones(48)}
    save_file(stored | twice, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"unexpected tensor .*norm\.weight"):
        load_hf(folder)


def test_damage(folder: Path, tmp_path: Path) -> None:
    def fails(message: str, path: Path = folder) -> None:
        with pytest.raises(UserError, match=message) as caught:
            load_hf(path)
        assert "\n" not in str(caught.value)

    fails(r"lama: no such model; did you mean .*llama\?", tmp_path / "lama")
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        whole = (folder / name).read_bytes()
        for length in (0, 1, len(whole) // 2, len(whole) - 2):
            (folder / name).write_bytes(whole[:length])
            fails("damaged|cannot be read|cannot be imported")
        (folder / name).unlink()
        fails("has no .*" + name.rpartition(".")[2])
        (folder / name).write_bytes(whole)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    fails("pickle form")
    (folder / "model.safetensors").write_bytes(pickle.dumps({}))
    fails("cannot be read")
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    fails("not a GGUF file", tmp_path / "model.gguf")
    (tmp_path / "model.gguf").write_bytes(b"junk")
    fails("not a GGUF file", tmp_path / "model.gguf")
    fails("no such model", tmp_path / "none.gguf")
    fails("expected a Hugging Face folder", folder / "config.json")
    (tmp_path / "folder.gguf").mkdir()
    fails("has no config.json", tmp_path / "folder.gguf")
    (tmp_path / "UPPER.GGUF").write_bytes(b"junk")
    fails("not a GGUF file", tmp_path / "UPPER.GGUF")
    for path in (tmp_path / "UPPER.GGUF", folder / "config.json"):
        with pytest.raises(UserError, match=r"not a GGUF file|or a \.gguf file"):
            load_source(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(folder: Path, value: float) -> None:
    stored = load_file(folder / "model.safetensors")
    stored["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"tensor model\.layers\.1\.mlp\.up_proj\.weight holds NaN"):
        load_hf(folder)


class Evil:
    """Runs code when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        ("pytorch_model.bin", r"is in pytorch_model\.bin; only \.safetensors is read"),
        ("../x.safetensors", "is no file of the folder"),
        ("/x.safetensors", "is no file of the folder"),
        ("..\\x.safetensors", "is no file of the folder"),
        ("sub/x.safetensors", "is no file of the folder"),
        (3, "is no file of the folder"),
        ("none.safetensors", "which is missing"),
        ("", "only .safetensors"),
    ],
)
def test_an_index_leads_nowhere_else(folder: Path, shard: Any, message: str) -> None:
    stored = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "rest.safetensors")
    for place in (folder.parent, folder / "sub"):
        place.mkdir(exist_ok=True)
        save_file(stored, place / "x.safetensors", {"format": "pt"})
    ran = folder.parent / "ran"
    torch.save({"model.norm.weight": Evil(ran)}, folder / "pytorch_model.bin")
    shards = dict.fromkeys(stored, "rest.safetensors") | {"model.norm.weight": shard}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    with pytest.raises(UserError, match=message) as caught:
        load_hf(folder)
    assert "model.norm.weight" in str(caught.value)
    assert not ran.exists()
    for content in ("[]", "{}", '{"weight_map": []}', "{"):
        index.write_text(content)
        with pytest.raises(UserError, match=r"index\.json: damaged"):
            load_hf(folder)


def test_a_config_that_names_other_weights(folder: Path) -> None:
    edit(folder, lambda c: c.update(transformers_weights="sub/model.safetensors.index.json"))
    with pytest.raises(UserError, match="transformers_weights"):
        load_hf(folder)


def test_no_progress_bars_outside_a_terminal(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load_hf(folder)
    out, err = capsys.readouterr()
    assert out + err == ""


def test_without_the_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(UserError, match=r'pip install "bitnet-train\[hf\]"'):
        load_hf(folder)
