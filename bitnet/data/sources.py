"""Read text: from files, globs, folders, the standard library, Hugging Face datasets.

All sources become a stream of documents (str), never all in memory at once. A .txt, .md or .py file
is one document, and so is a row of .jsonl, .parquet or a Hugging Face dataset. File endings may be
in upper case. The stream depends only on the sources: folders are walked in sorted order, following
links, and a file or folder reached twice, such as through a cycle of links, is read once.

Silently omitted text would be noticed only after training. So a folder that cannot be listed is an
error, and so is a text file that cannot be read or a broken link. Hidden files, ``__pycache__``,
files with other endings and documents without text are left out and counted.

Files are UTF-8 (a byte order mark is dropped); a .py file's coding line may name another encoding.
Anything else is an error that names the file, as is a damaged or truncated archive. Two things are
repaired. Lone surrogates, which JSON allows and UTF-8 does not, become U+FFFD. Documents longer
than 2 Mi characters are cut at a paragraph, so that a dump in one file neither fills the memory nor
is all in one split.
"""

import io
import json
import lzma
import math
import os
import sysconfig
import tokenize
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Any

import zstandard

from bitnet.schema import UserError, check_file, nearest, user_input

STDLIB = "python-stdlib"
HUB = "hf:"
_KINDS = (".txt", ".md", ".py", ".jsonl", ".parquet")
_COMPRESSIONS: dict[str, Callable[[], Any]] = {
    ".gz": lambda: zlib.decompressobj(wbits=31),  # with gzip's header and checksum
    ".xz": lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ),
    ".zst": lambda: zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj(),
}
"""Ending -> a decompressor of one member (gzip), stream (xz) or frame (zstd)."""
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test"} | {
    "encodings",  # generated tables, not written code; a sixth of the library
    "pydoc_data",
}
_MAGIC = "*?["
_MAX_DOCUMENT = 2**21
_MAX_ROW = 2**27
"""Most characters of a .jsonl row, and most bytes of a .py file."""
_BLOCK = 2**20
_HOLE = "\0" * _BLOCK
_PACKED_BLOCK = 2**12
"""Bytes decompressed at once: 4 KiB of a hostile archive give at most 128 MiB of zeros."""
_MAX_PADDING = 2**12
"""Most blocks of zeros between an archive's members, or after the last one."""


def local_files(sources: Sequence[str], left_out: Counter[str] | None = None) -> list[Path]:
    """The files of the local sources, each once, in order.

    Arguments:
        sources: as ``DataConfig.sources``.
        left_out: counts the files in folders that are not read, by kind (".csv", "hidden", ...).
    Raises:
        UserError: a source is missing (the error gives the nearest name), is of an unknown kind,
            holds no file, or cannot be read.
    """
    return [item for item in _in_order(sources, left_out) if isinstance(item, Path)]


def documents(
    sources: Sequence[str],
    field: str,
    hub_bytes: float = math.inf,
    left_out: Counter[str] | None = None,
) -> Iterator[str]:
    """The documents of all sources, in order: none empty, none with a lone surrogate.

    Arguments:
        sources: as ``DataConfig.sources``.
        field: the field of a row that holds the text.
        hub_bytes: read about this much of each Hugging Face dataset (a second pass downloads it
            again).
        left_out: counts documents that are blank or null.
    Raises:
        UserError: a source is missing, unreadable, damaged, or has no such field.
    """
    for item in _in_order(sources):
        if isinstance(item, Path):
            texts = _file_texts(item, field)
        else:
            texts = _limited(_hub_rows(item, field), hub_bytes)
        for text in texts:
            if left_out is not None and not text.strip():
                left_out["without text"] += 1
            for part in cut(_encodable(text), _MAX_DOCUMENT):
                if part.strip():
                    yield part


