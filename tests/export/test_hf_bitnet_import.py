"""Hugging Face's BitNet comes in: as transformers computes it, and nothing else."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitnet.export.facts import Facts
from bitnet.export.hf import load_hf
from bitnet.export.hf_write import KINDS, save_hf
from bitnet.export.source import import_model, load_source
from bitnet.linear import BitLinear, TernaryLinear
from bitnet.schema import UserError
from tests.helpers.hf_export import (
    bitnet,
    far_from_ties,
    load_theirs,
    quantized,
    spreads,
    tokenizer,
    trained,
    transformers,
)
from tests.helpers.hf_folder import edit, llama, write

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers, about itself
Q_PROJ = "model.layers.1.self_attn.q_proj"


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("words")


@pytest.fixture
def export(tmp_path: Path, words: Path) -> Callable[[str], Path]:
    """Makes the folder of a kind."""

    def make(kind: str) -> Path:
        save_hf(trained(), tokenizer(words), tmp_path / kind, kind, Facts("model"))
        return tmp_path / kind

    return make


def agree(folder: Path, kind: type) -> None:
    """Our import and transformers have the same logits, and the layers are of the kind."""
    model, _ = load_hf(folder)
    assert isinstance(model.layers[0].mlp.up_proj, kind)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.randint(model.config.vocab_size, (60, 2))
    with torch.no_grad():
        difference = spreads(model(tokens), theirs(tokens).logits)
    far = far_from_ties(model, tokens)
    assert far.sum() > 20
    assert difference[far].max() < 1e-3


@pytest.mark.parametrize("tied", [True, False])
def test_bf16_master_weights_of_transformers(tmp_path: Path, tied: bool) -> None:
    """As microsoft/bitnet-b1.58-2B-4T-bf16 has them."""
    folder = write(bitnet(tie_word_embeddings=tied), tmp_path / "bitnet")
    with pytest.raises(UserError, match=r"no quantization_config, without .* --master-weights"):
        load_hf(folder)
    model, _ = load_hf(folder, master_weights=True)
    assert model.config.norm_placement == "sub_norm"
    assert model.config.activation == "relu2"
    assert model.config.tie_embeddings == tied
    stored = load_file(folder / "model.safetensors")
    weight = model.layers[1].self_attn.q_proj.weight
    assert weight.dtype == torch.float32
    assert weight.requires_grad
    assert torch.equal(weight, stored[f"{Q_PROJ}.weight"].float())
    quantized(folder, linear_class="autobitlinear", quantization_mode="online")
    again, _ = import_model(folder)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    agree(folder, BitLinear)
    with pytest.raises(UserError, match="has ternary weights; expected a full-precision model"):
        load_source(folder)


def test_a_packed_llama_without_a_linear_class(tmp_path: Path) -> None:
    """As Falcon-E has it: Llama's architecture, transformers' default is the inverse scale."""
    theirs = llama(num_key_value_heads=4).bfloat16()
    stored = dict(theirs.state_dict())
    for name in [name for name in stored if name.endswith("_proj.weight")]:
        weight = stored[name].float()
        inverse = 1 / weight.abs().mean()
        codes = (weight * inverse).round().clamp(-1, 1)
        stored[name] = transformers.integrations.bitnet.pack_weights(codes)
        stored[f"{name}_scale"] = inverse.reshape(1).bfloat16()
    folder = quantized(write(theirs, tmp_path / "falcon"))
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    agree(folder, TernaryLinear)
    scale = load_hf(folder)[0].layers[0].mlp.up_proj.scale
    inverse = stored["model.layers.0.mlp.up_proj.weight_scale"].float()
    assert torch.equal(scale, inverse.reciprocal().reshape(()))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quant_method": "bitsandbytes"}, "quant_method 'bitsandbytes' cannot be imported"),
        ({"quant_method": ["x"] * 99}, r"quant_method \['x', .{50,60}\.\.\. cannot be"),
        ({"linear_class": "linear"}, "linear_class 'linear', .* expected 'bitlinear' or"),
        ({"linear_class": {}}, "linear_class {}"),
        ({"quantization_mode": "onlin"}, "quantization_mode 'onlin'"),
        ({"quantization_mode": None}, "quantization_mode None"),
        ({"use_rms_norm": True}, "use_rms_norm: norms inside the layers"),
        ({"modules_to_not_convert": []}, r"modules_to_not_convert \[\]"),
        ({"modules_to_not_convert": ["lm_head", "q_proj"]}, "has exactly its head"),
        ({"modules_to_not_convert": [["lm_head"]]}, "modules_to_not_convert"),
        ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert"),
    ],
)
def test_a_quantization_that_is_not_ours(
    export: Callable[[str], Path], fields: dict[str, Any], message: str
) -> None:
    folder = export("offline")
    edit(folder, lambda config: config["quantization_config"].update(fields))
    with pytest.raises(UserError, match=message) as caught:
        load_hf(folder)
    assert "\n" not in str(caught.value)
    for value in ("bitnet", 1, [1], True):
        edit(folder, lambda config, value=value: config.update(quantization_config=value))  # type: ignore[misc]
        with pytest.raises(UserError, match="quantization_config: cannot be read: is "):
            load_hf(folder)


def _bad_code(stored: dict[str, Tensor]) -> None:
    stored[f"{Q_PROJ}.weight"][3, 5] = 0b00110000


DAMAGE: list[tuple[str, Callable[[dict[str, Tensor]], Any], str]] = [
    ("packed", _bad_code, "q_proj.weight: cannot be read: holds a code that is none of"),
    ("packed", lambda t: t.pop(f"{Q_PROJ}.weight_scale"), "missing tensor .*q_proj.weight_scale"),
    ("packed", lambda t: t.update({f"{Q_PROJ}.weight": torch.zeros(12, 47).byte()}), "48, 47"),
    ("packed", lambda t: t.update({f"{Q_PROJ}.weight": torch.zeros(48, 48)}), "expected codes"),
    ("packed", lambda t: t.update({f"{Q_PROJ}.weight": torch.zeros(12, 48).char()}), "is I8; exp"),
    ("packed", lambda t: t.update({f"{Q_PROJ}.bias": torch.zeros(48)}), "unexpected tensor"),
    ("online", lambda t: t.update({f"{Q_PROJ}.weight_scale": torch.ones(1)}), "unexpected tensor"),
    ("online", lambda t: t.update({f"{Q_PROJ}.weight": torch.zeros(12, 48).byte()}), "a float we"),
    ("online", lambda t: t.pop("model.layers.0.mlp.ffn_sub_norm.weight"), "missing tensor .*ffn_s"),
    *(
        (kind, lambda t, value=value: t.update({f"{Q_PROJ}.weight_scale": value}), message)
        for kind in ("offline", "packed")
        for value, message in (
            (torch.tensor([0.0]), "NaN or infinity|scale of 0 or below"),
            (torch.tensor([-1.0]), "scale of 0 or below"),
            (torch.tensor([torch.nan]), "holds NaN"),
            (torch.tensor([torch.inf]), "NaN or infinity|scale of 0 or below"),
            (torch.tensor(1.0), "is a single number"),
            (torch.ones(2), r"is \[2\]; the config wants \[1\]"),
            (torch.ones(1, dtype=torch.int32), "is I32; expected a float weight"),
        )
    ),
]


@pytest.mark.parametrize(("kind", "change", "message"), DAMAGE)
def test_damaged_tensors_are_named(
    export: Callable[[str], Path], kind: str, change: Callable[[Any], Any], message: str
) -> None:
    path = export(kind) / "model.safetensors"
    stored = load_file(path)
    change(stored)
    save_file(stored, path, {"format": "pt"})
    with pytest.raises(UserError, match=message) as caught:
        load_hf(path.parent)
    assert "\n" not in str(caught.value)
    assert "model." in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_cut_files_are_named(export: Callable[[str], Path], kind: str) -> None:
    folder = export(kind)
    for name in ("config.json", "model.safetensors", "tokenizer.model"):
        whole = (folder / name).read_bytes()
        for length in (0, 1, len(whole) // 2, len(whole) - 2):
            (folder / name).write_bytes(whole[:length])
            with pytest.raises(UserError, match=r"damaged|cannot be|only byte-level BPE"):
                load_hf(folder)
        (folder / name).write_bytes(whole)
    load_hf(folder)


@pytest.mark.parametrize(
    "text",
    ["[", "[]", "3", '{"a": "x"}', '{"a": [1]}', '{"a":' * 9000 + "1" + "}" * 9000, "null"],
    ids=lambda text: text[:10],
)
def test_metadata_that_is_no_scales(export: Callable[[str], Path], text: str) -> None:
    path = export("packed") / "model.safetensors"
    save_file(load_file(path), path, {"format": "pt", "bitnet_scales": text})
    with pytest.raises(UserError, match=r"metadata bitnet_scales: (cannot be read|is nested)"):
        load_hf(path.parent)


@pytest.mark.parametrize("value", [0.0, -1.0, 1e300, float("nan"), 0.123])
def test_scales_in_the_metadata_that_are_not_the_files(
    export: Callable[[str], Path], value: float
) -> None:
    path = export("packed") / "model.safetensors"
    stored = load_file(path)
    with safe_open(path, "pt") as file:
        names = json.loads(file.metadata()["bitnet_scales"])
    scales = json.dumps(dict.fromkeys(names, value))
    save_file(stored, path, {"format": "pt", "bitnet_scales": scales})
    model, _ = load_hf(path.parent)
    expected = stored[f"{Q_PROJ}.weight_scale"].reciprocal().reshape(())
    assert torch.equal(model.layers[1].self_attn.q_proj.scale, expected)


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_hidden_layers", 10**9), ("intermediate_size", 10**9), ("vocab_size", 10**11)],
)
def test_declared_sizes_are_compared_first(
    export: Callable[[str], Path], key: str, value: int
) -> None:
    folder = export("packed")
    edit(folder, lambda config: config.update({key: value}))
    begun = time.process_time()
    with pytest.raises(UserError, match=r"missing tensor|the config wants"):
        load_hf(folder)
    assert time.process_time() - begun < 1


def test_shards_of_codes(export: Callable[[str], Path]) -> None:
    """Split by hand; the metadata is that of each file."""
    folder = export("packed")
    path = folder / "model.safetensors"
    stored, one = load_file(path), load_hf(folder)[0]
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    shards = {name: f"part-{i % 3}.safetensors" for i, name in enumerate(sorted(stored))}
    for shard in set(shards.values()):
        part = {name: tensor for name, tensor in stored.items() if shards[name] == shard}
        save_file(part, folder / shard, metadata)
    path.unlink()
    (folder / f"{path.name}.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": shards})
    )
    many, _ = load_hf(folder)
    for name, tensor in one.state_dict().items():
        assert torch.equal(many.state_dict()[name], tensor)
    assert load_theirs(folder) is not None
