"""Hostile configs, overrides and folders of text, made from a seed. Not a test module."""

import gzip
import json
import lzma
import os
import random
import shutil
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zstandard
from rich.console import Console

from bitnet.cli.common import split_args
from bitnet.cli.prepare import prepare_command
from bitnet.config import Config, load_config, to_dict
from bitnet.data.tokenizer import train_tokenizer
from bitnet.schema import UserError
from bitnet.summary import one_line, quantization_lines, tables
from tests.helpers.hostile import ROOT, VALUES, damaged, odd_file, somewhere

CONFIGS = sorted((ROOT / "configs").rglob("*.toml"))
WORDS = "to be or not to be, that is the question, naïve ☃ 😀 whether 'tis nobler\n\n"
BARE = (
    *(
        "",
        " ",
        "x",
        "1",
        "-1",
        "1e400",
        "nan",
        "-inf",
        "true",
        "[",
        "[]",
        "[[1]]",
        '"',
        '"a',
        "'a'",
    ),
    *(
        "a#b",
        "a=b",
        "1\nseed=2",
        "é😀",
        "\0",
        "{a=1}",
        "1979-05-27",
        "0x10",
        "1_0",
        '"""',
        "9" * 25,
    ),
    *("int", "muon", "cpu", "cuda:7", "no/such", ".", "/dev/zero", "a" * 5000, "[[" * 3000),
)
NAMES = ("x", "..", "", "/", "a/b", "[/x]", "[b]", "\0", "a\nb", "-x", "n" * 300, ":smile:", "é")
ODD_NAMES = (
    *(b"[/x].txt", b"a\nb.md", b"\xff\xe9.txt", b"-x.py", b" .txt", "é😀.jsonl".encode(), b"A.TXT"),
    *(b"[bold]x.md", b"a=b#c.txt", b".hidden.txt", b"n" * 240 + b".txt"),
)


def toml(value: Any) -> str:
    """A value as TOML in one line; a value that TOML cannot express becomes odd text."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else str(value)


def odd_toml(values: dict[str, Any], rng: random.Random) -> bytes:
    """A config file of some values, with a mutation of the values, the structure or the bytes."""
    for _ in range(rng.choice([0, 1, 1, 2, 5])):
        values = somewhere(values, rng)
        if not isinstance(values, dict):
            return toml(values).encode(errors="replace")
    lines: list[str] = []
    for section, table in values.items():
        if not isinstance(table, dict):
            lines.insert(0, f"{section} = {toml(table)}")
        elif rng.random() < 0.1:
            lines[:0] = [f"{section}.{key} = {toml(value)}" for key, value in table.items()]
        else:
            head = f"[[{section}]]" if rng.random() < 0.05 else f"[{section}]"
            lines += [head, *(f"{json.dumps(key)} = {toml(v)}" for key, v in table.items())]
    if lines and rng.random() < 0.1:  # a key or a section twice
        lines.insert(rng.randrange(len(lines)), rng.choice(lines))
    if rng.random() < 0.1:
        bases = ["no.toml", ".", "../..", "", "\0", "mine.toml", "/dev/zero", 3, "x" * 5000]
        lines.insert(0, f"extends = {toml(rng.choice(bases))}")
    data = "\n".join(lines).encode(rng.choice(["utf-8"] * 9 + ["utf-8-sig", "utf-16"]), "replace")
    return damaged(data, rng) if rng.random() < 0.2 else data


def odd_override(defaults: dict[str, dict[str, Any]], rng: random.Random) -> str:
    """``section.key=value`` with one odd part, most often the value."""
    section = rng.choice(sorted(defaults))
    key = rng.choice(sorted(defaults[section]))
    value = rng.choice([rng.choice(BARE), toml(rng.choice(VALUES)), toml(defaults[section][key])])
    if rng.random() < 0.1:
        section, key, value = "run", "name", rng.choice(NAMES)
    if rng.random() < 0.1:
        section = rng.choice(["", "x", "ru", "run.run", "é", "[run]", " run", "\0", "run\n"])
    if rng.random() < 0.1:
        key = rng.choice(["", f"{key}x", f"{key}.x", f" {key} ", "\n", "é", '"a"', "__class__"])
    return f"{section}.{key}{rng.choice(['='] * 9 + ['', '==', ' = '])}{value}"


def check(function: Callable[[], Any], what: str) -> bool:
    """Whether it works; anything but that or a one-line error within 10 s is a failure."""
    begun, message = time.process_time(), ""
    try:
        function()
    except UserError as error:
        message = str(error)
    except BaseException as error:
        raise AssertionError(what) from error
    assert "\n" not in message, what
    assert time.process_time() - begun < 10, what
    return not message


def inspect(arguments: list[str]) -> None:
    """What ``bitnet inspect`` prints, and the head of a run."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere:  # noqa: PTH123
        config = load_config(*split_args(arguments))
        for table in tables(config):
            Console(file=nowhere).print(table)
        resolved = config.resolve()
        print(one_line(resolved), *quantization_lines(resolved), file=nowhere)


def fuzz_configs(root: Path, count: int, seed: int) -> int:
    """Try ``count`` configs, files and overrides in turn; returns how many of them compute."""
    rng, worked = random.Random(seed), 0
    root.mkdir(exist_ok=True)
    path = root / "mine.toml"
    defaults = to_dict(Config())
    whole = [tomllib.loads(config.read_text(encoding="utf-8")) for config in CONFIGS]
    whole = [values for values in whole if "extends" not in values] + [defaults]
    for number in range(count):
        overrides = [odd_override(defaults, rng) for _ in range(rng.choice([1, 1, 2, 4]))]
        arguments = [str(CONFIGS[number % len(CONFIGS)]), *overrides]
        if number % 2:
            path.write_bytes(odd_toml(rng.choice(whole), rng))
            if rng.random() < 0.05:
                odd_file(path, rng)
            arguments = [str(path)]
        what = f"seed {seed}, config {number}: {arguments if len(arguments) > 1 else ''}"[:2000]
        worked += check(lambda: inspect(arguments), what)  # noqa: B023
        remove(path)
    return worked


