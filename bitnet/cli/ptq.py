"""``bitnet ptq``: how far rounding alone gets, bit width by bit width, method by method."""

import csv
import io
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor, nn

from bitnet.cli.common import pick_device, read_text
from bitnet.cli.convert import load_source
from bitnet.data.loader import TokenDataset, sequential_windows
from bitnet.data.tokenizer import Tokenizer
from bitnet.durable import check_output, write_atomic
from bitnet.evaluate import evaluate_windows
from bitnet.export.folder import save_model
from bitnet.linear import TernaryLinear
from bitnet.model import Transformer
from bitnet.progress import Reports, plain_console
from bitnet.qat.awq import awq
from bitnet.qat.gptq import gptq
from bitnet.qat.integer import IntLayer
from bitnet.qat.ptq import OnLayer, check_model, round_to_nearest
from bitnet.qat.recipe import Recipe
from bitnet.qat.smoothquant import smoothquant
from bitnet.schema import UserError

FULL = "full precision"
METHODS = ("rtn", "gptq", "awq", "smoothquant")
BITS = ("8", "6", "4", "3", "2", "1.58")
ENOUGH, WORTH = 0.01, 0.10
"""Growth of perplexity below which PTQ is enough, and from which on QAT is needed."""
MAX_WINDOW = 2048
"""Longest window, in tokens; the papers' own."""


class Row(NamedTuple):
    """One result: a line of the table and of the CSV file."""

    method: str
    bits: float
    loss: float
    perplexity: float
    growth: float
    """perplexity over that of full precision, minus 1"""
    bits_per_byte: float
    matrix_megabytes: float
    """of the layers' matrices with their scales"""
    seconds: float
    """to quantize"""
    tokens: int
    """predicted in the evaluation"""
    recipe: str


