"""What commands share: names, texts."""

from pathlib import Path

import pytest

from bitnet.cli.common import read_text, valid_names
from bitnet.schema import UserError

SIZES = ("60m", "110m", "2b", "8b")
NAMES = ("ours-auto", "ours-dot", "baseline-bf16", "transformers-bf16")


def test_valid_names_come_back_once() -> None:
    assert valid_names("--size", ["2b", "60m", "2b"], SIZES) == ["2b", "60m"]
    assert valid_names("--size", [], SIZES) == []


@pytest.mark.parametrize(
    ("name", "valid", "near"),
    [
        ("100m", SIZES, "110m"),
        ("110", SIZES, "110m"),
        ("5B", SIZES, "8b"),
        ("0.07b", SIZES, "60m"),
        ("1", ("8", "2", "1.58"), "1.58"),
        ("ours", NAMES, "ours-auto"),
        ("ours-dto", NAMES, "ours-dot"),
        ("baseline-fp32", NAMES, "baseline-bf16"),
        ("Transformer", NAMES, "transformers-bf16"),
        ("0", SIZES, "60m"),
        ("zzz", NAMES, ""),
    ],
)
def test_the_nearest_name(name: str, valid: tuple[str, ...], near: str) -> None:
    with pytest.raises(UserError) as caught:
        valid_names("--x", [name], valid)
    hint = f"; did you mean {near}?" if near else ""
    assert str(caught.value) == f"--x: {name!r} is none of {', '.join(valid)}{hint}"


def test_read_text(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("naïve ☃\n", encoding="utf-8")
    assert read_text(path) == "naïve ☃\n"
    for content, message in ((b" \n", "is empty"), (b"\xe9", "not UTF-8 text")):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"text.txt: {message}"):
            read_text(path)
