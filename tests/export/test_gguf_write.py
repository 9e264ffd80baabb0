"""Writing GGUF: what the `gguf` package reads back is our codes times our scale, exactly."""

import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bitnet.data.tokenizer import Tokenizer
from bitnet.export.gguf_types import KINDS, TYPES, Kind
from bitnet.export.gguf_write import save_gguf, unfit
from bitnet.linear import BitLinear, TernaryLinear
from bitnet.model import Transformer
from bitnet.schema import UserError
from tests.helpers.gguf_models import matrices, model

gguf = pytest.importorskip("gguf", reason="the gguf extra is not installed")
NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
SUB_NORMS = {"attn_sub_norm": "self_attn.attn_sub_norm", "ffn_sub_norm": "mlp.ffn_sub_norm"}


def dequantized(tensor: Any) -> Tensor:
    return torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    reader = gguf.GGUFReader(path)
    keys = {key: field.contents() for key, field in reader.fields.items()}
    return keys, {str(tensor.name): tensor for tensor in reader.tensors}


@pytest.mark.parametrize("kind", ["tq2_0", "tq1_0", "f16", "f32"])
@pytest.mark.parametrize("placement", ["sub_norm", "pre_norm"])
def test_a_file_holds_the_model(tmp_path: Path, placement: str, kind: Kind) -> None:
    ours, path = model(norm_placement=placement), tmp_path / "model.gguf"
    path.write_bytes(b"an old file")
    assert save_gguf(ours, None, path, kind) == path
    assert [one.name for one in tmp_path.iterdir()] == ["model.gguf"]
    keys, tensors = read(path)
    arch = {"sub_norm": "bitnet", "pre_norm": "llama"}[placement]
    wanted = {
        "general.architecture": arch,
        f"{arch}.context_length": 64,
        f"{arch}.embedding_length": 256,
        f"{arch}.block_count": 2,
        f"{arch}.feed_forward_length": 512,
        f"{arch}.attention.head_count": 8,
        f"{arch}.attention.head_count_kv": 2,
        f"{arch}.attention.layer_norm_rms_epsilon": float(np.float32(1e-6)),
        f"{arch}.rope.freq_base": 50_000.0,
        f"{arch}.rope.dimension_count": 32,
        f"{arch}.vocab_size": 300,
        "tokenizer.ggml.model": "none",
        "general.file_type": gguf.LlamaFileType[
            {"f32": "ALL_F32", "f16": "MOSTLY_F16"}.get(kind, f"MOSTLY_{kind.upper()}")
        ],
    }
    assert {key: keys.get(key) for key in wanted} == wanted
    norms = NORMS | (SUB_NORMS if placement == "sub_norm" else {})
    scales = {name for name in tensors if name.endswith(".scale")}
    assert len(tensors) == 2 + 2 * (len(NAMES) + len(norms)) + len(scales)

    embedding = dequantized(tensors["token_embd.weight"])
    exact = ours.embed_tokens.weight
    assert torch.equal(embedding, exact if kind == "f32" else exact.half().float())
    assert torch.equal(dequantized(tensors["output_norm.weight"]), ours.norm.weight)
    for i, layer in enumerate(ours.layers):
        for theirs, name in norms.items():
            found = tensors[f"blk.{i}.{theirs}.weight"]
            assert found.tensor_type.name == "F32"
            assert torch.equal(dequantized(found), layer.get_submodule(name).weight)
        for theirs, name in NAMES.items():
            module = layer.get_submodule(name)
            assert isinstance(module, TernaryLinear)
            tensor = tensors[f"blk.{i}.{theirs}.weight"]
            assert tensor.tensor_type.name == kind.upper()
            found = dequantized(tensor)
            if (scale := tensors.get(f"blk.{i}.{theirs}.scale")) is not None:
                assert (scale.tensor_type.name, scale.shape.tolist()) == ("F32", [1])
                found = found * dequantized(scale)
            codes = module.codes()
            if placement == "pre_norm" and theirs in ("attn_q", "attn_k"):
                codes = as_llama_turns(codes)
            assert torch.equal(found, codes.float() * module.scale)
    assert f"blk.0.attn_v.{'scale'}" not in scales  # fp16 holds it
    assert len(scales) == (0 if kind == "f32" else 2 * 7 - 1)


def as_llama_turns(codes: Tensor, head_dim: int = 32) -> Tensor:
    """Rows in llama.cpp's order: channels that turn by one angle are neighbours there."""
    half = head_dim // 2
    order = [
        head + pair + half * upper
        for head in range(0, len(codes), head_dim)
        for pair in range(half)
        for upper in (0, 1)
    ]
    return codes[order]


@pytest.mark.parametrize("kind", KINDS)
def test_trained_and_packed_models_give_the_same_file(tmp_path: Path, kind: Kind) -> None:
    trained, packed = model(packed=False), model()
    packed.layers[0].self_attn.v_proj.scale = trained.layers[0].self_attn.v_proj.quantize()[1]
    files = [
        save_gguf(one, None, tmp_path / f"{i}", kind) for i, one in enumerate((trained, packed))
    ]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("kind", ["tq2_0", "tq1_0", "i2_s"])
