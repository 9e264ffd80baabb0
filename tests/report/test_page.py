"""The page: it answers, it is whole, it asks for nothing, and no name in a file can change it."""

from html.parser import HTMLParser
from pathlib import Path

import pytest

from bitnet.report.page import page
from bitnet.report.runs import read_run
from tests.helpers.run_folders import LAYERS, loss_rows, ternary_row, write_run

VOID = {"meta", "br", "img", "link"}
TAGS = {
    *("html", "head", "meta", "title", "style", "body", "main", "header", "section", "details"),
    *("summary", "h1", "h2", "h3", "p", "b", "i", "div", "span", "pre", "figure", "figcaption"),
    *("svg", "path", "table", "tr", "th", "td", "dl", "dt", "dd"),
}
ATTRIBUTES = {
    *("class", "style", "d", "viewbox", "preserveaspectratio", "role", "aria-label", "lang"),
    *("charset", "http-equiv", "content", "name"),
}


class Parsed(HTMLParser):
    """Tags, attributes and text; every tag that opens must close, in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags = set[str]()
        self.attributes = set[str]()
        self.text: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text.append(data)


def checked(html: str) -> str:
    """The text of a page that is whole and loads and runs nothing."""
    parsed = Parsed(html)
    assert parsed.tags <= TAGS
    assert parsed.attributes <= ATTRIBUTES
    assert "http:" not in html
    assert "https:" not in html
    assert "url(" not in html
    assert "@import" not in html
    return " ".join(" ".join(parsed.text).split())


def test_a_run_and_its_baseline(tmp_path: Path) -> None:
    rows = loss_rows(range(10, 110, 10), 2.1)
    rows += [ternary_row(100, 0.3, None)]
    run = read_run(write_run(tmp_path / "mine", rows))
    base_rows = loss_rows(range(10, 110, 10), 2.0)
    base = read_run(write_run(tmp_path / "base", base_rows, "model.linear=fp", "optim.lr=1e-4"))
    text = checked(page([run, base]))
    for expected in (
        "mine is worse than base by 0.100 bits per byte (5.0%).",
        "+0.100 (+5.0%), worse",
        "2.100 against 2.000 on validation text, at step 100",
        "Its ternary weights cannot be judged yet.",
        "100% of 100 steps, 6.4k tokens",
        "sample of step 100",
        "model.linear ternary fp",
        "0.0001",
        "not ternary",
        "mine less baseline",
        *("Flip rate", "Zeros by layer", "0 q", "1 up"),
    ):
        assert expected in text, expected


def test_a_run_alone_in_progress(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "mine", [{"step": 7, "loss": 3.0}, {"step": 8}]))
    text = checked(page([run]))
    assert "mine has not been evaluated yet." in text
    assert "At step 8" in text
    assert "full-precision baseline as a second folder" in text


def test_more_runs_than_colours_and_batches_that_differ(tmp_path: Path) -> None:
    runs = [
        read_run(
            write_run(
                tmp_path / f"run{n}",
                loss_rows(range(10, 110, 10), 2.0 + n / 10),
                *(["train.batch_tokens=128"] if n == 3 else []),
            )
        )
        for n in range(8)
    ]
    html = page(runs)
    assert "tokens</p>" in html
    assert 'class="line c6"' not in html
    assert checked(html).count("run7") >= 4


HOSTILE = [
    "<script>alert(1)</script>",
    "\"><img src=x onerror='alert(1)'>",
    "</style></title></pre><iframe src=//x>",
    "&lt;b&gt; &amp; \u202eright to left\x00\x1b[2J",
    "${jndi:x} $\\frac{1}{0}$",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_text_of_others_stays_text(text: str, tmp_path: Path) -> None:
    name = "".join(one for one in text if one.isprintable() and one != "/")
    rows = [
        {"step": 10, "val_bpb": 2.0, "loss": 2.0, "sample": text},
        {"step": 20, "val_bpb": 2.0, "sample": "\ud800" + text},
        {**ternary_row(20, 0.3, 0.1), "ternary/layers": {text: {"zeros": 0.5}, "x": {"zeros": 1}}},
    ]
    run = read_run(write_run(tmp_path / "run", rows, name=text))
    other = read_run(write_run(tmp_path / name, rows, f"data.path={name}"))
    html = page([run, other])
    shown = checked(html)
    assert " ".join(name.split()) in shown
    assert "\x00" not in html
    assert "\u202e" not in html
    html.encode()


def test_the_page_of_a_large_run_is_small(tmp_path: Path) -> None:
    numbers = {"zeros": 0.3, "flip_rate": 0.1}
    layers = {f"layers.{b}.mlp.{n}_proj": numbers for b in range(30) for n in LAYERS}
    rows = [
        {"step": step, "loss": 2.0, "ternary/zeros": 0.3, "ternary/layers": layers}
        for step in range(200)
    ]
    run = read_run(write_run(tmp_path / "run", rows))
    assert len(page([run])) < 2_000_000
