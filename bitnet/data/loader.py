"""Prepared tokens on disk, and the batch of each training step.

A prepared set (prepare.py writes it) is a folder:

    index.json         counts and checksums of the other files, and the settings of the set
    tokenizer.model    the tokenizer of the ids (tokenizer.json for a tokenizer of that kind)
    train_00000.bin    the documents' ids, one after the other, each document ended by EOS:
    val_00000.bin      little-endian uint16, or uint32 if the vocabulary needs it

Training reads windows of ``seq_len + 1`` tokens at a stride of ``seq_len`` (inputs, and the same
tokens shifted by one as targets), so in an epoch each token is a target once. Documents are not
padded; attention sees earlier documents unless ``document_mask`` keeps documents apart (``apart``
in bitnet/model.py). A run may mix several sets, each with a share of the sequences (mixture.py).

The order of the windows is a keyed permutation of their numbers, different in each epoch. It is
computed only for the windows of a batch and never stored. So a batch is a pure function of
(seed, step). There is no shuffle buffer, no worker and no state in a checkpoint. A resumed run sees
the same batches as an uninterrupted run, and any number of processes divides the same batch. The
permutation is a Feistel network (Luby and Rackoff, 1988) over the least 4^h >= n, applied again
until the result is below n. It uses only integer arithmetic, so it is the same on every machine.
"""

import hashlib
import json
import os
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from torch import Tensor

from bitnet.data.mixture import Schedule, Source, completed, source_tables
from bitnet.data.tokenizer import Tokenizer, read_model
from bitnet.data.tokenizer_json import load_tokenizer, tokenizer_path
from bitnet.durable import sha256
from bitnet.schema import STRICT, Count, Positive, UserError, read_file

INDEX = "index.json"
VERSION: Literal[1] = 1
"""Version of the folder's format."""
SplitName = Literal["train", "val"]


@dataclass(frozen=True, config=STRICT)
class DataConfig:
    """The ``[data]`` section: the text, its tokenizer, its validation split, and the windows."""

    path: Annotated[str, Field(min_length=1)] = "data/python-stdlib"
    """folder of the prepared data; created (as by `bitnet prepare`) if it is missing"""
    sources: Annotated[
        list[str] | list[Source], BeforeValidator(source_tables), Field(min_length=1)
    ] = Field(default_factory=lambda: ["python-stdlib"])
    """files, globs and folders of .txt, .md, .py, .jsonl (each also .gz, .xz, .zst) and .parquet;
    "python-stdlib": the standard library's own source; "hf:NAME" or "hf:NAME:CONFIG": the train
    split of a Hugging Face dataset, streamed. Or a mixture: one table [[data.sources]] per part,
    with name, path (of prepared data) or texts (a list as above, prepared in path or in
    data.path/NAME), weight (its share of the training sequences, relative to the others) and
    text_field"""
    text_field: str = "text"
    """field of .jsonl, .parquet and Hugging Face rows that holds the text"""
    tokenizer: str = ""
    """a sentencepiece model file, or a byte-level BPE tokenizer.json (with the hf extra); "" =
    train one on the training split"""
    vocab_size: Annotated[int, Field(ge=260, le=2**24)] = 8192
    """tokens of the tokenizer to train, including 256 bytes; a given tokenizer has its own size"""
    max_tokenizer_mb: Positive = 100
    """megabytes of text, sampled from all of it, to train the tokenizer on"""
    val_fraction: Annotated[float, Field(gt=0, le=0.5)] = 0.01
    """share of the documents held out for validation, chosen by a hash of their text; with only a
    few long documents, passages of them are held out"""
    shard_tokens: Positive = 100_000_000
    """tokens per file of the prepared set"""
    seq_len: Positive = 512
    """tokens in a training sequence"""
    document_mask: bool = False
    """keep the documents of a sequence apart, also in evaluations: attention does not see earlier
    documents, and positions restart"""
    threads: Count = 0
    """threads for tokenization; 0 = one per core"""

    @property
    def is_mixture(self) -> bool:
        """Whether the sources are tables."""
        return isinstance(self.sources[0], Source)

    @property
    def texts(self) -> list[str]:
        """The sources, for a config without tables."""
        return [source for source in self.sources if isinstance(source, str)]

    def mixture(self) -> list[Source]:
        """The sources as complete parts of a mixture; without tables, data.path is the only part.

        Raises:
            UserError: as :func:`bitnet.data.mixture.completed`.
        """
        tables = [source for source in self.sources if isinstance(source, Source)]
        only = Source(name=Path(self.path).name, path=self.path, texts=self.texts)
        return completed(tables, Path(self.path)) if tables else [only]


