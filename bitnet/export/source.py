"""Load a full-precision model to quantize, in any of the formats that can be read."""

from pathlib import Path

from bitnet.data.tokenizer import Tokenizer
from bitnet.export.folder import CONFIG, is_ours, load, read_config
from bitnet.export.hf import check_no_adapter, load_hf
from bitnet.model import Transformer
from bitnet.schema import UserError


def load_source(path: Path | str) -> tuple[Transformer, Tokenizer]:
    """Load a full-precision model with its tokenizer.

    Arguments:
        path: a model folder of ours (latent, without a recipe), a local Hugging Face folder, or a
            .gguf file.
    Raises:
        UserError: none of these, damaged, already quantized, or an architecture that cannot be
            imported.
    """
    path = Path(path)
    file = path / CONFIG
    if path.is_dir():
        check_no_adapter(path)
    if path.suffix == ".gguf" or path.is_file() or (file.is_file() and not is_ours(file)):
        return load_hf(path)
    config = read_config(path)
    if config.weights != "latent" or config.quant.enabled or config.model.linear != "fp":
        what = config.quant if config.quant.enabled else f"{config.weights} ternary weights"
        raise UserError(f"{path}: has {what}; expected a full-precision model")
    return load(path)
