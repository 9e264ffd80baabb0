"""``bitnet ptq``: compare quantization without training, by bit width and method."""

import csv
import io
import itertools
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor

from bitnet.cli.common import Device, model_of, pick_device, read_text, valid_names, wide_console
from bitnet.data.loader import sequential_windows
from bitnet.data.tokenizer import Tokenizer
from bitnet.data.windows import split_of, text_windows, whole_inputs
from bitnet.durable import check_output, write_atomic
from bitnet.evaluate import evaluate_windows
from bitnet.export.folder import save_model
from bitnet.export.source import load_source
from bitnet.model import Transformer
from bitnet.progress import Reports
from bitnet.qat.comparison import (
    BITS,
    FULL,
    METHODS,
    Row,
    grown,
    quantize,
    recipe_of,
    row_of,
    verdicts,
)
from bitnet.qat.ptq import check_model
from bitnet.qat.recipe import Recipe
from bitnet.schema import UserError

MAX_WINDOW = 2048
"""Longest window, in tokens, as in the papers."""


def ptq_command(
    model: Annotated[
        Path,
        typer.Argument(
            help="Full precision: a model folder, a run, a Hugging Face folder, or a .gguf.",
            callback=model_of,
        ),
    ],
    data: Annotated[
        str, typer.Option(help="Prepared data folder: evaluate on val, calibrate on train.")
    ] = "",
    text: Annotated[str, typer.Option(help="Or a UTF-8 text file to evaluate on.")] = "",
    calibration: Annotated[
        str, typer.Option(help="Text file to calibrate on. Default: the train split of --data.")
    ] = "",
    bits: Annotated[str, typer.Option(help=f"Bits per weight, of {', '.join(BITS)}.")] = "8,4,3,2",
    methods: Annotated[str, typer.Option(help="In any order.")] = ",".join(METHODS),
    group_size: Annotated[
        int, typer.Option(help="Columns per scale. 0: a whole row.", min=0, max=1 << 24)
    ] = 128,
    activation_bits: Annotated[
        int, typer.Option(help="4 to 8, one scale per token. 0: weights only.", min=0, max=8)
    ] = 8,
    calibration_tokens: Annotated[
        int, typer.Option(help="Most tokens to calibrate on.", min=1)
    ] = 65_536,
    eval_tokens: Annotated[
        int, typer.Option(help="Most tokens to predict, spread over the text. 0: all.", min=0)
    ] = 131_072,
    csv_file: Annotated[str, typer.Option("--csv", help="File for the results.")] = "",
    out: Annotated[
        str, typer.Option(help="Folder for the model; needs one method and one bit width.")
    ] = "",
    device: Device = "auto",
) -> None:
    """Quantize without training, and say where that suffices.

    rtn rounds to nearest, gptq compensates errors (arXiv 2210.17323), awq rescales channels by
    search (2306.00978), smoothquant rescales them by a formula (2211.10438). 1.58 bits means
    ternary with BitNet's scale, mean|W|. Embedding and head are not quantized.

    The best method decides the verdict on a bit width. PTQ is enough: perplexity grows by less than
    1%. QAT is likely worth it: by 1% to 10%. QAT needed: by 10% or more.

    Example: bitnet ptq runs/fp/model --data data/python-stdlib --bits 4,3 --methods rtn,gptq
    """
    wanted, widths = _listed("--methods", methods, METHODS), _listed("--bits", bits, BITS)
    calibrated = [method for method in wanted if method != "rtn"]
    _check_texts(text, data, calibration, calibrated)
    _check_outputs(csv_file, out, len(wanted) * len(widths))
    if 0 < activation_bits < 4:
        raise UserError(f"--activation-bits {activation_bits}: expected 0 or 4 to 8; nearest: 4")
    recipes = {width: recipe_of(width, group_size, activation_bits) for width in widths}
    target = pick_device(device)
    source, tokenizer = _load(model)
    source = source.to(target)

    span = min(source.config.max_seq_len, MAX_WINDOW)
    windows = _evaluation_windows(text, data, tokenizer, span, eval_tokens)
    inputs = torch.empty(0, span, dtype=torch.int64, device="cpu")
    if calibrated:
        inputs = _calibration_inputs(calibration, data, tokenizer, span, calibration_tokens)
    with Reports() as progress:
        results = _Results(windows, tokenizer, progress, Path(csv_file) if csv_file else None)
        results.measure(FULL, Recipe(), source)
        for (width, recipe), method in itertools.product(recipes.items(), wanted):
            quantized = results.quantize(f"{method}, {width} bits", method, source, recipe, inputs)
            results.measure(method, recipe, quantized)
            if out:
                save_model(out, quantized, tokenizer, recipe)

    activations = f"activations of {activation_bits} bits" if activation_bits else "weights only"
    rows = results.rows
    wide_console().print(_table(rows, f"{model}: {activations}, {rows[0].tokens:,} tokens"))
    for line in verdicts(rows):
        print(line)


def _listed(option: str, given: str, valid: tuple[str, ...]) -> list[str]:
    """The names of a comma-separated list."""
    names = valid_names(option, filter(None, map(str.strip, given.split(","))), valid)
    if not names:
        raise UserError(f"{option}: names nothing; expected some of {', '.join(valid)}")
    return names