def ptq_command(
    model: Annotated[
        Path, typer.Argument(help="Full precision: a model folder, a Hugging Face one, or a .gguf.")
    ],
    data: Annotated[
        str, typer.Option(help="Prepared data folder: evaluate on val, calibrate on train.")
    ] = "",
    text: Annotated[str, typer.Option(help="Or a UTF-8 text file to evaluate on.")] = "",
    calibration: Annotated[
        str, typer.Option(help="Text file to calibrate on. Default: the train split of --data.")
    ] = "",
    bits: Annotated[str, typer.Option(help=f"Bits a weight, of {', '.join(BITS)}.")] = "8,4,3,2",
    methods: Annotated[str, typer.Option(help="In any order.")] = ",".join(METHODS),
    group_size: Annotated[
        int, typer.Option(help="Columns that share a scale. 0: a whole row.", min=0, max=1 << 24)
    ] = 128,
    activation_bits: Annotated[
        int, typer.Option(help="4 to 8, a scale a token. 0: weights only.", min=0, max=8)
    ] = 8,
    calibration_tokens: Annotated[int, typer.Option(help="At most.", min=1)] = 65_536,
    eval_tokens: Annotated[
        int, typer.Option(help="At most, spread over the text. 0: all.", min=0)
    ] = 131_072,
    csv_file: Annotated[str, typer.Option("--csv", help="File for the results.")] = "",
    out: Annotated[
        str, typer.Option(help="Folder for the model; needs one method and one bit width.")
    ] = "",
    device: Annotated[
        str, typer.Option(help="cpu, cuda, ... auto: a GPU if there is one.")
    ] = "auto",
) -> None:
    """Quantize a trained model without training, and say where that suffices.

    rtn rounds to nearest, gptq compensates errors (arXiv 2210.17323), awq rescales channels by
    search (2306.00978), smoothquant by a formula (2211.10438). 1.58 bits are ternary with BitNet's
    scale, mean|W|. Embedding and head stay as they are.

    The verdict on a bit width goes by its best method. PTQ is enough: perplexity grows by less than
    1%. QAT is likely worth it: by 1% to 10%. QAT needed: by 10% or more.

    Example: bitnet ptq runs/fp/model --data data/python-stdlib --bits 4,3 --methods rtn,gptq
    """
    wanted_methods = chosen("--methods", methods, METHODS)
    wanted_bits = chosen("--bits", bits, BITS)
    if bool(text) == bool(data):
        not_both = ", not both" if text else ""
        raise UserError(f"name what to evaluate on: either --text FILE or --data FOLDER{not_both}")
    if csv_file:
        check_csv(Path(csv_file))
    if wanted_methods != ["rtn"] and not (calibration or data):
        raise UserError(
            f"{', '.join(one for one in wanted_methods if one != 'rtn')}: needs text to calibrate "
            "on: name it with --calibration FILE, or use --data FOLDER, which has a train split"
        )
    if out:
        if len(wanted_methods) != 1 or len(wanted_bits) != 1:
            raise UserError("--out: saves one model: name one method and one bit width")
        if Path(out).exists():
            raise UserError(f"--out {out}: exists already; choose another folder")
    recipes = {one: recipe_of(one, group_size, activation_bits) for one in wanted_bits}
    target = pick_device(device)
    source, tokenizer = load_source(model)
    try:
        check_model(source)
    except ValueError as error:
        raise UserError(f"{model}: {str(error).removeprefix('model: ')}") from error
    if tokenizer.vocab_size > source.config.vocab_size:
        raise UserError(
            f"{model}: the tokenizer has {tokenizer.vocab_size} tokens, the model only "
            f"{source.config.vocab_size}: they do not belong together"
        )
    source = source.to(target)

    span = min(source.config.max_seq_len, MAX_WINDOW)
    windows = evaluation_windows(text, data, tokenizer, span, eval_tokens)
    ids = torch.empty(0, span, dtype=torch.int64, device="cpu")
    if wanted_methods != ["rtn"]:
        ids = calibration_windows(calibration, data, tokenizer, span, calibration_tokens)

    def measure(method: str, recipe: Recipe, one: Transformer, seconds: float) -> None:
        shown = progress.track(windows, len(windows), task_id=task)
        result = evaluate_windows(one, shown, tokenizer.count_bytes)
        before = rows[0].perplexity if rows else result.perplexity
        numbers = (result.loss, result.perplexity, result.perplexity / before - 1)
        size = matrix_bytes(one) / 1e6
        row = Row(
            *(method, recipe.weight_bits, *numbers, result.bits_per_byte),
            *(size, seconds, result.tokens, str(recipe)),
        )
        rows.append(row)
        progress.console.print(
            f"{method}, {row.bits:g} bits: perplexity {row.perplexity:.5g}"
            + ("" if method == FULL else f" ({grown(row.growth)})")
        )
        if csv_file:
            write_csv(Path(csv_file), rows)

    rows: list[Row] = []
    if csv_file:
        write_csv(Path(csv_file), rows)  # a path that cannot be written shows now, not at the end
    with Reports() as progress:
        task = progress.add_task(f"{FULL}: evaluation", total=None)
        measure(FULL, Recipe(), source, 0.0)
        for (width, recipe), method in itertools.product(recipes.items(), wanted_methods):
            what = f"{method}, {width} bits"
            progress.reset(task, description=what)
            begun = time.perf_counter()
            try:
                quantized = quantize(
                    *(method, source, recipe, ids),
                    lambda done, of: progress.update(task, completed=done, total=of),
                )
            except ValueError as error:
                raise UserError(f"{what}: {error}") from error
            seconds = time.perf_counter() - begun
            progress.reset(task, description=f"{what}: evaluation")
            measure(method, recipe, quantized, seconds)
            if out:
                save_model(out, quantized, tokenizer, recipe)

    console = plain_console()
    if not console.is_terminal:  # a file or a pipe has room for the whole table
        console.width = max(console.width, 120)
    activations = f"activations of {activation_bits} bits" if activation_bits else "weights only"
    console.print(table_of(rows, f"{model}: {activations}, {rows[0].tokens:,} tokens"))
    for line in verdicts(rows):
        print(line)


def chosen(option: str, given: str, valid: tuple[str, ...]) -> list[str]:
    """A comma-separated list, checked, each once; raises UserError naming the nearest."""
    names = list(dict.fromkeys(one.strip() for one in given.split(",") if one.strip()))
    if not names:
        raise UserError(f"{option}: names nothing; expected some of {', '.join(valid)}")
    for name in names:
        if name not in valid:
            raise UserError(
                f"{option} {name!r} is none of {', '.join(valid)}; the nearest is "
                f"{nearest(name, valid)}"
            )
    return names


def nearest(name: str, valid: tuple[str, ...]) -> str:
    """By value where all are numbers, else by spelling."""
    try:
        value = float(name)
        return min(valid, key=lambda one: abs(float(one) - value))
    except ValueError:
        return get_close_matches(name, valid, 1, 0.0)[0]


def recipe_of(bits: str, group_size: int, activation_bits: int) -> Recipe:
    """What a bit width of the command line means."""
    if 0 < activation_bits < 4:
        raise UserError(f"--activation-bits {activation_bits}: expected 0 or 4 to 8; nearest: 4")
    return Recipe(
        weights="absmean" if bits == "1.58" else "int",
        bits=4 if bits == "1.58" else int(bits),
        granularity="group" if group_size else "row",
        group_size=group_size or 128,
        activations="absmax" if activation_bits else "none",
        activation_bits=activation_bits or 8,
    )


