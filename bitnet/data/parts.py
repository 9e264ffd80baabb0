"""The prepared sets of a run: one set, or one per part of a mixture."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bitnet.data.loader import INDEX, DataConfig, Loader, TokenDataset
from bitnet.data.prepare import prepare_all
from bitnet.durable import sha256


class Part(NamedTuple):
    """One of the sets."""

    name: str
    weight: float
    """Its share of the training sequences, relative to the other parts' weights."""
    train: TokenDataset
    val: TokenDataset


def open_parts(config: DataConfig, *, progress: bool = True) -> list[Part]:
    """Open the sets of a config; prepare missing ones first. All share one tokenizer.

    Raises:
        UserError, OSError: as :func:`bitnet.data.prepare.prepare_all` and :class:`TokenDataset`.
    """
    return [
        Part(
            source.name,
            source.weight,
            TokenDataset(source.path, "train"),
            TokenDataset(source.path, "val"),
        )
        for source in prepare_all(config, progress=progress)
    ]


def hash_of(parts: Sequence[Part]) -> str:
    """A hash of all tokens, in hex: the hash of the index or indexes, which hold the hashes of
    their files."""
    hashes = [sha256(Path(part.train.path) / INDEX) for part in parts]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def loader_of(parts: Sequence[Part], seq_len: int, batch_sequences: int, seed: int) -> Loader:
    """Make the loader of a run's training batches. Arguments as for :class:`Loader`."""
    weights = [part.weight for part in parts]
    return Loader([part.train for part in parts], seq_len, batch_sequences, seed, weights)
