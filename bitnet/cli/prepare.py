"""``bitnet prepare``: turn text into token shards."""

from typing import Annotated, Any

import typer
from rich.table import Table

from bitnet.config import load_config
from bitnet.data.loader import TokenDataset
from bitnet.data.prepare import prepare_all
from bitnet.progress import plain_console
from bitnet.schema import UserError


def prepare_command(
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            help="Files, globs or folders of .txt .md .py .jsonl(.gz|.xz|.zst) .parquet; "
            "hf:OWNER/NAME[:CONFIG]; python-stdlib. Default: those of --config."
        ),
    ] = None,
    config: Annotated[str, typer.Option(help="Take [data] from this config file.")] = "",
    path: Annotated[str, typer.Option(help="Folder to write.")] = "",
    vocab_size: Annotated[
        int, typer.Option(help="Vocabulary of the tokenizer to train. 0: default.")
    ] = 0,
    tokenizer: Annotated[str, typer.Option(help="A sentencepiece model to use instead.")] = "",
    val_fraction: Annotated[
        float, typer.Option(help="Share of the documents to validate on. 0: default.")
    ] = 0.0,
    text_field: Annotated[
        str, typer.Option(help="Field of .jsonl and .parquet rows that holds the text.")
    ] = "",
) -> None:
    """Turn text into token shards to train on.

    Trains a tokenizer, unless one is given, tokenizes the documents and holds some out for
    validation. The result is complete or absent: an interrupted run leaves nothing that loads.
    train.py does the same if its config's data.path is missing. For a config with tables
    [[data.sources]] (a mixture), each source is prepared.

    Example: bitnet prepare my-texts/ --path data/my-texts --vocab-size 8192
    """
    if not sources and not config:
        raise UserError("nothing to prepare: name a source (a folder, say) or --config FILE")
    if sources and not path:
        raise UserError("name the folder to write with --path, such as --path data/my-texts")
    given: dict[str, Any] = {
        "sources": sources,
        "path": path,
        "vocab_size": vocab_size,
        "tokenizer": tokenizer,
        "val_fraction": val_fraction,
        "text_field": text_field,
    }
    data = {key: value for key, value in given.items() if value}
    for part in prepare_all(load_config([config] if config else [], data=data).data):
        table = Table("split", "documents", "tokens", "bytes", "bytes per token", title=part.path)
        for split in ("train", "val"):
            dataset = TokenDataset(part.path, split)
            row = (dataset.n_documents, dataset.n_tokens, dataset.n_bytes)
            table.add_row(split, *(f"{n:,}" for n in row), f"{row[2] / row[1]:.2f}")
        plain_console().print(table)
