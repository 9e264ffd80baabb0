"""The formats that a model can be exported to, one row each.

    hf = FORMATS["hf"]
    hf.save(model, tokenizer, path, "offline", facts)     # complete or not at all
    model, tokenizer = hf.load(path)                      # as our model, with the same codes
    hf.verify(model, tokenizer, path).holds               # in the program that reads the format

To add a format, write a module with these three functions in bitnet/export/ and add its row. Its
``save`` raises for settings that the format cannot hold, names them, and says which ones it can.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from bitnet.data.tokenizer import Tokenizer
from bitnet.evaluate import evaluation_mode
from bitnet.export.facts import Facts
from bitnet.export.folder import load
from bitnet.export.folder import save_model as save_folder
from bitnet.export.gguf import load_gguf
from bitnet.export.gguf_types import KINDS as GGUF_KINDS
from bitnet.export.gguf_types import Kind
from bitnet.export.gguf_verify import verify_gguf
from bitnet.export.gguf_write import save_gguf
from bitnet.export.hf import load_hf
from bitnet.export.hf_verify import verify_hf
from bitnet.export.hf_write import KINDS as HF_KINDS
from bitnet.export.hf_write import save_hf
from bitnet.export.one_file import save_one_file
from bitnet.export.verification import Verification, compare_codes
from bitnet.generate import encode_prompt
from bitnet.linear import BitLinear, TernaryLinear, pack
from bitnet.model import Transformer, as_transformer
from bitnet.qat.integer import IntLayer
from bitnet.qat.layers import QATLayer
from bitnet.schema import UserError

Save = Callable[[Transformer, Tokenizer, Path, str, Facts], None]


@dataclass(frozen=True)
class Format:
    """A row of :data:`FORMATS`."""

    about: str
    """The format and its readers, in one line."""
    kinds: Mapping[str, str]
    """Variant -> its purpose. The first is the default."""
    save: Save
    """Write a model, latent or packed, to a path that does not exist, as one of the kinds. Raises
    UserError for anything that the format cannot hold."""
    load: Callable[[Path], tuple[Transformer, Tokenizer]]
    """Read it back. Raises UserError for a file that is damaged or of another kind."""
    verify: Callable[[Transformer, Tokenizer, Path], Verification]
    """Compare the model with the file, read back by ``load`` and by the format's own program if
    that is installed."""


def _save_gguf(
    model: Transformer, tokenizer: Tokenizer, path: Path, kind: str, facts: Facts
) -> None:
    save_gguf(model, tokenizer, path, cast(Kind, kind), facts.name)


def _save_packed(save: Callable[[Path, Transformer, Tokenizer], Path]) -> Save:
    """Turn ``save``, which writes a model unchanged, into one that packs the model first."""

    def packing(
        model: Transformer, tokenizer: Tokenizer, path: Path, kind: str, facts: Facts
    ) -> None:
        for name, module in model.named_modules():
            if isinstance(module, QATLayer | IntLayer):
                raise UserError(
                    f"{path}: {name} is quantized by a recipe; bitnet pack writes such a model"
                )
        if any(isinstance(module, BitLinear) for module in model.modules()):
            model = as_transformer(pack(copy.deepcopy(model)))
        elif not any(isinstance(module, TernaryLinear) for module in model.modules()):
            raise UserError(f"{path}: the model is full precision, without matrices to pack")
        save(path, model, tokenizer)

    return packing


def _verify_ours(model: Transformer, tokenizer: Tokenizer, path: Path) -> Verification:
    """Compare everything that was read back, and the logits, to the last bit."""
    result = Verification()
    loaded, read = load(path)
    compare_codes(model, loaded, result)
    result.record(read.model_bytes == tokenizer.model_bytes, "the tokenizer's file")
    prompt = encode_prompt(tokenizer, "The ")[: model.config.max_seq_len]
    tokens = torch.tensor([prompt], dtype=torch.int64, device="cpu")
    with torch.no_grad(), evaluation_mode(model), evaluation_mode(loaded):
        result.record(torch.equal(model(tokens), loaded(tokens)), f"logits of {len(prompt)} tokens")
    return result


FORMATS: dict[str, Format] = {
    "hf": Format(
        "a Hugging Face folder, read by transformers (AutoModelForCausalLM)",
        HF_KINDS,
        save_hf,
        load_hf,
        verify_hf,
    ),
    "gguf": Format(
        "a GGUF file, read by llama.cpp, or by bitnet.cpp (i2_s)",
        {str(kind): about for kind, about in GGUF_KINDS.items()},
        _save_gguf,
        load_gguf,
        verify_gguf,
    ),
    "file": Format(
        "one .safetensors file of this project, read by bitnet.load",
        {"packed": "1.6 bits per weight, embedding and norms in fp32"},
        _save_packed(save_one_file),
        load,
        _verify_ours,
    ),
    "folder": Format(
        "a model folder of this project, read by bitnet.load",
        {"packed": "1.6 bits per weight, embedding and norms in fp32"},
        _save_packed(save_folder),
        load,
        _verify_ours,
    ),
}
