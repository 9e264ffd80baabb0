"""``bitnet convert``: import a model, or take our full-precision one, and prepare it for
quantization-aware training."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from bitnet.cli.common import model_of, read_text
from bitnet.config import load_recipe
from bitnet.data.tokenizer import Tokenizer
from bitnet.data.windows import first_inputs
from bitnet.evaluate import EvalResult, evaluate_text
from bitnet.export.folder import save_model
from bitnet.export.hf import add_sub_norms
from bitnet.export.source import import_model, load_source
from bitnet.model import ModelConfig, Transformer
from bitnet.progress import Reports, plain_console
from bitnet.qat.prepare import calibrate, prepare
from bitnet.qat.recipe import Recipe
from bitnet.schema import UserError

CALIBRATION_TOKENS, CALIBRATION_WINDOW = 65_536, 512
"""Most tokens of the --calibration text for the observers, and tokens per window."""


def convert_command(
    source: Annotated[
        Path,
        typer.Argument(
            help="A model folder, a run, a local Hugging Face folder, or a .gguf file.",
            callback=model_of,
        ),
    ],
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[quant.KEY=VALUE]...", help="The recipe. Default: none, import only."
        ),
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
    master_weights: Annotated[
        bool,
        typer.Option(
            "--master-weights",
            help="A folder without quantization_config holds a ternary model's master weights.",
        ),
    ] = False,
) -> None:
    """Import a pretrained model, and add quantizers to train with.

    SOURCE is a Llama-like model: our full-precision folder, Hugging Face safetensors with their
    tokenizer, or GGUF (dequantized). The written folder holds fp32 weights and the recipe. Train it
    with train.init_from=FOLDER; `bitnet pack` makes its integers. A ternary model (Hugging Face's
    BitNet, ternary GGUF) is imported as it is stored: master weights, or packed codes.

    Try: bitnet convert SmolLM2-135M/ quant.weights=int quant.bits=4 --out runs/smol-w4
    """
    recipe = load_recipe(settings or [])
    _check(out, recipe, calibration)
    texts = {name: read_text(Path(name)) for name in (calibration, text) if name}
    if recipe.enabled or sub_norm:
        if master_weights:
            raise UserError("--master-weights: the model is ternary, without [quant] or --sub-norm")
        model, tokenizer = load_source(source)
    else:
        model, tokenizer = import_model(source, master_weights)
    if context:
        model.config = _shortened(model, context, source)
    rows: list[tuple[str, EvalResult]] = []
    with Reports() as progress:

        def evaluate(name: str, when: str) -> None:
            if text:
                track = partial(progress.track, description=f"evaluation {when}")
                result = evaluate_text(model, tokenizer, texts[text], track=track)
                rows.append((name, result))

        evaluate(str(source), "before")
        if sub_norm:
            model = add_sub_norms(model)
        if recipe.enabled:
            _quantize(model, tokenizer, recipe, texts.get(calibration, ""), progress)
        folder = save_model(out, model, tokenizer, recipe)
        if recipe.enabled or sub_norm:
            evaluate(str(folder), "after")
    what = "ternary" if model.config.linear == "ternary" else recipe
    print(f"{folder}: {model.config.num_parameters()['total']:,} parameters, {what}")
    if rows:
        plain_console().print(_table(rows))
    if sub_norm:
        print("the added norms change what the model computes: train it before you judge it")


def _check(out: str, recipe: Recipe, calibration: str) -> None:
    """Raise UserError for options that contradict each other, before anything is loaded."""
    if not out:
        raise UserError("name the folder to write with --out, such as --out runs/converted")
    if Path(out).exists():
        raise UserError(f"--out {out}: exists already; choose another folder")
    if calibration and not recipe.static:
        raise UserError("--calibration: only quant.activations=static has anything to calibrate")
    if recipe.enabled and recipe.static and not calibration:
        raise UserError("quant.activations=static: name a text to calibrate on: --calibration FILE")


def _quantize(
    model: Transformer, tokenizer: Tokenizer, recipe: Recipe, calibration: str, progress: Reports
) -> None:
    """Add the recipe's quantizers; calibrate their observers on the text, if there is one."""
    try:
        prepare(model, recipe)
        if calibration:
            span = min(CALIBRATION_WINDOW, model.config.max_seq_len)
            windows = first_inputs(tokenizer, calibration, span, CALIBRATION_TOKENS)
            calibrate(model, progress.track(windows, description="calibration"))
    except ValueError as error:
        raise UserError(f"quant: {error}") from error


def _shortened(model: Transformer, context: int, source: Path) -> ModelConfig:
    if context > model.config.max_seq_len:
        raise UserError(
            f"--context {context}: {source} was trained for {model.config.max_seq_len} at most"
        )
    return dataclasses.replace(model.config, max_seq_len=context)


def _table(rows: list[tuple[str, EvalResult]]) -> Table:
    table = Table("")
    for heading in ("loss", "perplexity", "bits per byte"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, result in rows:
        numbers = (result.loss, result.perplexity, result.bits_per_byte)
        table.add_row(name, *(f"{number:.4f}" for number in numbers))
    return table
