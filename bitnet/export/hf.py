"""A pretrained Llama-family model as a Transformer of ours, to quantize or to train on.

    model, tokenizer = load_hf("SmolLM2-135M/")           # config.json, weights, tokenizer.json
    model, tokenizer = load_hf("SmolLM2-135M-Q4_1.gguf")  # one file, its weights made fp32

Their maths is our ``pre_norm`` model with SiLU and full-precision matrices, and their tensor names
are ours behind a leading "model.", so importing is checking and renaming. What our maths does not
have (biases, stretched rotary positions, sliding windows, other head sizes) is refused by name:
such a model would load and be quietly wrong.

transformers reads the files (extra `hf`): locally, offline, without remote code, and never a
pickle nor a file outside the folder, whatever an index of shards says. Where config.json ties the
head to the embedding but the checkpoint has two different matrices, both are kept. Rows of the
embedding beyond the tokenizer's ids are padding that no text produces; they are dropped, so that
model and tokenizer agree on the vocabulary as everywhere in this project.
"""

import dataclasses
import json
import sys
from contextlib import nullcontext, redirect_stderr
from difflib import get_close_matches
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from bitnet.model import ModelConfig, Transformer
from bitnet.schema import UserError
from bitnet.tokenizer_json import JsonTokenizer, with_eos

MODEL_TYPES = ("llama", "mistral")
"""Whose maths is ours, as config.json calls them."""
_ROPE_KEYS = {"rope_type", "rope_theta", "type"}


