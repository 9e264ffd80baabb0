"""The prepared sets of a run: one, or one for each part of a mixture."""

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
    """Of its training sequences, relative to the other parts'."""
    train: TokenDataset
    val: TokenDataset


def open_parts(config: DataConfig, *, progress: bool = True) -> list[Part]:
    """The sets of a config, prepared before if they are missing. All have one tokenizer.

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
    """A hash of all tokens, in hex: that of the index, or of the indexes, which hold the hashes of
    their files."""
    hashes = [sha256(Path(part.train.path) / INDEX) for part in parts]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def loader_of(parts: Sequence[Part], seq_len: int, batch_sequences: int, seed: int) -> Loader:
    """The training batches of a run: arguments of :class:`Loader`."""
    weights = [part.weight for part in parts]
    return Loader([part.train for part in parts], seq_len, batch_sequences, seed, weights)