@dataclass(frozen=True, config=STRICT)
class Shard:
    """A file of tokens."""

    file: str
    """its name in the folder"""
    n_tokens: Positive
    """tokens in it, including EOS"""
    sha256: str
    """hash of the file, in hex"""


@dataclass(frozen=True, config=STRICT)
class Split:
    """The sizes and files of one split."""

    n_tokens: Positive
    """tokens, including EOS"""
    n_bytes: Positive
    """exact UTF-8 bytes of the text"""
    n_documents: Positive
    """documents, one per EOS token"""
    shards: list[Shard]
    """in order"""


@dataclass(frozen=True, config=STRICT)
class Index:
    """The contents of index.json."""

    version: Literal[1]
    """version of the format"""
    dtype: Literal["uint16", "uint32"]
    """dtype of an id, little-endian"""
    vocab_size: Positive
    """ids of the tokenizer"""
    eos_id: Count
    """the token that ends each document"""
    tokenizer_sha256: str
    """hash of the tokenizer's file, in hex"""
    held_out: Literal["documents", "passages"]
    """the units of the validation split"""
    sources_digest: str
    """hash of the names and sizes of the local source files"""
    settings: dict[str, Any]
    """the [data] settings that determine the contents"""
    splits: dict[SplitName, Split]
    """train and val"""


def read_index(path: Path) -> Index:
    """Read index.json of a prepared set.

    Raises:
        UserError: there is no prepared set at ``path``, or its index is damaged or too new.
    """
    file = path / INDEX
    if not file.is_file():
        what = "is not a prepared set (it has no index.json)" if path.exists() else "does not exist"
        raise UserError(f"data.path: {path} {what}; make one with `bitnet prepare`")
    try:
        raw = read_file(file, 2**26)
        content = json.loads(raw)
        if isinstance(content, dict) and content.get("version", VERSION) != VERSION:
            raise UserError(
                f"{file}: format version {content['version']}, this program reads {VERSION}; "
                "delete the folder and prepare it again"
            )
        index = TypeAdapter(Index).validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{file}: damaged: {where}: {first['msg']}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file}: damaged: {error}; delete {path} and prepare it again") from error
    for shard in (shard for split in index.splits.values() for shard in split.shards):
        if Path(shard.file).name != shard.file:
            raise UserError(f"{file}: damaged: {shard.file!r} is not a file of this folder")
    for name in ("train", "val"):
        split = index.splits.get(name)
        if split is None or split.n_tokens != sum(shard.n_tokens for shard in split.shards):
            raise UserError(f"{file}: damaged: the shards of {name} do not add up")
    return index


class TokenDataset:
    """One split of a prepared set, read from its files on demand.

    Attributes:
        path, split: as given.
        n_tokens, n_bytes, n_documents: sizes of the split; bytes are the UTF-8 bytes of its text.
        vocab_size, eos_id: of the tokenizer.
        held_out: whether the validation split consists of whole "documents" or of "passages".

    Arguments:
        path: the prepared folder.
        split: "train" or "val".
        verify: compare each shard's checksum, which reads the whole shard (about 1 s per
            gigabyte); sizes are always compared.
    Raises:
        UserError: there is no such set, or a file is missing, damaged or from a different set.
    """

    def __init__(self, path: Path | str, split: SplitName, verify: bool = True) -> None:
        self.path = Path(path)
        self.split: SplitName = split
        index = read_index(self.path)
        if split not in index.splits:
            raise ValueError(f"split: expected 'train' or 'val', got {split!r}")
        self.n_tokens = index.splits[split].n_tokens
        self.n_bytes = index.splits[split].n_bytes
        self.n_documents = index.splits[split].n_documents
        self.vocab_size, self.eos_id = index.vocab_size, index.eos_id
        self.held_out = index.held_out
        self._tokenizer_sha256 = index.tokenizer_sha256
        dtype = np.dtype(index.dtype).newbyteorder("<")
        shards = index.splits[split].shards
        self._shards = [_open_shard(self.path, shard, dtype, verify) for shard in shards]
        self._ends = np.cumsum([shard.n_tokens for shard in shards])

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the ids.

        Raises:
            UserError: its file is missing, damaged, or of a different tokenizer.
        """
        path = tokenizer_path(self.path)
        if hashlib.sha256(read_model(path)).hexdigest() != self._tokenizer_sha256:
            raise UserError(f"{path}: is not the tokenizer this set was prepared with")
        tokenizer = load_tokenizer(path)
        if (tokenizer.vocab_size, tokenizer.eos_id) != (self.vocab_size, self.eos_id):
            raise UserError(
                f"{self.path / INDEX}: damaged: another tokenizer's vocab_size or eos_id"
            )
        return tokenizer

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens ``start`` to ``stop`` of the split: int64 ``[stop - start]``.

        Raises:
            ValueError: unless ``0 <= start <= stop <= n_tokens``.
        """
        if not 0 <= start <= stop <= self.n_tokens:
            raise ValueError(f"tokens {start}..{stop}: the split has {self.n_tokens}")
        parts = []
        number = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            shard, end = self._shards[number], int(self._ends[number])
            offset = int(self._ends[number - 1]) if number else 0
            parts.append(shard.read(start - offset, min(stop, end) - offset).astype(np.int64))
            start, number = min(stop, end), number + 1
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


