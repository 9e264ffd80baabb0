"""Where text comes from: files, globs, folders, the standard library, Hugging Face datasets.

Everything becomes a stream of documents (str), never held in memory together. A .txt, .md or .py
file is one document, a row of .jsonl or .parquet or of a Hugging Face dataset is one. What is read
depends on the sources and nothing else: folders are walked in sorted order, hidden folders and
``__pycache__`` left out, and a file reached twice is read once.

Files are UTF-8 (a byte order mark is dropped) and .py files what their coding line says. Anything
else is an error that names the file, as is a damaged or a truncated archive: text that is replaced
or left out silently is missed only after the training. Two repairs are made: lone surrogates, which
JSON can carry and UTF-8 cannot, become U+FFFD, and documents beyond 2 Mi characters are cut at a
paragraph, so that a dump in one file neither fills the memory nor lands in one split.
"""

import gzip
import io
import json
import lzma
import math
import os
import sysconfig
import tokenize
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from glob import glob
from pathlib import Path
from typing import IO, Any

import zstandard

from bitnet.schema import UserError

STDLIB = "python-stdlib"
HUB = "hf:"
_KINDS = (".txt", ".md", ".py", ".jsonl", ".parquet")
_COMPRESSIONS = (".gz", ".xz", ".zst")
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test"} | {
    "encodings",  # generated tables, not code that somebody wrote: a sixth of the library
    "pydoc_data",
}
_MAX_DOCUMENT = 2**21
_BLOCK = 2**20


def local_files(sources: Sequence[str]) -> list[Path]:
    """The files that the local ones of some sources name, each once, in order.

    Raises:
        UserError: one is missing (the nearest name is given), is of no known kind, or holds none.
    """
    local = (source for source in sources if not source.startswith(HUB))
    return list({path.resolve(): path for source in local for path in _files(source)}.values())


def documents(sources: Sequence[str], field: str, hub_bytes: float = math.inf) -> Iterator[str]:
    """The documents of all sources, in order: none empty, none with a lone surrogate.

    Arguments:
        sources: as ``DataConfig.sources``.
        field: which field of a row holds the text.
        hub_bytes: read about this much of each Hugging Face dataset (a second pass over one is a
            second download).
    Raises:
        UserError: a source is missing, unreadable, damaged, or has no such field.
        OSError: of reading.
    """
    for item in _in_order(sources):
        if isinstance(item, Path):
            texts = _file_texts(item, field)
        else:
            texts = _limited(_hub_rows(item, field), hub_bytes)
        for text in texts:
            for part in cut(_encodable(text), _MAX_DOCUMENT):
                if part.strip():
                    yield part


def cut(text: str, size: int) -> Iterator[str]:
    """Cut a text into parts of ``size`` to ``2 * size`` characters, the last maybe shorter.

    A part ends with a paragraph if one ends in that range, or else with a line, or a word, or
    anywhere. Joined, the parts are the text.
    """
    start = 0
    while len(text) - start > 2 * size:
        end = start + 2 * size
        for separator in ("\n\n", "\n", " "):
            if (found := text.find(separator, start + size, end)) >= 0:
                end = found + len(separator)
                break
        yield text[start:end]
        start = end
    yield text[start:]


def _in_order(sources: Sequence[str]) -> Iterator[Path | str]:
    """Files, and Hugging Face sources as they are written."""
    seen: set[Path] = set()
    for source in sources:
        if source.startswith(HUB):
            yield source
            continue
        for path in _files(source):
            if (real := path.resolve()) not in seen:
                seen.add(real)
                yield path


def _files(source: str) -> list[Path]:
    if source == STDLIB:
        return _walk(Path(sysconfig.get_path("stdlib")), (".py",), _NOT_LIBRARY)
    path = Path(source).expanduser()
    if path.is_dir():
        endings = tuple(kind + end for kind in _KINDS for end in ("", *_COMPRESSIONS))
        return _walk(path, endings, set())
    if path.exists():
        found = [path]
    elif any(sign in source for sign in "*?["):
        names = glob(str(path), recursive=True)  # noqa: PTH207 - Path.glob takes no absolute path
        found = [Path(name) for name in sorted(names) if Path(name).is_file()]
    else:
        raise _missing(source, path)
    if not found:
        raise UserError(f"data.sources: no file matches {source!r}")
    for file in found:
        if _kind(file) not in _KINDS:
            raise UserError(
                f"data.sources: {file}: cannot tell what it holds; expected {', '.join(_KINDS)}, "
                f"text kinds also with {', '.join(_COMPRESSIONS)}"
            )
    return found


def _walk(folder: Path, endings: tuple[str, ...], left_out: set[str]) -> list[Path]:
    found = []
    for root, folders, names in os.walk(folder):
        skipped = {name for name in folders if name[0] == "."} | {"__pycache__"} | left_out
        folders[:] = sorted(set(folders) - skipped)
        chosen = sorted(name for name in names if name.endswith(endings) and name[0] != ".")
        found += [path for name in chosen if (path := Path(root, name)).is_file()]
    if not found:
        raise UserError(f"data.sources: the folder {folder} holds no {', '.join(_KINDS)} file")
    return found


