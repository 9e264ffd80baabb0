"""Turn text into a prepared set (loader.py describes it): survey, tokenizer, tokens.

The sources are read twice. The *survey* counts, decides how to hold out validation text, and keeps
a sample for the tokenizer: the documents with the smallest hashes, so the order of sources and of
rows does not matter. The second pass tokenizes and writes.

*Validation split.* A document is held out if the hash of its text, as a fraction of the hash range,
is below ``val_fraction``. So a document and all its copies are always on the same side. With few
documents this may hold out nothing, or nearly everything. If it gives less than half or more than
twice the requested bytes, *passages* are held out instead: documents are cut at paragraphs into
parts of 2 to 4 Ki characters, each with its own hash; the parts between two held-out ones stay
together as a document. At least one passage is held out. A passage resembles the rest of its book
more than another book does, so the index records which of the two methods was used.

*Complete or not at all.* The set is written beside its final name, and renamed when all of it is on
disk. Under a lock, one process prepares; others that need the same set wait for it and use it. An
interrupted preparation starts over and removes the old files.

*Reuse.* A finished set is used again if its settings are the same; otherwise it is an error.
Changed source files are only reported: a set does not depend on them any more, and a resumed run
must see the same data as before.

*Mixtures.* Each part is a separate set, and all share one tokenizer: ``data.tokenizer``, or the
tokenizer of the first part already prepared, or one trained on a sample of all texts by weight.

*Memory* does not grow with the text: only the sample for the tokenizer (``max_tokenizer_mb``) and a
batch of documents are held.
"""

import dataclasses
import hashlib
import heapq
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, Literal, Self

import numpy as np
from filelock import FileLock, Timeout
from pydantic import TypeAdapter
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from bitnet.data.loader import (
    INDEX,
    VERSION,
    DataConfig,
    Index,
    Shard,
    Split,
    SplitName,
    read_index,
)
from bitnet.data.mixture import Source, shares
from bitnet.data.sources import HUB, cut, documents, local_files
from bitnet.data.tokenizer import Tokenizer, train_tokenizer
from bitnet.data.tokenizer_json import load_tokenizer, tokenizer_path
from bitnet.durable import new_folder
from bitnet.progress import Reports, plain_console
from bitnet.schema import UserError, check_file, user_input

_HASHES = 2**64
_PASSAGE = 2048
"""Smallest size of a passage, in characters."""
_BATCH = 2**23
"""Characters tokenized at once."""
_HUB_SURVEY = 4
"""The survey reads this multiple of the tokenizer's text from a Hugging Face dataset."""


def prepare(config: DataConfig, *, progress: bool = True) -> Path:
    """Make the prepared set of a config without tables, unless it exists.

    Arguments:
        config: the ``[data]`` section.
        progress: report on stderr.
    Returns:
        The folder of the set.
    Raises:
        UserError: a source or the tokenizer is missing or unreadable, there is too little text,
            or ``data.path`` holds something else.
        OSError: a file (named) cannot be written.
    """
    assert not config.is_mixture, "prepare_all() makes the sets of a mixture"
    _prepare(config, _given(config), _console(progress))
    return Path(config.path)


def prepare_all(config: DataConfig, *, progress: bool = True) -> list[Source]:
    """Make all prepared sets of a config that do not exist yet.

    Arguments: as for :func:`prepare`.
    Returns:
        ``config.mixture()``; each path is a prepared set.
    Raises:
        UserError: as :func:`prepare`; or the sets have different tokenizers.
        OSError: a file (named) cannot be written.
    """
    if not config.is_mixture:
        prepare(config, progress=progress)
        return config.mixture()
    console, parts, path = _console(progress), config.mixture(), Path(config.path)
    for part in parts:
        if not part.texts and not _exists(part):
            raise UserError(
                f"data.sources: {part.name!r}: {part.path} is not a prepared set, and there are no "
                "texts to make it from"
            )
        if Path(part.path).parent == path and (path / INDEX).exists():
            raise UserError(
                f"data.path: {path} is a prepared set; a mixture needs a folder of its own"
            )
    whole = all(_exists(part) for part in parts)
    with nullcontext() if whole else _locked(path, "mixture.lock", console):
        tokenizer = _given(config) or _common_tokenizer(config, parts, console)
        for part in parts:
            if part.texts:
                _prepare(_part_config(config, part), tokenizer, console)
            elif read_index(Path(part.path)).tokenizer_sha256 != tokenizer.hash:
                raise UserError(
                    f"data.sources: {part.name!r}: {part.path} has another tokenizer than "
                    f"{tokenizer.path}; the sets of a mixture share one: prepare it again with "
                    "that as data.tokenizer"
                )
    return parts


