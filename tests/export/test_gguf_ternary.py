"""Ternary models to GGUF and back: equal codes, scales, settings and token ids; or a refusal."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bitnet.data.chat_template import ChatTemplate
from bitnet.data.tokenizer import Tokenizer
from bitnet.export.gguf_types import KINDS, Kind
from bitnet.export.gguf_write import save_gguf
from bitnet.export.hf import load_hf
from bitnet.linear import TernaryLinear
from bitnet.schema import UserError
from tests.helpers.gguf_models import matrices, model

gguf = pytest.importorskip("gguf", reason="the gguf extra is not installed")
PROBES = ("to be", "  two  spaces", "\n\n\ttab", "naïve ☃ \U0001f600", "", " ", "</s>", "x\0y")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("placement", ["sub_norm", "pre_norm"])
def test_nothing_is_lost(tmp_path: Path, tokenizer: Tokenizer, placement: str, kind: Kind) -> None:
    ours = model(norm_placement=placement)
    zeros = torch.zeros(512, 256, dtype=torch.int8)
    ours.layers[0].mlp.up_proj = TernaryLinear.from_codes(zeros, torch.tensor(0.1))
    path = save_gguf(ours, tokenizer, tmp_path / ("model" if kind == "f32" else "m.gguf"), kind)
    back, read = load_hf(path)  # by its content, where the name does not say
    assert dataclasses.replace(back.config, depth=ours.config.depth) == ours.config
    expected = matrices(ours)
    found = matrices(back)
    assert found.keys() == expected.keys()
    for name, (codes, scale) in expected.items():
        assert torch.equal(found[name][0], codes), name
        assert torch.equal(found[name][1], scale), name
    for name, parameter in ours.named_parameters():
        rounded = parameter.half().float() if "embed" in name and kind != "f32" else parameter
        assert torch.equal(back.get_parameter(name), rounded), name
    assert back.lm_head.weight is back.embed_tokens.weight
    assert (read.vocab_size, read.eos_ids) == (tokenizer.vocab_size, tokenizer.eos_ids)
    for text in PROBES:
        assert read.encode(text) == tokenizer.encode(text)
    if kind == "f32":
        tokens = torch.randint(300, (2, 20))
        with torch.no_grad():
            assert torch.equal(back(tokens), ours(tokens))


def test_a_chat_template_comes_along(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """With the text of its own first token, which then begins a text in llama.cpp, too."""
    template = ChatTemplate("{{ bos_token }}hello", {"bos_token": "<s>", "eos_token": "</s>"})
    tokenizer.chat_template = template
    try:
        path = save_gguf(model(), tokenizer, tmp_path / "model.gguf")
    finally:
        tokenizer.chat_template = None
    assert load_hf(path)[1].chat_template == template
    keys = gguf.GGUFReader(path).fields
    assert keys["tokenizer.ggml.bos_token_id"].contents() == tokenizer.special_id("<s>")
    assert keys["tokenizer.ggml.eos_token_id"].contents() == tokenizer.eos_id


Change = Callable[[Any, dict[str, Any]], None]


def changed(path: Path, tokenizer: Tokenizer, kind: str, change: Change) -> Path:
    """A file whose tensors were changed by another program."""
    save_gguf(model(), tokenizer, path, kind)  # type: ignore[arg-type]
    reader = gguf.GGUFReader(path)
    tensors = {str(t.name): (t.data.copy(), t.tensor_type) for t in reader.tensors}
    writer = gguf.GGUFWriter(path.with_name("changed.gguf"), "bitnet")
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture":
            continue
        items = field.types[1] if len(field.types) > 1 else None
        writer.add_key_value(key, field.contents(), field.types[0], sub_type=items)
    change(writer, tensors)
    for name, (data, number) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.with_name("changed.gguf")


def another_magnitude(writer: Any, tensors: dict[str, Any]) -> None:
    tensors["blk.1.ffn_up.weight"][0][2, 7] = 0.5


def another_block_scale(writer: Any, tensors: dict[str, Any]) -> None:
    tensors["blk.1.ffn_up.weight"][0][2, 65] ^= 4


def dense(writer: Any, tensors: dict[str, Any]) -> None:
    data = np.random.default_rng(0).normal(size=(512, 256)).astype(np.float32)
    tensors["blk.1.ffn_up.weight"] = (data, gguf.GGMLQuantizationType.F32)


def set_scale(value: Any) -> Change:
    def change(writer: Any, tensors: dict[str, Any]) -> None:
        data = np.array(value, np.float32)
        tensors["blk.1.ffn_up.scale"] = (data, gguf.GGMLQuantizationType.F32)

    return change


def without(name: str) -> Change:
    return lambda writer, tensors: tensors.pop(name)


def extra(name: str) -> Change:
    def change(writer: Any, tensors: dict[str, Any]) -> None:
        tensors[name] = (np.ones(256, np.float32), gguf.GGMLQuantizationType.F32)

    return change


def key(name: str, value: Any) -> Change:
    def change(writer: Any, tensors: dict[str, Any]) -> None:
        kind = gguf.GGUFValueType.BOOL if isinstance(value, bool) else gguf.GGUFValueType.UINT32
        writer.kv_data[0][name] = gguf.gguf_writer.GGUFValue(value, kind)

    return change


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        (
            "f32",
            another_magnitude,
            r"blk\.1\.ffn_up\.weight: .* its weights are not all -s, 0 or s",
        ),
        ("tq2_0", another_block_scale, "its weights are not all -s, 0 or s"),
        ("f32", dense, "its weights are not all -s, 0 or s"),
        ("tq2_0", set_scale([0.0]), "ffn_up.weight is a scale of 0 or below"),
        ("tq2_0", set_scale([-0.5]), "ffn_up.weight is a scale of 0 or below"),
        ("tq2_0", set_scale([float("nan")]), "ffn_up.weight holds NaN"),
        ("tq2_0", set_scale([1e38]), None),
        ("tq2_0", set_scale([0.5, 0.5]), r"ffn_up\.scale is \[2\]; expected \[1\]"),
        ("tq2_0", without("blk.1.ffn_sub_norm.weight"), r"missing tensor .*mlp\.ffn_sub_norm"),
        ("tq2_0", without("blk.1.attn_q.weight"), r"missing tensor .*layers\.1\.self_attn\.q_proj"),
        ("tq2_0", without("token_embd.weight"), r"missing tensor .*embed_tokens"),
        ("tq2_0", extra("blk.2.attn_sub_norm.weight"), r"unexpected tensor blk\.2\.attn_sub_norm"),
        ("tq2_0", extra("blk.1.attn_norm.scale"), r"unexpected tensor blk\.1\.attn_norm\.scale"),
        ("tq2_0", extra("output.weight"), r"output\.weight is \[256\]"),
        ("tq2_0", key("bitnet.block_count", 2**31), r"missing tensor .*layers\.2\."),
        ("tq2_0", key("bitnet.expert_count", 2), "bitnet.expert_count = 2"),
        (
            "tq2_0",
            key("tokenizer.ggml.remove_extra_whitespaces", True),
            "remove_extra_whitespaces = true, which changes the text",
        ),
        ("tq2_0", key("tokenizer.ggml.eos_token_id", 70), "is none of its control tokens"),
        ("tq2_0", key("tokenizer.ggml.add_space_prefix", False), None),
    ],
)
def test_what_our_model_has_not(
    tmp_path: Path, tokenizer: Tokenizer, kind: str, change: Change, said: str | None
) -> None:
    path = changed(tmp_path / "model.gguf", tokenizer, kind, change)
    if said is None:
        load_hf(path)
        return
    with pytest.raises(UserError, match=said) as caught:
        load_hf(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (b"bitnet", b"bitner", "model_type 'bitner' cannot be imported; .* is 'bitnet'"),
        (b"blk.1.ffn_up.weight", b"blk.1.ffn_up.weigh\0", r"missing tensor .*mlp\.up_proj"),
        (b"blk.1.ffn_up.weight", b"blk.1.attn_q.weight", "twice|duplicate|missing"),
        (b"token_embd.weight", b"token_embd\xff\xfeeight", "not a GGUF file, or a damaged one"),
    ],
)
def test_names_in_the_header(
    tmp_path: Path, tokenizer: Tokenizer, old: bytes, new: bytes, said: str
) -> None:
    """Of i2_s, whose tensors gguf's reader does not know."""
    path = save_gguf(model(), tokenizer, tmp_path / "model.gguf", "i2_s")
    path.write_bytes(path.read_bytes().replace(old, new, 1))
    with pytest.raises(UserError, match=said) as caught:
        load_hf(path)
    assert "\n" not in str(caught.value)


def test_i2_s_that_ends_early(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = save_gguf(model(), tokenizer, tmp_path / "model.gguf", "i2_s")
    data = path.read_bytes()
    for size in (len(data) - 2_000, len(data) // 2, 30_000):
        path.write_bytes(data[:size])
        with pytest.raises(UserError, match="ends before what its header promises"):
            load_hf(path)


def test_a_pickle_is_no_gguf(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    torch.save({"a": torch.ones(3)}, path)
    with pytest.raises(UserError, match="not a GGUF file"):
        load_hf(path)