def _check_texts(text: str, data: str, calibration: str, calibrated: list[str]) -> None:
    if bool(text) == bool(data):
        not_both = ", not both" if text else ""
        raise UserError(f"name what to evaluate on: either --text FILE or --data FOLDER{not_both}")
    if calibrated and not (calibration or data):
        raise UserError(
            f"{', '.join(calibrated)}: needs text to calibrate on: name it with --calibration "
            "FILE, or use --data FOLDER, which has a train split"
        )


def _check_outputs(csv_file: str, out: str, count: int) -> None:
    """Raise UserError if --csv would replace a file that this command did not write, if --out would
    replace a folder, or if --out would get ``count`` models instead of one."""
    if csv_file:
        path = Path(csv_file)
        if not path.parent.is_dir():
            raise UserError(f"--csv {path}: there is no folder {path.parent}")
        check_output("--csv", path)
        if path.exists():
            with path.open("rb") as file:
                head = file.read(100).decode("utf-8", "replace")
            if not head.startswith(",".join(Row._fields)):
                raise UserError(f"--csv {path}: exists and is no result of bitnet ptq")
    if out and count != 1:
        raise UserError("--out: saves one model: name one method and one bit width")
    if out and Path(out).exists():
        raise UserError(f"--out {out}: exists already; choose another folder")


def _load(path: Path) -> tuple[Transformer, Tokenizer]:
    model, tokenizer = load_source(path)
    try:
        check_model(model)
    except ValueError as error:
        raise UserError(f"{path}: {str(error).removeprefix('model: ')}") from error
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, the model only "
            f"{model.config.vocab_size}: they do not belong together"
        )
    return model, tokenizer


def _evaluation_windows(
    text: str, data: str, tokenizer: Tokenizer, span: int, max_tokens: int
) -> list[Tensor]:
    """Windows ``[span + 1]`` of the text file or the folder's val split."""
    if text:
        return text_windows(tokenizer, read_text(Path(text)), span, max_tokens)
    return list(sequential_windows(split_of(Path(data), "val", tokenizer), span, max_tokens))


def _calibration_inputs(
    file: str, data: str, tokenizer: Tokenizer, span: int, max_tokens: int
) -> Tensor:
    """Whole windows int64 ``[S, span]`` of the file, else of the folder's train split."""
    if file:
        windows = text_windows(tokenizer, read_text(Path(file)), span, max_tokens)
    else:
        train = split_of(Path(data), "train", tokenizer)
        windows = list(sequential_windows(train, span, max_tokens))
    inputs = whole_inputs(windows, span)
    if not len(inputs):
        raise UserError(
            f"{file or data}: too short to calibrate on: one window takes {span + 1} tokens"
        )
    return inputs


class _Results:
    """Quantizes and measures models under one progress bar; the CSV file holds all rows so far."""

    def __init__(
        self, windows: list[Tensor], tokenizer: Tokenizer, progress: Reports, path: Path | None
    ) -> None:
        self.rows: list[Row] = []
        self._windows, self._tokenizer = windows, tokenizer
        self._progress, self._path = progress, path
        self._task = progress.add_task("", total=None)
        self._seconds = 0.0
        self._write()  # a path that cannot be written raises now, not at the end

    def quantize(
        self, what: str, method: str, model: Transformer, recipe: Recipe, inputs: Tensor
    ) -> Transformer:
        """Quantize by a method; ``what`` is its name in the bar and in errors."""
        self._progress.reset(self._task, description=what)
        begun = time.perf_counter()

        def on_layer(done: int, total: int) -> None:
            self._progress.update(self._task, completed=done, total=total)

        try:
            quantized = quantize(method, model, recipe, inputs, on_layer)
        except ValueError as error:
            raise UserError(f"{what}: {error}") from error
        self._seconds = time.perf_counter() - begun
        return quantized

    def measure(self, method: str, recipe: Recipe, model: Transformer) -> None:
        """Evaluate a model, print its perplexity, and add its row."""
        what = method if method == FULL else f"{method}, {recipe.weight_bits:.3g} bits"
        self._progress.reset(self._task, description=f"{what}: evaluation")
        shown = self._progress.track(self._windows, len(self._windows), task_id=self._task)
        result = evaluate_windows(model, shown, self._tokenizer.count_bytes)
        full = self.rows[0] if self.rows else None
        row = row_of(method, recipe, model, result, self._seconds, full)
        self.rows.append(row)
        self._progress.console.print(
            f"{method}, {row.bits:g} bits: perplexity {row.perplexity:.5g}"
            + ("" if method == FULL else f" ({grown(row.growth)})")
        )
        self._write()

    def _write(self) -> None:
        if self._path is None:
            return
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        writer.writerow(Row._fields)
        writer.writerows(self.rows)
        write_atomic(self._path, text.getvalue().encode())


def _table(rows: list[Row], title: str) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD)
    table.add_column("method", no_wrap=True)
    for heading in ("bits", "loss", "perplexity", "growth", "bits per byte", "MB", "seconds"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row.method,
            f"{row.bits:g}",
            f"{row.loss:.4f}",
            f"{row.perplexity:.5g}",
            "" if row.method == FULL else grown(row.growth),
            f"{row.bits_per_byte:.4f}",
            f"{row.matrix_megabytes:.4g}",
            "" if row.method == FULL else f"{row.seconds:.1f}",
        )
    return table