def _console(progress: bool) -> Console:
    return plain_console(stderr=True, quiet=not progress, highlight=False, soft_wrap=True)


def _given(config: DataConfig) -> Tokenizer | None:
    return load_tokenizer(config.tokenizer) if config.tokenizer else None


def _exists(part: Source) -> bool:
    return (Path(part.path) / INDEX).is_file()


def _part_config(config: DataConfig, part: Source) -> DataConfig:
    """The config of one part of a mixture."""
    field = part.text_field or config.text_field
    return dataclasses.replace(config, path=part.path, sources=part.texts, text_field=field)


def _common_tokenizer(config: DataConfig, parts: list[Source], console: Console) -> Tokenizer:
    """The tokenizer of the first part already prepared, or one trained on the texts of all parts.

    Raises:
        UserError: its vocabulary is not ``data.vocab_size``.
    """
    if found := next((part for part in parts if _exists(part)), None):
        tokenizer = load_tokenizer(tokenizer_path(Path(found.path)))
        if tokenizer.vocab_size != config.vocab_size:
            raise UserError(
                f"data.vocab_size = {config.vocab_size}, but {found.path} was prepared with "
                f"{tokenizer.vocab_size} tokens: set data.vocab_size = {tokenizer.vocab_size}, or "
                f"data.tokenizer = {str(tokenizer.path)!r}"
            )
        return tokenizer
    with _bars(console) as bars, tempfile.TemporaryDirectory() as folder:
        sample = list[str]()
        for part, share in zip(parts, shares([part.weight for part in parts]), strict=True):
            n_bytes = int(config.max_tokenizer_mb * 10**6 * share)
            sample += _survey(_part_config(config, part), n_bytes, bars).training_sample()
        return _trained(iter(sample), config, Path(folder) / Tokenizer.file_name, bars)


def _prepare(config: DataConfig, given: Tokenizer | None, console: Console) -> None:
    """Make one set, unless it exists."""
    path = Path(config.path)
    if _is_prepared(path, config, given, console):
        return
    with _locked(path, "lock", console):
        if not _is_prepared(path, config, given, console):
            with new_folder(path) as folder:
                index = _make(folder, config, given, console)
            console.print(f"prepared {_summary(path, index)}")


