"""``bitnet eval``: loss, perplexity and bits per byte of a model on a text."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from bitnet.cli.common import Device, Folder, KernelOption, load_for_inference, read_text
from bitnet.data.loader import SplitName, sequential_windows
from bitnet.data.windows import split_of
from bitnet.evaluate import compressor_baselines, evaluate_text, evaluate_windows
from bitnet.progress import Reports, plain_console, reporting
from bitnet.schema import UserError


def eval_command(
    folder: Folder,
    text: Annotated[str, typer.Option(help="A UTF-8 text file to evaluate on.")] = "",
    data: Annotated[str, typer.Option(help="Or a prepared data folder (data.path).")] = "",
    split: Annotated[SplitName, typer.Option(help="Split of the data folder.")] = "val",
    baselines: Annotated[
        bool, typer.Option("--baselines", help="Also what gzip -9 and xz -9 reach on the text.")
    ] = False,
    device: Device = "auto",
    kernel: KernelOption = "auto",
) -> None:
    """Measure loss, perplexity and bits per byte on a text.

    The model is a trained or a packed one.

    Example: bitnet eval runs/quickstart/model-packed --data data/python-stdlib --baselines
    """
    if bool(text) == bool(data):
        raise UserError("name what to evaluate on: either --text FILE or --data FOLDER")
    model, tokenizer = load_for_inference(folder, device, kernel)
    content = ""
    with Reports() as bars:
        track = partial(bars.track, description=f"evaluating {folder}")
        if text:
            content = read_text(Path(text))
            result = evaluate_text(model, tokenizer, content, track=track)
        else:
            dataset = split_of(Path(data), split, tokenizer)
            windows = sequential_windows(dataset, model.config.max_seq_len)
            result = evaluate_windows(model, track(windows), tokenizer.count_bytes)
            if baselines:
                content = tokenizer.decode(dataset.tokens(0, dataset.n_tokens).tolist())
    table = Table("", "bits per byte", "loss", "perplexity", title=f"{result.bytes:,} bytes")
    table.add_row(
        str(folder), f"{result.bits_per_byte:.4f}", f"{result.loss:.4f}", f"{result.perplexity:.2f}"
    )
    if baselines:
        with reporting("compressing by gzip and xz"):
            compressed = compressor_baselines(content.encode())
        for name, bits in compressed.items():
            table.add_row(name, f"{bits:.4f}", "", "")
    plain_console().print(table)