def quantize(
    method: str, model: Transformer, recipe: Recipe, calibration: Tensor, on_layer: OnLayer
) -> Transformer:
    """One of METHODS."""
    if method == "rtn":
        return round_to_nearest(model, recipe)
    calibrated: dict[str, Callable[..., Transformer]] = {
        "gptq": gptq,
        "awq": awq,
        "smoothquant": smoothquant,
    }
    return calibrated[method](model, recipe, calibration, on_layer=on_layer)


def text_windows(tokenizer: Tokenizer, path: Path, span: int, max_tokens: int) -> list[Tensor]:
    """``data.sequential_windows`` of a text file taken as one document."""
    content = read_text(path)
    if not content.strip():
        raise UserError(f"{path}: is empty")
    ids = torch.tensor(
        [tokenizer.eos_id, *tokenizer.encode(content)], dtype=torch.int64, device="cpu"
    )
    n_windows = -(-(len(ids) - 1) // span)
    count = min(n_windows, max(1, max_tokens // span)) if max_tokens else n_windows
    starts = (i * n_windows // count * span for i in range(count))
    return [ids[start : start + span + 1] for start in starts]


def evaluation_windows(
    text: str, data: str, tokenizer: Tokenizer, span: int, max_tokens: int
) -> list[Tensor]:
    """Inputs and targets, int64 ``[T + 1]`` each, of the text file or the folder's val split."""
    if text:
        return text_windows(tokenizer, Path(text), span, max_tokens)
    return list(sequential_windows(open_split(data, "val", tokenizer), span, max_tokens))


def calibration_windows(
    file: str, data: str, tokenizer: Tokenizer, span: int, max_tokens: int
) -> Tensor:
    """Whole windows int64 ``[S, T]`` of the file, else of the folder's train split."""
    windows: Iterable[Tensor]
    if file:
        windows = text_windows(tokenizer, Path(file), span, max_tokens)
    else:
        windows = sequential_windows(open_split(data, "train", tokenizer), span, max_tokens)
    whole = [window[:-1] for window in windows if len(window) == span + 1]
    if not whole:
        raise UserError(
            f"{file or data}: too short to calibrate on: one window takes {span + 1} tokens"
        )
    return torch.stack(whole)


def open_split(data: str, split: str, tokenizer: Tokenizer) -> TokenDataset:
    """A split of a folder that the model's tokenizer prepared; raises UserError for another's."""
    dataset = TokenDataset(Path(data), "train" if split == "train" else "val")
    if dataset.tokenizer().hash != tokenizer.hash:
        raise UserError(f"{data}: was tokenized with another tokenizer than the model has")
    return dataset


def matrix_bytes(model: Transformer) -> int:
    """What the layers' matrices take in memory, scales and zero points included."""
    total = 0
    for block in model.layers:
        for name in model.config.matrices():
            layer = block.get_submodule(name)
            if isinstance(layer, nn.Linear):
                total += layer.weight.nbytes
            elif isinstance(layer, TernaryLinear):
                total += layer.packed.nbytes + layer.scale.nbytes
            elif isinstance(layer, IntLayer):
                total += layer.weight_bytes
    return total


def check_csv(path: Path) -> None:
    """Raise UserError where --csv would replace what this command has not written."""
    if not path.parent.is_dir():
        raise UserError(f"--csv {path}: there is no folder {path.parent}")
    check_output("--csv", path)
    if not path.exists():
        return
    with path.open("rb") as file:
        head = file.read(100).decode("utf-8", "replace")
    if not head.startswith(",".join(Row._fields)):
        raise UserError(f"--csv {path}: exists and is no result of bitnet ptq; choose another")


def write_csv(path: Path, rows: list[Row]) -> None:
    """All rows so far; the file is whole at any moment."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(Row._fields)
    writer.writerows(rows)
    write_atomic(path, text.getvalue().encode())


def table_of(rows: list[Row], title: str) -> Table:
    """The results, a row each."""
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


def grown(growth: float) -> str:
    """``+2.5%``, or ``x31`` where percents say little."""
    return f"{growth:+.2%}" if growth < 9 else f"x{growth + 1:.3g}"


def verdicts(rows: list[Row]) -> Iterator[str]:
    """A line a bit width, by its best method."""
    quantized = [row for row in rows if row.method != FULL]
    for bits in dict.fromkeys(row.bits for row in quantized):
        of_width = [row for row in quantized if row.bits == bits]
        best = min(of_width, key=lambda row: (math.isnan(row.growth), row.growth))
        if best.growth < ENOUGH:
            verdict = "PTQ is enough"
        elif best.growth < WORTH:
            verdict = "QAT is likely worth it"
        else:  # NaN too
            verdict = "QAT needed"
        yield f"{bits:g} bits: {verdict} ({best.method}: perplexity {grown(best.growth)})"