@contextmanager
def _locked(path: Path, ending: str, console: Console) -> Iterator[None]:
    """Hold a lock beside a folder; wait if another process holds it."""
    with user_input(f"data.path: {path}"):
        place = path.resolve()
        place.parent.mkdir(parents=True, exist_ok=True)
        lock_path = place.with_name(f".{place.name}.{ending}")
        lock_path.touch()  # raises for an unwritable folder, on which the code below would wait
        check_file(lock_path)
    lock = FileLock(lock_path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        console.print(f"waiting for another process that prepares {path}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _is_prepared(path: Path, config: DataConfig, given: Tokenizer | None, console: Console) -> bool:
    """Whether the set exists; raises UserError if something else is there."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return False
    if not (path / INDEX).exists():
        raise UserError(
            f"data.path: {path} exists and is not a prepared set; choose another data.path"
        )
    index = read_index(path)
    settings, there = _settings(config, given), index.settings
    if given and not there.get("tokenizer"):  # the set's own tokenizer may be the given one
        there = there | {"tokenizer": index.tokenizer_sha256}
    differences = [
        f"{key} is {there[key]!r} there and {settings[key]!r} here"
        for key in settings
        if key in there and there[key] != settings[key]
    ]
    if differences:
        raise UserError(
            f"data.path: {path} was prepared with other settings: {'; '.join(differences)}; "
            "delete the folder or choose another data.path, or give the settings that it has"
        )
    console.print(f"using {_summary(path, index)}")
    try:
        changed = _digest(local_files(config.texts)) != index.sources_digest
    except UserError:  # the sources are gone, but not needed
        changed = False
    if changed:
        console.print(
            f"note: files of data.sources have changed since; delete {path} to prepare it again"
        )
    return True


def _settings(config: DataConfig, given: Tokenizer | None) -> dict[str, Any]:
    """The settings that determine the contents of a set, with the hash of a given tokenizer."""

    def text(name: str) -> str:  # JSON cannot hold the lone surrogates of a non-UTF-8 file name
        return name.encode(errors="backslashreplace").decode()

    settings: dict[str, Any] = {
        "sources": [text(source) for source in config.texts],
        "text_field": text(config.text_field),
        "val_fraction": config.val_fraction,
        "tokenizer": given.hash if given else "",
    }
    if given is None:
        settings |= {"vocab_size": config.vocab_size, "max_tokenizer_mb": config.max_tokenizer_mb}
    return settings


def _digest(files: Iterable[Path]) -> str:
    entries = sorted(f"{file.stat().st_size} {file.name}" for file in files)
    # a name that is not UTF-8 has lone surrogates
    return hashlib.blake2b(os.fsencode("\0".join(entries)), digest_size=16).hexdigest()


def _summary(path: Path, index: Index) -> str:
    train, val = index.splits["train"], index.splits["val"]
    return (
        f"{path}: train {decimal(train.n_bytes)}, {train.n_tokens:,} tokens; validation "
        f"{decimal(val.n_bytes)} in whole {index.held_out}, {val.n_tokens:,} tokens; "
        f"{train.n_bytes / train.n_tokens:.2f} bytes per token, vocabulary {index.vocab_size:,}"
    )


def _make(folder: Path, config: DataConfig, given: Tokenizer | None, console: Console) -> Index:
    """Write a whole set into an empty folder, its index last."""
    left_out: Counter[str] = Counter()
    digest = _digest(local_files(config.texts, left_out))
    if left_out.total():
        kinds = ", ".join(f"{count} {kind}" for kind, count in left_out.most_common(8) if count)
        console.print(f"note: not read in the folders of data.sources: {kinds}")
    with _bars(console) as bars:
        survey = _survey(config, 0 if given else config.max_tokenizer_mb * 10**6, bars)
        model = folder / (given or Tokenizer).file_name
        if given:
            model.write_bytes(given.model_bytes)
            tokenizer = load_tokenizer(model)
        else:
            tokenizer = _trained(survey.training_sample(), config, model, bars)
        dtype: Literal["uint16", "uint32"] = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
        splits = _tokenize(folder, config, tokenizer, np.dtype(dtype), survey, bars)
    index = Index(
        version=VERSION,
        dtype=dtype,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        tokenizer_sha256=tokenizer.hash,
        held_out=survey.held_out.unit,
        sources_digest=digest,
        settings=_settings(config, given),
        splits=splits,
    )
    with _naming(folder / INDEX):
        (folder / INDEX).write_bytes(TypeAdapter(Index).dump_json(index, indent=1))
    return index


def _bars(console: Console) -> Reports:
    return Reports(
        TextColumn("{task.description:>18}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=console,
    )


def _trained(texts: Iterator[str], config: DataConfig, model: Path, bars: Progress) -> Tokenizer:
    bar = bars.add_task("training tokenizer", total=None)
    tokenizer = train_tokenizer(texts, config.vocab_size, model, config.threads)
    bars.remove_task(bar)
    return tokenizer


@dataclass(frozen=True)
class _HeldOut:
    """Decides which parts of a text are held out for validation."""

    unit: Literal["documents", "passages"]
    threshold: int

    def divide(self, text: str) -> Iterator[tuple[SplitName, str]]:
        """Divide a document of the sources into documents of the splits, in order."""
        parts = [text] if self.unit == "documents" else cut(text, _PASSAGE)
        for held_out, run in groupby(parts, lambda part: _hash(part) < self.threshold):
            yield "val" if held_out else "train", "".join(run)


@dataclass(frozen=True)
class _Survey:
    """The results of the first pass."""

    n_bytes: int
    held_out: _HeldOut
    sample: list[str]

    def training_sample(self) -> Iterator[str]:
        """The sample without held-out text."""
        parts = (part for text in self.sample for part in self.held_out.divide(text))
        return (text for split, text in parts if split == "train")


def _survey(config: DataConfig, sample_bytes: int, bars: Progress) -> _Survey:
    """Read all local documents, and the first documents of a Hugging Face dataset.

    Raises:
        UserError: there is no text, or too little to split.
    """
    bar = bars.add_task("reading", total=None)
    hub_bytes = _HUB_SURVEY * config.max_tokenizer_mb * 10**6
    threshold = int(config.val_fraction * _HASHES)
    n_bytes = held_out_bytes = kept_bytes = 0
    lowest, highest = _HASHES, -1
    kept: list[tuple[int, str]] = []  # a heap, the largest hash first
    left_out: Counter[str] = Counter()
    for text in documents(config.texts, config.text_field, hub_bytes, left_out):
        size = len(text.encode())
        n_bytes += size
        held_out_bytes += size if _hash(text) < threshold else 0
        for passage in cut(text, _PASSAGE):
            lowest, highest = min(lowest, _hash(passage)), max(highest, _hash(passage))
        if sample_bytes:
            heapq.heappush(kept, (-_hash(text, b"sample"), text))
            kept_bytes += size
            while kept_bytes - (greatest := len(kept[0][1].encode())) >= sample_bytes:
                heapq.heappop(kept)
                kept_bytes -= greatest
        bars.advance(bar, size)
    if not n_bytes:
        raise UserError(f"data.sources: there is no text in {', '.join(config.texts)}")
    bars.update(bar, total=n_bytes)
    if without_text := left_out["without text"]:
        bars.console.print(f"note: {without_text} documents have no text (blanks or null)")

    share = held_out_bytes / n_bytes
    if config.val_fraction / 2 <= share <= config.val_fraction * 2 and share < 1:
        held_out = _HeldOut("documents", threshold)
    elif lowest < highest:
        held_out = _HeldOut("passages", min(max(threshold, lowest + 1), highest))
    else:
        raise UserError(
            f"data.sources: {n_bytes} bytes of text are too little for a training and a "
            f"validation split; {4 * _PASSAGE} and more are needed"
        )
    return _Survey(n_bytes, held_out, [text for _, text in sorted(kept, reverse=True)])


def _hash(text: str, purpose: bytes = b"split") -> int:
    """A hash below 2^64. ``purpose`` makes the sample's hash differ from the split's: the documents
    with the smallest split hashes are all in the validation split."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=purpose).digest()
    return int.from_bytes(digest, "little")


def _tokenize(
    folder: Path,
    config: DataConfig,
    tokenizer: Tokenizer,
    dtype: np.dtype,
    survey: _Survey,
    bars: Progress,
) -> dict[SplitName, Split]:
    streamed = any(source.startswith(HUB) for source in config.texts)
    bar = bars.add_task("tokenizing", total=None if streamed else survey.n_bytes)
    with (
        _SplitWriter(folder, "train", dtype, config.shard_tokens) as train,
        _SplitWriter(folder, "val", dtype, config.shard_tokens) as val,
    ):
        texts = documents(config.texts, config.text_field)
        for batch in _batches(part for text in texts for part in survey.held_out.divide(text)):
            encoded = tokenizer.encode_batch([text for _, text in batch], config.threads)
            for (split, text), tokens in zip(batch, encoded, strict=True):
                n_bytes = len(text.encode())
                writer = train if split == "train" else val
                writer.append([*tokens, tokenizer.eos_id], n_bytes)
                bars.advance(bar, n_bytes)
        return {"train": train.finish(), "val": val.finish()}


def _batches(
    parts: Iterable[tuple[SplitName, str]],
) -> Iterator[list[tuple[SplitName, str]]]:
    batch, size = [], 0
    for part in parts:
        batch.append(part)
        size += len(part[1])
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _SplitWriter:
    """Appends documents to the shards of one split; a document may span two shards."""

    def __init__(self, folder: Path, split: SplitName, dtype: np.dtype, shard_tokens: int) -> None:
        self._folder, self._split = folder, split
        self._dtype, self._shard_tokens = dtype.newbyteorder("<"), shard_tokens
        self._n_bytes = self._n_documents = 0
        self._shards: list[Shard] = []
        self._file: BinaryIO | None = None
        self._path = folder
        self._sha256 = hashlib.sha256()
        self._filled = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            with _naming(self._path):  # closing tries again to write the buffer
                self._file.close()

    def append(self, tokens: list[int], n_bytes: int) -> None:
        """Add a document with ``n_bytes`` bytes of text."""
        self._n_bytes += n_bytes
        self._n_documents += 1
        rest = np.array(tokens, dtype=self._dtype)
        while len(rest):
            if self._file is None:
                self._path = self._folder / f"{self._split}_{len(self._shards):05d}.bin"
                self._file = self._path.open("wb")
                self._sha256, self._filled = hashlib.sha256(), 0
            taken = rest[: self._shard_tokens - self._filled].tobytes()
            with _naming(self._path):
                self._file.write(taken)
            self._sha256.update(taken)
            count = len(taken) // self._dtype.itemsize
            self._filled, rest = self._filled + count, rest[count:]
            if self._filled == self._shard_tokens:
                self._end_shard()

    def finish(self) -> Split:
        """Close the last shard.

        Raises:
            UserError: nothing was appended.
        """
        if self._file:
            self._end_shard()
        if not self._shards:
            raise UserError(
                f"data.sources: no text for the {self._split} split; change data.val_fraction or "
                "add text"
            )
        n_tokens = sum(shard.n_tokens for shard in self._shards)
        return Split(n_tokens, self._n_bytes, self._n_documents, self._shards)

    def _end_shard(self) -> None:
        assert self._file is not None
        with _naming(self._path):
            self._file.close()
        self._file = None
        self._shards.append(Shard(self._path.name, self._filled, self._sha256.hexdigest()))


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Add the file's name to an OSError from writing to an open file (a full disk)."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