def cut(text: str, size: int) -> Iterator[str]:
    """Cut a text into parts of ``size`` to ``2 * size`` characters, the last possibly shorter.

    A part ends at the end of a paragraph if there is one in that range, else of a line, else of a
    word, else anywhere. The joined parts are the text.
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


def _in_order(sources: Sequence[str], left_out: Counter[str] | None = None) -> Iterator[Path | str]:
    """The files, and Hugging Face sources unchanged, in the order of the sources."""
    seen: set[str] = set()
    for source in sources:
        if source.startswith(HUB):
            yield source
            continue
        with user_input(f"data.sources: {source!r}"):
            found = _files(source, Counter() if left_out is None else left_out)
        for path in found:
            if (real := os.path.realpath(path)) not in seen:
                seen.add(real)
                yield path


def _files(source: str, left_out: Counter[str]) -> list[Path]:
    if source == STDLIB:
        library = Path(sysconfig.get_path("stdlib"))
        return _walk(library, (".py",), _NOT_LIBRARY, Counter())
    path = Path(source)
    if source.startswith("~") and not path.exists():
        path = path.expanduser()
    if path.is_dir():
        endings = tuple(kind + end for kind in _KINDS for end in ("", *_COMPRESSIONS))
        return _walk(path, endings, set(), left_out)
    if path.exists() or path.is_symlink():
        found = [path]
    elif any(sign in source for sign in _MAGIC):
        parts = path.relative_to(path.anchor).parts
        found = sorted(set(_matching(Path(path.anchor), parts, frozenset())))
    else:
        raise _missing(source, path)
    if not found:
        raise UserError(f"data.sources: no file matches {source!r}")
    for file in found:
        check_file(file)
        if _kind(file) not in _KINDS:
            raise UserError(
                f"data.sources: {file}: cannot tell what it holds; expected {', '.join(_KINDS)}, "
                f"text kinds also with {', '.join(_COMPRESSIONS)}"
            )
    return found


def _matching(folder: Path, parts: Sequence[str], above: frozenset[Path]) -> Iterator[Path]:
    """The files below a folder that match the pattern ``parts``, as ``glob`` defines it (``**``:
    any folders; a hidden name only if the pattern has its dot). Unlike ``glob`` it raises OSError
    if a folder cannot be listed, and enters a cycle of links only once.

    Arguments:
        above: the real paths of the folders that a ``**`` has entered.
    """
    if not parts:
        if not folder.is_dir():
            yield folder
        return
    first, rest = parts[0], parts[1:]
    if first == "**":
        yield from _matching(folder, rest or "*", above)
        for name in sorted(os.listdir(folder)):  # noqa: PTH208 - as names, to match them
            child, real = folder / name, Path(os.path.realpath(folder / name))
            if name[0] != "." and child.is_dir() and real not in above:
                yield from _matching(child, parts, above | {real})
    elif any(sign in first for sign in _MAGIC):
        for name in sorted(os.listdir(folder)):  # noqa: PTH208
            visible = name[0] != "." or first[0] == "."
            if visible and fnmatchcase(name, first) and (not rest or (folder / name).is_dir()):
                yield from _matching(folder / name, rest, above)
    elif os.path.lexists(folder / first) and (not rest or (folder / first).is_dir()):
        yield from _matching(folder / first, rest, above)


def _walk(
    folder: Path, endings: tuple[str, ...], no_folders: set[str], left_out: Counter[str]
) -> list[Path]:
    """The files with these endings in sorted order, a folder's own files before its subfolders'."""
    found: list[Path] = []
    walked: set[tuple[int, int]] = set()
    for root, folders, names in os.walk(folder, onerror=_refuse_folder, followlinks=True):
        status = Path(root).stat()
        if (status.st_dev, status.st_ino) in walked:  # two links, or a link to a folder above
            folders.clear()
            continue
        walked.add((status.st_dev, status.st_ino))
        hidden = {name for name in (*folders, *names) if name[0] == "."}
        left_out["hidden"] += len(hidden)
        folders[:] = sorted(set(folders) - hidden - {"__pycache__"} - no_folders)
        for name in sorted(set(names) - hidden):
            path = Path(root, name)
            if name.lower().endswith(endings):
                check_file(path)
                found.append(path)
            else:
                left_out[path.suffix or "without an ending"] += 1
    if not found:
        raise UserError(f"data.sources: the folder {folder} holds no {', '.join(_KINDS)} file")
    return found


def _refuse_folder(error: OSError) -> None:
    raise UserError(f"data.sources: {error.filename}: {error.strerror}") from error


def _missing(source: str, path: Path) -> UserError:
    parent, name = path.parent, path.name
    while not parent.is_dir():
        parent, name = parent.parent, parent.name
    candidates = [entry.name for entry in parent.iterdir()]
    near = nearest(name, candidates) or nearest(source, [STDLIB])
    hint = f"; did you mean {near!r}?" if near else ""
    if source.count("/") == 1 and not path.suffix:
        hint += f" (a Hugging Face dataset is written {HUB}{source})"
    return UserError(f"data.sources: no {name!r} in {parent.resolve()}, for {source!r}{hint}")


def _kind(path: Path) -> str:
    path = Path(path.name.lower())
    return path.with_suffix("").suffix if path.suffix in _COMPRESSIONS else path.suffix


def _file_texts(path: Path, field: str) -> Iterator[str]:
    kind = _kind(path)
    check_file(path)
    with user_input(str(path)), _explained(path):
        if kind == ".parquet":
            yield from _parquet_rows(path, field)
            return
        with _open(path) as stream:
            if kind == ".py":
                yield _python_text(stream.read(_MAX_ROW + 1))
                return
            newline = "\n" if kind == ".jsonl" else ""  # neither translates line ends
            with io.TextIOWrapper(stream, "utf-8-sig", newline=newline) as text:
                yield from _json_rows(path, text, field) if kind == ".jsonl" else _blocks(text)


def _python_text(source: bytes) -> str:
    """Decode a Python file by its coding line. Raises ValueError for an encoding that changes
    ASCII, since Python source cannot have one."""
    if len(source) > _MAX_ROW:
        raise ValueError(f"is no Python source: it has more than {_MAX_ROW:,} bytes")
    encoding, _ = tokenize.detect_encoding(io.BytesIO(source).readline)
    ascii_line = b"# -*- coding: x.xn--bcher-kva -*-"  # punycode and idna read "ü" in it
    if ascii_line.decode(encoding) != ascii_line.decode():
        raise ValueError(f"{encoding} is no encoding of Python source")
    return source.decode(encoding)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn the decoders' errors into one line that names the file."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: is not {error.encoding} ({error.reason}); convert it, such as with "
            "`iconv -f latin1 -t utf-8`, or leave it out of data.sources"
        ) from error
    except SyntaxError as error:  # a .py file's coding line
        raise UserError(f"{path}: {error.msg} (without one, a .py file is UTF-8)") from error
    except (EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError) as error:
        raise UserError(f"{path}: damaged or truncated: {error}") from error


def _open(path: Path) -> IO[bytes]:
    """The file's bytes, decompressed."""
    decoder = _COMPRESSIONS.get(path.suffix.lower())
    return io.BufferedReader(_Decompressed(path, decoder)) if decoder else path.open("rb")