def load_hf(source: Path | str) -> tuple[Transformer, JsonTokenizer]:
    """Import a Llama-family checkpoint; draws no random number that ends up in the model.

    Arguments:
        source: a local Hugging Face folder (safetensors), or a .gguf file.
    Returns:
        the model (fp32, ``linear="fp"``), and its tokenizer, whose end-of-document token is the
        checkpoint's own.
    Raises:
        UserError: something is missing or damaged, or the model's maths is not ours; the `hf`
            extra is not installed.
    """
    source = Path(source)
    gguf = source.suffix == ".gguf"
    _check_files(source, gguf)
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            f'{source}: importing it needs the hf extra: pip install "bitnet-train[hf]"'
        ) from error
    folder = source.parent if gguf else source
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    if gguf:
        options["gguf_file"] = source.name
    try:
        theirs = transformers.AutoConfig.from_pretrained(folder, **options)
    except Exception as error:  # whatever transformers meets in a file that is not what it seems
        raise UserError(f"{source}: cannot be read: {_first_line(error)}") from error
    config = _config(theirs, source, gguf)
    tokenizer = _tokenizer(source, theirs, options if gguf else None)
    if tokenizer.vocab_size > config["vocab_size"]:
        raise UserError(
            f"{source}: the tokenizer has {tokenizer.vocab_size} tokens, the model only "
            f"{config['vocab_size']}: they do not belong together"
        )
    tensors = _tensors(source, folder, theirs, options)
    rows = config["vocab_size"] = tokenizer.vocab_size
    for name in ("embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:rows].clone()
    if config["tie_embeddings"]:  # transformers too keeps a head of its own, if the file has one
        embedding, head = tensors["embed_tokens.weight"], tensors["lm_head.weight"]
        config["tie_embeddings"] = torch.equal(embedding, head)
    try:
        with torch.device("meta"):
            model = Transformer(ModelConfig(**config))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise UserError(f"{source}: model.{first['loc'][0]}: {first['msg']}") from error
    model.load_state_dict(tensors, assign=True)
    if model.config.tie_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    return model, tokenizer


def add_sub_norms(model: Transformer) -> Transformer:
    """The same model with BitNet's extra norms (``sub_norm``), of weight 1, before o_proj and
    down_proj: what continues it as a ternary model (BitDistill, arXiv 2510.13998). Shares the
    weights; computes something else until it is trained.

    Raises:
        UserError: the model's norms are not placed as Llama's (``pre_norm``).
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
            tensors[name] = torch.ones(
                tensor.shape, device=model.norm.weight.device, dtype=torch.float32
            )
    wider.load_state_dict(tensors, assign=True)
    if wider.config.tie_embeddings:
        wider.lm_head.weight = wider.embed_tokens.weight
    return wider.train(model.training)


def _check_files(source: Path, gguf: bool) -> None:
    if gguf and source.is_file():
        _check_gguf(source)
    elif gguf or not source.exists():
        near = get_close_matches(source.name, [p.name for p in source.parent.glob("*")], 1)
        hint = f"; did you mean {source.with_name(near[0])}?" if near else ""
        raise UserError(f"{source}: no such model{hint}")
    elif not source.is_dir():
        raise UserError(f"{source}: expected a Hugging Face folder or a .gguf file")
    else:
        for name in ("config.json", "tokenizer.json"):
            if not (source / name).is_file():
                raise UserError(f"{source}: has no {name}; it is not a folder that can be imported")
        if not any(source.glob("*.safetensors")):
            raise UserError(
                f"{source}: has no .safetensors; weights in pickle form (.bin, .pt) are not read, "
                "since reading a pickle can run code"
            )
        config = _json(source / "config.json")
        _check_type(source, str(config.get("model_type")))
        if config.get("transformers_weights"):
            raise UserError(
                f"{source}: its config.json names the files of its weights (transformers_weights), "
                "which is not supported"
            )
        for index in sorted(source.glob("*.safetensors.index.json")):
            _check_index(index)


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: damaged: not a JSON object")
    return content


def _check_index(path: Path) -> None:
    """Refuse an index of shards that leads to a pickle or out of the folder; transformers would
    follow it."""
    shards = _json(path).get("weight_map")
    if not isinstance(shards, dict):
        raise UserError(f"{path}: damaged: has no weight_map")
    for tensor, shard in shards.items():
        if not isinstance(shard, str) or Path(shard).name != shard or "\\" in shard:
            raise UserError(f"{path}: {tensor} is in {shard!r}, which is no file of the folder")
        if not shard.endswith(".safetensors"):
            raise UserError(
                f"{path}: {tensor} is in {shard}; only .safetensors is read, since reading a "
                "pickle can run code"
            )
        if not (path.parent / shard).is_file():
            raise UserError(f"{path}: {tensor} is in {shard}, which is missing")


def _check_type(source: Path, model_type: str) -> None:
    if model_type not in MODEL_TYPES:
        near = (get_close_matches(model_type, MODEL_TYPES, 1, 0.0) or MODEL_TYPES)[0]
        raise UserError(
            f"{source}: model_type {model_type!r} cannot be imported; the nearest supported is "
            f"{near!r} (of {', '.join(MODEL_TYPES)})"
        )


def _check_gguf(source: Path) -> None:
    """Refuse what transformers drops without a word when it reads a GGUF file."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise UserError(
            f'{source}: reading GGUF needs the hf extra: pip install "bitnet-train[hf]"'
        ) from error
    try:
        reader = GGUFReader(source)
        names = [str(tensor.name) for tensor in reader.tensors]
        scaling = [key for key in reader.fields if ".rope.scaling." in key]
    except Exception as error:  # the reader's own errors are of every kind
        raise UserError(f"{source}: not a GGUF file, or a damaged one: {error}") from error
    biases = [name for name in names if name.endswith(".bias")]
    if biases:
        raise UserError(f"{source}: has biases ({biases[0]}), which our model has not")
    for stretched in [*scaling, *(name for name in names if name.startswith("rope_freqs"))]:
        raise UserError(f"{source}: has {stretched}: scaled rotary positions are not supported")


