"""Import a pretrained Llama-family model as our Transformer, to quantize it or to train it further.

    model, tokenizer = load_hf("SmolLM2-135M/")           # config.json, weights, tokenizer.json
    model, tokenizer = load_hf("SmolLM2-135M-Q4_1.gguf")  # one file, dequantized to fp32
    model, tokenizer = load_hf("bitnet-b1.58-2B-4T/")     # BitNet, latent or packed as it is stored

Features that our model does not have (biases other than Qwen2's, scaled rotary positions, sliding
windows, other head sizes) are errors that name the feature: otherwise the model would load and
silently compute something else. Adapters (LoRA) are errors too: alone they are not a model, and
beside a model it is unknown whether they are already merged.

This module reads folders; bitnet/export/gguf.py reads GGUF files; bitnet/export/llama.py lists the
required contents. Weights come from safetensors only, never from a pickle or from a file outside
the folder, even if an index of shards names one.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from bitnet.data.chat_template import hf_chat_template
from bitnet.data.tokenizer import Tokenizer
from bitnet.export.gguf import load_gguf
from bitnet.export.hf_config import read_config, read_json, shape_of
from bitnet.export.hf_quantization import Kind, read_scales, unpack_rows, with_inverse
from bitnet.export.hf_tokenizer import load_hf_tokenizer
from bitnet.export.llama import Stored, build, check_tensors
from bitnet.model import Transformer
from bitnet.schema import UserError, check_file, nearest, user_input

_FLOATS = ("F64", "F32", "F16", "BF16")
_WEIGHTS = "model.safetensors"


def load_hf(source: Path | str, master_weights: bool = False) -> tuple[Transformer, Tokenizer]:
    """Import a Llama-family or BitNet checkpoint. Nothing in the model is random.

    Arguments:
        source: a local Hugging Face folder (safetensors), or a .gguf file.
        master_weights: take the weights of a folder without ``quantization_config`` as a ternary
            model's master weights, not as full precision.
    Returns:
        the model (fp32; ternary, latent or packed, if the checkpoint is a BitNet), and its
        tokenizer, whose end-of-document token is the checkpoint's own; if the checkpoint has
        several end tokens, ``eos_ids`` has them all.
    Raises:
        UserError: something is missing or damaged, or our model cannot compute the same; the `hf`
            extra is not installed.
    """
    source = Path(source)
    if _is_gguf(source):
        if master_weights:
            raise UserError(f"{source}: --master-weights is for Hugging Face folders")
        return load_gguf(source)
    _check_files(source)
    theirs, kind = read_config(source, master_weights)
    shape = shape_of(theirs, source, kind)
    stored = _stored(source, kind)
    check_tensors(source, shape, stored)
    tokenizer = load_hf_tokenizer(source)
    tokenizer.chat_template = hf_chat_template(source)
    return build(source, shape, stored, tokenizer), tokenizer


def add_sub_norms(model: Transformer) -> Transformer:
    """Add BitNet's extra norms (``sub_norm``), with weight 1, before o_proj and down_proj, so that
    the model can be trained further as a ternary model (BitDistill, arXiv 2510.13998). The result
    shares the weights. Its outputs differ from the original model's until it is trained.

    Raises:
        UserError: the model's norms are not placed as in Llama (``pre_norm``).
    """
    if model.config.norm_placement != "pre_norm":
        raise UserError(
            f"sub-norm: the model has model.norm_placement = {model.config.norm_placement!r}; "
            "only a 'pre_norm' model can be given sub-norms"
        )
    with torch.device("meta"):
        wider = Transformer(dataclasses.replace(model.config, norm_placement="sub_norm"))
    tensors = dict(model.state_dict())
    for name, tensor in wider.state_dict().items():
        if name not in tensors:
            device = model.norm.weight.device
            tensors[name] = torch.ones(tensor.shape, dtype=torch.float32, device=device)
    wider.load_state_dict(tensors, assign=True)
    if wider.config.tie_embeddings:
        wider.lm_head.weight = wider.embed_tokens.weight
    return wider.train(model.training)


def _is_gguf(source: Path) -> bool:
    """Whether a file is GGUF, by its name or its first bytes."""
    with user_input(str(source)):
        if not source.is_file():
            return False
        if source.suffix.lower() == ".gguf":
            return True
        with source.open("rb") as file:
            return file.read(4) == b"GGUF"


def _check_files(source: Path) -> None:
    if not source.exists():
        near = nearest(source.name, _names(source.parent))
        hint = f"; did you mean {source.with_name(near)}?" if near else ""
        raise UserError(f"{source}: no such model{hint}")
    if not source.is_dir():
        raise UserError(f"{source}: expected a Hugging Face folder or a .gguf file")
    check_no_adapter(source)
    for names in (("config.json",), ("tokenizer.json", "tokenizer.model")):
        if not any((source / name).is_file() for name in names):
            raise UserError(
                f"{source}: has no {' or '.join(names)}; it is not a folder that can be imported"
            )
    if not any(source.glob("*.safetensors")):
        raise UserError(
            f"{source}: has no .safetensors; weights in pickle form (.bin, .pt) are not read, "
            "since reading a pickle can run code"
        )


def check_no_adapter(source: Path) -> None:
    """Raise UserError for a folder that holds an adapter (LoRA), alone or beside a model."""
    for name in sorted(_names(source)):
        if name.startswith("adapter_") and name.endswith((".json", ".safetensors", ".bin", ".pt")):
            raise UserError(
                f"{source}: holds an adapter ({name}), which is not imported; merge it into its "
                "base model first (peft: merge_and_unload), or take the file out if that is done"
            )


def _names(folder: Path) -> list[str]:
    try:
        return [path.name for path in folder.iterdir()]
    except OSError:
        return []


def _stored(source: Path, kind: Kind | None) -> dict[str, Stored]:
    """Every tensor of the folder, under our names, from the headers of its files."""
    files = {source / _WEIGHTS}
    shard_of: dict[str, str] = {}
    for index in sorted(source.glob("*.safetensors.index.json")):
        shards = _shards(index)
        if index.name == f"{_WEIGHTS}.index.json" and not (source / _WEIGHTS).is_file():
            shard_of, files = shards, {source / shard for shard in shards.values()}
    stored: dict[str, Stored] = {}
    for path in sorted(files):
        if not path.is_file():
            raise UserError(f"{source}: has no {path.name}, and no index of shards")
        check_file(path)
        with user_input(f"{path}: cannot be read"), safe_open(path, "pt") as file:
            headers = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            found = {name: (part.get_dtype(), part.get_shape()) for name, part in headers.items()}
            scales = read_scales(path, file.metadata())
        for name, (dtype, dims) in found.items():
            if name.endswith(".rotary_emb.inv_freq"):
                continue  # in old checkpoints: a constant, computed from rope_theta
            ours = name.removeprefix("model.")
            coded = kind in ("offline", "packed") and ours.endswith("_proj.weight")
            if dtype not in (("U8",) if coded else _FLOATS):
                expected = "codes (U8)" if coded else f"a float weight ({', '.join(_FLOATS)})"
                raise UserError(f"{path}: tensor {name} is {dtype}; expected {expected}")
            if not dims:
                raise UserError(f"{path}: cannot be read: tensor {name} is a single number")
            if ours in stored or shard_of.get(name, path.name) != path.name:
                raise UserError(f"{path}: damaged: unexpected tensor {name}: it is elsewhere too")
            read, shape = _reader(path, name), tuple(dims)
            if coded:
                read, shape = _codes(read), (4 * shape[0], *shape[1:])
            elif kind == "packed" and name.endswith(".weight_scale"):
                read = with_inverse(read, scales.get(name.removesuffix(".weight_scale")))
            stored[ours] = Stored(name, shape, read)
    for name in sorted(shard_of):
        if name.removeprefix("model.") not in stored and not name.endswith("inv_freq"):
            raise UserError(f"{source}: damaged: missing tensor {name} in {shard_of[name]}")
    return stored


def _reader(path: Path, name: str) -> Callable[[int], Tensor]:
    def read(rows: int) -> Tensor:
        with safe_open(path, "pt") as file:
            part: Tensor = file.get_slice(name)[:rows]
            kind = part.dtype if part.dtype == torch.uint8 else torch.float32
            return part.to(kind, copy=True)

    return read


def _codes(read: Callable[[int], Tensor]) -> Callable[[int], Tensor]:
    """Turn a reader of packed bytes into a reader of codes int8 ``[N, K]``."""
    return lambda rows: unpack_rows(read(rows // 4))


def _shards(path: Path) -> dict[str, str]:
    """Tensor -> file, from an index of shards. Raises UserError for a file that is a pickle or
    outside the folder."""
    shards = read_json(path).get("weight_map")
    if not isinstance(shards, dict):
        raise UserError(f"{path}: damaged: has no weight_map")
    for tensor, shard in shards.items():
        if not isinstance(shard, str) or Path(shard).name != shard or "\\" in shard:
            raise UserError(f"{path}: {tensor} is in {shard!r}, which is not a file of the folder")
        if not shard.endswith(".safetensors"):
            raise UserError(
                f"{path}: {tensor} is in {shard}; only .safetensors is read, since reading a "
                "pickle can run code"
            )
        if not (path.parent / shard).is_file():
            raise UserError(f"{path}: {tensor} is in {shard}, which is missing")
    return shards