class _Decompressed(io.RawIOBase):
    """Reads all members of an archive, and raises if one is incomplete.

    The readers of the standard library and of zstandard accept some broken archives: an empty file
    (.gz, .zst), a truncated last frame (.zst), a damaged second stream (.xz).
    """

    def __init__(self, path: Path, decoder: Callable[[], Any]) -> None:
        self._file = path.open("rb")
        self._blocks = self._decompressed(decoder)
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

    def _decompressed(self, decoder: Callable[[], Any]) -> Iterator[bytes]:
        member, members, padding = None, 0, 0
        while block := self._file.read(_PACKED_BLOCK):
            while block:
                if member is None:
                    # gzip and xz allow zeros between members as padding
                    if members and not (block := block.lstrip(b"\0")):
                        if (padding := padding + 1) > _MAX_PADDING:
                            raise EOFError("it ends in zeros, more than padding has")
                        break
                    padding = 0
                    member, members = decoder(), members + 1
                yield member.decompress(block)
                block, member = (member.unused_data, None) if member.eof else (b"", member)
        if member or not members:
            raise EOFError("its end is missing" if members else "it has no bytes")


def _blocks(stream: io.TextIOWrapper) -> Iterator[str]:
    rest = ""
    while block := stream.read(_BLOCK):
        if block == _HOLE:
            raise ValueError("is no text: it has a mebibyte of zeros (an unfinished download?)")
        *whole, rest = cut(rest + block, _MAX_DOCUMENT)
        yield from whole
    yield rest


def _json_rows(path: Path, stream: io.TextIOWrapper, field: str) -> Iterator[str]:
    lines = iter(lambda: stream.readline(_MAX_ROW), "")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        if len(line) == _MAX_ROW:
            raise UserError(f"{where}: the row has {_MAX_ROW:,} characters or more")
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
    except Exception as error:  # from datasets, huggingface_hub, httpx, fsspec, ...
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
    """A row's text; "" for null."""
    if field not in row:
        near = nearest(field, row)
        hint = f"; did you mean data.text_field = {near!r}?" if near else ""
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
