"""Load a model in any readable format."""

from pathlib import Path

from bitnet.data.tokenizer import Tokenizer
from bitnet.export.folder import CONFIG, is_ours, load, read_config
from bitnet.export.hf import check_no_adapter, load_hf
from bitnet.model import Transformer
from bitnet.schema import UserError, user_input


def load_source(path: Path | str) -> tuple[Transformer, Tokenizer]:
    """Load a full-precision model with its tokenizer, to quantize it.

    Arguments:
        path: our model folder (latent, without a recipe), a local Hugging Face folder, or a .gguf
            file.
    Raises:
        UserError: none of these, damaged, already quantized, or an architecture that cannot be
            imported.
    """
    path = Path(path)
    model, tokenizer = import_model(path)
    if model.config.linear != "fp":
        raise UserError(f"{path}: has ternary weights; expected a full-precision model")
    return model, tokenizer


def import_model(path: Path | str, master_weights: bool = False) -> tuple[Transformer, Tokenizer]:
    """As :func:`load_source`, but a checkpoint of another program may be ternary.

    Arguments:
        master_weights: as for :func:`bitnet.export.hf.load_hf`.
    """
    path = Path(path)
    file = path / CONFIG
    if path.is_dir():
        check_no_adapter(path)
    if path.suffix == ".gguf" or path.is_file() or (file.is_file() and not is_ours(file)):
        return load_hf(path, master_weights)
    config = read_config(path)
    if config.weights != "latent" or config.quant.enabled or config.model.linear != "fp":
        what = config.quant if config.quant.enabled else f"{config.weights} ternary weights"
        raise UserError(f"{path}: has {what}; expected a full-precision model")
    if master_weights:
        raise UserError(f"{path}: --master-weights is for Hugging Face folders")
    return load(path)


def check_finite(model: Transformer, where: Path) -> None:
    """Raise UserError, beginning with ``where``, for a model with NaN or infinity in a parameter:
    other programs would load it silently."""
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise UserError(
                f"{where}: {name} holds NaN or infinity, as after a training that diverged"
            )


def find_model(path: Path) -> Path:
    """The model folder of a path: the path itself, or the ``model`` folder of a run.

    Raises:
        UserError: a run without a model yet.
    """
    with user_input(str(path)):  # an invalid path, or a cycle of links
        if not path.is_dir() or (path / CONFIG).is_file():
            return path
    if not (path / "config.toml").is_file():  # not a run: loading reports what is wrong
        return path
    if (path / "model" / CONFIG).is_file():
        return path / "model"
    raise UserError(f"{path}: is a run without a model, which is written when training ends")
