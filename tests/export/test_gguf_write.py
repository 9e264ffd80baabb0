"""Writing GGUF: what the `gguf` package reads back is our codes times our scale, exactly."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bitnet.export.gguf_write import save_gguf, tq2_0
from bitnet.linear import TernaryLinear, pack
from bitnet.model import ModelConfig, Transformer, as_transformer
from bitnet.schema import UserError

gguf = pytest.importorskip("gguf", reason="the gguf extra is not installed")
FITS: dict[str, Any] = {
    "d_model": 256,
    "n_layers": 2,
    "n_heads": 8,
    "n_kv_heads": 2,
    "d_ff": 512,
    "vocab_size": 61,
    "max_seq_len": 64,
    "norm_placement": "pre_norm",
    "activation": "silu",
    "rope_theta": 50_000.0,
    "norm_eps": 2.0**-18,
}


def model(**fields: Any) -> Transformer:
    """Packed, with random norms and scales that fp16 holds."""
    torch.manual_seed(0)
    made = Transformer(ModelConfig(**{**FITS, **fields}))
    if made.config.linear == "ternary":
        made = as_transformer(pack(made))
    for module in made.modules():
        if isinstance(module, TernaryLinear):
            module.scale = module.scale.half().float()
    for name, parameter in made.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return made


def dequantized(tensor: Any) -> Tensor:
    return torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())


@pytest.mark.parametrize(("rows", "columns"), [(1, 256), (3, 512), (7, 1280)])
def test_a_matrix_is_codes_times_scale(rows: int, columns: int) -> None:
    codes = torch.randint(-1, 2, (rows, columns), dtype=torch.int8)
    codes[0, :256] = 0  # a block whose largest value is not the scale
    scale = torch.tensor(0.0123).half().float()
    blocks = tq2_0(codes, scale)
    assert (blocks.dtype, list(blocks.shape)) == (torch.uint8, [rows, columns // 256 * 66])
    kind = gguf.GGMLQuantizationType.TQ2_0
    read = torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), kind).copy())
    assert torch.equal(read, codes.float() * scale)
    whole = (codes.float() * scale).numpy()
    theirs = gguf.quants.quantize(whole, kind).reshape(rows, -1, 66)
    nonzero = whole.reshape(rows, -1, 256).any(-1)
    assert np.array_equal(blocks.numpy().reshape(rows, -1, 66)[nonzero], theirs[nonzero])


def test_a_file_holds_the_model(tmp_path: Path) -> None:
    ours, path = model(), tmp_path / "model.gguf"
    path.write_bytes(b"an old file")
    save_gguf(ours, path)
    reader = gguf.GGUFReader(path)
    assert [one.name for one in tmp_path.iterdir()] == ["model.gguf"]
    keys = {key: field.contents() for key, field in reader.fields.items()}
    wanted = {
        "general.architecture": "llama",
        "llama.context_length": 64,
        "llama.embedding_length": 256,
        "llama.block_count": 2,
        "llama.feed_forward_length": 512,
        "llama.attention.head_count": 8,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 2.0**-18,
        "llama.rope.freq_base": 50_000.0,
        "llama.rope.dimension_count": 32,
        "llama.vocab_size": 61,
        "tokenizer.ggml.model": "none",
    }
    assert {key: keys.get(key) for key in wanted} == wanted
    tensors = {str(tensor.name): tensor for tensor in reader.tensors}
    kinds = {name: tensor.tensor_type.name for name, tensor in tensors.items()}
    assert kinds.pop("token_embd.weight") == "F16"
    assert kinds.pop("output_norm.weight") == "F32"
    assert {kind for name, kind in kinds.items() if "norm" in name} == {"F32"}
    assert {kind for name, kind in kinds.items() if "norm" not in name} == {"TQ2_0"}
    assert len(kinds) == 2 * 9

    embedding = torch.from_numpy(tensors["token_embd.weight"].data.copy())
    assert torch.equal(embedding, ours.embed_tokens.weight.half())
    read = {name: dequantized(tensors[name]) for name in kinds}
    for i, layer in enumerate(ours.layers):
        for theirs, name, heads in (
            ("attn_q", "self_attn.q_proj", 8),
            ("attn_k", "self_attn.k_proj", 2),
            ("attn_v", "self_attn.v_proj", 0),
            ("attn_output", "self_attn.o_proj", 0),
            ("ffn_gate", "mlp.gate_proj", 0),
            ("ffn_up", "mlp.up_proj", 0),
            ("ffn_down", "mlp.down_proj", 0),
        ):
            module = layer.get_submodule(name)
            assert isinstance(module, TernaryLinear)
            weight = module.codes().float() * module.scale
            found = read[f"blk.{i}.{theirs}.weight"]
            for head in range(heads):  # channels that turn by one angle are neighbours there
                for pair in range(16):
                    for half in (0, 1):
                        row = head * 32 + 2 * pair + half
                        assert torch.equal(found[row], weight[head * 32 + pair + 16 * half])
            assert heads or torch.equal(found, weight)
        for theirs, name in (
            ("attn_norm", "input_layernorm"),
            ("ffn_norm", "post_attention_layernorm"),
        ):
            norm = layer.get_submodule(name).weight
            assert torch.equal(read[f"blk.{i}.{theirs}.weight"], norm)


def unpacked(made: Transformer) -> None:
    made.layers[1].mlp.up_proj = torch.nn.Linear(256, 512, bias=False)


def odd_scale(made: Transformer) -> None:
    made.layers[1].mlp.up_proj.scale = torch.tensor(0.1)


def large(made: Transformer) -> None:
    made.embed_tokens.weight.data[3, 5] = 70_000


REFUSED: list[tuple[dict[str, Any], Callable[[Transformer], None] | None, str]] = [
    ({"activation": "relu2"}, None, "carries model.activation = 'silu', not 'relu2'"),
    ({"norm_placement": "sub_norm"}, None, "model.norm_placement = 'pre_norm', not 'sub_norm'"),
    ({"qk_norm": True}, None, "model.qk_norm = False, not True"),
    ({"tie_embeddings": False}, None, "model.tie_embeddings = True, not False"),
    ({"granularity": "row"}, None, "model.granularity = 'tensor', not 'row'"),
    ({"linear": "fp"}, None, "model.linear = 'ternary', not 'fp'"),
    ({"d_model": 288}, None, "model.d_model = 288 is no multiple of 256"),
    ({"d_ff": 700}, None, "model.d_ff = 700 is no multiple of 256, .* the nearest is 768"),
    ({}, unpacked, r"layers\.1\.mlp\.up_proj: expected a packed ternary layer"),
    ({}, odd_scale, r"layers\.1\.mlp\.up_proj: its scale .* is no fp16 number"),
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
        save_gguf(made, path)
    assert [one.name for one in tmp_path.iterdir()] == ["model.gguf"]
    assert path.read_bytes() == b"an old file"


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    path = tmp_path / "model.gguf"
    path.write_bytes(b"an old file")
    with pytest.raises(OSError, match="no space left"):
        save_gguf(model(), path)
    assert [one.name for one in tmp_path.iterdir()] == ["model.gguf"]
    assert path.read_bytes() == b"an old file"