def _missing(source: str, path: Path) -> UserError:
    parent, name = path.parent, path.name
    while not parent.is_dir():
        parent, name = parent.parent, parent.name
    candidates = [entry.name for entry in parent.iterdir()]
    near = get_close_matches(name, candidates, 1) or get_close_matches(source, [STDLIB], 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    if source.count("/") == 1 and not path.suffix:
        hint += f" (a Hugging Face dataset is written {HUB}{source})"
    return UserError(f"data.sources: no {name!r} in {parent.resolve()}, for {source!r}{hint}")


def _kind(path: Path) -> str:
    return path.with_suffix("").suffix if path.suffix in _COMPRESSIONS else path.suffix


def _file_texts(path: Path, field: str) -> Iterator[str]:
    kind = _kind(path)
    with _explained(path):
        if kind == ".parquet":
            yield from _parquet_rows(path, field)
            return
        with _open(path) as stream:
            if kind == ".py":
                source = stream.read()
                encoding, _ = tokenize.detect_encoding(io.BytesIO(source).readline)
                yield source.decode(encoding)
                return
            newline = "\n" if kind == ".jsonl" else ""  # of neither is any translated
            with io.TextIOWrapper(stream, "utf-8-sig", newline=newline) as text:
                yield from _json_rows(path, text, field) if kind == ".jsonl" else _blocks(text)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """One line that names the file for what the decoders raise."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: is not {error.encoding} ({error.reason}); convert it, such as with "
            "`iconv -f latin1 -t utf-8`, or leave it out of data.sources"
        ) from error
    except SyntaxError as error:  # a .py file's coding line
        raise UserError(f"{path}: {error.msg} (without one, a .py file is UTF-8)") from error
    except (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError, zstandard.ZstdError) as error:
        raise UserError(f"{path}: damaged or truncated: {error}") from error


def _open(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return io.BufferedReader(gzip.open(path))
    if path.suffix == ".xz":
        return lzma.open(path)
    if path.suffix == ".zst":
        return io.BufferedReader(_Zstandard(path.open("rb")))
    return path.open("rb")


class _Zstandard(io.RawIOBase):
    """Reads all frames of a file; zstandard's own reader takes a truncated file for a whole one."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._blocks = self._decompressed()
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            if (block := next(self._blocks, None)) is None:
                return 0
            self._rest = memoryview(block)
        size = min(len(buffer), len(self._rest))
        buffer[:size], self._rest = self._rest[:size], self._rest[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()

    def _decompressed(self) -> Iterator[bytes]:
        frame = None
        while block := self._file.read(_BLOCK):
            while block:
                frame = frame or zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
                yield frame.decompress(block)
                block, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
        if frame:
            raise EOFError("the last frame is not whole")


def _blocks(stream: io.TextIOWrapper) -> Iterator[str]:
    rest = ""
    while block := stream.read(_BLOCK):
        *whole, rest = cut(rest + block, _MAX_DOCUMENT)
        yield from whole
    yield rest


def _json_rows(path: Path, lines: Iterable[str], field: str) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise UserError(f"{where}: expected a JSON object, got {type(row).__name__}")
        yield _text_of(row, field, where)


def _parquet_rows(path: Path, field: str) -> Iterator[str]:
    try:
        import pyarrow as arrow
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise _missing_extra(str(path), "pyarrow") from error
    try:
        with ParquetFile(path) as file:
            names = file.schema_arrow.names
            if field not in names:
                _text_of(dict.fromkeys(names), field, str(path))
            for batch in file.iter_batches(batch_size=1024, columns=[field]):
                for value in batch.column(0).to_pylist():
                    yield _text_of({field: value}, field, str(path))
    except (arrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(f"{path}: damaged or truncated: {_first_line(error)}") from error


def _hub_rows(source: str, field: str) -> Iterator[str]:
    name, _, config = source.removeprefix(HUB).partition(":")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise _missing_extra(source, "datasets") from error
    try:
        for row in load_dataset(name, config or None, split="train", streaming=True):
            yield _text_of(row, field, source)
    except UserError:
        raise
    except Exception as error:  # of datasets, huggingface_hub, httpx, fsspec, ...
        raise UserError(
            f"data.sources: cannot read {source!r}: {type(error).__name__}: {_first_line(error)}"
        ) from error


def _limited(texts: Iterable[str], n_bytes: float) -> Iterator[str]:
    for text in texts:
        yield text
        n_bytes -= len(text)
        if n_bytes <= 0:
            return


def _text_of(row: Mapping[str, Any], field: str, where: str) -> str:
    """A row's text; null is no text."""
    if field not in row:
        near = get_close_matches(field, list(row), 1)
        hint = f"; did you mean data.text_field = {near[0]!r}?" if near else ""
        has = ", ".join(repr(name) for name in row) or "none"
        raise UserError(f"{where}: no field {field!r} (data.text_field); there is {has}{hint}")
    value = row[field]
    if value is not None and not isinstance(value, str):
        raise UserError(f"{where}: field {field!r} is no text but {type(value).__name__}")
    return value or ""


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


def _missing_extra(source: str, package: str) -> UserError:
    return UserError(f"{source}: needs {package}; install it: pip install {package}")