class _ShardFile:
    """An open file of tokens. If a file becomes shorter, a memory mapping ends the process with
    SIGBUS; reading does not. And its pages never count as the process's memory."""

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self._path, self._dtype = path, dtype
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens ``start`` to ``stop`` of the file."""
        tokens = np.empty(stop - start, self._dtype)
        left, offset = tokens.data.cast("B"), start * self._dtype.itemsize
        while left:  # the system reads at most 2 GB at once
            if not (n_bytes := os.preadv(self._descriptor, [left], offset)):
                raise UserError(f"{self._path}: damaged: it became shorter while it was read")
            left, offset = left[n_bytes:], offset + n_bytes
        return tokens


def _open_shard(folder: Path, shard: Shard, dtype: np.dtype, verify: bool) -> _ShardFile:
    path = folder / shard.file
    if not path.is_file():
        raise UserError(f"{path}: missing; delete {folder} and prepare it again")
    size = path.stat().st_size
    if size != shard.n_tokens * dtype.itemsize:
        problem = f"has {size} bytes, the index says {shard.n_tokens * dtype.itemsize}"
    elif verify and sha256(path) != shard.sha256:
        problem = "its checksum is not the index's"
    else:
        return _ShardFile(path, dtype)
    raise UserError(f"{path}: damaged: {problem}; delete {folder} and prepare it again")


class Loader:
    """Training batches as a pure function of (seed, step), divided among ranks.

    Batch ``step`` holds sequences ``step * B .. step * B + B - 1`` of an endless series. For one
    set, the series is epoch after epoch, each a permutation of all windows; a batch may span two
    epochs. Tokens after the last whole window are left out of every epoch. For several sets, each
    has its own series, and :class:`bitnet.data.mixture.Schedule` gives it places in the mixed one.

    Arguments:
        datasets: the split to read, or one split per part of a mixture.
        seq_len: T, tokens per sequence.
        batch_sequences: B, sequences of the global batch.
        seed: seed of the order.
        weights: one per dataset if there are several; their sum need not be 1.
    Raises:
        UserError: a split has too few tokens for one window.
    """

    def __init__(
        self,
        datasets: TokenDataset | Sequence[TokenDataset],
        seq_len: int,
        batch_sequences: int,
        seed: int,
        weights: Sequence[float] = (1.0,),
    ) -> None:
        if seq_len < 1 or batch_sequences < 1:
            raise ValueError(
                f"seq_len and batch_sequences: expected 1 or more, got {seq_len}, {batch_sequences}"
            )
        if isinstance(datasets, TokenDataset):
            datasets = [datasets]
        if len(datasets) != len(weights):
            raise ValueError(f"weights: expected one per dataset, got {len(weights)}")
        self._parts = [_Windows(dataset, seq_len, seed) for dataset in datasets]
        self._schedule = Schedule(weights, seed)
        self._seq_len, self._batch = seq_len, batch_sequences

    def epochs(self, step: int) -> list[float]:
        """How often each set has been read before ``step``, in epochs."""
        counts = self._schedule.counts(step * self._batch)
        return [n / part.n_windows for n, part in zip(counts, self._parts, strict=True)]

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a step.

        Arguments:
            step: from 0.
            rank, world_size: rank r gets the r-th of ``world_size`` contiguous parts of the batch.
        Returns:
            int64 ``[B / world_size, T]`` each; targets are the inputs shifted by one.
        Raises:
            UserError: B is not divisible by ``world_size``.
        """
        if self._batch % world_size:
            raise UserError(
                f"a batch of {self._batch} sequences cannot be divided among {world_size} processes"
            )
        if not 0 <= rank < world_size or step < 0:
            raise ValueError(f"step {step}, rank {rank} of {world_size}: out of range")
        rows = self._batch // world_size
        first = step * self._batch + rank * rows
        windows_BT = np.empty((rows, self._seq_len + 1), dtype=np.int64)
        sources_B = self._schedule.sources(first, rows)
        for number, begun in enumerate(self._schedule.counts(first)):
            places = np.flatnonzero(sources_B == number)
            windows = self._parts[number].read(begun, len(places))
            for row, window in zip(places, windows, strict=True):
                windows_BT[row] = window
        inputs_BT, targets_BT = windows_BT[:, :-1], windows_BT[:, 1:]
        # numpy copies: torch's operators would start OpenMP threads in the prefetching thread
        return torch.from_numpy(inputs_BT.copy()), torch.from_numpy(targets_BT.copy())


