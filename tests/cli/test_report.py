"""``bitnet report``: the files that it writes, and what it says to mistakes."""

import struct
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.run_folders import loss_rows, ternary_row, write_run

Bitnet = Callable[..., tuple[int, str, str]]


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """A ternary run and its baseline."""
    rows = [*loss_rows(range(10, 110, 10), 1.9), ternary_row(100, 0.3, 0.1)]
    base = write_run(tmp_path / "$base_", loss_rows(range(10, 110, 10), 2.0), "model.linear=fp")
    return [write_run(tmp_path / "_mine", rows), base]


def test_it_says_and_shows_which_is_better(bitnet: Bitnet, runs: list[Path]) -> None:
    code, out, err = bitnet("report", *runs)
    assert code == 0, err
    said, written = out.splitlines()
    assert said.startswith("_mine is better than $base_ by 0.100 bits per byte (5.0%).")
    assert written == f"written: {runs[0] / 'report.html'}"
    html = (runs[0] / "report.html").read_text(encoding="utf-8")
    assert f"<h1>{said}</h1>" in html
    assert bitnet("report", *runs)[0] == 0  # again, over what is there


def test_a_picture(bitnet: Bitnet, runs: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason='pip install -e ".[plots]"')
    out, png = tmp_path / "new" / "page.html", tmp_path / "other" / "page.png"
    code, _, err = bitnet("report", *runs, "--out", out, "--png", png)
    assert code == 0, err
    data = png.read_bytes()
    width, height = struct.unpack(">II", data[16:24])  # the PNG specification's IHDR
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert width > height > 300
    assert out.is_file()


def test_a_picture_without_matplotlib_is_one_line(
    bitnet: Bitnet, runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    code, _, err = bitnet("report", *runs, "--png", tmp_path / "x.png")
    assert code == 2
    assert err == "error: --png: needs matplotlib: pip install 'bitnet-train[plots]'\n"
    assert not (tmp_path / "x.png").exists()
    assert not (runs[0] / "report.html").exists()


def test_mistakes_are_one_line_and_exit_code_2(
    bitnet: Bitnet, runs: list[Path], tmp_path: Path
) -> None:
    for words, said in (
        ([tmp_path / "_min"], "the nearest run is"),
        ([tmp_path], "has no config.toml"),
        ([runs[0], "--out", tmp_path], "is a folder"),
        ([runs[0], "--out", "/proc/none/x.html"], "--out: cannot write"),
        ([runs[0], "--png", "/proc/none/x.png"], "--png: cannot write"),
    ):
        code, out, err = bitnet("report", *words)
        assert (code, out) == (2, "")
        assert err.startswith("error: ")
        assert said in err
        assert err.count("\n") == 1
