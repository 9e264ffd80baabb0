"""The documentation's tables of figures, each between marked lines of its page."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

from bitnet.bench import decode_table, peers_table, train_rows
from bitnet.bench.rows import RESULTS
from bitnet.durable import write_atomic
from bitnet_kernels.bench import report
from bitnet_kernels.bench.rows import Row


class Region(NamedTuple):
    """A table of a page: the text between two marks."""

    page: str
    begin: str
    end: str
    draw: Callable[[], str]


def stale(root: Path, figures: list[Row]) -> dict[str, str]:
    """The pages whose tables differ from the figures: name -> new text.

    Arguments:
        root: a checkout. figures: the kernels' figures, as ``report.load`` reads them.
    Raises:
        ValueError: a page has no marks, or a CSV file is damaged.
    """
    before: dict[str, str] = {}
    after: dict[str, str] = {}
    for region in _regions(root, figures):
        if region.page not in before:
            before[region.page] = (root / region.page).read_text(encoding="utf-8")
        text = after.get(region.page, before[region.page])
        after[region.page] = report.replace(
            text, region.begin, region.end, region.draw(), region.page
        )
    return {page: text for page, text in after.items() if text != before[page]}


def write(root: Path, texts: Mapping[str, str]) -> None:
    """Write pages (name -> text), each whole or not at all."""
    for page, text in texts.items():
        write_atomic(root / page, text.encode())


def _regions(root: Path, figures: list[Row]) -> Iterator[Region]:
    results = root / RESULTS
    images = {path.name for path in results.glob("kernels_*.png")}
    details = partial(report.details, figures, images)
    yield Region("kernels/README.md", *_marks("kernels"), details)
    counted = partial(report.machine_code, results / "machine_code.csv")
    yield Region("kernels/README.md", *_marks("machine-code"), counted)
    if (root / "docs/decoding.md").exists():
        decoded = decode_table.load(results)
        pictures = {path.name for path in results.glob("decode_peers_*.png")}
        decoding = partial(decode_table.table, decoded)
        yield Region("docs/decoding.md", *_marks("decode"), decoding)
        beside = partial(peers_table.table, decoded, pictures)
        yield Region("docs/decoding.md", *_marks("peers"), beside)
        in_short = partial(peers_table.summary, decoded)
        yield Region("README.md", *_marks("peers"), in_short)
    if (root / "docs/training.md").exists():
        training = partial(train_rows.table, train_rows.load(results))
        yield Region("docs/training.md", *_marks("training"), training)


def _marks(name: str) -> tuple[str, str]:
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