def remove(path: Path) -> None:
    """Remove a path of any kind."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def odd_rows(rng: random.Random) -> bytes:
    """JSON lines, some of which are invalid or have no text."""
    rows = [b'{"text": "to be"}', b'{"text": null}', b'{"text": ""}', b'{"text": "\\ud800"}', b""]
    rows *= 3
    rows += [
        b'{"txt": "to be"}',
        b"[1]",
        b'{"text": 3}',
        b"{",
        b"[" * 9000,
        b"\xff",
        b"null",
        b"\0",
    ]
    return b"\n".join(rng.choices(rows, k=rng.choice([0, 1, 3])))


def odd_source(folder: Path, rng: random.Random) -> None:
    """A small file of some kind, or something else in its place, maybe with an odd name."""
    text = (WORDS * rng.choice([1, 100, 200])).encode()
    texts = [
        *(
            b"",
            b"\0",
            b"\xef\xbb\xbf",
            b"\n" * 99,
            b"\xff\xfe",
            "é".encode("latin-1"),
            b"\0" * 10**6,
        ),
        *(WORDS.encode("utf-16"), b"\xef\xbb\xbf" + text, text.replace(b" ", b"\0"), b"x" * 10**6),
        "\u2028\u2581\ufeff\x85\x1c".encode() * 99,
    ]
    content = rng.choice([text, text, rng.choice(texts)])
    kind = rng.choice([".txt", ".md", ".py", ".jsonl", ".parquet"])
    if kind == ".jsonl":
        content = odd_rows(rng)
    if kind == ".py" and rng.random() < 0.5:
        coding = rng.choice(["rot13", "punycode", "utf-7", "utf-16", "latin-1", "base64", "\0", ""])
        content = f"# coding: {coding}\n".encode() + content
    packers: dict[str, Callable[[bytes], bytes]] = {
        ".gz": gzip.compress,
        ".xz": lzma.compress,
        ".zst": zstandard.ZstdCompressor().compress,
    }
    name = f"f{rng.randrange(9)}{kind}".encode()
    if rng.random() < 0.2:
        ending = rng.choice(sorted(packers))
        content, name = packers[ending](content), name + ending.encode()
    if rng.random() < 0.2:
        name = rng.choice(ODD_NAMES)
    path = Path(os.fsdecode(os.path.join(os.fsencode(folder), name)))  # noqa: PTH118
    remove(path)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(damaged(content, rng) if rng.random() < 0.15 else content)
    what = rng.random()
    if what < 0.05:
        os.truncate(path, 3 * 10**6)  # the rest is zeros that take no space
    elif what < 0.1:
        path.chmod(0)
    elif what < 0.15:
        odd_file(path, rng)
    elif what < 0.2:
        remove(path)
        rng.choice([path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to(path.name)])()


def odd_folder(folder: Path, rng: random.Random) -> None:
    """A few such files, in folders and behind links, some of which are circular."""
    folder.mkdir(parents=True)
    good = rng.random() < 0.7
    if good:
        (folder / "good.txt").write_text(WORDS * 200)
    for _ in range(rng.choice([0, 1, 1, 2, 3])):
        odd_source(folder, rng)
    if rng.random() < 0.4:
        (folder / "sub").mkdir(exist_ok=True)
        odd_source(folder / "sub", rng)
        targets = [
            folder,
            folder / "sub",
            Path("loop"),
            Path("/dev"),
            Path("no"),
            Path("/proc/self"),
        ]
        (folder / "sub" / "loop").symlink_to(rng.choice(targets[:3] + targets[4:5]))


def fuzz_folders(root: Path, count: int, seed: int) -> int:
    """Prepare ``count`` folders; returns how many gave a prepared set."""
    rng, worked = random.Random(seed), 0
    root.mkdir(exist_ok=True)
    model = train_tokenizer([WORDS * 50], 300, root / "tokenizer.model", 1).path
    for number in range(count):
        folder, out = root / "texts", root / rng.choice(["out", "[/x]", "é😀", "a\nb", "-o", "[b]"])
        odd_folder(folder, rng)
        sources = [str(folder)]
        if rng.random() < 0.3:
            more = [
                "*",
                "**/*",
                "**/**",
                "[",
                "*.txt",
                "good.txt/..",
                "no",
                "\0",
                "?" * 300,
                "sub/../*",
            ]
            sources = [f"{folder}/{rng.choice(more)}"]
        options: dict[str, Any] = {"vocab_size": 0, "tokenizer": str(model)}
        if rng.random() < 0.1:
            options = {"vocab_size": rng.choice([260, 300, 70_000]), "tokenizer": ""}
        options["val_fraction"] = rng.choice([0.0, 0.0, 0.5, 1e-9, float("nan"), -1.0, 2.0])
        options["text_field"] = rng.choice(["", "", "text", "\0", "[x]"])

        def make() -> None:
            prepare_command(sources, "", str(out), **options)  # noqa: B023

        worked += check(make, f"seed {seed}, folder {number}: {sources}, {out}, {options}")
        remove(folder)
        remove(out)
    return worked