def test_bits_per_weight(tmp_path: Path, kind: Kind) -> None:
    ours = model()
    weights = sum(codes.numel() for codes, _ in matrices(ours).values())
    rest = sum(p.nbytes for n, p in ours.named_parameters() if "norm" in n)
    rest += ours.embed_tokens.weight.nbytes // 2
    size = save_gguf(ours, None, tmp_path / "model.gguf", kind).stat().st_size
    bits = {"tq2_0": 66 / 32, "tq1_0": 54 / 32, "i2_s": 2}[kind]
    # a file's header, and up to 31 bytes before the next tensor
    assert 0 < size - rest - weights * bits / 8 < 8192


def unpacked(made: Transformer) -> None:
    made.layers[1].mlp.up_proj = torch.nn.Linear(256, 512, bias=False)


def biased(made: Transformer) -> None:
    made.layers[1].mlp.up_proj = BitLinear(256, 512)


def without_scale(made: Transformer) -> None:
    made.layers[1].mlp.up_proj.scale = torch.tensor(float("nan"))


def large(made: Transformer) -> None:
    made.embed_tokens.weight.data[3, 5] = 70_000


REFUSED: list[tuple[dict[str, Any], Callable[[Transformer], None] | None, str]] = [
    ({"activation": "relu2"}, None, r"cannot carry model.activation = 'relu2' \(it carries 'silu"),
    ({"norm_placement": "in_linear"}, None, "model.norm_placement = 'in_linear'"),
    ({"qk_norm": True}, None, r"model.qk_norm = True \(it carries False\)"),
    ({"tie_embeddings": False}, None, r"model.tie_embeddings = False \(it carries True\)"),
    ({"granularity": "row"}, None, r"model.granularity = 'row' \(it carries 'tensor'\)"),
    ({"granularity": "group"}, None, "model.granularity = 'group'"),
    ({"linear": "fp"}, None, "model.linear = 'fp'"),
    ({"d_model": 288}, None, r"model.d_model = 288 \(rows are blocks of 256; take 256\)"),
    ({"d_ff": 700}, None, r"model.d_ff = 700 .*take 768\); configs/gguf.toml has"),
    ({}, unpacked, r"layers\.1\.mlp\.up_proj: expected a ternary layer"),
    ({}, biased, r"layers\.1\.mlp\.up_proj: has a bias"),
    ({}, without_scale, r"layers\.1\.mlp\.up_proj: has the scale nan"),
    ({}, large, "embed_tokens: holds values that fp16 cannot"),
]


@pytest.mark.parametrize(("fields", "change", "said"), REFUSED, ids=[said for *_, said in REFUSED])
def test_what_a_file_cannot_carry_is_named(
    fields: dict[str, Any],
    change: Callable[[Transformer], None] | None,
    said: str,
    tmp_path: Path,
) -> None:
    made = model(**fields)
    if change:
        change(made)
    path = tmp_path / "model.gguf"
    path.write_bytes(b"an old file")
    with pytest.raises(UserError, match=rf"model\.gguf: .*{said}"):
        save_gguf(made, None, path)
    assert [one.name for one in tmp_path.iterdir()] == ["model.gguf"]
    assert path.read_bytes() == b"an old file"


def test_every_misfit_is_named_at_once() -> None:
    said = unfit(model(activation="relu2", tie_embeddings=False, d_ff=700).config)
    assert all(key in said for key in ("model.activation", "model.tie_embeddings", "model.d_ff"))
    assert unfit(model().config) == ""
    for kind in ("f16", "f32"):  # without blocks
        assert unfit(model(d_ff=700).config, kind) == ""
    assert "blocks of 128; take 640" in unfit(model(d_ff=700).config, "i2_s")


def test_arguments_that_do_not_fit(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="unknown kind 'tq2'; the nearest is 'tq2_0'"):
        save_gguf(model(), None, tmp_path / "model.gguf", "tq2")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="tokenizer has 300 tokens, the model 301"):
        save_gguf(model(vocab_size=301), tokenizer, tmp_path / "model.gguf")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="folder: is a folder"):
        save_gguf(model(), tokenizer, tmp_path / "folder")
    assert [one.name for one in tmp_path.iterdir()] == ["folder"]


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    """A limit of the file's size ends a write in the middle, as a full disk does."""
    path, made = tmp_path / "model.gguf", model()
    path.write_bytes(b"an old file")
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_gguf(made, None, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert [one.name for one in tmp_path.iterdir()] == ["model.gguf"]
    assert path.read_bytes() == b"an old file"


def test_sizes_in_the_header_are_those_of_the_data() -> None:
    for kind, (number, _, columns, *_) in {k: vars(t).values() for k, t in TYPES.items()}.items():
        if kind == "i2_s":
            continue
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(number)]
        assert (block, size) == (columns, TYPES[kind].block_bytes)
