"""Build the model of a run from the config, and turn it into the form in which it is saved.

    Transformer -> weights of train.init_from -> quantizers ([quant]) -> adapters ([adapter])

in this order: quantizers take their first scales from the weights, and adapters wrap layers that
may quantize. A resumed run builds its model the same way but without the weights. They are in its
checkpoint, with everything that the layers learned or observed.
"""

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from bitnet.config import Config
from bitnet.export.folder import load, read_config
from bitnet.linear import BitLinear
from bitnet.model import Transformer, as_transformer
from bitnet.qat.adapters import add_adapters
from bitnet.qat.prepare import prepare, with_bitlinears
from bitnet.qat.recipe import Recipe
from bitnet.schema import UserError


def build_model(config: Config, tokenizer_hash: str, fresh: bool) -> Transformer:
    """Build the model for training, on the CPU; initial weights come from torch's global generator.

    Arguments:
        config: resolved. tokenizer_hash: of the data's tokenizer.
        fresh: load the weights of ``train.init_from``, if it names a folder. If the folder has the
            same recipe, load its learned scales and observers too.
    Raises:
        UserError: the folder, ``[quant]`` or ``[adapter]`` does not fit the model.
    """
    learned: dict[str, Tensor] = {}
    folder = Path(config.train.init_from)
    start = load(folder) if config.train.init_from and fresh else None  # load checks the sizes
    model = Transformer(config.model)
    if start is not None:
        source, tokenizer = start
        if tokenizer.hash != tokenizer_hash:
            raise UserError(
                f"train.init_from = {folder}: its tokenizer is not the one of the data; set "
                f"data.tokenizer = {str(tokenizer.path)!r}"
            )
        rest = source.state_dict()
        model.load_state_dict({name: rest.pop(name) for name in model.state_dict() if name in rest})
        learned = rest if read_config(folder).quant == config.quant else {}
    try:
        section = "quant"
        if config.quant.enabled:
            prepare(model, config.quant)
            model.load_state_dict(learned, strict=False)
        section = "adapter"
        add_adapters(model, config.adapter)
    except ValueError as error:
        raise UserError(f"[{section}]: {error}") from error
    return model


def undivided(model: Transformer) -> Transformer:
    """Gather a model whose weights are divided over processes: the main process gets it whole on
    the CPU, the others get a model without values. Any other model is returned as it is. All
    processes must call it."""
    if not any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        return model
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options)
    with torch.device("meta"):
        gathered = Transformer(model.config)
    gathered.load_state_dict(weights, assign=True, strict=bool(weights))
    if model.config.tie_embeddings:
        gathered.lm_head.weight = gathered.embed_tokens.weight
    gathered.document_separator = model.document_separator
    return gathered


def as_saved(model: Transformer, quant: Recipe) -> tuple[Transformer, Recipe]:
    """Return a trained model in the form in which it is saved, and the recipe of its folder.

    If the recipe is BitNet's own and quantizes exactly the matrices of the layers (so not the
    head), the model is saved as an ordinary ternary model, which ``bitnet pack`` and all other
    commands read. Any other model is saved as it was trained.
    """
    ternary = with_bitlinears(model) if quant.enabled else None
    if ternary is None:
        return model, quant
    config = model.config
    names = {f"layers.{i}.{name}" for i in range(config.n_layers) for name in config.matrices()}
    if names != {name for name, module in ternary.named_modules() if isinstance(module, BitLinear)}:
        return model, quant
    saved = as_transformer(ternary)
    saved.config = dataclasses.replace(
        config,
        linear="ternary",
        granularity=quant.granularity,
        group_size=quant.group_size,
        grad_mask=quant.grad_mask,
        grad_mask_c=quant.grad_mask_c,
    )
    return saved, Recipe()
