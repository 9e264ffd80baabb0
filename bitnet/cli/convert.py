"""``bitnet convert``: a model from elsewhere, or a full-precision one of ours, made ready for
quantization-aware training.
"""

import dataclasses
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table
from torch import Tensor

from bitnet.cli.common import read_text
from bitnet.config import load_config
from bitnet.data.tokenizer import Tokenizer
from bitnet.evaluate import EvalResult, evaluate_windows
from bitnet.export.folder import CONFIG, is_ours, load, read_config, save_model
from bitnet.export.hf import add_sub_norms, check_no_adapter, load_hf
from bitnet.model import ModelConfig, Transformer
from bitnet.progress import Reports, plain_console
from bitnet.qat.prepare import calibrate, prepare
from bitnet.qat.recipe import Recipe
from bitnet.schema import UserError

CALIBRATION_TOKENS, CALIBRATION_WINDOW = 65_536, 512
"""What observers see of the --calibration text, at most, and in windows of how many tokens."""


def convert_command(
    source: Annotated[
        Path, typer.Argument(help="A model folder, a local Hugging Face folder, or a .gguf file.")
    ],
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[quant.KEY=VALUE]...", help="The recipe; none: only import."),
    ] = None,
    out: Annotated[str, typer.Option(help="Folder to write.")] = "",
    sub_norm: Annotated[
        bool, typer.Option("--sub-norm", help="Add BitNet's norms before o_proj and down_proj.")
    ] = False,
    context: Annotated[
        int, typer.Option(help="Longest context to keep. 0: the source's.", min=0)
    ] = 0,
    calibration: Annotated[
        str, typer.Option(help="Text file for the observers of static activations.")
    ] = "",
    text: Annotated[
        str, typer.Option(help="Text file to print the loss on, before and after.")
    ] = "",
) -> None:
    """Import a pretrained model, and give it the quantizers that training is to adapt it to.

    SOURCE is Llama-like: full precision of ours, Hugging Face safetensors with a tokenizer.json, or
    GGUF (dequantized). The written folder holds fp32 weights and the recipe; train.py starts from
    it with train.init_from=FOLDER, `bitnet pack` makes its integers.

    Try: bitnet convert SmolLM2-135M/ quant.weights=int quant.bits=4 --out runs/smol-w4
    """
    if not out:
        raise UserError("name the folder to write with --out, such as --out runs/converted")
    if Path(out).exists():
        raise UserError(f"--out {out}: exists already; choose another folder")
    recipe = recipe_of(settings or [])
    if calibration and recipe.activations != "static":
        raise UserError("--calibration: only quant.activations=static has anything to calibrate")
    if recipe.enabled and recipe.activations == "static" and not calibration:
        raise UserError("quant.activations=static: name a text to calibrate on: --calibration FILE")
    texts = {name: read_text(Path(name)) for name in (calibration, text) if name}
    for name, content in texts.items():
        if not content.strip():
            raise UserError(f"{name}: is empty")
    model, tokenizer = load_source(source)
    if context:
        model.config = _shortened(model, context, source)
    rows: list[tuple[str, EvalResult]] = []
    with Reports() as progress:
        if text:
            result = _evaluate(model, tokenizer, texts[text], progress, "before")
            rows.append((str(source), result))
        if sub_norm:
            model = add_sub_norms(model)
        if recipe.enabled:
            try:
                prepare(model, recipe)
                if calibration:
                    windows = calibration_windows(model, tokenizer, texts[calibration])
                    calibrate(model, progress.track(windows, description="calibration"))
            except ValueError as error:
                raise UserError(f"quant: {error}") from error
        folder = save_model(out, model, tokenizer, recipe)
        if text and (recipe.enabled or sub_norm):
            result = _evaluate(model, tokenizer, texts[text], progress, "after")
            rows.append((str(folder), result))

    counts = model.config.num_parameters()
    print(f"{folder}: {counts['total']:,} parameters, {recipe}")
    if rows:
        table = Table("")
        for heading in ("loss", "perplexity", "bits per byte"):
            table.add_column(heading, justify="right", no_wrap=True)
        for name, result in rows:
            numbers = (result.loss, result.perplexity, result.bits_per_byte)
            table.add_row(name, *(f"{number:.4f}" for number in numbers))
        plain_console().print(table)
    if sub_norm:
        print("the added norms change what the model computes: train it before you judge it")


def _evaluate(
    model: Transformer, tokenizer: Tokenizer, text: str, progress: Reports, when: str
) -> EvalResult:
    """``evaluate.evaluate_text``, with progress."""
    ids = torch.tensor([tokenizer.eos_id, *tokenizer.encode(text)], dtype=torch.int64, device="cpu")
    span = model.config.max_seq_len
    windows = [ids[start : start + span + 1] for start in range(0, len(ids) - 1, span)]
    shown = progress.track(windows, description=f"evaluation {when}")
    return evaluate_windows(model, shown, tokenizer.count_bytes)


def recipe_of(settings: list[str]) -> Recipe:
    """``quant.KEY=VALUE`` arguments as a recipe.

    Raises:
        UserError: another section, an unknown key, a value out of range; keys without
            quant.weights, which would change nothing.
    """
    for setting in settings:
        if not setting.startswith("quant."):
            raise UserError(f"{setting!r}: expected quant.KEY=VALUE, such as quant.weights=int")
    recipe = load_config([], settings).quant
    if settings and not recipe.enabled:
        raise UserError(f"{' '.join(settings)}: quantizes nothing without quant.weights=int, say")
    return recipe


def load_source(path: Path | str) -> tuple[Transformer, Tokenizer]:
    """A full-precision model with its tokenizer.

    Arguments:
        path: a model folder of ours (latent, without a recipe), a local Hugging Face folder, or a
            .gguf file.
    Raises:
        UserError: none of these, damaged, quantized already, or maths that we do not have.
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


def _shortened(model: Transformer, context: int, source: Path) -> ModelConfig:
    if context > model.config.max_seq_len:
        raise UserError(
            f"--context {context}: {source} was trained for {model.config.max_seq_len} at most"
        )
    return dataclasses.replace(model.config, max_seq_len=context)


def calibration_windows(model: Transformer, tokenizer: Tokenizer, text: str) -> list[Tensor]:
    """The beginning of a text as batches of one window: int64 ``[1, T]`` each."""
    ids = torch.tensor([tokenizer.eos_id, *tokenizer.encode(text)], dtype=torch.int64, device="cpu")
    ids = ids[:CALIBRATION_TOKENS]
    return list(ids.unsqueeze(0).split(min(CALIBRATION_WINDOW, model.config.max_seq_len), 1))