class _Windows:
    """The windows of one split in an endless series of epochs.

    Attributes:
        n_windows: windows in an epoch.
    """

    def __init__(self, dataset: TokenDataset, seq_len: int, seed: int) -> None:
        self.n_windows = (dataset.n_tokens - 1) // seq_len
        if self.n_windows < 1:
            raise UserError(
                f"{dataset.path}: split {dataset.split} has {dataset.n_tokens} tokens, one "
                f"sequence of data.seq_len = {seq_len} needs {seq_len + 1}; shorten it or add text"
            )
        self._dataset, self._seq_len, self._seed = dataset, seq_len, seed

    def read(self, first: int, count: int) -> Iterator[np.ndarray]:
        """Windows ``first`` to ``first + count - 1``: int64 ``[T + 1]`` each."""
        while count:
            epoch, start = divmod(first, self.n_windows)
            taken = min(count, self.n_windows - start)
            key = f"{self._seed}/{epoch}".encode()
            positions = np.arange(start, start + taken, dtype=np.uint64)
            for window in permute(positions, self.n_windows, key).tolist():
                begin = window * self._seq_len
                yield self._dataset.tokens(begin, begin + self._seq_len + 1)
            first, count = first + taken, count - taken


def permute(positions: np.ndarray, n: int, key: bytes) -> np.ndarray:
    """Apply a keyed permutation of ``range(n)`` to some positions.

    A Feistel network of 8 rounds with splitmix64's finalizer as round function, applied again while
    the result is n or more: at most 4 times on average.

    Arguments:
        positions: uint64 ``[P]`` below ``n``.
        n: at least 1.
        key: any bytes; each key gives a different permutation.
    Returns:
        uint64 ``[P]`` below ``n``.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    round_keys = np.frombuffer(hashlib.blake2b(key).digest(), dtype="<u8").astype(np.uint64)

    def network(x: np.ndarray) -> np.ndarray:
        left, right = x >> half, x & mask
        for round_key in round_keys:
            left, right = right, left ^ (_mix(right + round_key) & mask)
        return (left << half) | right

    found = network(positions)
    while (outside := found >= n).any():
        found[outside] = network(found[outside])
    return found


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finalizer (Steele, Lea and Flood, 2014), modulo 2^64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def window_starts(n_tokens: int, seq_len: int, max_tokens: int = 0) -> Iterator[int]:
    """The start positions of windows of ``seq_len`` predictions among ``n_tokens``: of all windows,
    or of windows with about ``max_tokens`` predictions, spread evenly (the beginning of the text
    may be all of one kind)."""
    n_windows = -(-n_tokens // seq_len)
    count = min(n_windows, max(1, max_tokens // seq_len)) if max_tokens else n_windows
    return (i * n_windows // count * seq_len for i in range(count))


def sequential_windows(
    dataset: TokenDataset, seq_len: int, max_tokens: int = 0
) -> Iterator[Tensor]:
    """Windows for evaluation: every token of a split is predicted exactly once, in order.

    The first token's context is EOS, as if a document had just ended. The last window may be
    shorter. So over the whole split, ``Tokenizer.count_bytes`` summed over the windows is exactly
    the split's ``n_bytes``. The sum is exact for a subset of the windows too.

    Arguments:
        dataset: N tokens.
        seq_len: T, predictions per window.
        max_tokens: approximate number of predictions; 0 = all. See :func:`window_starts`.
    Yields:
        int64 ``[T + 1]``, the last one possibly shorter: inputs are ``[:-1]``, targets ``[1:]``.
    """
    for start in window_starts(dataset.n_tokens, seq_len, max_tokens):
        first = np.array([dataset.eos_id]) if start == 0 else dataset.tokens(start - 1, start)
        tokens = dataset.tokens(start, min(start + seq_len, dataset.n_tokens))
        yield torch.from_numpy(np.concatenate([first, tokens]))
