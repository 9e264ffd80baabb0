"""Hugging Face folders that are refused: other maths, wrong types, stray tensors, damage."""

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

from bitnet.export.folder import save_model
from bitnet.export.hf import load_hf
from bitnet.export.source import load_source
from bitnet.schema import UserError
from tests.helpers.hf_folder import edit, llama, write


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(llama(), tmp_path / "llama")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c.update(model_type="qwen"),
            "'qwen' cannot be imported; the nearest .* is 'qwen3",
        ),
        (lambda c: c.update(model_type="qwen2"), "missing tensor .*q_proj.bias"),
        (lambda c: c.update(model_type="lama"), "the nearest supported is 'llama'"),
        (lambda c: c.update(attention_bias=True), "missing tensor .*q_proj.bias"),
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
def test_maths_that_our_model_has_not_is_refused(
    folder: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
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


def test_tensors_that_belong_nowhere_are_named(folder: Path) -> None:
    """A name twice, with and without the leading "model."; a constant of old checkpoints."""
    stored = load_file(folder / "model.safetensors")
    inv_freq = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}
    save_file(stored | inv_freq, folder / "model.safetensors", {"format": "pt"})
    load_hf(folder)
    twice = {"norm.weight": torch.ones(48)}
    save_file(stored | twice, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"unexpected tensor .*norm\.weight"):
        load_hf(folder)


def test_damaged_folders_are_named(folder: Path, tmp_path: Path) -> None:
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
        ("../x.safetensors", "is not a file of the folder"),
        ("/x.safetensors", "is not a file of the folder"),
        ("..\\x.safetensors", "is not a file of the folder"),
        ("sub/x.safetensors", "is not a file of the folder"),
        (3, "is not a file of the folder"),
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


def test_without_the_extra_the_message_says_how_to_install_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(UserError, match=r'pip install "bitnet-train\[hf\]"'):
        load_hf(folder)