def _config(theirs: Any, source: Path, gguf: bool) -> dict[str, Any]:
    """ModelConfig's fields; refuses what they cannot say."""
    _check_type(source, theirs.model_type)
    rope = dict(getattr(theirs, "rope_parameters", None) or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    heads = theirs.num_attention_heads
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // heads
    window = getattr(theirs, "sliding_window", None)
    refused = {
        f"rotary positions of type {kind!r}": kind != "default",
        "rotary positions with " + ", ".join(sorted(rope.keys() - _ROPE_KEYS)): kind == "default"
        and bool(rope.keys() - _ROPE_KEYS),
        "attention_bias": getattr(theirs, "attention_bias", False),
        "mlp_bias": getattr(theirs, "mlp_bias", False),
        f"hidden_act {theirs.hidden_act!r}": theirs.hidden_act not in ("silu", "swish"),
        f"heads of {head_dim} ({heads} of them in a hidden_size of {theirs.hidden_size})": (
            head_dim * heads != theirs.hidden_size
        ),
        f"a sliding_window of {window}": window is not None
        and window < theirs.max_position_embeddings,
        "quantized weights (quantization_config)": not gguf
        and getattr(theirs, "quantization_config", None) is not None,
    }
    for what, present in refused.items():
        if present:
            raise UserError(f"{source}: the model has {what}, which our model has not")
    return {
        "depth": min(1000, theirs.num_hidden_layers),
        "linear": "fp",
        "n_layers": theirs.num_hidden_layers,
        "d_model": theirs.hidden_size,
        "n_heads": heads,
        "n_kv_heads": theirs.num_key_value_heads or heads,
        "d_ff": theirs.intermediate_size,
        "vocab_size": theirs.vocab_size,
        "max_seq_len": theirs.max_position_embeddings,
        "norm_placement": "pre_norm",
        "activation": "silu",
        "tie_embeddings": theirs.tie_word_embeddings,
        "rope_theta": float(rope.get("rope_theta", 10_000.0)),
        "norm_eps": theirs.rms_norm_eps,
    }


def _tokenizer(source: Path, theirs: Any, gguf: dict[str, Any] | None) -> JsonTokenizer:
    """The checkpoint's tokenizer, its end-of-document token written into the file."""
    eos = theirs.eos_token_id
    if gguf is None:  # transformers has a number of its own where the file has none
        eos = eos if "eos_token_id" in _json(source / "config.json") else None
    eos = (eos[0] if eos else None) if isinstance(eos, list) else eos
    path = source
    if gguf is None:
        path = source / "tokenizer.json"
        model_bytes = path.read_bytes()
    else:
        import transformers

        try:
            found = transformers.AutoTokenizer.from_pretrained(source.parent, **gguf)
            model_bytes = found.backend_tokenizer.to_str().encode()
        except Exception as error:
            raise UserError(f"{source}: tokenizer: cannot be read: {_first_line(error)}") from error
    try:
        added = {token["id"]: token["content"] for token in json.loads(model_bytes)["added_tokens"]}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: not a tokenizer.json, or a damaged one: {error}") from error
    if eos is not None:
        if eos not in added:
            raise UserError(
                f"{source}: its eos_token_id {eos} is none of the tokenizer's added tokens: they "
                "do not belong together"
            )
        model_bytes = with_eos(model_bytes, added[eos])
    return JsonTokenizer(path, model_bytes)


def _tensors(source: Path, folder: Path, theirs: Any, options: dict[str, Any]) -> dict[str, Tensor]:
    """All weights in fp32 under our names."""
    import transformers

    silence = nullcontext() if sys.stderr.isatty() else redirect_stderr(StringIO())
    try:
        loading: Any = transformers.AutoModelForCausalLM.from_pretrained
        with silence:  # progress bars, which only a terminal can show
            model, info = loading(
                folder,
                config=theirs,
                dtype=torch.float32,
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )
    except Exception as error:
        raise UserError(f"{source}: cannot be read: {_first_line(error)}") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        for name in sorted(map(str, info.get(problem, ()))):  # transformers only warns
            raise UserError(f"{source}: damaged: {problem.partition('_')[0]} tensor {name}")
    tensors: dict[str, Tensor] = nn.Module.state_dict(model)
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise UserError(f"{source}: damaged: tensor {name} holds NaN or infinity")
    return {name.removeprefix("model."): tensor.detach() for name, tensor in tensors.items()}


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
