"""``bitnet eval``: measure how well a model predicts a text, or its scores in lm_eval's tasks."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from bitnet.cli.common import Device, Folder, KernelOption, load_for_inference, read_text
from bitnet.data.loader import SplitName, sequential_windows
from bitnet.data.tokenizer import Tokenizer
from bitnet.data.windows import split_of
from bitnet.evaluate import EvalResult, compressor_baselines, evaluate_text, evaluate_windows
from bitnet.harness import run_tasks
from bitnet.model import Transformer
from bitnet.perplexity import sliding_perplexity
from bitnet.progress import Reports, plain_console, reporting
from bitnet.schema import UserError


def eval_command(
    folder: Folder,
    text: Annotated[str, typer.Option(help="A UTF-8 text file to evaluate on.")] = "",
    data: Annotated[str, typer.Option(help="Or a prepared data folder (data.path).")] = "",
    tasks: Annotated[
        str, typer.Option(help="Or tasks of lm_eval: NAME[,NAME], such as hellaswag,arc_easy.")
    ] = "",
    stride: Annotated[
        int,
        typer.Option(
            help="With --text: slide the context by so many tokens, as papers do. 0: windows that "
            "do not overlap.",
            min=0,
        ),
    ] = 0,
    context: Annotated[
        int, typer.Option(help="With --text: tokens of a window. 0: the model's context.", min=0)
    ] = 0,
    include_path: Annotated[
        Path | None, typer.Option(help="With --tasks: a folder of more tasks (YAML).")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="With --tasks: documents per task.", min=1)
    ] = None,
    fewshot: Annotated[
        int | None, typer.Option(help="With --tasks: examples before each question.", min=0)
    ] = None,
    split: Annotated[SplitName, typer.Option(help="Split of the data folder.")] = "val",
    baselines: Annotated[
        bool, typer.Option("--baselines", help="Also what gzip -9 and xz -9 reach on the text.")
    ] = False,
    device: Device = "auto",
    kernel: KernelOption = "auto",
) -> None:
    """Measure a trained or packed model on a text or in tasks.

    On a text: bits per byte, loss, perplexity per token and per word. In tasks: the metrics of
    lm-evaluation-harness (needs the eval extra).

    Example: bitnet eval runs/quickstart/model-packed --data data/python-stdlib --baselines
    """
    if sum(map(bool, (text, data, tasks))) != 1:
        raise UserError(
            "name one thing to evaluate on: --tasks NAMES, --text FILE or --data FOLDER"
        )
    _check_options(
        text=text,
        tasks=tasks,
        stride=stride,
        context=context,
        include_path=include_path,
        limit=limit,
        fewshot=fewshot,
        baselines=baselines,
    )
    if include_path is not None and not include_path.is_dir():
        raise UserError(f"--include-path {include_path}: no such folder")
    model, tokenizer = load_for_inference(folder, device, kernel)
    if tasks:
        names = [name.strip() for name in tasks.split(",") if name.strip()]
        results = run_tasks(model, tokenizer, names, include_path, limit, fewshot)
        plain_console().print(task_table(results))
        return
    content = ""
    with Reports() as bars:
        track = partial(bars.track, description=f"evaluating {folder}")
        if text:
            content = read_text(Path(text))
            result = _of_text(model, tokenizer, content, stride, context, track)
        else:
            dataset = split_of(Path(data), split, tokenizer)
            windows = sequential_windows(dataset, model.config.max_seq_len)
            result = evaluate_windows(model, track(windows), tokenizer.count_bytes)
            if baselines:
                content = tokenizer.decode(dataset.tokens(0, dataset.n_tokens).tolist())
    plain_console().print(_table(str(folder), result, content if baselines else ""))


def _check_options(**options: Any) -> None:
    """Raise UserError for an option that does not apply to this kind of evaluation."""
    text, tasks = options["text"], options["tasks"]
    for name in ("stride", "context"):
        if options[name] and not text:
            raise UserError(f"--{name}: is for --text FILE")
    for name in ("include_path", "limit", "fewshot"):
        if options[name] is not None and not tasks:
            raise UserError(f"--{name.replace('_', '-')}: is for --tasks NAMES")
    if options["baselines"] and tasks:
        raise UserError("--baselines: is for --text FILE and --data FOLDER")


def _of_text(
    model: Transformer, tokenizer: Tokenizer, text: str, stride: int, context: int, track: Any
) -> EvalResult:
    longest = model.config.max_seq_len
    if context > longest:
        raise UserError(f"--context {context}: the model has a context of {longest}")
    if stride:
        return sliding_perplexity(model, tokenizer, text, stride, context, track)
    return evaluate_text(model, tokenizer, text, track=track, context=context)


def _table(name: str, result: EvalResult, text: str) -> Table:
    """The result, and the compressors' bits per byte on ``text`` unless it is empty."""
    per_word = result.nats_per_word == result.nats_per_word  # not NaN: evaluated on a text
    title = f"{result.bytes:,} bytes, {result.tokens:,} tokens predicted"
    table = Table("", "bits per byte", "loss", "perplexity", title=title)
    row = [f"{result.bits_per_byte:.4f}", f"{result.loss:.4f}", f"{result.perplexity:.2f}"]
    if per_word:
        table.add_column("word perplexity")
        row.append(f"{result.word_perplexity:.2f}")
    table.add_row(name, *row)
    if text:
        with reporting("compressing by gzip and xz"):
            compressed = compressor_baselines(text.encode())
        for compressor, bits in compressed.items():
            table.add_row(compressor, f"{bits:.4f}")
    return table


def task_table(results: dict[str, dict[str, Any]]) -> Table:
    """lm_eval's results, one row per metric."""
    table = Table("task", "filter", "metric", "value", "standard error")
    for task, metrics in results.items():
        for key, value in metrics.items():
            metric, _, which = key.partition(",")
            if which and not metric.endswith("_stderr") and isinstance(value, int | float):
                error = metrics.get(f"{metric}_stderr,{which}")
                shown = f"{error:.4f}" if isinstance(error, int | float) else ""
                table.add_row(task, which, metric, f"{value:.4f}", shown)
    return table
