"""The formats that a model can be exported to, one row each.

    hf = FORMATS["hf"]
    hf.save(model, tokenizer, path, "offline", facts)     # whole or not at all
    model, tokenizer = hf.load(path)                      # back as ours, with the same codes
    hf.verify(model, tokenizer, path).holds               # against the program that reads it

To add a format, write a module with these three functions in bitnet/export/ and add its row. Its
``save`` refuses by name what the format cannot carry, and says which settings it can.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from bitnet.data.tokenizer import Tokenizer
from bitnet.export.facts import Facts
from bitnet.export.hf import load_hf
from bitnet.export.hf_verify import verify_hf
from bitnet.export.hf_write import KINDS as HF_KINDS
from bitnet.export.hf_write import save_hf
from bitnet.export.verification import Verification
from bitnet.model import Transformer


@dataclass(frozen=True)
class Format:
    """A row of :data:`FORMATS`."""

    about: str
    """What it is and who reads it, in one line."""
    kinds: Mapping[str, str]
    """Its variants, and what each is for. The first is the default."""
    save: Callable[[Transformer, Tokenizer, Path, str, Facts], None]
    """Write a model, latent or packed, to a path that does not exist, as such a kind. Raises
    UserError for what the format cannot carry."""
    load: Callable[[Path], tuple[Transformer, Tokenizer]]
    """Read it back. Raises UserError for a file that is damaged or of another kind."""
    verify: Callable[[Transformer, Tokenizer, Path], Verification]
    """Compare the model with the file, read back by ``load`` and, where it is installed, by the
    program that the format belongs to."""


FORMATS: dict[str, Format] = {
    "hf": Format(
        "a Hugging Face folder, read by transformers (AutoModelForCausalLM)",
        HF_KINDS,
        save_hf,
        load_hf,
        verify_hf,
    ),
}
